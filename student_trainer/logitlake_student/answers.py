"""A checkpoint asked: greedy answers to prompts, and forward_kl against the teacher's held-out rows.

Any checkpoint that `load_student` takes can be asked, the teacher too. Answers are greedy, hence deterministic, and
do not depend on the batch: prompts are padded on the left, and masked out. Short answers wait for long ones only as
far as the caller lets them share a batch; a batch ends as soon as all of its answers have ended. One answer can also be
followed while it is written, and drawn instead of greedy (`stream_answer`). The divergence goes through the collator
and the loss that train the student, so it is the same quantity as the training curve's `forward_kl`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logitlake_shared.data_formats import ImageRef, Messages
from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rendering import Renderer
from logitlake_shared.rows import LakeSample
from logitlake_student.data import Batch, SampleCollator, StudentInputs, check_student_fits
from logitlake_student.losses.balance import ExpertCounts, count_experts
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.model_inputs import Expanded, ModelInputs
from logitlake_student.models.forward import hidden_response_rows
from logitlake_student.models.load import load_student
from logitlake_student.models.parts import text_config
from logitlake_student.models.routing import RouterRecorder

__all__ = [
    "Examinee",
    "HeldOut",
    "Prompt",
    "Streamed",
    "forced_batches",
    "greedy_answers",
    "held_out",
    "kl_to_teacher",
    "load_examinee",
    "stream_answer",
]

# Response rows whose logits are alive at one time.
_CHUNK_ROWS = 1024

Advance = Callable[[int], None]
Prompt = tuple[Messages, Sequence[ImageRef]]
"""the turns up to the one to be answered, and the images in the order of their placeholders"""


@dataclass(frozen=True)
class Examinee:
    """A loaded checkpoint with what makes its inputs."""

    model: Any
    renderer: Renderer
    model_inputs: ModelInputs

    def prompt(self, messages: Messages, images: Sequence[ImageRef]) -> Expanded:
        """A conversation that waits for an answer, as the model sees it.

        Raises `DataError` when placeholders are not images or the prompt is longer than the model's context,
        `ImageError` for an image that does not decode.
        """
        ids_S = self.renderer.render_prompt(messages)
        encoded = [image.load() for image in images]
        sequence = self.model_inputs.expand(ids_S, np.zeros(len(ids_S), np.bool_), encoded)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(sequence.ids_S) >= context:
            raise DataError(
                f"the prompt has {len(sequence.ids_S)} tokens with its images expanded, the model was made for "
                f"{context}; shorten it"
            )
        return sequence


def load_examinee(model_dir: Path, device: str, dtype: torch.dtype = torch.float32) -> Examinee:
    """The checkpoint in `model_dir`, in evaluation mode. Raises `ConfigError`."""
    from transformers import GenerationConfig

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device here; use cpu, or a CUDA build of torch")
    model = load_student(model_dir, dtype=dtype).to(device).eval()
    renderer = Renderer(model_dir)
    # What a checkpoint recommends for chatting (temperature, penalties) must not move a figure.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=renderer.eos_id, pad_token_id=renderer.pad_id
    )
    return Examinee(model, renderer, ModelInputs.of_checkpoint(model_dir, model.config))


@torch.inference_mode()
def greedy_answers(
    examinee: Examinee, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int, advance: Advance
) -> list[str]:
    """The answer to each prompt, of at most `max_new_tokens` tokens; `advance(n)` is called after each batch of n.

    Raises what `Examinee.prompt` does.
    """
    lengths = [len(examinee.renderer.render_prompt(messages)) for messages, _ in prompts]
    # Prompts of one length need no padding; a stable order makes the batches the same every time.
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = [examinee.prompt(*prompts[place]) for place in places]
        given = examinee.model_inputs.batch(batch, pad_id=examinee.renderer.pad_id, model=examinee.model)
        output_ids_BS = examinee.model.generate(**given, max_new_tokens=max_new_tokens)
        new_ids_BS = output_ids_BS[:, given["input_ids"].shape[1] :].tolist()
        for place, new_ids_S in zip(places, new_ids_BS, strict=True):
            answers[place] = examinee.renderer.decode(_up_to(examinee.renderer.eos_id, new_ids_S))
        advance(len(batch))
    return answers


@dataclass(frozen=True)
class Streamed:
    """One answer, when it has ended."""

    text: str
    num_tokens: int
    """EOS included"""
    is_cut: bool
    """it did not end, `max_new_tokens` did"""


@torch.inference_mode()
def stream_answer(
    examinee: Examinee,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    show: Callable[[str], None],
    temperature: float = 0.0,
    seed: int = 0,
) -> Streamed:
    """One answer; `show(text)` is called with each piece of it as soon as it is text.

    Greedy at temperature 0, else drawn with `seed` from the whole distribution. Raises what `Examinee.prompt` does.
    """
    renderer = examinee.renderer
    given = examinee.model_inputs.batch([examinee.prompt(*prompt)], pad_id=renderer.pad_id, model=examinee.model)
    pieces = _Pieces(renderer, show)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    torch.manual_seed(seed)
    examinee.model.generate(**given, max_new_tokens=max_new_tokens, streamer=pieces, **drawn)
    return Streamed(pieces.text, len(pieces.ids), renderer.eos_id not in pieces.ids)


class _Pieces:
    """What transformers calls a streamer: is given ids as they come, shows the text that they have become."""

    def __init__(self, renderer: Renderer, show: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._renderer, self._show = renderer, show
        self._saw_prompt = False

    def put(self, ids: Tensor) -> None:
        """The prompt's ids first, then each new one."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.ids += ids.flatten().tolist()
        self._tell(self._renderer.decode(_up_to(self._renderer.eos_id, self.ids)))

    def end(self) -> None:
        """What was held back is shown as it is."""
        self._tell(self._renderer.decode(_up_to(self._renderer.eos_id, self.ids)), at_the_end=True)

    def _tell(self, text: str, *, at_the_end: bool = False) -> None:
        # A character may take several tokens: until the last has come it is a replacement character.
        if text.endswith("\ufffd") and not at_the_end:
            return
        if len(text) > len(self.text):
            self._show(text[len(self.text) :])
            self.text = text


