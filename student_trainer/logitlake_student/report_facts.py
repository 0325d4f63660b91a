"""What the report knows about a run, gathered from the files that the other commands left.

Everything is read and checked before anything is written: a page is about one run, one lake and the evaluations of
exactly that lake, or there is no page. A stage that is not finished is left out; a finished one that was not examined
is an error that says which command to run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError

from logitlake_shared.cache_figures import CacheFigures, cache_figures
from logitlake_shared.errors import ConfigError, DataError, FingerprintMismatchError, LakeError
from logitlake_shared.lake import Cache, Lake
from logitlake_student.config import STAGE_ORDER, ReportConfig
from logitlake_student.run import CACHED_MASS, DONE, METRICS

__all__ = ["FIGURES", "EvalResult", "Example", "Figure", "RunFacts", "StageFacts", "gather"]


@dataclass(frozen=True)
class Figure:
    """One of the figures by which models are compared."""

    key: str
    title: str
    short_title: str
    """for the head of a narrow column"""
    higher_is_better: bool
    kind: Literal["share", "score", "nats"]

    @property
    def arrow(self) -> str:
        """Points to where better is."""
        return "↑" if self.higher_is_better else "↓"

    def text(self, value: float | None) -> str:
        """The value as the tables show it; None is unknown, not zero."""
        if value is None:
            return "–"
        return {"share": f"{100 * value:.1f}\u00a0%", "score": f"{value:.3f}", "nats": f"{value:.4f}"}[self.kind]


FIGURES = (
    Figure("vqa_accuracy", "VQA accuracy", "VQA accuracy", True, "share"),
    Figure("hallucination_f1", "Existence F1", "Existence F1", True, "score"),
    Figure("caption_hallucination_rate", "Captions that hallucinate", "Hallucination", False, "share"),
    Figure("kl_to_teacher", "KL to teacher", "KL, nats", False, "nats"),
)
"""The columns of the main table, and the keys of a model in the summary."""


class _Read(BaseModel):
    """Documents of other commands: what is used is checked, what is not is let pass."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


Document = TypeVar("Document", bound=_Read)


class Example(_Read):
    """One held-out caption."""

    id: str
    image: str | None
    question: str
    gold: str | None
    answer: str
    objects: tuple[str, ...]


class _Settings(_Read):
    image_root: Path
    mention_pattern: str


class _EvaluatedLake(_Read):
    fingerprint: str


class _Identity(_Read):
    lake: _EvaluatedLake
    settings: _Settings


class EvalResult(_Read):
    """What `logitlake-student eval` found out about one model."""

    name: str
    identity: _Identity
    vqa_accuracy: float | None
    hallucination_f1: float | None
    caption_hallucination_rate: float | None
    kl_to_teacher: float | None
    tasks: dict[str, float | None] = {}
    existence: dict[str, float | None] = {}
    captions: dict[str, float | None] = {}
    examples: tuple[Example, ...] = ()
    experts_by_task: dict[str, tuple[tuple[float, ...], ...]] = {}

    def figures(self) -> dict[str, float | None]:
        """The figures of the main table."""
        return {figure.key: getattr(self, figure.key) for figure in FIGURES}


class _LakeOfStage(_Read):
    samples: str
    snapshot: int
    pairs: str | None = None
    pairs_snapshot: int | None = None


class _StageIdentity(_Read):
    lake: _LakeOfStage


class _ClosingFigures(_Read):
    steps: int
    seconds: float
    params_total: int
    params_active: int
    params_trainable: int


class _Done(_Read):
    identity: _StageIdentity
    figures: _ClosingFigures


class CachedMassOfStage(_Read):
    """How much of the teacher the lake held when a stage began to distil from it."""

    samples_by_mass: tuple[int, ...]


@dataclass(frozen=True)
class StageFacts:
    """A finished stage: its closing figures, its lines of metrics, its evaluation."""

    name: str
    done: _Done
    metrics: list[dict[str, Any]]
    result: EvalResult
    cached_mass: CachedMassOfStage | None
    """none of a stage that does not distil"""


@dataclass(frozen=True)
class RunFacts:
    """Everything that the report shows."""

    teacher: EvalResult
    stages: tuple[StageFacts, ...]
    lake: CacheFigures
    pairs: CacheFigures | None
    seconds: dict[str, float]

    @property
    def params_total(self) -> int:
        """Parameters of the student as its last stage left it."""
        return self.stages[-1].done.figures.params_total

    @property
    def params_active(self) -> int:
        """Of these, the parameters that one token meets."""
        return self.stages[-1].done.figures.params_active

    def models(self) -> list[EvalResult]:
        """The evaluations: the teacher, then the stages in their order."""
        return [self.teacher, *(stage.result for stage in self.stages)]


