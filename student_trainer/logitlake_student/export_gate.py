"""The gate of an export: it must give the logprobs of the student that was trained, wherever it is loaded.

Files can be complete and wrong: a renamed tensor that is silently initialised afresh, expert matrices read
transposed, an image expanded twice. So an export is loaded again by stock transformers and, where installed,
by vLLM, and asked about real samples. The one file of the trainer that imports vllm.

Axes: S positions, R response rows, V vocabulary, K compared tokens of a row.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitlake_shared.alignment import expand_images, predicting_rows
from logitlake_shared.errors import ExportError
from logitlake_shared.images import decode_image
from logitlake_shared.pixels import load_pixels

__all__ = ["GateSample", "check_export"]

VllmChoice = Literal["if_installed", "require", "skip"]

_NUM_COMPARED = 16
"""K: the student's most likely tokens of a row whose logprobs vLLM must give as well."""

_VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process: starts in seconds, and dies with us
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_VLLM_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles its rank count on first use: half a minute, and a C++ compiler that a machine may not have.
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(frozen=True)
class GateSample:
    """A sample to compare on: ids with one placeholder an image, as `alignment.interleave` gives them."""

    ids_S: npt.NDArray[np.int64]
    is_response_S: npt.NDArray[np.bool_]
    images: tuple[bytes, ...] = ()
    """Encoded, in the order of their placeholders."""


def check_export(
    export_dir: Path,
    trained: Any,
    samples: Sequence[GateSample],
    *,
    tolerance: float,
    vllm: VllmChoice = "if_installed",
) -> dict[str, Any]:
    """Loads an export in transformers and vLLM and compares logprobs with the model in memory.

    Args:
        export_dir: the folder to check.
        trained: the student as trained; put into evaluation mode while it is asked, and left as it was.
        samples: with response tokens, best with images.
        tolerance: largest allowed absolute difference of any logprob, in nats. In float32 on one machine 1e-4
            is generous; for bfloat16 weights it must allow for their rounding.
        vllm: whether vLLM must take part.

    Returns:
        `{"transformers": {"max_abs_diff": …}, "vllm": {"max_abs_diff": …, "version": …} | "not installed" |
        "skipped"}`

    Raises:
        ExportError: keys missing or unexpected, a difference beyond the tolerance, or no vLLM where it is
            required.
    """
    if not samples or not all(sample.is_response_S.any() for sample in samples):
        raise ExportError("export gate: expected at least one sample, each with response tokens, to compare on")
    reloaded = _reload(export_dir, trained)
    expected = [_logprobs(trained, export_dir, sample) for sample in samples]
    got = [_logprobs(reloaded, export_dir, sample) for sample in samples]
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))
    _require_within(difference, tolerance, "transformers", export_dir)
    del reloaded  # room for vLLM
    report: dict[str, Any] = {"transformers": {"max_abs_diff": difference}, "vllm": "skipped"}
    if vllm != "skip":
        report["vllm"] = _check_vllm(export_dir, trained, samples, expected, tolerance, required=vllm == "require")
    return report


def _require_within(difference: float, tolerance: float, engine: str, export_dir: Path) -> None:
    if not difference <= tolerance:  # a NaN is a failure too
        raise ExportError(
            f"export gate: {engine} gives other logprobs for {export_dir} than the trained student: largest difference "
            f"{difference:.3g} nats, expected at most {tolerance:.3g}; the export was not published"
        )


def _reload(export_dir: Path, trained: Any) -> Any:
    """The export as stock transformers loads it, of the type and on the device of the trained student."""
    reloaded, info = type(trained).from_pretrained(export_dir, dtype=trained.dtype, output_loading_info=True)
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {kind}: {keys[:3]}" for kind, keys in faults.items() if keys)
        raise ExportError(f"export gate: transformers does not find its weights in {export_dir}: {found}")
    return reloaded.to(trained.device)


def _expand(model: Any, sample: GateSample) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The sample as the model sees it: ids with every image's placeholders, and which of them are response."""
    image_token_id = getattr(model.config, "image_token_id", None)
    num_image_tokens = getattr(model.config, "image_seq_length", 0)
    return expand_images(sample.ids_S, sample.is_response_S, image_token_id, [num_image_tokens] * len(sample.images))


