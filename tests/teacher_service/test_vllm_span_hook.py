"""What the span hook computes, against full softmaxes written out; no vLLM takes part.

`DenseModel` stands for a model runner's view of a batch: hidden states of one step, and a `compute_logits`. The steps
that vLLM really makes are tried in `test_vllm_engine.py`.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.engines.vllm import span_hook
from logitlake_teacher.engines.vllm.rows import PackedLayout, rows_of_packed
from logitlake_teacher.engines.vllm.span_hook import PromptSlice, RowScorer, SpanHook, span_request

VOCAB_SIZE = 50
NUM_PADDED = 6  # rows of the lm_head behind the last token
HIDDEN = 16
K = 5
TEMPERATURES = (2.0, 4.0)
# float32 against float64: rounding of sums over fifty logits.
TWIN_TOLERANCE = 1e-5


class DenseModel:
    """A lm_head with padded rows, which must not count, and hidden states for `num_positions`."""

    def __init__(self, num_positions: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden_SH = torch.randn((num_positions, HIDDEN), generator=generator)
        self.head_HV = torch.randn((HIDDEN, VOCAB_SIZE + NUM_PADDED), generator=generator)
        self.ids_S = np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_positions).astype(np.int32)
        self.rows_computed = 0

    def compute_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """As vLLM's models do, with a count."""
        self.rows_computed += len(hidden_RH)
        return hidden_RH @ self.head_HV

    def logprobs_RV(self, rows_R: NDArray[np.int64], temperature: float = 1.0) -> NDArray[np.float64]:
        """The slow twin: the full softmax in float64."""
        logits_RV = (self.hidden_SH[rows_R].double() @ self.head_HV.double())[:, :VOCAB_SIZE] / temperature
        return torch.log_softmax(logits_RV, dim=1).numpy()


def assert_rows_are_dense(rows: TeacherRows, model: DenseModel, rows_R: NDArray[np.int64]) -> None:
    """Every column against the slow twin; the label of row i is token i + 1."""
    labels_R = model.ids_S[rows_R + 1]
    logprobs_RV = model.logprobs_RV(rows_R)
    order_RV = np.argsort(-logprobs_RV, axis=1)
    label_logprob_R = logprobs_RV[np.arange(len(rows_R)), labels_R]
    check_rows(rows, VOCAB_SIZE)
    np.testing.assert_array_equal(rows.topk_ids_TK, order_RV[:, :K])
    np.testing.assert_allclose(
        rows.topk_logprobs_TK, np.take_along_axis(logprobs_RV, order_RV, 1)[:, :K], atol=TWIN_TOLERANCE, rtol=0
    )
    np.testing.assert_allclose(rows.label_logprob_T, label_logprob_R, atol=TWIN_TOLERANCE, rtol=0)
    np.testing.assert_array_equal(rows.label_rank_T, (logprobs_RV > label_logprob_R[:, None]).sum(1) + 1)
    tails = [rows.log_tail_mass_T, *rows.log_tail_mass_TX.T] if rows.log_tail_mass_TX is not None else []
    assert len(tails) == 1 + len(TEMPERATURES)
    for tail_R, temperature in zip(tails, (1.0, *TEMPERATURES), strict=True):
        rest_RV = np.take_along_axis(model.logprobs_RV(rows_R, temperature), order_RV[:, K:], 1)
        np.testing.assert_allclose(tail_R, np.logaddexp.reduce(rest_RV, axis=1), atol=TWIN_TOLERANCE, rtol=0)


def unpack(packed_RW: torch.Tensor, labels_R: NDArray[np.int32]) -> TeacherRows:
    """As the engine does with the array that comes back."""
    return rows_of_packed(packed_RW.numpy(), PackedLayout(K, len(TEMPERATURES)), labels_R)


@pytest.fixture
def scorer() -> RowScorer:
    """K entries, tails at T = 1, 2, 4."""
    return RowScorer(K, VOCAB_SIZE, TEMPERATURES)


