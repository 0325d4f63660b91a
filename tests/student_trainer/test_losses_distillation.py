"""Laws of the tail-bucket distillation loss, and its agreement with the slow twin and with torch's own KL.

Axes: R response rows, K cached tokens, V vocabulary, H hidden.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from logitlake_shared.errors import DataError
from logitlake_student.losses.distillation import TeacherBatch, distillation_loss
from logitlake_student.losses.reference import distillation_loss_reference, full_kl

R, V, H = 7, 23, 6

# Sums of a few dozen float32 terms of order 1: relative rounding of about 1e-7 each.
FP32_RTOL, FP32_ATOL = 2e-5, 2e-6
# Twin in float64, fast path with bfloat16 inputs but float32 products: what is left is the rounding of the
# gradient to bfloat16 (8 bits) when it is handed back.
BF16_RTOL, BF16_ATOL = 1e-2, 1e-2


def random_head(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states [R, H] and weight [V, H] that require gradients."""
    g = torch.Generator().manual_seed(seed)
    hidden_RH = (torch.randn(R, H, generator=g) * scale).to(dtype).requires_grad_()
    weight_VH = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    return hidden_RH, weight_VH


def teacher_from_logits(logits_RV: Tensor, k: int, seed: int = 1) -> TeacherBatch:
    """The exact top-k rows of a dense teacher, with seeded labels."""
    logp_RV = torch.log_softmax(logits_RV.double(), dim=-1)
    top = logp_RV.topk(k, dim=-1)
    rest_RV = logp_RV.scatter(1, top.indices, -math.inf)
    labels_R = torch.randint(V, (len(logits_RV),), generator=torch.Generator().manual_seed(seed))
    return TeacherBatch(top.indices, top.values.float(), torch.logsumexp(rest_RV, dim=-1).float(), label_ids_R=labels_R)


def random_teacher(k: int, seed: int = 2, scale: float = 2.0) -> TeacherBatch:
    logits_RV = torch.randn(R, V, generator=torch.Generator().manual_seed(seed)) * scale
    return teacher_from_logits(logits_RV, k)


def rows_of(teacher: TeacherBatch, rows: slice) -> TeacherBatch:
    return TeacherBatch(
        teacher.topk_ids_RK[rows],
        teacher.topk_logprobs_RK[rows],
        teacher.log_tail_mass_R[rows],
        teacher.label_ids_R[rows],
    )


def kl_sum(hidden_RH: Tensor, weight_VH: Tensor, teacher: TeacherBatch, chunk_rows: int = 3) -> float:
    _, sums = distillation_loss(
        hidden_RH, weight_VH, teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=chunk_rows
    )
    return float(sums.divergence_sum)


def value_and_grads(loss_fn: Any, hidden_RH: Tensor, weight_VH: Tensor, *args: Any, **kw: Any) -> list[Tensor]:
    """Loss, gradient of the hidden states, gradient of the weight (absent where frozen)."""
    inputs = [t for t in (hidden_RH, weight_VH) if t.requires_grad]
    loss, _ = loss_fn(hidden_RH, weight_VH, *args, **kw)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(fast: list[Tensor], slow: list[Tensor], rtol: float, atol: float) -> None:
    assert len(fast) == len(slow)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_zero_and_stationary_where_student_equals_teacher(k: int) -> None:
    """A student that is the teacher has no divergence and no gradient, for any k."""
    hidden_RH, weight_VH = random_head()
    teacher = teacher_from_logits((hidden_RH @ weight_VH.t()).detach(), k)
    value, *grads = value_and_grads(
        distillation_loss, hidden_RH, weight_VH, teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=3
    )
    assert float(value) == pytest.approx(0.0, abs=R * FP32_ATOL)
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=R * FP32_ATOL)


