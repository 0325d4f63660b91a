"""An evaluation says what a model says: alone or in a batch, of the teacher or of a student, today or from its file."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.digit_scenes.make import Settings, records_of_split
from examples.digit_scenes.questions import mentions as mentions_of_the_world

from logitlake_schemas import CaptureSpec, CodecPolicy
from logitlake_shared.config import load_config
from logitlake_shared.data_formats import ImageRef, read_llava
from logitlake_shared.errors import ConfigError, DataError, FingerprintMismatchError, LogitLakeError
from logitlake_shared.images import inspect_image
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rows import LakeSample
from logitlake_shared.topk import TeacherRows, concatenate, encode, stored_error
from logitlake_student.answers import Examinee, Prompt, greedy_answers, kl_to_teacher, load_examinee
from logitlake_student.config import EvalConfig
from logitlake_student.data import StudentInputs
from logitlake_student.evaluate import examine, figures_of, read_questions, result_of
from logitlake_student.metrics import mentions
from logitlake_student.models.forward import hidden_response_rows

EXAMPLES = Path(__file__).parents[2] / "examples/digit_scenes/configs"
# float32 logprobs against float64 ones, summed in another order: 4e-9 of the sum was measured.
KL_TOLERANCE = 1e-6
# Steps in which the tiny model learns the test by heart, at most; 38 were enough.
MAX_STEPS = 150

# id, picture, task, question, answer
RECORDS = (
    ("a", 1, "caption", "what is in the picture?", "a red seven and a blue two"),
    ("b", 2, "caption", "what is there?", "a red two"),
    ("c", 1, "existence", "is a red seven there?", "yes"),
    ("d", 1, "existence", "is a red two there?", "no"),
    ("e", 2, "existence", "a blue two?", "no"),
    ("f", 2, "counting", "how many digits are there?", "one"),
    ("g", 1, "colour", "what is the seven?", "red"),
)
OBJECTS = {1: ["red seven", "blue two"], 2: ["red two"]}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Models this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path: Path, png: Callable[[int], bytes]) -> Path:
    """A folder with `test.json` and its pictures."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number in OBJECTS:
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    write_records(folder)
    return folder


def write_records(folder: Path, **changes: Any) -> None:
    """The records as `test.json`; the keyword arguments replace keys of the first one, which is a caption."""
    records: list[dict[str, Any]] = [
        {
            "id": sample_id,
            "image": f"images/{number}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
            "task": task,
            "split": "test",
            "objects": OBJECTS[number],
        }
        for sample_id, number, task, question, answer in RECORDS
    ]
    records[0] |= changes
    (folder / "test.json").write_text(json.dumps(records))


@pytest.fixture
def teacher(tiny_teacher: Path) -> Examinee:
    return load_examinee(tiny_teacher, "cpu")


