"""A lake: caches, units, commit records and snapshots.

Promises: a unit is committed by the creation of one object, its commit record, after everything the record names is
durable; of two publishers of a unit exactly one wins and the other learns it; a unit published twice is one unit;
what a snapshot names never changes. So a writer may be killed anywhere: at worst a shard lies in the lake that no
record names, and the unit is done again.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from logitlake_schemas import (
    FORMAT_VERSION,
    CaptureSpec,
    CodecPolicy,
    CommitRecord,
    LakeManifest,
    QuarantineRecord,
    ShardEntry,
    ShardKind,
    Snapshot,
    StoredError,
    UnitError,
    layout,
    sha256_hex,
)
from logitlake_schemas.records import Record
from logitlake_shared.errors import (
    FingerprintMismatchError,
    LakeConflictError,
    LakeError,
    LakeFormatError,
)
from logitlake_shared.rows import (
    LakeImage,
    LakePair,
    LakeSample,
    images_to_table,
    pairs_to_table,
    samples_to_table,
)
from logitlake_shared.shards import (
    Shard,
    check_committed,
    check_format_version,
    footer_of,
    missing_error,
    read_error,
    write_shard,
)
from logitlake_shared.store import ObjectStore, open_store

__all__ = ["Cache", "Lake", "UnitResult", "spec_differences"]

AnyRecord = TypeVar("AnyRecord", bound=Record)

# Records read at once: an object store answers each in some ten milliseconds.
_CONNECTIONS = 16


@dataclass(frozen=True)
class UnitResult:
    """What capturing one unit gave: rows of the cache's kind, their images, and the samples that failed."""

    unit: str
    samples: Sequence[LakeSample] | pa.Table = ()
    """as records, or as the table that they make (`rows.stored_table`)"""
    pairs: Sequence[LakePair] = ()
    images: Sequence[LakeImage] = ()
    errors: Sequence[UnitError] = ()
    stored_error: StoredError | None = None


@dataclass(frozen=True)
class Lake:
    """A lake in a folder or an object store. `open` refuses what is not a lake; `create` makes one or opens it."""

    store: ObjectStore

    @classmethod
    def create(cls, uri: str | Path) -> "Lake":
        """The lake at `uri`, made if nothing is there.

        Raises `LakeError` where the store has no conditional writes: two publishers would both believe that they won.
        """
        store, manifest = open_store(uri), LakeManifest().to_bytes()
        if store.put_new(layout.LAKE_MANIFEST, manifest) and store.put_new(layout.LAKE_MANIFEST, manifest):
            raise LakeError(
                f"{uri}: the store created one object twice, so it ignores conditional writes (If-None-Match); a lake "
                "cannot be written there safely. Use a store that has them, or a folder"
            )
        return cls.of(store)

    @classmethod
    def open(cls, uri: str | Path) -> "Lake":
        """The lake at `uri`. Raises `LakeFormatError` when there is none."""
        if "://" not in str(uri) and not os.path.isdir(uri):  # noqa: PTH112  # Path.is_dir raises where a name is too long
            raise LakeFormatError(f"{uri}: no such folder; a lake is made by `logitlake-teacher capture`")
        return cls.of(open_store(uri))

    @classmethod
    def of(cls, store: ObjectStore) -> "Lake":
        """The lake in an open store."""
        data = store.get(layout.LAKE_MANIFEST)
        if data is None:
            raise LakeFormatError(f"{store.uri}: not a lake: {layout.LAKE_MANIFEST} is missing")
        _parse(LakeManifest, data, f"{store.uri}/{layout.LAKE_MANIFEST}")
        return cls(store)

    def cache_names(self) -> list[str]:
        """The caches of the lake, sorted."""
        names = [folder.rsplit("/", 1)[-1] for folder in self.store.folders(layout.cache_names_prefix())]
        return [name for name in names if self.has_cache(name)]

    def has_cache(self, name: str) -> bool:
        """Whether there is a cache of this name; looks at nothing else."""
        return layout.valid_name(name) and self.store.size(layout.spec_path(name)) is not None

    def create_cache(self, name: str, spec: CaptureSpec) -> "Cache":
        """The cache `name` with this spec, made if it is not there.

        Raises `FingerprintMismatchError` naming every field that differs when it is there with another spec.
        """
        _check_name("cache", name)
        if not self.store.put_new(layout.spec_path(name), spec.to_bytes()):
            differences = spec_differences(self.cache(name).spec, spec)
            if differences:
                raise FingerprintMismatchError(
                    f"{self.store.uri}: cache {name!r} was captured with another spec: {'; '.join(differences)}. "
                    "Capture into a cache of another name, or restore what was used before"
                )
        return self.cache(name)

    def cache(self, name: str) -> "Cache":
        """The cache `name`. Raises `LakeError` naming the caches there are when there is no such cache."""
        data = self.store.get(layout.spec_path(name)) if layout.valid_name(name) else None
        if data is None:
            known = ", ".join(self.cache_names()) or "none yet"
            raise LakeError(f"{self.store.uri}: no cache {name!r}; caches in this lake: {known}")
        return Cache(self.store, name, _parse(CaptureSpec, data, f"{self.store.uri}/{layout.spec_path(name)}"))


