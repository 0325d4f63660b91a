"""What a worker says that a unit cost is what the lake holds of it, and what it took to know that."""

from contextlib import closing
from typing import Any

import pytest
from tests.teacher_service.test_answers import Bench, bench, read

from logitlake_schemas import GenerateMode
from logitlake_shared.lake import Cache, Lake
from logitlake_teacher.config import FakeEngineConfig, ImagesConfig
from logitlake_teacher.executors import UnitCost
from logitlake_teacher.worker import CaptureJob, UnitWorker

__all__ = ["bench"]

WRITES = GenerateMode(type="generate", max_new_tokens=12, temperature=1.0, seed=3)
TOKENS_PER_IMAGE = 5


def captured(bench: Bench, *sample_ids: str, pieces: int = 1, **options: Any) -> tuple[UnitCost, Cache]:
    """What a unit of these samples cost, and the cache that it lies in."""
    engine = FakeEngineConfig(tokens_per_image=TOKENS_PER_IMAGE)
    spec = bench.spec(engine, **options)
    cache = Lake.create(bench.folder / "lake").create_cache("capture", spec)
    job = CaptureJob("samples", str(bench.folder / "lake"), "capture", engine, bench.setup(spec), ImagesConfig())
    with closing(UnitWorker(job)) as worker:
        cost = worker.run(bench.unit(*sample_ids), {}, pieces).cost
    assert cost is not None
    return cost, cache


@pytest.mark.parametrize(("sample_ids", "options"), [(("one", "two", "text"), {}), (("one", "open"), {"mode": WRITES})])
def test_tokens_are_those_of_the_committed_sequences(
    bench: Bench, sample_ids: tuple[str, ...], options: dict[str, Any]
) -> None:
    """Text and images of the prompts, and the responses, given or written: together all that the teacher saw."""
    cost, cache = captured(bench, *sample_ids, **options)
    samples = read(cache).values()
    num_images = sum(len(sample.image_sha256) for sample in samples)
    assert cost.tokens == {
        "prompt": sum(len(sample.prompt_ids) for sample in samples) - num_images,
        "image": num_images * TOKENS_PER_IMAGE,
        "response": sum(len(sample.response_ids) for sample in samples),
    }
    assert sum(cost.tokens.values()) == sum(sample.expanded_length for sample in samples)


def test_a_second_pass_is_a_second_batch(bench: Bench) -> None:
    """Of the samples with images, and without these: their responses are read twice, their images once."""
    cost, cache = captured(bench, "one", "text", no_image_pass=True)
    samples = read(cache)
    assert len(cost.batches_s) == 2
    assert cost.tokens["image"] == TOKENS_PER_IMAGE
    assert cost.tokens["response"] == 2 * len(samples["one"].response_ids) + len(samples["text"].response_ids)


def test_each_piece_of_a_unit_is_a_batch(bench: Bench) -> None:
    """Which changes nothing of the tokens."""
    whole, _ = captured(bench, "one", "two", "text")
    assert len(whole.batches_s) == 1
    for record in bench.folder.glob("lake/caches/capture/commits/*"):
        record.unlink()
    parts, _ = captured(bench, "one", "two", "text", pieces=3)
    assert len(parts.batches_s) == 3
    assert parts.tokens == whole.tokens
    assert all(seconds >= 0 for seconds in (*whole.batches_s, *parts.batches_s))
