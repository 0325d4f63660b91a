"""What a training step costs with the teacher's answers in a lake, and with the teacher beside the student.

    python -m benchmarks.train [--json] [--quick] [--only text]

Two worlds, on the CPU in float32: SmolLM2-135M teaches a student of 30 M parameters text (`text`), and the tiny LLaVA
of the digit scenes teaches its student what is in pictures (`vlm`). Every run is a stage of the trainer itself, in a
process of its own, and they take turns:

    lake        as a user trains
    lean        the teacher's forward pass in every step; from there on our loss, on response rows in chunks
    reference   the teacher's forward pass, and softmax of both models over the whole vocabulary at every position,
                masked: what LLaVA-MoD's trainer does

A step's time is the median of a run's, a figure the median of the runs'. Waiting is what the step spends on its batch
before the first forward pass. Memory is what a run adds, at its peak, to a process that has imported everything.
"""

import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import Figure, in_own_process, median, peak_mib, publish

__all__ = ["figures"]

FOLDER = Path("runs/bench/train")
_NUM_SAMPLES = 64
_GROWTH = 100
_WAYS = ("lake", "lean", "reference")

_TEXT = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6}


def text_world() -> dict[str, Any]:
    """SmolLM2, passages of text, a lake of them and a random student; made at the first use."""
    from examples.smollm2.prepare import write_data
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from benchmarks.capture_samples import smollm2
    from logitlake_student.models.assemble import copy_processor_files

    teacher, folder = smollm2(), FOLDER / "text"
    if not (folder / "data").is_dir():
        write_data(folder / "data", _NUM_SAMPLES, 1)
        data = {"type": "llava", "path": str(folder / "data" / "train.json"), "split": "train"}
        _capture(folder / "lake", teacher, data)
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(teacher)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=64, **ids, **_TEXT)
        config.tie_word_embeddings = True
        Qwen3ForCausalLM(config).save_pretrained(folder / "student")
        copy_processor_files([teacher], folder / "student")
        _grow(folder / "lake", folder / "lake-grown")
    return {"teacher": teacher, "student": {"checkpoint": str(folder / "student")}, "folder": folder, "batch_size": 4}


def vlm_world() -> dict[str, Any]:
    """The digit scenes: their teacher, pictures and questions, a lake of them, and the parts of their student."""
    from benchmarks.capture_samples import vlm

    folder, models = FOLDER / "vlm", Path("examples/digit_scenes/models")
    if not folder.is_dir():
        make = [sys.executable, "-m", "examples.digit_scenes.make", "--out", str(folder / "data")]
        subprocess.run(make, check=True, capture_output=True)
        image_root = folder / "data"
        data = {
            "type": "llava",
            "path": str(image_root / "train.json"),
            "image_root": str(image_root),
            "split": "train",
        }
        _capture(folder / "lake", vlm(), data)
    student = {
        "vision_tower": str(models / "vision_tower"),
        "language_model": str(models / "student_lm"),
        "vision_feature_layer": -1,
    }
    return {"teacher": vlm(), "student": student, "folder": folder, "batch_size": 64}


def _capture(lake: Path, teacher: Path, data: dict[str, Any]) -> None:
    from logitlake_teacher.config import CaptureConfig
    from logitlake_teacher.service import open_cache, prepare, remaining_units, run_units

    config = CaptureConfig.model_validate(
        {
            "teacher": {"model_dir": teacher},
            "engine": {"type": "hf"},
            "lake": {"uri": str(lake), "cache": "main"},
            "data": [data],
        }
    )
    prepared = prepare(config)
    cache = open_cache(config, prepared)
    run_units(config, prepared, remaining_units(config, prepared, cache), lambda *_: None)
    cache.snapshot()


def _grow(source: Path, target: Path) -> None:
    """A lake with every sample of another one `_GROWTH` times, under as many names."""
    from logitlake_schemas import StoredError
    from logitlake_shared.lake import Lake, UnitResult
    from logitlake_shared.reader import LakeDataset

    dataset = LakeDataset(source, "main", split="train")
    samples = [dataset[place] for place in range(len(dataset))]
    cache = Lake.create(target).create_cache("main", dataset.spec)
    error = StoredError(kl_mean=0.0, kl_max=0.0, mean_stored_mass=1.0, mean_k=1.0)
    for copy in range(_GROWTH):
        named = [replace(sample, sample_id=f"{copy:03d}-{sample.sample_id}") for sample in samples]
        cache.publish_unit(UnitResult(unit=f"{copy:06d}-grown", samples=named, stored_error=error))
    cache.snapshot()


def _run(world: dict[str, Any], way: str, lake: str, steps: int) -> tuple[float, float, float]:
    """Seconds a step, the share of them that the batch is waited for, and MiB at the peak, of one run."""
    from logitlake_student import run as run_module
    from logitlake_student import trainer as trainer_module
    from logitlake_student.config import TrainConfig

    output = FOLDER / "run"
    shutil.rmtree(output, ignore_errors=True)
    stage = {"type": "d2d", "steps": steps, "learning_rate": 1e-3, "log_every": 1, "save_every": 10_000}
    config = TrainConfig.model_validate(
        {
            "output": str(output),
            "num_threads": 2,
            "student": world["student"],
            "data": {"lake": str(world["folder"] / lake), "samples": "main"},
            "stages": [stage | {"batch_size": world["batch_size"]}],
        }
    )
    moments: list[tuple[float, float]] = []

    class Timed(trainer_module.StageTrainer):
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            start = time.perf_counter()
            batch = super().get_batch_samples(epoch_iterator, num_batches, device)
            moments.append((start, time.perf_counter()))
            return batch

    trainer_module.StageTrainer = Timed  # type: ignore[misc]  # looked up when the stage begins
    if way != "lake":
        trainer_module._objective_of = _beside_a_teacher(world["teacher"], way)
    peak = peak_mib(lambda: list(run_module.train_run(config)))
    # The first steps warm the allocator and the kernels.
    starts, waits = [start for start, _ in moments], [done - start for start, done in moments]
    seconds = [after - before for before, after in itertools.pairwise(starts[2:])]
    return median(seconds), sum(waits[2:-1]) / sum(seconds), peak


