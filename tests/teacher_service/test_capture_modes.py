"""`logitlake-teacher capture` in its modes: what the configuration says is what the cache is, and what it refuses."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from logitlake_schemas import GenerateMode
from logitlake_shared.catalog import Catalog
from logitlake_shared.lake import Lake
from logitlake_shared.reader import LakeDataset
from logitlake_teacher.config import CaptureConfig

GENERATE = {"type": "generate", "max_new_tokens": 8, "temperature": 0.7, "seed": 1}
REQUIRED: dict[str, Any] = {
    "teacher": {"model_dir": "teacher"},
    "engine": {"type": "hf"},
    "lake": {"uri": "lake", "cache": "main"},
    "data": [{"type": "llava", "path": "train.json"}],
}


def test_the_teacher_answers_questions_that_wait(
    teacher_world: Any, teacher_command: Callable[..., Any], records: Callable[[], list[dict[str, Any]]]
) -> None:
    """Records with and without an answer; the mode is part of the cache's identity; a second run does nothing."""
    data = records()
    for record in data[::2]:
        record["conversations"] = record["conversations"][:-1]
    teacher_world.write_records(data)
    config = teacher_world.config(mode=GENERATE)
    refused = teacher_command("capture", teacher_world.config(name="score.toml"))
    assert refused.code == 2
    assert "does not end with an assistant turn" in refused.err

    finished = teacher_command("capture", config)
    assert finished.code == 0, finished.err
    cache = Lake.open(teacher_world.lake).cache("capture")
    assert cache.spec.mode == GenerateMode(type="generate", max_new_tokens=8, temperature=0.7, seed=1)
    dataset = LakeDataset(teacher_world.lake, "capture")
    assert len(dataset) == len(data)
    for sample in (dataset[position] for position in range(len(dataset))):
        assert sample.finish_reason in {"stop", "length"}
        assert sample.messages[-1]["role"] == "assistant"
        assert 1 <= len(sample.response_ids) <= 8
    assert "everything is captured already" in teacher_command("capture", config).out

    again = teacher_command("capture", config, f"lake.uri={teacher_world.folder / 'again'}")
    assert again.code == 0
    assert teacher_world.contents(lake=teacher_world.folder / "again") == teacher_world.contents()
    other = teacher_command("capture", config, "mode.seed=2")
    assert other.code == 2
    assert "mode.seed: 1 there, 2 here" in other.err


def test_what_images_add_can_be_asked_for(teacher_world: Any, teacher_command: Callable[..., Any]) -> None:
    """A second pass for every sample with an image, and tails at two temperatures, in SQL."""
    config = teacher_world.config(codec={"k_max": 8, "temperatures": [2, 4]})
    finished = teacher_command("capture", config, "no_image_pass=true")
    assert finished.code == 0, finished.err
    with Catalog(Lake.open(teacher_world.lake)) as catalog:
        (row,) = catalog.query(
            "SELECT count(*) AS n, count(visual_advantage) AS seen, avg(abs(visual_advantage)) AS added, "
            "bool_and(log_tail_mass_t4 >= log_tail_mass_t2 AND log_tail_mass_t2 >= log_tail_mass) AS rising FROM tokens"
        ).to_pylist()
    assert row["n"] == row["seen"] > 0
    assert row["added"] > 0.1
    assert row["rising"]
    document = json.loads((teacher_world.lake / "caches/capture/spec.json").read_text())
    assert document["no_image_pass"] is True
    assert document["codec"]["temperatures"] == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": {"type": "generate", "max_new_tokens": 0}}, "max_new_tokens"),
        ({"mode": {"type": "generate", "top_p": 0}}, "top_p"),
        ({"mode": {"type": "generate", "n": 4}}, "n\n"),
        ({"mode": {"type": "write"}}, "generate"),
        ({"mode": {"max_new_tokens": 5}}, "max_new_tokens"),
        ({"mode": {"type": "generate"}, "codec": {"type": "sampled"}}, "codec.type is 'sampled', but a teacher that"),
        ({"codec": {"temperatures": [3]}}, "temperatures"),
        (
            {"codec": {"temperatures": [2]}, "engine": {"type": "vllm", "route": "prompt_logprobs"}},
            "engine.route='prompt_logprobs' returns the most probable tokens only",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, Any], message: str) -> None:
    """Before any data is read: a mode that is none, and a codec that the mode or the engine cannot fill."""
    CaptureConfig.model_validate(REQUIRED)
    with pytest.raises(ValidationError, match=message):
        CaptureConfig.model_validate(REQUIRED | changes)


def test_without_a_mode_the_responses_are_those_of_the_data() -> None:
    """The default, said or not, is one configuration."""
    plain = CaptureConfig.model_validate(REQUIRED)
    assert plain == CaptureConfig.model_validate(REQUIRED | {"mode": {"type": "score"}, "no_image_pass": False})
