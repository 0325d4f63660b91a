"""A small lake of both kinds, for what reads one."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitlake_schemas import CaptureSpec, ScoresRecord
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rows import LakeSample
from logitlake_shared.student_scores import ScoredSample, write_scores


@pytest.fixture
def small_lake(
    tmp_path: Path,
    capture_spec: CaptureSpec,
    make_unit: Callable[..., UnitResult],
    make_pair_unit: Callable[[int], UnitResult],
) -> Path:
    """Cache `main` of samples (units 1 to 3: six samples, 24 tokens) and cache `pairs` (units 1 and 2: two pairs)."""
    root = tmp_path / "lake"
    lake = Lake.create(root)
    samples = lake.create_cache("main", capture_spec)
    pairs = lake.create_cache("pairs", capture_spec.model_copy(update={"kind": "pairs"}))
    for number in (3, 1, 2):
        samples.publish_unit(make_unit(number))
    for number in (1, 2):
        pairs.publish_unit(make_pair_unit(number))
    samples.snapshot()
    pairs.snapshot()
    return root


def made_scores(lake: Path, path: Path, *, num_samples: int | None = None, **record: Any) -> list[ScoredSample]:
    """Scores that no student gave, of the first samples of cache `main`, in the file at `path`."""
    cache = Lake.open(lake).cache("main")
    generator = np.random.default_rng(0)

    def scored(sample: LakeSample) -> ScoredSample:
        num_tokens = len(sample.response_ids)
        topk_logprobs_TK = np.log(generator.dirichlet(np.ones(4), num_tokens)).astype(np.float32)
        return ScoredSample(
            sample_id=sample.sample_id,
            task=sample.task,
            label_logprob_T=-generator.exponential(size=num_tokens).astype(np.float32),
            label_rank_T=generator.integers(1, 50, num_tokens).astype(np.int32),
            entropy_T=generator.exponential(size=num_tokens).astype(np.float32),
            forward_kl_T=generator.exponential(size=num_tokens).astype(np.float32),
            topk_ids_TK=generator.integers(0, 50, (num_tokens, 4)).astype(np.int32),
            topk_logprobs_TK=-np.sort(-topk_logprobs_TK),
        )

    dataset = LakeDataset(lake, "main")
    samples = [scored(dataset[place]) for place in range(len(dataset) if num_samples is None else num_samples)]
    facts = {"student": "demo/d2s", "model_sha256": "0" * 64, "dtype": "float32", "cache": "main", "snapshot": 1}
    facts |= {"spec_fingerprint": cache.fingerprint, "split": None, "top": 4}
    with write_scores(path, ScoresRecord.model_validate(facts | record)) as scores:
        scores.add(samples)
    return samples


def older_duckdb() -> Path:
    """Where a DuckDB 1.4 is, beside the real one. Without it a test is skipped, or fails where all must be there."""
    older = Path(sys.prefix) / "duckdb-1.4"
    if not older.is_dir():
        says = f"DuckDB 1.4 is not installed at {older}; `make .venv/.installed-test` puts it there"
        (pytest.fail if os.environ.get("LOGITLAKE_REQUIRE_VLLM") == "1" else pytest.skip)(says)
    return older
