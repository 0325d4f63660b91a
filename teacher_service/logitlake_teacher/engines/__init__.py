"""Teacher engines: `fake` (no weights), `hf` (transformers), `vllm`.

`build_engine` makes one, `identify_engine` says who it would be without loading it. Both import an engine's library
only when that engine is asked for.
"""

from logitlake_teacher.config import EngineConfig, FakeEngineConfig, HfEngineConfig
from logitlake_teacher.engines.base import (
    Engine,
    EngineSetup,
    Generation,
    SampleProblem,
    Sampling,
    ScoredSample,
    ScoreRequest,
)
from logitlake_teacher.engines.identity import identify_engine

__all__ = [
    "Engine",
    "EngineSetup",
    "Generation",
    "SampleProblem",
    "Sampling",
    "ScoreRequest",
    "ScoredSample",
    "build_engine",
    "identify_engine",
]


def build_engine(config: EngineConfig, setup: EngineSetup) -> Engine:
    """The engine of this configuration, loaded and checked. Raises `EngineError`."""
    if isinstance(config, FakeEngineConfig):
        from logitlake_teacher.engines.fake import FakeEngine

        return FakeEngine(config, setup)
    if isinstance(config, HfEngineConfig):
        from logitlake_teacher.engines.hf import HfEngine

        return HfEngine(config, setup)
    from logitlake_teacher.engines.vllm import VllmEngine

    return VllmEngine(config, setup)
