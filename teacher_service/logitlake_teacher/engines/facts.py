"""What planning must know of an engine: how long a sample may be, and how many tokens an image becomes.

Said without starting the engine and without reading a weight, as `identity` says who it is.
"""

from dataclasses import dataclass
from pathlib import Path

from logitlake_schemas import fingerprint, sha256_hex
from logitlake_shared.pixels import image_processor_sha256
from logitlake_teacher.config import EngineConfig, FakeEngineConfig, VllmEngineConfig
from logitlake_teacher.engines.checkpoint import CountImageTokens, read_checkpoint

__all__ = ["EngineFacts", "engine_facts"]


@dataclass(frozen=True)
class EngineFacts:
    """What planning must know of an engine."""

    context_length: int
    """longest sample, images expanded"""
    count_image_tokens: CountImageTokens
    image_rule: str
    """names what `count_image_tokens` depends on: another rule, another plan"""


def engine_facts(config: EngineConfig, model_dir: Path) -> EngineFacts:
    """The facts of this engine with this teacher. Raises `EngineError` for a teacher that no engine can expand."""
    if isinstance(config, FakeEngineConfig):
        num_tokens = config.tokens_per_image
        return EngineFacts(config.context_length, lambda _width, _height: num_tokens, f"fake/{num_tokens}")
    image_options = config.mm_processor_kwargs if isinstance(config, VllmEngineConfig) else {}
    checkpoint = read_checkpoint(model_dir, image_options)
    context_length = min(config.context_length or checkpoint.context_length, checkpoint.context_length)
    # vLLM generates one token after every sample.
    reserved = 1 if isinstance(config, VllmEngineConfig) else 0
    rule = f"{sha256_hex((model_dir / 'config.json').read_bytes())}/{image_processor_sha256(model_dir)}"
    if image_options:
        rule += f"/{fingerprint(image_options)}"
    return EngineFacts(context_length - reserved, checkpoint.num_image_tokens, rule)