def gather(config: ReportConfig) -> RunFacts:
    """Reads run, evaluations, lake and seconds. Raises `ConfigError`, `DataError` or `LakeError`."""
    names = [name for name in STAGE_ORDER if (config.run / name / DONE).is_file()]
    if not names:
        raise ConfigError(
            f"{config.run}: no finished stage there: expected <stage>/{DONE} for one of {', '.join(STAGE_ORDER)}; "
            "run `logitlake-student train`, or mend `run`"
        )
    cache = Lake.open(config.lake).cache(config.cache)
    teacher = _result(config, config.teacher, cache, why="the teacher, which the table compares with")
    stages = tuple(_stage(config, name, cache) for name in names)
    # Only a preference stage names its pairs, and it is the last.
    of_lake = stages[-1].done.identity.lake
    pairs = None
    if of_lake.pairs is not None:
        pairs_cache = _cache_with(config, of_lake.pairs)
        pairs = cache_figures(pairs_cache, pairs_cache.open_snapshot(of_lake.pairs_snapshot))
    return RunFacts(
        teacher=teacher,
        stages=stages,
        lake=cache_figures(cache, cache.open_snapshot(of_lake.snapshot)),
        pairs=pairs,
        seconds=_seconds(config, stages),
    )


def _stage(config: ReportConfig, name: str, cache: Cache) -> StageFacts:
    folder = config.run / name
    done = _parse(_Done, folder / DONE, "`logitlake-student train` writes it")
    if done.identity.lake.samples != cache.fingerprint:
        raise FingerprintMismatchError(
            f"{folder}: trained on a cache with fingerprint {done.identity.lake.samples}, but {config.cache!r} of "
            f"{config.lake} has {cache.fingerprint}; name the lake and cache that the run learned from"
        )
    mass = folder / CACHED_MASS
    advice = "restore it, or remove it to show the report without"
    return StageFacts(
        name,
        done,
        _metrics(folder / METRICS),
        _result(config, name, cache, why=f"stage {name}"),
        _parse(CachedMassOfStage, mass, advice) if mass.is_file() else None,
    )


def _result(config: ReportConfig, name: str, cache: Cache, *, why: str) -> EvalResult:
    path = config.evaluation / f"{name}.json"
    advice = f"run `logitlake-student eval CONFIG.toml` with a model named {name!r} and output={config.evaluation}"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: {why} has not been examined; {advice}")
    result = _parse(EvalResult, path, advice)
    if result.identity.lake.fingerprint != cache.fingerprint:
        raise FingerprintMismatchError(
            f"{path}: measured against a cache with fingerprint {result.identity.lake.fingerprint}, but "
            f"{config.cache!r} of {config.lake} has {cache.fingerprint}; {advice} on this lake"
        )
    return result


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file, though the stage is finished; restore it, or train the stage again")
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}, line {number}: expected an object with a `step`, got {line[:80]!r}; restore the file, or "
                "train the stage again"
            ) from None
        lines.append(record)
    return lines


def _cache_with(config: ReportConfig, fingerprint: str) -> Cache:
    lake = Lake.open(config.lake)
    for name in lake.cache_names():
        if (cache := lake.cache(name)).fingerprint == fingerprint:
            return cache
    raise LakeError(
        f"{config.lake}: no cache with fingerprint {fingerprint}, which the preference stage learned from; name the "
        "lake of the run"
    )


def _seconds(config: ReportConfig, stages: tuple[StageFacts, ...]) -> dict[str, float]:
    if config.seconds is None:
        return {stage.name: stage.done.figures.seconds for stage in stages}
    advice = "leave `seconds` out of the configuration to show the stages' own"
    if not config.seconds.is_file():
        raise ConfigError(f"{config.seconds}: no such file: expected JSON {{step: seconds}}; {advice}")
    try:
        return TypeAdapter(dict[str, FiniteFloat]).validate_json(config.seconds.read_bytes())
    except ValidationError as error:
        raise DataError(f"{config.seconds}: not JSON {{step: seconds}}: {_problems(error)}; {advice}") from None


def _parse(cls: type[Document], path: Path, advice: str) -> Document:
    try:
        return cls.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: {_problems(error)}; {advice}") from None


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'document'}: {problem['msg']}" for problem in error.errors()[:3]
    )
