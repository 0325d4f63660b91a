"""What a step of training minimises, computed inside the forward pass of one module.

    step           the module that is wrapped by DistributedDataParallel: student and objective
    distillation   sums over response tokens: divergence and cross-entropy
    preference     sums over pairs
    routing        balance and z-loss of a sparse student, sums over tokens; what the routers did
    sums           adding up over micro-batches and ranks

Everything is a sum over the micro-batch at hand divided by a number of the *global* batch, so that the terms of all
micro-batches on all ranks add up to the step's loss, however it is cut.
"""

from logitlake_student.objectives.distillation import DistillationObjective, check_targets_fit
from logitlake_student.objectives.preference import PreferenceObjective
from logitlake_student.objectives.routing import ExpertBias, RoutingObjective, RoutingSums
from logitlake_student.objectives.step import Objective, StepResult, StudentStep
from logitlake_student.objectives.sums import StepTotals

__all__ = [
    "DistillationObjective",
    "ExpertBias",
    "Objective",
    "PreferenceObjective",
    "RoutingObjective",
    "RoutingSums",
    "StepResult",
    "StepTotals",
    "StudentStep",
    "check_targets_fit",
]
