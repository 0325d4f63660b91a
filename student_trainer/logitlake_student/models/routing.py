"""Routers: computed in float32, and overheard.

`LlavaForConditionalGeneration` drops its language model's router logits, so the balance loss takes them from
forward hooks on the routers themselves. The tensors carry gradients, also under (non-reentrant) gradient
checkpointing.

Stock routers multiply in the model's type. In bfloat16 two experts often tie and the balance loss sees
rounded probabilities, so a student in training computes its routers in float32; the stored model stays a
stock one.

Axes: N positions of a forward (batch x sequence), E experts, H hidden.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logitlake_shared.errors import TrainingError
from logitlake_student.models.capacity import Capacity, weights_within_capacity
from logitlake_student.models.parts import routers

__all__ = ["RouterRecorder", "bias_experts", "compute_routers_in_float32", "float32_router_forward", "limit_experts"]


class RouterRecorder:
    """Context manager that keeps the router logits of one forward.

    >>> with RouterRecorder(model) as recorder:
    ...     model(**batch)
    >>> router_logits = recorder.logits()   # [N, E] float32 per sparse layer

    Leave the context before `backward`: a checkpointed layer runs its router again there. Each layer keeps
    the first logits that it sees until `clear`, so that a second run changes nothing.
    """

    def __init__(self, model: Any) -> None:
        self._routers = routers(model)
        self._logits: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "RouterRecorder":
        for layer, router in self._routers.items():

            def keep(_module: Any, _inputs: Any, output: tuple[Tensor, ...], layer: int = layer) -> None:
                self._logits.setdefault(layer, output[0].float())
                self._chosen.setdefault(layer, output[2])

            self._hooks.append(router.register_forward_hook(keep))
        return self

    def __exit__(self, *_exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def logits(self) -> list[Tensor]:
        """[N, E] float32 of each sparse layer in order; empty for a dense model.

        Raises:
            TrainingError: no forward ran inside the context.
        """
        missing = [layer for layer in self._routers if layer not in self._logits]
        if missing:
            raise TrainingError(
                f"router logits of layers {missing} were not recorded: expected one forward of the model inside "
                "the `with` block"
            )
        return [self._logits[layer] for layer in self._routers]

    def chosen(self) -> list[Tensor]:
        """int64 [N, k] of each sparse layer in order: the experts that each position was sent to."""
        self.logits()
        return [self._chosen[layer] for layer in self._routers]

    def clear(self) -> None:
        """Forgets what was recorded, for the next forward."""
        self._logits.clear()
        self._chosen.clear()


def limit_experts(model: Any, capacity: Capacity | None) -> None:
    """What the experts take of every forward pass in training from now on; None: all of it.

    It outlasts the forward pass, because a checkpointed layer runs its router again in the backward pass.
    """
    for router in routers(model).values():
        setattr(router, _CAPACITY, capacity)


def bias_experts(model: Any, bias_LE: Tensor | None) -> None:
    """What is added to the routers' probabilities when experts are chosen, of each sparse layer; None: nothing."""
    for place, router in enumerate(routers(model).values()):
        setattr(router, _BIAS, None if bias_LE is None else bias_LE[place])


_BIAS = "logitlake_bias"
_CAPACITY = "logitlake_capacity"


def compute_routers_in_float32(model: Any) -> None:
    """Makes the routers of a model compute logits, softmax and weights in float32 whatever its type or
    autocast.

    Changes this instance only, and nothing that is saved. A float32 model gives the same numbers as before.
    """
    for router in routers(model).values():
        router.forward = types.MethodType(float32_router_forward, router)


def float32_router_forward(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits [N, E] float32, weights [N, k] in the model's type, expert ids [N, k]."""
    hidden_NH = hidden_states.reshape(-1, router.hidden_dim)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logits_NE = F.linear(hidden_NH.float(), router.weight.float())
        probs_NE = torch.softmax(logits_NE, dim=-1)
        bias_E, capacity = getattr(router, _BIAS, None), getattr(router, _CAPACITY, None)
        # The bias says who is chosen, not how much the chosen weigh.
        expert_ids_Nk = (probs_NE if bias_E is None else probs_NE + bias_E).topk(router.top_k, dim=-1).indices
        weights_Nk = probs_NE.gather(1, expert_ids_Nk)
        if router.training and capacity is not None:
            weights_Nk = weights_within_capacity(weights_Nk, expert_ids_Nk, probs_NE.shape[1], capacity)
        # Mixtral's and Qwen3-VL-MoE's have no switch: they normalise.
        elif getattr(router, "norm_topk_prob", True):
            weights_Nk = weights_Nk / weights_Nk.sum(dim=-1, keepdim=True)
    return logits_NE, weights_Nk.to(hidden_states.dtype), expert_ids_Nk
