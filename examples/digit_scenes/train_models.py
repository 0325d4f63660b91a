"""Trains the demo's models: tokenizer, vision tower, text-only student language model, teacher; takes figures.

    python -m examples.digit_scenes.train_models --out examples/digit_scenes/models

Parts are made in order, each from the files of the ones before it; a part that `figures.json` records is left
alone unless it is named by --only. The order is the order of a real LLaVA: a tower that can see is trained first
and frozen, a language model that has only read comes apart from it, and only then a projector joins the two.
At this size a LLaVA trained in one piece learns to name colours but never to read. The teacher learns from
the same faulty stream that `make` writes, scenes it will never see again in the same pixels.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from examples.digit_scenes.world import Scene

PARTS = ("tokenizer", "tower", "lm", "teacher", "figures")
DEFAULT_STEPS = {"tower": 2500, "lm": 500, "teacher": 2000}
_CORPUS_SCENES = 4000
_LOG_EVERY = 100


class Stopwatch:
    """Counts steps and prints loss and rate, so that a long run can be judged while it runs."""

    def __init__(self, part: str, steps: int, unit: str) -> None:
        self.part, self.steps, self.unit = part, steps, unit
        self.started = self.last = time.perf_counter()
        self.amount = 0

    def tick(self, step: int, loss: torch.Tensor, amount: int) -> None:
        """Count one step; every hundredth is printed."""
        self.amount += amount
        if step % _LOG_EVERY == 0 or step == self.steps:
            now = time.perf_counter()
            rate = self.amount / (now - self.last)
            elapsed = now - self.started
            click.echo(
                f"{self.part}: step {step}/{self.steps}  loss {loss.item():.4f}  "
                f"{rate:.0f} {self.unit}/s  {elapsed:.0f} s"
            )
            self.last, self.amount = now, 0

    @property
    def seconds(self) -> float:
        """Seconds since the start, one decimal."""
        return round(time.perf_counter() - self.started, 1)


def draw_scenes(count: int, seed: int, stream: int) -> list[Scene]:
    """Scenes of training digits; streams of one seed are independent."""
    import numpy as np
    from rich.progress import track

    from examples.digit_scenes.world import draw_scene

    rng = np.random.default_rng([seed, stream])
    return [draw_scene("train", rng) for _ in track(range(count), description="drawing scenes")]


def corpus(seed: int) -> Iterator[tuple[str, str]]:
    """Questions and (faulty) answers without their pictures."""
    import numpy as np

    from examples.digit_scenes.packing import draw_turns
    from examples.digit_scenes.questions import FaultRates
    from examples.digit_scenes.world import draw_layout

    rng = np.random.default_rng([seed, 1])
    for _ in range(_CORPUS_SCENES):
        yield from draw_turns(draw_layout(rng), FaultRates(), rng)


def make_tokenizer(out: Path, seed: int) -> dict[str, Any]:
    """Learn the tokenizer and put it, with the processor, into each model folder."""
    from examples.digit_scenes.tokenizer import build_processor, save_processor, train_tokenizer

    tokenizer = train_tokenizer(text for turn in corpus(seed) for text in turn)
    for name in ("student_lm", "vision_tower", "teacher"):
        save_processor(build_processor(tokenizer), out / name)
    return {"entries": len(tokenizer)}


def train_tower(out: Path, seed: int, steps: int, device: str, batch: int = 128) -> dict[str, Any]:
    """Teach the tower to say, at each patch, which digit and colour its cell holds; the heads are then dropped."""
    import numpy as np
    import torch
    from torch import nn

    from examples.digit_scenes import networks
    from examples.digit_scenes.world import COLOURS, DIGITS

    torch.manual_seed(seed)
    scenes = draw_scenes(30_000, seed, stream=2)
    pixels_NHWC, labels_NC2 = _seen(scenes)
    tower = networks.build_tower().to(device)
    width = networks.TOWER["hidden_size"]
    heads = nn.ModuleList([nn.Linear(width, len(DIGITS) + 1), nn.Linear(width, len(COLOURS) + 1)]).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    cell_of_patch_P = _cell_of_patch()
    watch = Stopwatch("tower", steps, "scenes")
    rng = np.random.default_rng([seed, 3])
    for step in range(1, steps + 1):
        _set_learning_rate(optimizer, 2e-3, step, steps)
        chosen_B = torch.from_numpy(rng.integers(len(scenes), size=batch))
        inputs = networks.normalise(pixels_NHWC[chosen_B].to(device))
        hidden_BPH = tower(pixel_values=inputs, output_hidden_states=True).hidden_states[networks.FEATURE_LAYER][:, 1:]
        labels_BP2 = labels_NC2[chosen_B][:, cell_of_patch_P].to(device)
        losses = [
            nn.functional.cross_entropy(head(hidden_BPH).flatten(0, 1), labels_BP2[..., i].flatten())
            for i, head in enumerate(heads)
        ]
        loss = torch.stack(losses).sum()
        _step(optimizer, parameters, loss)
        watch.tick(step, loss, batch)
    networks.save_canonical(tower, out / "vision_tower")
    return {"steps": steps, "seconds": watch.seconds, "cells_read": _cells_read(tower, heads, device)}


def train_language_model(out: Path, seed: int, steps: int, device: str, batch: int = 64) -> dict[str, Any]:
    """The student's language model: it has read the corpus, questions and answers, and seen nothing."""
    import numpy as np
    import torch
    from torch import nn
    from transformers import Qwen3ForCausalLM

    from examples.digit_scenes import networks
    from examples.digit_scenes.packing import encode_turn

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(out)
    user = tokenizer.convert_tokens_to_ids("<user>")
    turns = [[user, *encode_turn(tokenizer, *turn).ids] for turn in corpus(seed)]
    model = Qwen3ForCausalLM(networks.language_config(networks.STUDENT, tokenizer)).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    watch = Stopwatch("lm", steps, "tokens")
    rng = np.random.default_rng([seed, 4])
    for step in range(1, steps + 1):
        _set_learning_rate(optimizer, 3e-3, step, steps)
        rows = [turns[i] for i in rng.integers(len(turns), size=batch)]
        longest = max(map(len, rows))
        ids_BS = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows], device=device)
        logits_BSV = model(input_ids=ids_BS).logits
        loss = nn.functional.cross_entropy(
            logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id
        )
        _step(optimizer, parameters, loss)
        watch.tick(step, loss, ids_BS.numel())
    networks.save_canonical(model, out / "student_lm")
    return {"steps": steps, "seconds": watch.seconds, "last_loss": round(loss.item(), 4)}


