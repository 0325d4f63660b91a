"""vLLM's half of the export gate, and the one file of the trainer that imports vllm.

The engine runs in this process, just large enough for the samples, and gives its memory and process group back.

Axes: S positions, R response rows, V vocabulary, K compared tokens of a row.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from logitlake_shared.errors import ExportError
from logitlake_shared.images import decode_image
from logitlake_student.export.comparison import export_name, require_within
from logitlake_student.export.layout import ambiguous_experts

if TYPE_CHECKING:
    from logitlake_student.export.comparison import GateSample
    from logitlake_student.model_inputs import Expanded

__all__ = ["check_in_vllm"]

_NUM_COMPARED = 16
"""K: vLLM's most likely tokens of a row whose logprobs must be the student's as well."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process: starts in seconds, and dies with us
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles its rank count on first use: half a minute, and a C++ compiler that a machine may not have.
    "TORCHDYNAMO_DISABLE": "1",
}


def check_in_vllm(
    export_dir: Path,
    samples: Sequence["GateSample"],
    expanded: Sequence["Expanded"],
    expected: Sequence[Tensor],
    *,
    dtype: str,
    tolerance: float,
    required: bool,
) -> dict[str, Any] | str:
    """vLLM's logprobs of the samples against `expected`, [R, V] each.

    Returns `{"max_abs_diff": …, "version": …}`, or "not installed" where it is not required.
    """
    with _environment(), _quiet():
        try:
            import vllm
        except ImportError as error:
            if required:
                raise ExportError(
                    f"export gate: vLLM was required but cannot be imported ({error}); install logitlake[teacher] or "
                    "logitlake[teacher-cpu], or do without its check: to=hf vllm=skip"
                ) from error
            return "not installed"
        num_compared = min(_NUM_COMPARED, expected[0].shape[1])
        rows_by_sample = _ask(vllm, export_dir, samples, expanded, dtype, num_compared)
    differences = [
        (logp_V[list(row)] - torch.tensor(list(row.values()))).abs().max()
        for logp_RV, rows in zip(expected, rows_by_sample, strict=True)
        for logp_V, row in zip(logp_RV, rows, strict=True)
    ]
    difference = float(torch.stack(differences).max())  # a NaN stays a NaN
    square = ambiguous_experts(json.loads((export_dir / "config.json").read_text(encoding="utf-8")))
    hint = (
        f" ({', '.join(square)} of its experts are square: one file cannot suit transformers and vLLM; export to=vllm "
        "for vLLM, or vllm=skip for transformers)"
    )
    require_within(difference, tolerance, "vLLM", export_dir, hint if square else "")
    return {"max_abs_diff": difference, "version": vllm.__version__}


def _ask(
    vllm: Any,
    export_dir: Path,
    samples: Sequence["GateSample"],
    expanded: Sequence["Expanded"],
    dtype: str,
    num_compared: int,
) -> list[list[dict[int, float]]]:
    """Per sample and response token: vLLM's logprobs of the actual token and its `num_compared` most likely ones."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    num_images = max(len(sample.images) for sample in samples)
    settings: dict[str, Any] = {
        "model": str(export_dir),
        "dtype": dtype,
        "seed": 0,
        "max_model_len": max(len(sequence.ids_S) for sequence in expanded) + 1,  # vLLM counts the token it generates
        "max_logprobs": num_compared,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "disable_log_stats": True,
        "gpu_memory_utilization": 0.5,  # the trained student lies on the same device
        **(_multimodal_settings(num_images) if num_images else {}),
    }
    engine = None
    try:
        try:
            engine = vllm.LLM(**settings)
        except Exception as error:  # whatever a foreign engine finds fault with, the export is not loaded by it
            raise ExportError(
                f"export gate: vLLM cannot load {export_name(export_dir)}: {_first_line(error)}"
            ) from error
        return [
            _ask_about(vllm, engine, sample, sequence, num_compared)
            for sample, sequence in zip(samples, expanded, strict=True)
        ]
    finally:
        engine = None
        cleanup_dist_env_and_memory()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _multimodal_settings(num_images: int) -> dict[str, Any]:
    """The image processor's PIL path, as in `logitlake_shared.pixels`: torchvision resamples to other pixels.

    By its old name: `backend="pil"` reaches the video processor of a Qwen-VL as well, which has no such path.
    """
    return {"limit_mm_per_prompt": {"image": num_images}, "mm_processor_kwargs": {"use_fast": False}}


def _ask_about(
    vllm: Any, engine: Any, sample: "GateSample", sequence: "Expanded", num_compared: int
) -> list[dict[int, float]]:
    # One placeholder an image: vLLM expands them itself, and would expand expanded ones again without a word.
    prompt: dict[str, Any] = {"prompt_token_ids": sample.ids_S.tolist()}
    if sample.images:
        prompt["multi_modal_data"] = {"image": [decode_image(image) for image in sample.images]}
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num_compared, detokenize=False)
    (output,) = engine.generate([prompt], sampling, use_tqdm=False)
    if output.prompt_token_ids != sequence.ids_S.tolist():
        raise ExportError(
            f"export gate: vLLM saw {len(output.prompt_token_ids)} tokens that are not the {len(sequence.ids_S)} that "
            "were meant: it expands the images differently; compare the export's image processor and its config.json "
            "(image_seq_length, vision_feature_select_strategy, patch sizes)"
        )
    # Entry i describes token i given those before it.
    entries = [output.prompt_logprobs[position] for position in np.flatnonzero(sequence.is_response_S)]
    return [{token_id: logprob.logprob for token_id, logprob in entry.items()} for entry in entries]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that vLLM and its libraries write to the terminal is seen, unless the user has set VLLM_LOGGING_LEVEL.

    By file descriptor, since some of them are not Python. What they find fault with comes as an exception.
    """
    if os.environ.get("VLLM_LOGGING_LEVEL") != _ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
        yield
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # a device, not a path of ours
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What vLLM reads from the environment, for as long as it runs here. What the user has set stays."""
    wanted = _ENVIRONMENT | ({} if torch.cuda.is_available() else _CPU_ENVIRONMENT)
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
