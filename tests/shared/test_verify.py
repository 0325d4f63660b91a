"""`logitlake verify`: whatever breaks a promise of the lake is found, nothing else is, and repair heals it."""

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitlake_schemas import (
    PAIR_COLUMNS,
    SAMPLE_COLUMNS,
    CaptureSpec,
    CodecPolicy,
    SampledPolicy,
    arrow_schema,
    layout,
)
from logitlake_shared.catalog import rebuild_catalog
from logitlake_shared.cli import cli
from logitlake_shared.errors import LakeCorruptError, LakeError
from logitlake_shared.lake import Cache, Lake, UnitResult
from logitlake_shared.rows import pairs_to_table, samples_to_table
from logitlake_shared.tools.row_laws import check_pairs, check_samples
from logitlake_shared.tools.verify import (
    CacheCheck,
    Finding,
    chosen_units,
    quarantine_damaged,
    verify_catalog,
    verify_unit,
)
from logitlake_shared.topk import GRID_MAX_STEP, GRID_STEP, MASS_TOLERANCE, nearest_level

MakeUnit = Callable[..., UnitResult]
EOS_ID = 1
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_sound_lake_has_no_finding(small_lake: Path) -> None:
    """Samples, pairs, images, records, snapshots and catalog."""
    result = _verify(small_lake)
    assert result.exit_code == 0
    assert "5 units verified, no problem found" in result.stdout
    rebuild_catalog(Lake.open(small_lake))
    assert "no problem found" in _verify(small_lake).stdout


