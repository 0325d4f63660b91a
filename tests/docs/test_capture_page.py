"""The run-book's hours are what `plan` computes, and the README's tables are the configuration."""

import re
from pathlib import Path

import pytest

from logitlake_schemas import ERROR_CODES
from logitlake_shared.config import field_table
from logitlake_teacher.config import CaptureConfig, EstimateConfig, PairsConfig
from logitlake_teacher.config.serve import ServeConfig
from logitlake_teacher.planning.estimate import estimate, prefill_rate

ROOT = Path(__file__).parents[2]
TOKENS = 1_000_000 * 1_200
# The page gives hours to two digits.
ROUNDING = 0.06


def test_the_codes_of_samples_are_listed() -> None:
    """All that there are, in their order."""
    page = (ROOT / "docs" / "capture.md").read_text(encoding="utf-8")
    listed = page.partition("Per-sample codes: ")[2].partition(". Each")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == ERROR_CODES


def runbook() -> list[list[str]]:
    """The rows of the run-book's table."""
    page = (ROOT / "docs" / "capture.md").read_text(encoding="utf-8")
    lines = page.partition("## GPU run-book")[2].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_run_book_covers_one_eight_and_sixty_four_gpus() -> None:
    """Every size that the page promises."""
    assert {row[2] for row in runbook()} == {"1", "8", "64"}


@pytest.mark.parametrize("row", runbook(), ids=lambda row: f"{row[0]}-{row[2]}")
def test_the_hours_of_the_run_book_are_computed(row: list[str]) -> None:
    """teacher | active parameters (B) | GPUs | engines x GPUs | GPU-hours | hours."""
    _, parameters, gpus, engines, gpu_hours, hours = row
    num_engines, gpus_per_engine = (int(part) for part in re.findall(r"\d+", engines))
    assert num_engines * gpus_per_engine == int(gpus)
    config = EstimateConfig(gpus_per_engine=gpus_per_engine, num_gpus=int(gpus))
    made = estimate(TOKENS, 0, prefill_rate(float(parameters) * 1e9, config), config)
    for shown, computed in ((gpu_hours, made.gpu_hours), (hours, made.hours)):
        low, high = (float(part) for part in re.findall(r"[\d.]+", shown))
        assert (low, high) == (pytest.approx(computed[0], rel=ROUNDING), pytest.approx(computed[1], rel=ROUNDING))


def readme_table(command: str) -> list[str]:
    """The lines between the README's markers."""
    text = (ROOT / "teacher_service" / "README.md").read_text(encoding="utf-8")
    _, start, rest = text.partition(f"<!-- fields of {command} -->\n")
    table, end, _ = rest.partition("<!-- end -->")
    assert start
    assert end
    return table.strip().splitlines()


def test_the_readme_holds_every_key_of_capture() -> None:
    """Between its markers stands what `field_table` makes of the configuration now."""
    assert readme_table("capture") == field_table(CaptureConfig).strip().splitlines()


def test_the_readme_holds_every_key_of_serve() -> None:
    assert readme_table("serve") == field_table(ServeConfig).strip().splitlines()


def test_the_readme_holds_what_pairs_has_beside_it() -> None:
    """The rows of `pairs` that `capture` does not have in the same words."""
    own = field_table(PairsConfig).strip().splitlines()
    shared = set(field_table(CaptureConfig).splitlines())
    assert readme_table("pairs") == [*own[:2], *(line for line in own[2:] if line not in shared)]
