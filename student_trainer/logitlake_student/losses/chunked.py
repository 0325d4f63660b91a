"""A language-model head applied a few rows at a time.

For a vocabulary of 152k, the logits of two thousand response tokens weigh 1.2 GB in float32, and softmax,
gradient and log-softmax as much again. Losses that only need a few numbers from each row are therefore
computed chunk by chunk: the logits of `chunk_rows` rows, what the loss wants of them, their gradient, and
nothing of width V outlives the chunk.

Products are accumulated in float32 (float64 for float64 inputs) whatever the weights are stored in: bfloat16
logits have three significant digits, too few to subtract a logsumexp from.

Axes: R response rows, C rows of one chunk, V vocabulary, H hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from logitlake_shared.errors import DataError

__all__ = ["ChunkedHead", "accumulation_dtype"]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The type sums are kept in: float64 for float64 inputs (gradient checks), else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` with the result, and the sums inside, in `dtype`."""
    return a @ b if a.dtype == dtype else torch.mm(a, b, dtype)


class ChunkedHead:
    """The head `hidden_RH @ weight_VH.T`, with the gradients of both gathered chunk by chunk.

    Used inside `torch.autograd.Function`s: it works on plain values, records no graph and ignores autocast
    except for taking the operands' type from it. Gradients are only made where asked for, so a frozen head
    costs no `[V, H]` buffer.
    """

    def __init__(
        self, hidden_RH: Tensor, weight_VH: Tensor, *, chunk_rows: int, grad_hidden: bool, grad_weight: bool
    ) -> None:
        if chunk_rows < 1:
            raise DataError(f"chunk_rows: expected at least 1, got {chunk_rows}")
        if hidden_RH.dim() != 2 or weight_VH.dim() != 2 or hidden_RH.shape[1] != weight_VH.shape[1]:
            raise DataError(
                "language-model head: expected hidden states [R, H] and a weight [V, H] of one H, "
                f"got {tuple(hidden_RH.shape)} and {tuple(weight_VH.shape)}"
            )
        self.chunk_rows = chunk_rows
        self.dtype = accumulation_dtype(hidden_RH)
        operands = self._operand_dtype(hidden_RH, weight_VH)
        self._hidden_RH = hidden_RH.detach().to(operands)
        self._weight_VH = weight_VH.detach().to(operands)
        self.grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=self.dtype) if grad_hidden else None
        self.grad_weight_VH = torch.zeros_like(weight_VH, dtype=self.dtype) if grad_weight else None

    def _operand_dtype(self, hidden_RH: Tensor, weight_VH: Tensor) -> torch.dtype:
        device = hidden_RH.device.type
        if device != "cuda":  # only CUDA multiplies half-precision operands into a float32 result
            return self.dtype
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight_VH.dtype if hidden_RH.dtype == weight_VH.dtype else self.dtype

    def chunks(self) -> Iterator[slice]:
        """Slices of rows, in order, that together cover R."""
        for start in range(0, self._hidden_RH.shape[0], self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def logits(self, rows: slice) -> Tensor:
        """Logits [C, V] of some rows in the accumulation type, less each row's maximum.

        No softmax sees the difference, and next to 0 a logsumexp is exact where next to 1000 it is rounded to
        1e-4. The tensor is the caller's to overwrite.
        """
        with torch.autocast(self._hidden_RH.device.type, enabled=False):
            logits_CV = _product(self._hidden_RH[rows], self._weight_VH.t(), self.dtype)
        return logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))

    def accumulate(self, rows: slice, grad_logits_CV: Tensor) -> None:
        """Adds what a gradient with respect to the logits of some rows means for hidden states and weight."""
        grad_CV = grad_logits_CV.to(self._weight_VH.dtype)
        with torch.autocast(grad_CV.device.type, enabled=False):
            if self.grad_hidden_RH is not None:
                self.grad_hidden_RH[rows] = _product(grad_CV, self._weight_VH, self.dtype)
            if self.grad_weight_VH is not None:
                if grad_CV.dtype == self.dtype:
                    self.grad_weight_VH.addmm_(grad_CV.t(), self._hidden_RH[rows])
                else:
                    self.grad_weight_VH += _product(grad_CV.t(), self._hidden_RH[rows], self.dtype)
