"""What a cache holds, in figures: how sure the teacher was, how much of it is stored, how far it agrees with the data.

Every figure is a sum or a count that SQL makes in one pass over the per-token columns, grouped by task, source and
split; no list of all tokens is ever in memory. Percentiles are read off a histogram of `ENTROPY_STEP` nats, so that
they are exact to half a step at any size. Figures of a coarser grouping are sums of the finer one's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from logitlake_shared.catalog import Catalog
from logitlake_shared.errors import DataError, LakeError

__all__ = [
    "ENTROPY_STEP",
    "PERCENTILES",
    "By",
    "CacheStats",
    "GroupStats",
    "Histogram",
    "PairGroup",
    "cache_stats",
    "lake_stats",
    "round_up",
]

By = Literal["task", "source", "split"]

ENTROPY_STEP = 1e-3
"""nats; percentiles of entropy are within half of this"""
PERCENTILES = (5, 50, 95, 99)
# Tail masses span many orders of magnitude: two bins a decade, and one below for what is smaller still.
_TAIL_BINS_A_DECADE = 2
_TAIL_DECADES = 7
# As many bars as stand under each other on a terminal without scrolling.
_ENTROPY_BINS = 16
_K_BINS = 16

_ORIGIN = ("task", "source", "split")
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupStats:
    """The figures of the samples that share a task, a source or a split. Means are over response tokens."""

    name: str
    samples: int
    tokens: int
    entropy_mean: float
    """nats"""
    entropy_percentiles: dict[int, float]
    """percentile -> nats, to half of `ENTROPY_STEP`"""
    tail_mass_mean: float
    """probability outside the stored entries"""
    top1_is_label: float
    """share of tokens where the teacher's first choice is the response token"""
    label_perplexity: float
    """exp of the mean of -label_logprob"""
    mean_k: float
    """stored entries a token"""
    visual_advantage_mean: float | None = None
    """nats that the image adds to a label's logprob, over the tokens where that was captured"""


@dataclass(frozen=True)
class PairGroup:
    """The figures of the preference pairs that share a task, a source or a split."""

    name: str
    pairs: int
    tokens: int
    """chosen and rejected"""
    teacher_prefers_chosen: float
    """share of pairs whose chosen response has the higher sum of logprobs"""
    chosen_logprob_mean: float
    """nats a token"""
    rejected_logprob_mean: float
    margin_mean: float
    """nats: the chosen response's sum less the rejected one's"""


@dataclass(frozen=True)
class Histogram:
    """Tokens by one quantity. Bin i reaches from `edges[i]` up to `edges[i + 1]`; the last one holds what is above."""

    title: str
    unit: str
    labels: tuple[str, ...]
    """how each bin is named"""
    counts: tuple[int, ...]
    edges: tuple[float, ...]

    @property
    def shares(self) -> list[float]:
        """Each bin's share of all tokens."""
        total = max(sum(self.counts), 1)
        return [count / total for count in self.counts]


@dataclass(frozen=True)
class CacheStats:
    """One cache: who captured it, its size, the figures of its groups and of all, and three histograms."""

    cache: str
    kind: str
    teacher: str
    engine: str
    fingerprint: str
    snapshot: int
    bytes_per_token: float | None
    stored_kl_mean: float | None
    by: str
    groups: tuple[GroupStats, ...] | tuple[PairGroup, ...]
    total: GroupStats | PairGroup
    histograms: tuple[Histogram, ...] = ()


@dataclass
class _Sums:
    """What adds up over tokens."""

    samples: int = 0
    tokens: int = 0
    entropy: float = 0.0
    tail_mass: float = 0.0
    top1_is_label: int = 0
    label_logprob: float = 0.0
    k: int = 0
    visual_advantage: float = 0.0
    looked_away: int = 0
    entropy_counts: dict[int, int] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + row.get(name, 0))

    def figures(self, name: str) -> GroupStats:
        tokens = max(self.tokens, 1)
        return GroupStats(
            name=name,
            samples=self.samples,
            tokens=self.tokens,
            entropy_mean=self.entropy / tokens,
            entropy_percentiles=_percentiles(self.entropy_counts),
            tail_mass_mean=self.tail_mass / tokens,
            top1_is_label=self.top1_is_label / tokens,
            label_perplexity=float(np.exp(-self.label_logprob / tokens)),
            mean_k=self.k / tokens,
            visual_advantage_mean=self.visual_advantage / self.looked_away if self.looked_away else None,
        )


_SUMS = tuple(one.name for one in fields(_Sums) if one.name != "entropy_counts")


