"""Tiny students built in code, so that no test waits for a file or a network; and a small lake to train them on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tests.tiny_models import noise_png

from logitlake_student.config import TrainConfig

IMAGE_TOKEN_ID = 60
NUM_IMAGE_TOKENS = 16
VOCAB_SIZE = 64


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    """Progress bars and advice of transformers are not what a failing test should show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def tiny_llava() -> Callable[..., Any]:
    """Makes a seeded random LLaVA: CLIP tower of 16 patches, `model_type` language model; keyword = text config."""

    def make(model_type: str = "qwen3", seed: int = 0, **text: Any) -> Any:
        from transformers import CONFIG_MAPPING, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(seed)
        settings = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,  # the smallest that vLLM's CPU kernels take
            "max_position_embeddings": 256,
            "initializer_range": 0.2,  # large enough that a wrong wiring shows in the logits
            "tie_word_embeddings": True,
            "eos_token_id": 1,
        }
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
        )
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=CONFIG_MAPPING[model_type](**(settings | text)),
                image_token_index=IMAGE_TOKEN_ID,
                image_seq_length=NUM_IMAGE_TOKENS,
                vision_feature_layer=-2,
            )
        )
        return model.eval()

    return make


@pytest.fixture
def llava_batch() -> dict[str, torch.Tensor]:
    """Two right-padded sequences, each with one image: 16 placeholders, then text."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 50, (2, NUM_IMAGE_TOKENS + 8), generator=g)
    ids[:, 1 : NUM_IMAGE_TOKENS + 1] = IMAGE_TOKEN_ID
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    pixels = torch.randn(2, 3, 16, 16, generator=g)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@pytest.fixture
def processor_files() -> Callable[[Path], None]:
    """Writes a word-level tokenizer with `<image>` at 60, a chat template and CLIP's image processor config."""

    def write(model_dir: Path) -> None:
        words = [f"w{i}" for i in range(VOCAB_SIZE)]
        words[0], words[1], words[IMAGE_TOKEN_ID] = "<pad>", "<eos>", "<image>"
        vocab = {word: i for i, word in enumerate(words)}
        special = [
            {"id": vocab[w], "content": w, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for w in ("<pad>", "<eos>", "<image>")
        ]
        model_dir.mkdir(parents=True, exist_ok=True)
        tokenizer = {
            "version": "1.0",
            "added_tokens": special,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<pad>"},
        }
        (model_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
        tokenizer_config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "extra_special_tokens": {"image_token": "<image>"},
        }
        (model_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        (model_dir / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        image_processor = {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": 16, "width": 16},
            "size": {"shortest_edge": 16},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
        }
        (model_dir / "preprocessor_config.json").write_text(json.dumps(image_processor))

    return write


NUM_PICTURES = 4
NUM_TRAIN = 13
NUM_PAIRS = 6


@pytest.fixture(scope="session")
def student_checkpoint(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random dense student: the teacher's tokenizer and processor, half its width, 4 tokens an image
    where the teacher has 16, so that nothing can lean on equal positions."""
    from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

    from logitlake_student.models.assemble import save_student

    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    torch.manual_seed(1)
    text = Qwen3Config(
        vocab_size=len(tokenizer) + 4,  # a padded head, as real checkpoints have
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=image_token_id)
    )
    folder = tmp_path_factory.mktemp("student") / "dense"
    save_student(model.float(), folder, files_from=tiny_teacher)
    return folder


@pytest.fixture(scope="session")
def student_records() -> list[dict[str, Any]]:
    """LLaVA records: pictures with questions, one with two turns, one without a picture, and four held out."""
    records: list[dict[str, Any]] = []
    for number in range(NUM_TRAIN + 4):
        answer = "a red seven and a blue two" if number % 2 else f"yes {number}"
        turns = [
            {"from": "human", "value": f"<image>\nwhat is in the picture {number}?"},
            {"from": "gpt", "value": answer},
        ]
        if number == 2:
            turns += [{"from": "human", "value": "how many digits?"}, {"from": "gpt", "value": "three"}]
        record = {
            "id": f"s{number:03d}",
            "conversations": turns,
            "task": ("reading", "caption")[number % 2],
            "split": "train" if number < NUM_TRAIN else "test",
        }
        if number == 4:
            turns[0]["value"] = "is there none?"
        else:
            record["image"] = f"images/{number % NUM_PICTURES}.png"
        records.append(record)
    return records


@pytest.fixture(scope="session")
def student_data(student_records: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `train.json`, its images, and `preference.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for number in range(NUM_PICTURES):
        (folder / "images" / f"{number}.png").write_bytes(noise_png(number))
    (folder / "train.json").write_text(json.dumps(student_records), encoding="utf-8")
    rows = [
        {
            "ds_name": "made",
            "image": {"bytes": noise_png(number % NUM_PICTURES), "path": f"{number}.png"},
            "question": "what is in the picture?",
            "chosen": f"a red {number}",
            "rejected": f"two blue and a red {number}",
            "origin_dataset": "made",
            "origin_split": "caption",
            "idx": number,
            "image_path": f"{number}.png",
        }
        for number in range(NUM_PAIRS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "preference.parquet")
    return folder


def captured(config: Any) -> None:
    """Runs a job of the teacher service in this process; nothing may go wrong in it."""
    from logitlake_teacher.service import open_cache, prepare, remaining_units, run_units, summarise

    prepared = prepare(config)
    cache = open_cache(config, prepared)
    run_units(config, prepared, remaining_units(config, prepared, cache), lambda *_: None)
    assert not summarise(cache).figures.errors


@pytest.fixture(scope="session")
def capture_samples(tiny_teacher: Path, student_data: Path) -> Callable[..., None]:
    """`capture_samples(lake, cache, codec=..., ...)`: the records of `student_data` into a cache; sections override."""
    from logitlake_teacher.config import CaptureConfig

    def capture(lake: Path, cache: str, **sections: Any) -> None:
        document: dict[str, Any] = {
            "teacher": {"model_dir": tiny_teacher},
            "engine": {"type": "hf"},
            "lake": {"uri": str(lake), "cache": cache},
            "data": [{"type": "llava", "path": student_data / "train.json", "image_root": student_data}],
        }
        captured(CaptureConfig.model_validate(document | sections))

    return capture


@pytest.fixture(scope="session")
def capture_pairs(tiny_teacher: Path, student_data: Path) -> Callable[..., None]:
    """`capture_pairs(lake, cache, ...)`: the preference pairs of `student_data` into a cache; sections override."""
    from logitlake_teacher.config import PairsConfig

    def capture(lake: Path, cache: str, **sections: Any) -> None:
        document: dict[str, Any] = {
            "teacher": {"model_dir": tiny_teacher},
            "engine": {"type": "hf"},
            "lake": {"uri": str(lake), "cache": cache},
            "data": [{"type": "rlaif_v", "path": student_data / "preference.parquet"}],
        }
        captured(PairsConfig.model_validate(document | sections))

    return capture


@pytest.fixture(scope="session")
def student_lake(
    tiny_teacher: Path,
    capture_samples: Callable[..., None],
    capture_pairs: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A lake filled by the teacher service: cache `main` holds the whole vocabulary of every token, exactly; cache
    `preference` holds pairs; cache `empty` has no snapshot."""
    from logitlake_shared.lake import Lake
    from logitlake_shared.rendering import Renderer

    folder = tmp_path_factory.mktemp("lake") / "lake"
    codec = {"k_max": Renderer(tiny_teacher).vocab_size, "p_min": 0.0, "grid": "exact"}
    capture_samples(folder, "main", codec=codec)
    capture_pairs(folder, "preference")
    lake = Lake.open(folder)
    lake.create_cache("empty", lake.cache("main").spec)
    return folder


@dataclass(frozen=True)
class StudentWorld:
    """A lake, a dense student, and the training command to use them in `folder`."""

    folder: Path
    checkpoint: Path
    lake: Path

    @property
    def output(self) -> Path:
        """Where a run goes unless a test says otherwise."""
        return self.folder / "run"

    def document(self, *stages: dict[str, Any], **sections: Any) -> dict[str, Any]:
        """A training configuration of tiny stages; keys of `sections` override."""
        tiny = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, "save_every": 2}
        document: dict[str, Any] = {
            "output": str(self.output),
            "num_threads": 1,
            "student": {"checkpoint": str(self.checkpoint)},
            "data": {"lake": str(self.lake), "samples": "main", "pairs": "preference"},
            "stages": [tiny | stage for stage in stages],
        }
        for section, values in sections.items():
            known = document.get(section)
            document[section] = known | values if isinstance(known, dict) and section == "data" else values
        return document

    def train_config(self, *stages: dict[str, Any], **sections: Any) -> TrainConfig:
        """`document` as a configuration."""
        return TrainConfig.model_validate(self.document(*stages, **sections))

    def file(self, *stages: dict[str, Any], name: str = "train.toml", **sections: Any) -> Path:
        """`document` as a TOML file."""
        path = self.folder / name
        path.write_text(tomli_w.dumps(self.document(*stages, **sections)), encoding="utf-8")
        return path

    def train(self, config: TrainConfig) -> Path:
        """Trains every stage that is not done, in this process. Returns the folder of the last."""
        from logitlake_student.run import train_run

        return [run.folder for run, _ in train_run(config)][-1]

    def command(self, config: Path) -> tuple[str, ...]:
        """`logitlake-student train CONFIG`, behind `python` or `torchrun`."""
        return "-m", "logitlake_student.cli", "train", str(config)

    def start(self, config: Path, *overrides: str) -> "subprocess.Popen[str]":
        """`logitlake-student train CONFIG OVERRIDES...` as a process of its own session."""
        return subprocess.Popen(
            [sys.executable, *self.command(config), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )


@pytest.fixture
def student_world(tmp_path: Path, student_checkpoint: Path, student_lake: Path) -> StudentWorld:
    """The lake and the student of the session, and a folder of the test's own."""
    return StudentWorld(tmp_path, student_checkpoint, student_lake)


@pytest.fixture
def student_command(run_command: Callable[..., Any]) -> Callable[..., Any]:
    """`student_command("train", config, "a.b=c")`: see `run_command`."""
    return partial(run_command, "logitlake-student")


@pytest.fixture
def metrics_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The metrics of a stage's folder, one record a line."""
    return lambda folder: [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
