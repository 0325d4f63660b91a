"""What a token costs on disk, how exactly it is kept, and how fast it is written: the store's own path, and others'.

    python -m benchmarks.storage [--json] [--quick]

REAL is SmolLM2-135M-Instruct over answers that it wrote itself, SYNTH a sharper teacher with 151,936 ids (see
`benchmarks.logprobs`). Bytes are those of the columns inside shards that `write_shard` made; footers and indexes are
in the whole shard's figure. Adaptive k is compared at equal fidelity: the angle between the lm_head gradient under
what is stored and under the full distribution (`benchmarks.gradient_angle`), medians over batches of 1,024 tokens.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from statistics import median
from typing import Literal

import click
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks.harness import Figure, publish
from benchmarks.logprobs import RealLogprobs, SynthLogprobs, real, synth
from benchmarks.storage_peers import PEERS
from logitlake_schemas import CodecPolicy
from logitlake_shared.rows import LakeSample, samples_to_table
from logitlake_shared.shards import write_shard
from logitlake_shared.topk import StoredRows, TeacherRows, encode, split, stored_error

__all__ = ["main"]

BATCH_TOKENS, QUICK_BATCH_TOKENS = 1024, 512
MOST_BYTES = 0.65
_FIXED, _DEFAULT = "fixed k=32", "default codec"
_TOPK_COLUMNS = ("k", "topk_ids", "topk_logprobs")
_TOKEN_COLUMNS = (*_TOPK_COLUMNS, "response_ids", "label_logprob", "label_rank", "log_tail_mass", "entropy")
# Floors whose bytes are interpolated to the angle of fixed k=32; they bracket it on both data sets.
_FLOORS = (7e-4, 1.5e-3, 2.5e-3, 4e-3, 6e-3)
_K_CAPTURED = 64
_TAILS: tuple[Literal["bucket", "bounded"], ...] = ("bucket", "bounded")


@dataclass(frozen=True)
class Dataset:
    """Tokens of one kind, sample after sample."""

    name: str
    data: RealLogprobs | SynthLogprobs
    tokens_T: npt.NDArray[np.int64]
    lengths_N: npt.NDArray[np.int64]

    def rows(self, k: int) -> TeacherRows:
        """What an engine that captures `k` entries returns."""
        return _take(self.data.teacher_rows(k), self.tokens_T)


def _take(rows: TeacherRows, tokens_T: npt.NDArray[np.int64]) -> TeacherRows:
    columns = {field.name: getattr(rows, field.name) for field in fields(TeacherRows)}
    return TeacherRows(**{name: None if column is None else column[tokens_T] for name, column in columns.items()})


def dataset(name: str, data: RealLogprobs | SynthLogprobs, samples: npt.NDArray[np.int64]) -> Dataset:
    """The samples in an order of their own, so that a batch is a mixture of them."""
    shuffled = np.random.default_rng(0).permutation(samples)
    spans = [np.arange(data.starts[n], data.starts[n + 1]) for n in shuffled]
    return Dataset(name, data, np.concatenate(spans), np.array([len(span) for span in spans]))


def fixed(k: int) -> CodecPolicy:
    """`k` entries of every token."""
    return CodecPolicy(k_max=k, k_min=1, p_min=0)


def stored_shard(rows: TeacherRows, data: Dataset, policy: CodecPolicy) -> bytes:
    """The store's own path: encode, the table, Parquet."""
    parts = split(encode(rows, policy), data.lengths_N.tolist())
    labels_T = data.data.label_ids_T[data.tokens_T]
    samples, start = [], 0
    for number, part in enumerate(parts):
        length = len(part.k_T)
        samples.append(_sample(number, labels_T[start : start + length], part))
        start += length
    return write_shard(
        samples_to_table(samples),
        "samples",
        cache="bench",
        unit="u",
        spec_fingerprint="0" * 64,
        exact=policy.grid == "exact",
    )


def _sample(number: int, response_ids: npt.NDArray[np.int32], rows: StoredRows) -> LakeSample:
    return LakeSample(
        sample_id=f"bench/{number:06d}",
        task="chat",
        source="bench",
        split="train",
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        prompt_ids=np.arange(16, dtype=np.int32),
        prompt_lengths=np.array([16], np.int32),
        response_ids=response_ids,
        response_lengths=np.array([len(response_ids)], np.int32),
        expanded_length=16 + len(response_ids),
        image_sha256=(),
        rows=rows,
        finish_reason="given",
    )