@pytest.mark.parametrize("seed", range(20))
def test_never_negative_and_never_above_the_full_kl(seed: int) -> None:
    """0 <= bucket KL <= full KL, and more cached tokens never lower it."""
    hidden_RH, weight_VH = random_head(seed)
    teacher_logits_RV = 2 * torch.randn(R, V, generator=torch.Generator().manual_seed(100 + seed))
    values = [kl_sum(hidden_RH, weight_VH, teacher_from_logits(teacher_logits_RV, k)) for k in (1, 3, 8, 15, V - 1)]
    full = float(full_kl(hidden_RH @ weight_VH.t(), teacher_logits_RV).detach())
    bounds = [0.0, *values, full]
    for lower, upper in itertools.pairwise(bounds):
        assert lower <= upper * (1 + FP32_RTOL)


@pytest.mark.parametrize("k", [V - 1, V])
def test_k_of_the_whole_vocabulary_is_torchs_dense_kl(k: int) -> None:
    """With every id cached (or all but one, whose bucket holds one token) it is F.kl_div, value and gradient."""
    hidden_RH, weight_VH = random_head()
    teacher_logits_RV = 2 * torch.randn(R, V, generator=torch.Generator().manual_seed(3))
    fast = value_and_grads(
        distillation_loss,
        hidden_RH,
        weight_VH,
        teacher_from_logits(teacher_logits_RV, k),
        divergence_weight=1.0,
        ce_weight=0.0,
        chunk_rows=2,
    )
    dense = F.kl_div(
        F.log_softmax(hidden_RH @ weight_VH.t(), dim=-1),
        F.log_softmax(teacher_logits_RV, dim=-1),
        log_target=True,
        reduction="sum",
    )
    slow = [dense.detach(), *torch.autograd.grad(dense, (hidden_RH, weight_VH))]
    assert_close(fast, slow, FP32_RTOL, FP32_ATOL * R)


def test_cross_entropy_is_torchs() -> None:
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(4)
    fast = value_and_grads(
        distillation_loss, hidden_RH, weight_VH, teacher, divergence_weight=0.0, ce_weight=1.0, chunk_rows=3
    )
    ce = F.cross_entropy(hidden_RH @ weight_VH.t(), teacher.label_ids_R, reduction="sum")
    assert_close(fast, [ce.detach(), *torch.autograd.grad(ce, (hidden_RH, weight_VH))], FP32_RTOL, FP32_ATOL * R)


def test_without_teacher_only_cross_entropy_is_left() -> None:
    """No teacher: the loss and its gradient are those with a teacher of weight 0."""
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(4)
    alone = value_and_grads(
        distillation_loss,
        hidden_RH,
        weight_VH,
        None,
        divergence_weight=1.0,
        ce_weight=0.7,
        chunk_rows=3,
        label_ids_R=teacher.label_ids_R,
    )
    with_teacher = value_and_grads(
        distillation_loss, hidden_RH, weight_VH, teacher, divergence_weight=0.0, ce_weight=0.7, chunk_rows=3
    )
    assert_close(alone, with_teacher, FP32_RTOL, FP32_ATOL)


@pytest.mark.parametrize("padding_id", [0, V - 1])
def test_padded_slots_change_nothing(padding_id: int) -> None:
    """Padding to a wider K is invisible bit for bit, also where a padded slot points at an id that is cached."""
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(4)
    # One row really holds the id that its padding repeats, the next one does not.
    teacher.topk_ids_RK[:2] = torch.tensor([[padding_id, 3, 5, 7], [2, 3, 5, 7]])
    padded = TeacherBatch(
        F.pad(teacher.topk_ids_RK, (0, 3), value=padding_id),
        F.pad(teacher.topk_logprobs_RK, (0, 3), value=-math.inf),
        teacher.log_tail_mass_R,
        teacher.label_ids_R,
    )
    kw = {"divergence_weight": 1.0, "ce_weight": 0.5, "chunk_rows": 3}
    plain = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, **kw)
    with_padding = value_and_grads(distillation_loss, hidden_RH, weight_VH, padded, **kw)
    for a, b in zip(plain, with_padding, strict=True):
        assert torch.equal(a, b)


