"""A cache in figures: what a snapshot of it holds and what storing it cost.

The one place that says how the figures are counted; the command lines, SQL's `caches` and the report all show these.
"""

from dataclasses import dataclass

from logitlake_schemas import CacheKind, Snapshot
from logitlake_shared.lake import Cache

__all__ = ["CacheFigures", "cache_figures"]


@dataclass(frozen=True)
class CacheFigures:
    """A snapshot of a cache. The fields that SQL shows are the columns of its view `caches`, in this order."""

    cache: str
    kind: CacheKind
    snapshot: int
    fingerprint: str
    teacher: str
    engine: str
    """name and version"""
    units: int
    rows: int
    """samples or pairs"""
    tokens: int
    """their response tokens"""
    bytes: int
    """all committed files"""
    bytes_per_token: float | None
    """bytes of the row shards a response token; images are stored once and not counted. None without tokens"""
    errors: int
    """samples or pairs that are not there, with a code: what failed, and prompts of which no pair was made"""
    stored_kl_mean: float | None
    """mean KL(captured‖stored) in nats a token; none where no top-k is stored (pairs, draws)"""
    stored_kl_max: float | None
    mean_k: float | None
    """mean number of stored entries a token"""
    shards: int
    """committed files, images included"""
    image_bytes: int


def cache_figures(cache: Cache, snapshot: Snapshot) -> CacheFigures:
    """Adds up the commit records of a snapshot; opens no shard."""
    entries = [entry for commit in snapshot.commits for entry in commit.shards]
    row_entries = [entry for entry in entries if entry.kind == cache.spec.kind]
    tokens = sum(entry.tokens for entry in row_entries)
    row_bytes = sum(entry.bytes for entry in row_entries)
    # A unit's own mean, weighted by its tokens, gives the mean over all tokens.
    measured = [
        (sum(entry.tokens for entry in commit.shards), commit.stored_error)
        for commit in snapshot.commits
        if commit.stored_error is not None
    ]
    weight = sum(count for count, _ in measured)
    rounded = [(n, error.kl_mean, error.kl_max) for n, error in measured if error.kl_mean is not None]
    return CacheFigures(
        cache=cache.name,
        kind=cache.spec.kind,
        snapshot=snapshot.number,
        fingerprint=cache.fingerprint,
        teacher=cache.spec.engine.model,
        engine=f"{cache.spec.engine.engine} {cache.spec.engine.engine_version}",
        units=len(snapshot.commits),
        rows=sum(entry.rows for entry in row_entries),
        tokens=tokens,
        bytes=sum(entry.bytes for entry in entries),
        bytes_per_token=row_bytes / tokens if tokens else None,
        errors=sum(len(commit.errors) for commit in snapshot.commits),
        stored_kl_mean=sum(n * mean for n, mean, _ in rounded) / weight if rounded else None,
        stored_kl_max=max((largest for _, _, largest in rounded if largest is not None), default=None),
        mean_k=sum(n * error.mean_k for n, error in measured) / weight if weight else None,
        shards=len(entries),
        image_bytes=sum(entry.bytes for entry in entries if entry.kind == "images"),
    )