def _beside_a_teacher(teacher_dir: Path, way: str) -> Callable[..., Any]:
    """What makes a stage's objective: the same loss, its targets made in the step by a teacher in memory."""
    import torch

    from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
    from logitlake_student.models.forward import hidden_response_rows
    from logitlake_student.models.load import load_student
    from logitlake_student.objectives import DistillationObjective

    teacher = load_student(teacher_dir, dtype=torch.float32).eval().requires_grad_(False)

    class BesideTeacher(DistillationObjective):
        def __call__(self, student: Any, batch: Any, totals: Any) -> Any:
            del totals
            lean = way == "lean"
            loss, kl_sum = (self._rows if lean else self._whole)(student, batch)
            return loss, {"forward_kl": kl_sum.detach(), "ce": torch.zeros_like(kl_sum.detach())}

        def _rows(self, student: Any, batch: Any) -> Any:
            with torch.no_grad():
                logits_RV = hidden_response_rows(teacher, batch) @ teacher.lm_head.weight[: self._vocab_size].t()
                top = torch.log_softmax(logits_RV, dim=-1).topk(32, dim=-1)
                log_tail_R = torch.log1p(-top.values.exp().sum(dim=1).clamp(max=1 - 1e-7))
            rows = TeacherBatch(top.indices, top.values, log_tail_R, batch["label_ids_R"], top.values[:, -1].clone())
            loss, sums = distillation_loss(
                hidden_response_rows(student, batch),
                student.lm_head.weight[: self._vocab_size],
                rows,
                divergence_weight=1.0,
                ce_weight=0.0,
                chunk_rows=self._stage.chunk_rows,
            )
            return loss, sums.divergence_sum

        def _whole(self, student: Any, batch: Any) -> Any:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
            with torch.no_grad():
                p_BSV = torch.softmax(teacher(**inputs).logits[..., : self._vocab_size].float(), dim=-1)
            logits_BSV = student(**inputs, use_cache=False).logits[..., : self._vocab_size]
            x_BS = (p_BSV * torch.log_softmax(logits_BSV.float(), dim=-1)).sum(dim=-1)
            mask_BS = torch.zeros_like(x_BS).flatten().index_fill(0, batch["rows_R"], 1.0).view_as(x_BS)
            loss = -(x_BS * mask_BS).sum()
            return loss, loss

    def objective_of(stage: Any, _student: Any, vocab_size: int) -> BesideTeacher:
        return BesideTeacher(stage, vocab_size)

    return objective_of


def figures(world_name: str, rounds: int, steps: int) -> list[Figure]:
    """Of one world."""
    from logitlake_shared.reader.datasets import HELD_BYTES

    world = in_own_process(_WORLDS[world_name])
    runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in _WAYS}
    for _ in range(rounds):
        for way in _WAYS:
            runs[way].append(in_own_process(_run, world, way, "lake", steps))
    seconds, waits, peaks = ({way: median([run[n] for run in runs[way]]) for way in _WAYS} for n in range(3))
    found = []
    for way in _WAYS[1:]:
        faster, share = seconds[way] / seconds["lake"], peaks["lake"] / peaks[way]
        # Promised for the text world; memory against what others do, not against our own loss with a teacher beside it.
        wants_speed, wants_memory = world_name == "text", world_name == "text" and way == "reference"
        found += [
            Figure(
                f"{world_name}: steps a second, lake / {way}",
                faster,
                "x",
                ">= 2" if wants_speed else None,
                faster >= 2 if wants_speed else None,
            ),
            Figure(
                f"{world_name}: peak memory, lake / {way}",
                share,
                "x",
                "<= 0.5" if wants_memory else None,
                share <= 0.5 if wants_memory else None,
            ),
        ]
    found.append(Figure(f"{world_name}: waiting for data", waits["lake"], "share", "<= 0.02", waits["lake"] <= 0.02))
    if world_name == "text":
        grown = median([in_own_process(_run, world, "lake", "lake-grown", steps)[2] for _ in range(rounds)])
        more, bound = grown - peaks["lake"], HELD_BYTES / 2**20
        # Flat from where the reader holds as many decoded rows as it ever does; a small lake is held whole.
        reach = f"<= {bound:.0f}, what the reader holds"
        found.append(Figure(f"more memory with {_GROWTH}x the samples", more, "MiB", reach, more <= bound))
    found += [Figure(f"{world_name}: a step, {way}", value, "s") for way, value in seconds.items()]
    found += [Figure(f"{world_name}: peak memory, {way}", value, "MiB") for way, value in peaks.items()]
    return found


_WORLDS: dict[str, Callable[[], dict[str, Any]]] = {"text": text_world, "vlm": vlm_world}


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help="One round of few steps.")
@click.option("--only", multiple=True, type=click.Choice(list(_WORLDS)), help="These worlds only.")
def main(as_json: bool, quick: bool, only: tuple[str, ...]) -> None:
    rounds, steps = (1, 6) if quick else (3, 16)
    found = [figure for name in only or _WORLDS for figure in figures(name, rounds, steps)]
    publish("train", found, as_json)


if __name__ == "__main__":
    main()
