"""The teacher commands as their users meet them: the console script, its exit code, its messages, real files."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset, PairDataset

Records = Callable[[], list[dict[str, Any]]]
Command = Callable[..., Any]

# The promise of the house for a command that only prints its help; a busy machine gets four times that.
HELP_SECONDS = 2.0


def test_help_imports_nothing_heavy() -> None:
    """`--help` is fast because torch, ray, vllm and transformers stay away."""
    code = (
        "import sys; from logitlake_teacher import cli; "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "logitlake_teacher.cli", "--help"], capture_output=True, check=True, timeout=60
    )
    assert time.monotonic() - start < HELP_SECONDS


def test_dry_run_prints_the_resolved_configuration(teacher_world: Any, teacher_command: Command) -> None:
    """Defaults, file and overrides in one TOML, and nothing is touched."""
    result = teacher_command("capture", teacher_world.config(), "--dry-run", "plan.unit_tokens=77")
    assert result.code == 0, result.err
    assert "unit_tokens = 77" in result.out
    assert 'type = "inline"' in result.out
    assert not teacher_world.lake.exists()


def test_plan_checks_all_data_and_captures_nothing(teacher_world: Any, teacher_command: Command) -> None:
    """It says how much there is to do and what the plan is called by; no lake is made."""
    result = teacher_command("plan", teacher_world.config())
    assert result.code == 0, result.err
    assert "24 samples" in result.out
    assert "plan digest " in result.out
    assert "0 over the teacher's context" in result.out
    assert not teacher_world.lake.exists()


def test_the_plan_counts_what_is_there(teacher_world: Any, teacher_command: Command, records: Records) -> None:
    """By hand: six pictures of 4 tokens in 24 samples, one sample asked twice under two ids, one without a picture."""
    changed = records()
    changed.append({**changed[0], "id": "copy"})
    (teacher_world.folder / "images" / "5.png").unlink()
    teacher_world.write_records(changed)
    result = teacher_command("plan", teacher_world.config(), "--json", "data.0.on_bad_record=skip")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    figures = report["figures"]
    assert figures["items"] == 25
    assert figures["problems"] == {"image_missing": 4}
    assert figures["by_task"] == {"caption": 21}
    assert figures["image_tokens"] == 21 * 4
    assert figures["images"] == 5
    assert figures["duplicates"] == 1
    assert any("5.png" in example for example in figures["examples"])
    assert report["remaining_units"] == figures["units"]
    # Without the pictures, the tokens are those of prompts and responses; EOS closes each of the 21 + 5 responses.
    assert figures["tokens"] - figures["image_tokens"] > figures["response_tokens"] > 26


def test_the_plan_knows_what_is_captured(teacher_world: Any, teacher_command: Command) -> None:
    """After a part of the capture it counts the units that are left, and bytes a token are measured in the cache."""
    config = teacher_world.config()
    assert teacher_command("capture", config, "--shard", "1/2").code == 0
    report = json.loads(teacher_command("plan", config, "--json").out)
    units = report["figures"]["units"]
    assert report["committed_units"] == (units + 1) // 2
    assert report["remaining_units"] == units - report["committed_units"]
    assert "measured in this cache" in report["bytes_basis"]


def test_the_plan_of_pairs(teacher_world: Any, teacher_command: Command) -> None:
    """`plan --pairs` reads the configuration of `pairs`."""
    result = teacher_command("plan", teacher_world.config("pairs"), "--pairs")
    assert result.code == 0, result.err
    assert "6 pairs" in result.out


def test_the_plan_measures_this_machine(teacher_world: Any, teacher_command: Command) -> None:
    """`--measure` times the real engine on units of the plan and commits nothing."""
    config = teacher_world.config(engine={"type": "hf"}, estimate={"price_per_gpu_hour": 3.0})
    report = json.loads(teacher_command("plan", config, "--json", "--measure", "2").out)
    rate = report["estimate"]["rate"]
    assert rate["basis"] == "measured"
    assert 0 < rate["lowest"] <= rate["highest"]
    hours = report["remaining_tokens"] / rate["highest"] / 3600
    assert report["estimate"]["gpu_hours"][0] == pytest.approx(hours)
    assert report["estimate"]["price"][0] == pytest.approx(3 * hours)
    assert not teacher_world.lake.exists()


def test_parts_of_a_plan_fill_one_cache(teacher_world: Any, teacher_command: Command) -> None:
    """`--shard i/n` by n commands, in any order, is the capture that one command makes."""
    whole = teacher_world.config(name="whole.toml", lake={"uri": str(teacher_world.folder / "whole")})
    assert teacher_command("capture", whole).code == 0
    config = teacher_world.config()
    for shard in ("3/3", "1/3", "2/3"):
        done = teacher_command("capture", config, "--shard", shard)
        assert done.code == 0, done.err
    commits = {name: data for name, data in teacher_world.contents().items() if not name.startswith("snapshots")}
    of_whole = teacher_world.contents(lake=teacher_world.folder / "whole")
    assert commits == {name: data for name, data in of_whole.items() if not name.startswith("snapshots")}
    assert "this part is captured already" not in teacher_command("capture", config).out
    assert teacher_command("capture", config, "--shard", "4/3").code == 2


def test_a_digest_guards_the_capture(teacher_world: Any, teacher_command: Command, records: Records) -> None:
    """What `plan` printed is accepted, its first digits too; after a change of the data it is refused."""
    config = teacher_world.config()
    digest = json.loads(teacher_command("plan", config, "--json").out)["plan_digest"]
    changed = records()
    changed[0]["conversations"][1]["value"] = "something else"
    before = records()
    teacher_world.write_records(changed)
    refused = teacher_command("capture", config, "--plan-digest", digest)
    assert refused.code == 2
    assert digest in refused.err
    assert not teacher_world.lake.exists()
    teacher_world.write_records(before)
    assert teacher_command("capture", config, "--plan-digest", digest[:12]).code == 0


def test_bad_records_that_are_tolerated_are_counted(
    teacher_world: Any, teacher_command: Command, records: Records
) -> None:
    """With `on_bad_record = "skip"` they are error rows of the cache with their place; every other sample is there."""
    changed = records()
    changed[4]["conversations"].pop()
    changed[9] = {"id": "s009"}
    teacher_world.write_records(changed)
    refused = teacher_command("capture", teacher_world.config())
    assert refused.code == 2
    for part in ("2 of 24 items", "2 record_invalid", "record 4", "record 9"):
        assert part in refused.err
    done = teacher_command("capture", teacher_world.config(), "data.0.on_bad_record=skip", "max_error_rate=0.1")
    assert done.code == 0, done.err
    assert "22 samples" in done.out
    assert "2 errors" in done.out
    assert len(LakeDataset(teacher_world.lake, "capture")) == 22


def test_no_data_is_a_capture_of_nothing(teacher_world: Any, teacher_command: Command) -> None:
    """An empty list succeeds with a cache that opens and holds no row; so does the next command."""
    teacher_world.write_records([])
    for _ in range(2):
        done = teacher_command("capture", teacher_world.config())
        assert done.code == 0, done.err
        assert "0 samples" in done.out
    snapshot = Lake.open(teacher_world.lake).cache("capture").open_snapshot()
    assert (snapshot.number, snapshot.commits) == (1, ())


def test_capture_fills_the_lake_and_then_has_nothing_to_do(teacher_world: Any, teacher_command: Command) -> None:
    """Every sample once, with rows for each response token; a second run changes no object and needs no engine."""
    config = teacher_world.config()
    first = teacher_command("capture", config)
    assert first.code == 0, first.err
    assert "24 samples" in first.out
    assert "0 errors" in first.out
    dataset = LakeDataset(teacher_world.lake, "capture")
    assert dataset.ids() == [f"s{number:03d}" for number in range(24)]
    for sample in (dataset[position] for position in range(len(dataset))):
        assert len(sample.rows.k_T) == len(sample.response_ids)
        assert len(sample.images) == 1
    before = teacher_world.contents()
    # The fault would end this very process if an engine were started.
    again = teacher_command("capture", config, "engine.die_after_calls=0")
    assert "captured already" in again.out
    assert teacher_world.contents() == before


def test_pairs_are_scored_on_both_sides(teacher_world: Any, teacher_command: Command) -> None:
    """One logprob a token of chosen and of rejected, EOS included."""
    config = teacher_world.config("pairs")
    result = teacher_command("pairs", config)
    assert result.code == 0, result.err
    assert "6 pairs" in result.out
    pairs = PairDataset(teacher_world.lake, "pairs")
    assert len(pairs) == 6
    for pair in (pairs[position] for position in range(len(pairs))):
        assert len(pair.chosen_logprobs) == len(pair.chosen_ids)
        assert len(pair.rejected_logprobs) == len(pair.rejected_ids)
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == 1
        assert (pair.chosen_logprobs < 0).all()
        assert len(pair.images) == 1


def _missing_data(world: Any, records: Records) -> list[str]:
    (world.folder / "train.json").unlink()
    return []


def _bad_json_line(world: Any, records: Records) -> list[str]:
    lines = [json.dumps(record) for record in records()]
    lines[6] = lines[6][:-3]
    (world.folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return [f"data.0.path={world.folder / 'train.jsonl'}"]


def _duplicate_id(world: Any, records: Records) -> list[str]:
    changed = records()
    changed[5]["id"] = "s002"
    world.write_records(changed)
    return []


def _missing_image(world: Any, records: Records) -> list[str]:
    (world.folder / "images" / "3.png").unlink()
    return []


def _no_answer(world: Any, records: Records) -> list[str]:
    changed = records()
    changed[4]["conversations"].pop()
    world.write_records(changed)
    return []


def _placeholder_without_image(world: Any, records: Records) -> list[str]:
    changed = records()
    del changed[9]["image"]
    world.write_records(changed)
    return []


def _override(text: str) -> Callable[[Any, Records], list[str]]:
    return lambda *_: [text]


PLAN_MISTAKES: dict[str, tuple[Callable[[Any, Records], list[str]], tuple[str, ...]]] = {
    "missing data file": (_missing_data, ("train.json", "no such file")),
    "bad JSON line": (_bad_json_line, ("train.jsonl: line 7", "not valid JSON")),
    "duplicate id": (_duplicate_id, ("train.json", "'s002'", "taken by", "unique")),
    "missing image": (_missing_image, ("train.json", "image_missing", "3.png")),
    "no answer": (_no_answer, ("train.json", "record 4", "assistant turn")),
    "placeholder without image": (_placeholder_without_image, ("record 9", "placeholder")),
    "unknown key": (_override("plan.unit_token=5"), ("plan.unit_token", "not a known key")),
    "no such engine": (_override("engine.type=tgi"), ("engine", "tgi")),
    "no such teacher": (_override("teacher.model_dir=/nowhere"), ("/nowhere", "no such model folder")),
    "k over the vocabulary": (_override("codec.k_max=5000"), ("codec.k_max is 5000", "300 tokens")),
    "bad cache name": (_override("lake.cache=a/b"), ("'a/b'", "letters")),
}


@pytest.mark.parametrize("mistake", PLAN_MISTAKES)
def test_a_mistake_is_one_message_before_anything_runs(
    teacher_world: Any, teacher_command: Command, records: Records, mistake: str
) -> None:
    """Exit code 2, one message that says what and where, no traceback, no unit in the lake."""
    config = teacher_world.config()
    break_it, expected = PLAN_MISTAKES[mistake]
    done = teacher_command("capture", config, *break_it(teacher_world, records))
    assert done.code == 2, done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for part in expected:
        assert part in done.err
    assert not list(teacher_world.lake.rglob("*.parquet"))


def test_the_errors_of_a_lake_name_no_place_of_this_machine(
    teacher_world: Any, teacher_command: Command, records: Records
) -> None:
    """An image that is gone is told by the record's word for it: the lake is the same wherever it is captured."""
    _missing_image(teacher_world, records)
    folder = str(teacher_world.folder)
    data = f'data=[{{type="llava", path="{folder}/train.json", image_root="{folder}", on_bad_record="skip"}}]'
    done = teacher_command("capture", teacher_world.config(), data, "max_error_rate=0.5")
    assert done.code == 0, done.err
    errors = [
        error.message
        for commit in Lake.open(teacher_world.lake).cache("capture").open_snapshot().commits
        for error in commit.errors
    ]
    assert errors == ["images/3.png: No such file or directory"] * 4
    assert not [name for name, content in teacher_world.contents().items() if folder.encode() in content]


