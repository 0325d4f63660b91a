"""Do two engines say the same of the same teacher? Two caches of one lake, row by row.

    python -m examples.smollm2.compare runs/smollm2/lake hf vllm

Compared are the samples that both caches hold: the logprob of every response token, and the logprob of every entry
that both stored for it. The command fails above `LOGPROB_TOLERANCE`.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from logitlake_shared.errors import DataError, LogitLakeError
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rows import LakeSample

__all__ = ["LOGPROB_TOLERANCE", "Agreement", "compare_caches"]

# Both engines run the same float32 weights and add in different orders. SmolLM2's logits are around 20, where float32
# has steps of 2e-6, and thirty layers pass their rounding on: 1e-4 was the largest difference of 4,600 tokens, 6e-6 the
# mean. Five times the largest is allowed, because other processors have other kernels. A fault (a row off by one,
# another rotary base, bfloat16 somewhere) moves logprobs by 1e-2 and more.
LOGPROB_TOLERANCE = 5e-4


@dataclass(frozen=True)
class Agreement:
    """How far two caches are apart. Logprobs in nats."""

    samples: int
    tokens: int
    label_logprob_max: float
    """largest difference of a response token's logprob"""
    label_logprob_mean: float
    topk_logprob_max: float
    """largest difference of an entry that both stored"""
    topk_common: float
    """share of the entries of either that both stored; a cut at rank or probability may fall either way"""
    first_choice: float
    """share of the tokens with the same most probable entry"""


def compare_caches(lake: Path | str, one: str, other: str) -> Agreement:
    """Compares the samples that both caches hold. Raises `DataError` when there are none, or their ids differ."""
    first, second = LakeDataset(lake, one), LakeDataset(lake, other)
    places = {sample_id: place for place, sample_id in enumerate(second.ids())}
    common = [(place, places[sample_id]) for place, sample_id in enumerate(first.ids()) if sample_id in places]
    if not common:
        raise DataError(
            f"{lake}: the caches {one!r} and {other!r} hold no common sample; capture the same data in both"
        )
    label, topk, num_entries, same_choice = [], [], 0, 0
    for place, other_place in common:
        a, b = first[place], second[other_place]
        if not np.array_equal(a.response_ids, b.response_ids):
            raise DataError(f"{lake}: sample {a.sample_id} has other response ids in {one!r} than in {other!r}")
        label.append(np.abs(a.rows.label_logprob_T - b.rows.label_logprob_T))
        for entries, entries_of_other in zip(_entries(a), _entries(b), strict=True):
            both = entries.keys() & entries_of_other.keys()
            topk += [abs(entries[token] - entries_of_other[token]) for token in both]
            num_entries += len(entries.keys() | entries_of_other.keys())
            same_choice += next(iter(entries)) == next(iter(entries_of_other))
    label_T = np.concatenate(label)
    return Agreement(
        samples=len(common),
        tokens=len(label_T),
        label_logprob_max=float(label_T.max()),
        label_logprob_mean=float(label_T.mean()),
        topk_logprob_max=max(topk),
        topk_common=len(topk) / num_entries,
        first_choice=same_choice / len(label_T),
    )


def _entries(sample: LakeSample) -> list[dict[int, float]]:
    """Token id to logprob for each response token, the most probable one first."""
    ends = np.cumsum(sample.rows.k_T.astype(np.int64))[:-1]
    ids, logprobs = np.split(sample.rows.topk_ids, ends), np.split(sample.rows.topk_logprobs, ends)
    return [dict(zip(i.tolist(), lp.tolist(), strict=True)) for i, lp in zip(ids, logprobs, strict=True)]


@click.command()
@click.argument("lake")
@click.argument("one")
@click.argument("other")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(lake: str, one: str, other: str, as_json: Path | None) -> None:
    """Compare two caches of LAKE; exit code 1 when they differ by more than the tolerance."""
    try:
        agreement = compare_caches(lake, one, other)
    except LogitLakeError as error:
        raise click.ClickException(str(error)) from error
    if as_json is not None:
        as_json.write_text(json.dumps(asdict(agreement), indent=1) + "\n", encoding="utf-8")
    click.echo(
        f"{one} and {other}, {agreement.samples} samples, {agreement.tokens} response tokens:\n"
        f"  logprob of the response token  largest difference {agreement.label_logprob_max:.1e} nats, "
        f"mean {agreement.label_logprob_mean:.1e}\n"
        f"  common top-k entries           largest difference {agreement.topk_logprob_max:.1e} nats, "
        f"{agreement.topk_common:.3%} of the entries are common\n"
        f"  most probable token            the same for {agreement.first_choice:.3%} of the tokens"
    )
    worst = max(agreement.label_logprob_max, agreement.topk_logprob_max)
    if not worst <= LOGPROB_TOLERANCE:
        click.echo(f"  above the tolerance of {LOGPROB_TOLERANCE:.0e} nats", err=True)
        sys.exit(1)
    click.echo(f"  within the tolerance of {LOGPROB_TOLERANCE:.0e} nats")


if __name__ == "__main__":
    main()