@dataclass(frozen=True)
class Cache:
    """One capture of one dataset by one teacher."""

    store: ObjectStore
    name: str
    spec: CaptureSpec
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self.spec.fingerprint)

    def publish_unit(self, result: UnitResult) -> CommitRecord:
        """Writes the unit's shards, then its commit record. Idempotent.

        Returns the record that counts: this one, or the equal one of an earlier publisher. Raises `LakeError` when
        the stored error is over the spec's budget, `LakeConflictError` when another publisher committed other content.
        """
        _check_name("unit", result.unit)
        self._check_budget(result)
        shards = self._prepare(result)
        for entry, data in shards:
            self._put_shard(entry, data)
        record = CommitRecord(
            cache=self.name,
            unit=result.unit,
            spec_fingerprint=self.fingerprint,
            shards=tuple(entry for entry, _ in shards),
            errors=tuple(result.errors),
            stored_error=result.stored_error,
        )
        if self.store.put_new(layout.commit_path(self.name, result.unit), record.to_bytes()):
            # Collection may have taken a shard just before the record was there to protect it: see `gc`.
            for entry, data in shards:
                if self.store.size(entry.path) is None:
                    self._put_shard(entry, data)
            return record
        committed = self.commit(result.unit)
        if committed != record:
            raise LakeConflictError(
                f"{self.store.uri}: unit {result.unit} of cache {self.name!r} is committed with other content; this "
                "publisher's result is discarded. The teacher is not deterministic on this machine, or two versions "
                "of it write to one cache"
            )
        return committed

    def committed_units(self) -> set[str]:
        """The units that have a commit record; resume is the plan minus these."""
        return {layout.unit_of_commit(name) for name in self.store.names(layout.commits_prefix(self.name))}

    def commit(self, unit: str) -> CommitRecord:
        """The commit record of a unit."""
        path = layout.commit_path(self.name, unit)
        data = self.store.get(path)
        if data is None:
            raise LakeError(f"{self.store.uri}: unit {unit} of cache {self.name!r} is not committed")
        record = _parse(CommitRecord, data, f"{self.store.uri}/{path}")
        if record.spec_fingerprint != self.fingerprint:
            raise FingerprintMismatchError(
                f"{self.store.uri}/{path}: written for spec {record.spec_fingerprint}, expected {self.fingerprint}; "
                "the record belongs to another cache"
            )
        return record

    def commits(self) -> tuple[CommitRecord, ...]:
        """The commit records of all units, sorted by unit."""
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            return tuple(pool.map(self.commit, sorted(self.committed_units())))

    def quarantine(self, unit: str, reasons: Sequence[str]) -> QuarantineRecord:
        """Takes a damaged unit's commit record back: the unit is in the plan again, and a capture does it anew.

        Its shards stay where they are. Snapshots that name them go on saying so, loudly; where the new capture gives
        the same bytes, it heals them. Make a snapshot afterwards. Raises `LakeError` if the unit is not committed.
        """
        path = layout.commit_path(self.name, unit)
        data = self.store.get(path)
        if data is None:
            raise LakeError(f"{self.store.uri}: unit {unit} of cache {self.name!r} is not committed")
        record = QuarantineRecord(
            cache=self.name, unit=unit, reasons=tuple(reasons), commit=data.decode(errors="backslashreplace")
        )
        number = 1
        while not self.store.put_new(layout.quarantine_path(self.name, unit, number), record.to_bytes()):
            number += 1
        self.store.delete(path)
        return record

    def snapshot(self) -> Snapshot:
        """Pins all units committed now as the next snapshot; the newest one again when nothing came since."""
        while True:
            # In this order: what snapshot N names was committed before N was made, so a list made after N was seen
            # holds all of it, and no snapshot says less than the one before.
            newest = self.newest_snapshot_number()
            commits = self.commits()
            if newest:
                latest = self.open_snapshot(newest)
                if latest.commits == commits:
                    return latest
            snapshot = Snapshot(cache=self.name, number=newest + 1, spec_fingerprint=self.fingerprint, commits=commits)
            if self.store.put_new(layout.snapshot_path(self.name, snapshot.number), snapshot.to_bytes()):
                return snapshot

    def has_snapshot(self) -> bool:
        """Whether there is anything for a reader to pin."""
        return self.newest_snapshot_number() > 0

    def newest_snapshot_number(self) -> int:
        """The number of the newest snapshot; 0 before there is one."""
        names = self.store.names(layout.snapshots_prefix(self.name))
        return layout.snapshot_number(names[-1]) if names else 0

    def open_snapshot(self, number: int | None = None) -> Snapshot:
        """Snapshot `number`, or the newest. Raises `LakeError` when there is none."""
        wanted = self.newest_snapshot_number() if number is None else number
        path = layout.snapshot_path(self.name, wanted)
        data = self.store.get(path) if wanted > 0 else None
        if data is None:
            raise LakeError(
                f"{self.store.uri}: cache {self.name!r} has no snapshot {number or ''}".rstrip()
                + "; let the capture finish (run it again: it resumes), which makes one"
            )
        return _parse(Snapshot, data, f"{self.store.uri}/{path}")

    def open(self, entry: ShardEntry, *, verify: bool = True) -> Shard:
        """A committed shard, read as its rows are asked for; close it.

        With `verify` its length and the sha256 of all its bytes are compared with the record first; without, its
        length and its footer are, and the checksum of each page that is read. Raises `LakeCorruptError`,
        `LakeFormatError`, and `LakeError` where the store cannot read.
        """
        where = f"{self.store.uri}/{entry.path}"
        source = self.store.open(entry.path)
        if source is None:
            raise missing_error(where)
        try:
            check_committed(source, entry, where, whole=verify)
            return Shard(source, where)
        except OSError as error:
            source.close()
            raise read_error(where, error) from error
        except LakeError:
            source.close()
            raise

    def read(self, entry: ShardEntry, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a committed shard, its length and sha256 verified. Raises `LakeCorruptError`."""
        with closing(self.open(entry)) as shard:
            return shard.read(columns)

    def index(self, entry: ShardEntry) -> pa.Table:
        """See `Shard.index`."""
        with closing(self.open(entry, verify=False)) as shard:
            return shard.index()

    def _prepare(self, result: UnitResult) -> list[tuple[ShardEntry, bytes]]:
        """The unit's shards, in memory."""
        shards = []
        if len(result.samples):
            table = result.samples if isinstance(result.samples, pa.Table) else samples_to_table(result.samples)
            tokens = pc.sum(pc.list_value_length(table.column("response_ids"))).as_py()
            shards.append(self._shard("samples", table, tokens, result))
        if result.pairs:
            tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in result.pairs)
            shards.append(self._shard("pairs", pairs_to_table(result.pairs), tokens, result))
        if result.images:
            shards.append(self._shard("images", images_to_table(result.images), 0, result))
        return shards

    def _shard(self, kind: ShardKind, table: pa.Table, tokens: int, result: UnitResult) -> tuple[ShardEntry, bytes]:
        data = write_shard(
            table,
            kind,
            cache=self.name,
            unit=result.unit,
            spec_fingerprint=self.fingerprint,
            exact=isinstance(self.spec.codec, CodecPolicy) and self.spec.codec.grid == "exact",
            stored_error=result.stored_error if kind == "samples" else None,
        )
        digest = sha256_hex(data)
        name = layout.image_shard_path if kind == "images" else layout.shard_path
        path = name(self.name, result.unit, digest)
        footer = footer_of(data)
        entry = ShardEntry(
            kind=kind,
            path=path,
            sha256=digest,
            bytes=len(data),
            footer_sha256=sha256_hex(footer),
            footer_bytes=len(footer),
            rows=table.num_rows,
            tokens=tokens,
        )
        return entry, data

    def _put_shard(self, entry: ShardEntry, data: bytes) -> None:
        """Makes sure that the shard is in the store, whole and young: see `logitlake_shared.tools.gc`.

        Its name says what its bytes are. So a name that is taken holds these bytes, or bytes that were damaged, and
        writing them once more is right in both cases.
        """
        if not self.store.put_new(entry.path, data):
            self.store.overwrite(entry.path, data)

    def _check_budget(self, result: UnitResult) -> None:
        codec, error = self.spec.codec, result.stored_error
        if not isinstance(codec, CodecPolicy) or error is None or error.kl_mean is None:
            return
        if error.kl_mean > codec.max_mean_kl:
            raise LakeError(
                f"unit {result.unit}: storing it costs {error.kl_mean:.2e} nats a token, over the budget of "
                f"{codec.max_mean_kl:.2e}; set codec.grid=exact or raise codec.max_mean_kl"
            )


def _check_name(what: str, name: str) -> None:
    if not layout.valid_name(name):
        raise LakeError(
            f"{what} name {name!r}: expected at most 100 letters, digits and `._-`, the first a letter or digit"
        )


def spec_differences(old: CaptureSpec, new: CaptureSpec) -> list[str]:
    """One sentence for each field that differs, e.g. `engine.dtype: float32 there, bfloat16 here`."""
    there, here = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def _flat(document: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _parse(cls: type[AnyRecord], data: bytes, where: str) -> AnyRecord:
    try:
        document = json.loads(data)
        # Before its fields: a document of a later format may have others.
        if isinstance(document, dict) and "format_version" in cls.model_fields:
            check_format_version(str(document.get("format_version")), where)
        return cls.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(f"{problem['loc']}: {problem['msg']}" for problem in error.errors()[:3])
    except ValueError as error:  # not JSON, or not UTF-8
        problems = str(error)
    raise LakeFormatError(f"{where}: not a {cls.__name__} of format {FORMAT_VERSION}: {problems}")
