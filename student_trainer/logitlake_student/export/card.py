"""The model card: what an export is, how to load it, how well it does, and where it comes from.

Everything on it is read from what the run wrote down; nothing is asked again. The licence is the one thing that nobody
but the user can know, and is left to them in so many words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CardFacts", "ParameterCount", "count_parameters", "experts_of", "loading_checkpoint", "model_card"]

_LICENCE = "# license: choose one; what the licences of the teacher and of the student's parts ask for goes with it"


@dataclass(frozen=True)
class ParameterCount:
    """Parameters as stored: tied ones count once, vision tower and projector are counted."""

    total: int
    active: int
    """those that one token meets: of the experts, only `num_experts_per_tok` of all"""


@dataclass(frozen=True)
class CardFacts:
    """What the card says besides what the checkpoint itself knows. Tables in the order in which they shall stand."""

    lineage: Mapping[str, str]
    """teacher, lake, snapshot, seed, …"""
    stages: Sequence[tuple[str, str]] = ()
    """each stage and its key settings"""
    evaluation: Mapping[str, str] = field(default_factory=dict)
    """figures of `logitlake-student eval`; empty where there are none"""


def count_parameters(config: Mapping[str, Any], sizes: Mapping[str, int]) -> ParameterCount:
    """Counts a checkpoint by its `config.json` and the number of elements of each of its tensors."""
    total = sum(sizes.values())
    num_experts, num_active = experts_of(config)
    if not num_experts:
        return ParameterCount(total, total)
    in_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return ParameterCount(total, total - in_experts * (num_experts - num_active) // num_experts)


def experts_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(experts of a sparse layer, experts a token); (0, 0) for a dense model."""
    text = config.get("text_config", config)
    num_experts = text.get("num_local_experts") or text.get("num_experts") or 0
    return int(num_experts), int(text["num_experts_per_tok"]) if num_experts else 0


def model_card(
    name: str,
    config: Mapping[str, Any],
    parameters: ParameterCount,
    facts: CardFacts,
    *,
    loading: Sequence[str],
    tags: Sequence[str] = (),
    library: str = "transformers",
) -> str:
    """The text of `README.md`. `loading` is the section on how to load it, line by line, as Markdown."""
    text = config.get("text_config", config)
    num_experts, num_active = experts_of(config)
    all_tags = ["logitlake", "distillation", *(["mixture-of-experts"] if num_experts else []), *tags]
    about = {
        "architecture": f"{config['architectures'][0]} ({text['model_type']})",
        "parameters": f"{parameters.total:,}",
    }
    if num_experts:
        about |= {
            "parameters a token meets": f"{parameters.active:,}",
            "experts": f"{num_experts}, {num_active} per token",
        }
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {'image-text-to-text' if 'text_config' in config else 'text-generation'}",
        _LICENCE,
        "tags:",
        *(f"- {tag}" for tag in all_tags),
        "---",
        "",
        f"# {name}",
        "",
        "A student distilled by LogitLake from a teacher's cached logprobs. Loaded again, it gave the logprobs of the "
        "student that was trained.",
        "",
        *_table(about),
        "## Loading it",
        "",
        *loading,
        "",
    ]
    if facts.evaluation:
        lines += ["## Figures", "", *_table(facts.evaluation)]
    lines += ["## Lineage", "", *_table(facts.lineage)]
    if facts.stages:
        lines += ["## Stages", "", *_table(dict(facts.stages), ("stage", "settings"))]
    lines += ["## Licence", "", "To be chosen by whoever publishes this model.", ""]
    return "\n".join(lines)


def loading_checkpoint(name: str, config: Mapping[str, Any], *, transformers_reads: bool) -> list[str]:
    """How to load a stock checkpoint and ask it: in transformers, vLLM and here."""
    sees = "vision_config" in config
    if transformers_reads:
        lines = ["Stock transformers, no remote code:", "", "```python", *_python(name, sees=sees), "```", ""]
    else:
        lines = [
            "**For vLLM only.** The expert matrices are square: transformers cannot see that they are transposed, and "
            'would load them wrong without a word. For transformers, export with `to = "hf"`.',
            "",
        ]
    lines += ["vLLM:", "", "```", f"vllm serve {name}", "```"]
    if transformers_reads:
        image = " --image picture.png" if sees else ""
        lines += ["", "LogitLake:", "", "```", f"logitlake-student chat {name}{image}", "```"]
    return lines


def _python(name: str, *, sees: bool) -> list[str]:
    auto_class = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    reader = "AutoProcessor" if sees else "AutoTokenizer"
    picture = '{"type": "image", "image": Image.open("picture.png")}, '
    return [
        *(["from PIL import Image"] if sees else []),
        f"from transformers import {auto_class}, {reader}",
        "",
        f'model = {auto_class}.from_pretrained("{name}")',
        f'processor = {reader}.from_pretrained("{name}")',
        f'content = [{picture if sees else ""}{{"type": "text", "text": "What do you see?"}}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        "    add_generation_prompt=True,",
        "    tokenize=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ")",
        "ids = model.generate(**inputs, max_new_tokens=64)",
        'print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _table(rows: Mapping[str, str], head: tuple[str, str] = ("", "")) -> list[str]:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {_cell(field)} | {_cell(value)} |" for field, value in rows.items()]
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
