"""Divergences between a teacher and a student who are known on K tokens and on everything else as one class.

Each is a sum over the K + 1 classes of a row and is written once, in log-probabilities; its gradient is autograd's, on
a `[C, K + 1]` tensor, and `losses.distillation` carries it on to the logits. For an f-divergence of the full
distributions (forward and reverse KL, JSD, the skewed ones, total variation) the sum over classes is a lower bound of
it, by the data-processing inequality, and is zero exactly where all classes agree.

    forward_kl        KL(p‖q)
    reverse_kl        KL(q‖p)
    jsd               beta KL(p‖m) + (1 - beta) KL(q‖m),  m = beta p + (1 - beta) q       (GKD, arXiv 2306.13649)
    skew_kl           KL(p‖alpha p + (1 - alpha) q)                                       (DistiLLM, arXiv 2402.03898)
    skew_reverse_kl   KL(q‖alpha q + (1 - alpha) p)
    tvd               1/2 sum of |p - q|
    truncated_kl      sum over the K of p log(p/q): no divergence, and not stationary where student and teacher agree
    renormalised_kl   KL of both restricted to the K and normalised there: blind to how much the student puts elsewhere

The last two are what other tools do with a cached top-k. They are here to be compared with; docs/decisions/0004 has
what they cost.

Axes: C rows, J = K + 1 classes, the last of which is everything outside the K.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Classes",
    "Divergence",
    "forward_kl",
    "jsd",
    "renormalised_kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "truncated_kl",
    "tvd",
]


class Classes(NamedTuple):
    """Teacher and student on the classes of some rows."""

    log_p_CJ: Tensor
    """The teacher's; -inf where it has no mass. Constant."""
    log_q_CJ: Tensor
    """The student's, finite."""
    exists_CJ: Tensor
    """bool: False for padded slots, and for the last class where the K ids are the whole vocabulary. What stands
    there in the other two is finite and means nothing."""


Divergence = Callable[[Classes], Tensor]
"""From the classes of some rows to their divergences `[C]`, in nats (`tvd`: a share)."""

# A head that sums to one in float32 leaves the tail unknown below its unit roundoff, 2^-24. A student's mass on a class
# to which the teacher gives none is measured against that, not against zero.
_LOG_UNKNOWN_MASS = -24 * 0.6931471805599453

# Softmax in float32 over a large vocabulary is right to a few 1e-6: classes whose masses are nearer than that are
# equal, and |p - q| has no slope there.
_SAME_MASS = 1e-5


def forward_kl(classes: Classes) -> Tensor:
    """KL(teacher‖student)."""
    return _kl(classes.log_p_CJ, classes.log_q_CJ, classes.exists_CJ)


def reverse_kl(classes: Classes) -> Tensor:
    """KL(student‖teacher)."""
    return _kl(classes.log_q_CJ, classes.log_p_CJ.clamp_min(_LOG_UNKNOWN_MASS), classes.exists_CJ)


def jsd(classes: Classes, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence; 0 < beta < 1. It vanishes with beta -> 0 and with beta -> 1."""
    log_m_CJ = _log_mixture(classes.log_p_CJ, classes.log_q_CJ, beta)
    from_teacher_C = _kl(classes.log_p_CJ, log_m_CJ, classes.exists_CJ)
    from_student_C = _kl(classes.log_q_CJ, log_m_CJ, classes.exists_CJ)
    return beta * from_teacher_C + (1 - beta) * from_student_C


def skew_kl(classes: Classes, alpha: float) -> Tensor:
    """KL(teacher‖mixture) with the share alpha of the teacher in the mixture; 0 < alpha < 1."""
    return _kl(classes.log_p_CJ, _log_mixture(classes.log_p_CJ, classes.log_q_CJ, alpha), classes.exists_CJ)


def skew_reverse_kl(classes: Classes, alpha: float) -> Tensor:
    """KL(student‖mixture) with the share alpha of the student in the mixture; 0 < alpha < 1."""
    return _kl(classes.log_q_CJ, _log_mixture(classes.log_q_CJ, classes.log_p_CJ, alpha), classes.exists_CJ)


def tvd(classes: Classes) -> Tensor:
    """Total variation: half the sum of |p - q|."""
    p_CJ, q_CJ = classes.log_p_CJ.exp(), classes.log_q_CJ.exp()
    differs_CJ = classes.exists_CJ & ((p_CJ - q_CJ).abs() > _SAME_MASS * (p_CJ + q_CJ))
    return torch.where(differs_CJ, (p_CJ - q_CJ).abs(), 0.0).sum(dim=1) / 2


def truncated_kl(classes: Classes) -> Tensor:
    """The cached tokens' terms of the forward KL and nothing for the rest. Biased; can be negative."""
    return forward_kl(_without_rest(classes))


def renormalised_kl(classes: Classes) -> Tensor:
    """The forward KL of teacher and student given that the token is a cached one. Biased."""
    head = _without_rest(classes)
    log_p_CK, log_q_CK = (
        torch.where(head.exists_CJ, log_CK, -torch.inf).log_softmax(dim=1) for log_CK in (head.log_p_CJ, head.log_q_CJ)
    )
    return _kl(log_p_CK, torch.where(head.exists_CJ, log_q_CK, 0.0), head.exists_CJ)


def _without_rest(classes: Classes) -> Classes:
    return Classes(*(tensor[:, :-1] for tensor in classes))


def _kl(log_a_CJ: Tensor, log_b_CJ: Tensor, exists_CJ: Tensor) -> Tensor:
    """sum a (log a - log b); classes without mass in a count nothing."""
    # Chosen before the difference is taken: a gradient through -inf is not a number, even where it is multiplied by 0.
    without_CJ = ~(exists_CJ & torch.isfinite(log_a_CJ))
    log_a_CJ, log_b_CJ = (log_CJ.masked_fill(without_CJ, 0.0) for log_CJ in (log_a_CJ, log_b_CJ))
    return (log_a_CJ.exp() * (log_a_CJ - log_b_CJ)).sum(dim=1)


def _log_mixture(log_a_CJ: Tensor, log_b_CJ: Tensor, share_of_a: float) -> Tensor:
    share = torch.tensor(share_of_a, dtype=log_a_CJ.dtype)
    return torch.logaddexp(log_a_CJ + share.log(), log_b_CJ + torch.log1p(-share))