def test_a_missing_configuration_file_is_named(teacher_world: Any, teacher_command: Command) -> None:
    """The path is in the message."""
    done = teacher_command("capture", Path("nowhere.toml"))
    assert done.code == 2
    assert "nowhere.toml: no such configuration file" in done.err


def _truncated_image(world: Any, records: Records) -> list[str]:
    path = world.folder / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:1500])
    return []


def _long_response(world: Any, records: Records) -> list[str]:
    changed = records()
    changed[7]["conversations"][1]["value"] = "z" * 200
    world.write_records(changed)
    return ["engine.context_length=150"]


SAMPLE_MISTAKES: dict[str, tuple[Callable[[Any, Records], list[str]], int, tuple[str, ...]]] = {
    "image that does not decode": (_truncated_image, 4, ("4 image_decode", "'s008'")),
    "response over the context": (_long_response, 1, ("1 prompt_too_long", "'s007'", "150")),
    "teacher returns NaN": (_override("engine.wrong={s011='nan'}"), 1, ("1 teacher_nonfinite", "'s011'")),
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_a_bad_sample_costs_only_itself(
    teacher_world: Any, teacher_command: Command, records: Records, mistake: str
) -> None:
    """The others are captured and pinned, the bad ones have error rows, the command ends with one message and 2;
    run again it says the same without doing anything; with a tolerated rate it ends with 0."""
    config = teacher_world.config()
    break_it, num_bad, expected = SAMPLE_MISTAKES[mistake]
    overrides = break_it(teacher_world, records)
    done = teacher_command("capture", config, *overrides)
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert f"{24 - num_bad} samples" in done.out
    for part in expected:
        assert part in done.err
    assert len(LakeDataset(teacher_world.lake, "capture")) == 24 - num_bad
    before = teacher_world.contents()
    again = teacher_command("capture", config, *overrides)
    assert again.code == 2
    assert "captured already" in again.out
    assert teacher_command("capture", config, *overrides, "max_error_rate=0.5").code == 0
    assert teacher_world.contents() == before


def test_another_teacher_may_not_write_to_the_cache(teacher_world: Any, teacher_command: Command) -> None:
    """The message names the field that differs; the cache is as it was."""
    config = teacher_world.config()
    assert teacher_command("capture", config).code == 0
    before = teacher_world.contents()
    done = teacher_command("capture", config, "engine.seed=1")
    assert done.code == 2
    assert "engine.weights_sha256" in done.err
    assert teacher_world.contents() == before


def test_a_failing_teacher_keeps_what_was_committed(teacher_world: Any, teacher_command: Command) -> None:
    """An engine that raises ends the command; the same command without the fault goes on to the whole lake."""
    config = teacher_world.config()
    done = teacher_command("capture", config, "engine.raise_on=['s014']")
    assert done.code == 2
    assert "s014" in done.err
    assert "Traceback" not in done.err
    assert teacher_command("capture", config).code == 0
    assert len(LakeDataset(teacher_world.lake, "capture")) == 24
