"""Runs the stages of a training configuration, each from where the one before it ended.

    <output>/<stage>/model/          the finished stage: a stock checkpoint with tokenizer and processor
    <output>/<stage>/metrics.jsonl   one line of JSON every `log_every` steps
    <output>/<stage>/started.json    written first: what is trained on what
    <output>/<stage>/done.json       written last: the same, and the closing figures
    <output>/<stage>/provenance.json resolved configuration, versions, command line
    <output>/<stage>/left-out.json   pairs that cannot be learned from, and why; where there are any
    <output>/<stage>/cached-mass.json   how much of the teacher the lake holds, and the samples with the least
    <output>/<stage>/checkpoint-N/   while the stage runs
    <output>/snapshots.json          the snapshot of each cache that the run is pinned to
    <output>/hub.json                the revision of a student that was given by its name on the hub

A stage is done when `done.json` is there; then it is skipped, before anything heavy is imported. A folder in which
another configuration, another lake or other stages before it were begun or finished is an error which names the
difference: results are never mixed.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from logitlake_schemas import canonical_json, fingerprint
from logitlake_shared.cli_support import progress
from logitlake_shared.config import write_provenance
from logitlake_shared.durable import publish_folder, remove_staged, replace_file
from logitlake_shared.errors import ConfigError, FingerprintMismatchError, TrainingError
from logitlake_shared.jobs.progress import say, say_sometimes
from logitlake_shared.lake import Lake
from logitlake_student.checkpoints import first_difference, prune_checkpoints
from logitlake_student.config import (
    D2SStage,
    PreferenceStage,
    StageConfig,
    TrainConfig,
)
from logitlake_student.explained import memory_explained, room_explained, writing_explained
from logitlake_student.output_lock import output_lock
from logitlake_student.ranks import first_rank_first, is_first_rank, join_ranks, wait_for_ranks, world_size
from logitlake_student.step_meter import StepMeter
from logitlake_student.stopping import StopRequest, stop_on_sigterm

__all__ = ["StageRun", "plan_run", "train_run"]

METRICS = "metrics.jsonl"
STARTED = "started.json"
DONE = "done.json"
SNAPSHOTS = "snapshots.json"
LEFT_OUT = "left-out.json"
CACHED_MASS = "cached-mass.json"
HUB = "hub.json"


@dataclass(frozen=True)
class StageRun:
    """One stage of a run: its configuration, its folder, and the identity of all that determines its result."""

    stage: StageConfig
    folder: Path
    identity: dict[str, Any]
    previous: Path | None
    """the finished model of the stage before it"""
    snapshots: dict[str, int]
    """by cache, the snapshot that the whole run is pinned to"""

    @property
    def model(self) -> Path:
        """The finished stage's checkpoint."""
        return self.folder / "model"

    def is_done(self) -> bool:
        """Whether the stage is finished; raises `ConfigError` when something else was begun in its folder."""
        for name in (DONE, STARTED):
            if not (self.folder / name).is_file():
                continue
            identity = _read(self.folder / name)["identity"]
            if identity != json.loads(canonical_json(self.identity)):
                difference = first_difference(identity, self.identity)
                raise ConfigError(
                    f"{self.folder}: holds a stage {self.stage.type} of another run: {difference}. Choose another "
                    "`output`, or remove the folder to train it again"
                )
        return (self.folder / DONE).is_file()


def plan_run(config: TrainConfig) -> list[StageRun]:
    """The stages of the run, with the lake pinned: the snapshots of the first run stay those of every later one.

    Writes nothing. Raises `ConfigError` and `LakeError` before any work starts.
    """
    lake = Lake.open(config.data.lake)
    samples = lake.cache(config.data.samples)
    pinned = _read(config.output / SNAPSHOTS) if (config.output / SNAPSHOTS).is_file() else {}
    wanted = config.data.snapshot or pinned.get(samples.name)
    snapshots = {samples.name: samples.open_snapshot(wanted).number}
    identity_of_lake: dict[str, Any] = {
        "samples": samples.fingerprint,
        "snapshot": snapshots[samples.name],
        "split": config.data.split,
    }
    identity_of_pairs: dict[str, Any] = {}
    if config.data.pairs is not None:
        pairs = lake.cache(config.data.pairs)
        snapshots[pairs.name] = pairs.open_snapshot(pinned.get(pairs.name)).number
        identity_of_pairs = {"pairs": pairs.fingerprint, "pairs_snapshot": snapshots[pairs.name]}
    before: list[dict[str, Any]] = []
    runs: list[StageRun] = []
    for stage in config.stages:
        identity: dict[str, Any] = {
            "student": config.student.model_dump(mode="json"),
            "stage": stage.model_dump(mode="json"),
            "lake": identity_of_lake | (identity_of_pairs if isinstance(stage, PreferenceStage) else {}),
            "stages_before": fingerprint(before),
        }
        if config.precision != "fp32":
            identity["precision"] = config.precision
        runs.append(StageRun(stage, config.output / stage.type, identity, runs[-1].model if runs else None, snapshots))
        before.append(identity)
    return runs


