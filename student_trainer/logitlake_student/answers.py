"""A checkpoint asked: greedy answers to prompts, and forward_kl against the teacher's held-out rows.

Any checkpoint that `load_student` takes can be asked, the teacher too. Answers are greedy, hence deterministic, and
do not depend on the batch: prompts are padded on the left, and masked out. Short answers wait for long ones only as
far as the caller lets them share a batch; a batch ends as soon as all of its answers have ended. The divergence goes
through the collator and the loss that train the student, so it is the same quantity as the training curve's `kl`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logitlake_shared.data_formats import ImageRef, Messages
from logitlake_shared.pixels import image_processor_sha256, load_pixels
from logitlake_shared.reader import LakeDataset
from logitlake_shared.rendering import Renderer
from logitlake_student.data import SampleCollator, StudentInputs, check_student_fits, tokens_per_image
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.models.load import load_student
from logitlake_student.models.parts import projector_prefix
from logitlake_student.trainer import hidden_response_rows

__all__ = ["Examinee", "Prompt", "greedy_answers", "kl_to_teacher", "load_examinee"]

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
    inputs: StudentInputs


def load_examinee(model_dir: Path, device: str) -> Examinee:
    """The checkpoint in `model_dir`, float32, in evaluation mode. Raises `ConfigError`."""
    from transformers import GenerationConfig

    model = load_student(model_dir, dtype=torch.float32).to(device).eval()
    renderer = Renderer(model_dir)
    # What a checkpoint recommends for chatting (temperature, penalties) must not move a figure.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=renderer.eos_id, pad_token_id=renderer.pad_id
    )
    inputs = StudentInputs(
        pad_id=renderer.pad_id,
        image_token_id=renderer.image_token_id,
        tokens_per_image=tokens_per_image(model.config) if projector_prefix(model) is not None else 0,
        load_pixels=load_pixels(model_dir) if image_processor_sha256(model_dir) is not None else None,
    )
    return Examinee(model, renderer, inputs)


@torch.inference_mode()
def greedy_answers(
    examinee: Examinee, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int, advance: Advance
) -> list[str]:
    """The answer to each prompt, of at most `max_new_tokens` tokens; `advance(n)` is called after each batch of n.

    Raises `DataError` when a prompt's placeholders are not its images, `ImageError` for one that does not decode.
    """
    prompt_ids = [examinee.renderer.render_prompt(messages) for messages, _ in prompts]
    # Prompts of one length need no padding; a stable order makes the batches the same every time.
    order = sorted(range(len(prompts)), key=lambda place: len(prompt_ids[place]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids_BS, mask_BS = examinee.inputs.prompts([(prompt_ids[place], len(prompts[place][1])) for place in batch])
        given = {"input_ids": ids_BS, "attention_mask": mask_BS}
        pixels_NCHW = examinee.inputs.pixels([image.load() for place in batch for image in prompts[place][1]])
        if pixels_NCHW is not None:
            given["pixel_values"] = pixels_NCHW
        device = examinee.model.device
        output_ids_BS = examinee.model.generate(
            **{name: tensor.to(device) for name, tensor in given.items()}, max_new_tokens=max_new_tokens
        )
        for place, output_ids_S in zip(batch, output_ids_BS[:, ids_BS.shape[1] :].tolist(), strict=True):
            answers[place] = examinee.renderer.decode(_up_to(examinee.renderer.eos_id, output_ids_S))
        advance(len(batch))
    return answers


@torch.inference_mode()
def kl_to_teacher(examinee: Examinee, dataset: LakeDataset, *, batch_size: int, advance: Advance) -> float:
    """forward_kl = KL(teacher‖student) in nats per response token: the exact tail-bucket divergence, mean over tokens.

    For the teacher itself it is what the codec cost. Raises `FingerprintMismatchError` when checkpoint and lake do
    not belong together.
    """
    check_student_fits(dataset.spec, dataset, examinee.renderer)
    collate = SampleCollator(examinee.inputs, dataset.spec.codec)
    weight_VH = examinee.model.lm_head.weight[: examinee.renderer.vocab_size]
    kl_sum, num_tokens = 0.0, 0
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[position] for position in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: tensor.to(examinee.model.device) for name, tensor in collate(samples).items()}
        teacher = TeacherBatch(
            topk_ids_RK=batch["topk_ids_RK"],
            topk_logprobs_RK=batch["topk_logprobs_RK"],
            log_tail_mass_R=batch["log_tail_mass_R"],
            label_ids_R=batch["label_ids_R"],
        )
        hidden_RH = hidden_response_rows(examinee.model, batch)
        _, sums = distillation_loss(hidden_RH, weight_VH, teacher, kl_weight=1.0, ce_weight=0.0, chunk_rows=_CHUNK_ROWS)
        kl_sum += float(sums.kl_sum)
        num_tokens += len(batch["label_ids_R"])
        advance(len(samples))
    return kl_sum / num_tokens


def _up_to(eos_id: int, ids_S: list[int]) -> list[int]:
    """The ids before EOS. What follows it is padding, which for some checkpoints is an ordinary token."""
    return ids_S[: ids_S.index(eos_id)] if eos_id in ids_S else ids_S