@pytest.fixture
def lake(tmp_path: Path, data: Path, teacher: Examinee, capture_spec: CaptureSpec) -> Path:
    """The whole distribution of the tiny teacher on the test records, kept exactly."""
    renderer = teacher.renderer
    codec = CodecPolicy(k_max=renderer.vocab_size, k_min=renderer.vocab_size, p_min=0.0, grid="exact")
    spec = capture_spec.model_copy(update={"tokenizer": renderer.identity(), "codec": codec})
    samples, captured, images = [], [], {}
    for record in read_llava(data / "test.json", data):
        rendered = renderer.render(record.messages)
        encoded = [image.load() for image in record.images]
        logits_TV = response_logits(teacher, rendered, encoded)
        logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
        topk_logprobs_TK, topk_ids_TK = logprobs_TV.sort(-1, descending=True)
        labels_T = torch.from_numpy(rendered.response_ids.astype(np.int64))
        rows = TeacherRows(
            topk_ids_TK=topk_ids_TK.numpy().astype(np.int32),
            topk_logprobs_TK=topk_logprobs_TK.numpy().astype(np.float32),
            label_logprob_T=logprobs_TV.gather(1, labels_T[:, None])[:, 0].numpy().astype(np.float32),
            label_rank_T=(topk_ids_TK == labels_T[:, None]).int().argmax(1).numpy().astype(np.int32) + 1,
            log_tail_mass_T=np.full(len(labels_T), -np.inf, np.float32),
        )
        stored = encode(rows, codec)
        captured.append(rows)
        images |= {image.image_sha256: image for image in map(inspect_image, encoded)}
        samples.append(
            LakeSample(
                sample_id=record.sample_id,
                task=record.task,
                source="made",
                split="test",
                messages=record.messages,
                **vars(rendered),
                expanded_length=len(rendered.prompt_ids) + 15 + len(rendered.response_ids),
                image_sha256=tuple(inspect_image(image).image_sha256 for image in encoded),
                rows=stored,
                finish_reason="given",
            )
        )
    cache = Lake.create(tmp_path / "lake").create_cache("main", spec)
    rows = concatenate(captured)
    error = stored_error(rows, encode(rows, codec))
    cache.publish_unit(UnitResult(unit="000000-x", samples=samples, images=list(images.values()), stored_error=error))
    cache.snapshot()
    return tmp_path / "lake"


@torch.no_grad()
def response_logits(examinee: Examinee, rendered: Any, images: Sequence[bytes]) -> torch.Tensor:
    """`logits_TV` of the response tokens of one conversation of one turn, from a plain forward pass."""
    ids_S = [*expanded(examinee, rendered.prompt_ids), *rendered.response_ids.tolist()]
    logits_SV = examinee.model(
        input_ids=torch.tensor([ids_S]), pixel_values=pixels_of(examinee, images), use_cache=False
    ).logits[0]
    num_tokens = len(rendered.response_ids)
    logits_TV: torch.Tensor = logits_SV[-num_tokens - 1 : -1, : examinee.renderer.vocab_size]
    return logits_TV


def pixels_of(examinee: Examinee, images: Sequence[bytes]) -> torch.Tensor | None:
    """What the tower reads of encoded images; None where there are none."""
    if not images:
        return None
    ids_S = np.full(len(images), examinee.renderer.image_token_id)
    made = examinee.model_inputs.expand(ids_S, np.zeros(len(ids_S), np.bool_), images).images
    return torch.from_numpy(np.concatenate([image["pixel_values"] for image in made]))


def expanded(examinee: Examinee, prompt_ids: Any) -> list[int]:
    """Prompt ids with 16 placeholders an image."""
    image = examinee.renderer.image_token_id
    return [token for each in prompt_ids.tolist() for token in [each] * (16 if each == image else 1)]


@pytest.fixture
def by_heart(tmp_path: Path, data: Path, tiny_teacher: Path) -> Path:
    """The folder of a tiny model that has learned the test's gold answers by heart."""
    examinee = load_examinee(tiny_teacher, "cpu")
    rendered, images = [], []
    for record in read_llava(data / "test.json", data):
        rendered.append(examinee.renderer.render(record.messages))
        images += [image.load() for image in record.images]
    inputs = StudentInputs(examinee.model_inputs, pad_id=examinee.renderer.pad_id)
    sequences = inputs.sequences(
        [
            (r.prompt_ids, r.prompt_lengths, r.response_ids, r.response_lengths, [image])
            for r, image in zip(rendered, images, strict=True)
        ],
        [f"record {number}" for number in range(len(rendered))],
    )
    batch = sequences.inputs | {"rows_R": sequences.rows_R}
    optimizer = torch.optim.AdamW(examinee.model.parameters(), lr=3e-3)
    for _ in range(MAX_STEPS):
        logits_RV = examinee.model.lm_head(hidden_response_rows(examinee.model, batch))
        loss = torch.nn.functional.cross_entropy(logits_RV, sequences.label_ids_R)
        if loss.item() < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    folder = tmp_path / "by-heart"
    shutil.copytree(tiny_teacher, folder)
    examinee.model.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, data: Path, lake: Path, tiny_teacher: Path) -> EvalConfig:
    return EvalConfig(
        output=tmp_path / "results",
        models=({"name": "teacher", "path": tiny_teacher},),
        test_data=data / "test.json",
        image_root=data,
        lake=str(lake),
        cache="main",
        mention_pattern=r"\b(red|blue) (one|two|seven)\b",
        max_new_tokens=16,
        batch_size=3,
        num_examples=1,
    )


