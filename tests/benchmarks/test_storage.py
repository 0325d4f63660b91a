"""The storage benchmark measures what it says: its data are lawful rows, its angle is zero for what loses nothing."""

import json
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from benchmarks.gradient_angle import STUDENTS, Case, angles, real_batch, synth_batch
from benchmarks.logprobs import SYNTH_VOCAB, RealLogprobs, make_synth
from benchmarks.storage import at_equal_angle, bytes_per_token, dataset, fixed, stored_shard
from benchmarks.storage_peers import PEERS, json_lines

from logitlake_schemas import CodecPolicy
from logitlake_shared.teacher_checks import check_rows
from logitlake_shared.topk import encode

VOCAB, WIDTH, K = 40, 8, 40
LENGTHS = (5, 9, 6)
# Float32 logprobs, their exponentials and a matrix product: the angle of no error at all, in degrees.
ANGLE_ROUNDING = 1e-2
EXACT = CodecPolicy(k_max=K, k_min=1, p_min=0, grid="exact")


@pytest.fixture(scope="module")
def source() -> RealLogprobs:
    """Twenty tokens of a teacher of forty ids, described as the real ones are."""
    random = np.random.default_rng(0)
    num_tokens = sum(LENGTHS)
    head_VD, hidden_TD, window_TD = (
        random.standard_normal(shape).astype(np.float16) for shape in ((VOCAB, WIDTH), *[(num_tokens, WIDTH)] * 2)
    )
    logprobs_TV = torch.log_softmax(torch.from_numpy(hidden_TD).float() @ torch.from_numpy(head_VD).float().T, -1)
    top = torch.topk(logprobs_TV, K)
    rank_T = random.integers(0, K, num_tokens)
    every_T = np.arange(num_tokens)
    return RealLogprobs(
        starts=np.cumsum([0, *LENGTHS]),
        is_answer=np.array([True, True, False]),
        topk_ids_TK=top.indices.to(torch.int32).numpy(),
        topk_logprobs_TK=top.values.numpy(),
        log_tail_T=np.full(num_tokens, -np.inf, np.float32),
        log_norm_T=torch.logsumexp(logprobs_TV / 0.7, -1).numpy(),
        label_ids_T=top.indices.numpy()[every_T, rank_T].astype(np.int32),
        label_logprob_T=top.values.numpy()[every_T, rank_T],
        label_rank_T=(rank_T + 1).astype(np.int32),
        hidden_TD=hidden_TD,
        window_hidden_TD=window_TD,
        head_VD=head_VD,
    )


def all_tokens(source: RealLogprobs) -> npt.NDArray[np.int64]:
    return np.arange(len(source.label_ids_T))


@pytest.mark.parametrize("student", STUDENTS)
def test_what_stores_everything_has_no_angle(source: RealLogprobs, student: str) -> None:
    """The whole vocabulary, exact: the same gradient as that of the full distribution, whatever the tail's reading."""
    stored = encode(source.teacher_rows(K), EXACT)
    batch = real_batch(source, all_tokens(source), student)  # type: ignore[arg-type]
    for angle in angles(batch, [Case(stored, EXACT, "bucket"), Case(stored, EXACT, "bounded")]):
        assert angle < ANGLE_ROUNDING


def test_the_angle_sees_what_is_dropped_and_what_the_bound_gives_back(source: RealLogprobs) -> None:
    """Of a flat teacher and a student of another mind, four ids of forty are little; the bound helps."""
    policy = fixed(4)
    stored = encode(source.teacher_rows(4), policy)
    batch = real_batch(source, all_tokens(source), "short-sighted")
    bucket, bounded = angles(batch, [Case(stored, policy, "bucket"), Case(stored, policy, "bounded")])
    assert ANGLE_ROUNDING < bounded < bucket


def test_synthetic_rows_are_lawful_and_their_parts_are_their_distribution(source: RealLogprobs) -> None:
    """Sorted, distinct, summing to one; and the full distribution of a batch agrees with the rows that were kept."""
    made = make_synth(source, 12, K)
    rows = made.teacher_rows(K)
    check_rows(rows, SYNTH_VOCAB)
    at_rank_T = rows.topk_ids_TK[np.arange(12), made.label_rank_T - 1]
    assert (at_rank_T == made.label_ids_T).all()
    batch = synth_batch(made, source, np.arange(12), "short-sighted")
    (angle,) = angles(batch, [Case(encode(rows, EXACT), EXACT, "bucket")])
    assert angle < ANGLE_ROUNDING


def test_fewer_captured_entries_move_their_mass_to_the_tail(source: RealLogprobs) -> None:
    """Head and tail sum to one for any k."""
    check_rows(source.teacher_rows(7), VOCAB)


def test_bytes_are_those_of_the_columns(source: RealLogprobs) -> None:
    """The top-k columns are part of all columns of a token, and these of the file."""
    data = dataset("toy", source, np.arange(len(LENGTHS)))
    shard = stored_shard(data.rows(8), data, fixed(8))
    topk, whole = bytes_per_token(shard, len(data.tokens_T))
    assert 0 < topk < whole < len(shard) / len(data.tokens_T)


def test_equal_angle_is_read_between_measured_points() -> None:
    """At a measured angle its bytes; between two, between theirs; never better than the best: NaN."""
    assert at_equal_angle([4.0, 1.0, 2.0], [10.0, 40.0, 20.0], 2.0) == pytest.approx(20.0)
    assert 20.0 < at_equal_angle([4.0, 1.0, 2.0], [10.0, 40.0, 20.0], 1.5) < 40.0
    assert at_equal_angle([4.0, 1.0, 2.0], [10.0, 40.0, 20.0], 9.0) == pytest.approx(10.0)
    assert np.isnan(at_equal_angle([4.0, 1.0, 2.0], [10.0, 40.0, 20.0], 0.5))


def test_peers_write_all_tokens(source: RealLogprobs) -> None:
    """Every re-stated layout grows with the tokens; the readable one gives back each sample's ids."""
    rows = source.teacher_rows(8)
    lengths = np.array(LENGTHS)
    few = replace(rows, **{name: column[:5] for name, column in vars(rows).items() if column is not None})
    for write in PEERS.values():
        assert len(write(few, lengths[:1])) < len(write(rows, lengths))
    samples = [json.loads(line) for line in json_lines(rows, lengths).decode().splitlines()]
    assert [len(sample) for sample in samples] == list(LENGTHS)
    assert [int(token) for token in samples[1][0]] == rows.topk_ids_TK[5].tolist()