def test_two_halves_sum_to_the_whole() -> None:
    """The loss is a sum over rows: micro-batches add up, in value, sums and gradient."""
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(5)
    kw = {"divergence_weight": 0.8, "ce_weight": 0.3, "chunk_rows": 2}
    whole = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, **kw)
    parts = [
        distillation_loss(hidden_RH[rows], weight_VH, rows_of(teacher, rows), **kw)
        for rows in (slice(0, 3), slice(3, None))
    ]
    total = parts[0][0] + parts[1][0]
    halves = [total.detach(), *torch.autograd.grad(total, (hidden_RH, weight_VH))]
    assert_close(halves, whole, FP32_RTOL, FP32_ATOL)
    assert sum(float(sums.num_tokens) for _, sums in parts) == R


@pytest.mark.parametrize("chunk_rows", [1, 2, R, 1000])
def test_chunking_changes_nothing(chunk_rows: int) -> None:
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(5)
    kw = {"divergence_weight": 0.8, "ce_weight": 0.3}
    one = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, chunk_rows=3, **kw)
    other = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, chunk_rows=chunk_rows, **kw)
    assert_close(one, other, FP32_RTOL, FP32_ATOL)


@pytest.mark.parametrize(("divergence_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.9, 0.4)])
@pytest.mark.parametrize("k", [1, 6, V])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_equals_its_twin_in_value_and_gradient(
    divergence_weight: float, ce_weight: float, k: int, scale: float
) -> None:
    """Flat, ordinary and saturated students against full float64 logits under plain autograd."""
    hidden_RH, weight_VH = random_head(scale=scale)
    teacher = random_teacher(k)
    kw = {"divergence_weight": divergence_weight, "ce_weight": ce_weight}
    fast = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, chunk_rows=3, **kw)
    slow = value_and_grads(distillation_loss_reference, hidden_RH, weight_VH, teacher, **kw)
    assert_close(fast, slow, FP32_RTOL, FP32_ATOL * R * max(1.0, scale))


def test_gradcheck_in_float64() -> None:
    """Finite differences agree with the hand-written backward, also after scaling the loss."""
    hidden_RH, weight_VH = random_head(dtype=torch.float64)
    teacher = random_teacher(4)

    def scaled(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        loss, _ = distillation_loss(hidden_RH, weight_VH, teacher, divergence_weight=0.7, ce_weight=0.3, chunk_rows=3)
        return -2.5 * loss

    assert torch.autograd.gradcheck(scaled, (hidden_RH, weight_VH))


def test_worked_example() -> None:
    """Three tokens; student logits 0, 0, ln 2, so q = 1/4, 1/4, 1/2. The teacher caches token 0 at 1/2.

    head: 1/2 ln((1/2) / (1/4)) = 1/2 ln 2
    tail: 1/2 ln((1/2) / (3/4)) = 1/2 ln(2/3)
    forward_kl = 1/2 ln(4/3) = 0.1438; cross-entropy on token 2 = ln 2
    gradient in the logits: head 1/4 - 1/2 = -1/4; tail q_j - 1/2 * q_j / (3/4) = q_j / 3 = 1/12, 1/6
    """
    logits_1V = torch.tensor([[0.0, 0.0, math.log(2.0)]], requires_grad=True)
    teacher = TeacherBatch(
        torch.tensor([[0]]), torch.log(torch.tensor([[0.5]])), torch.log(torch.tensor([0.5])), torch.tensor([2])
    )
    loss, sums = distillation_loss(logits_1V, torch.eye(3), teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=8)
    (grad,) = torch.autograd.grad(loss, logits_1V)
    assert float(sums.divergence_sum) == pytest.approx(0.5 * math.log(4 / 3), abs=FP32_ATOL)
    assert float(sums.ce_sum) == pytest.approx(math.log(2), abs=FP32_ATOL)
    assert float(sums.num_tokens) == 1.0
    torch.testing.assert_close(grad, torch.tensor([[-1 / 4, 1 / 12, 1 / 6]]), rtol=0, atol=FP32_ATOL)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_saturated_rows_keep_finite_values_and_gradients(sign: float) -> None:
    """Student logits of +-1000 on the cached ids: head or tail of the student underflows; nothing overflows."""
    logits_RV = torch.zeros(2, V)
    logits_RV[:, :3] = 1000.0 * sign
    hidden_RH = logits_RV.requires_grad_()
    teacher = TeacherBatch(
        torch.tensor([[0, 1, 2], [0, 1, 2]]),
        torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.1]]).log(),
        torch.tensor([-math.inf, math.log(0.2)]),
        torch.tensor([0, 5]),
    )
    kw = {"divergence_weight": 1.0, "ce_weight": 1.0}
    fast = value_and_grads(distillation_loss, hidden_RH, torch.eye(V), teacher, chunk_rows=1, **kw)
    slow = value_and_grads(distillation_loss_reference, hidden_RH, torch.eye(V), teacher, **kw)
    assert all(torch.isfinite(t).all() for t in fast)
    assert_close(fast, slow, FP32_RTOL, FP32_ATOL)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    """bf16 states and weights: the loss is exact for those inputs, the gradient rounds once, to bf16."""
    hidden_RH, weight_VH = random_head(dtype=torch.bfloat16)
    teacher = random_teacher(6)
    kw = {"divergence_weight": 1.0, "ce_weight": 0.5}
    fast = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, chunk_rows=3, **kw)
    slow = value_and_grads(distillation_loss_reference, hidden_RH, weight_VH, teacher, **kw)
    assert fast[0].dtype == torch.float32
    assert fast[1].dtype == fast[2].dtype == torch.bfloat16
    assert_close(fast[:1], slow[:1], FP32_RTOL, FP32_ATOL)
    assert_close(fast[1:], slow[1:], BF16_RTOL, BF16_ATOL)


def test_frozen_head_gets_no_gradient_and_no_buffer() -> None:
    """A weight that does not train: same gradient for the hidden states, none for the weight."""
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(5)
    kw = {"divergence_weight": 1.0, "ce_weight": 0.5, "chunk_rows": 3}
    both = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, **kw)
    frozen = value_and_grads(distillation_loss, hidden_RH, weight_VH.detach(), teacher, **kw)
    assert len(frozen) == 2
    assert torch.equal(both[1], frozen[1])


def test_tied_embeddings_get_both_gradients() -> None:
    """One matrix as embedding and head: its gradient is the sum of the two roads, as for the twin."""
    _, weight_VH = random_head()
    ids_R = torch.arange(R)
    teacher = random_teacher(5)
    grads = []
    for loss_fn, extra in ((distillation_loss, {"chunk_rows": 3}), (distillation_loss_reference, {})):
        loss, _ = loss_fn(
            F.embedding(ids_R, weight_VH), weight_VH, teacher, divergence_weight=1.0, ce_weight=0.5, **extra
        )
        grads.extend(torch.autograd.grad(loss, weight_VH))
    torch.testing.assert_close(grads[0].double(), grads[1].double(), rtol=FP32_RTOL, atol=FP32_ATOL * R)


def test_no_gradients_are_made_under_no_grad() -> None:
    """Evaluation reports the same sums and keeps nothing for backward."""
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(5)
    kw = {"divergence_weight": 1.0, "ce_weight": 0.5, "chunk_rows": 3}
    trained, sums = distillation_loss(hidden_RH, weight_VH, teacher, **kw)
    with torch.no_grad():
        evaluated, eval_sums = distillation_loss(hidden_RH, weight_VH, teacher, **kw)
    assert not evaluated.requires_grad
    assert torch.equal(trained.detach(), evaluated)
    assert all(torch.equal(a, b) for a, b in zip(sums, eval_sums, strict=True))
    assert not any(total.requires_grad for total in sums)


def test_no_rows_is_zero() -> None:
    """A micro-batch without response tokens adds nothing, and its gradient is zero rather than missing."""
    hidden_RH, weight_VH = random_head()
    teacher = rows_of(random_teacher(5), slice(0, 0))
    loss, sums = distillation_loss(
        hidden_RH[:0], weight_VH, teacher, divergence_weight=1.0, ce_weight=1.0, chunk_rows=3
    )
    grads = torch.autograd.grad(loss, (hidden_RH, weight_VH))
    assert float(loss.detach()) == float(sums.num_tokens) == 0.0
    assert not any(grad.any() for grad in grads)


def test_only_a_chunk_of_logits_lives() -> None:
    """No tensor with more than chunk_rows x V elements is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return out

    num_rows, vocab_size, chunk_rows = 64, 50, 4
    hidden_RH = torch.randn(num_rows, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight_VH = torch.randn(vocab_size, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = TeacherBatch(
        torch.zeros(num_rows, 1, dtype=torch.long),
        torch.full((num_rows, 1), math.log(0.5)),
        torch.full((num_rows,), math.log(0.5)),
        torch.zeros(num_rows, dtype=torch.long),
    )
    with Largest():
        loss, _ = distillation_loss(
            hidden_RH, weight_VH, teacher, divergence_weight=1.0, ce_weight=1.0, chunk_rows=chunk_rows
        )
        loss.backward()
    assert largest == chunk_rows * vocab_size


def bounded(teacher: TeacherBatch, slack: float = 0.0) -> TeacherBatch:
    """The teacher with the bound that its own rank order gives, loosened by `slack` nats."""
    return replace(teacher, log_bound_R=teacher.topk_logprobs_RK.min(dim=1).values + slack)


@pytest.mark.parametrize(("k", "slack"), [(1, 0.0), (4, 0.0), (4, 0.5), (12, 0.0), (12, 3.0)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_bounded_tail_equals_its_twin(k: int, slack: float, scale: float) -> None:
    """Rounds of capping against bisection in float64: value and gradients, for tame and for wild students."""
    hidden_RH, weight_VH = random_head(scale=scale)
    kw = {"divergence_weight": 0.7, "ce_weight": 0.3}
    teacher = bounded(random_teacher(k), slack)
    fast = value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, chunk_rows=3, **kw)
    slow = value_and_grads(distillation_loss_reference, hidden_RH, weight_VH, teacher, **kw)
    assert_close(fast, slow, FP32_RTOL, FP32_ATOL * R * scale)


@pytest.mark.parametrize("seed", range(20))
def test_a_bound_brings_the_loss_nearer_to_the_full_kl(seed: int) -> None:
    """Bucket <= bounded <= full KL: what is known of the tail is used, and nothing is made up."""
    hidden_RH, weight_VH = random_head(seed, scale=2.0)
    teacher_logits_RV = 2 * torch.randn(R, V, generator=torch.Generator().manual_seed(100 + seed))
    bucket = teacher_from_logits(teacher_logits_RV, 4)
    full = float(full_kl(hidden_RH @ weight_VH.t(), teacher_logits_RV).detach())
    values = [kl_sum(hidden_RH, weight_VH, teacher) for teacher in (bucket, bounded(bucket, 1.0), bounded(bucket))]
    for lower, upper in itertools.pairwise([*values, full]):
        assert lower <= upper * (1 + FP32_RTOL)
    assert values[-1] > values[0], "random students like some tail token too much"


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_the_bounded_tail_is_stationary_at_the_teacher(k: int) -> None:
    """A student that is the teacher obeys the bound: no divergence, no gradient."""
    hidden_RH, weight_VH = random_head()
    teacher = bounded(teacher_from_logits((hidden_RH @ weight_VH.t()).detach(), k))
    value, *grads = value_and_grads(
        distillation_loss, hidden_RH, weight_VH, teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=3
    )
    assert float(value) == pytest.approx(0.0, abs=R * FP32_ATOL)
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=R * FP32_ATOL)


def test_a_bound_of_one_is_the_bucket() -> None:
    """A bound that bounds nothing changes no bit."""
    hidden_RH, weight_VH = random_head()
    teacher = random_teacher(4)
    kw = {"divergence_weight": 1.0, "ce_weight": 0.0, "chunk_rows": 3}
    loose = replace(teacher, log_bound_R=torch.zeros(R))
    for a, b in zip(
        value_and_grads(distillation_loss, hidden_RH, weight_VH, loose, **kw),
        value_and_grads(distillation_loss, hidden_RH, weight_VH, teacher, **kw),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=FP32_RTOL, atol=FP32_ATOL)


def test_a_bound_by_hand() -> None:
    """q = .4 | .3 .2 .1, p = .4 and a tail of .6 with no token above .25: the tail becomes .25 .2333 .1167.

    KL = .25 ln(.25/.3) + .2333 ln(.2333/.2) + .1167 ln(.1167/.1) = -.04558 + .03597 + .01798 = .00837.
    """
    q_V = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    teacher = TeacherBatch(
        torch.tensor([[0]]),
        torch.log(torch.tensor([[0.4]])),
        torch.log(torch.tensor([0.6])),
        torch.tensor([0]),
        torch.log(torch.tensor([0.25])),
    )
    hidden_RH = torch.ones(1, 1, requires_grad=True)
    _, sums = distillation_loss(
        hidden_RH, torch.log(q_V).t().contiguous(), teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=1
    )
    assert float(sums.divergence_sum) == pytest.approx(0.00837, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_whose_tail_is_one_token_stays_finite(dtype: torch.dtype) -> None:
    """All of the student's mass on one uncached id, however sure: value and gradients are finite, and the id sinks."""
    hidden_RH = (torch.full((1, 1), 200.0)).to(dtype).requires_grad_()
    weight_VH = torch.zeros(V, 1, dtype=dtype)
    weight_VH[5] = 1.0
    weight_VH.requires_grad_()
    teacher = TeacherBatch(
        torch.tensor([[0]]),
        torch.tensor([[math.log(0.9)]]),
        torch.tensor([math.log(0.1)]),
        torch.tensor([0]),
        torch.tensor([math.log(0.02)]),
    )
    value, grad_hidden, grad_weight = value_and_grads(
        distillation_loss, hidden_RH, weight_VH, teacher, divergence_weight=1.0, ce_weight=0.0, chunk_rows=1
    )
    for tensor in (value, grad_hidden, grad_weight):
        assert torch.isfinite(tensor).all()
    assert float(grad_weight[5]) > 0