@torch.no_grad()
def _logprobs(model: Any, export_dir: Path, sample: GateSample) -> Tensor:
    """Logprobs of the rows that predict response tokens, float32 [R, V] on the CPU."""
    ids_S, is_response_S = _expand(model, sample)
    inputs = {"input_ids": torch.from_numpy(ids_S)[None].to(model.device)}
    if sample.images:
        pixels_NCHW = torch.from_numpy(load_pixels(export_dir)(list(sample.images)))
        inputs["pixel_values"] = pixels_NCHW.to(model.device, model.dtype)
    rows_R = torch.from_numpy(predicting_rows(is_response_S)).to(model.device)
    training = model.training
    model.eval()
    try:
        logits_RV = model(**inputs, logits_to_keep=rows_R, use_cache=False).logits[0]
    finally:
        model.train(training)
    return torch.log_softmax(logits_RV.float(), dim=-1).cpu()


def _check_vllm(
    export_dir: Path,
    trained: Any,
    samples: Sequence[GateSample],
    expected: Sequence[Tensor],
    tolerance: float,
    *,
    required: bool,
) -> dict[str, Any] | str:
    with _vllm_environment():
        try:
            import vllm
        except ImportError as error:
            if required:
                raise ExportError(
                    f"export gate: vLLM was required but cannot be imported ({error}); install logitlake[teacher] or "
                    "logitlake[teacher-cpu], or do without its check"
                ) from error
            return "not installed"
        rows_by_sample = _ask_vllm(vllm, export_dir, trained, samples, min(_NUM_COMPARED, expected[0].shape[1]))
    differences = [
        (logp_V[list(row)] - torch.tensor(list(row.values()))).abs().max()
        for logp_RV, rows in zip(expected, rows_by_sample, strict=True)
        for logp_V, row in zip(logp_RV, rows, strict=True)
    ]
    difference = float(torch.stack(differences).max())  # a NaN stays a NaN
    _require_within(difference, tolerance, "vLLM", export_dir)
    return {"max_abs_diff": difference, "version": vllm.__version__}


def _ask_vllm(
    vllm: Any, export_dir: Path, trained: Any, samples: Sequence[GateSample], num_compared: int
) -> list[list[dict[int, float]]]:
    """Per sample and response token: vLLM's logprobs of the actual token and its `num_compared` most likely ones.

    The engine is just large enough for the samples; its memory and process group are given back.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    num_images = max(len(sample.images) for sample in samples)
    longest = max(len(_expand(trained, sample)[0]) for sample in samples)
    engine = None
    try:
        engine = vllm.LLM(
            model=str(export_dir),
            dtype=str(trained.dtype).removeprefix("torch."),
            seed=0,
            max_model_len=longest + 1,  # vLLM counts the token that it generates
            max_logprobs=num_compared,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
            gpu_memory_utilization=0.5,  # the trained student lies on the same device
            **(_multimodal_settings(num_images) if num_images else {}),
        )
        return [_ask_about(vllm, engine, trained, sample, num_compared) for sample in samples]
    except (ValueError, RuntimeError, KeyError, AssertionError) as error:
        if engine is None:
            raise ExportError(f"export gate: vLLM cannot load {export_dir}: {error}") from error
        raise
    finally:
        engine = None
        cleanup_dist_env_and_memory()


def _multimodal_settings(num_images: int) -> dict[str, Any]:
    """The image processor's PIL path, as in `logitlake_shared.pixels`: torchvision resamples to other pixels."""
    return {"limit_mm_per_prompt": {"image": num_images}, "mm_processor_kwargs": {"backend": "pil"}}


def _ask_about(vllm: Any, engine: Any, trained: Any, sample: GateSample, num_compared: int) -> list[dict[int, float]]:
    # One placeholder an image: vLLM expands them itself, and would expand expanded ones again without a word.
    prompt: dict[str, Any] = {"prompt_token_ids": sample.ids_S.tolist()}
    if sample.images:
        prompt["multi_modal_data"] = {"image": [decode_image(image) for image in sample.images]}
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num_compared, detokenize=False)
    (output,) = engine.generate([prompt], sampling, use_tqdm=False)
    ids_S, is_response_S = _expand(trained, sample)
    if output.prompt_token_ids != ids_S.tolist():
        raise ExportError(
            f"export gate: vLLM saw {len(output.prompt_token_ids)} tokens that are not the {len(ids_S)} that were "
            "meant: it expands the images differently; compare the image processor and image_seq_length of the export"
        )
    # Entry i describes token i given those before it.
    entries = [output.prompt_logprobs[position] for position in np.flatnonzero(is_response_S)]
    return [{token_id: logprob.logprob for token_id, logprob in entry.items()} for entry in entries]


@contextlib.contextmanager
def _vllm_environment() -> Iterator[None]:
    """What vLLM reads from the environment, for as long as it runs here. What the user has set stays."""
    wanted = _VLLM_ENVIRONMENT | ({} if torch.cuda.is_available() else _VLLM_CPU_ENVIRONMENT)
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
