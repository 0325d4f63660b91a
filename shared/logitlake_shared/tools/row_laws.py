"""The laws that every row of a shard obeys, checked a shard at a time.

Each law is one sentence about a row or a token (`Broken.law` names it), and is checked for all tokens of a table at
once: a lake of a million tokens takes seconds. The tests hold the same laws once more, one token at a time.

    lengths      per-token columns are as long as the response, segments sum to their ids, entries to the sum of k
    present      what the spec says was captured is there, and nothing else
    eos          every response ends with EOS, but for the last one of a teacher that was stopped by length
    vocabulary   ids are in the token map
    finite       logprobs are finite and at most 0; a tail's may be -inf; nothing is NaN
    entropy      finite, at least 0
    k            as many entries as the spec's codec allows
    order        entries stand by falling probability
    unique       no id occurs twice in a token's entries
    mass         entries and tail sum to 1; at a higher temperature the tail is not smaller, and never all
    label        label_rank and label_logprob say what the entries say, where the label is one of them
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from logitlake_schemas import TAIL_COLUMNS, CaptureSpec, CodecPolicy
from logitlake_shared.topk import GRID_MAX_STEP, GRID_STEP, MASS_TOLERANCE, nearest_level

__all__ = ["Broken", "check_pairs", "check_samples"]

# A stored label_logprob keeps ten mantissa bits, so that it may lie this much nearer to the next level or sum.
_OWN_ROUNDING = 2.0**-10
_LOGPROB_TOLERANCE = 1e-3  # exact grids: the rounding of a bf16 engine's two answers for one token
_SIDES = ("chosen", "rejected")
_TOKEN_LISTS = ("k", "label_logprob", "label_rank", "log_tail_mass", "entropy")
_NO_IMAGE = "label_logprob_no_image"
_OPTIONAL_LISTS = (_NO_IMAGE, *TAIL_COLUMNS.values())

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Broken:
    """One law and every place of a table that breaks it."""

    law: str
    rows: Int64
    tokens: Int64
    """the token of each place, -1 where the law is about the row"""
    says: str
    """what is wrong at the first place"""


def check_samples(table: pa.Table, spec: CaptureSpec) -> list[Broken]:
    """The laws that a table of `SAMPLE_COLUMNS` breaks. Rows of wrong lengths are reported as such and no further."""
    broken = [*_lengths_of_samples(table), *_present(table, spec)]
    bad = np.unique(np.concatenate([one.rows for one in broken])) if broken else np.empty(0, np.int64)
    rows = np.setdiff1d(np.arange(table.num_rows), bad)
    if len(bad):
        table = table.take(pa.array(rows))
    tokens = _Tokens(table, rows)
    vocab_size, eos_id = spec.tokenizer.vocab_size, spec.tokenizer.eos_id
    broken += _ends(tokens, eos_id, _stopped_by_length(table))
    broken += tokens.broken(
        "vocabulary",
        (tokens.label < 0) | (tokens.label >= vocab_size),
        lambda t: f"response id {tokens.label[t]} is outside the vocabulary of {vocab_size}",
    )
    broken += _values(tokens)
    broken += _optional_values(tokens, spec)
    broken += _entries(tokens, spec)
    if isinstance(spec.codec, CodecPolicy):
        broken += _labels(tokens, spec.codec)
    return broken


def check_pairs(table: pa.Table, spec: CaptureSpec) -> list[Broken]:
    """The laws that a table of `PAIR_COLUMNS` breaks."""
    broken: list[Broken] = []
    for side in _SIDES:
        ids, id_stops = _list(table, f"{side}_ids")
        id_sizes = np.diff(id_stops)
        for name in (f"{side}_logprobs", f"{side}_logprobs_no_image"):
            values, stops = _list(table, name)
            sizes, there = np.diff(stops), _is_there(table, name)
            places = np.flatnonzero(((sizes != id_sizes) | (id_sizes == 0)) & there)
            if len(places):
                first = places[0]
                broken.append(_about_rows("lengths", places, f"{name}: {sizes[first]} for {id_sizes[first]} tokens"))
            broken += _pair_values(name, values, stops, ~np.isfinite(values) | (values > _LOGPROB_TOLERANCE))
        whole = id_sizes > 0
        places = np.flatnonzero(whole)[ids[id_stops[1:][whole] - 1] != spec.tokenizer.eos_id]
        if len(places):
            broken.append(_about_rows("eos", places, f"{side} does not end with EOS"))
        outside = (ids < 0) | (ids >= spec.tokenizer.vocab_size)
        broken += _pair_values(f"{side}_ids", ids, id_stops, outside, "vocabulary")
        rating = table.column(f"{side}_rating")
        wrong = np.flatnonzero(pc.invert(pc.fill_null(pc.is_finite(rating), fill_value=True)).to_numpy())
        if len(wrong):
            broken.append(_about_rows("finite", wrong, f"{side}_rating is {rating[int(wrong[0])].as_py()}"))
    for name in ("logprobs_no_image", "rating"):
        one, other = (_is_there(table, f"{side}_{name}") for side in _SIDES)
        places = np.flatnonzero(one != other)
        if len(places):
            broken.append(_about_rows("present", places, f"{name} of one response without the other's"))
    return broken


def _pair_values(name: str, values: npt.NDArray[Any], stops: Int64, bad: Bool, law: str = "finite") -> list[Broken]:
    """The law broken by values of a list column of pairs."""
    places = np.flatnonzero(bad)
    if not len(places):
        return []
    rows = np.searchsorted(stops, places, side="right") - 1
    what = "is not in the token map" if law == "vocabulary" else "is not finite and at most 0"
    return [Broken(law, rows, places - stops[rows], f"{name}: {values[places[0]]} {what}")]


def _about_rows(law: str, rows: Int64, says: str) -> Broken:
    return Broken(law, rows, np.full(len(rows), -1), says)


class _Tokens:
    """The flat columns of a table whose lengths agree, and the way back from a token to its row."""

    def __init__(self, table: pa.Table, rows: Int64) -> None:
        self.label, starts = _list(table, "response_ids")
        self.turns, self.turn_stops = _list(table, "response_lengths")
        self.k = _list(table, "k")[0].astype(np.int64)
        self.label_logprob = _list(table, "label_logprob")[0].astype(np.float64)
        self.label_rank = _list(table, "label_rank")[0].astype(np.int64)
        self.log_tail = _list(table, "log_tail_mass")[0].astype(np.float64)
        self.entropy = _list(table, "entropy")[0]
        self.optional = {name: _spread(table, name, len(self.label)) for name in _OPTIONAL_LISTS}
        """what a row does not have is NaN, and `is_there` False"""
        lengths = np.diff(starts)
        self.is_there = {name: np.repeat(_is_there(table, name), lengths) for name in _OPTIONAL_LISTS}
        self.ids = _list(table, "topk_ids")[0]
        self.logprobs = _list(table, "topk_logprobs")[0].astype(np.float64)
        self.stops = np.cumsum(self.k)
        self.token = np.repeat(np.arange(len(self.k)), self.k)
        """the token of each entry"""
        self._starts, self._rows = starts, rows

    def broken(self, law: str, bad: Bool, says: Any) -> list[Broken]:
        """The law broken at the tokens where `bad` holds; `says(token)` is a sentence about the first of them."""
        return self.broken_at(law, np.flatnonzero(bad), says)

    def broken_at(self, law: str, tokens: Int64, says: Any) -> list[Broken]:
        """The same, for these tokens."""
        if not len(tokens):
            return []
        places = np.searchsorted(self._starts, tokens, side="right") - 1
        return [Broken(law, self._rows[places], tokens - self._starts[places], says(tokens[0]))]

    def broken_entries(self, law: str, bad: Bool, says: Any) -> list[Broken]:
        """The law broken at the tokens that own the entries where `bad` holds; `says(entry)` about the first."""
        entries = np.flatnonzero(bad)
        return self.broken_at(law, np.unique(self.token[entries]), lambda _: says(entries[0]))


def _lengths_of_samples(table: pa.Table) -> Iterator[Broken]:
    sizes = {
        name: np.diff(_list(table, name)[1])
        for name in ("prompt_ids", "response_ids", "topk_ids", "topk_logprobs", *_TOKEN_LISTS)
    }
    sums = {name: _row_sums(table, name) for name in ("prompt_lengths", "response_lengths", "k")}
    rows = np.arange(table.num_rows)
    segments = (sums["prompt_lengths"] != sizes["prompt_ids"]) | (sums["response_lengths"] != sizes["response_ids"])
    # A turn without a token has no place for its EOS.
    turns, turn_stops = _list(table, "response_lengths")
    empty = np.zeros(table.num_rows, np.bool_)
    empty[np.searchsorted(turn_stops, np.flatnonzero(turns < 1), side="right") - 1] = True
    columns = np.zeros(table.num_rows, np.bool_)
    for name in _TOKEN_LISTS:
        columns |= sizes[name] != sizes["response_ids"]
    for name in _OPTIONAL_LISTS:
        columns |= (np.diff(_list(table, name)[1]) != sizes["response_ids"]) & _is_there(table, name)
    columns |= (sums["k"] != sizes["topk_ids"]) | (sums["k"] != sizes["topk_logprobs"])
    for bad, says in (
        (segments | empty, "segment lengths do not sum to the ids"),
        (columns & ~segments & ~empty, "columns of different lengths"),
    ):
        if bad.any():
            yield Broken("lengths", rows[bad], np.full(int(bad.sum()), -1), says)


def _present(table: pa.Table, spec: CaptureSpec) -> Iterator[Broken]:
    temperatures = spec.codec.temperatures if isinstance(spec.codec, CodecPolicy) else ()
    sees_images = np.diff(_list(table, "image_sha256")[1]) > 0
    everywhere, nowhere = np.ones(table.num_rows, np.bool_), np.zeros(table.num_rows, np.bool_)
    expected = {name: everywhere if at in temperatures else nowhere for at, name in TAIL_COLUMNS.items()}
    expected[_NO_IMAGE] = sees_images if spec.no_image_pass else nowhere
    for name, is_expected in expected.items():
        there = _is_there(table, name)
        for rows, says in (
            (np.flatnonzero(is_expected & ~there), "is missing, the spec says that it was captured"),
            (np.flatnonzero(there & ~is_expected), "is there, the spec says that it was not captured"),
        ):
            if len(rows):
                yield _about_rows("present", rows, f"{name} {says}")


def _stopped_by_length(table: pa.Table) -> Bool:
    return np.asarray(pc.equal(table.column("finish_reason"), "length").to_numpy(), np.bool_)


def _ends(tokens: _Tokens, eos_id: int, stopped_by_length: Bool) -> list[Broken]:
    ends = np.cumsum(tokens.turns.astype(np.int64)) - 1
    open_ends = tokens.turn_stops[1:][stopped_by_length] - 1
    closed = np.ones(len(ends), np.bool_)
    closed[open_ends] = False
    return tokens.broken_at(
        "eos",
        ends[closed & (tokens.label[ends] != eos_id)],
        lambda t: f"a response does not end with EOS but with {tokens.label[t]}",
    )


def _values(tokens: _Tokens) -> Iterator[Broken]:
    yield from tokens.broken_entries(
        "finite",
        ~np.isfinite(tokens.logprobs) | (tokens.logprobs > _LOGPROB_TOLERANCE),
        lambda entry: f"a logprob is not finite and at most 0: {tokens.logprobs[entry]}",
    )
    yield from tokens.broken(
        "finite",
        ~np.isfinite(tokens.label_logprob) | (tokens.label_logprob > _LOGPROB_TOLERANCE),
        lambda t: f"label_logprob is not finite and at most 0: {tokens.label_logprob[t]}",
    )
    yield from tokens.broken(
        "finite",
        np.isnan(tokens.log_tail) | (tokens.log_tail > _LOGPROB_TOLERANCE),
        lambda t: f"log_tail_mass is not a log of a probability: {tokens.log_tail[t]}",
    )
    yield from tokens.broken(
        "entropy",
        ~np.isfinite(tokens.entropy) | (tokens.entropy < 0),
        lambda t: f"entropy is not finite and at least 0: {tokens.entropy[t]}",
    )


def _optional_values(tokens: _Tokens, spec: CaptureSpec) -> Iterator[Broken]:
    seen = tokens.optional[_NO_IMAGE]
    yield from tokens.broken(
        "finite",
        tokens.is_there[_NO_IMAGE] & (~np.isfinite(seen) | (seen > _LOGPROB_TOLERANCE)),
        lambda t: f"{_NO_IMAGE} is not finite and at most 0: {seen[t]}",
    )
    for temperature, name in TAIL_COLUMNS.items():
        there, log_tail = tokens.is_there[name], tokens.optional[name]
        yield from tokens.broken(
            "finite",
            there & np.isnan(log_tail),
            lambda t, name=name, log_tail=log_tail: f"{name} is not a log of a probability: {log_tail[t]}",
        )
        with np.errstate(over="ignore", invalid="ignore"):
            tail, cooler = np.exp(log_tail), np.exp(tokens.log_tail)
            tolerance = np.full(len(tail), MASS_TOLERANCE)
            if _on_grid(spec):
                tolerance += cooler * np.abs(np.where(cooler > 0, tokens.log_tail, 0)) * _OWN_ROUNDING
            wrong = there & ((log_tail >= 0) | (tail < cooler - tolerance))
        yield from tokens.broken(
            "mass",
            wrong,
            lambda t, at=temperature, tail=tail, cooler=cooler: (
                f"the tail is {tail[t]:.5f} at temperature {at} and {cooler[t]:.5f} at 1"
            ),
        )


def _entries(tokens: _Tokens, spec: CaptureSpec) -> Iterator[Broken]:
    vocab_size = spec.tokenizer.vocab_size
    low, high = _allowed_k(spec)
    yield from tokens.broken(
        "k", (tokens.k < low) | (tokens.k > high), lambda t: f"k is {tokens.k[t]}, the spec allows {low} to {high}"
    )
    yield from tokens.broken_entries(
        "vocabulary",
        (tokens.ids < 0) | (tokens.ids >= vocab_size),
        lambda entry: f"top-k id {tokens.ids[entry]} is outside the vocabulary of {vocab_size}",
    )
    within = tokens.token[1:] == tokens.token[:-1]
    rising = np.append(False, within & (tokens.logprobs[1:] > tokens.logprobs[:-1]))[: len(tokens.token)]
    yield from tokens.broken_entries("order", rising, lambda _: "top-k not in falling order")
    # A token's number above, an id's bits below: equal keys are one id twice in one token.
    keys = np.sort(tokens.token << 32 | (tokens.ids.astype(np.int64) & 0xFFFFFFFF))
    twice = keys[1:][keys[1:] == keys[:-1]]
    yield from tokens.broken_at(
        "unique", np.unique(twice >> 32), lambda _: f"top-k id {twice[0] & 0xFFFFFFFF} occurs twice"
    )
    yield from _mass(tokens, spec)


def _mass(tokens: _Tokens, spec: CaptureSpec) -> list[Broken]:
    with np.errstate(over="ignore", invalid="ignore"):
        p, tail = np.exp(tokens.logprobs), np.exp(tokens.log_tail)
        mass = np.bincount(tokens.token, p, len(tokens.k)) + tail
        tolerance = np.full(len(mass), MASS_TOLERANCE)
        if _on_grid(spec):
            # Each entry may have moved by half a level, the tail by its own rounding.
            moved = np.bincount(tokens.token, p * _level_step(tokens.logprobs) / 2, len(tokens.k))
            tolerance += moved + tail * np.abs(np.where(tail > 0, tokens.log_tail, 0)) * _OWN_ROUNDING
        wrong = np.abs(mass - 1) > tolerance
    return tokens.broken("mass", wrong, lambda t: f"top-k and tail sum to {mass[t]:.5f}")


def _labels(tokens: _Tokens, codec: CodecPolicy) -> Iterator[Broken]:
    inside = (tokens.label_rank >= 1) & (tokens.label_rank <= tokens.k)
    yield from tokens.broken(
        "label", tokens.label_rank < 1, lambda t: f"label_rank is {tokens.label_rank[t]}, 1 is the first"
    )
    at = tokens.stops[inside] - tokens.k[inside] + tokens.label_rank[inside] - 1
    which = np.flatnonzero(inside)
    other = tokens.ids[at] != tokens.label[inside]
    yield from tokens.broken_at(
        "label",
        which[other],
        lambda t: f"label_rank {tokens.label_rank[t]} names another id than the response's {tokens.label[t]}",
    )
    stored, own = tokens.logprobs[at], tokens.label_logprob[inside]
    tolerance = _LOGPROB_TOLERANCE + np.abs(own) * _OWN_ROUNDING
    if codec.grid != "exact":
        tolerance += _level_step(stored)
        # Below its lowest level the grid holds a logprob at that level.
        own = np.maximum(own, nearest_level(np.array([-np.inf], np.float32)))
    with np.errstate(invalid="ignore"):
        apart = ~other & (np.abs(stored - own) > tolerance)
    yield from tokens.broken_at(
        "label",
        which[apart],
        lambda t: f"label_logprob is {tokens.label_logprob[t]:.4f}, its entry says otherwise",
    )
    # The other way round: a label among the entries has the rank of its entry.
    found = np.unique(tokens.token[tokens.ids == tokens.label[tokens.token]])
    yield from tokens.broken_at(
        "label",
        np.setdiff1d(found, which),
        lambda t: f"the label is one of the entries, label_rank {tokens.label_rank[t]} says it is not",
    )


def _allowed_k(spec: CaptureSpec) -> tuple[int, int]:
    vocab_size = spec.tokenizer.vocab_size
    if isinstance(spec.codec, CodecPolicy):
        return min(spec.codec.k_min, vocab_size), min(spec.codec.k_max, vocab_size)
    return 1, min(spec.codec.draws, vocab_size)


def _on_grid(spec: CaptureSpec) -> bool:
    return isinstance(spec.codec, CodecPolicy) and spec.codec.grid != "exact"


def _level_step(logprobs: Float64) -> Float64:
    """The distance of the levels around a logprob, in nats; a little more, as the next level down is farther."""
    return np.asarray(np.minimum(GRID_MAX_STEP, 1.1 * GRID_STEP * np.exp(-logprobs / 2)))


def _list(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], Int64]:
    """The flat values of a list column and where each row starts, with the end behind the last; a null is empty."""
    column = table.column(name)
    if not column.num_chunks:
        return np.empty(0, column.type.value_type.to_pandas_dtype()), np.zeros(1, np.int64)
    array = column.combine_chunks() if column.num_chunks > 1 else column.chunk(0)
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _is_there(table: pa.Table, name: str) -> Bool:
    return np.asarray(pc.is_valid(table.column(name)).to_numpy(), np.bool_)


def _spread(table: pa.Table, name: str, num_tokens: int) -> Float64:
    """The values of an optional list a token, NaN for the tokens of rows that have none."""
    spread = np.full(num_tokens, np.nan)
    lengths = np.diff(_list(table, "response_ids")[1])
    spread[np.repeat(_is_there(table, name), lengths)] = _list(table, name)[0]
    return spread


def _row_sums(table: pa.Table, name: str) -> Int64:
    values, stops = _list(table, name)
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(sums[stops[1:]] - sums[stops[:-1]])
