"""What a mixture of experts costs beside a dense feed-forward network that does as many multiplications a token.

    python -m benchmarks.moe [--json] [--quick] [--device cuda]

One sparse layer of a student as training runs it, at the size of Qwen2-0.5B: hidden 896, four experts of 4,864 units,
two a token, 4,096 tokens, forward and backward, the router computed in float32; in float32, and with products autocast
to bfloat16 (`precision = "bf16"`). The dense network has 2 x 4,864 units. The experts multiply as a student's do
(`logitlake`), and in transformers' ways: a loop over them (`eager`), or one product over tokens sorted by expert
(`grouped_mm`). Its third, `batched_mm`, copies the weights of a token's experts for the token: 285 GB here. Ratios are
of medians of passes that take turns. `--quick` is smaller, and its ratios say little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch

from benchmarks.harness import Figure, in_own_process, interleaved, median, publish
from logitlake_student.models.experts import register_experts
from logitlake_student.models.routing import float32_router_forward

__all__ = ["Size", "figures"]

_THEIRS = ("eager", "grouped_mm")
_OURS = "logitlake"


@dataclass(frozen=True)
class Size:
    """Of one layer and its input."""

    hidden: int = 896
    inner: int = 4864
    tokens: int = 4096
    num_experts: int = 4
    num_experts_per_tok: int = 2


_QUICK = Size(hidden=256, inner=704, tokens=1024)


def _layer(size: Size, implementation: str, device: str) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.inner,
        num_experts=size.num_experts,
        num_experts_per_tok=size.num_experts_per_tok,
        norm_topk_prob=True,
    )
    register_experts()
    config._experts_implementation = implementation
    torch.manual_seed(0)
    layer = Qwen3MoeSparseMoeBlock(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer.gate.forward = float32_router_forward.__get__(layer.gate)
    return layer.to(device)


def _dense(size: Size, device: str) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    torch.manual_seed(0)
    inner = size.inner * size.num_experts_per_tok
    return Qwen3MoeMLP(Qwen3MoeConfig(hidden_size=size.hidden), intermediate_size=inner).to(device)


def _pass(layer: Any, hidden_1NH: torch.Tensor, precision: str) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        hidden_1NH.grad = None
        with torch.autocast(hidden_1NH.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out_1NH = layer(hidden_1NH)
        out_1NH.float().square().mean().backward()
        if hidden_1NH.is_cuda:
            torch.cuda.synchronize()

    return run


def _seconds(size: Size, device: str, precision: str, rounds: int) -> dict[str, float]:
    torch.set_num_threads(2)
    hidden_1NH = torch.randn(1, size.tokens, size.hidden, device=device).requires_grad_()
    layers = {name: _layer(size, name, device) for name in (_OURS, *_THEIRS)} | {"dense": _dense(size, device)}
    passes = {name: _pass(layer, hidden_1NH, precision) for name, layer in layers.items()}
    return {name: median(times) for name, times in interleaved(passes, rounds).items()}


def figures(device: str, quick: bool) -> list[Figure]:
    """All figures of the module."""
    size, rounds = (_QUICK, 3) if quick else (Size(), 7)
    found = []
    for precision in ("fp32", "bf16"):
        seconds = in_own_process(_seconds, size, device, precision, rounds)
        dense, ours = seconds.pop("dense"), seconds.pop(_OURS)
        theirs = min(seconds.values())
        # bfloat16 makes the products so fast that what passes over memory besides them shows.
        reach = ("<= 1.25", ours <= 1.25 * dense) if precision == "fp32" else ()
        found += [
            Figure(f"{precision}: ours / dense", ours / dense, "x", *reach),
            Figure(f"{precision}: ours / transformers' fastest", ours / theirs, "x", "<= 1.05", ours <= 1.05 * theirs),
        ]
        found += [Figure(f"{precision}: {name} / dense", value / dense, "x") for name, value in seconds.items()]
        found.append(Figure(f"{precision}: dense", dense, "s"))
    return found


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help="A smaller layer, one round.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(as_json: bool, quick: bool, device: str) -> None:
    publish("moe" if device == "cpu" else f"moe on {torch.cuda.get_device_name()}", figures(device, quick), as_json)


if __name__ == "__main__":
    main()
