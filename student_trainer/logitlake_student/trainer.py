"""One stage of training: `transformers.Trainer` with our losses, our order and our checkpoints.

What comes from Trainer: the loop, optimiser and schedule, accumulation, clipping, and DistributedDataParallel around
`objectives.StudentStep`, in whose forward pass the loss is computed. What is ours:

* the loss is a sum over response tokens (or pairs) divided by their number in the *global* batch, and what it compares
  with (expert frequencies, the baseline of `kto_pair`) is of the global batch, too: 1 x 64, 4 x 16 and two ranks with
  2 x 16 each are the same step;
* only response rows reach the lm_head, in chunks;
* the order of the samples is a function of the seed (`data.EpochOrder`), so a resumed stage repeats the batches;
* a checkpoint holds the trainable tensors, the optimiser, the schedule and the identity of what is trained on what, and
  is complete or not there;
* a step whose gradient is not finite is never taken: the samples are written down, and the stage stops or goes on;
* metrics are lines of JSON, each the mean over the steps since the line before it.
"""

import copy
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from logitlake_shared.durable import replace_file, sync
from logitlake_shared.errors import ConfigError, FingerprintMismatchError, TrainingError
from logitlake_student.averages import MovingAverage
from logitlake_student.checkpoints import first_difference, prune_checkpoints, publish_folder
from logitlake_student.config import D2SStage, PreferenceStage, StageConfig, TrainConfig
from logitlake_student.data import Batch, EpochOrder
from logitlake_student.explained import writing_explained
from logitlake_student.losses.balance import ExpertCounts, routing_statistics
from logitlake_student.models.parts import routers, text_config
from logitlake_student.models.routing import bias_experts
from logitlake_student.objectives import (
    DistillationObjective,
    ExpertBias,
    Objective,
    PreferenceObjective,
    RoutingObjective,
    RoutingSums,
    StepTotals,
    StudentStep,
)
from logitlake_student.objectives.sums import add, sum_over_ranks
from logitlake_student.ranks import is_first_rank, wait_for_ranks, world_size
from logitlake_student.sharding import copy_whole, load_optimizer_state, optimizer_state, shard, whole
from logitlake_student.step_meter import StepMeter
from logitlake_student.stopping import StopRequest

__all__ = ["StageTrainer", "micro_batches"]

METRICS = "metrics.jsonl"
_TRAINABLE = "trainable.safetensors"
_AVERAGES = "averages.safetensors"
_EXPERT_BIAS = "expert_bias.safetensors"
_IDENTITY = "identity.json"
_UNTOLD = "untold.json"
_OPTIMIZER = "optimizer.pt"
_SCHEDULER = "scheduler.pt"
_KEPT_CHECKPOINTS = 2


class StageTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trains `model` (already frozen for its stage) on `dataset` under one stage's configuration.

    With `shards`, several ranks hold a part of the student each. `advance(1, **figures)` is called after every step,
    once `meter` knows what that took.
    Once `stop` asks for it, of whichever rank, the step under way is the last, and its checkpoint is written. Raises
    `TrainingError` on a loss that is not finite.
    """

    def __init__(
        self,
        model: Any,
        stage: StageConfig,
        dataset: Any,
        collate: Callable[[Sequence[Any]], Batch],
        stage_dir: Path,
        *,
        vocab_size: int,
        config: TrainConfig,
        identity: dict[str, Any],
        advance: Callable[..., None],
        meter: StepMeter,
        stop: StopRequest,
    ) -> None:
        device = config.device
        accumulated = micro_batches(stage, world_size())
        self._stage, self._stage_dir, self._identity, self._meter = stage, stage_dir, identity, meter
        self._stop = stop
        self._step_sums: dict[str, float] = defaultdict(float)
        self._num_summed = self._num_skipped = 0
        self._num_tokens: Tensor | None = None
        self._dropped: list[Tensor] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._routing: RoutingSums | None = None
        self._staging: Path | None = None
        self._reader = ThreadPoolExecutor(1, "next-batches")
        self._next_batches: Future[list[Batch]] | None = None
        self._alerted = False
        arguments = TrainingArguments(
            output_dir=str(stage_dir),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch_size // (accumulated * world_size()),
            gradient_accumulation_steps=accumulated,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=stage.warmup_ratio,
            adam_beta1=stage.adam_beta1,
            adam_beta2=stage.adam_beta2,
            weight_decay=stage.weight_decay,
            max_grad_norm=stage.max_grad_norm,
            logging_steps=stage.log_every,
            save_steps=stage.save_every,
            logging_nan_inf_filter=False,
            seed=stage.seed,
            bf16=config.precision == "bf16",
            report_to=list(config.report_to),
            run_name=f"{config.output.name}-{stage.type}",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
            ddp_backend=None if world_size() == 1 else "gloo" if device == "cpu" else "nccl",
            ddp_find_unused_parameters=False,
        )
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = StudentStep(model, _objective_of(stage, model, vocab_size), _routing_of(stage, model))
        super().__init__(model=step, args=arguments, train_dataset=dataset, data_collator=collate)
        self.loss_is_scaled_for_ga = True
        if config.data_parallel == "fsdp" and world_size() > 1:
            shard(step, model, device)
            # Trainer's name for a model that reduces its gradients itself. Said only now, since its constructor refuses
            # to checkpoint such a model; ours are whole.
            self.is_distributed_loading_by_transformers = True
        self.remove_callback(PrinterCallback)
        self._bias = _bias_of(stage, model, device)
        # After sharding: each rank averages what it holds.
        self._average = None if stage.ema_decay is None else MovingAverage(_trained(model), stage.ema_decay)
        self.add_callback(_Progress(self._step_ended, advance, self._latest, self._average))
        self.add_callback(_Bias(step, self._bias))
        self._shown: dict[str, Any] = {}

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """As Trainer's; then nothing reads on."""
        try:
            return super().train(*arguments, **keywords)
        finally:
            self._reader.shutdown(wait=True, cancel_futures=True)

    # ---- order ----

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(dataset.layout, self._stage.steps * self._stage.batch_size, self._stage.seed)

    # ---- loss ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], StepTotals]:
        """The micro-batches of this rank's part of a step, and what is known of all of the step.

        While a step computes, a thread reads the next one: rows, pictures, padding.
        """
        read = super().get_batch_samples

        def fetch() -> list[Batch]:
            batches, _ = read(epoch_iterator, num_batches, device)
            return [self._prepare_inputs(batch) for batch in batches]

        if self._next_batches is None:
            self._next_batches = self._reader.submit(fetch)
        with self._meter.waiting_for_data():
            batches = self._next_batches.result()
        self._next_batches = self._reader.submit(fetch)
        step = self.model
        counts = [step.objective.count(batch) | {"tokens": batch["attention_mask"].sum()} for batch in batches]
        counted = sum_over_ranks(add(counts))
        self._num_tokens = counted["tokens"]
        surveyed = None
        if step.needs_survey and len(batches) > 1:
            with torch.no_grad():
                surveyed = sum_over_ranks(add([self.model_wrapped(batch, None) for batch in batches]))
        return batches, StepTotals(counted, surveyed)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> None:
        """Nothing: `get_batch_samples` counts."""

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: StepTotals | None = None,
    ) -> Tensor:
        """The micro-batch's share of the step's loss; the shares of all micro-batches and ranks add up to the loss."""
        result = model(inputs, num_items_in_batch)
        for name, value in result.sums.items():
            self._step_sums[name] += float(value)
        if result.routing is not None and self.model.routing.drops:
            self._dropped.append(result.routing.dropped_L.double().sum())
        if result.routing is not None and (self.state.global_step + 1) % self._stage.log_every == 0:
            self._routing = result.routing if self._routing is None else self._routing + result.routing
        # The wrapper takes the mean of the ranks' gradients; the loss is their sum.
        loss: Tensor = result.loss * world_size()
        return loss

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clips, takes back a step that is not finite, and ends the stage with this step where that was asked for: all
        ranks have the same gradient and the same sums, and decide the same."""
        norm: Tensor = super()._clip_grad_norm(model)
        told = _of_all_ranks({"loss": self._step_sums["loss"], "stops": float(self._stop.is_made)})
        loss = told["loss"]
        if told["stops"]:
            self.control.should_save = self.control.should_training_stop = True
        if torch.isfinite(norm) and math.isfinite(loss):
            for name, value in self._step_sums.items():
                self._sums[name] += value
            self._num_summed += 1
        else:
            self._refuse_step(loss, float(norm))
            model.zero_grad(set_to_none=True)
        self._step_sums.clear()
        return norm

    def _refuse_step(self, loss: float, norm: float) -> None:
        step, size = self.state.global_step + 1, self._stage.batch_size
        positions = list(self._get_train_sampler())[(step - 1) * size : step * size]
        written = self._stage_dir / f"not-finite-{step}.json"
        if is_first_rank():
            names = [_name(item) for item in self.train_dataset.__getitems__(positions)]
            # JSON has no word for what is not finite.
            document = {"step": step, "loss": str(loss), "grad_norm": str(norm), "samples": names}
            replace_file(written, json.dumps(document).encode() + b"\n")
        self._routing = None
        self._num_skipped += 1
        if self._num_skipped > self._stage.max_skipped:
            raise TrainingError(
                f"stage {self._stage.type}, step {step}: the loss is {loss}, its gradient {norm} "
                f"({self._num_skipped} such steps, `max_skipped` is {self._stage.max_skipped}); {written} names its "
                "samples. Lower the learning rate, or check the lake with `logitlake verify`"
            )

    # ---- metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Appends one line to the stage's metrics: means over the steps since the last line."""
        if "grad_norm" not in logs:  # Trainer's closing summary
            return
        step = self.state.global_step
        means = {name: value / max(self._num_summed, 1) for name, value in _of_all_ranks(self._sums).items()}
        record: dict[str, Any] = {"step": step, **means}
        if self._num_skipped:
            record["skipped"] = self._num_skipped
        # Of a step that was left out: null, since JSON has no word for what is not finite.
        record["grad_norm"] = logs["grad_norm"] if math.isfinite(logs["grad_norm"]) else None
        record["learning_rate"] = logs["learning_rate"]
        if unreadable := len(self.train_dataset.unreadable):
            record["unreadable"] = unreadable
        if self._routing is not None:
            record["experts"] = self._experts(self._routing)
            self._meter.routed([layer["load"] for layer in record["experts"]])
            if alerts := self._alert(step, record["experts"]):
                record["alerts"] = alerts
        self._sums.clear()
        self._num_summed = 0
        self._routing = None
        self._shown = {name: f"{record[name]:.3g}" for name in ("loss", "forward_kl", "margin") if name in record}
        if self.is_world_process_zero():
            with (self._stage_dir / METRICS).open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
        self.callback_handler.on_log(self.args, self.state, self.control, _flat(record))

    def _experts(self, told: RoutingSums) -> list[dict[str, Any]]:
        counts = told.counts
        sums = sum_over_ranks(
            {
                "assigned": counts.assigned_LE,
                "tokens": counts.num_tokens,
                "entropy": told.entropy_L,
                "dropped": told.dropped_L,
            }
        )
        num_choices = self.model.routing.num_experts_per_tok
        layers = routing_statistics(ExpertCounts(sums["assigned"], sums["tokens"]), sums["entropy"], num_choices)
        dropped = (sums["dropped"] / (sums["tokens"] * num_choices)).tolist()
        return [
            {
                "load": layer.load_E.tolist(),
                "entropy": layer.entropy,
                "max_violation": layer.max_violation,
                "dead": layer.num_dead,
                "dropped": share,
            }
            for layer, share in zip(layers, dropped, strict=True)
        ]

    def _alert(self, step: int, experts: list[dict[str, Any]]) -> list[str]:
        """What is wrong with the routing, told once a stage on the terminal and in every line of metrics."""
        assert isinstance(self._stage, D2SStage | PreferenceStage)
        alerts = []
        for place, layer in enumerate(experts):
            most = len(layer["load"]) / self.model.routing.num_experts_per_tok - 1
            if layer["dead"]:
                alerts.append(f"sparse layer {place}: {layer['dead']} of {len(layer['load'])} experts got no token")
            elif most and layer["max_violation"] >= self._stage.alert_violation * most:
                share = max(layer["load"]) * self.model.routing.num_experts_per_tok
                alerts.append(f"sparse layer {place}: one expert gets {share:.0%} of the tokens")
        if alerts and not self._alerted and is_first_rank():
            self._alerted = True
            message = f"stage {self._stage.type}, step {step}: {alerts[0]}; raise `balance_weight`, or lower the "
            click.echo(f"warning: {message}learning rate ({METRICS} says how it goes on)", err=True)
        return alerts

    def _step_ended(self) -> None:
        assert self._num_tokens is not None  # every step takes its samples first
        self._meter.step_ended(float(self._num_tokens))  # on a GPU this waits until the step is done
        if self._dropped:
            dropped = sum_over_ranks({"dropped": torch.stack(self._dropped).sum()})["dropped"]
            self._meter.add("tokens_dropped", float(dropped))
            self._dropped.clear()

    def _latest(self) -> dict[str, Any]:
        return self._shown

    def take_up_records(self, step: int) -> None:
        """What was written of steps up to this one stays and counts; a resumed stage writes the others again."""
        left_out = {int(path.stem.rpartition("-")[2]): path for path in self._stage_dir.glob("not-finite-*.json")}
        self._num_skipped = sum(number <= step for number in left_out)
        if not is_first_rank():
            return
        for number, written in left_out.items():
            if number > step:
                written.unlink()
        path = self._stage_dir / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace_file(path, "".join(kept).encode())

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._stage_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        self._staging = self._stage_dir / ".building"
        try:
            with writing_explained(self._stage_dir / name):
                super()._save_checkpoint(model, trial)
                building, self._staging = self._staging, None
                untold = {"steps": self._num_summed, "sums": _of_all_ranks(self._sums)}
                wait_for_ranks()  # each has written its random state
                if is_first_rank():
                    sync(self._stage_dir / METRICS)  # a checkpoint never outlives the lines before it
                    (building / name / _IDENTITY).write_text(json.dumps(self._identity), encoding="utf-8")
                    if self._num_summed:  # a stop came between two lines
                        (building / name / _UNTOLD).write_text(json.dumps(untold), encoding="utf-8")
                    publish_folder(building / name, self._stage_dir / name)
        finally:
            self._staging = None
        if is_first_rank():
            prune_checkpoints(self._stage_dir, _KEPT_CHECKPOINTS)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainable tensors; what is frozen is where the stage began."""
        files = {_TRAINABLE: whole(_trained(self.model.student))}
        if self._average is not None:
            files[_AVERAGES] = whole(self._average.averages.items())
        if self._bias is not None:
            files[_EXPERT_BIAS] = {"total_LE": self._bias.total_LE}
        if is_first_rank():
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            for name, tensors in files.items():
                save_file(tensors, folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        there = json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
        if difference := first_difference(there, self._identity):
            raise FingerprintMismatchError(
                f"{folder}: a checkpoint of something else: {difference}; remove it to train the stage again"
            )
        _take_up(folder / _TRAINABLE, dict(_trained(self.model.student)))
        if self._average is not None:
            _take_up(folder / _AVERAGES, self._average.averages)
        if self._bias is not None:
            _take_up(folder / _EXPERT_BIAS, {"total_LE": self._bias.total_LE})
            bias_experts(self.model.student, self._bias.at(int(folder.name.partition("-")[2])))
        if (folder / _UNTOLD).exists():
            untold = json.loads((folder / _UNTOLD).read_text(encoding="utf-8"))
            self._num_summed = untold["steps"]
            # They are of all ranks; each has to know the names.
            self._sums.update(untold["sums"] if is_first_rank() else dict.fromkeys(untold["sums"], 0.0))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = optimizer_state(self.model, self._torch_optimizer())
        if is_first_rank():
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (_OPTIMIZER, _SCHEDULER)
        )
        load_optimizer_state(self.model, self._torch_optimizer(), state)
        self.lr_scheduler.load_state_dict(schedule)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper."""
        inside: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        return cast(torch.optim.Optimizer, inside)


