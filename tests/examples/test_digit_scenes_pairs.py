"""The demo teacher makes pairs of its own captions, and the rankings that see the truth find it."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.pairs import RANKINGS, Scenes, hallucination

NUM_SCENES = 12


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Half of them have the habit that the teacher was taught to invent an object for."""
    return Scenes(NUM_SCENES)


@pytest.mark.slow
@pytest.mark.parametrize("ranking", ["gold, longest common subsequence", "judge, each object"])
def test_chosen_captions_hallucinate_less_than_rejected_ones(scenes: Scenes, ranking: str) -> None:
    """By the scene's own truth: the data's answer as a measure, or the teacher asked about each object it named."""
    pairs = scenes.pairs(RANKINGS[ranking])
    assert len(pairs) >= NUM_SCENES // 2
    chosen, rejected = hallucination(scenes, pairs)
    assert chosen < rejected / 2
