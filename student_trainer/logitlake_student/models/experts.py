"""How the experts of a sparse layer multiply: transformers' ways, and one more for training.

transformers sorts tokens by their expert and takes one grouped product for all experts (`grouped_mm`), loops over the
experts (`eager`), or copies the weights of each token's experts for it (`batched_mm`, which no training batch has the
memory for). Two things cost its `grouped_mm` time in training, and `logitlake`, the same sums, does them otherwise:

* torch's grouped product does not follow autocast. With `precision = "bf16"` it multiplies in float32, on a GPU more
  than twice as long as the loop takes. Here weights and inputs are cast as a linear layer's are.
* The backward pass of picking rows by index adds rows one by one, since an index may come twice. Sorting is a
  permutation: its backward pass is the inverse one.

Registered with transformers under its name, so that the model stays a stock class; nothing of it is saved.

Axes: N tokens, k experts a token, S = N * k pairs of a token and an expert, E experts, H hidden, F inner.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from logitlake_student.models.parts import decoder, routers

__all__ = ["ExpertsImplementation", "register_experts", "sorted_experts_forward", "use_experts"]

ExpertsImplementation = Literal["logitlake", "grouped_mm", "eager", "batched_mm"]


def use_experts(model: Any, implementation: ExpertsImplementation) -> None:
    """Makes a sparse student's experts multiply in this way from now on; nothing to a dense one."""
    register_experts()
    if routers(model):
        decoder(model).set_experts_implementation(implementation)


def register_experts() -> None:
    """Tells transformers of `logitlake`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("logitlake", sorted_experts_forward)


def sorted_experts_forward(experts: Any, hidden_NH: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """The weighted sum of each token's experts, `[N, H]` of the type of `hidden_NH`.

    Args:
        experts: a module of transformers that holds `gate_up_proj` `[E, 2F, H]` and `down_proj` `[E, H, F]`, or both
            turned round where it `is_transposed`.
        hidden_NH: the tokens.
        ids_Nk: int64, the experts of each token.
        weights_Nk: what each of them counts.
    """
    device, num_pairs = hidden_NH.device, ids_Nk.numel()
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else experts.down_proj.dtype
    gate_up_EHF, down_EFH = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    if not experts.is_transposed:
        gate_up_EHF, down_EFH = gate_up_EHF.transpose(1, 2), down_EFH.transpose(1, 2)

    order_S = ids_Nk.flatten().argsort(stable=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(num_pairs, device=device))
    ends_E = F.one_hot(ids_Nk.flatten(), experts.num_experts).sum(dim=0).cumsum(dim=0).int()

    sorted_SH = _SortByExpert.apply(hidden_NH.to(dtype), order_S, place_S)  # type: ignore[no-untyped-call]  # torch's
    inner_SF = experts._apply_gate(F.grouped_mm(sorted_SH, gate_up_EHF, offs=ends_E))
    out_SH = F.grouped_mm(inner_SF, down_EFH, offs=ends_E)
    out_SH = _Restore.apply(out_SH, order_S, place_S)  # type: ignore[no-untyped-call]  # torch's
    out_NkH = out_SH.view(*ids_Nk.shape, -1)
    # One product for weighting and summing: a pass over memory less, and added up in float32 whatever the type.
    summed_NH: Tensor = torch.bmm(weights_Nk[:, None].to(dtype), out_NkH).squeeze(1)
    return summed_NH.to(hidden_NH.dtype)


class _SortByExpert(torch.autograd.Function):
    """`sorted_SH` from `hidden_NH`: each token once for each of its experts, in the order of the experts."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, order_S: Tensor, place_S: Tensor) -> Tensor:
        ctx.save_for_backward(place_S)
        ctx.num_tokens = len(hidden_NH)
        return hidden_NH.index_select(0, order_S // (len(order_S) // len(hidden_NH)))

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None]:
        (place_S,) = ctx.saved_tensors
        grad_NkH = grad_SH.index_select(0, place_S).view(ctx.num_tokens, -1, grad_SH.shape[1])
        return grad_NkH.sum(dim=1), None, None


class _Restore(torch.autograd.Function):
    """Rows in the order of the experts back in the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, out_SH: Tensor, order_S: Tensor, place_S: Tensor) -> Tensor:
        ctx.save_for_backward(order_S)
        return out_SH.index_select(0, place_S)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None]:
        (order_S,) = ctx.saved_tensors
        return grad_SH.index_select(0, order_S), None, None