def micro_batches(stage: StageConfig, num_ranks: int) -> int:
    """Micro-batches that each rank works through in a step. Raises `ConfigError` where the batch cannot be cut so."""
    micro_batch = stage.micro_batch_size or max(1, stage.batch_size // num_ranks)
    if stage.batch_size % (micro_batch * num_ranks):
        raise ConfigError(
            f"stages.{stage.type}: {num_ranks} ranks with {micro_batch} samples each do not make up a batch of "
            f"{stage.batch_size}; choose another `micro_batch_size`, or another number of ranks"
        )
    return stage.batch_size // (micro_batch * num_ranks)


def _objective_of(stage: StageConfig, student: Any, vocab_size: int) -> Objective:
    if isinstance(stage, PreferenceStage):
        wanted = stage.reference == "initial_student"
        reference = copy.deepcopy(student).eval().requires_grad_(False) if wanted else None
        return PreferenceObjective(stage, vocab_size, reference)
    return DistillationObjective(stage, vocab_size)


def _routing_of(stage: StageConfig, student: Any) -> RoutingObjective | None:
    config = text_config(student)
    if not isinstance(stage, D2SStage | PreferenceStage) or not hasattr(config, "num_experts_per_tok"):
        return None
    z_loss_weight = stage.z_loss_weight if isinstance(stage, D2SStage) else 0.0
    return RoutingObjective(stage.balance_weight, z_loss_weight, config.num_experts_per_tok, stage.capacity_factor)


def _bias_of(stage: StageConfig, student: Any, device: str) -> ExpertBias | None:
    if not isinstance(stage, D2SStage) or stage.bias_rate is None:
        return None
    num_layers = len(routers(student))
    return ExpertBias(stage.bias_rate, stage.steps, num_layers, stage.num_experts, torch.device(device))


class _Bias(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, step: StudentStep, bias: ExpertBias | None) -> None:
        self._step, self._bias = step, bias

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bias is not None and self._step.step_counts is not None:
            self._bias.update(self._step.step_counts)
            bias_experts(self._step.student, self._bias.at(state.global_step))


def _take_up(path: Path, target: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into those of the same names. Raises `TrainingError` where the names differ."""
    saved = load_file(path)
    if saved.keys() != target.keys():
        raise TrainingError(
            f"{path}: holds other tensors than the stage trains: {sorted(saved.keys() ^ target.keys())[:4]}; remove "
            f"{path.parent.parent} to train the stage again"
        )
    for name, tensor in saved.items():
        copy_whole(target[name], tensor)


def _of_all_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    return {name: float(value) for name, value in sum_over_ranks(tensors).items()}


def _name(item: Any) -> str:
    return str(getattr(item, "sample_id", None) or item.pair_id)


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics as trackers want it: numbers by name, of each sparse layer on its own."""
    flat = {name: value for name, value in record.items() if isinstance(value, int | float)}
    for place, layer in enumerate(record.get("experts", ())):
        flat |= {f"experts/{place}/{name}": value for name, value in layer.items() if not isinstance(value, list)}
        flat |= {f"experts/{place}/load/{expert}": share for expert, share in enumerate(layer["load"])}
    return flat


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(
        self,
        ended: Callable[[], None],
        advance: Callable[..., None],
        figures: Callable[[], dict[str, Any]],
        average: MovingAverage | None,
    ) -> None:
        self._ended, self._advance, self._figures, self._average = ended, advance, figures, average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average is not None:
            self._average.update()
        self._ended()
        self._advance(1, **self._figures())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._average is not None:
            self._average.apply()


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