def train_run(config: TrainConfig, stop_file: Path | None = None) -> Iterator[tuple[StageRun, dict[str, Any] | None]]:
    """Trains what is left of the stages, in order, each from its newest complete checkpoint. Yields each when it is
    done: with its closing figures, None where it was done already.

    Raises `ConfigError` while another process trains into the same output; nobody else can begin until all is done.
    Raises `RunStopped` when SIGTERM, or a `stop_file` that came to be, ended it: its last step is in a checkpoint then.
    """
    _check_trackers(config)
    is_done = all(run.is_done() for run in plan_run(config))
    lock = nullcontext() if is_done or not is_first_rank() else output_lock(config.output)
    with room_explained(config.output), lock, stop_on_sigterm(stop_file) as stop:
        runs = plan_run(config)  # again: another process may have been at work until the lock was free
        steps = StepsTold(runs)
        for run in runs:
            if not run.is_done():
                yield run, _train_stage(config, run, steps, stop)
                continue
            if is_first_rank():
                _remove_checkpoints(run)  # of a process that was killed when all else was done
            yield run, None


def _train_stage(config: TrainConfig, run: StageRun, steps: "StepsTold", stop: StopRequest) -> dict[str, Any]:
    import torch

    from logitlake_shared.reader import LakeDataset, PairDataset
    from logitlake_shared.rendering import Renderer
    from logitlake_student.cached_mass import measure_cached_mass
    from logitlake_student.checkpoints import newest_checkpoint
    from logitlake_student.data import PairCollator, ReadableItems, SampleCollator, StudentInputs, check_student_fits
    from logitlake_student.model_inputs import ModelInputs
    from logitlake_student.models.assemble import save_student
    from logitlake_student.models.load import quiet_transformers
    from logitlake_student.models.parameters import parameter_report
    from logitlake_student.models.parts import text_config
    from logitlake_student.objectives import check_targets_fit
    from logitlake_student.sharding import whole
    from logitlake_student.stages import freeze_for_stage
    from logitlake_student.trainer import StageTrainer, micro_batches
    from logitlake_student.usable_pairs import UsablePairs

    quiet_transformers()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    _refuse_several_devices(torch.cuda.device_count() if config.device == "cuda" else 1)
    started = time.monotonic()
    stage = run.stage
    micro_batches(stage, world_size())
    join_ranks(config.device, config.rank_timeout_s)
    stop.check()
    with first_rank_first():
        start_dir = starting_checkpoint(config, run)
    model = starting_model(config, run, start_dir)
    trained = freeze_for_stage(model, stage.type)

    renderer = Renderer(start_dir)
    samples = LakeDataset(
        config.data.lake,
        config.data.samples,
        split=config.data.split,
        tasks=None if isinstance(stage, PreferenceStage) else stage.tasks,
        snapshot=run.snapshots[config.data.samples],
    )
    check_student_fits(samples.spec, samples, renderer)
    inputs = StudentInputs(
        ModelInputs.of_checkpoint(start_dir, model.config),
        pad_id=renderer.pad_id,
        context_length=getattr(text_config(model), "max_position_embeddings", None),
    )
    dataset: Any = samples
    usable: UsablePairs | None = None
    collate: Any
    if not isinstance(stage, PreferenceStage):
        check_targets_fit(stage, samples.spec)
        collate = SampleCollator(inputs, samples.spec.codec, stage.temperature, stage.token_weights)
    else:
        pairs = str(config.data.pairs)
        dataset = PairDataset(config.data.lake, pairs, tasks=stage.tasks, snapshot=run.snapshots[pairs])
        if dataset.spec.tokenizer != samples.spec.tokenizer:
            raise FingerprintMismatchError(
                f"{config.data.lake}: caches {config.data.samples!r} and {pairs!r} were captured with different "
                "tokenizers; capture both with one teacher"
            )
        if stage.image_weight and not dataset.spec.no_image_pass:
            raise ConfigError(
                f"stages.{stage.type}.image_weight: needs pairs that were scored without their images, too; score them "
                "with pairs.no_image_pass=true, or set it to 0"
            )
        usable = UsablePairs(dataset, measured_by_teacher=stage.reference == "teacher")
        collate = PairCollator(inputs, renderer if stage.image_weight else None)

    if is_first_rank():
        run.folder.mkdir(parents=True, exist_ok=True)
        for folder in (config.output, run.folder):
            remove_staged(folder)
        _write(config.output / SNAPSHOTS, run.snapshots)
        _write(run.folder / STARTED, {"identity": run.identity})
        write_provenance(run.folder / "provenance.json", config)
        if usable is not None and usable.left_out:
            _write(run.folder / LEFT_OUT, usable.left_out)
            counts = ", ".join(f"{code} {number}" for code, number in usable.counts().items())
            _warn(f"{len(usable.left_out)} of {len(dataset)} pairs are left out ({counts}): {run.folder / LEFT_OUT}")
        if usable is None:
            _tell_cached_mass(run, measure_cached_mass(samples, config.data.min_cached_mass))
    wait_for_ranks()

    newest = newest_checkpoint(run.folder)
    done_steps = newest[0] if newest is not None else 0
    readable = ReadableItems(dataset if usable is None else usable, config.data.max_unreadable, _warn)
    with _progress(f"train {stage.type}", stage.steps, steps.of(run, done_steps)) as advance:
        trainer = StageTrainer(
            model,
            stage,
            readable,
            collate,
            run.folder,
            vocab_size=renderer.vocab_size,
            config=config,
            identity=run.identity,
            advance=advance,
            meter=steps.meter,
            stop=stop,
        )
        trainer.take_up_records(done_steps)
        if newest is not None:
            advance(done_steps)
        with memory_explained(config):
            trainer.train(resume_from_checkpoint=str(newest[1]) if newest is not None else None)
    steps.tell_measured()  # the last line of metrics came after the last step
    if trainer.state.global_step < stage.steps:
        stop.check()

    parameters = parameter_report(model)
    figures = {
        "steps": stage.steps,
        "seconds": round(time.monotonic() - started, 1),
        "resumed_at_step": done_steps,
        "params_total": parameters.total,
        "params_active": parameters.active,
        "params_trainable": parameters.trainable,
        "parts": {name: asdict(part) for name, part in parameters.parts.items()},
        "tensors_trained": len(trained),
    }
    if usable is not None and usable.left_out:
        figures["pairs_left_out"] = usable.counts()
    weights = whole(model.state_dict(keep_vars=True).items())
    if is_first_rank():
        building = run.folder / ".model"
        shutil.rmtree(building, ignore_errors=True)
        with writing_explained(run.model):
            save_student(model, building, files_from=start_dir, weights=weights)
            publish_folder(building, run.model)
        _write(run.folder / DONE, {"identity": run.identity, "figures": figures})
        _remove_checkpoints(run)
    wait_for_ranks()
    return figures