def with_model(config: EvalConfig, name: str, path: Path) -> EvalConfig:
    return EvalConfig.model_validate(config.model_dump() | {"models": ({"name": name, "path": path},)})


def answer(examinee: Examinee, prompts: Sequence[Prompt], batch_size: int) -> list[str]:
    done: list[int] = []
    answers = greedy_answers(examinee, prompts, max_new_tokens=12, batch_size=batch_size, advance=done.append)
    assert sum(done) == len(prompts)
    return answers


def slow_answer(examinee: Examinee, prompt: Prompt) -> str:
    """The twin: one prompt, no padding, no cache, the whole sequence again for every token."""
    messages, images = prompt
    ids = expanded(examinee, examinee.renderer.render_prompt(messages))
    pixels = pixels_of(examinee, [image.load() for image in images])
    said: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits_SV = examinee.model(
                input_ids=torch.tensor([ids + said]), pixel_values=pixels, use_cache=False
            ).logits[0]
        token = int(logits_SV[-1].argmax())
        if token == examinee.renderer.eos_id:
            break
        said.append(token)
    return examinee.renderer.decode(said)


def test_a_batch_changes_no_answer(by_heart: Path, tiny_teacher: Path, png: Callable[[int], bytes]) -> None:
    """Prompts of many lengths, with an image, with two and without: batched, one by one and by the slow twin, the same.

    Of a model whose answers end and of a random one whose answers do not.
    """
    prompts: list[Prompt] = []
    for number, (_, _, _, question, _) in enumerate(RECORDS):
        refs = tuple(ImageRef(data=png(number + place)) for place in range(number % 3))
        content = [*({"type": "image"} for _ in refs), {"type": "text", "text": question * (1 + number % 2)}]
        prompts.append(([{"role": "user", "content": content}], refs))
    for folder in (by_heart, tiny_teacher):
        examinee = load_examinee(folder, "cpu")
        expected = [slow_answer(examinee, prompt) for prompt in prompts]
        assert len(set(expected)) > 2
        for batch_size in (1, 3, len(prompts)):
            assert answer(examinee, prompts, batch_size) == expected


def test_prompts_end_together(teacher: Examinee, png: Callable[[int], bytes]) -> None:
    """Padded on the left and masked; the placeholder stands 16 times; no padding inside."""
    image, pad = teacher.renderer.image_token_id, teacher.renderer.pad_id
    sequences = [
        teacher.model_inputs.expand(np.array(ids), np.zeros(len(ids), np.bool_), images)
        for ids, images in (([7, image, 8], [png(1)]), ([9], []))
    ]
    given = teacher.model_inputs.batch(sequences, pad_id=pad, model=teacher.model)
    assert given["input_ids"].tolist() == [[7, *[image] * 16, 8], [*[pad] * 17, 9]]
    assert given["attention_mask"].tolist() == [[1] * 18, [0] * 17 + [1]]