def lake_stats(
    catalog: Catalog,
    cache: str | None = None,
    by: By = "task",
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[CacheStats]:
    """The figures of every cache, or of `cache` alone; `on_progress(1)` is called after each.

    Raises `LakeError` when there is no such cache.
    """
    names = [row["cache"] for row in catalog.query("SELECT cache FROM caches ORDER BY cache").to_pylist()]
    if cache is not None and cache not in names:
        raise LakeError(f"no cache {cache!r} with a snapshot; caches in this lake: {', '.join(names)}")
    found = []
    for name in names if cache is None else [cache]:
        found.append(cache_stats(catalog, name, by))
        on_progress(1)
    return found


def cache_stats(catalog: Catalog, cache: str, by: By = "task") -> CacheStats:
    """The figures of one cache. Raises `DataError` when it holds no row."""
    (record,) = catalog.query(f"SELECT * FROM caches WHERE cache = {_quoted(cache)}").to_pylist()
    if not record["rows"]:
        raise DataError(f"cache {cache!r}: snapshot {record['snapshot']} holds no {record['kind']}; nothing to count")
    described = {key: record[key] for key in ("cache", "kind", "teacher", "engine", "fingerprint", "snapshot")}
    described |= {"bytes_per_token": record["bytes_per_token"], "stored_kl_mean": record["stored_kl_mean"], "by": by}
    if record["kind"] == "pairs":
        rows = _pair_rows(catalog, cache, by)
        return CacheStats(**described, groups=tuple(rows[:-1]), total=rows[-1])
    parts = _sums_by_origin(catalog, cache)
    groups = _rolled_up(parts, _ORIGIN.index(by))
    (total,) = _rolled_up(parts, None).values()
    return CacheStats(
        **described,
        groups=tuple(groups[name].figures(name) for name in sorted(groups)),
        total=total.figures("all"),
        histograms=(
            _entropy_histogram(total.entropy_counts),
            _tail_histogram(_counts(catalog, cache, _TAIL_BIN)),
            _k_histogram(_counts(catalog, cache, "k::INT")),
        ),
    )


def _sums_by_origin(catalog: Catalog, cache: str) -> dict[tuple[str, ...], _Sums]:
    """Sums for each (task, source, split)."""
    where = f"WHERE cache = {_quoted(cache)}"
    origin = ", ".join(_ORIGIN)
    parts: dict[tuple[str, ...], _Sums] = {}

    def add(rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            parts.setdefault(tuple(row[name] for name in _ORIGIN), _Sums()).add(row)

    add(catalog.query(f"SELECT {origin}, count(*) AS samples FROM samples {where} GROUP BY ALL").to_pylist())
    add(
        catalog.query(
            f"SELECT {origin}, count(*) AS tokens, sum(entropy::DOUBLE) AS entropy, "
            "sum(exp(log_tail_mass::DOUBLE)) AS tail_mass, count(*) FILTER (label_rank = 1) AS top1_is_label, "
            "sum(label_logprob::DOUBLE) AS label_logprob, sum(k)::BIGINT AS k, "
            "coalesce(sum(visual_advantage::DOUBLE), 0) AS visual_advantage, count(visual_advantage) AS looked_away "
            f"FROM tokens {where} GROUP BY ALL"
        ).to_pylist()
    )
    fine = catalog.query(
        f"SELECT {origin}, floor(entropy / {ENTROPY_STEP})::INT AS bin, count(*) AS n FROM tokens {where} GROUP BY ALL"
    )
    for row in fine.to_pylist():
        parts[tuple(row[name] for name in _ORIGIN)].entropy_counts[row["bin"]] = row["n"]
    return parts


def _rolled_up(parts: dict[tuple[str, ...], _Sums], place: int | None) -> dict[str, _Sums]:
    """The sums by the origin's part `place`; by nothing at all for None."""
    rolled: dict[str, _Sums] = {}
    for origin, part in parts.items():
        group = rolled.setdefault("all" if place is None else origin[place], _Sums())
        group.add(vars(part))
        for bin_, count in part.entropy_counts.items():
            group.entropy_counts[bin_] = group.entropy_counts.get(bin_, 0) + count
    return rolled


def _percentiles(counts: dict[int, int]) -> dict[int, float]:
    """The middle of the step in which each percentile lies."""
    bins = sorted(counts)
    reached = np.cumsum([counts[bin_] for bin_ in bins])
    # The value of rank ceil(q n): the smallest that at least a share q of the tokens does not exceed.
    ranks = [int(np.searchsorted(reached, np.ceil(q / 100 * reached[-1]))) for q in PERCENTILES]
    return {q: (bins[rank] + 0.5) * ENTROPY_STEP for q, rank in zip(PERCENTILES, ranks, strict=True)}


def _pair_rows(catalog: Catalog, cache: str, by: By) -> list[PairGroup]:
    """One row a group, the total last."""
    rows = catalog.query(
        f"SELECT coalesce({by}, 'all') AS name, grouping({by}) AS is_total, count(*) AS pairs, "
        "sum(len(chosen_ids) + len(rejected_ids))::BIGINT AS tokens, "
        "avg((chosen_score > rejected_score)::INT) AS teacher_prefers_chosen, "
        "sum(chosen_score::DOUBLE) / sum(len(chosen_ids)) AS chosen_logprob_mean, "
        "sum(rejected_score::DOUBLE) / sum(len(rejected_ids)) AS rejected_logprob_mean, "
        "avg(chosen_score::DOUBLE - rejected_score::DOUBLE) AS margin_mean "
        f"FROM pairs WHERE cache = {_quoted(cache)} GROUP BY ROLLUP ({by}) ORDER BY is_total, name"
    ).to_pylist()
    return [PairGroup(**{key: value for key, value in row.items() if key != "is_total"}) for row in rows]


_TAIL_BIN = (
    f"CASE WHEN log_tail_mass <= {-_TAIL_DECADES} * ln(10) THEN -1 "
    f"ELSE floor((log_tail_mass / ln(10) + {_TAIL_DECADES}) * {_TAIL_BINS_A_DECADE})::INT END"
)


def _counts(catalog: Catalog, cache: str, bin_sql: str) -> dict[int, int]:
    rows = catalog.query(
        f"SELECT {bin_sql} AS bin, count(*) AS n FROM tokens WHERE cache = {_quoted(cache)} GROUP BY ALL"
    ).to_pylist()
    return {row["bin"]: row["n"] for row in rows}


def _entropy_histogram(counts: dict[int, int]) -> Histogram:
    """Equal bins of a round width up to the largest entropy; none where no token was counted."""
    top = (max(counts, default=0) + 1) * ENTROPY_STEP
    width = round_up(top / _ENTROPY_BINS)
    num_bins = int(np.ceil(top / width - 1e-9))
    steps = round(width / ENTROPY_STEP)
    edges = [number * width for number in range(num_bins + 1)]
    labels = [f"{edge:.4g}" for edge in edges[:-1]]
    return _histogram("entropy", "nats", labels, edges, ((bin_ // steps, n) for bin_, n in counts.items()))


def _tail_histogram(counts: dict[int, int]) -> Histogram:
    """Logarithmic bins from 1e-7 to 1 and one below, without the empty ones at both ends."""
    num_bins = _TAIL_DECADES * _TAIL_BINS_A_DECADE
    edges = [0.0, *(10 ** (number / _TAIL_BINS_A_DECADE - _TAIL_DECADES) for number in range(num_bins + 1))]
    labels = [f"<1e-{_TAIL_DECADES}", *(f"{edge:.0e}".replace("e-0", "e-") for edge in edges[1:-1])]
    placed = {min(bin_ + 1, num_bins): n for bin_, n in counts.items()}
    low, high = min(placed), max(placed) + 1
    return _histogram(
        "tail mass",
        "probability",
        labels[low:high],
        edges[low : high + 1],
        ((place - low, n) for place, n in placed.items()),
    )


def _k_histogram(counts: dict[int, int]) -> Histogram:
    """One bin a k, or ranges of k of equal width where there are many."""
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // _K_BINS)
    starts = range(low, high + 1, width)
    ends = [min(start + width - 1, high) for start in starts]
    labels = [f"{start}" if start == end else f"{start}–{end}" for start, end in zip(starts, ends, strict=True)]
    edges = [*map(float, starts), float(starts[-1] + width)]
    return _histogram("k", "stored entries", labels, edges, (((k - low) // width, n) for k, n in counts.items()))


def _histogram(
    title: str, unit: str, labels: Sequence[str], edges: Sequence[float], placed: Iterable[tuple[int, int]]
) -> Histogram:
    counts = np.zeros(len(labels), np.int64)
    for place, count in placed:
        counts[min(place, len(labels) - 1)] += count
    return Histogram(title, unit, tuple(labels), tuple(counts.tolist()), tuple(edges))


def round_up(width: float) -> float:
    """The next round number of `ENTROPY_STEP`s."""
    steps = max(width / ENTROPY_STEP, 1)
    power = 10.0 ** math.floor(math.log10(steps))
    rounded = [factor * power for factor in (1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 10.0)]
    return next(number for number in rounded if number >= steps * (1 - 1e-9) and number.is_integer()) * ENTROPY_STEP


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