@dataclass(frozen=True)
class HeldOut:
    """What a checkpoint makes of a lake's held-out rows."""

    kl: float
    """forward_kl = KL(teacher‖student) in nats per response token: the tail-bucket divergence, mean over tokens"""
    experts_by_task: dict[str, list[list[float]]]
    """by task, of each sparse layer, the share of the tokens' choices that each expert got; empty for a dense model"""


def kl_to_teacher(examinee: Examinee, dataset: LakeDataset, *, batch_size: int, advance: Advance) -> float:
    """See `HeldOut.kl`. For the teacher itself it is what the codec cost. Raises as `held_out` does."""
    return held_out(examinee, dataset, batch_size=batch_size, advance=advance).kl


@torch.inference_mode()
def held_out(examinee: Examinee, dataset: LakeDataset, *, batch_size: int, advance: Advance) -> HeldOut:
    """Goes through the rows once. Raises `FingerprintMismatchError` when checkpoint and lake do not belong together."""
    weight_VH = examinee.model.lm_head.weight[: examinee.renderer.vocab_size]
    kl_sum, num_tokens = 0.0, 0
    counts: dict[str, ExpertCounts] = {}
    for samples, batch, teacher in forced_batches(examinee, dataset, batch_size=batch_size):
        with RouterRecorder(examinee.model) as recorder:
            hidden_RH = hidden_response_rows(examinee.model, batch)
        _, sums = distillation_loss(
            hidden_RH, weight_VH, teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=_CHUNK_ROWS
        )
        if logits := recorder.logits():
            tasks = [sample.task for sample in samples]
            k = text_config(examinee.model).num_experts_per_tok
            for task, counted in _counts_by_task(logits, batch["attention_mask"], tasks, k).items():
                counts[task] = counts[task] + counted if task in counts else counted
        kl_sum += float(sums.divergence_sum)
        num_tokens += len(batch["label_ids_R"])
        advance(len(samples))
    shares = {
        task: counted.assigned_LE / counted.assigned_LE.sum(dim=1, keepdim=True) for task, counted in counts.items()
    }
    return HeldOut(kl_sum / num_tokens, {task: shares[task].tolist() for task in sorted(shares)})


def forced_batches(
    examinee: Examinee, dataset: LakeDataset, *, batch_size: int
) -> Iterator[tuple[list[LakeSample], Batch, TeacherBatch]]:
    """The samples in the order of their ids, as batches on the model's device with the teacher's rows.

    Raises `FingerprintMismatchError` when checkpoint and lake do not belong together, before the first.
    """
    check_student_fits(dataset.spec, dataset, examinee.renderer)
    inputs = StudentInputs(examinee.model_inputs, pad_id=examinee.renderer.pad_id)
    collate = SampleCollator(inputs, dataset.spec.codec)
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[position] for position in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: tensor.to(examinee.model.device) for name, tensor in collate(samples).items()}
        teacher = TeacherBatch(
            topk_ids_RK=batch["topk_ids_RK"],
            topk_logprobs_RK=batch["topk_logprobs_RK"],
            log_tail_mass_R=batch["log_tail_mass_R"],
            label_ids_R=batch["label_ids_R"],
        )
        yield samples, batch, teacher


def _counts_by_task(
    router_logits: Sequence[Tensor], attention_mask_BS: Tensor, tasks: Sequence[str], num_experts_per_tok: int
) -> dict[str, ExpertCounts]:
    """Which experts the real tokens of each task's samples chose, image tokens included."""
    counts = {}
    for task in set(tasks):
        is_task_B = torch.tensor([other == task for other in tasks], device=attention_mask_BS.device)
        mask_N = (attention_mask_BS.bool() & is_task_B[:, None]).flatten()
        counts[task] = count_experts(router_logits, mask_N, num_experts_per_tok)
    return counts


def _up_to(eos_id: int, ids_S: list[int]) -> list[int]:
    """The ids before EOS. What follows it is padding, which for some checkpoints is an ordinary token."""
    return ids_S[: ids_S.index(eos_id)] if eos_id in ids_S else ids_S
