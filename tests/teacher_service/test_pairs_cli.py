"""`logitlake-teacher pairs`: given and made, killed and run again, and what it says of prompts without a pair."""

import json
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from logitlake_shared.lake import Lake
from logitlake_shared.reader import PairDataset

Command = Callable[..., Any]

# A capture that shows no progress for this long is broken, however busy the machine.
PATIENCE_SECONDS = 180

ADVANTAGE = {
    "type": "made",
    "num_candidates": 4,
    "max_new_tokens": 24,
    "temperature": 1.5,
    "max_length_ratio": 1e6,
    "ranking": {"type": "visual_advantage", "min_margin": 3.0},
}


def made_config(world: Any, name: str = "made.toml", **sections: Any) -> Any:
    """The conversations of the world as prompts, for the fake teacher."""
    engine = {"type": "fake", "mean_response": 6, **sections.pop("engine", {})}
    config = world.config("pairs", name, **{"engine": engine, "pairs": ADVANTAGE, **sections})
    overrides = [
        "data.0.type=llava",
        f"data.0.path={world.folder / 'train.json'}",
        f"data.0.image_root={world.folder}",
    ]
    return config, overrides


def pairs_of(world: Any) -> dict[str, Any]:
    """The pairs of the newest snapshot by id."""
    dataset = PairDataset(world.lake, "pairs")
    return {pair.pair_id: pair for pair in (dataset[place] for place in range(len(dataset)))}


def test_given_pairs_with_and_without_images(teacher_world: Any, teacher_command: Command) -> None:
    """The second pass fills its two columns, one logprob a token; without it they are null."""
    done = teacher_command("pairs", teacher_world.config("pairs"))
    assert done.code == 0, done.err
    assert all(pair.chosen_logprobs_no_image is None for pair in pairs_of(teacher_world).values())
    assert Lake.open(teacher_world.lake).cache("pairs").spec.pair_making is None
    both = teacher_world.config("pairs", pairs={"type": "given", "no_image_pass": True}, lake={"cache": "both"})
    done = teacher_command("pairs", both)
    assert done.code == 0, done.err
    dataset = PairDataset(teacher_world.lake, "both")
    for pair in (dataset[place] for place in range(len(dataset))):
        assert pair.made_by == "dataset"
        assert pair.chosen_logprobs_no_image is not None
        assert len(pair.chosen_logprobs_no_image) == len(pair.chosen_ids)
        assert not np.array_equal(pair.chosen_logprobs_no_image, pair.chosen_logprobs)


def test_made_pairs_and_prompts_without_one_add_up(teacher_world: Any, teacher_command: Command) -> None:
    """Every prompt is a pair or a row of the view `errors`; the latter are named in the summary and fail nothing."""
    config, data = made_config(teacher_world)
    done = teacher_command("pairs", config, *data)
    assert done.code == 0, done.err
    stored = pairs_of(teacher_world)
    commits = Lake.open(teacher_world.lake).cache("pairs").commits()
    errors = {error.sample_id: error for commit in commits for error in commit.errors}
    assert stored.keys() | errors.keys() == {f"s{number:03d}" for number in range(24)}
    assert not stored.keys() & errors.keys()
    assert errors
    assert not any(error.is_failure for error in errors.values())
    assert f"{len(errors)} prompts without a pair" in done.out
    assert ", 0 errors" in done.out
    for pair in stored.values():
        assert json.loads(pair.made_by)["method"] == "visual_advantage"
        assert pair.chosen_rating >= pair.rejected_rating + 3
        assert pair.chosen_logprobs_no_image is not None


def test_a_failure_beside_prompts_without_a_pair_still_counts(teacher_world: Any, teacher_command: Command) -> None:
    """`max_error_rate` looks at what failed, and at that alone."""
    config, data = made_config(teacher_world, engine={"context_length": 40})
    done = teacher_command("pairs", config, *data)
    assert done.code == 2
    assert "prompt_too_long" in done.err
    assert "pair_" not in done.err


def test_the_same_options_give_the_same_pairs_and_others_another_cache(
    teacher_world: Any, teacher_command: Command
) -> None:
    """Nothing is done twice; another seed does not fit into the cache, and the refusal names it."""
    config, data = made_config(teacher_world)
    assert teacher_command("pairs", config, *data).code == 0
    again = teacher_command("pairs", config, *data)
    assert "everything is captured already" in again.out
    other = teacher_command("pairs", config, *data, "pairs.seed=1")
    assert other.code == 2
    assert "pair_making.seed: 0 there, 1 here" in other.err


@pytest.mark.parametrize("num_units", [1, 4])
def test_sigkill_while_pairs_are_made_changes_nothing_in_the_end(
    teacher_world: Any, teacher_command: Command, num_units: int
) -> None:
    """A unit asks twice, for candidates and for logprobs without the image. Killed after `num_units` units and in the
    middle of the next: the next run gives the objects of an uninterrupted one."""
    config, data = made_config(teacher_world)
    killed = teacher_world.start("pairs", config, *data, f"engine.die_after_calls={2 * num_units + 1}")
    out, err = killed.communicate(timeout=PATIENCE_SECONDS)
    assert killed.returncode == -signal.SIGKILL, (out, err)
    commits = [name for name in teacher_world.contents("pairs") if name.startswith("commits/")]
    assert len(commits) == num_units
    assert teacher_command("pairs", config, *data).code == 0
    whole, data = made_config(teacher_world, "whole.toml", lake={"uri": str(teacher_world.folder / "whole")})
    assert teacher_command("pairs", whole, *data).code == 0
    assert teacher_world.contents("pairs") == teacher_world.contents("pairs", lake=teacher_world.folder / "whole")


def test_data_of_the_other_kind_is_refused(teacher_world: Any, teacher_command: Command) -> None:
    """Preference data cannot be made into pairs, conversations are none; the message says what to set."""
    done = teacher_command("pairs", teacher_world.config("pairs", pairs=ADVANTAGE))
    assert done.code == 2
    assert "rlaif_v" in done.err
    config, data = made_config(teacher_world, pairs={"type": "given"})
    done = teacher_command("pairs", config, *data)
    assert done.code == 2
    assert "set pairs.type=made" in done.err


def test_a_judge_whose_words_are_no_tokens_is_refused_at_once(teacher_world: Any, teacher_command: Command) -> None:
    """Before the data is planned."""
    ranking = {"type": "judge", "yes": ["most certainly"], "no": ["n"]}
    config, data = made_config(teacher_world, pairs={**ADVANTAGE, "ranking": ranking})
    done = teacher_command("pairs", config, *data)
    assert done.code == 2
    assert "single token" in done.err
    assert not teacher_world.lake.exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_prompt_that_kills_the_teacher_while_it_writes_is_set_aside(teacher_world: Any) -> None:
    """Found by trying the unit's prompts in the way they are used; the others are made into pairs."""
    config, data = made_config(teacher_world, executor={"type": "ray", "num_actors": 2})
    process = teacher_world.start("pairs", config, *data, "engine.die_on=['s010']")
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2, (out, err)
    assert "1 teacher_crashed" in err
    assert "'s010'" in err
    assert "s010" not in pairs_of(teacher_world)
    assert len(pairs_of(teacher_world)) > 0
