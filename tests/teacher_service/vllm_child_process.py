"""A program for `test_vllm_engine.py`: the engine over `AsyncLLM`, whose core is a child process.

    python vllm_child_process.py FOLDER

Reads `asked.pickle` (setup and requests) from the folder, scores from three threads while a fourth draws candidates,
kills vLLM's child, asks once more, and writes `answered.pickle`. A process of its own, because vLLM forks: a child of
the test process would inherit whatever threads the tests before have left in torch.
"""

import multiprocessing
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from logitlake_shared.errors import EngineError
from logitlake_teacher.config import VllmEngineConfig
from logitlake_teacher.engines import Sampling, ScoreRequest, build_engine
from logitlake_teacher.engines.vllm import VllmEngine


def main(folder: Path) -> None:
    """See the module."""
    setup, requests = pickle.loads((folder / "asked.pickle").read_bytes())
    engine = build_engine(VllmEngineConfig(), setup)
    assert isinstance(engine, VllmEngine)
    first = requests[0]
    prompt = ScoreRequest(
        first.sample_id,
        first.prompt_ids,
        first.prompt_lengths,
        first.response_ids[:0],
        np.array([0], np.int32),
        first.images,
    )
    with ThreadPoolExecutor(4) as pool:
        scoring = [pool.submit(engine.score, requests) for _ in range(3)]
        drawing = pool.submit(engine.generate, [prompt], Sampling(max_new_tokens=4, n=2, temperature=1.0))
        answered: dict[str, Any] = {
            "scored": [future.result() for future in scoring],
            "drawn": drawing.result(),
            "route": engine.route,
        }
    (core,) = multiprocessing.active_children()
    core.kill()
    core.join()
    try:
        engine.score(requests)
    except EngineError as error:
        answered["after_kill"] = str(error)
    engine.close()
    (folder / "answered.pickle").write_bytes(pickle.dumps(answered))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
