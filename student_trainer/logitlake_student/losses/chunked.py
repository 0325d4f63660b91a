"""A language-model head applied a few rows at a time.

For a vocabulary of 152k, the logits of two thousand response tokens weigh 1.2 GB in float32, and softmax,
gradient and log-softmax as much again. Losses that only need a few numbers from each row are therefore
computed chunk by chunk: the logits of `chunk_rows` rows, what the loss wants of them, their gradient, and
nothing of width V outlives the chunk.

Products are accumulated in float32 (float64 for float64 inputs) whatever the weights are stored in: bfloat16
logits have three significant digits, too few to subtract a logsumexp from. On CUDA such a product takes bfloat16
operands as they are. On a CPU the weight is widened a block of the vocabulary at a time, and the matrix unit may
narrow both again on the way in, which loses nothing of what was bfloat16 before.

Axes: R response rows, C rows of one chunk, V vocabulary, H hidden.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from logitlake_shared.errors import DataError

__all__ = ["ChunkedHead", "accumulation_dtype"]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The type sums are kept in: float64 for float64 inputs (gradient checks), else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# Rows of a bfloat16 weight that are float32 at one time on a CPU: 30 MB at a hidden size of 896.
_WIDENED_ROWS = 8192


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Lets the CPU's matrix unit take float32 operands as bfloat16; it still sums in float32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at import, in torch's own way
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


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
        self._widens = operands != self.dtype and hidden_RH.device.type != "cuda"

    def _operand_dtype(self, hidden_RH: Tensor, weight_VH: Tensor) -> torch.dtype:
        device = hidden_RH.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight_VH.dtype if hidden_RH.dtype == weight_VH.dtype else self.dtype

    def chunks(self) -> Iterator[slice]:
        """Slices of rows, in order, that together cover R."""
        for start in range(0, self._hidden_RH.shape[0], self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def logits(self, rows: slice) -> Tensor:
        """Logits [C, V] of some rows in the accumulation type. The tensor is the caller's to overwrite."""
        hidden_CH, weight_VH = self._hidden_RH[rows], self._weight_VH
        if not self._widens:
            return self._product(hidden_CH, weight_VH.t())
        logits_CV = hidden_CH.new_empty(len(hidden_CH), len(weight_VH), dtype=self.dtype)
        with self._wide_blocks() as blocks:
            for block, weight_BH in blocks:
                logits_CV[:, block] = hidden_CH.to(self.dtype) @ weight_BH.t()
        return logits_CV

    def centred_logits(self, rows: slice) -> Tensor:
        """Logits less each row's maximum.

        No softmax sees the difference, and next to 0 a logsumexp is exact where next to 1000 it is rounded to 1e-4.
        """
        logits_CV = self.logits(rows)
        return logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))

    def accumulate(self, rows: slice, grad_logits_CV: Tensor) -> None:
        """Adds what a gradient with respect to the logits of some rows means for hidden states and weight."""
        if self._widens:
            self._accumulate_blocks(rows, grad_logits_CV)
            return
        grad_CV = grad_logits_CV.to(self._weight_VH.dtype)
        if self.grad_hidden_RH is not None:
            self.grad_hidden_RH[rows] = self._product(grad_CV, self._weight_VH)
        if self.grad_weight_VH is not None:
            hidden_CH, total_VH = self._hidden_RH[rows], self.grad_weight_VH
            with self._without_autocast():
                if grad_CV.dtype == self.dtype:
                    total_VH.addmm_(grad_CV.t(), hidden_CH)
                else:
                    torch.addmm(total_VH, grad_CV.t(), hidden_CH, out_dtype=self.dtype, out=total_VH)

    def _accumulate_blocks(self, rows: slice, grad_CV: Tensor) -> None:
        hidden_CH = self._hidden_RH[rows].to(self.dtype)
        with self._wide_blocks() as blocks:
            for block, weight_BH in blocks:
                if self.grad_hidden_RH is not None:
                    self.grad_hidden_RH[rows].addmm_(grad_CV[:, block], weight_BH)
                if self.grad_weight_VH is not None:
                    self.grad_weight_VH[block].addmm_(grad_CV[:, block].t(), hidden_CH)

    @contextlib.contextmanager
    def _wide_blocks(self) -> Iterator[Iterator[tuple[slice, Tensor]]]:
        """Blocks of the weight's rows in the accumulation type, where products round operands as the weight does."""
        narrow = _bfloat16_products() if self._weight_VH.dtype == torch.bfloat16 else contextlib.nullcontext()
        blocks = (slice(start, start + _WIDENED_ROWS) for start in range(0, len(self._weight_VH), _WIDENED_ROWS))
        with self._without_autocast(), narrow:
            yield ((block, self._weight_VH[block].to(self.dtype)) for block in blocks)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` with the result, and the sums inside, in the accumulation type."""
        with self._without_autocast():
            return a @ b if a.dtype == self.dtype else torch.mm(a, b, self.dtype)

    def _without_autocast(self) -> torch.autocast:
        return torch.autocast(self._hidden_RH.device.type, enabled=False)
