"""`logitlake diff`: the laws of the divergence between two truncated distributions, and of coverage."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from logitlake_schemas import CaptureSpec, CodecPolicy
from logitlake_shared.cli import cli
from logitlake_shared.errors import DataError
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.tools.diff import diff_caches
from logitlake_shared.tools.diff_text import diff_json, print_diff
from logitlake_shared.tools.divergence import row_divergence
from logitlake_shared.topk import StoredRows, TeacherRows, decode, encode

MakeUnit = Callable[..., UnitResult]
VOCAB_SIZE = 40
EXACT = CodecPolicy(k_max=8, k_min=8, p_min=0.0, grid="exact")
GRID = CodecPolicy(k_max=8, k_min=2, p_min=1e-2, max_mean_kl=1e-3)
# float64 sums of float32 logprobs, whose own rounding is 6e-8 of values up to 20 nats.
ROUNDING = 1e-5
# The fixture is a pure function: nothing of one example reaches the next.
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_cache_does_not_differ_from_itself(small_lake: Path) -> None:
    """No field, no sample and no token; the same first choices; every label as likely."""
    lake = Lake.open(small_lake)
    diff = diff_caches(lake.cache("main"), lake.cache("main"))
    assert (diff.spec, diff.in_both, diff.only_in_a, diff.only_in_b, diff.worst) == ([], 6, 0, 0, [])
    figures = diff.total().figures()
    assert (figures["tokens"], figures["kl_mean"], figures["kl_max"]) == (24, 0, 0)
    assert (figures["top1_agreement"], figures["label_logprob_distance"]) == (1, 0)
    pairs = diff_caches(lake.cache("pairs"), lake.cache("pairs")).pairs
    assert pairs is not None
    assert pairs.figures() == {"pairs": 2, "same_preference": 1, "margin_distance": 0}


def test_an_exact_cache_and_its_grid_twin_differ_by_the_stored_error(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """The same rows stored twice: KL(exact‖grid) is what the writer of the grid measured when it wrote them."""
    exact, grid = _caches(tmp_path, capture_spec, EXACT, GRID)
    for number in (1, 2, 3):
        exact.publish_unit(make_unit(number, codec=EXACT, num_samples=8))
        grid.publish_unit(make_unit(number, codec=GRID, num_samples=8))
    exact.snapshot()
    records = grid.snapshot().commits
    measured = [record.stored_error for record in records if record.stored_error is not None]
    figures = diff_caches(exact, grid).total().figures()
    means = [error.kl_mean for error in measured if error.kl_mean is not None]
    assert len(means) == 3
    assert np.mean(means) > 1e-6
    assert figures["kl_mean"] == pytest.approx(np.mean(means), rel=1e-2, abs=1e-9)
    assert figures["kl_max"] == pytest.approx(max(error.kl_max or 0 for error in measured), rel=1e-2)
    assert figures["top1_agreement"] == 1


def test_coverage_is_symmetric(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit) -> None:
    """What is only in A one way round is only in B the other way; what is in both stays."""
    a, b = _caches(tmp_path, capture_spec, EXACT, GRID)
    for number in (1, 2):
        a.publish_unit(make_unit(number, codec=EXACT))
    for number in (2, 3, 4):
        b.publish_unit(make_unit(number, codec=GRID))
    a.snapshot()
    b.snapshot()
    there, back = diff_caches(a, b), diff_caches(b, a)
    assert (there.in_both, there.only_in_a, there.only_in_b) == (2, 2, 4)
    assert (back.in_both, back.only_in_a, back.only_in_b) == (2, 4, 2)
    assert there.total().figures()["top1_agreement"] == back.total().figures()["top1_agreement"]
    assert {sentence.split(":")[0] for sentence in there.spec} == {sentence.split(":")[0] for sentence in back.spec}


@stateless
@given(seed=st.integers(0, 10_000), k_a=st.integers(1, VOCAB_SIZE), k_b=st.integers(1, VOCAB_SIZE))
def test_it_is_a_lower_bound_of_the_whole_divergence(
    teacher_rows: Callable[..., TeacherRows], seed: int, k_a: int, k_b: int
) -> None:
    """Never negative, never above KL over the vocabulary, and equal to it where both store the vocabulary."""
    full_a, full_b = (teacher_rows(3, VOCAB_SIZE, seed + place) for place in (0, 1))
    whole_T = _dense_kl(full_a, full_b)
    kl_T = row_divergence(_stored(full_a, k_a), _stored(full_b, k_b)).kl_T
    assert (kl_T >= 0).all()
    assert (kl_T <= whole_T + ROUNDING).all()
    both_T = row_divergence(_stored(full_a, VOCAB_SIZE), _stored(full_b, VOCAB_SIZE)).kl_T
    np.testing.assert_allclose(both_T, whole_T, atol=ROUNDING)


@stateless
@given(seed=st.integers(0, 10_000), k_a=st.integers(1, VOCAB_SIZE), k_b=st.integers(1, VOCAB_SIZE))
def test_it_is_the_obvious_sum_over_shared_ids_and_a_bucket(
    teacher_rows: Callable[..., TeacherRows], seed: int, k_a: int, k_b: int
) -> None:
    """One token at a time, with dictionaries."""
    a, b = _stored(teacher_rows(4, VOCAB_SIZE, seed), k_a), _stored(teacher_rows(4, VOCAB_SIZE, seed + 1), k_b)
    found = row_divergence(a, b)
    for t, ((p, tail_p), (q, tail_q)) in enumerate(zip(_dictionaries(a), _dictionaries(b), strict=True)):
        shared = p.keys() & q.keys()
        rest_p = tail_p + sum(p[i] for i in p.keys() - shared)
        rest_q = tail_q + sum(q[i] for i in q.keys() - shared)
        kl = sum(p[i] * np.log(p[i] / q[i]) for i in shared)
        if rest_p > 0:
            kl += rest_p * np.log(rest_p / rest_q)
        assert found.kl_T[t] == pytest.approx(kl, abs=ROUNDING)
        assert found.shared_mass_T[t] == pytest.approx(sum(p[i] for i in shared), abs=ROUNDING)


def test_nothing_shared_says_nothing() -> None:
    """Two rows without a common id have one class left, and no divergence on it."""
    rows = [_one_token([id_], [0.9], tail=0.1) for id_ in (3, 4)]
    found = row_divergence(*rows)
    assert found.kl_T.tolist() == [0]
    assert found.shared_mass_T.tolist() == [0]


def test_what_b_rules_out_is_counted_and_not_averaged(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """B without a tail (draws, say) and A with mass elsewhere: infinite, told apart from the mean."""
    assert row_divergence(_one_token([3], [0.9], tail=0.1), _one_token([3], [1.0], tail=0.0)).kl_T.tolist() == [np.inf]
    assert row_divergence(_one_token([3], [1.0], tail=0.0), _one_token([3], [0.9], tail=0.1)).kl_T[0] == pytest.approx(
        -np.log(0.9)
    )
    a, b = _caches(tmp_path, capture_spec, EXACT, GRID)
    unit = make_unit(1, codec=EXACT)
    sure = [
        replace(sample, rows=replace(sample.rows, log_tail_mass_T=np.full(4, -np.inf, np.float32)))
        for sample in unit.samples
    ]
    a.publish_unit(unit)
    b.publish_unit(replace(unit, samples=sure))
    a.snapshot()
    b.snapshot()
    figures = diff_caches(a, b).total().figures()
    assert figures["kl_infinite"] == 8
    assert figures["kl_mean"] == 0
    assert diff_caches(b, a).total().figures()["kl_infinite"] == 0


def test_other_responses_are_counted_and_not_compared(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """The same id with another answer is no question about the same tokens."""
    a, b = _caches(tmp_path, capture_spec, EXACT, GRID)
    unit = make_unit(1, codec=EXACT)
    other = replace(unit.samples[0], response_ids=np.array([7, 8, 10, 1], np.int32))
    a.publish_unit(unit)
    b.publish_unit(replace(unit, samples=[other, unit.samples[1]]))
    a.snapshot()
    b.snapshot()
    diff = diff_caches(a, b)
    assert (diff.in_both, diff.other_responses, diff.total().samples) == (2, 1, 1)


def test_other_token_maps_compare_coverage_alone(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """Ids that mean other things are not compared, and the output says so."""
    tokenizer = capture_spec.tokenizer.model_copy(update={"token_map_sha256": "e" * 64})
    lake = Lake.create(tmp_path / "lake")
    a = lake.create_cache("a", capture_spec)
    b = lake.create_cache("b", capture_spec.model_copy(update={"tokenizer": tokenizer}))
    for cache in (a, b):
        cache.publish_unit(make_unit(1))
        cache.snapshot()
    diff = diff_caches(a, b)
    assert (diff.in_both, diff.tasks, diff.worst) == (2, {}, [])
    assert diff.not_comparable is not None
    assert "the token maps differ" in diff.not_comparable
    assert json.loads(diff_json(diff))["total"] is None


def test_the_worst_tokens_are_the_worst(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit) -> None:
    """By falling divergence, over all units, as a list of everything would have it."""
    a, b = _caches(tmp_path, capture_spec, EXACT, GRID)
    for number in (1, 2, 3):
        a.publish_unit(make_unit(number, codec=EXACT, num_samples=4))
        b.publish_unit(make_unit(number, codec=GRID, num_samples=4))
    a.snapshot()
    b.snapshot()
    everything = diff_caches(a, b, num_worst=1000).worst
    assert [token.kl for token in everything] == sorted((token.kl for token in everything), reverse=True)
    assert diff_caches(a, b, num_worst=5).worst == everything[:5]
    assert diff_caches(a, b, num_worst=0).worst == []


def test_the_command_prints_and_writes_it(small_lake: Path, tmp_path: Path) -> None:
    """A table, JSON with the same figures, another lake for B, and no two kinds."""
    shown = _output("diff", str(small_lake), "main", "main")
    assert "no field differs" in shown
    assert "6 in both, 0 only in A, 0 only in B" in shown
    document = json.loads(_output("diff", str(small_lake), "main", "main", "--to-lake", str(small_lake), "-o", "json"))
    assert document["coverage"] == {"in_both": 6, "only_in_a": 0, "only_in_b": 0}
    assert [task["task"] for task in document["tasks"]] == ["caption", "reading"]
    assert document["total"]["tokens"] == 24
    result = CliRunner().invoke(cli, ["diff", str(small_lake), "main", "pairs"])
    assert isinstance(result.exception, DataError)


@pytest.mark.parametrize("width", [80, 140])
def test_the_text_stays_within_the_terminal(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit, width: int
) -> None:
    """No line is longer than the terminal."""
    a, b = _caches(tmp_path, capture_spec, EXACT, GRID)
    a.publish_unit(make_unit(1, codec=EXACT))
    b.publish_unit(make_unit(1, codec=GRID))
    a.snapshot()
    b.snapshot()
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    print_diff(diff_caches(a, b), "a", "b", console)
    assert isinstance(console.file, io.StringIO)
    assert max(len(line) for line in console.file.getvalue().splitlines()) <= width


def _caches(tmp_path: Path, spec: CaptureSpec, *codecs: CodecPolicy) -> list[Cache]:
    lake = Lake.create(tmp_path / "lake")
    return [
        lake.create_cache(name, spec.model_copy(update={"codec": codec}))
        for name, codec in zip("ab", codecs, strict=True)
    ]


def _stored(rows: TeacherRows, k: int) -> StoredRows:
    """The k best, exactly."""
    return encode(rows, CodecPolicy(k_max=VOCAB_SIZE, k_min=k, p_min=0.999999, grid="exact"))


def _one_token(ids: list[int], probabilities: list[float], tail: float) -> StoredRows:
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.array([tail], np.float32))
    one = np.zeros(1, np.float32)
    return StoredRows(
        k_T=np.array([len(ids)], np.uint16),
        topk_ids=np.array(ids, np.int32),
        topk_logprobs=np.log(np.array(probabilities, np.float32)),
        label_logprob_T=one,
        label_rank_T=np.ones(1, np.int32),
        log_tail_mass_T=log_tail,
        entropy_T=one,
    )


def _dense_kl(a: TeacherRows, b: TeacherRows) -> np.ndarray:
    log_p, log_q = np.zeros((3, VOCAB_SIZE)), np.zeros((3, VOCAB_SIZE))
    np.put_along_axis(log_p, a.topk_ids_TK, a.topk_logprobs_TK.astype(np.float64), 1)
    np.put_along_axis(log_q, b.topk_ids_TK, b.topk_logprobs_TK.astype(np.float64), 1)
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def _dictionaries(rows: StoredRows) -> list[tuple[dict[int, float], float]]:
    """Probability by id, and the tail's, of each token."""
    ids_TK, logprobs_TK, log_tail_T = decode(rows)
    return [
        (
            {int(id_): float(np.exp(logprob)) for id_, logprob in zip(ids[:k], logprobs[:k], strict=True)},
            float(np.exp(log_tail)),
        )
        for ids, logprobs, k, log_tail in zip(ids_TK, logprobs_TK, rows.k_T, log_tail_T, strict=True)
    ]


def _output(*arguments: str) -> str:
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