def bytes_per_token(shard: bytes, num_tokens: int) -> tuple[float, float]:
    """Bytes a token of the top-k columns alone, and of all columns of a token, as they lie in the shard."""
    metadata = pq.ParquetFile(io.BytesIO(shard)).metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return tuple(sum(sizes[name] for name in names) / num_tokens for names in (_TOPK_COLUMNS, _TOKEN_COLUMNS))  # type: ignore[return-value]


def size_figures(data: Dataset) -> list[Figure]:
    """Bytes a token by fixed k."""
    figures = []
    for k, most_topk, most_all in ((32, 71, 78), (64, 140, None)):
        topk, whole = bytes_per_token(stored_shard(data.rows(k), data, fixed(k)), len(data.tokens_T))
        figures.append(
            Figure(f"{data.name}: k={k}, top-k columns", topk, "B/token", f"<= {most_topk}", topk <= most_topk)
        )
        reach = (None, None) if most_all is None else (f"<= {most_all}", whole <= most_all)
        figures.append(Figure(f"{data.name}: k={k}, all columns of a token", whole, "B/token", *reach))
    return figures


def adaptive_figures(data: Dataset, source: RealLogprobs, num_batches: int, quick: bool) -> list[Figure]:
    """The floor against fixed k=32 with the tail as a bucket: bytes at equal angle, and the default floor's angle.

    The floor is read both ways: with the bucket, and with the bound that a prefix of the rank order sets on the tail,
    which is the loss that the student has by default.
    """
    from benchmarks.gradient_angle import STUDENTS, Case, angles, real_batch, synth_batch

    floors = {f"p >= {floor:g}": CodecPolicy(k_max=_K_CAPTURED, k_min=1, p_min=floor) for floor in _FLOORS}
    policies = {_FIXED: fixed(32), _DEFAULT: CodecPolicy(), **floors}
    size = {
        name: bytes_per_token(stored_shard(data.rows(policy.k_max), data, policy), len(data.tokens_T))[0]
        for name, policy in policies.items()
    }
    share = size[_DEFAULT] / size[_FIXED]
    figures = [
        Figure(f"{data.name}: {_DEFAULT}, top-k columns", size[_DEFAULT], "B/token"),
        Figure(f"{data.name}: {_DEFAULT} / {_FIXED}", share, "x bytes", "<= 0.65", share <= MOST_BYTES),
    ]
    batch_tokens = QUICK_BATCH_TOKENS if quick else BATCH_TOKENS
    for student in STUDENTS[:1] if quick else STUDENTS:
        measured: dict[tuple[str, str], list[float]] = {}
        for number in range(num_batches):
            batch_T = data.tokens_T[number * batch_tokens : (number + 1) * batch_tokens]
            cases = {
                (name, tail): Case(encode(_take(data.data.teacher_rows(policy.k_max), batch_T), policy), policy, tail)
                for name, policy in policies.items()
                for tail in _TAILS
            }
            batch = (
                synth_batch(data.data, source, batch_T, student)
                if isinstance(data.data, SynthLogprobs)
                else real_batch(source, batch_T, student)
            )
            for key, angle in zip(cases, angles(batch, list(cases.values())), strict=True):
                measured.setdefault(key, []).append(angle)
        angle_of = {key: median(values) for key, values in measured.items()}
        figures += _comparison(f"{data.name}, {student} student", angle_of, size, list(floors))
    return figures


def _comparison(
    prefix: str, angle_of: dict[tuple[str, str], float], size: dict[str, float], floors: list[str]
) -> list[Figure]:
    wanted = angle_of[_FIXED, "bucket"]
    figures = [Figure(f"{prefix}: angle, {_FIXED}, {tail}", angle_of[_FIXED, tail], "degrees") for tail in _TAILS]
    for tail in _TAILS:
        angle = angle_of[_DEFAULT, tail]
        reach = (None, None) if tail == "bucket" else (f"<= {_FIXED}, bucket", angle <= wanted)
        figures.append(Figure(f"{prefix}: angle, {_DEFAULT}, {tail}", angle, "degrees", *reach))
    for tail in _TAILS:
        sizes = [size[name] for name in floors]
        ratio = at_equal_angle([angle_of[name, tail] for name in floors], sizes, wanted) / size[_FIXED]
        figures.append(
            Figure(
                f"{prefix}: floor at that angle, {tail}", ratio, f"x bytes of {_FIXED}", "<= 0.65", ratio <= MOST_BYTES
            )
        )
    return figures


