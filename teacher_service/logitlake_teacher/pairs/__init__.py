"""Preference pairs: given by the data and scored, or made by the teacher.

    unit        one unit, whatever its pairs come from
    score       pairs of the data: per-token logprobs of chosen and rejected
    make        pairs of the teacher's own candidates
    candidates  what may stand in a pair, each text once
    judge       the teacher asked whether a candidate is faithful
    ranking     the three ratings, as functions of texts and logprobs
    selection   which two become the pair, or why none does

`pair_producer` says which of the two a cache is made by: the cache's own spec decides, so that what is done is what
the fingerprint says.
"""

from pathlib import Path

from logitlake_schemas import CaptureSpec, CodecPolicy
from logitlake_shared.rendering import Renderer
from logitlake_teacher.config import MadePairs
from logitlake_teacher.pairs.make import PairMaker
from logitlake_teacher.pairs.score import PairScorer
from logitlake_teacher.pairs.unit import PairProducer, capture_pairs_unit

__all__ = [
    "PAIRS_CODEC",
    "PairMaker",
    "PairProducer",
    "PairScorer",
    "capture_pairs_unit",
    "pair_producer",
]

PAIRS_CODEC = CodecPolicy(k_max=1, k_min=1, p_min=0.0, grid="exact")
"""The codec of every cache of pairs: one entry a token is captured, for the check, and none is stored."""


def pair_producer(spec: CaptureSpec, model_dir: Path) -> PairProducer:
    """What makes the pairs of a cache with this spec. Raises `ConfigError` as `PairMaker` does."""
    renderer = Renderer(model_dir)
    if spec.pair_making is None:
        return PairScorer(renderer)
    return PairMaker(MadePairs.model_validate(spec.pair_making), renderer)
