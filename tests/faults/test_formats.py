"""A11, E2: a document of another format version, or half of one, is refused by name, with both versions.

A document of the format that follows may hold keys that this release does not know: the version decides before the
keys do, so that the message is about the release to install and not about a key.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faults.conftest import Bench
from tests.faults.laws import findings

from logitlake_schemas import layout
from logitlake_shared import shards
from logitlake_shared.errors import LakeError, LakeFormatError
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset

DOCUMENTS = {
    "lake": layout.LAKE_MANIFEST,
    "spec": layout.spec_path("main"),
    "commit record": layout.commit_path("main", "000001-test"),
    "snapshot": layout.snapshot_path("main", 1),
}


@pytest.fixture
def root(bench: Bench) -> Path:
    """A finished capture's lake."""
    assert bench.run("capture").ended == "done"
    return bench.root


@pytest.mark.parametrize("version", [0, 2, 99])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_another_version_is_refused_by_both_numbers(root: Path, document: str, version: int) -> None:
    """Older and newer, with a key that only the other format has: file, its version, ours, what to do."""
    path = root / DOCUMENTS[document]
    _edit(path, format_version=version, a_key_of_another_format=1)
    with pytest.raises(LakeFormatError, match=f"format version {version}, this release reads 1; .*release") as refused:
        _use_everything(root)
    assert DOCUMENTS[document] in str(refused.value)


@pytest.mark.parametrize("version", [0, 2])
def test_a_shard_of_another_version_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """A shard is read alone by its footer: the writer of another format stamps it, this reader refuses it."""
    cache = Lake.create(bench.root).create_cache("main", bench.spec)
    with monkeypatch.context() as other_release:
        other_release.setattr(shards, "FORMAT_VERSION", version)
        (entry, _) = cache.publish_unit(bench.units[0]).shards
    with pytest.raises(LakeFormatError, match=f"format version {version}, this release reads 1") as refused:
        cache.read(entry)
    assert entry.path in str(refused.value)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("document", DOCUMENTS)
def test_half_a_document_is_refused_by_name(root: Path, document: str, kept: float) -> None:
    """A torn document is an error that names it; nothing is read of what it named."""
    path = root / DOCUMENTS[document]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(LakeError) as refused:
        _use_everything(root)
    assert DOCUMENTS[document] in str(refused.value)


@pytest.mark.parametrize("document", ["commit record", "snapshot"])
def test_verify_names_half_a_document(root: Path, document: str) -> None:
    """`verify` goes on behind it and says where it is."""
    path = root / DOCUMENTS[document]
    path.write_bytes(path.read_bytes()[:20])
    assert DOCUMENTS[document] in {finding.path for finding in findings(root)}


def test_older_snapshots_stay_readable_behind_a_torn_one(bench: Bench) -> None:
    """A reader that names its snapshot needs no other document of the kind."""
    assert bench.run("capture").ended == "done"
    cache = Lake.open(bench.root).cache("main")
    cache.quarantine("000002-test", ["a test"])
    assert cache.snapshot().number == 2
    (bench.root / layout.snapshot_path("main", 2)).write_bytes(b"{")
    with pytest.raises(LakeFormatError, match="snapshots/00000002"):
        LakeDataset(bench.root, "main")
    assert len(LakeDataset(bench.root, "main", snapshot=1)) == 4


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def _use_everything(root: Path) -> None:
    """Reads every kind of document."""
    cache = Lake.open(root).cache("main")
    for unit in cache.committed_units():
        cache.commit(unit)
    LakeDataset(root, "main")