def train_teacher(
    out: Path, seed: int, steps: int, device: str, num_scenes: int = 16_000, batch: int = 8
) -> dict[str, Any]:
    """Join the frozen tower and a fresh, larger language model, on packed questions with training faults."""
    import numpy as np
    import torch
    from torch import nn
    from transformers import CLIPVisionModel

    from examples.digit_scenes import networks
    from examples.digit_scenes.packing import draw_turns, encode_turn, pack
    from examples.digit_scenes.questions import FaultRates
    from examples.digit_scenes.tokenizer import TOKENS_PER_IMAGE

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(out)
    tower = CLIPVisionModel.from_pretrained(out / "vision_tower").to(device).eval()
    teacher = networks.build_teacher(tokenizer, tower).to(device)
    scenes = draw_scenes(num_scenes, seed, stream=5)
    pixels_NHWC = torch.from_numpy(np.stack([scene.pixels_HWC for scene in scenes]))
    # The tower is frozen, so each picture goes through it once.
    features_NPH = networks.tower_features(tower, pixels_NHWC.to(device))
    encoded = lru_cache(maxsize=50_000)(lambda question, answer: encode_turn(tokenizer, question, answer))

    core = teacher.model
    parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    watch = Stopwatch("teacher", steps, "scenes")
    rng = np.random.default_rng([seed, 6])
    for step in range(1, steps + 1):
        _set_learning_rate(optimizer, 1.5e-3, step, steps)
        chosen = rng.integers(len(scenes), size=batch)
        turns = [[encoded(*turn) for turn in draw_turns(scenes[i].objects, FaultRates(), rng)] for i in chosen]
        packed = pack(turns, tokenizer)
        embeds_BSH = core.language_model.embed_tokens(packed.ids_BS.to(device))
        images_BPH = core.multi_modal_projector(features_NPH[torch.from_numpy(chosen).to(device)])
        embeds_BSH = torch.cat([embeds_BSH[:, :1], images_BPH, embeds_BSH[:, 1 + TOKENS_PER_IMAGE :]], dim=1)
        hidden_BSH = core.language_model(
            inputs_embeds=embeds_BSH,
            attention_mask=packed.may_attend_B1SS.to(device),
            position_ids=packed.positions_BS.to(device),
            use_cache=False,
        ).last_hidden_state
        logits_NV = teacher.lm_head(hidden_BSH.flatten(0, 1)[packed.predicting_N.to(device)])
        loss = nn.functional.cross_entropy(logits_NV, packed.targets_N.to(device))
        _step(optimizer, parameters, loss)
        watch.tick(step, loss, batch)
    networks.save_canonical(teacher, out / "teacher")
    return {"steps": steps, "scenes_per_step": batch, "distinct_scenes": num_scenes, "seconds": watch.seconds}


