"""A file of scores in figures: by task, and where the student differs most. Imports nothing heavy.

Scoring the same model on the same snapshot again finds the file there and ends at once, with the same figures.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from logitlake_schemas import ScoresRecord
from logitlake_shared.errors import ConfigError, ScoresError
from logitlake_shared.student_scores import ScoredSample, read_record

__all__ = ["Summary", "TaskFigures", "is_scored", "summarised"]

# Samples that a summary names.
_WORST = 5


def is_scored(out: Path, record: ScoresRecord) -> bool:
    """Whether the file holds just these scores already. Another file of scores there may be replaced.

    Raises `ConfigError` where there is something else, which must not be, or where no file can be.
    """
    try:
        return read_record(out) == record
    except FileNotFoundError:
        return False
    except ScoresError:
        raise ConfigError(f"{out}: is there, and no file of scores; choose another --out, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{out}: cannot be looked at: {error.strerror}; choose another --out") from None


@dataclass
class TaskFigures:
    """Sums over the scored samples of a task."""

    num_samples: int = 0
    num_tokens: int = 0
    forward_kl_sum: float = 0.0
    logprob_sum: float = 0.0
    num_first: int = 0
    """tokens of the response that are the student's first choice"""

    def add(self, sample: ScoredSample) -> None:
        """One more."""
        self.num_samples += 1
        self.num_tokens += len(sample.label_logprob_T)
        self.forward_kl_sum += float(sample.forward_kl_T.sum(dtype=np.float64))
        self.logprob_sum += float(sample.label_logprob_T.sum(dtype=np.float64))
        self.num_first += int((sample.label_rank_T == 1).sum())

    def means(self) -> dict[str, float]:
        """Means over the response tokens; `perplexity` is that of the response."""
        return {
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "forward_kl": self.forward_kl_sum / self.num_tokens,
            "perplexity": float(np.exp(-self.logprob_sum / self.num_tokens)),
            "first_choice": self.num_first / self.num_tokens,
        }


@dataclass
class Summary:
    """A file of scores in figures."""

    by_task: dict[str, TaskFigures] = field(default_factory=dict)
    total: TaskFigures = field(default_factory=TaskFigures)
    worst: list[tuple[float, str]] = field(default_factory=list)
    """mean forward_kl and id of the samples in which the student differs most, the worst first"""


def summarised(scores: Iterable[ScoredSample]) -> Summary:
    """The figures of these scores."""
    summary = Summary()
    for sample in scores:
        summary.by_task.setdefault(sample.task, TaskFigures()).add(sample)
        summary.total.add(sample)
        entry = float(sample.forward_kl_T.mean()), sample.sample_id
        heapq.heappush(summary.worst, entry)
        if len(summary.worst) > _WORST:
            heapq.heappop(summary.worst)
    summary.worst.sort(reverse=True)
    return summary
