"""Do made pairs tell truth from invention? Captions of digit scenes, rated in every way, held against the scene.

    python -m benchmarks.pairs [--json] [--quick] [--scenes N]

The committed teacher writes eight captions a scene at T = 1; half of the scenes have the habit that it was taught to
invent an object for. A caption hallucinates when it names an object that is not in the scene. A ranking is worth what
the chosen captions hallucinate less than the rejected ones; two candidates at random hallucinate alike.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from examples.digit_scenes.make import png_bytes
from examples.digit_scenes.questions import ask, caption_of, has_habit, mentions
from examples.digit_scenes.world import draw_layout, draw_scene

from benchmarks.harness import Figure, publish
from logitlake_schemas import CaptureSpec, DatasetIdentity
from logitlake_shared.data_formats import ImageRef
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_shared.rows import LakePair
from logitlake_teacher.config import HfEngineConfig, MadePairs
from logitlake_teacher.engines import EngineSetup, build_engine, identify_engine
from logitlake_teacher.items import PlannedSample
from logitlake_teacher.pairs import PAIRS_CODEC, PairMaker
from logitlake_teacher.pairs.judge import JUDGE_K

__all__ = ["RANKINGS", "Scenes", "hallucination"]

TEACHER = Path(__file__).parents[1] / "examples" / "digit_scenes" / "models" / "teacher"
SEED = 7
_CLAIMS = "( at the (top|bottom) (left|right))?(, | and |$)"

RANKINGS: dict[str, dict[str, Any]] = {
    "gold, longest common subsequence": {"type": "gold", "measure": "lcs", "min_margin": 0.05},
    "judge, each object": {
        "type": "judge",
        "template": "Is there {answer}?",
        "claims": _CLAIMS,
        "combine": "min",
        "min_margin": 0.1,
    },
    "judge, whole caption": {"type": "judge", "min_margin": 0.1},
    "visual advantage, mean": {"type": "visual_advantage", "reduce": "mean", "min_margin": 0.01},
    "visual advantage, sum": {"type": "visual_advantage", "reduce": "sum", "min_margin": 0.1},
}
# The rankings that have to work here; the others are reported as they are.
EXPECTED = ("gold, longest common subsequence", "judge, each object")


class Scenes:
    """Scenes of test digits as prompts, and the teacher that writes about them."""

    def __init__(self, num_scenes: int) -> None:
        self.renderer = Renderer(TEACHER)
        self.truth: dict[str, set[str]] = {}
        self._decoded: dict[str, DecodedImage] = {}
        self._items = [self._prompt(number) for number in range(num_scenes)]
        self._setup = EngineSetup(
            TEACHER,
            self.renderer.vocab_size,
            self.renderer.eos_id,
            self.renderer.image_token_id,
            JUDGE_K,
            num_threads=1,
        )
        self._engine = build_engine(HfEngineConfig(), self._setup)

    def pairs(self, ranking: dict[str, Any]) -> list[LakePair]:
        """The pairs that this ranking makes; prompts without one are left out."""
        options = MadePairs.model_validate(
            {"type": "made", "ranking": ranking, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48}
        )
        spec = CaptureSpec(
            kind="pairs",
            tokenizer=self.renderer.identity(),
            engine=identify_engine(HfEngineConfig(), self._setup),
            codec=PAIRS_CODEC,
            dataset=DatasetIdentity(snapshot_sha256="0" * 64, num_samples=len(self._items), unit_tokens=1),
            no_image_pass=options.scores_without_images,
            pair_making=options.model_dump(mode="json"),
        )
        answers = PairMaker(options, self.renderer).pairs_of(self._engine, self._items, self._decoded, spec)
        return [answer for answer in answers if isinstance(answer, LakePair)]

    def _prompt(self, number: int) -> PlannedSample:
        rng = np.random.default_rng([SEED, number])
        objects = draw_layout(rng)
        while number % 2 == 0 and not has_habit(objects):
            objects = draw_layout(rng)
        scene = draw_scene("test", rng, objects)
        data = png_bytes(scene)
        image = DecodedImage.of(data)
        self._decoded[image.image_sha256] = image
        name = f"scene-{number:04d}"
        self.truth[name] = {placed.phrase for placed in objects}
        question = [{"type": "image"}, {"type": "text", "text": ask("caption", objects, rng).text}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": caption_of(objects)},
        ]
        rendered = self.renderer.render(messages)
        return PlannedSample(
            name,
            "caption",
            "digit_scenes",
            "test",
            messages,
            rendered.prompt_ids,
            rendered.prompt_lengths,
            rendered.response_ids,
            rendered.response_lengths,
            (ImageRef(data=data),),
            (image.image_sha256,),
        )


def hallucination(scenes: Scenes, pairs: list[LakePair]) -> tuple[float, float]:
    """Shares of the chosen and of the rejected captions that name an object that is not there."""

    def share(texts: Iterator[tuple[str, str]]) -> float:
        return float(np.mean([not set(mentions(text)) <= scenes.truth[name] for name, text in texts]))

    decode = scenes.renderer.decode
    return (
        share((pair.pair_id, decode(pair.chosen_ids)) for pair in pairs),
        share((pair.pair_id, decode(pair.rejected_ids)) for pair in pairs),
    )


def measure(num_scenes: int) -> list[Figure]:
    """For each ranking: pairs made, and what chosen and rejected captions hallucinate."""
    scenes = Scenes(num_scenes)
    figures = []
    for name, ranking in RANKINGS.items():
        pairs = scenes.pairs(ranking)
        chosen, rejected = hallucination(scenes, pairs)
        must = name in EXPECTED
        figures += [
            Figure(f"{name}: pairs of {num_scenes} prompts", len(pairs), "pairs"),
            Figure(
                f"{name}: chosen captions that hallucinate",
                chosen,
                "share",
                f"≤ half of the rejected ({rejected:.3f})" if must else f"rejected {rejected:.3f}",
                chosen <= rejected / 2 if must else None,
            ),
        ]
    return figures


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True)
@click.option("--quick", is_flag=True, help="12 scenes")
@click.option("--scenes", default=80, show_default=True)
def main(as_json: bool, quick: bool, scenes: int) -> None:
    publish("pairs", measure(12 if quick else scenes), as_json)


if __name__ == "__main__":
    main()
