"""The gate of an export: it must give the logprobs of the student that was trained, wherever it is loaded.

Files can be complete and wrong: a renamed tensor that is silently initialised afresh, expert matrices read
transposed, an image expanded twice. So an export is loaded again by stock transformers and by vLLM (`vllm_gate`), and
asked about real samples.

Axes: S positions, R response rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from logitlake_shared.alignment import predicting_rows
from logitlake_shared.errors import ExportError
from logitlake_student.export.comparison import GateSample, export_name, require_within
from logitlake_student.model_inputs import Expanded, ModelInputs

__all__ = [
    "EngineChoice",
    "Tell",
    "check_export",
    "check_samples",
    "response_logprobs",
    "silent",
]

EngineChoice = Literal["if_installed", "require", "skip"]
Tell = Callable[[str], None]


def silent(_text: str) -> None:
    """Tells nobody."""


def check_export(
    export_dir: Path,
    trained: Any,
    samples: Sequence[GateSample],
    *,
    tolerance: float,
    vllm: EngineChoice = "if_installed",
    transformers_reads: bool = True,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Loads an export in transformers and vLLM and compares logprobs with the model in memory.

    Args:
        export_dir: the folder to check.
        trained: the student as trained; put into evaluation mode while it is asked, and left as it was.
        samples: with response tokens, best with images.
        tolerance: largest allowed absolute difference of any logprob, in nats. In float32 on one machine 1e-4
            is generous; for bfloat16 weights it must allow for their rounding.
        vllm: whether vLLM must take part.
        transformers_reads: False for the one kind of export that only vLLM reads (`layout.ambiguous_experts`).
        tell: is told what is being done.

    Returns:
        `{"transformers": {"max_abs_diff": …}, "vllm": {"max_abs_diff": …, "version": …}}`, or a word in place of the
        figures of an engine that was not asked.

    Raises:
        ExportError: keys missing or unexpected, a difference beyond the tolerance, or no vLLM where it is
            required.
    """
    check_samples(samples)
    inputs = ModelInputs.of_checkpoint(export_dir, trained.config)
    expanded = [inputs.expand(sample.ids_S, sample.is_response_S, sample.images) for sample in samples]
    expected = [response_logprobs(trained, inputs, sequence) for sequence in expanded]
    report: dict[str, Any] = {"transformers": "skipped: it reads this layout wrong", "vllm": "skipped"}
    if transformers_reads:
        tell("comparing with the trained student: transformers")
        reloaded = _reload(export_dir, trained)
        got = [response_logprobs(reloaded, inputs, sequence) for sequence in expanded]
        difference = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))
        require_within(difference, tolerance, "transformers", export_dir)
        report["transformers"] = {"max_abs_diff": difference}
        del reloaded  # room for vLLM
    if vllm != "skip":
        from logitlake_student.export.vllm_gate import check_in_vllm

        tell("comparing with the trained student: vLLM, which takes a while to start")
        dtype = str(trained.dtype).removeprefix("torch.")
        report["vllm"] = check_in_vllm(
            export_dir, samples, expanded, expected, dtype=dtype, tolerance=tolerance, required=vllm == "require"
        )
    return report


def check_samples(samples: Sequence[GateSample]) -> None:
    """Raises `ExportError` unless there is something to compare on."""
    if not samples or not all(sample.is_response_S.any() for sample in samples):
        raise ExportError("export gate: expected at least one sample, each with response tokens, to compare on")


@torch.no_grad()
def response_logprobs(model: Any, inputs: ModelInputs, sequence: Expanded) -> Tensor:
    """Logprobs of the rows that predict response tokens, float32 [R, V] on the CPU."""
    arguments = inputs.batch([sequence], pad_id=0, model=model)
    rows_R = torch.from_numpy(predicting_rows(sequence.is_response_S)).to(model.device)
    training = model.training
    model.eval()
    try:
        logits_RV = model(**arguments, logits_to_keep=rows_R, use_cache=False).logits[0]
    finally:
        model.train(training)
    return torch.log_softmax(logits_RV.float(), dim=-1).cpu()


def _reload(export_dir: Path, trained: Any) -> Any:
    """The export as stock transformers loads it, of the type and on the device of the trained student."""
    try:
        reloaded, info = type(trained).from_pretrained(export_dir, dtype=trained.dtype, output_loading_info=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"export gate: transformers cannot load {export_name(export_dir)}: {error}") from error
    faults = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {kind}: {keys[:3]}" for kind, keys in faults.items() if keys)
        raise ExportError(f"export gate: transformers does not find its weights in {export_name(export_dir)}: {found}")
    return reloaded.to(trained.device)
