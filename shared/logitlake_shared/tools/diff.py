"""Two caches of the same samples side by side: other teacher, other codec, other machine.

Only tokens that both caches were asked about are compared: same sample id, same response ids. Everything is summed
shard by shard; memory holds a few shards of each cache and the worst tokens.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from logitlake_schemas import CommitRecord, ShardEntry
from logitlake_shared.errors import DataError
from logitlake_shared.lake import Cache, spec_differences
from logitlake_shared.rows import LakePair, LakeSample, pairs_from_table, samples_from_table
from logitlake_shared.tools.divergence import first_ids, row_divergence
from logitlake_shared.topk import join

__all__ = ["CacheDiff", "PairDiff", "TaskDiff", "WorstToken", "diff_caches"]

Float64 = npt.NDArray[np.float64]

# Decoded shards of the second cache kept at hand: units of two captures of one dataset run side by side.
_SHARDS_AT_HAND = 8
_FAR_APART = 0.1  # nats


@dataclass(frozen=True)
class WorstToken:
    """One token where the two disagree most."""

    kl: float
    sample_id: str
    position: int
    token_id: int
    top1_a: int
    top1_b: int
    label_logprob_a: float
    label_logprob_b: float


@dataclass
class TaskDiff:
    """Sums over the tokens of one task, and what follows from them."""

    task: str
    samples: int = 0
    tokens: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    far_apart: int = 0
    """tokens with a divergence above 0.1 nats"""
    infinite: int = 0
    """tokens where B rules out what A holds possible; counted here and in no mean"""
    same_top1: int = 0
    label_difference_sum: float = 0.0
    label_distance_sum: float = 0.0
    shared_mass_sum: float = 0.0

    def figures(self) -> dict[str, float | int | str]:
        """Per token: mean and largest KL(A‖B), agreement of first choices, label logprob of A less that of B."""
        tokens = max(self.tokens, 1)
        return {
            "task": self.task,
            "samples": self.samples,
            "tokens": self.tokens,
            "kl_mean": self.kl_sum / max(self.tokens - self.infinite, 1),
            "kl_max": self.kl_max,
            "kl_above_0.1": self.far_apart / tokens,
            "kl_infinite": self.infinite,
            "top1_agreement": self.same_top1 / tokens,
            "label_logprob_a_less_b": self.label_difference_sum / tokens,
            "label_logprob_distance": self.label_distance_sum / tokens,
            "mass_on_shared_ids": self.shared_mass_sum / tokens,
        }

    def add(self, other: "TaskDiff") -> None:
        """Adds another task's sums to these."""
        for name in (
            "samples",
            "tokens",
            "kl_sum",
            "far_apart",
            "infinite",
            "same_top1",
            "label_difference_sum",
            "label_distance_sum",
            "shared_mass_sum",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kl_max = max(self.kl_max, other.kl_max)


@dataclass
class PairDiff:
    """Preference pairs that both caches scored."""

    pairs: int = 0
    same_preference: int = 0
    """pairs whose chosen response both teachers, or neither, prefer"""
    margin_distance_sum: float = 0.0
    """nats: |margin of A - margin of B|, summed"""

    def figures(self) -> dict[str, float | int]:
        """Per pair."""
        pairs = max(self.pairs, 1)
        return {
            "pairs": self.pairs,
            "same_preference": self.same_preference / pairs,
            "margin_distance": self.margin_distance_sum / pairs,
        }


@dataclass
class CacheDiff:
    """What two caches have in common and where they part."""

    spec: list[str]
    """fields of the spec that differ, one sentence each"""
    in_both: int = 0
    only_in_a: int = 0
    only_in_b: int = 0
    other_responses: int = 0
    """samples in both caches with other response ids; not compared"""
    not_comparable: str | None = None
    """why no logprob was compared, where none was"""
    tasks: dict[str, TaskDiff] = field(default_factory=dict)
    pairs: PairDiff | None = None
    worst: list[WorstToken] = field(default_factory=list)
    """by falling divergence"""

    def total(self) -> TaskDiff:
        """The sums over all tasks."""
        total = TaskDiff("all")
        for task in self.tasks.values():
            total.add(task)
        return total


def diff_caches(
    a: Cache, b: Cache, *, num_worst: int = 10, on_progress: Callable[[int], None] = lambda _: None
) -> CacheDiff:
    """Compares the newest snapshots. `on_progress(1)` is called after each unit of A.

    Raises `DataError` when one cache holds samples and the other pairs, `LakeCorruptError`.
    """
    if a.spec.kind != b.spec.kind:
        raise DataError(f"cache {a.name!r} holds {a.spec.kind} and {b.name!r} holds {b.spec.kind}; name two of a kind")
    diff = CacheDiff(_spec_differences(a, b))
    places = _places(b)
    rows_b = _Rows(b)
    comparable = a.spec.tokenizer.token_map_sha256 == b.spec.tokenizer.token_map_sha256
    if not comparable:
        diff.not_comparable = (
            "the token maps differ: an id means one thing to A and another to B, so that only coverage is compared"
        )
    worst = _Worst(num_worst)
    for commit in a.open_snapshot().commits:
        for entry in _row_entries(a, commit):
            matched: list[tuple[LakeSample, LakeSample]] = []
            for row in _rows(a, a.read(entry)):
                place = places.get(_id(row))
                if place is None:
                    diff.only_in_a += 1
                    continue
                diff.in_both += 1
                if comparable:
                    other = rows_b(place[0])[place[1]]
                    if not _same_responses(row, other):
                        diff.other_responses += 1
                    elif isinstance(row, LakePair) and isinstance(other, LakePair):
                        _add_pair(diff, row, other)
                    elif isinstance(row, LakeSample) and isinstance(other, LakeSample):
                        matched.append((row, other))
            if matched:
                _add_samples(diff, worst, matched)
        on_progress(1)
    diff.only_in_b = len(places) - diff.in_both
    diff.worst = worst.tokens()
    return diff


def _add_samples(diff: CacheDiff, worst: "_Worst", matched: list[tuple[LakeSample, LakeSample]]) -> None:
    """Adds the samples of a shard, all tokens at once."""
    rows_a, rows_b = join([a.rows for a, _ in matched]), join([b.rows for _, b in matched])
    found = row_divergence(rows_a, rows_b)
    first_a, first_b = first_ids(rows_a), first_ids(rows_b)
    difference_T = rows_a.label_logprob_T.astype(np.float64) - rows_b.label_logprob_T
    finite_T = np.isfinite(found.kl_T)
    lengths = [len(a.response_ids) for a, _ in matched]
    stops = np.cumsum([0, *lengths])
    sample_T = np.repeat(np.arange(len(matched)), lengths)
    tasks = np.array([a.task for a, _ in matched])
    for name in np.unique(tasks).tolist():
        own_T = tasks[sample_T] == name
        kl_T = found.kl_T[own_T & finite_T]
        diff.tasks.setdefault(name, TaskDiff(name)).add(
            TaskDiff(
                name,
                samples=int((tasks == name).sum()),
                tokens=int(own_T.sum()),
                kl_sum=float(kl_T.sum()),
                kl_max=float(kl_T.max(initial=0)),
                far_apart=int((found.kl_T[own_T] > _FAR_APART).sum()),
                infinite=int((~finite_T[own_T]).sum()),
                same_top1=int((first_a == first_b)[own_T].sum()),
                label_difference_sum=float(difference_T[own_T].sum()),
                label_distance_sum=float(np.abs(difference_T[own_T]).sum()),
                shared_mass_sum=float(found.shared_mass_T[own_T].sum()),
            )
        )
    for token in worst.candidates(found.kl_T):
        a, _ = matched[sample_T[token]]
        position = int(token - stops[sample_T[token]])
        worst.add(
            WorstToken(
                kl=float(found.kl_T[token]),
                sample_id=a.sample_id,
                position=position,
                token_id=int(a.response_ids[position]),
                top1_a=int(first_a[token]),
                top1_b=int(first_b[token]),
                label_logprob_a=float(rows_a.label_logprob_T[token]),
                label_logprob_b=float(rows_b.label_logprob_T[token]),
            )
        )


class _Worst:
    """The tokens of the largest divergence so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, WorstToken]] = []
        self._added = 0

    def candidates(self, kl_T: Float64) -> list[int]:
        """The tokens that may belong to them."""
        least = self._heap[0][0] if len(self._heap) == self._size and self._heap else 0.0
        return [token for token in np.argsort(-kl_T)[: self._size].tolist() if kl_T[token] > least]

    def add(self, token: WorstToken) -> None:
        """Takes it in if it belongs to them."""
        self._added += 1  # breaks ties, so that records are never compared
        heapq.heappush(self._heap, (token.kl, -self._added, token))
        if len(self._heap) > self._size:
            heapq.heappop(self._heap)

    def tokens(self) -> list[WorstToken]:
        """By falling divergence."""
        return [token for _, _, token in sorted(self._heap, reverse=True)]


def _add_pair(diff: CacheDiff, a: LakePair, b: LakePair) -> None:
    margins = [
        float(row.chosen_logprobs.sum(dtype=np.float64) - row.rejected_logprobs.sum(dtype=np.float64)) for row in (a, b)
    ]
    diff.pairs = diff.pairs or PairDiff()
    diff.pairs.pairs += 1
    diff.pairs.same_preference += (margins[0] > 0) == (margins[1] > 0)
    diff.pairs.margin_distance_sum += abs(margins[0] - margins[1])


def _same_responses(a: LakeSample | LakePair, b: LakeSample | LakePair) -> bool:
    if isinstance(a, LakePair) and isinstance(b, LakePair):
        return np.array_equal(a.chosen_ids, b.chosen_ids) and np.array_equal(a.rejected_ids, b.rejected_ids)
    assert isinstance(a, LakeSample)
    assert isinstance(b, LakeSample)
    return np.array_equal(a.response_ids, b.response_ids)


def _spec_differences(a: Cache, b: Cache) -> list[str]:
    return [
        sentence.replace(" there, ", " in A, ").removesuffix(" here") + " in B"
        for sentence in spec_differences(a.spec, b.spec)
    ]


def _row_entries(cache: Cache, commit: CommitRecord) -> list[ShardEntry]:
    return [entry for entry in commit.shards if entry.kind == cache.spec.kind]


def _rows(cache: Cache, table: pa.Table) -> list[LakeSample] | list[LakePair]:
    return samples_from_table(table) if cache.spec.kind == "samples" else pairs_from_table(table)


def _id(row: LakeSample | LakePair) -> str:
    return row.sample_id if isinstance(row, LakeSample) else row.pair_id


def _places(cache: Cache) -> dict[str, tuple[ShardEntry, int]]:
    """Where each id lies."""
    id_column = "sample_id" if cache.spec.kind == "samples" else "pair_id"
    return {
        row_id: (entry, row)
        for commit in cache.open_snapshot().commits
        for entry in _row_entries(cache, commit)
        for row, row_id in enumerate(cache.read(entry, [id_column]).column(0).to_pylist())
    }


class _Rows:
    """The decoded rows of the shards used last."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._kept: OrderedDict[str, list[LakeSample] | list[LakePair]] = OrderedDict()

    def __call__(self, entry: ShardEntry) -> list[LakeSample] | list[LakePair]:
        if entry.path not in self._kept:
            self._kept[entry.path] = _rows(self._cache, self._cache.read(entry))
            if len(self._kept) > _SHARDS_AT_HAND:
                self._kept.popitem(last=False)
        self._kept.move_to_end(entry.path)
        return self._kept[entry.path]