def test_whoever_gives_the_gold_answers_is_perfect(config: EvalConfig, by_heart: Path) -> None:
    """A model that has learned the test by heart, examined like any other: every share is 1, nothing is invented."""
    config = with_model(config, "by-heart", by_heart)
    result = examine(config, config.models[0])
    assert (result["name"], result["num_records"]) == ("by-heart", 7)
    assert result["vqa_accuracy"] == result["hallucination_f1"] == 1.0
    assert result["caption_hallucination_rate"] == 0.0
    assert result["tasks"] == {"caption": 1.0, "colour": 1.0, "counting": 1.0, "existence": 1.0}
    assert result["existence"]["yes_ratio"] == 1 / 3
    assert result["captions"]["object_recall"] == result["captions"]["exact"] == 1.0
    assert result["captions"]["num_mentions"] == 3
    assert result["examples"] == [
        {
            "id": "a",
            "image": "images/1.png",
            "question": "what is in the picture?",
            "gold": "a red seven and a blue two",
            "answer": "a red seven and a blue two",
            "objects": ["red seven", "blue two"],
        }
    ]
    assert result["kl_to_teacher"] > 0.1  # what it learned is not what the random teacher says
    assert json.loads((config.output / "by-heart.json").read_text()) == result


def test_vqa_accuracy_is_over_all_short_answers(config: EvalConfig) -> None:
    """3 of the 5 that are not captions are right, each with the same weight; captions count for themselves."""
    answers = ["a red one", "a red two", "yes", "yes", "No.", "two", "Red"]
    figures = figures_of(config, read_questions(config), answers, re.compile(config.mention_pattern))
    assert figures["vqa_accuracy"] == 3 / 5
    assert figures["tasks"] == {"caption": 1 / 2, "colour": 1.0, "counting": 0.0, "existence": 2 / 3}
    assert figures["hallucination_f1"] == 2 / 3  # one hit, one false alarm, no miss
    assert figures["caption_hallucination_rate"] == 1 / 2


def test_kl_is_the_dense_divergence(lake: Path, by_heart: Path, teacher: Examinee) -> None:
    """At k = vocabulary: torch's own kl_div of two live models, mean over all response tokens; 0 for the teacher."""
    dataset = LakeDataset(lake, "main", split="test")
    student = load_examinee(by_heart, "cpu")
    kl_sum, num_tokens = 0.0, 0
    for position in range(len(dataset)):
        sample = dataset[position]
        p_TV, q_TV = (
            torch.log_softmax(response_logits(examinee, sample, sample.images).double(), -1)
            for examinee in (teacher, student)
        )
        kl_sum += float(torch.nn.functional.kl_div(q_TV, p_TV, reduction="sum", log_target=True))
        num_tokens += len(sample.response_ids)
    for batch_size in (2, 7):
        kl = kl_to_teacher(student, dataset, batch_size=batch_size, advance=lambda _: None)
        assert kl == pytest.approx(kl_sum / num_tokens, rel=KL_TOLERANCE)
    assert kl_to_teacher(teacher, dataset, batch_size=4, advance=lambda _: None) == pytest.approx(0.0, abs=KL_TOLERANCE)


def test_a_result_is_that_of_its_identity(config: EvalConfig, data: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """Found again as written, also for another batch size; not when a picture, word, weight or setting changed."""
    (model,) = config.models
    assert result_of(config, model) is None
    result = examine(config, model)
    assert result_of(config, model) == result
    assert result_of(config.model_copy(update={"batch_size": 1}), model) == result
    assert result_of(config.model_copy(update={"max_new_tokens": 3}), model) is None

    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher, copy)
    moved = with_model(config, "teacher", copy)
    assert result_of(moved, moved.models[0]) == result
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert result_of(moved, moved.models[0]) is None

    picture = (data / "images/1.png").read_bytes()
    (data / "images/1.png").write_bytes((data / "images/2.png").read_bytes())
    assert result_of(config, model) is None
    (data / "images/1.png").write_bytes(picture)
    assert result_of(config, model) == result
    write_records(data, source="elsewhere")
    assert result_of(config, model) is None
    write_records(data)

    path = config.output / "teacher.json"
    path.write_bytes(path.read_bytes()[:-40])
    assert result_of(config, model) is None


