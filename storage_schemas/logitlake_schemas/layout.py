"""The names of the objects in a lake, relative to its root. Nobody else spells a path."""

import re

__all__ = [
    "LAKE_MANIFEST",
    "cache_names_prefix",
    "cache_of",
    "cache_prefix",
    "catalog_number",
    "catalog_path",
    "catalog_prefix",
    "commit_path",
    "commits_prefix",
    "image_shard_path",
    "job_path",
    "quarantine_path",
    "quarantine_prefix",
    "shard_path",
    "shard_prefixes",
    "snapshot_number",
    "snapshot_path",
    "snapshots_prefix",
    "spec_path",
    "unit_of_commit",
    "unit_of_shard",
    "valid_name",
]

LAKE_MANIFEST = "lake.json"

# Sixteen hex digits of the content's sha256: enough to name, while the whole digest is in the commit record.
_DIGEST_DIGITS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def valid_name(name: str) -> bool:
    """Whether `name` may name a cache or a unit: letters, digits, `._-`, at most 100, not starting with a sign."""
    return _NAME.fullmatch(name) is not None


def job_path(run: str) -> str:
    """What a job on a cluster is to do: its command and resolved configuration."""
    return f"jobs/{run}.toml"


def cache_names_prefix() -> str:
    """The prefix under which every cache has its folder."""
    return "caches"


def cache_prefix(cache: str) -> str:
    """The folder of one cache."""
    return f"caches/{cache}"


def spec_path(cache: str) -> str:
    """The capture spec of a cache."""
    return f"{cache_prefix(cache)}/spec.json"


def shard_path(cache: str, unit: str, sha256: str) -> str:
    """A shard of sample or pair rows, named by its unit and its content."""
    return f"{cache_prefix(cache)}/shards/{unit}-{sha256[:_DIGEST_DIGITS]}.parquet"


def image_shard_path(cache: str, unit: str, sha256: str) -> str:
    """A shard of image rows, named by its unit and its content."""
    return f"{cache_prefix(cache)}/images/{unit}-{sha256[:_DIGEST_DIGITS]}.parquet"


def commits_prefix(cache: str) -> str:
    """The folder of a cache's commit records."""
    return f"{cache_prefix(cache)}/commits"


def commit_path(cache: str, unit: str) -> str:
    """The commit record of a unit."""
    return f"{commits_prefix(cache)}/{unit}.json"


def unit_of_commit(path: str) -> str:
    """The unit whose commit record is at `path`; the inverse of `commit_path`."""
    return path.rsplit("/", 1)[-1].removesuffix(".json")


def catalog_prefix() -> str:
    """The folder of the lake's published catalogs."""
    return "catalog"


def catalog_path(number: int) -> str:
    """Catalog `number` of the lake; published ones are numbered from 1."""
    return f"{catalog_prefix()}/catalog-{number:08d}.duckdb"


def catalog_number(path: str) -> int:
    """The number of the catalog at `path`; the inverse of `catalog_path`."""
    return int(path.rsplit("-", 1)[-1].removesuffix(".duckdb"))


def cache_of(path: str) -> str | None:
    """The cache to which the object or folder at `path` belongs; None for what belongs to the whole lake."""
    parts = path.split("/")
    return parts[1] if parts[0] == cache_names_prefix() and len(parts) > 1 else None


def shard_prefixes(cache: str) -> tuple[str, str]:
    """The folders of a cache's shards: rows, and images."""
    return f"{cache_prefix(cache)}/shards", f"{cache_prefix(cache)}/images"


def unit_of_shard(path: str) -> str:
    """The unit that wrote the shard at `path`; the inverse of `shard_path` and `image_shard_path`."""
    return path.rsplit("/", 1)[-1].rsplit("-", 1)[0]


def quarantine_prefix(cache: str) -> str:
    """The folder of a cache's quarantine records."""
    return f"{cache_prefix(cache)}/quarantine"


def quarantine_path(cache: str, unit: str, number: int) -> str:
    """The record that a unit was found damaged and returned to the plan for the `number`th time (from 1)."""
    return f"{quarantine_prefix(cache)}/{unit}-{number:04d}.json"


def snapshots_prefix(cache: str) -> str:
    """The folder of a cache's snapshots."""
    return f"{cache_prefix(cache)}/snapshots"


def snapshot_path(cache: str, number: int) -> str:
    """Snapshot `number` (from 1) of a cache."""
    return f"{snapshots_prefix(cache)}/{number:08d}.json"


def snapshot_number(path: str) -> int:
    """The number of the snapshot at `path`; the inverse of `snapshot_path`."""
    return int(path.rsplit("/", 1)[-1].removesuffix(".json"))
