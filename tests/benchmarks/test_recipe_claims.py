"""The recipe's claims are judged seed by seed: one run against a claim is enough to fail it."""

from copy import deepcopy
from typing import Any

from benchmarks.recipe import figures_of


def _model(accuracy: float, hallucination: float, kl: float) -> dict[str, float]:
    return {
        "vqa_accuracy": accuracy,
        "hallucination_f1": 0.5,
        "caption_hallucination_rate": hallucination,
        "kl_to_teacher": kl,
    }


SUMMARY: dict[str, Any] = {
    "teacher": _model(0.9, 0.1, 0.0),
    "stages": {
        "init": _model(0.1, 0.9, 1.0),
        "d2d": _model(0.5, 0.2, 0.2),
        "d2s": _model(0.5, 0.2, 0.1),
        "preference": _model(0.5, 0.1, 0.15),
    },
}


def test_a_run_that_goes_the_papers_way_holds_every_claim() -> None:
    """d2s may equal d2d in accuracy; every other claim is strict."""
    figures = figures_of([SUMMARY, SUMMARY])
    claims = {figure.name: figure.holds for figure in figures if figure.holds is not None}
    assert len(claims) == 5
    assert all(claims.values()), claims
    means = {figure.name: figure.value for figure in figures}
    assert means["d2d kl_to_teacher"] == 0.2


def test_one_seed_against_a_claim_fails_it() -> None:
    """A second seed without the cure fails just that claim; equality is no cure."""
    uncured = deepcopy(SUMMARY)
    uncured["stages"]["preference"]["caption_hallucination_rate"] = 0.2
    failed = [figure.name for figure in figures_of([SUMMARY, uncured]) if figure.holds is False]
    assert failed == ["d2s - preference, caption_hallucination_rate"]
