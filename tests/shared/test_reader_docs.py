"""Every example of `docs/reading.md` runs as it stands, in a folder with a lake of that name."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from logitlake_schemas import CaptureSpec
from logitlake_shared.lake import Lake, UnitResult

PAGE = Path(__file__).parents[2] / "docs" / "reading.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_has_examples() -> None:
    """A page whose fences changed would otherwise pass with nothing run."""
    assert len(SNIPPETS) == 6


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_an_example_runs(
    snippet: str, tmp_path: Path, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]
) -> None:
    """In a process of its own, with warnings as errors; it says something and exits well."""
    cache = Lake.create(tmp_path / "lake").create_cache("main", capture_spec)
    for number in (1, 2, 3):
        cache.publish_unit(make_unit(number, num_samples=4))
    cache.snapshot()
    script = snippet.replace("/tmp/shards", str(tmp_path / "shards"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr
