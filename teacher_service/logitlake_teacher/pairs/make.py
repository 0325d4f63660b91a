"""Pairs that the teacher makes: it writes N candidates for each prompt, they are rated, and two of them are kept.

    prompt -> N candidates (one request: one prefill of prompt and image, logprobs come with the tokens)
           -> usable and distinct -> rated: judge | visual_advantage | gold -> best and worst, or a reason why not

All prompts of a unit go through a step together, so that the engine has full batches. A prompt that gives no pair
becomes an error row with a code `pair_…`: it is counted and can be asked for in SQL, and is no failure of the capture.
Every pair says how it was made: method, drawing, its own seed, all ratings in order, the ranks of the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from logitlake_schemas import CaptureSpec, UnitError, canonical_json
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer
from logitlake_shared.rows import LakePair
from logitlake_teacher.config import GoldRanking, JudgeRanking, MadePairs, Ranking, VisualAdvantageRanking
from logitlake_teacher.engines import Engine, Generation, SampleProblem, Sampling, ScoredSample, ScoreRequest
from logitlake_teacher.engines.base import seed_of
from logitlake_teacher.items import Item, PlannedSample, single_turn
from logitlake_teacher.pairs.candidates import Candidate, usable
from logitlake_teacher.pairs.judge import JUDGE_K, Judge, Judged
from logitlake_teacher.pairs.ranking import agreement, visual_advantage
from logitlake_teacher.pairs.score import Float32, Response, label_logprobs, no_image_prompt
from logitlake_teacher.pairs.selection import NoPair, Rated, SelectedPair, select
from logitlake_teacher.unit_work import accept

__all__ = ["PairMaker"]

# Digits of the judge's template digest that each pair carries; the template itself is in the cache's spec.
_DIGEST_DIGITS = 16


@dataclass
class _Prompt:
    """One prompt on its way to a pair; where it ends, it goes no step further."""

    item: PlannedSample
    """in the form of a single turn: see `items.single_turn`"""
    images: tuple[DecodedImage, ...]
    gold_text: str
    """the data's answer; empty where it gives none"""
    candidates: list[Candidate] = field(default_factory=list)
    """what the teacher wrote: usable, and each text once"""
    gold: Candidate | None = None
    """the data's answer, where it is to be the chosen one"""
    ratings: list[float] = field(default_factory=list)
    """of `rated`, in that order"""
    no_image_logprobs: dict[tuple[int, ...], Float32] = field(default_factory=dict)
    """by response ids"""
    selected: SelectedPair | None = None
    ended: UnitError | None = None

    @property
    def rated(self) -> list[Candidate]:
        """All that get a rating: the candidates and, last, the data's answer if it is to be the chosen one."""
        return self.candidates if self.gold is None else [*self.candidates, self.gold]

    def request(self) -> ScoreRequest:
        """The prompt as it waits for an answer."""
        item = self.item
        nothing = np.zeros(0, np.int32)
        return ScoreRequest(
            item.sample_id, item.prompt_ids, item.prompt_lengths, nothing, np.zeros(1, np.int32), self.images
        )

    def end(self, why: NoPair | UnitError | SampleProblem) -> None:
        """No pair comes of this prompt."""
        self.ended = UnitError(sample_id=self.item.sample_id, code=why.code, message=why.message)


