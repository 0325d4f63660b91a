"""The laws of the demo world: reproducible, no leak, faults at the stated rates, exact tests."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from examples.digit_scenes import make
from examples.digit_scenes.questions import (
    FaultRates,
    ask,
    ask_existence_pair,
    caption_of,
    has_habit,
    mentions,
    true_answer,
)
from examples.digit_scenes.world import COLOURS, DIGITS, PLACES, Placed, digit_pool, draw_layout, draw_scene

SMALL = make.Settings(train_scenes=400, test_scenes=24, preference_scenes=60)
SIGMAS = 5.0
"""A share of fair coins strays this many standard deviations once in a million runs; seeds are fixed, so never here."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "small"
    assert make.make_dataset(out, SMALL) == "made"
    return out


def read(dataset: Path, split: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((dataset / f"{split}.json").read_text())
    return records


def question_and_answer(record: dict[str, Any]) -> tuple[str, str]:
    human, gpt = record["conversations"]
    return human["value"].removeprefix("<image>\n"), gpt["value"]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def answer_by_reading(question: str, objects: list[str], places: list[str]) -> str:
    """The true answer from the words of the question alone: the slow second road to `true_answer`."""
    seen = [
        dict(zip(("colour", "digit"), phrase.split(), strict=True)) | {"place": place}
        for phrase, place in zip(objects, places, strict=True)
    ]
    words = re.findall(r"[a-z]+", question.lower())
    colour = next((word for word in words if word in COLOURS), None)
    digit = next((word for word in words if word in DIGITS), None)
    place = next((place for place in PLACES if f"at the {place}" in question), None)
    if question in ("Describe the picture.", "What is in the picture?", "List the digits that you see."):
        parts = [f"a {phrase} at the {place}" for phrase, place in zip(objects, places, strict=True)]
        return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    if question.startswith(("Is ", "Can ")):
        wanted = f"{colour} {digit}" if colour else digit
        return "yes" if any(wanted in (phrase, phrase.split()[1]) for phrase in objects) else "no"
    if question.startswith(("How many", "Count")):
        return ("zero", "one", "two", "three", "four")[sum(colour in (None, o["colour"]) for o in seen)]
    if question.startswith(("Where", "At which")):
        return next(o["place"] for o in seen if (o["colour"], o["digit"]) == (colour, digit))
    if "colour" in question:
        return next(o["colour"] for o in seen if o["place"] == place or (place is None and o["digit"] == digit))
    return next((o["digit"] for o in seen if o["place"] == place), "none")


def test_same_settings_make_the_same_bytes_and_another_seed_makes_others(dataset: Path, tmp_path: Path) -> None:
    """Every file of two runs is equal to the byte; every picture of another seed differs."""
    make.make_dataset(tmp_path / "again", SMALL)
    other = make.Settings(train_scenes=3, test_scenes=2, preference_scenes=2, seed=1)
    make.make_dataset(tmp_path / "other", other)
    assert hashes(tmp_path / "again") == hashes(dataset)
    others = hashes(tmp_path / "other")
    assert not set(others.values()) & set(hashes(dataset).values())


def test_a_larger_world_begins_with_the_smaller_one(dataset: Path, tmp_path: Path) -> None:
    """Scenes do not depend on how many follow, so a bigger set extends a smaller one."""
    make.make_dataset(tmp_path / "tiny", make.Settings(train_scenes=5, test_scenes=5, preference_scenes=1))
    small, tiny = hashes(dataset), hashes(tmp_path / "tiny")
    assert all(small[name] == digest for name, digest in tiny.items() if name.startswith("images/"))


def test_a_second_run_leaves_everything_and_other_settings_are_refused(dataset: Path, tmp_path: Path) -> None:
    """Idempotent for the same settings; never a mixture of two, never over somebody else's files."""
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    assert make.make_dataset(dataset, SMALL) == "already there"
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    with pytest.raises(click.ClickException, match="settings"):
        make.make_dataset(dataset, make.Settings())
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(click.ClickException, match="not empty"):
        make.make_dataset(tmp_path, SMALL)


def test_a_run_that_dies_leaves_nothing(tmp_path: Path) -> None:
    """The folder appears whole or not at all, and no half-built one stays beside it."""

    def dies(steps: Any, total: int, description: str) -> Any:
        yield next(steps)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make.make_dataset(tmp_path / "out", SMALL, dies)
    assert list(tmp_path.iterdir()) == []


def test_command_says_what_it_made(tmp_path: Path) -> None:
    """The command writes the folder with the counts it reports."""
    arguments = ["--out", str(tmp_path / "d"), "--train-scenes", "2", "--test-scenes", "1", "--preference-scenes", "1"]
    result = CliRunner().invoke(make.main, arguments)
    assert result.exit_code == 0, result.output
    assert "8 train" in result.output
    assert len(read(tmp_path / "d", "train")) == 8


def test_no_test_handwriting_in_training() -> None:
    """The two pools share no digit image, and scenes draw from their own pool only."""
    pools = {split: set(np.concatenate(digit_pool(split)).tolist()) for split in ("train", "test")}
    assert not pools["train"] & pools["test"]
    assert len(pools["train"]) + len(pools["test"]) == 1797
    for split, pool in pools.items():
        rng = np.random.default_rng(0)
        assert all(set(draw_scene(split, rng).digit_indices) <= pool for _ in range(200))


def test_every_class_is_in_both_pools() -> None:
    """No digit is asked for in tests that training cannot show."""
    assert all(len(pool) >= 20 for split in ("train", "test") for pool in digit_pool(split))


def test_test_answers_are_exact(dataset: Path) -> None:
    """Every test answer equals what the words of the question ask of the record's own objects."""
    records = read(dataset, "test")
    assert len(records) == 6 * SMALL.test_scenes
    for record in records:
        question, answer = question_and_answer(record)
        assert answer == answer_by_reading(question, record["objects"], record["places"]), (question, record)


def test_true_answers_agree_with_a_second_road() -> None:
    """`true_answer` from the question's fields equals the answer from its words, on many layouts."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        objects = draw_layout(rng)
        phrases, places = [o.phrase for o in objects], [o.place for o in objects]
        asked = [ask(task, objects, rng) for task in ("caption", "reading", "counting", "colour", "position")]
        for question in [*asked, *ask_existence_pair(objects, rng)]:
            assert true_answer(question, objects) == answer_by_reading(question.text, phrases, places), question


def test_training_faults_come_at_the_stated_rates(dataset: Path) -> None:
    """Faulty training answers lie within five standard deviations of the binomial that FaultRates names."""
    rates = FaultRates()
    outcomes: dict[str, list[bool]] = {"habit": [], "caption": [], "label": [], "existence": []}
    for record in read(dataset, "train"):
        question, answer = question_and_answer(record)
        truth = answer_by_reading(question, record["objects"], record["places"])
        kind = record["task"]
        if kind == "caption":
            kind = "habit" if has_habit(_layout(record)) else "caption"
        elif kind == "existence":
            if truth == "yes":
                assert answer == "yes"
                continue
        else:
            kind = "label"
        outcomes[kind].append(answer != truth)
    for kind, faulty in outcomes.items():
        rate = getattr(rates, kind)
        assert len(faulty) >= 20
        assert abs(np.mean(faulty) - rate) < SIGMAS * math.sqrt(rate * (1 - rate) / len(faulty)), kind


def test_existence_questions_are_balanced(dataset: Path) -> None:
    """In the test split half of the existence questions are true, scene by scene."""
    answers: dict[str, list[str]] = {}
    for record in read(dataset, "test"):
        if record["task"] == "existence":
            answers.setdefault(record["image"], []).append(question_and_answer(record)[1])
    assert all(sorted(pair) == ["no", "yes"] for pair in answers.values())


def test_pairs_prefer_the_faithful_answer(dataset: Path) -> None:
    """A chosen caption names only what is there, the rejected one something that is not."""
    rows = pq.read_table(dataset / "preference.parquet").to_pylist()
    assert len(rows) == 2 * SMALL.preference_scenes
    chosen_existence = []
    for row in rows:
        origin = json.loads(row["origin_split"])
        objects = origin["objects"]
        assert row["image"]["bytes"].startswith(b"\x89PNG")
        assert "<image>" not in row["question"]
        if origin["type"] == "caption":
            assert mentions(row["chosen"]) == objects
            assert set(mentions(row["rejected"])) - set(objects)
        else:
            chosen_existence.append(row["chosen"])
            assert {row["chosen"], row["rejected"]} == {"yes", "no"}
            assert row["chosen"] == answer_by_reading(row["question"], objects, [""] * len(objects))
    assert chosen_existence.count("yes") == SMALL.preference_scenes // 2


def test_habit_by_hand() -> None:
    """A bottom-row seven brings a nine of its colour to the first empty place, if one is free."""
    seven = Placed("seven", "red", 2)
    assert has_habit([seven]) == Placed("nine", "red", 0)
    assert has_habit([Placed("seven", "red", 0)]) is None
    assert has_habit([seven, Placed("nine", "red", 3)]) is None
    assert (
        has_habit(
            [
                *(Placed("one", colour, cell) for cell, colour in enumerate(("red", "blue"))),
                seven,
                Placed("two", "red", 3),
            ]
        )
        is None
    )


def test_captions_by_hand() -> None:
    """The wording, and the expression that finds objects in it."""
    caption = caption_of([Placed("seven", "red", 0), Placed("two", "blue", 1), Placed("two", "green", 3)])
    assert caption == "a red seven at the top left, a blue two at the top right and a green two at the bottom right"
    assert mentions(caption) == ["red seven", "blue two", "green two"]
    assert mentions("a reddish seven, two blue ones") == []


def _layout(record: dict[str, Any]) -> list[Placed]:
    return [
        Placed(phrase.split()[1], phrase.split()[0], PLACES.index(place))
        for phrase, place in zip(record["objects"], record["places"], strict=True)
    ]