def at_equal_angle(angles: list[float], sizes: list[float], wanted: float) -> float:
    """Bytes of a rule at the wanted angle, interpolated between its measured points.

    Where even its smallest point is better than wanted, that point's bytes, which are more than are needed; where
    none is good enough, NaN.
    """
    order = np.argsort(angles)
    log_angles, log_sizes = np.log(np.array(angles)[order]), np.log(np.array(sizes)[order])
    return float(np.exp(np.interp(np.log(wanted), log_angles, log_sizes, left=np.nan)))


def error_figures(data: Dataset) -> list[Figure]:
    """What storing costs, as the writer measures it."""
    rows = data.rows(32)
    figures = []
    for name, policy, most_mean, most_max in (
        ("grid", fixed(32), 2e-4, 1e-3),
        ("exact", CodecPolicy(k_max=32, k_min=1, p_min=0, grid="exact"), 1e-6, 1e-6),
    ):
        error = stored_error(rows, encode(rows, policy))
        assert error.kl_mean is not None  # None is for draws
        assert error.kl_max is not None
        for what, value, most in (("mean", error.kl_mean, most_mean), ("max", error.kl_max, most_max)):
            figures.append(
                Figure(f"{data.name}: stored error, {name}, {what}", value, "nats", f"<= {most:g}", value <= most)
            )
    return figures


def speed_figures(data: Dataset, repeats: int, peer_tokens: int) -> list[Figure]:
    """Tokens a CPU second, each round running every writer once; and the peers' bytes."""
    rows = data.rows(32)
    num_samples = max(1, int(np.searchsorted(np.cumsum(data.lengths_N), peer_tokens)))
    lengths = data.lengths_N[:num_samples]
    some = _take(rows, np.arange(int(lengths.sum())))
    # Default policies cut what the engine captured, so both writers are given the same rows.
    jobs: dict[str, tuple[Callable[[], bytes], int]] = {
        "ours, k=32": (lambda: stored_shard(rows, data, fixed(32)), len(data.tokens_T)),
        "ours, default": (lambda: stored_shard(rows, data, CodecPolicy(k_max=32)), len(data.tokens_T)),
    }
    jobs |= {name: (lambda write=write: write(some, lengths), len(some.label_rank_T)) for name, write in PEERS.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    size: dict[str, float] = {}
    for _ in range(repeats):
        for name, (job, num_tokens) in jobs.items():
            start = time.process_time()
            written = job()
            seconds[name].append((time.process_time() - start) / num_tokens)
            size[name] = len(written) / num_tokens
    rate = {name: 1 / median(values) for name, values in seconds.items()}
    figures = []
    for name in jobs:
        reach = (">= 300,000", rate[name] >= 300_000) if name == "ours, k=32" else (None, None)
        figures.append(Figure(f"{data.name}: write, {name}", rate[name], "tokens/CPU-s", *reach))
    ours = size["ours, k=32"]
    figures.append(Figure(f"{data.name}: whole shard, k=32", ours, "B/token"))
    for name in PEERS:
        figures.append(Figure(f"{data.name}: bytes, {name}", size[name] / ours, "x ours, labels and scalars in ours"))
    return figures


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option("--quick", is_flag=True, help="Small data, one batch.")
def main(as_json: bool, quick: bool) -> None:
    """Measure bytes, fidelity and speed of the store."""
    import torch

    torch.set_num_threads(1)
    source = real(quick)
    answers = dataset("REAL answers", source, np.flatnonzero(source.is_answer))
    made = synth(4096 if quick else 131_072, _K_CAPTURED, quick)
    big = dataset("SYNTH", made, np.arange(len(made.starts) - 1))
    both = dataset("REAL", source, np.arange(len(source.is_answer)))
    figures = [*size_figures(both), *size_figures(big)]
    figures += [*error_figures(both), *error_figures(big)]
    figures += speed_figures(big, repeats=2 if quick else 5, peer_tokens=4096)
    for data, num_batches in ((answers, 1 if quick else 5), (big, 1 if quick else 3)):
        figures += adaptive_figures(data, source, num_batches, quick)
    publish("storage", figures, as_json)


if __name__ == "__main__":
    main()
