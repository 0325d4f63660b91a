"""Checks a lake against its own records, and returns what is damaged to the plan.

What is promised is checked in the order in which it can break. Of every file of every unit: it is there, and as long
as its record says. Of every unit that is checked in full: the sha256 of its bytes, the checksums of its pages, its
footer, the laws of its rows (`row_laws`), its images and the figures of its record. Of a cache: every snapshot names
the units' own commit records, or records that a quarantine took back; no id occurs twice. Of the lake: the published
catalog says what the records say.

Repair touches one thing, the commit record of a damaged unit: it is taken back, kept in a quarantine record, and the
next capture does the unit again.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from logitlake_schemas import COLUMNS, CommitRecord, QuarantineRecord, ShardEntry, Snapshot, layout, sha256_hex
from logitlake_shared.catalog import Catalog, Place
from logitlake_shared.errors import FingerprintMismatchError, LakeCorruptError, LakeError, LakeFormatError
from logitlake_shared.lake import Cache, Lake
from logitlake_shared.tools.row_laws import Broken, check_pairs, check_samples

__all__ = ["CacheCheck", "Finding", "chosen_units", "quarantine_damaged", "verify_catalog", "verify_unit"]

# Figures of a record are float64 sums over float32 rows, made in another order.
_FIGURE_TOLERANCE = 1e-4
_MAX_REASONS = 20
# Commit records are small: what reading many of them costs is waiting.
_CONNECTIONS = 16
# The errors that say something about the bytes, and not about the way to them.
_DAMAGE = (LakeCorruptError, LakeFormatError, FingerprintMismatchError)
# Shards of which one sample each is looked up in the catalog.
_LOOKED_UP = 32


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. `unit` is empty where it is about the whole cache or lake."""

    cache: str
    unit: str
    path: str
    problem: str
    damaged: bool = True
    """False where the store could not read: that says nothing about the bytes, and nothing is taken back for it"""

    def __str__(self) -> str:
        return f"{self.path or self.unit or self.cache or 'lake'}: {self.problem}"


