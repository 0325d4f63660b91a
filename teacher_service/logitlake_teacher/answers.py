"""Whose responses a unit of samples holds, and what the teacher says of them.

    score      the responses are in the data; the teacher says what it thinks of every token
    generate   the teacher writes the last answer itself; its distribution comes with every token as it writes it

In both modes a second pass can score the same responses with the images left out of the prompt: what a token's logprob
loses is its visual advantage. The cache's own spec decides the mode, so that what is done is what the fingerprint says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from logitlake_schemas import CaptureSpec, GenerateMode, UnitError
from logitlake_shared.images import DecodedImage
from logitlake_shared.rendering import Renderer, without_images
from logitlake_shared.topk import DrawnRows, TeacherRows
from logitlake_teacher.engines.base import Engine, Generation, SampleProblem, Sampling, ScoredSample, ScoreRequest
from logitlake_teacher.items import Item, PlannedSample, single_turn
from logitlake_teacher.unit_work import accept, accept_all, request_of

__all__ = ["Answer", "answers_of"]


@dataclass(frozen=True)
class Answer:
    """A conversation with all its responses, and the teacher's rows for them: one a response token."""

    sample: PlannedSample
    rows: TeacherRows | DrawnRows
    expanded_length: int
    """of the sequence that the teacher saw, images expanded"""
    finish_reason: str
    """`given`, or why the teacher stopped writing: `stop`, `length`"""
    no_image_logprob_T: NDArray[np.float32] | None = None
    """logprob of each response token with the images left out"""


def answers_of(
    engine: Engine, items: Sequence[Item], decoded: Mapping[str, DecodedImage], spec: CaptureSpec, renderer: Renderer
) -> list[Answer | UnitError]:
    """The answer to each item, or why there is none; `decoded` holds the items' images by sha256.

    Raises `EngineError` if the teacher cannot go on.
    """
    samples = [item for item in items if isinstance(item, PlannedSample)]
    if isinstance(spec.mode, GenerateMode):
        answers = _written(engine, samples, decoded, spec, spec.mode, renderer)
    else:
        answers = _given(engine, samples, decoded, spec)
    return _with_no_image_pass(engine, answers, spec, renderer) if spec.no_image_pass else answers


def _given(
    engine: Engine, samples: Sequence[PlannedSample], decoded: Mapping[str, DecodedImage], spec: CaptureSpec
) -> list[Answer | UnitError]:
    scored = engine.score([request_of(sample, decoded) for sample in samples])
    labels = [sample.response_ids for sample in samples]
    return [
        checked
        if isinstance(checked, UnitError)
        else Answer(sample, checked.rows, checked.expanded_length, finish_reason="given")
        for sample, checked in zip(samples, accept_all(samples, scored, labels, spec), strict=True)
    ]


def _written(
    engine: Engine,
    samples: Sequence[PlannedSample],
    decoded: Mapping[str, DecodedImage],
    spec: CaptureSpec,
    mode: GenerateMode,
    renderer: Renderer,
) -> list[Answer | UnitError]:
    """One answer a sample. What the data gives as the last answer is left out; the answers before it are the prompt."""
    asked = [_without_answer(single_turn(sample)) for sample in samples]
    sampling = Sampling(
        max_new_tokens=mode.max_new_tokens, temperature=mode.temperature, top_p=mode.top_p, seed=mode.seed
    )
    written = engine.generate([request_of(sample, decoded) for sample in asked], sampling)
    return [_read(sample, one, spec, renderer) for sample, one in zip(asked, written, strict=True)]


def _read(
    sample: PlannedSample, written: list[Generation] | SampleProblem, spec: CaptureSpec, renderer: Renderer
) -> Answer | UnitError:
    if isinstance(written, SampleProblem):
        return UnitError(sample_id=sample.sample_id, code=written.code, message=written.message)
    (answer,) = written
    ids_T = answer.response_ids
    if not len(ids_T):
        return UnitError(
            sample_id=sample.sample_id, code="teacher_invalid", message="the teacher wrote nothing, not even EOS"
        )
    checked = accept(sample, ScoredSample(sample.sample_id, answer.rows, answer.expanded_length), ids_T, spec)
    if isinstance(checked, UnitError):
        return checked
    # Token ids may come without their conversation; an answer alone would be none.
    said = [{"role": "assistant", "content": renderer.decode(ids_T)}] if sample.messages else []
    complete = replace(
        sample,
        messages=[*sample.messages, *said],
        response_ids=ids_T,
        response_lengths=np.array([len(ids_T)], np.int32),
    )
    return Answer(complete, checked.rows, checked.expanded_length, answer.finish_reason)


def _with_no_image_pass(
    engine: Engine, answers: Sequence[Answer | UnitError], spec: CaptureSpec, renderer: Renderer
) -> list[Answer | UnitError]:
    """Scores the responses to images once more without them. A response that cannot be scored so is lost as a whole."""
    places = [
        place for place, answer in enumerate(answers) if isinstance(answer, Answer) and answer.sample.image_sha256
    ]
    completed = list(answers)
    seen = [answer for place in places if isinstance(answer := answers[place], Answer)]
    scored = engine.score([_no_image_request(answer.sample, renderer) for answer in seen]) if seen else []
    samples = [answer.sample for answer in seen]
    accepted = accept_all(samples, scored, [sample.response_ids for sample in samples], spec)
    for place, answer, checked in zip(places, seen, accepted, strict=True):
        completed[place] = (
            checked
            if isinstance(checked, UnitError)
            else replace(answer, no_image_logprob_T=checked.rows.label_logprob_T)
        )
    return completed


def _no_image_request(sample: PlannedSample, renderer: Renderer) -> ScoreRequest:
    """The same responses after prompts without a trace of the images: no placeholder, and no mark around one."""
    rendered = renderer.render(without_images(sample.messages))
    if len(sample.prompt_lengths) < len(rendered.prompt_lengths):
        rendered = rendered.with_history_as_prompt()
    return ScoreRequest(
        f"{sample.sample_id}/no_image",
        rendered.prompt_ids,
        rendered.prompt_lengths,
        sample.response_ids,
        sample.response_lengths,
    )


def _without_answer(sample: PlannedSample) -> PlannedSample:
    return replace(sample, response_ids=np.zeros(0, np.int32), response_lengths=np.zeros(1, np.int32))