def test_a_finished_result_is_found_without_anything_heavy(config: EvalConfig) -> None:
    """A second evaluation imports no torch and no transformers, and says the same."""
    (model,) = config.models
    result = examine(config, model)
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from logitlake_student.config import EvalConfig\n"
        "from logitlake_student.evaluate import result_of\n"
        "config = EvalConfig.model_validate_json(sys.stdin.read())\n"
        "print(result_of(config, config.models[0])['kl_to_teacher'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=config.model_dump_json(), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == result["kl_to_teacher"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": None}, r"record a: .* expected a list of names under `objects`, got None"),
        ({"task": "existence"}, "record a: .* must be yes or no, got 'a red seven and a blue two'"),
        ({"task": "counting", "conversations": [{"from": "human", "value": "<image>\n?"}]}, "ends without an answer"),
        ({"image": "images/9.png"}, r"1 of 3 images are missing, e\.g\. .*9\.png"),
    ],
)
def test_test_data_is_checked_before_the_work(
    config: EvalConfig, data: Path, changes: dict[str, Any], message: str
) -> None:
    """A record that its task cannot be scored by is named, and nothing is written."""
    write_records(data, **changes)
    with pytest.raises(DataError, match=message):
        result_of(config, config.models[0])
    assert not config.output.exists()


def test_a_caption_needs_no_gold(config: EvalConfig, data: Path) -> None:
    """Mentions judge it; exactness is over the captions that have one."""
    write_records(data, conversations=[{"from": "human", "value": "<image>\nwhat is there?"}])
    questions = read_questions(config)
    assert questions[0].gold is None
    answers = ["a red one", *(question.gold or "" for question in questions[1:])]
    figures = figures_of(config, questions, answers, re.compile(config.mention_pattern))
    assert (figures["tasks"]["caption"], figures["caption_hallucination_rate"]) == (1.0, 1 / 2)


def test_mistakes_in_the_configuration_are_named(config: EvalConfig, tmp_path: Path) -> None:
    """Two models of one name, a name that is no file's, no checkpoint, a pattern that is none, a cache that is not."""
    (model,) = config.models
    wrong: list[tuple[EvalConfig, type[LogitLakeError], str]] = [
        (config.model_copy(update={"models": (model, model)}), ConfigError, "two models are named 'teacher'"),
        (with_model(config, "a/b", model.path), ConfigError, "'a/b' is not the name of a file"),
        (
            with_model(config, "x", tmp_path / "nowhere"),
            ConfigError,
            r"no checkpoint there \(config\.json is missing\)",
        ),
        (config.model_copy(update={"mention_pattern": "(red"}), ConfigError, "`mention_pattern`: not a regular"),
        (config.model_copy(update={"cache": "other"}), LogitLakeError, "other"),
        (config.model_copy(update={"split": "nosuch"}), LogitLakeError, "nosuch"),
    ]
    for mistaken, error, message in wrong:
        with pytest.raises(error, match=message):
            examine(mistaken, mistaken.models[0])
    assert not config.output.exists()


def test_a_model_with_another_template_is_refused(config: EvalConfig, tiny_teacher: Path, tmp_path: Path) -> None:
    """Its ids would not be the lake's; the field is named and no result is written."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher, copy)
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template.replace("<assistant>", "<system>"))
    mistaken = with_model(config, "other", copy)
    with pytest.raises(FingerprintMismatchError, match="chat_template_sha256"):
        examine(mistaken, mistaken.models[0])
    assert not config.output.exists()


def test_the_shipped_configuration_reads_mentions_as_the_world_does() -> None:
    """Every stage after the teacher; the pattern finds in captions exactly what the world's own reader finds."""
    config = load_config(EvalConfig, EXAMPLES / "eval.toml", [])
    assert [model.name for model in config.models] == ["teacher", "init", "d2d", "d2s", "preference"]
    pattern = re.compile(config.mention_pattern)
    settings = Settings(test_scenes=20)
    for _, scene, records in records_of_split("test", settings, rates=None):
        caption = records[0]["conversations"][1]["value"]
        assert (
            mentions(caption, pattern) == mentions_of_the_world(caption) == [placed.phrase for placed in scene.objects]
        )