class CacheCheck:
    """The check of one cache: `records()`, then `unit(...)` for each of `units`, then `ids()`.

    Reads the commit records and snapshots once, and lists the cache's files once.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._sizes = {
            entry.name: entry.bytes
            for prefix in layout.shard_prefixes(cache.name)
            for entry in cache.store.entries(prefix)
        }
        self._commits: dict[str, CommitRecord] = {}
        self._unreadable: list[Finding] = []
        self._foreign = 0
        units = sorted(cache.committed_units())
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            records = list(pool.map(self._commit, units))
        for unit, record in zip(units, records, strict=True):
            if isinstance(record, CommitRecord):
                self._commits[unit] = record
            else:
                self._foreign += isinstance(record, FingerprintMismatchError)
                path = layout.commit_path(cache.name, unit)
                damaged = isinstance(record, _DAMAGE)
                self._unreadable.append(Finding(cache.name, unit, path, _said(cache, path, record), damaged))
        self._ids: list[tuple[str, npt.NDArray[np.uint64]]] = []

    @property
    def units(self) -> list[str]:
        """The committed units whose record can be read, sorted."""
        return sorted(self._commits)

    def size(self, unit: str) -> int:
        """Bytes of a unit."""
        return sum(entry.bytes for entry in self._commits[unit].shards)

    def records(self) -> Iterator[Finding]:
        """Commit records and snapshots: each can be read, and they agree."""
        if self._foreign and not self._commits:
            # One changed file, not a thousand damaged units: nothing that taking records back would heal.
            yield self._finding(
                "",
                layout.spec_path(self.cache.name),
                f"has fingerprint {self.cache.fingerprint}, and all {self._foreign} commit records were written for "
                "another; restore spec.json, or use the release that wrote the cache",
            )
            return
        yield from self._unreadable
        for unit, record in self._commits.items():
            if record.unit != unit or record.cache != self.cache.name:
                path = layout.commit_path(self.cache.name, unit)
                yield self._finding(unit, path, f"is the record of unit {record.unit} of cache {record.cache}")
        yield from self._snapshots()

    def unit(self, unit: str, *, full: bool) -> Iterator[Finding]:
        """One unit: the lengths of its files, and with `full` everything in them."""
        record = self._commits[unit]
        whole = True
        for entry in record.shards:
            there = self._sizes.get(entry.path)
            if there != entry.bytes:
                whole = False
                problem = "committed but missing" if there is None else f"{there} bytes, the record says {entry.bytes}"
                yield self._finding(unit, entry.path, problem)
        if full and whole:
            check = _UnitCheck(self.cache, record)
            yield from check.findings()
            self._ids.append((unit, check.ids))

    def ids(self) -> Iterator[Finding]:
        """No sample or pair occurs twice among the units that were checked in full."""
        if not self._ids:
            return
        hashes = np.concatenate([ids for _, ids in self._ids])
        owners = np.repeat(np.arange(len(self._ids)), [len(ids) for _, ids in self._ids])
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        for first, second in sorted({(int(owners[order[at]]), int(owners[order[at + 1]])) for at in same}):
            unit, other = self._ids[second][0], self._ids[first][0]
            where = "in it" if unit == other else f"in unit {other} too"
            yield self._finding(unit, "", f"an id occurs twice: once here and once {where}")

    def _commit(self, unit: str) -> CommitRecord | LakeError:
        try:
            return self.cache.commit(unit)
        except LakeError as error:
            return error

    def _snapshots(self) -> Iterator[Finding]:
        numbers = []
        removed = self._quarantined()
        for path in self.cache.store.names(layout.snapshots_prefix(self.cache.name)):
            try:
                number = layout.snapshot_number(path)
                snapshot = self.cache.open_snapshot(number)
            except (LakeError, ValueError) as error:
                yield self._finding("", path, _said(self.cache, path, error))
                continue
            numbers.append(number)
            yield from self._snapshot(path, snapshot, removed)
        missing = sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers))
        if missing:
            yield self._finding("", "", f"snapshots {missing} are missing below snapshot {max(numbers)}")

    def _snapshot(self, path: str, snapshot: Snapshot, removed: dict[str, list[bytes]]) -> Iterator[Finding]:
        if snapshot.cache != self.cache.name or snapshot.spec_fingerprint != self.cache.fingerprint:
            yield self._finding(
                "", path, f"is a snapshot of cache {snapshot.cache} with spec {snapshot.spec_fingerprint[:16]}"
            )
        for record in snapshot.commits:
            if record != self._commits.get(record.unit) and record.to_bytes() not in removed.get(record.unit, []):
                there = "another commit record" if record.unit in self._commits else "no commit record"
                yield self._finding(
                    "", path, f"names unit {record.unit}, which has {there}, and no quarantine says why"
                )

    def _quarantined(self) -> dict[str, list[bytes]]:
        """The commit records that were taken back, by unit."""
        removed: dict[str, list[bytes]] = {}
        for path in self.cache.store.names(layout.quarantine_prefix(self.cache.name)):
            try:
                record = QuarantineRecord.model_validate_json(self.cache.store.get(path) or b"")
            except ValidationError:  # what it would have explained is reported at the snapshot
                continue
            removed.setdefault(record.unit, []).append(record.commit.encode())
        return removed

    def _finding(self, unit: str, path: str, problem: str) -> Finding:
        return Finding(self.cache.name, unit, path, problem)


def chosen_units(units: Sequence[str], share: float, seed: int) -> set[str]:
    """A seeded share of the units, at least one; the same for the same units and seed."""
    ranked = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}:{unit}".encode()).digest())
    return set(ranked[: math.ceil(share * len(ranked))])


def verify_unit(cache: Cache, record: CommitRecord) -> list[Finding]:
    """Everything about one committed unit; nothing when it is sound."""
    return list(_UnitCheck(cache, record).findings())


def quarantine_damaged(lake: Lake, findings: Iterable[Finding]) -> dict[str, list[str]]:
    """Takes the commit records of damaged units back and makes a new snapshot of each cache concerned.

    Returns the units of each cache that are in the plan again. Findings about no unit, or about a store that could not
    read, stay.
    """
    reasons: dict[str, dict[str, list[str]]] = {}
    for finding in findings:
        if finding.unit and finding.damaged:
            reasons.setdefault(finding.cache, {}).setdefault(finding.unit, []).append(str(finding))
    returned = {}
    for name, units in reasons.items():
        cache = lake.cache(name)
        for unit, why in sorted(units.items()):
            cache.quarantine(unit, why[:_MAX_REASONS])
        cache.snapshot()
        returned[name] = sorted(units)
    return returned


class _UnitCheck:
    """Everything about the content of one unit."""

    def __init__(self, cache: Cache, record: CommitRecord) -> None:
        self._cache, self._record = cache, record
        self.ids: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        """64 bits of the hash of each row's id"""
        self._stored_images: set[str] = set()
        self._named_images: set[str] = set()

    def findings(self) -> Iterator[Finding]:
        for entry in self._record.shards:
            try:
                opened = self._cache.open(entry)
                try:
                    table, footer = opened.read(), opened.footer
                finally:
                    opened.close()
            except LakeError as error:
                yield self._finding(entry.path, _said(self._cache, entry.path, error), isinstance(error, _DAMAGE))
                continue
            for problem in self._shard(entry, table, footer):
                yield self._finding(entry.path, problem)
        for sha256 in sorted(self._named_images - self._stored_images):
            yield self._finding("", f"image {sha256} is named by a row and stored nowhere in its unit")

    def _shard(self, entry: ShardEntry, table: pa.Table, footer: dict[str, str]) -> Iterator[str]:
        expected = {
            "kind": entry.kind,
            "cache": self._cache.name,
            "unit": self._record.unit,
            "spec_fingerprint": self._cache.fingerprint,
        }
        for key, value in expected.items():
            if footer.get(key) != value:
                yield f"its footer says {key} {footer.get(key)}, the record {value}"
        if table.num_rows != entry.rows:
            yield f"{table.num_rows} rows, the record says {entry.rows}"
        for column in COLUMNS[entry.kind]:
            nulls = table.column(column.name).null_count
            if nulls and not column.nullable:
                yield f"column {column.name} holds {nulls} nulls"
                return
        if entry.kind == "images":
            yield from self._images(table)
        elif entry.kind == "samples":
            yield from self._rows(table, entry, "sample_id", check_samples(table, self._cache.spec))
        else:
            yield from self._rows(table, entry, "pair_id", check_pairs(table, self._cache.spec))

    def _rows(self, table: pa.Table, entry: ShardEntry, id_column: str, broken: list[Broken]) -> Iterator[str]:
        ids = table.column(id_column).to_pylist()
        hashes = b"".join(hashlib.blake2b(row_id.encode(), digest_size=8).digest() for row_id in ids)
        self.ids = np.concatenate([self.ids, np.frombuffer(hashes, np.uint64)])
        self._named_images |= set(pc.unique(pc.list_flatten(table.column("image_sha256"))).to_pylist())
        for one in broken:
            token, more = int(one.tokens[0]), len(one.rows) - 1
            place = f"{ids[one.rows[0]]}: " + (f"token {token}: " if token >= 0 else "")
            yield place + one.says + (f" ({more:,} more like it)" if more else "")
        lists = ("response_ids",) if entry.kind == "samples" else ("chosen_ids", "rejected_ids")
        tokens = sum(int(pc.sum(pc.list_value_length(table.column(name))).as_py() or 0) for name in lists)
        if tokens != entry.tokens:
            yield f"{tokens} response tokens, the record says {entry.tokens}"
        if entry.kind == "samples" and not broken:
            yield from self._figures(table)

    def _figures(self, table: pa.Table) -> Iterator[str]:
        """What the writer measured, as far as the rows tell."""
        error = self._record.stored_error
        if error is None:
            yield "the record has no figures of what storing cost"
            return
        k = pc.list_flatten(table.column("k")).to_numpy()
        log_tail = pc.list_flatten(table.column("log_tail_mass")).to_numpy()
        found = {"mean_k": float(k.mean()), "mean_stored_mass": float(1 - np.exp(log_tail.astype(np.float64)).mean())}
        for name, value in found.items():
            said = float(getattr(error, name))
            if abs(value - said) > _FIGURE_TOLERANCE * max(abs(said), 1):
                yield f"{name} is {value:.6g}, the record says {said:.6g}"

    def _images(self, table: pa.Table) -> Iterator[str]:
        for name, data in zip(table.column("image_sha256").to_pylist(), table.column("data"), strict=True):
            self._stored_images.add(name)
            if sha256_hex(data.as_py()) != name:
                yield f"image {name}: its bytes have another sha256"

    def _finding(self, path: str, problem: str, damaged: bool = True) -> Finding:
        return Finding(self._cache.name, self._record.unit, path, problem, damaged)


