"""Figures of jobs have the series that are declared, whatever attempts tell; nothing of it is lost on the way."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.shared.jobs.book import values

from logitlake_schemas import ERROR_CODES, SET_ASIDE_CODES
from logitlake_shared.jobs.measured import Measured
from logitlake_shared.jobs.records import Counts
from logitlake_shared.jobs.store import JobStore
from logitlake_shared.web.job_figures import STUDENT_FIGURES, TEACHER_FIGURES, CountsFigure
from logitlake_shared.web.job_metrics import JobMetrics

SAMPLES, LOOKUPS = (figure for figure in TEACHER_FIGURES if isinstance(figure, CountsFigure))
NUMBERS = st.integers(0, 2**60)


@pytest.fixture
def metrics(tmp_path: Path) -> JobMetrics:
    """Of both services, over no jobs."""
    return JobMetrics(JobStore(tmp_path / "jobs.sqlite"), (*TEACHER_FIGURES, *STUDENT_FIGURES))


@given(
    errors=st.dictionaries(st.sampled_from((*ERROR_CODES, "pair_none")) | st.text(max_size=3), NUMBERS),
    without_code=st.tuples(NUMBERS, NUMBERS),
    done=st.tuples(NUMBERS, NUMBERS),
)
def test_samples_of_all_codes_are_those_of_the_outcome(
    errors: dict[str, int], without_code: tuple[int, int], done: tuple[int, int]
) -> None:
    """A code that is on no list is `other`, and so is none; no series is there that was not from the beginning."""
    quarantined = sum(count for code, count in errors.items() if code in SET_ASIDE_CODES)
    counts = Counts(
        succeeded=done[0],
        skipped_cached=done[1],
        failed=sum(errors.values()) - quarantined + without_code[0],
        quarantined=quarantined + without_code[1],
        errors=errors,
    )
    found, by_outcome = SAMPLES.of(counts), Counter[str]()
    assert found.keys() == SAMPLES.of(Counts()).keys()
    for (outcome, code), count in found.items():
        by_outcome[outcome] += count
        assert code in ("", "other") or count == errors.get(code, 0)
    assert by_outcome == {name: getattr(counts, name) for name in by_outcome}


@given(hits=NUMBERS, misses=NUMBERS, others=NUMBERS)
def test_a_cache_is_asked_for_every_item_once(hits: int, misses: int, others: int) -> None:
    """Whatever comes of those that it had not."""
    counts = Counts(total=hits + misses, skipped_cached=hits, succeeded=misses, cancelled=others)
    assert LOOKUPS.of(counts) == {("hit",): hits, ("miss",): misses}


def test_what_is_not_on_the_list_is_left_out(metrics: JobMetrics) -> None:
    """A label's value of nobody's, a figure without its label, a figure of another form."""
    before = values(metrics)
    told: list[Measured] = [
        {"expert_load_max_ratio/x": [2]},
        {"expert_load_max_ratio/-1": [2]},
        {"expert_load_max_ratio": [2]},
        {"expert_load_max_ratio/0": [1] * 16},
        {"shard_bytes": [1] * 16},
        {"shard_bytes/0": [1]},
    ]
    for line in told:
        metrics.measured({}, line)
    metrics.counted(Counts(), Counts(failed=1, errors={"../../etc": 1}))
    changed = {name for name, value in values(metrics).items() if before.get(name) != value}
    assert changed == {"logitlake_samples_total code=other outcome=failed"}


def test_layers_are_those_of_the_student_that_told_last(metrics: JobMetrics) -> None:
    """Of two that train at once, too: no layer of the one stands beside those of the other."""

    def layers() -> dict[str, float]:
        return {name: value for name, value in values(metrics).items() if "expert_load" in name}

    metrics.measured({}, {f"expert_load_max_ratio/{layer}": [1.5] for layer in range(3)})
    assert len(layers()) == 3
    metrics.measured({}, {"train_tokens": [5]})
    assert len(layers()) == 3
    metrics.measured({}, {"expert_load_max_ratio/0": [2.0]})
    assert layers() == {"logitlake_expert_load_max_ratio layer=0": 2.0}