# What is changed in one sample, and the law that it breaks.
BREAKS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "lengths: a logprob is missing": ("lengths", lambda row: row["label_logprob"].pop()),
    "lengths: a stored entry too much": ("lengths", lambda row: row["topk_ids"].append(3)),
    "lengths: k is one off": ("lengths", lambda row: _add(row, "k", 0, 1)),
    "lengths: segments": ("lengths", lambda row: _add(row, "prompt_lengths", 0, 1)),
    "lengths: an empty turn": ("lengths", lambda row: row["response_lengths"].append(0)),
    "eos": ("eos", lambda row: _set(row, "response_ids", 3, 5)),
    "response id below 0": ("vocabulary", lambda row: _set(row, "response_ids", 1, -1)),
    "response id above the vocabulary": ("vocabulary", lambda row: _set(row, "response_ids", 1, 40)),
    "entry above the vocabulary": ("vocabulary", lambda row: _set(row, "topk_ids", 4, 40)),
    "entry far above the vocabulary": ("vocabulary", lambda row: _set(row, "topk_ids", 4, 2**31 - 1)),
    "NaN entry": ("finite", lambda row: _set(row, "topk_logprobs", 2, math.nan)),
    "infinite entry": ("finite", lambda row: _set(row, "topk_logprobs", 2, -math.inf)),
    "probability above 1": ("finite", lambda row: _set(row, "topk_logprobs", 0, 0.5)),
    "NaN label": ("finite", lambda row: _set(row, "label_logprob", 2, math.nan)),
    "NaN tail": ("finite", lambda row: _set(row, "log_tail_mass", 2, math.nan)),
    "negative entropy": ("entropy", lambda row: _set(row, "entropy", 0, -0.1)),
    "infinite entropy": ("entropy", lambda row: _set(row, "entropy", 0, math.inf)),
    "an id twice": ("unique", lambda row: _set(row, "topk_ids", 1, row["topk_ids"][0])),
    "order": ("order", lambda row: _set(row, "topk_logprobs", 1, 0.0)),
    "mass": ("mass", lambda row: _set(row, "log_tail_mass", 1, -0.01)),
    "rank below 1": ("label", lambda row: _set(row, "label_rank", 0, 0)),
    "rank of another entry": ("label", lambda row: _set(row, "label_rank", 0, 1 + row["label_rank"][0] % 2)),
    "label logprob": ("label", lambda row: _add(row, "label_logprob", _first_inside(row), -1.0)),
    "label among the entries": ("label", lambda row: _set(row, "label_rank", _first_inside(row), 39)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_law_is_checked_where_it_breaks(capture_spec: CaptureSpec, make_unit: MakeUnit, name: str) -> None:
    """One value of one row is changed: its law is reported for that row, and all others stay silent."""
    law, change = BREAKS[name]
    codec = CodecPolicy(k_max=8, k_min=8)
    spec = capture_spec.model_copy(update={"codec": codec})
    rows = samples_to_table(make_unit(1, codec=codec, num_samples=5).samples).to_pylist()
    assert check_samples(_table(rows), spec) == []
    change(rows[2])
    broken = check_samples(_table(rows), spec)
    assert law in {one.law for one in broken}
    assert {row for one in broken for row in one.rows.tolist()} == {2}


@pytest.mark.parametrize("k_max", [3, 8])
def test_k_is_held_to_the_spec(capture_spec: CaptureSpec, make_unit: MakeUnit, k_max: int) -> None:
    """More entries than the codec captures, or fewer than it keeps, come from another codec."""
    table = samples_to_table(make_unit(1, codec=CodecPolicy(k_max=5, k_min=5)).samples)
    codec = CodecPolicy(k_max=k_max, k_min=3 if k_max == 3 else 6)
    broken = check_samples(table, capture_spec.model_copy(update={"codec": codec}))
    assert {one.law for one in broken} == {"k"}
    assert sum(len(one.rows) for one in broken) == 8


def test_draws_have_their_own_bounds(capture_spec: CaptureSpec, make_unit: MakeUnit) -> None:
    """Counts of draws need no rank among the entries, only as many ids as there are draws."""
    policy = SampledPolicy(type="sampled", draws=8)
    spec = capture_spec.model_copy(update={"codec": policy})
    rows = samples_to_table(make_unit(1, codec=CodecPolicy(k_max=8, k_min=8, grid="exact")).samples).to_pylist()
    _set(rows[0], "label_rank", _first_inside(rows[0]), 39)
    assert check_samples(_table(rows), spec) == []
    tight = capture_spec.model_copy(update={"codec": policy.model_copy(update={"draws": 7})})
    assert {one.law for one in check_samples(_table(rows), tight)} == {"k"}


@stateless
@given(data=st.data(), grid=st.sampled_from(["exact", "companded256"]), num_changes=st.integers(0, 3))
def test_all_tokens_at_once_find_what_one_at_a_time_finds(
    capture_spec: CaptureSpec, make_unit: MakeUnit, data: st.DataObject, grid: str, num_changes: int
) -> None:
    """The slow twin below walks over rows and tokens; both report the same laws at the same places."""
    codec = CodecPolicy(k_max=8, k_min=2, grid=grid)  # type: ignore[arg-type]
    spec = capture_spec.model_copy(update={"codec": codec})
    rows = samples_to_table(make_unit(data.draw(st.integers(1, 50)), codec=codec, num_samples=3).samples).to_pylist()
    for _ in range(num_changes):
        _, change = BREAKS[data.draw(st.sampled_from(sorted(BREAKS)))]
        try:
            change(rows[data.draw(st.integers(0, 2))])
        except (IndexError, StopIteration):  # a row that was shortened before has no such place
            continue
    table = _table(rows)
    fast = {
        (one.law, int(row), int(token))
        for one in check_samples(table, spec)
        for row, token in zip(one.rows, one.tokens, strict=True)
    }
    assert fast == set(_slow_laws(table.to_pylist(), spec))


@pytest.mark.parametrize(
    ("law", "column", "place", "value"),
    [
        ("eos", "chosen_ids", 1, 5),
        ("vocabulary", "rejected_ids", 0, 40),
        ("finite", "chosen_logprobs", 0, 0.1),
        ("finite", "rejected_logprobs", 1, math.nan),
        ("lengths", "rejected_ids", None, None),
    ],
)
def test_laws_of_pairs(
    capture_spec: CaptureSpec,
    make_pair_unit: Callable[[int], UnitResult],
    law: str,
    column: str,
    place: int | None,
    value: float,
) -> None:
    """Both sides are as long as their logprobs, end with EOS, and have probabilities."""
    rows = pairs_to_table([*make_pair_unit(1).pairs, *make_pair_unit(2).pairs]).to_pylist()
    assert check_pairs(pa.Table.from_pylist(rows, arrow_schema(PAIR_COLUMNS)), capture_spec) == []
    if place is None:
        rows[1][column].insert(0, 3)
    else:
        _set(rows[1], column, place, value)
    (broken,) = check_pairs(pa.Table.from_pylist(rows, arrow_schema(PAIR_COLUMNS)), capture_spec)
    assert (broken.law, broken.rows.tolist()) == (law, [1])


def test_bytes_that_changed_are_found_by_file(small_lake: Path) -> None:
    """A flipped bit, a cut file, a missing file: each is named with its path, and only its unit is damaged."""
    shards = sorted(small_lake.glob("caches/main/shards/*.parquet"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    (small_lake / "caches/main/images" / shards[2].name).unlink(missing_ok=True)
    next(iter(sorted(small_lake.glob("caches/main/images/000003*")))).unlink()
    found = _findings(Lake.open(small_lake).cache("main"))
    assert [(finding.unit, finding.problem.split(":")[0]) for finding in found][1:] == [
        ("000002-test", f"{len(shards[1].read_bytes())} bytes, the record says {len(shards[1].read_bytes()) + 1}"),
        ("000003-test", "committed but missing"),
    ]
    assert "sha256" in found[0].problem


def test_a_share_checks_every_length_and_some_contents(small_lake: Path) -> None:
    """A bit flip is seen when its unit is drawn; a file of another length always."""
    (first, second, third) = sorted(small_lake.glob("caches/main/shards/*.parquet"))
    data = bytearray(second.read_bytes())
    data[100] ^= 1
    second.write_bytes(data)
    options = ("--cache", "main", "--sample", "30%", "--seed")
    seen = {_verify(small_lake, *options, str(seed)).exit_code for seed in range(8)}
    assert seen == {0, 1}  # CliRunner gives 1 for an exception
    third.write_bytes(third.read_bytes() + b"x")
    for seed in range(4):
        result = _verify(small_lake, *options, str(seed))
        assert third.name in result.output
    assert first.exists()


def test_the_share_is_seeded_and_of_its_size() -> None:
    """The same seed gives the same units; at least one; all of them at 100 %."""
    units = [f"{number:06d}" for number in range(1000)]
    assert chosen_units(units, 0.01, 0) == chosen_units(units[::-1], 0.01, 0)
    assert len(chosen_units(units, 0.01, 0)) == 10
    assert chosen_units(units, 0.01, 0) != chosen_units(units, 0.01, 1)
    assert len(chosen_units(units, 1e-9, 0)) == 1
    assert chosen_units(units, 1.0, 0) == set(units)


@pytest.mark.parametrize("share", ["0", "0%", "101%", "2", "many"])
def test_a_wrong_share_is_refused(small_lake: Path, share: str) -> None:
    """With an example of a right one."""
    result = _verify(small_lake, "--sample", share)
    assert result.exit_code == 2
    assert "such as 1% or 0.01" in result.output


def test_rows_that_lie_in_sound_bytes_are_found(tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit) -> None:
    """EOS missing, an image nobody stored, a figure of the record that the rows do not give, one id twice."""
    cache = Lake.create(tmp_path / "lake").create_cache("main", capture_spec)
    unit = make_unit(1)
    first, second = unit.samples
    no_eos = replace(first, response_ids=np.array([7, 8, 9, 10], np.int32))
    cache.publish_unit(replace(unit, unit="a", samples=[no_eos, second], images=[]))
    assert unit.stored_error is not None
    boast = unit.stored_error.model_copy(update={"mean_k": 7.5})
    cache.publish_unit(replace(unit, unit="b", stored_error=boast))
    cache.snapshot()
    problems = [f"{finding.unit} {finding.problem}" for finding in _findings(cache)]
    for said in (
        "a sample-0010: token 3: a response does not end with EOS",
        f"a image {unit.images[0].image_sha256} is named by a row and stored nowhere in its unit",
        "the record says 7.5",
        "b an id occurs twice: once here and once in unit a too",
    ):
        assert any(said in problem for problem in problems), (said, problems)


def test_a_shard_of_another_cache_is_found_by_its_footer(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """Right bytes under a right record in the wrong cache."""
    lake = Lake.create(tmp_path / "lake")
    a, b = (lake.create_cache(name, capture_spec) for name in "ab")
    record = a.publish_unit(make_unit(1))
    moved = record.model_copy(
        update={
            "cache": "b",
            "shards": tuple(
                entry.model_copy(update={"path": entry.path.replace("caches/a/", "caches/b/")})
                for entry in record.shards
            ),
        }
    )
    for entry in record.shards:
        data = lake.store.get(entry.path)
        assert data is not None
        lake.store.put_new(entry.path.replace("caches/a/", "caches/b/"), data)
    assert any("its footer says cache a, the record b" in finding.problem for finding in verify_unit(b, moved))
    assert verify_unit(a, record) == []


def test_snapshots_and_records_must_agree(small_lake: Path) -> None:
    """A record that was removed, changed, or put under another name is reported where a snapshot names it."""
    lake = Lake.open(small_lake)
    commits = sorted(small_lake.glob("caches/main/commits/*.json"))
    good = commits[0].read_bytes()
    commits[0].unlink()
    (found,) = _findings(lake.cache("main"))
    assert "names unit 000001-test, which has no commit record, and no quarantine says why" in found.problem
    document = json.loads(good)
    document["errors"] = [{"sample_id": "x", "code": "c", "message": "m"}]
    commits[0].write_bytes(json.dumps(document).encode())
    (found,) = _findings(lake.cache("main"))
    assert "which has another commit record" in found.problem
    commits[0].write_bytes(commits[1].read_bytes())
    problems = [finding.problem for finding in _findings(lake.cache("main"))]
    assert "is the record of unit 000002-test of cache main" in problems
    commits[0].write_bytes(good)
    assert _findings(lake.cache("main")) == []


def test_a_missing_or_unreadable_snapshot_is_found(small_lake: Path, make_unit: MakeUnit) -> None:
    """A gap below the newest, and half a document."""
    cache = Lake.open(small_lake).cache("main")
    for number in (4, 5):
        cache.publish_unit(make_unit(number))
        cache.snapshot()
    assert _findings(cache) == []
    (small_lake / layout.snapshot_path("main", 1)).unlink()
    (small_lake / layout.snapshot_path("main", 2)).write_bytes(b'{"cache": "ma')
    problems = [finding.problem for finding in _findings(cache)]
    assert "snapshots [1, 2] are missing below snapshot 3" in problems
    assert any("not a Snapshot" in problem for problem in problems)


def test_a_changed_spec_is_one_finding_and_costs_no_unit(small_lake: Path) -> None:
    """A spec that none of the records was written for is one damaged file: repair takes nothing back."""
    path = small_lake / layout.spec_path("main")
    document = json.loads(path.read_bytes())
    document["engine"]["dtype"] = "bfloat16"
    path.write_bytes(json.dumps(document).encode())
    result = _verify(small_lake, "--cache", "main", "--repair", "--yes")
    assert isinstance(result.exception, LakeError)
    assert "all 3 commit records were written for another; restore spec.json" in result.output
    assert len(list(small_lake.glob("caches/main/commits/*.json"))) == 3


def test_a_catalog_that_says_otherwise_is_found(
    small_lake: Path, tmp_path: Path, capture_spec: CaptureSpec, make_unit: MakeUnit
) -> None:
    """A damaged catalog is reported with the command that makes it anew, and made anew it is sound."""
    lake = Lake.open(small_lake)
    rebuild_catalog(lake)
    assert list(verify_catalog(lake)) == []
    (catalog,) = small_lake.glob("catalog/*.duckdb")
    catalog.write_bytes(catalog.read_bytes()[:4096] + bytes(4096))
    (found, *_) = verify_catalog(lake)
    assert "logitlake rebuild" in found.problem
    catalog.unlink()
    rebuild_catalog(lake)
    assert list(verify_catalog(lake)) == []


def test_repair_returns_damaged_units_and_the_next_capture_heals(small_lake: Path, make_unit: MakeUnit) -> None:
    """Only the damaged unit leaves the newest snapshot; its record is kept; captured again, the lake is sound."""
    (shard, *_) = sorted(small_lake.glob("caches/main/shards/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    before = (small_lake / layout.commit_path("main", "000001-test")).read_text()
    result = _verify(small_lake, "--repair")
    assert result.exit_code == 0, result.output
    assert "1 unit back in the plan" in result.stdout
    assert "next: run the capture again" in result.stdout
    cache = Lake.open(small_lake).cache("main")
    assert [commit.unit for commit in cache.open_snapshot().commits] == ["000002-test", "000003-test"]
    quarantined = json.loads((small_lake / layout.quarantine_path("main", "000001-test", 1)).read_text())
    assert quarantined["commit"] == before
    assert _findings(cache) == []
    assert "no problem found" in _verify(small_lake).stdout
    cache.publish_unit(make_unit(1))
    cache.snapshot()
    assert len(cache.open_snapshot().commits) == 3
    assert "no problem found" in _verify(small_lake).stdout


def test_repair_asks_on_a_terminal(small_lake: Path) -> None:
    """No is no; --yes needs no question."""
    (shard, *_) = sorted(small_lake.glob("caches/main/shards/*.parquet"))
    shard.write_bytes(b"")
    asked = _on_terminal(["verify", str(small_lake), "--repair"], answer=b"n\n")
    assert "take back the commit records of 1 unit?" in asked
    assert len(list(small_lake.glob("caches/main/commits/*.json"))) == 3
    _on_terminal(["verify", str(small_lake), "--repair", "--yes"], answer=b"")
    assert len(list(small_lake.glob("caches/main/commits/*.json"))) == 2


def test_what_the_store_cannot_read_is_not_taken_back(small_lake: Path) -> None:
    """A failed read says nothing about the bytes: it is reported, and repair leaves the unit."""
    found = [Finding("main", "000001-test", "x", "reading x failed: EIO", damaged=False)]
    assert quarantine_damaged(Lake.open(small_lake), found) == {}
    assert len(list(small_lake.glob("caches/main/commits/*.json"))) == 3


def test_it_exits_with_2(small_lake: Path) -> None:
    """As a script needs it."""
    next(small_lake.glob("caches/main/shards/*.parquet")).unlink()
    command = [sys.executable, "-c", "from logitlake_shared.cli import main; main()", "verify", str(small_lake)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "committed but missing" in done.stderr
    assert "`--repair` returns those units to the plan" in done.stderr
    with pytest.raises(LakeCorruptError):
        _verify(small_lake, catch=False)


def _slow_laws(rows: list[dict[str, Any]], spec: CaptureSpec) -> Iterator[tuple[str, int, int]]:
    """Every broken law, one token at a time: (law, row, token)."""
    codec = spec.codec
    assert isinstance(codec, CodecPolicy)
    vocab_size = spec.tokenizer.vocab_size
    for number, row in enumerate(rows):
        labels = row["response_ids"]
        per_token = ("k", "label_logprob", "label_rank", "log_tail_mass", "entropy")
        if (
            sum(row["prompt_lengths"]) != len(row["prompt_ids"])
            or sum(row["response_lengths"]) != len(labels)
            or min(row["response_lengths"]) < 1
            or any(len(row[name]) != len(labels) for name in per_token)
            or not sum(row["k"]) == len(row["topk_ids"]) == len(row["topk_logprobs"])
        ):
            yield "lengths", number, -1
            continue
        end = -1
        for length in row["response_lengths"]:
            end += length
            if labels[end] != spec.tokenizer.eos_id:
                yield "eos", number, end
        start = 0
        for token, label in enumerate(labels):
            stop = start + row["k"][token]
            entries = list(zip(row["topk_ids"][start:stop], row["topk_logprobs"][start:stop], strict=True))
            start = stop
            figures = [row[name][token] for name in ("label_logprob", "label_rank", "log_tail_mass", "entropy")]
            for law in _slow_token(entries, label, figures, codec, vocab_size):
                yield law, number, token


def _slow_token(
    entries: list[tuple[int, float]], label: int, figures: list[Any], codec: CodecPolicy, vocab_size: int
) -> Iterator[str]:
    own, rank, log_tail, entropy = figures
    ids = [id_ for id_, _ in entries]
    if not 0 <= label < vocab_size or any(not 0 <= id_ < vocab_size for id_ in ids):
        yield "vocabulary"
    finite = all(math.isfinite(logprob) and logprob <= 1e-3 for _, logprob in entries)
    if not finite or not math.isfinite(own) or own > 1e-3 or math.isnan(log_tail) or log_tail > 1e-3:
        yield "finite"
    if not math.isfinite(entropy) or entropy < 0:
        yield "entropy"
    if not codec.k_min <= len(entries) <= codec.k_max:
        yield "k"
    if any(after > before for (_, before), (_, after) in pairwise(entries)):
        yield "order"
    if len(set(ids)) < len(ids):
        yield "unique"
    tolerance, mass = MASS_TOLERANCE, math.exp(log_tail)
    for _, logprob in entries:
        mass += math.exp(logprob)
        tolerance += math.exp(logprob) * _step(logprob) / 2 if codec.grid != "exact" else 0
    if codec.grid != "exact" and math.isfinite(log_tail):
        tolerance += math.exp(log_tail) * abs(log_tail) * 2**-10
    if abs(mass - 1) > tolerance:
        yield "mass"
    if rank < 1 or (rank > len(entries) and label in ids):
        yield "label"
    elif rank <= len(entries):
        id_, stored = entries[rank - 1]
        allowed = 1e-3 + abs(own) * 2**-10
        if codec.grid != "exact":
            allowed += _step(stored)
            own = max(own, float(nearest_level(np.array([-np.inf], np.float32))[0]))
        if id_ != label or abs(stored - own) > allowed:
            yield "label"


def _step(logprob: float) -> float:
    return min(GRID_MAX_STEP, 1.1 * GRID_STEP * math.exp(-logprob / 2)) if not math.isnan(logprob) else math.nan


def _set(row: dict[str, Any], column: str, place: int, value: float) -> None:
    row[column][place] = value


def _add(row: dict[str, Any], column: str, place: int, value: float) -> None:
    row[column][place] += value


def _first_inside(row: dict[str, Any]) -> int:
    """The first token whose label is one of its entries."""
    return next(t for t, (rank, k) in enumerate(zip(row["label_rank"], row["k"], strict=True)) if rank <= k)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, arrow_schema(SAMPLE_COLUMNS))


def _findings(cache: Cache) -> list[Finding]:
    check = CacheCheck(cache)
    found = list(check.records())
    for unit in check.units:
        found += check.unit(unit, full=True)
    return [*found, *check.ids()]


def _verify(lake: Path, *options: str, catch: bool = True) -> Result:
    return CliRunner().invoke(cli, ["verify", str(lake), *options], catch_exceptions=catch)


def _on_terminal(arguments: list[str], answer: bytes) -> str:
    """What a pseudo-terminal shows; `answer` is typed in."""
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from logitlake_shared.cli import main; main()", *arguments]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as child:
        os.close(slave)
        os.write(master, answer)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the child closed its side
                break
            if not chunk:
                break
            shown += chunk
        child.wait()
    os.close(master)
    return shown.decode()
