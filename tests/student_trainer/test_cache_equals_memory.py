"""Two roads, one student: through capture, lake, loader and trainer, or beside a teacher that is in memory.

The second road is as plain as can be: one conversation at a time, the teacher's logits over the whole vocabulary,
`F.kl_div`, `torch.optim.AdamW`. It shares with the first the tokenizer, the order of the samples, and nothing else.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from logitlake_shared.pixels import PixelLoader, load_pixels
from logitlake_shared.reader import LakeDataset
from logitlake_shared.reader.order import Layout
from logitlake_shared.rendering import Renderer
from logitlake_student.data import EpochOrder
from logitlake_student.models.load import load_student
from logitlake_student.stages import freeze_for_stage

STEPS, BATCH_SIZE, LEARNING_RATE = 5, 4, 1e-3

# Losses of about 1 nat in float32, summed in another order and padded differently: a hundred times what was seen.
LOSS_TOLERANCE = 1e-5
# AdamW divides by the gradient's size, so that where a gradient is nearly 0 its rounding error may become a step: any
# one element is held to a tenth of a step, all of them on average to rounding.
MEAN_WEIGHT_TOLERANCE = 1e-7
MAX_WEIGHT_TOLERANCE = LEARNING_RATE / 10


class LiveRoad:
    """A conversation's tokens for any LLaVA, written down once more."""

    def __init__(self, records: list[dict[str, Any]], image_root: Path, model_dir: Path) -> None:
        self.records = {record["id"]: record for record in records}
        self.image_root, self.renderer = image_root, Renderer(model_dir)

    def tokens(self, sample_id: str, tokens_per_image: int) -> tuple[list[int], list[int]]:
        """Ids with images expanded, and the positions of the response tokens."""
        ids: list[int] = []
        responses: list[int] = []
        messages: list[dict[str, Any]] = []
        for turn in self.records[sample_id]["conversations"]:
            if turn["from"] == "human":
                text = turn["value"].replace("<image>\n", "")
                image = [{"type": "image"}] if text != turn["value"] else []
                messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
                prompt = self.renderer.render_prompt(messages).tolist()
                place = prompt.index(self.renderer.image_token_id) if "image" in self.records[sample_id] else None
                if place is not None:
                    prompt[place : place + 1] = [prompt[place]] * tokens_per_image
                assert prompt[: len(ids)] == ids
                ids = prompt
            else:
                messages.append({"role": "assistant", "content": turn["value"]})
                response = self.renderer.render_response(turn["value"]).tolist()
                responses += range(len(ids), len(ids) + len(response))
                ids = ids + response
        return ids, responses

    def response_logits(self, model: Any, sample_id: str, pixels: PixelLoader) -> torch.Tensor:
        """[R, V]: what `model` says of each response token, from its own forward pass."""
        patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        ids, responses = self.tokens(sample_id, patches)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if image := self.records[sample_id].get("image"):
            inputs["pixel_values"] = torch.from_numpy(pixels([(self.image_root / image).read_bytes()]))
        logits_SV = model(**inputs).logits[0, :, : self.renderer.vocab_size]
        return torch.stack([logits_SV[position - 1] for position in responses])


@pytest.fixture
def live_road(student_records: list[dict[str, Any]], student_data: Path, tiny_teacher: Path) -> LiveRoad:
    """The training data of `student_lake`, from the files that it was captured from."""
    return LiveRoad(student_records, student_data, tiny_teacher)


def train_beside_the_teacher(road: LiveRoad, teacher_dir: Path, student_dir: Path) -> tuple[list[float], Any]:
    """Losses of each step and the trained student."""
    teacher = load_student(teacher_dir, dtype=torch.float32).eval()
    student = load_student(student_dir, dtype=torch.float32)
    freeze_for_stage(student, "d2d")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    warmup_steps = 1  # 0.03 of five steps, rounded up
    pixels = load_pixels(student_dir)
    ids = sorted(record["id"] for record in road.records.values() if record["split"] == "train")
    order = list(EpochOrder(Layout.of_one_group(len(ids)), STEPS * BATCH_SIZE, seed=0))
    losses = []
    for step in range(STEPS):
        if step < warmup_steps:
            scale = step / warmup_steps
        else:
            progress = torch.tensor((step - warmup_steps) / (STEPS - warmup_steps), dtype=torch.float64)
            scale = float(0.5 * (1 + torch.cos(torch.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * scale
        total = torch.zeros(())
        num_tokens = 0
        for position in order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]:
            with torch.no_grad():
                teacher_RV = road.response_logits(teacher, ids[position], pixels)
            student_RV = road.response_logits(student, ids[position], pixels)
            total = total + F.kl_div(
                torch.log_softmax(student_RV, -1), torch.log_softmax(teacher_RV, -1), reduction="sum", log_target=True
            )
            num_tokens += len(student_RV)
        loss = total / num_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, student


def test_training_through_the_cache_is_training_beside_the_teacher(
    student_world: Any,
    tiny_teacher: Path,
    live_road: LiveRoad,
    metrics_of: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """With the whole vocabulary in the cache, every loss and every weight is that of a teacher in memory."""
    vocabulary = live_road.renderer.vocab_size
    dataset = LakeDataset(student_world.lake, "main", split="train")
    assert all((dataset[position].rows.k_T == vocabulary).all() for position in range(len(dataset)))
    stage = {"type": "d2d", "steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "save_every": 5}
    folder = student_world.train(student_world.train_config(stage))
    cached = [record["loss"] for record in metrics_of(folder)]
    live, student = train_beside_the_teacher(live_road, tiny_teacher, student_world.checkpoint)
    assert len(cached) == STEPS
    assert live[0] > live[-1] > 0.1  # there was something to learn, and some is left
    assert cached == pytest.approx(live, abs=LOSS_TOLERANCE)

    there = load_student(folder / "model", dtype=torch.float32).state_dict()
    begun = load_student(student_world.checkpoint, dtype=torch.float32).state_dict()
    differences = {name: (tensor - there[name]).abs() for name, tensor in student.state_dict().items()}
    moved = {name for name, tensor in there.items() if not torch.equal(tensor, begun[name])}
    assert any("language_model" in name for name in moved)
    assert any("multi_modal_projector" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    for name, difference in differences.items():
        assert difference.max() <= MAX_WEIGHT_TOLERANCE, name
    everything = torch.cat([differences[name].flatten() for name in moved])
    assert everything.mean() <= MEAN_WEIGHT_TOLERANCE