class StepsTold:
    """The optimiser steps of a run and what they take, for whoever started it."""

    def __init__(self, runs: Sequence[StageRun]) -> None:
        self.meter = StepMeter()
        self._done = {run.stage.type: run.stage.steps if run.is_done() else 0 for run in runs}
        self._total = sum(run.stage.steps for run in runs)

    def of(self, run: StageRun, done_steps: int) -> Callable[..., None]:
        """Tells the steps of a stage, `done_steps` of which are in its newest checkpoint."""
        name = run.stage.type
        self._done[name] = done_steps
        say(phase="running", counts=self._counts(), figures={"stage": name, "step": done_steps})
        self._done[name] = 0

        def tell(num: int, **figures: Any) -> None:
            self._done[name] += num
            now = {"stage": name, "step": self._done[name]}
            say_sometimes(counts=self._counts(), figures=now | figures, measured=self.meter.told())

        return tell

    def tell_measured(self) -> None:
        """Tells what was measured."""
        if is_first_rank():
            say_sometimes(measured=self.meter.told())

    def _counts(self) -> dict[str, int]:
        return {"total": self._total, "committed": sum(self._done.values()), "failed": 0, "quarantined": 0}


def _tell_cached_mass(run: StageRun, found: Any) -> None:
    """`found` is a `CachedMass`."""
    _write(run.folder / CACHED_MASS, found.document())
    if found.num_below:
        _warn(
            f"the lake holds less than {found.least:.0%} of the teacher's probability of {found.num_below} of "
            f"{found.num_samples} samples: {run.folder / CACHED_MASS}; capture with more entries a token (`k_max`)"
        )


