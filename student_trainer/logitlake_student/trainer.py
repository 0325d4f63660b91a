"""One stage of training: `transformers.Trainer` with our losses, our order and our checkpoints.

What comes from Trainer: the loop, optimiser and schedule, accumulation, clipping. One process, one device: the loss
calls the decoder inside the model and not the model, so a wrapper around it (DistributedDataParallel, DataParallel)
would never see a forward pass and synchronise nothing; `run.train_stage` refuses to start there. What is ours:

* the loss is a sum over response tokens (or pairs) divided by their number in the *global* batch, whatever the
  micro-batching, so 1 x 64 and 4 x 16 are the same step. Two terms are not sums over tokens and see one forward pass
  at a time: the balance loss, whose expert frequencies are those of the micro-batch, and the baseline of `kto_pair`;
* only response rows reach the lm_head, in chunks;
* the order of the samples is a function of the seed (`data.EpochOrder`), so a resumed stage repeats the batches;
* a checkpoint holds the trainable tensors, the optimiser and the schedule, and is complete or not there;
* metrics are lines of JSON, each the mean over the steps since the line before it.
"""

import contextlib
import copy
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from logitlake_shared.errors import TrainingError
from logitlake_student.checkpoints import prune_checkpoints, publish_folder
from logitlake_student.config import D2DStage, D2SStage, InitStage, PreferenceStage, StageConfig
from logitlake_student.data import Batch, EpochOrder
from logitlake_student.losses.balance import load_balancing_loss, router_z_loss, routing_statistics
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.losses.preference import anchor_loss, nll_loss, preference_loss, sequence_logprobs
from logitlake_student.models.parts import text_config
from logitlake_student.models.routing import RouterRecorder

__all__ = ["StageTrainer", "hidden_response_rows"]

METRICS = "metrics.jsonl"
_TRAINABLE = "trainable.safetensors"
_KEPT_CHECKPOINTS = 2


def hidden_response_rows(model: Any, batch: Batch) -> Tensor:
    """`hidden_RH`: the decoder's final hidden states at the rows that predict response tokens."""
    inputs = {"input_ids": batch["input_ids_BS"], "attention_mask": batch["attention_mask_BS"], "use_cache": False}
    if "pixel_values" in batch:
        inputs["pixel_values"] = batch["pixel_values"]
    hidden_BSH = model.model(**inputs).last_hidden_state
    hidden_RH: Tensor = hidden_BSH.flatten(0, 1)[batch["rows_R"]]
    return hidden_RH


class StageTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Trains `model` (already frozen for its stage) on `dataset` under one stage's configuration.

    `advance(1, **figures)` is called after every step. Raises `TrainingError` on a loss that is not finite.
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
        device: str,
        advance: Callable[..., None],
    ) -> None:
        micro_batch = stage.micro_batch_size or stage.batch_size
        self._stage, self._stage_dir, self._vocab_size = stage, stage_dir, vocab_size
        self._sums: dict[str, float] = defaultdict(float)
        self._routing: list[Any] = []
        self._staging: Path | None = None
        arguments = TrainingArguments(
            output_dir=str(stage_dir),
            max_steps=stage.steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=stage.batch_size // micro_batch,
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
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=device != "cpu",
        )
        super().__init__(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.add_callback(_Progress(advance, self._latest))
        reference_needed = isinstance(stage, PreferenceStage) and stage.reference == "initial_student"
        self._reference = copy.deepcopy(model).eval().requires_grad_(False) if reference_needed else None
        balances = isinstance(stage, D2SStage | PreferenceStage)
        self._has_routers = balances and hasattr(text_config(model), "num_experts_per_tok")
        self._shown: dict[str, Any] = {}

    # ---- order ----

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return EpochOrder(dataset.layout, self._stage.steps * self._stage.batch_size, self._stage.seed)

    # ---- loss ----

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: Any) -> Tensor:
        """Response tokens (pairs for a preference stage) of the global batch: all micro-batches."""
        return torch.tensor(sum(self._num_items(batch) for batch in batch_samples), device=device)

    def _num_items(self, batch: Batch) -> int:
        if isinstance(self._stage, PreferenceStage):
            return len(batch["reference_logp_B"]) // 2
        return len(batch["label_ids_R"])

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The micro-batch's share of the step's loss; the shares of all micro-batches add up to the loss."""
        assert num_items_in_batch is not None
        recorder = RouterRecorder(self.model) if self._has_routers else None
        with recorder or contextlib.nullcontext():
            hidden_RH = hidden_response_rows(model, inputs)
        if isinstance(self._stage, PreferenceStage):
            loss_sum, sums = self._preference(hidden_RH, inputs)
        else:
            loss_sum, sums = self._distillation(hidden_RH, inputs)
        loss: Tensor = loss_sum / num_items_in_batch
        if recorder is not None:
            loss = loss + self._routing_losses(recorder.logits(), inputs) / self.current_gradient_accumulation_steps
        if not torch.isfinite(loss):
            raise TrainingError(
                f"stage {self._stage.type}, step {self.state.global_step + 1}: the loss is {float(loss.detach())}; "
                "lower the learning rate, or check the lake with `logitlake verify`"
            )
        for name, value in sums.items():
            self._sums[name] += float(value) / float(num_items_in_batch)
        self._sums["loss"] += float(loss.detach())
        return loss

    def _head(self) -> Tensor:
        weight_VH: Tensor = self.model.lm_head.weight[: self._vocab_size]
        return weight_VH

    def _distillation(self, hidden_RH: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        stage = self._stage
        assert isinstance(stage, InitStage | D2DStage | D2SStage)
        teacher = TeacherBatch(
            topk_ids_RK=batch["topk_ids_RK"],
            topk_logprobs_RK=batch["topk_logprobs_RK"],
            log_tail_mass_R=batch["log_tail_mass_R"],
            label_ids_R=batch["label_ids_R"],
            log_bound_R=batch["log_bound_R"] if stage.tail == "bounded" else None,
        )
        loss_sum, sums = distillation_loss(
            hidden_RH,
            self._head(),
            teacher,
            kl_weight=stage.kl_weight,
            ce_weight=stage.ce_weight,
            chunk_rows=stage.chunk_rows,
        )
        return loss_sum, {"kl": sums.kl_sum, "ce": sums.ce_sum}

    def _preference(self, hidden_RH: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        stage = self._stage
        assert isinstance(stage, PreferenceStage)
        length_B = batch["length_B"]
        policy_B = self._sequence_logprobs(self.model, hidden_RH, batch)
        reference_B = self._reference_logprobs(batch)
        scale_B = 1 / length_B if stage.length_normalised else torch.ones_like(length_B)
        chosen_P, rejected_P = (policy_B * scale_B).chunk(2)
        reference_chosen_P, reference_rejected_P = (reference_B * scale_B).chunk(2)
        losses = preference_loss(
            chosen_P, rejected_P, reference_chosen_P, reference_rejected_P, kind=stage.loss, beta=stage.beta
        )
        nll_P = nll_loss(policy_B.chunk(2)[0], length_B.chunk(2)[0])
        loss_P = losses.losses_P + stage.nll_weight * nll_P
        if stage.anchor_weight:
            loss_P = loss_P + stage.anchor_weight * anchor_loss(chosen_P, reference_chosen_P, beta=stage.beta)
        sums = {
            "preference": losses.losses_P.detach().sum(),
            "nll": nll_P.detach().sum(),
            "margin": losses.margins_P.sum(),
            "chosen_reward": losses.chosen_rewards_P.sum(),
            "rejected_reward": losses.rejected_rewards_P.sum(),
            "preferred": (losses.margins_P > 0).float().sum(),
        }
        return loss_P.sum(), sums

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        stage = self._stage
        assert isinstance(stage, PreferenceStage)
        if stage.reference == "teacher":
            return batch["reference_logp_B"]
        if self._reference is None:
            return torch.zeros_like(batch["reference_logp_B"])
        with torch.no_grad():
            hidden_RH = hidden_response_rows(self._reference, batch)
            return self._sequence_logprobs(self._reference, hidden_RH, batch)

    def _sequence_logprobs(self, model: Any, hidden_RH: Tensor, batch: Batch) -> Tensor:
        weight_VH = model.lm_head.weight[: self._vocab_size]
        num_sequences = len(batch["length_B"])
        return sequence_logprobs(
            hidden_RH, weight_VH, batch["label_ids_R"], batch["sequence_R"], num_sequences, self._stage.chunk_rows
        )

    def _routing_losses(self, router_logits: list[Tensor], batch: Batch) -> Tensor:
        stage = self._stage
        assert isinstance(stage, D2SStage | PreferenceStage)
        mask_N = batch["attention_mask_BS"].flatten().bool()
        num_experts_per_tok = text_config(self.model).num_experts_per_tok
        balance = load_balancing_loss(router_logits, mask_N, num_experts_per_tok)
        self._sums["balance"] += float(balance.detach()) / self.current_gradient_accumulation_steps
        loss = stage.balance_weight * balance
        if isinstance(stage, D2SStage) and stage.z_loss_weight:
            loss = loss + stage.z_loss_weight * router_z_loss(router_logits, mask_N)
        if (self.state.global_step + 1) % self._stage.log_every == 0:
            self._routing = routing_statistics(router_logits, mask_N, num_experts_per_tok)
        return loss

    # ---- metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Appends one line to the stage's metrics: means over the steps since the last line."""
        if "grad_norm" not in logs:  # Trainer's closing summary
            return
        step = self.state.global_step
        num_steps = self._stage.log_every
        record: dict[str, Any] = {"step": step, **{name: value / num_steps for name, value in self._sums.items()}}
        record["grad_norm"], record["learning_rate"] = logs["grad_norm"], logs["learning_rate"]
        if self._routing:
            record["experts"] = [
                {"load": layer.load_E.tolist(), "entropy": layer.entropy, "dead": layer.num_dead}
                for layer in self._routing
            ]
        self._sums.clear()
        self._shown = {name: f"{record[name]:.3g}" for name in ("loss", "kl", "margin") if name in record}
        if self.is_world_process_zero():
            with (self._stage_dir / METRICS).open("a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")

    def _latest(self) -> dict[str, Any]:
        return self._shown

    def forget_metrics_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed stage will do again."""
        path = self._stage_dir / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._stage_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        self._staging = self._stage_dir / ".building"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            building, self._staging = self._staging, None
        if self.is_world_process_zero():
            publish_folder(building / name, self._stage_dir / name)
            prune_checkpoints(self._stage_dir, _KEPT_CHECKPOINTS)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trainable tensors; what is frozen is where the stage began."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trainable(self.model), folder / _TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _TRAINABLE)
        target = _trainable(self.model)
        if saved.keys() != target.keys():
            raise TrainingError(
                f"{resume_from_checkpoint}: holds other trainable tensors than stage {self._stage.type} trains: "
                f"{sorted(saved.keys() ^ target.keys())[:4]}; remove {self._stage_dir} to train the stage again"
            )
        with torch.no_grad():
            for name, tensor in saved.items():
                target[name].copy_(tensor)


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, advance: Callable[..., None], figures: Callable[[], dict[str, Any]]) -> None:
        self._advance, self._figures = advance, figures

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1, **self._figures())


def _trainable(model: Any) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
