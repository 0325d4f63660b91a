"""A real lake of three caches, made once, and a pool over it: what a question cannot change can be shared."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import EOS_ID, make_png, make_spec, make_teacher_rows
from tests.contract.conftest import s3_bucket, s3_endpoint

from logitlake_schemas import (
    CodecPolicy,
    UnitError,
)
from logitlake_shared.catalog import publish_catalog
from logitlake_shared.images import inspect_image
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.rows import LakePair, LakeSample
from logitlake_shared.sql_service import SqlLimits, SqlPool
from logitlake_shared.topk import concatenate, encode, stored_error

__all__ = ["VISIBLE", "alive", "fill", "lake", "make_sql_unit", "pool", "s3_bucket", "s3_endpoint", "untouched"]

VISIBLE = ("main", "pairs")
"""what the callers of these tests may see; `hidden` is another one's"""
_CODEC = CodecPolicy(k_max=8, k_min=2)


@pytest.fixture(scope="session")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`main` (4 units of 3 samples, one error; snapshots 1 and 2), `pairs` (2 units), `hidden` (1 unit of samples)."""
    root = tmp_path_factory.mktemp("sql") / "lake"
    fill(Lake.create(root))
    return root


def fill(made: Lake) -> None:
    """Writes the lake of these tests."""
    main, pairs = made.create_cache("main", make_spec("samples")), made.create_cache("pairs", make_spec("pairs"))
    hidden = made.create_cache("hidden", make_spec("samples"))
    for unit in (1, 2):
        main.publish_unit(make_sql_unit(unit))
    main.snapshot()
    hidden.publish_unit(make_sql_unit(9, error="secret-0001"))
    hidden.snapshot()
    publish_catalog(made)
    # What came after the published catalog, which a catalog adds in memory.
    for unit in (3, 4):
        main.publish_unit(make_sql_unit(unit, error="sample-0042" if unit == 4 else None))
    main.snapshot()
    for unit in (1, 2):
        _publish_pair(pairs, unit)
    pairs.snapshot()


@pytest.fixture(scope="module")
def pool(lake: Path) -> Iterator[SqlPool]:
    """A pool with small limits, so that the tests of limits are quick."""
    limits = SqlLimits(num_running=2, num_warm=3, num_waiting=64, timeout_s=30.0, memory_mib=512)
    with SqlPool(lake, limits) as made:
        yield made


@pytest.fixture
def untouched(lake: Path) -> Iterator[None]:
    """Fails when a file of the lake, or one beside it, was made, changed or removed."""
    before = _files(lake.parent)
    yield
    assert _files(lake.parent) == before


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """`alive(pid)`: whether there is such a process that has not ended."""

    def is_alive(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state != "Z"

    return is_alive


def _files(root: Path) -> dict[str, str]:
    return {
        os.path.relpath(path, root): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(root.rglob("*"))
    }


def make_sql_unit(number: int, error: str | None = None) -> UnitResult:
    """Unit `number`: three samples of one image, of three, four and five response tokens."""
    image = inspect_image(make_png(number))
    samples, captured = [], []
    for place in range(3):
        length = 3 + place
        labels = (*range(7, 6 + length), EOS_ID)
        rows = make_teacher_rows(length, _CODEC.k_max, 10 * number + place, labels=labels)
        captured.append(rows)
        samples.append(
            LakeSample(
                sample_id=f"sample-{10 * number + place:04d}",
                task=("caption", "reading", "counting")[place],
                source="made" if number < 3 else "found",
                split="train" if number % 2 else "test",
                messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
                prompt_ids=np.array([5, 2, 6], np.int32),
                prompt_lengths=np.array([3], np.int32),
                response_ids=np.array(labels, np.int32),
                response_lengths=np.array([length], np.int32),
                expanded_length=18 + length,
                image_sha256=(image.image_sha256,),
                rows=encode(rows, _CODEC),
                finish_reason="given",
            )
        )
    errors = () if error is None else (UnitError(sample_id=error, code="image_decode", message="damaged"),)
    return UnitResult(
        unit=f"{number:06d}-test",
        samples=samples,
        images=[image],
        errors=errors,
        stored_error=stored_error(concatenate(captured), encode(concatenate(captured), _CODEC)),
    )


def _publish_pair(cache: Cache, number: int) -> None:
    image = inspect_image(make_png(number))
    pair = LakePair(
        pair_id=f"pair-{number:04d}",
        task="caption",
        source="made",
        split="train",
        messages=[{"role": "user", "content": "?"}],
        prompt_ids=np.array([5, 2, 6], np.int32),
        image_sha256=(image.image_sha256,),
        chosen_ids=np.array([7, EOS_ID], np.int32),
        rejected_ids=np.array([8, 9, EOS_ID], np.int32),
        chosen_logprobs=np.array([-0.5, -0.25], np.float32),
        rejected_logprobs=np.array([-1.5, -0.5, -0.25], np.float32),
        made_by="dataset",
    )
    cache.publish_unit(UnitResult(unit=f"{number:06d}-test", pairs=[pair], images=[image]))
