"""A small lake of both kinds, for what reads one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from logitlake_schemas import CaptureSpec
from logitlake_shared.lake import Lake, UnitResult


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