def test_packed_rows_are_the_full_softmax(scorer: RowScorer) -> None:
    """Top-k, label, rank and the tails at three temperatures; slots of a padded lm_head are neither ids nor mass."""
    model = DenseModel(30)
    rows_R = np.arange(29)
    labels_R = model.ids_S[1:]
    packed_RW = scorer.score(model.hidden_SH[:29], torch.from_numpy(labels_R.astype(np.int64)), model.compute_logits)
    assert packed_RW is not None
    assert_rows_are_dense(unpack(packed_RW, labels_R), model, rows_R)


def test_chunks_change_no_number(scorer: RowScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of logits at a time or all at once: the same rows within rounding, and never more rows than that."""
    model = DenseModel(30)
    labels_R = torch.from_numpy(model.ids_S[1:].astype(np.int64))
    whole_RW = scorer.score(model.hidden_SH[:29], labels_R, model.compute_logits)
    monkeypatch.setattr(span_hook, "_CHUNK_LOGITS", 4 * VOCAB_SIZE)
    sizes: list[int] = []

    def counted(hidden_RH: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden_RH))
        return model.compute_logits(hidden_RH)

    chunked_RW = RowScorer(K, VOCAB_SIZE, TEMPERATURES).score(model.hidden_SH[:29], labels_R, counted)
    assert whole_RW is not None
    assert chunked_RW is not None
    assert sizes == [4] * 7 + [1]
    one, other = (unpack(packed, model.ids_S[1:]) for packed in (whole_RW, chunked_RW))
    np.testing.assert_array_equal(one.topk_ids_TK, other.topk_ids_TK)
    np.testing.assert_allclose(one.topk_logprobs_TK, other.topk_logprobs_TK, atol=TWIN_TOLERANCE, rtol=0)
    np.testing.assert_allclose(one.log_tail_mass_T, other.log_tail_mass_T, atol=TWIN_TOLERANCE, rtol=0)


def test_a_tail_of_e_to_the_minus_sixty_is_exact() -> None:
    """Where one minus the head would be rounding: one logit 60 above 49 equal ones leaves 49 e^-60 outside."""
    logits_RV = torch.zeros((1, VOCAB_SIZE))
    logits_RV[0, 7] = 60.0
    packed_RW = RowScorer(1, VOCAB_SIZE, (4.0,)).score(torch.zeros((1, 1)), torch.tensor([7]), lambda _: logits_RV)
    assert packed_RW is not None
    rows = rows_of_packed(packed_RW.numpy(), PackedLayout(1, 1), np.array([7], np.int32))
    assert rows.log_tail_mass_TX is not None
    assert rows.log_tail_mass_T[0] == pytest.approx(np.log(49) - 60, abs=TWIN_TOLERANCE)
    # At T=4: 49 e^-15 against 1 + 49 e^-15.
    assert rows.log_tail_mass_TX[0, 0] == pytest.approx(
        np.log(49) - 15 - np.log1p(49 * np.exp(-15)), abs=TWIN_TOLERANCE
    )


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    """K = vocabulary: log tail mass -inf at every temperature."""
    model = DenseModel(4)
    packed_RW = RowScorer(VOCAB_SIZE, VOCAB_SIZE, TEMPERATURES).score(
        model.hidden_SH[:3], torch.from_numpy(model.ids_S[1:].astype(np.int64)), model.compute_logits
    )
    assert packed_RW is not None
    rows = rows_of_packed(packed_RW.numpy(), PackedLayout(VOCAB_SIZE, 2), model.ids_S[1:])
    assert rows.log_tail_mass_TX is not None
    assert np.isneginf(rows.log_tail_mass_T).all()
    assert np.isneginf(rows.log_tail_mass_TX).all()
    assert (np.sort(rows.topk_ids_TK, axis=1) == np.arange(VOCAB_SIZE)).all()


def test_a_rank_without_logits_comes_to_every_gather(scorer: RowScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks of a tensor-parallel group get None, but call as often as the first: a gather would hang."""
    monkeypatch.setattr(span_hook, "_CHUNK_LOGITS", 4 * VOCAB_SIZE)
    calls: list[int] = []
    hidden_RH, labels_R = torch.zeros((10, HIDDEN)), torch.zeros(10, dtype=torch.long)
    assert RowScorer(K, VOCAB_SIZE, TEMPERATURES).score(hidden_RH, labels_R, lambda h: calls.append(len(h))) is None
    assert calls == [4, 4, 2]


@pytest.mark.parametrize("boundaries", [(0, 40), (0, 7, 40), (0, 8, 9, 10, 25, 40), tuple(range(41))])
def test_rows_of_two_turns_survive_any_chunking_of_the_prefill(scorer: RowScorer, boundaries: tuple[int, ...]) -> None:
    """Wherever the steps cut the prompt, within a response too: the same rows; prompt rows never meet the lm_head."""
    model = DenseModel(40)
    rows_R = np.concatenate([np.arange(6, 12), np.arange(22, 39)])
    hook = SpanHook(scorer)
    hook.add("a", span_request(rows_R, model.ids_S[rows_R + 1]))
    finished: dict[str, torch.Tensor] = {}
    for start, stop in pairwise(boundaries):
        assert not finished
        # The step's hidden states begin with three rows of somebody else.
        hidden_SH = torch.cat([torch.full((3, HIDDEN), torch.nan), model.hidden_SH[start:stop]])
        finished = hook.step([PromptSlice("a", start, stop, 3, stop == 40)], hidden_SH, model.compute_logits)
    assert list(finished) == ["a"]
    assert model.rows_computed == len(rows_R)
    assert_rows_are_dense(unpack(finished["a"], model.ids_S[rows_R + 1]), model, rows_R)


def test_requests_of_one_step_keep_their_own_rows(scorer: RowScorer) -> None:
    """Two requests side by side, one of them with a neighbour that named no rows; each gets what it gets alone."""
    models = [DenseModel(12, seed=1), DenseModel(9, seed=2)]
    models[1].head_HV = models[0].head_HV
    rows = [np.arange(4, 11), np.arange(2, 8)]
    hook = SpanHook(scorer)
    for name, model, rows_R in zip("ab", models, rows, strict=True):
        hook.add(name, span_request(rows_R, model.ids_S[rows_R + 1]))
    hook.add("stock", None)
    hidden_SH = torch.cat([models[0].hidden_SH, torch.full((5, HIDDEN), torch.nan), models[1].hidden_SH])
    slices = [
        PromptSlice("a", 0, 12, 0, True),
        PromptSlice("stock", 0, 5, 12, True),
        PromptSlice("b", 0, 9, 17, True),
    ]
    finished = hook.step(slices, hidden_SH, models[0].compute_logits)
    assert list(finished) == ["a", "b"]
    for name, model, rows_R in zip("ab", models, rows, strict=True):
        assert_rows_are_dense(unpack(finished[name], model.ids_S[rows_R + 1]), model, rows_R)
    assert hook.step(slices, hidden_SH, models[0].compute_logits) == {}


def test_a_preempted_request_starts_again(scorer: RowScorer) -> None:
    """What was collected before the preemption is forgotten: its rows come once."""
    model = DenseModel(20)
    rows_R = np.arange(5, 19)
    extra_args = span_request(rows_R, model.ids_S[rows_R + 1])
    hook = SpanHook(scorer)
    hook.add("a", extra_args)
    assert hook.step([PromptSlice("a", 0, 10, 0, False)], model.hidden_SH[:10], model.compute_logits) == {}
    hook.add("a", extra_args)
    finished = hook.step([PromptSlice("a", 0, 20, 0, True)], model.hidden_SH, model.compute_logits)
    assert_rows_are_dense(unpack(finished["a"], model.ids_S[rows_R + 1]), model, rows_R)
