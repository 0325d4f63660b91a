"""`[pairs]`: where preference pairs come from. A union on `type`: `given` by the data, or `made` by the teacher.

How pairs are made determines what is stored, so the whole section is part of the cache's fingerprint. A margin has
the unit of its rating, so it stands in the section of the ranking.
"""

import re
import string
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from logitlake_shared.config import StrictModel

__all__ = [
    "GivenPairs",
    "GoldRanking",
    "JudgeRanking",
    "MadePairs",
    "PairsOptions",
    "Ranking",
    "VisualAdvantageRanking",
]

_TEMPLATE = (
    "Question: {question}\nAnswer: {answer}\nIs the answer faithful to the image, with nothing in it that the image "
    "does not show? Reply with yes or no."
)


class JudgeRanking(StrictModel):
    """The teacher reads image, question and candidate, and is asked whether the candidate is faithful."""

    type: Literal["judge"] = "judge"
    template: str = _TEMPLATE
    """the judge's question; {question} becomes the text of the last user turn, {answer} the candidate"""
    yes: tuple[str, ...] = Field(default=("yes",), min_length=1)
    """words of approval, each also capitalised, in capitals and after a blank, as far as each is a single token"""
    no: tuple[str, ...] = Field(default=("no",), min_length=1)
    """words of refusal, read in the same way; none may share a token with the words of approval"""
    rating: Literal["log_odds", "probability"] = "log_odds"
    """`log_odds`: log p(yes) - log p(no), in nats; `probability`: p(yes) / (p(yes) + p(no))"""
    claims: str | None = None
    """a regular expression that cuts a candidate into claims, each judged alone; default: the candidate as a whole"""
    combine: Literal["mean", "min", "sum"] = "mean"
    """how the ratings of the claims become one; `min` is the rating of the worst claim"""
    min_margin: float = Field(default=1.0, gt=0)
    """chosen and rejected differ by at least this much, in the unit of `rating`"""

    @model_validator(mode="after")
    def _margin_can_be_reached(self) -> Self:
        if self.rating == "probability" and self.combine != "sum" and self.min_margin >= 1:
            raise ValueError(
                f"min_margin is {self.min_margin}, but with rating='probability' two ratings differ by less than 1; "
                "set a margin such as 0.2"
            )
        return self

    @field_validator("template")
    @classmethod
    def _template_has_its_places(cls, template: str) -> str:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise ValueError(f"not a template: {error}; write a literal brace as {{{{ or }}}}") from None
        strangers = sorted(set(names) - {"question", "answer"})
        if strangers or names.count("answer") != 1 or names.count("question") > 1:
            raise ValueError(f"expected {{answer}} once, {{question}} at most once and no other place, got {names}")
        return template

    @field_validator("claims")
    @classmethod
    def _claims_is_an_expression(cls, claims: str | None) -> str | None:
        if claims is not None:
            try:
                re.compile(claims)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return claims


class VisualAdvantageRanking(StrictModel):
    """How much more probable the image makes the candidate: its logprob with the image minus that without."""

    type: Literal["visual_advantage"]
    reduce: Literal["mean", "sum"] = "mean"
    """over the candidate's tokens: `mean` is in nats a token, `sum` favours long candidates"""
    min_margin: float = Field(default=0.1, gt=0)
    """chosen and rejected differ by at least this much, in the unit of `reduce`"""


class GoldRanking(StrictModel):
    """How well the candidate agrees with the answer that the data gives, from 0 to 1."""

    type: Literal["gold"]
    measure: Literal["exact", "token_f1", "lcs"] = "token_f1"
    """of the texts in lower case, closing punctuation left out: `exact` equality; `token_f1`, the F1 of their words as
    bags; `lcs`, the F1 of their longest common subsequence of words (ROUGE-L)"""
    min_margin: float = Field(default=0.2, gt=0, le=1)
    """chosen and rejected differ by at least this much"""


Ranking = Annotated[JudgeRanking | VisualAdvantageRanking | GoldRanking, Field(discriminator="type")]


class GivenPairs(StrictModel):
    """The data holds chosen and rejected responses (RLAIF-V); the teacher scores both."""

    type: Literal["given"] = "given"
    no_image_pass: bool = False
    """score both once more with the images left out of the prompt"""

    @property
    def scores_without_images(self) -> bool:
        """Whether the cache holds logprobs without the images."""
        return self.no_image_pass


class MadePairs(StrictModel):
    """The data holds prompts; the teacher writes candidates, and the best and the worst of them become a pair."""

    type: Literal["made"]
    num_candidates: int = Field(default=8, ge=1, le=256)
    """candidates of each prompt, drawn in one request, so that they share the prefill of prompt and image"""
    temperature: float = Field(default=1.0, gt=0)
    """of the drawing; the stored logprobs are the teacher's own, at T = 1"""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """draws from the fewest tokens whose probability reaches this"""
    max_new_tokens: int = Field(default=256, gt=1)
    """longest candidate, EOS included; one that is longer is cut, and a cut candidate is never used"""
    seed: int = Field(default=0, ge=0)
    """another seed draws other candidates; a prompt's own seed is made of this and its id"""
    ranking: Ranking = JudgeRanking()
    """how candidates are rated: `judge`, `visual_advantage` or `gold`"""
    chosen: Literal["best", "gold"] = "best"
    """`best`: the pair is two candidates; `gold`: the data's answer is chosen, and only the rejected is a candidate"""
    max_length_ratio: float = Field(default=2.0, ge=1, allow_inf_nan=False)
    """the longer response has at most this many times the tokens of the shorter, EOS counted"""
    max_length_difference: int | None = Field(default=None, ge=0)
    """the longer response has at most this many tokens more; default: any number"""
    no_image_pass: bool = False
    """score both once more with the images left out; `visual_advantage` always does"""

    @property
    def scores_without_images(self) -> bool:
        """Whether the cache holds logprobs without the images."""
        return self.no_image_pass or self.ranking.type == "visual_advantage"

    @model_validator(mode="after")
    def _two_responses(self) -> Self:
        if self.chosen == "best" and self.num_candidates < 2:
            raise ValueError("num_candidates is 1, but a pair of candidates needs two; or set chosen='gold'")
        return self


PairsOptions = Annotated[GivenPairs | MadePairs, Field(discriminator="type")]
