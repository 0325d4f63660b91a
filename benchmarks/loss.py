"""What the distillation loss costs beside what others do with the same step.

    python -m benchmarks.loss [--json] [--quick] [--device cuda]

One step of a student's head at a real size: V = 151,936, hidden 896, bfloat16 weights, sequences of 4,096 positions of
which 1,024 predict response tokens, 32 cached entries each. From the final hidden states to their gradient and the
head's, three ways:

    ours        response rows only, in chunks, `losses.distillation.distillation_loss`
    reference   logits of all positions, softmax of both models in float32 over the whole vocabulary, mask and mean:
                what LLaVA-MoD's trainer does. The teacher's logits are there already and count for nothing
    gather      logits of all positions, one log-softmax in float32, its entries at the cached ids

Memory is what a pass adds at its peak to a process that holds weights, hidden states and the teacher's side already.
Times take turns, ratios are of medians. `--quick` is smaller, and its ratios say little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from benchmarks.harness import Figure, in_own_process, interleaved, median, peak_mib, publish
from logitlake_student.config import D2DStage
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.losses.reference import distillation_loss_reference

__all__ = ["Size", "figures"]

_K = 32
# Of independent logits: 32 of 152k then hold 0.91 of a token's mass, about what 64 do of SmolLM2's.
_LOGIT_STD = 6.0
_CHUNK_ROWS = D2DStage.model_fields["chunk_rows"].default


@dataclass(frozen=True)
class Size:
    """Of one step."""

    vocab_size: int = 151_936
    hidden: int = 896
    positions: int = 4096
    responses: int = 1024


_QUICK = Size(vocab_size=20_000, hidden=128, positions=1024, responses=256)


class _Step:
    """The inputs of a step, and the three ways through it."""

    def __init__(self, size: Size, device: str) -> None:
        torch.manual_seed(0)
        self.size = size
        self.hidden_SH = torch.randn(size.positions, size.hidden, device=device).bfloat16().requires_grad_()
        weight_VH = (
            _LOGIT_STD * torch.randn(size.vocab_size, size.hidden, device=device) * size.hidden**-0.5
        ).bfloat16()
        self.weight_VH = weight_VH.requires_grad_()
        self.rows_R = torch.arange(size.positions - size.responses, size.positions, device=device)
        with torch.no_grad():
            teacher_hidden_SH = self.hidden_SH + torch.randn_like(self.hidden_SH) / 4
            parts = [chunk @ self.weight_VH.t() for chunk in teacher_hidden_SH[self.rows_R].split(128)]
            tops = [torch.log_softmax(part.float(), dim=-1).topk(_K, dim=-1) for part in parts]
            logprobs_RK = torch.cat([top.values for top in tops])
            self.teacher = TeacherBatch(
                torch.cat([top.indices for top in tops]),
                logprobs_RK,
                torch.log1p(-logprobs_RK.exp().sum(dim=1)),
                torch.cat([top.indices[:, 0] for top in tops]),
                logprobs_RK[:, -1].clone(),
            )
        self.teacher_hidden_SH = teacher_hidden_SH

    def teacher_logits(self) -> Tensor:
        """What only the reference's way holds: `[S, V]` bfloat16."""
        with torch.no_grad():
            return self.teacher_hidden_SH @ self.weight_VH.t()

    def ours(self) -> None:
        loss, _ = distillation_loss(
            self.hidden_SH[self.rows_R],
            self.weight_VH,
            self.teacher,
            divergence_weight=1.0,
            ce_weight=0.0,
            chunk_rows=_CHUNK_ROWS,
        )
        self._backward(loss)

    def reference(self, teacher_logits_SV: Tensor) -> None:
        p_SV = torch.softmax(teacher_logits_SV.float(), dim=-1)
        log_q_SV = torch.log_softmax((self.hidden_SH @ self.weight_VH.t()).float(), dim=-1)
        x_S = (p_SV * log_q_SV).sum(dim=-1)
        mask_S = torch.zeros_like(x_S).index_fill(0, self.rows_R, 1.0)
        self._backward(-(x_S * mask_S).sum() / mask_S.sum())

    def gather(self) -> None:
        log_q_SV = torch.log_softmax((self.hidden_SH @ self.weight_VH.t()).float(), dim=-1)
        log_q_RK = log_q_SV[self.rows_R].gather(1, self.teacher.topk_ids_RK)
        log_s_R = torch.log1p(-log_q_RK.exp().sum(dim=1).clamp(max=1 - 1e-6))
        p_RK, log_r_R = self.teacher.topk_logprobs_RK.exp(), self.teacher.log_tail_mass_R
        head_R = (p_RK * (self.teacher.topk_logprobs_RK - log_q_RK)).sum(dim=1)
        self._backward((head_R + log_r_R.exp() * (log_r_R - log_s_R)).sum())

    def _backward(self, loss: Tensor) -> None:
        self.hidden_SH.grad = self.weight_VH.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if loss.is_cuda:
            torch.cuda.synchronize()