def test_contradictory_input_is_refused() -> None:
    hidden_RH, weight_VH = random_head()
    kw: dict[str, Any] = {"divergence_weight": 1.0, "ce_weight": 1.0, "chunk_rows": 3}
    teacher = random_teacher(4)
    with pytest.raises(DataError, match="labels come with the teacher"):
        distillation_loss(hidden_RH, weight_VH, None, **kw)
    with pytest.raises(DataError, match="labels come with the teacher"):
        distillation_loss(hidden_RH, weight_VH, teacher, label_ids_R=teacher.label_ids_R, **kw)
    with pytest.raises(DataError, match="the hidden states have 6"):
        distillation_loss(hidden_RH[1:], weight_VH, teacher, **kw)
    with pytest.raises(DataError, match="chunk_rows"):
        distillation_loss(hidden_RH, weight_VH, teacher, **{**kw, "chunk_rows": 0})
    with pytest.raises(DataError, match="one H"):
        distillation_loss(hidden_RH, weight_VH[:, 1:], teacher, **kw)
    full = random_teacher(V)
    impossible = TeacherBatch(full.topk_ids_RK, full.topk_logprobs_RK, torch.full((R,), -5.0), full.label_ids_R)
    with pytest.raises(DataError, match=f"{R} rows hold all {V} ids"):
        distillation_loss(hidden_RH, weight_VH, impossible, **kw)
