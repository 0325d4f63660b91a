"""What goes wrong with teachers, on command.

Ways to die, to hang and to fail are met before a call is answered; wrong answers are made of right ones. None of it
changes a number of an answer that is not named, so faults are no part of the teacher's identity.
"""

import os
import random
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from logitlake_shared.errors import EngineError
from logitlake_shared.topk import TeacherRows
from logitlake_teacher.config import FakeEngineConfig
from logitlake_teacher.config.engines import WrongAnswer

__all__ = ["Faults", "wrong_rows"]

# Touched before the end: enough to be seen in a worker's memory, too little to harm the machine.
_HOG_BYTES = 512 * 2**20
_PAGE_BYTES = 4096


class Faults:
    """The faults of one engine in one process."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self._num_calls = 0
        # Another process draws other calls, or a unit that met one would meet it for ever.
        self._draw = random.Random(f"{config.die_seed}:{os.getpid()}")
        if config.die_at_start:
            os._exit(1)
        if config.ignore_sigterm and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def meet(self, sample_ids: Sequence[str]) -> None:
        """To be called first thing in a call about these samples. May not return. Raises `EngineError`."""
        config = self._config
        if config.slow_s:
            threading.Event().wait(config.slow_s)
        if config.die_after_calls is not None and self._num_calls >= config.die_after_calls:
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_calls += 1
        if config.die_chance and self._draw.random() < config.die_chance:
            os.kill(os.getpid(), signal.SIGKILL)
        if not (config.die_on or config.hang_on or config.raise_on):
            return
        for sample_id in sample_ids:
            if sample_id in config.die_on:
                _die(config.die_by)
            if sample_id in config.hang_on:
                threading.Event().wait()
            if sample_id in config.raise_on:
                raise EngineError(f"the fake teacher was told to fail on sample {sample_id!r}")


def wrong_rows(rows: TeacherRows, wrong: WrongAnswer, vocab_size: int) -> TeacherRows:
    """The rows as an engine returns them that is wrong in this way. The rows given stay as they are."""
    columns: dict[str, Any] = {name: None if value is None else value.copy() for name, value in vars(rows).items()}
    ids_TK, logprobs_TK = columns["topk_ids_TK"], columns["topk_logprobs_TK"]
    match wrong:
        case "nan":
            columns["label_logprob_T"][0] = np.nan
        case "inf":
            logprobs_TK[0, 0] = np.inf
        case "minus_inf":
            # All of a row, as of logits that overflowed.
            logprobs_TK[0] = columns["label_logprob_T"][0] = columns["log_tail_mass_T"][0] = -np.inf
        case "k_over_vocabulary":
            # The padded slots of an lm_head, with next to no mass.
            missing = vocab_size + 1 - ids_TK.shape[1]
            columns["topk_ids_TK"] = np.pad(ids_TK, ((0, 0), (0, missing)), constant_values=vocab_size)
            columns["topk_logprobs_TK"] = np.pad(logprobs_TK, ((0, 0), (0, missing)), constant_values=-99.0)
        case "duplicate_id":
            ids_TK[0, -1] = ids_TK[0, 0]
        case "mass_over_one":
            logprobs_TK[0] = np.maximum(logprobs_TK[0], -0.5)
        case "foreign_id":
            ids_TK[0, -1] = vocab_size
        case "missing_row":
            columns = {name: None if value is None else value[:-1] for name, value in columns.items()}
        case "rising":
            columns |= {"topk_ids_TK": ids_TK[:, ::-1], "topk_logprobs_TK": logprobs_TK[:, ::-1]}
    return TeacherRows(**columns)


def _die(way: str) -> None:
    if way == "exit":
        os._exit(1)
    if way == "memory":
        hog = bytearray(_HOG_BYTES)
        hog[::_PAGE_BYTES] = b"x" * len(range(0, _HOG_BYTES, _PAGE_BYTES))
    os.kill(os.getpid(), signal.SIGKILL)