def _ways(step: _Step) -> dict[str, Callable[[], None]]:
    logits_SV = step.teacher_logits()
    return {"ours": step.ours, "reference": lambda: step.reference(logits_SV), "gather": step.gather}


def _seconds(size: Size, device: str, rounds: int) -> dict[str, float]:
    torch.set_num_threads(2)
    return {name: median(times) for name, times in interleaved(_ways(_Step(size, device)), rounds).items()}


def _peak_mib(size: Size, device: str, way: str) -> float:
    torch.set_num_threads(2)
    step = _Step(size, device)
    run = _ways(step)[way] if way == "reference" else getattr(step, way)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What the libraries keep for themselves is not the pass's.
    (step.hidden_SH[:1].float() @ step.weight_VH[:64].float().t()).sum().backward()  # type: ignore[no-untyped-call]
    step.hidden_SH.grad = step.weight_VH.grad = None
    return peak_mib(run)


def _error(size: Size) -> float:
    """The largest relative error, of the value and of both gradients, with k = V, against the float64 twin."""
    torch.manual_seed(1)
    hidden_RH = torch.randn(size.responses, size.hidden, requires_grad=True)
    weight_VH = (torch.randn(size.vocab_size, size.hidden) * size.hidden**-0.5).requires_grad_()
    teacher_RV = torch.log_softmax(2 * torch.randn(size.responses, size.vocab_size), dim=-1)
    logprobs_RV, ids_RV = teacher_RV.sort(dim=-1, descending=True)
    teacher = TeacherBatch(ids_RV, logprobs_RV, torch.full((size.responses,), -torch.inf), ids_RV[:, 0])
    weights = {"divergence_weight": 1.0, "ce_weight": 0.0}
    ours, _ = distillation_loss(hidden_RH, weight_VH, teacher, chunk_rows=_CHUNK_ROWS, **weights)
    twin, _ = distillation_loss_reference(hidden_RH, weight_VH, teacher, **weights)
    inputs = (hidden_RH, weight_VH)
    pairs = [(ours, twin), *zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(twin, inputs), strict=True)]
    return max(float(((a.double() - b.double()).norm() / b.double().norm()).detach()) for a, b in pairs)


def figures(device: str, quick: bool) -> list[Figure]:
    """All figures of the module."""
    size, rounds = (_QUICK, 1) if quick else (Size(), 3)
    seconds = in_own_process(_seconds, size, device, rounds)
    peaks = {way: in_own_process(_peak_mib, size, device, way) for way in ("ours", "reference", "gather")}
    error = in_own_process(_error, Size(vocab_size=4096, hidden=64, positions=64, responses=32))
    found = []
    for name, share, reach in (
        ("extra peak memory, ours / reference's way", peaks["ours"] / peaks["reference"], 0.1),
        ("extra peak memory, ours / gather from full logits", peaks["ours"] / peaks["gather"], 0.25),
        ("time, ours / reference's way", seconds["ours"] / seconds["reference"], 0.35),
        ("value and gradient with k = V, relative error to float64", error, 1e-5),
    ):
        found.append(Figure(name, share, "x", f"<= {reach:g}", share <= reach))
    found.append(Figure("time, ours / gather from full logits", seconds["ours"] / seconds["gather"], "x"))
    found += [Figure(f"extra peak memory, {way}", mib, "MiB") for way, mib in peaks.items()]
    found += [Figure(f"time, {way}", value, "s") for way, value in seconds.items()]
    return found


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help="A smaller step, one round.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(as_json: bool, quick: bool, device: str) -> None:
    publish("loss" if device == "cpu" else f"loss on {torch.cuda.get_device_name()}", figures(device, quick), as_json)


if __name__ == "__main__":
    main()
