"""Many questions about one picture in one sequence, each as if it stood alone.

A picture's 16 tokens cost more than a question about it, so a training row is: <user> and the image once,
then every question and its answer. The attention mask lets a question see the image and itself, never its
neighbours, and positions start anew behind the image; so the losses are those of separate conversations (a
test compares them), at about half of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from examples.digit_scenes.questions import FaultRates, answer_with_faults, ask, ask_existence_pair
from examples.digit_scenes.tokenizer import TOKENS_PER_IMAGE
from examples.digit_scenes.world import Placed

__all__ = ["PackedBatch", "Turn", "draw_turns", "encode_turn", "pack"]

QUESTIONS_PER_SCENE = {"caption": 1, "reading": 2, "counting": 2, "colour": 2, "position": 3}
EXISTENCE_PAIRS_PER_SCENE = 3
"""The two tasks that look for an object by its name, position and existence, are learnt last and asked most."""


@dataclass(frozen=True)
class Turn:
    """The tokens of one question and answer behind the image: question and <assistant>, then answer and <end>."""

    ids: tuple[int, ...]
    num_answer_tokens: int


@dataclass(frozen=True)
class PackedBatch:
    """B rows of S tokens; images stand at columns 1 to 16 of every row (or nowhere, for text alone)."""

    ids_BS: torch.Tensor
    positions_BS: torch.Tensor
    may_attend_B1SS: torch.Tensor
    predicting_N: torch.Tensor
    """Flat indices into B x S of the positions that predict an answer token."""
    targets_N: torch.Tensor


def draw_turns(objects: Sequence[Placed], rates: FaultRates, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers about one scene, all tasks, with training faults."""
    questions = [ask(task, objects, rng) for task, count in QUESTIONS_PER_SCENE.items() for _ in range(count)]
    for _ in range(EXISTENCE_PAIRS_PER_SCENE):
        questions.extend(ask_existence_pair(objects, rng))
    return [(question.text, answer_with_faults(question, objects, rates, rng)) for question in questions]


def encode_turn(tokenizer: Any, question: str, answer: str) -> Turn:
    """Tokens as the renderer of a capture makes them: the prompt up to <assistant>, the answer alone, <end>."""
    ids = _encode(tokenizer, question)
    response = [*_encode(tokenizer, answer), tokenizer.eos_token_id]
    return Turn((*ids, tokenizer.convert_tokens_to_ids("<assistant>"), *response), len(response))


def pack(rows: Sequence[Sequence[Turn]], tokenizer: Any) -> PackedBatch:
    """Rows of turns about one picture each, padded to the longest row."""
    prefix = [
        tokenizer.convert_tokens_to_ids("<user>"),
        *[tokenizer.convert_tokens_to_ids("<image>")] * TOKENS_PER_IMAGE,
    ]
    longest = max(len(prefix) + sum(len(turn.ids) for turn in row) for row in rows)
    ids_BS = np.full((len(rows), longest), tokenizer.pad_token_id, dtype=np.int64)
    positions_BS = np.zeros_like(ids_BS)
    # 0 is the shared prefix, 1.. the turns, -1 padding, which sees only itself.
    turn_BS = np.full_like(ids_BS, -1)
    predicting: list[int] = []
    for b, row in enumerate(rows):
        ids_BS[b, : len(prefix)] = prefix
        positions_BS[b, : len(prefix)] = np.arange(len(prefix))
        turn_BS[b, : len(prefix)] = 0
        start = len(prefix)
        for number, turn in enumerate(row, start=1):
            end = start + len(turn.ids)
            ids_BS[b, start:end] = turn.ids
            positions_BS[b, start:end] = len(prefix) + np.arange(len(turn.ids))
            turn_BS[b, start:end] = number
            predicting.extend(b * longest + i for i in range(end - turn.num_answer_tokens - 1, end - 1))
            start = end
    turns_BS = torch.from_numpy(turn_BS)
    same_BSS = turns_BS[:, :, None] == turns_BS[:, None, :]
    shared_BSS = (turns_BS[:, None, :] == 0) & (turns_BS[:, :, None] >= 0)
    causal_SS = torch.ones(longest, longest, dtype=torch.bool).tril()
    ids = torch.from_numpy(ids_BS)
    predicting_N = torch.tensor(predicting)
    return PackedBatch(
        ids_BS=ids,
        positions_BS=torch.from_numpy(positions_BS),
        may_attend_B1SS=((same_BSS | shared_BSS) & causal_SS)[:, None],
        predicting_N=predicting_N,
        targets_N=ids.view(-1)[predicting_N + 1],
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