class PairMaker:
    """Implements `PairProducer` for pairs that the teacher makes.

    Raises `ConfigError` when the teacher's tokenizer has no single tokens for the judge's yes and no.
    """

    def __init__(self, options: MadePairs, renderer: Renderer) -> None:
        self._options = options
        self._renderer = renderer
        self._judge = Judge(options.ranking, renderer) if isinstance(options.ranking, JudgeRanking) else None
        self.k = 1 if self._judge is None else min(JUDGE_K, renderer.vocab_size)
        """entries a token that the engine is to be set up for"""
        self._sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            n=options.num_candidates,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )

    def pairs_of(
        self, engine: Engine, items: Sequence[Item], decoded: Mapping[str, DecodedImage], spec: CaptureSpec
    ) -> list[LakePair | UnitError]:
        """See `PairProducer.pairs_of`."""
        prompts = [self._prompt(item, decoded) for item in items if isinstance(item, PlannedSample)]
        self._write(engine, _going_on(prompts), spec)
        self._score_gold(engine, _going_on(prompts), spec)
        self._rate(engine, _going_on(prompts), spec)
        self._select(_going_on(prompts))
        self._score_without_images(engine, _going_on(prompts), spec)
        return [prompt.ended or self._lake_pair(prompt) for prompt in prompts]

    def _prompt(self, item: PlannedSample, decoded: Mapping[str, DecodedImage]) -> _Prompt:
        single = single_turn(item)
        images = tuple(decoded[sha256] for sha256 in item.image_sha256)
        prompt = _Prompt(single, images, self._renderer.decode(single.response_ids))
        ranking = self._options.ranking
        if isinstance(ranking, VisualAdvantageRanking) and not images:
            prompt.end(NoPair("pair_no_image", "the prompt has no image, so no image can have an advantage"))
        elif (isinstance(ranking, GoldRanking) or self._options.chosen == "gold") and not prompt.gold_text:
            prompt.end(NoPair("pair_no_gold", "the data gives no answer to compare with"))
        return prompt

    def _write(self, engine: Engine, prompts: list[_Prompt], spec: CaptureSpec) -> None:
        """The candidates of each prompt."""
        answers = engine.generate([prompt.request() for prompt in prompts], self._sampling) if prompts else []
        for prompt, answer in zip(prompts, answers, strict=True):
            if isinstance(answer, SampleProblem):
                prompt.end(answer)
            else:
                self._take(prompt, answer, spec)

    def _take(self, prompt: _Prompt, written: Sequence[Generation], spec: CaptureSpec) -> None:
        """Keeps the usable candidates; ends the prompt if they are too few."""
        candidates: list[Candidate] = []
        for one in written:
            answer = ScoredSample(prompt.item.sample_id, one.rows, one.expanded_length)
            checked = accept(prompt.item, answer, one.response_ids, spec)
            if isinstance(checked, UnitError):
                prompt.end(checked)
                return
            text = self._renderer.decode(one.response_ids)
            candidates.append(Candidate(one.response_ids, text, checked.rows.label_logprob_T))
        gold_is_chosen = self._options.chosen == "gold"
        prompt.candidates, left_out = usable(
            candidates, self._renderer, not_text=prompt.gold_text if gold_is_chosen else None
        )
        needed = 1 if gold_is_chosen else 2
        if len(prompt.candidates) < needed:
            reasons = "".join(f", {count} {reason}" for reason, count in left_out.items())
            prompt.end(
                NoPair(
                    "pair_one_candidate",
                    f"{len(written)} candidates{reasons}: {len(prompt.candidates)} left, {needed} needed; raise "
                    "pairs.temperature, pairs.num_candidates or pairs.max_new_tokens",
                )
            )

    def _score_gold(self, engine: Engine, prompts: list[_Prompt], spec: CaptureSpec) -> None:
        """The data's answer as a candidate, where it is to be the chosen one."""
        if self._options.chosen != "gold":
            return
        responses = [
            Response(prompt.item, "gold", prompt.item.prompt_ids, prompt.item.response_ids, prompt.images)
            for prompt in prompts
        ]
        for prompt, logprobs in zip(prompts, label_logprobs(engine, responses, spec), strict=True):
            if isinstance(logprobs, UnitError):
                prompt.end(logprobs)
            else:
                prompt.gold = Candidate(prompt.item.response_ids, prompt.gold_text, logprobs)

    def _rate(self, engine: Engine, prompts: list[_Prompt], spec: CaptureSpec) -> None:
        """A rating for everything in `rated`."""
        ranking = self._options.ranking
        if isinstance(ranking, GoldRanking):
            for prompt in prompts:
                prompt.ratings = [agreement(one.text, prompt.gold_text, ranking.measure) for one in prompt.rated]
        elif isinstance(ranking, VisualAdvantageRanking):
            self._read_without_images(engine, [(prompt, prompt.rated) for prompt in prompts], spec)
            for prompt in prompts:
                if prompt.ended is None:
                    prompt.ratings = [
                        visual_advantage(one.logprobs_T, prompt.no_image_logprobs[one.ids], ranking.reduce)
                        for one in prompt.rated
                    ]
        else:
            assert self._judge is not None
            judged = [
                Judged(prompt.item, number, one.text, prompt.images)
                for prompt in prompts
                for number, one in enumerate(prompt.rated)
            ]
            ratings = iter(self._judge.ratings(engine, judged, spec))
            for prompt in prompts:
                own = [next(ratings) for _ in prompt.rated]
                failed = next((rating for rating in own if isinstance(rating, UnitError)), None)
                if failed is not None:
                    prompt.end(failed)
                prompt.ratings = [rating for rating in own if not isinstance(rating, UnitError)]

    def _select(self, prompts: list[_Prompt]) -> None:
        """The pair of each prompt, or why there is none."""
        for prompt in prompts:
            rated = [Rated(one, rating) for one, rating in zip(prompt.rated, prompt.ratings, strict=True)]
            gold = None if prompt.gold is None else rated.pop()
            selected = select(rated, self._options.ranking.min_margin, self._options, gold)
            if isinstance(selected, NoPair):
                prompt.end(selected)
            else:
                prompt.selected = selected

    def _score_without_images(self, engine: Engine, prompts: list[_Prompt], spec: CaptureSpec) -> None:
        """The no-image logprobs of the two that were selected, where they are asked for and not known already."""
        if not spec.no_image_pass:
            return
        wanted = []
        for prompt in prompts:
            pair = prompt.selected
            assert pair is not None
            both = [side.candidate for side in (pair.chosen, pair.rejected)]
            wanted.append((prompt, [one for one in both if one.ids not in prompt.no_image_logprobs and prompt.images]))
        self._read_without_images(engine, wanted, spec)

    def _read_without_images(
        self, engine: Engine, wanted: Sequence[tuple[_Prompt, Sequence[Candidate]]], spec: CaptureSpec
    ) -> None:
        responses, owners = [], []
        for prompt, candidates in wanted:
            prompt_ids = no_image_prompt(self._renderer, prompt.item) if candidates else prompt.item.prompt_ids
            for number, one in enumerate(candidates):
                responses.append(Response(prompt.item, f"no_image/{number}", prompt_ids, one.response_ids))
                owners.append((prompt, one))
        for (prompt, one), logprobs in zip(owners, label_logprobs(engine, responses, spec), strict=True):
            if isinstance(logprobs, UnitError):
                prompt.end(logprobs)
            else:
                prompt.no_image_logprobs[one.ids] = logprobs

    def _lake_pair(self, prompt: _Prompt) -> LakePair:
        item, pair = prompt.item, prompt.selected
        assert pair is not None
        chosen, rejected = pair.chosen.candidate, pair.rejected.candidate
        return LakePair(
            pair_id=item.sample_id,
            task=item.task,
            source=item.source,
            split=item.split,
            messages=item.messages,
            prompt_ids=item.prompt_ids,
            image_sha256=item.image_sha256,
            chosen_ids=chosen.response_ids,
            rejected_ids=rejected.response_ids,
            chosen_logprobs=chosen.logprobs_T,
            rejected_logprobs=rejected.logprobs_T,
            chosen_logprobs_no_image=prompt.no_image_logprobs.get(chosen.ids),
            rejected_logprobs_no_image=prompt.no_image_logprobs.get(rejected.ids),
            chosen_rating=pair.chosen.rating,
            rejected_rating=pair.rejected.rating,
            made_by=self._made_by(prompt, pair),
        )

    def _made_by(self, prompt: _Prompt, pair: SelectedPair) -> str:
        """Compact JSON; numbers are as short as float32 allows, so that they are the stored ratings exactly."""
        options = self._options
        document = {
            "method": options.ranking.type,
            "unit": _unit(options.ranking),
            "chosen": options.chosen,
            "n": options.num_candidates,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": seed_of(self._sampling, prompt.request()),
            "ratings": [_shortest(rating) for rating in pair.ratings],
            "ranks": [pair.chosen_rank, pair.rejected_rank],
            "margin": _shortest(pair.margin),
        }
        if self._judge is not None:
            document["template_sha256"] = self._judge.template_sha256[:_DIGEST_DIGITS]
        return canonical_json(document).decode()


def _going_on(prompts: Sequence[_Prompt]) -> list[_Prompt]:
    return [prompt for prompt in prompts if prompt.ended is None]


def _unit(ranking: Ranking) -> str:
    if isinstance(ranking, GoldRanking):
        return ranking.measure
    return ranking.reduce if isinstance(ranking, VisualAdvantageRanking) else ranking.rating


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same float32."""
    return float(str(np.float32(value)))