def _said(cache: Cache, path: str, error: Exception) -> str:
    """The message without the name that stands before it anyway."""
    return str(error).removeprefix(f"{cache.store.uri}/{path}: ")


def verify_catalog(lake: Lake, seed: int = 0) -> Iterator[Finding]:
    """The published catalog, with what it adds to it when it is opened, says what snapshots and shards say.

    All files are compared, and of the samples a seeded few are looked up as a user would. Give it a lake whose units
    are sound: shards that came after the catalog was published are read.
    """
    caches = [cache for name in lake.cache_names() if (cache := lake.cache(name)).has_snapshot()]
    if not caches:
        return
    try:
        with Catalog(lake) as catalog:
            for cache in caches:
                for problem in _catalog_problems(catalog, cache, seed):
                    yield Finding(cache.name, "", layout.catalog_prefix(), f"{problem}; run `logitlake rebuild`")
    except LakeError as error:
        yield Finding("", "", layout.catalog_prefix(), str(error))


def _catalog_problems(catalog: Catalog, cache: Cache, seed: int) -> Iterator[str]:
    snapshot = cache.open_snapshot()
    entries = {entry.path: entry for commit in snapshot.commits for entry in commit.shards}
    named = _by_path(catalog, cache, "path, sha256, bytes, rows, tokens", "shards")
    for path in sorted(entries.keys() | named.keys()):
        entry = entries.get(path)
        wanted = None if entry is None else (entry.sha256, entry.bytes, entry.rows, entry.tokens)
        if wanted != named.get(path):
            yield f"says {named.get(path)} of {path}, the snapshot {wanted}"
    rows = [entry for entry in entries.values() if entry.kind == cache.spec.kind]
    indexed = _by_path(catalog, cache, "path, count(*)", "sample_index")
    for entry in rows:
        if indexed.get(entry.path) != (entry.rows,):
            yield f"indexes {indexed.get(entry.path, (0,))[0]} rows of {entry.path}, there are {entry.rows}"
            return
    generator = np.random.default_rng(seed)
    for number in generator.choice(len(rows), min(len(rows), _LOOKED_UP), replace=False) if rows else ():
        entry = rows[int(number)]
        record = cache.index(entry).slice(int(generator.integers(entry.rows)), 1).to_pylist()[0]
        place = Place(cache.name, entry, record["group"], record["row"])
        if catalog.find(record["id"], cache.name) != [place]:
            yield f"does not find {record['id']} in row {record['row']} of {entry.path}"


def _by_path(catalog: Catalog, cache: Cache, columns: str, view: str) -> dict[str, tuple[object, ...]]:
    name = cache.name.replace("'", "''")
    answer = catalog.query(f"SELECT {columns} FROM {view} WHERE cache = '{name}' GROUP BY ALL")
    return {path: tuple(rest) for path, *rest in zip(*(column.to_pylist() for column in answer.columns), strict=True)}
