"""Writes `trained_parameters.txt`: every parameter of every kind of student, and which stages train it.

python -m tests.golden.make_trained_parameters

Four layers each; `d2s` and `preference` see the student upcycled in its first and third layer (a Llama in all). Layers
that are treated alike share a line. Nothing but names is taken from the models: they have no weights.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from logitlake_shared.errors import ConfigError
from logitlake_student.config import STAGE_ORDER
from logitlake_student.models.load import empty_model
from logitlake_student.models.sparse_config import sparse_config
from logitlake_student.stages import trainable_parameters

GOLDEN = Path(__file__).with_name("trained_parameters.txt")

_TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER |= {"image_size": 8, "patch_size": 4}
_QWEN_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
_QWEN_TOWER |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}

STUDENTS = {
    "LLaVA: CLIP, Qwen2 with a tied head -> Qwen2-MoE": ("llava", "clip_vision_model", "qwen2"),
    "LLaVA: SigLIP, Qwen3 -> Qwen3-MoE": ("llava", "siglip_vision_model", "qwen3"),
    "LLaVA: CLIP, Llama -> Mixtral": ("llava", "clip_vision_model", "llama"),
    "Qwen3-VL -> Qwen3-VL-MoE": ("qwen3_vl", "qwen3_vl_vision", "qwen3_vl_text"),
    "text only: Qwen3 -> Qwen3-MoE": (None, None, "qwen3"),
}


def trained_parameters() -> str:
    """The content of the golden file."""
    return "\n\n".join(f"{title}\n{_table(*kinds)}" for title, kinds in STUDENTS.items()) + "\n"


def _table(whole: str | None, tower: str | None, language_model: str) -> str:
    marks = _marks(whole, tower, language_model)
    # Names that differ in the number of a layer, by what the stages do with them.
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for name, stages in marks.items():
        found = re.search(r"\.(?:layers|blocks|deepstack_merger_list)\.(\d+)\.", name)
        place = (name if found is None else f"{name[: found.start(1)]}*{name[found.end(1) :]}", stages)
        alike[place].append("" if found is None else found[1])
    lines = ["  ".join([*STAGE_ORDER, "(x trains, . stays, blank: not there)"])]
    for (name, stages), numbers in alike.items():
        row = "  ".join(mark.center(len(stage)) for mark, stage in zip(stages, STAGE_ORDER, strict=True))
        lines.append(f"{row}  {name.replace('*', '[' + ' '.join(numbers) + ']')}")
    return "\n".join(lines)


def _marks(whole: str | None, tower: str | None, language_model: str) -> dict[str, tuple[str, ...]]:
    """By the name of a parameter, dense ones first, a mark a stage."""
    dense = _config(whole, tower, language_model)
    layers = "all" if language_model == "llama" else (0, 2)
    sparse = sparse_config(dense, 4, 2, layers, shared_expert=False)
    columns = []
    for stage in STAGE_ORDER:
        with torch.device("meta"):
            model = empty_model(dense if stage in ("init", "d2d") else sparse)
        try:
            trained = {name for name, _ in trainable_parameters(model, stage)}
        except ConfigError:  # a language model alone has no projector for `init`
            trained = set()
        columns.append({name: "x" if name in trained else "." for name, _ in model.named_parameters()})
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: tuple(column.get(name, " ") for column in columns) for name in names}


def _config(whole: str | None, tower: str | None, language_model: str) -> Any:
    from transformers import CONFIG_MAPPING

    tied = language_model == "qwen2"
    if whole == "qwen3_vl":
        return CONFIG_MAPPING[whole](text_config=_TINY, vision_config=_QWEN_TOWER, tie_word_embeddings=tied)
    text = CONFIG_MAPPING[language_model](**_TINY, tie_word_embeddings=tied)
    if whole is None:
        return text
    return CONFIG_MAPPING[whole](text_config=text, vision_config=CONFIG_MAPPING[tower](**_TOWER))


if __name__ == "__main__":
    GOLDEN.write_text(trained_parameters(), encoding="utf-8")