def _remove_checkpoints(run: StageRun) -> None:
    with suppress(OSError):  # two commands may find the same stage done
        prune_checkpoints(run.folder, keep=0)
        shutil.rmtree(run.folder / ".building", ignore_errors=True)


@contextmanager
def _progress(label: str, num_steps: int, tell: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """The first rank's bar, which `tell` hears of, too; the others are silent."""
    if not is_first_rank():
        yield lambda *_, **__: None
        return
    with progress(label, num_steps, "steps") as advance:

        def both(num: int = 1, **figures: Any) -> None:
            advance(num, **figures)
            tell(num, **figures)

        yield both


def starting_checkpoint(config: TrainConfig, run: StageRun) -> Path:
    """The folder a stage starts from: the stage before it, the given checkpoint, or a student assembled now."""
    if run.previous is not None:
        return run.previous
    from logitlake_student.models.assemble import assemble_llava, save_assembled
    from logitlake_student.models.hub import local_folder, pin, pinned

    if config.student.checkpoint is not None:
        folder = local_folder(pinned(config.student.checkpoint, config.output / HUB))
        pin(config.student.checkpoint, folder, config.output / HUB)
        return folder
    assert config.student.vision_tower is not None
    assert config.student.language_model is not None
    vision_tower, language_model = (
        local_folder(config.student.vision_tower),
        local_folder(config.student.language_model),
    )
    folder = config.output / "assembled"
    if not folder.is_dir():
        building = config.output / ".assembled"
        shutil.rmtree(building, ignore_errors=True)
        model = assemble_llava(
            vision_tower,
            language_model,
            projector_seed=config.student.projector_seed,
            vision_feature_layer=config.student.vision_feature_layer,
        )
        save_assembled(model, building, vision_tower_dir=vision_tower, language_model_dir=language_model)
        publish_folder(building, folder)
    return folder


def starting_model(config: TrainConfig, run: StageRun, start_dir: Path) -> Any:
    """The model a stage starts from, upcycled if the stage is dense to sparse. The same every time."""
    import torch

    from logitlake_student.models.experts import use_experts
    from logitlake_student.models.load import load_student
    from logitlake_student.models.upcycle import upcycle

    model = load_student(start_dir, dtype=torch.float32)
    if isinstance(run.stage, D2SStage):
        model = upcycle(
            model,
            run.stage.num_experts,
            run.stage.num_experts_per_tok,
            run.stage.layers,
            router_seed=run.stage.router_seed,
            shared_expert=run.stage.shared_expert,
            expert_noise=run.stage.expert_noise,
        )
    use_experts(model, config.experts_implementation)
    return model.to(config.device)


def _check_trackers(config: TrainConfig) -> None:
    """Raises `ConfigError` naming a tracker whose package is not there, before anything is written."""
    for tracker in config.report_to:
        found = find_spec(tracker)
        if found is None or found.origin is None:  # a folder of that name, e.g. of runs, is no package
            raise ConfigError(f"report_to: {tracker} is not installed; `pip install {tracker}`, or leave it out")


def _warn(message: str) -> None:
    click.secho(f"warning: {message}", err=True, fg="yellow")


def _refuse_several_devices(num_devices: int) -> None:
    """Several devices of one rank would change the batch. Raises `TrainingError` before anything is written."""
    if num_devices > 1 and world_size() == 1:
        raise TrainingError(
            f"one process trains on one device, got {num_devices} visible CUDA devices; start a process a device with "
            f"torchrun --nproc-per-node={num_devices}, or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _write(path: Path, document: dict[str, Any]) -> None:
    replace_file(path, json.dumps(document, indent=1).encode() + b"\n")