def load_tokenizer(out: Path) -> Any:
    """The tokenizer that the parts share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(out / "student_lm")


def _seen(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels N x H x W x C uint8, and for each of the four cells (digit, colour), 0 for nothing: N x 4 x 2."""
    import numpy as np
    import torch

    from examples.digit_scenes.world import COLOURS, DIGITS, PLACES

    labels_NC2 = np.zeros((len(scenes), len(PLACES), 2), dtype=np.int64)
    for n, scene in enumerate(scenes):
        for placed in scene.objects:
            labels_NC2[n, placed.cell] = 1 + DIGITS.index(placed.digit), 1 + list(COLOURS).index(placed.colour)
    return torch.from_numpy(np.stack([scene.pixels_HWC for scene in scenes])), torch.from_numpy(labels_NC2)


def _cell_of_patch() -> torch.Tensor:
    """The cell (0-3) of each of the 16 patches, both in reading order."""
    import torch

    rows_P, columns_P = torch.arange(16) // 4, torch.arange(16) % 4
    return (rows_P // 2) * 2 + columns_P // 2


def _cells_read(tower: Any, heads: Any, device: str) -> float:
    """Share of the occupied cells of fresh scenes of *test* digits whose digit the tower's heads name."""
    import numpy as np
    import torch

    from examples.digit_scenes import networks
    from examples.digit_scenes.world import draw_scene

    rng = np.random.default_rng(0)
    pixels_NHWC, labels_NC2 = _seen([draw_scene("test", rng) for _ in range(500)])
    with torch.inference_mode():
        features_NPH = networks.tower_features(tower.eval(), pixels_NHWC.to(device))
        scores_NPD = heads[0](features_NPH).log_softmax(-1).cpu()
    cells_P = _cell_of_patch()
    guessed_NC = torch.stack([scores_NPD[:, cells_P == cell].sum(1).argmax(-1) for cell in range(4)], dim=1)
    occupied_NC = labels_NC2[..., 0] > 0
    return round((guessed_NC == labels_NC2[..., 0])[occupied_NC].float().mean().item(), 4)


def _set_learning_rate(optimizer: Any, peak: float, step: int, steps: int, warmup: float = 0.05) -> None:
    """Linear warm-up, then cosine to zero."""
    done = step / steps
    factor = done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = peak * factor


def _step(optimizer: Any, parameters: list[Any], loss: Any) -> None:
    import torch

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("examples/digit_scenes/models"), show_default=True)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Make these parts, even when they are there.")
@click.option(
    "--steps", type=click.IntRange(1), help="Optimiser steps of the parts that are trained [defaults differ]."
)
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="CPU threads of torch.")
def main(out: Path, only: tuple[str, ...], steps: int | None, device: str, seed: int, threads: int) -> None:
    # Waiting threads sleep rather than spin: on cores shared with others, spinning tripled the cost of a step.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from examples.digit_scenes.evaluate import evaluate_model

    torch.set_num_threads(threads)
    makers: dict[str, Callable[[int], dict[str, Any]]] = {
        "tokenizer": lambda _: make_tokenizer(out, seed),
        "tower": lambda steps: train_tower(out, seed, steps, device),
        "lm": lambda steps: train_language_model(out, seed, steps, device),
        "teacher": lambda steps: train_teacher(out, seed, steps, device),
        "figures": lambda _: evaluate_model(out / "teacher", device),
    }
    log_path = out / "figures.json"
    log: dict[str, Any] = json.loads(log_path.read_text()) if log_path.exists() else {}
    for part, make_part in makers.items():
        if part not in only and (only or part in log):
            continue
        made = make_part(steps or DEFAULT_STEPS.get(part, 0))
        log[part] = {"seed": seed, "device": device, **made}
        if part == "teacher":
            log.pop("figures", None)  # they were another teacher's
        log_path.write_text(json.dumps(log, indent=2, sort_keys=True) + "\n")
        click.echo(f"{part}: {json.dumps(log[part])}")
    click.echo(f"{out}: complete" if set(log) == set(PARTS) else f"{out}: has {', '.join(sorted(log))}")


if __name__ == "__main__":
    main()
