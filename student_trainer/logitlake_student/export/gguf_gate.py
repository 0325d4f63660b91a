"""The gate of a GGUF export: every tensor read back and compared with the student's, then llama.cpp asked.

Reading back is by another road than writing was: from the modules of the model in memory, named by hand, and not from
the checkpoint's files through the `gguf` package's table. llama.cpp is asked with the samples' token ids, and once
more with their text, which its own tokenizer must cut into the same ids.

Axes: E experts, R response rows, V vocabulary, K compared tokens of a row.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitlake_shared.alignment import predicting_rows
from logitlake_shared.errors import ExportError
from logitlake_student.export.comparison import GateSample, require_within
from logitlake_student.export.gate import (
    EngineChoice,
    Tell,
    check_samples,
    response_logprobs,
    silent,
)
from logitlake_student.export.gguf_file import import_gguf
from logitlake_student.export.llama_cpp import LlamaCpp, llama_cpp_version
from logitlake_student.model_inputs import ModelInputs

__all__ = ["check_gguf"]

_NUM_COMPARED = 16
"""K: llama.cpp's most likely tokens of a row whose logprobs must be the student's as well."""

_HALF_SLACK = 200
"""How much more than `tolerance` llama.cpp may differ with f16 matrices: it then rounds what is multiplied with them
to f16, too. 9e-3 nats was measured on a trained model, 9e-6 with f32."""

_LAYER_PLACES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""By llama.cpp's name of a part of a layer, where transformers keeps it."""


def check_gguf(
    file: Path,
    model_dir: Path,
    trained: Any,
    samples: Sequence[GateSample],
    *,
    tolerance: float,
    llama_cpp: EngineChoice = "if_installed",
    tell: Tell = silent,
) -> dict[str, Any]:
    """Compares a GGUF file with the student in memory.

    Args:
        file: the file to check.
        model_dir: the student's checkpoint, for its tokenizer.
        trained: the student as trained.
        samples: with response tokens, without images.
        tolerance: largest allowed absolute difference of a logprob in llama.cpp, in nats, with f32 matrices.
        llama_cpp: whether llama.cpp must take part.
        tell: is told what is being done.

    Returns:
        `{"tensors": number of those equal bit for bit, "llama.cpp": {"max_abs_diff": …, "version": …}}`, or a word in
        place of the figures of an engine that was not asked.

    Raises:
        ExportError: a tensor missing, unknown or of other bits; tokens that are not the tokenizer's; a difference
            beyond the tolerance, or no llama.cpp where it is required.
    """
    check_samples(samples)
    tell("comparing with the trained student: every tensor read back")
    reader = import_gguf().GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    rounded = _check_tensors(file, stored, trained)
    _check_tokens(file, reader, model_dir)
    report: dict[str, Any] = {"tensors": len(stored), "llama.cpp": "skipped"}
    if llama_cpp != "skip":
        if llama_cpp == "if_installed" and llama_cpp_version() is None:
            report["llama.cpp"] = "not installed"
        else:
            tell("comparing with the trained student: llama.cpp")
            allowed = tolerance * (_HALF_SLACK if rounded is not trained else 1)
            report["llama.cpp"] = _check_in_llama_cpp(file, model_dir, rounded, samples, allowed)
    return report


def _check_tensors(file: Path, stored: dict[str, Any], trained: Any) -> Any:
    """Every tensor of either side is the other's, bit for bit. Returns the student as the file has it: itself, or a
    copy whose matrices are rounded as the file's are."""
    expected = dict(_expected_tensors(trained))
    if expected.keys() != stored.keys():
        raise ExportError(
            f"export gate: {file.name} holds other tensors than the student: missing "
            f"{sorted(expected.keys() - stored.keys())[:3]}, unknown {sorted(stored.keys() - expected.keys())[:3]}"
        )
    is_rounded = False
    for name, tensor in expected.items():
        array: npt.NDArray[Any] = stored[name].data
        exact = tensor.detach().float().cpu().numpy()
        if array.dtype == np.float16:
            is_rounded = True
            exact = exact.astype(np.float16)
        # As bytes: 0.0 and -0.0 are not the same bits, and a NaN is equal to itself.
        if array.shape != exact.shape or array.tobytes() != exact.tobytes():
            raise ExportError(f"export gate: {file.name}: the tensor {name} is not the student's, bit for bit")
    return _rounded_to_half(trained) if is_rounded else trained


def _expected_tensors(trained: Any) -> Iterator[tuple[str, Tensor]]:
    """The student's parameters under llama.cpp's names."""
    yield "token_embd.weight", trained.model.embed_tokens.weight
    yield "output_norm.weight", trained.model.norm.weight
    if trained.lm_head.weight is not trained.model.embed_tokens.weight:
        yield "output.weight", trained.lm_head.weight
    for number, layer in enumerate(trained.model.layers):
        modules = dict(layer.named_modules())
        for theirs, ours in _LAYER_PLACES.items():
            for kind in ("weight", "bias"):
                tensor = getattr(modules.get(ours), kind, None)
                if tensor is not None:
                    yield f"blk.{number}.{theirs}.{kind}", tensor
        if "mlp.experts" in modules:
            gate_EIH, up_EIH = modules["mlp.experts"].gate_up_proj.chunk(2, dim=1)
            yield f"blk.{number}.ffn_gate_exps.weight", gate_EIH
            yield f"blk.{number}.ffn_up_exps.weight", up_EIH
            yield f"blk.{number}.ffn_down_exps.weight", modules["mlp.experts"].down_proj


@torch.no_grad()
def _rounded_to_half(trained: Any) -> Any:
    """A copy with the matrices rounded to f16; norms, biases and routers stay."""
    rounded = copy.deepcopy(trained)
    for name, parameter in rounded.named_parameters():
        if parameter.ndim > 1 and not name.endswith(".mlp.gate.weight"):
            parameter.copy_(parameter.half().to(parameter.dtype))
    return rounded


def _check_tokens(file: Path, reader: Any, model_dir: Path) -> None:
    """Each id is the same token in the file and in the student's tokenizer."""
    tokenizer = _tokenizer(model_dir)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    wrong = [
        i for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))) if tokens[i] != token
    ]
    if wrong:
        raise ExportError(f"export gate: {file.name}: {len(wrong)} tokens are not the tokenizer's, e.g. id {wrong[0]}")


def _tokenizer(model_dir: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model_dir)


def _check_in_llama_cpp(
    file: Path, model_dir: Path, student: Any, samples: Sequence[GateSample], tolerance: float
) -> dict[str, Any]:
    inputs = ModelInputs.of_checkpoint(model_dir, student.config)
    tokenizer = _tokenizer(model_dir)
    sequences = [inputs.expand(sample.ids_S, sample.is_response_S, sample.images) for sample in samples]
    # Twice the longest: its text may be cut into other, more tokens than it was made of.
    llama = LlamaCpp(file, 2 * max(len(sequence.ids_S) for sequence in sequences), tokenizer.eos_token_id)
    differences = []
    for sequence in sequences:
        logp_RV = response_logprobs(student, inputs, sequence)
        num_compared = min(_NUM_COMPARED, logp_RV.shape[1])
        rows_R = predicting_rows(sequence.is_response_S)
        for row, logp_V in zip(rows_R.tolist(), logp_RV, strict=True):
            ids = sequence.ids_S[: row + 1].tolist()
            got, _ = llama.next_logprobs(ids, num_compared)
            differences.append(_difference(logp_V, got))
        # The longest prompt once more as text, against the ids that the student's own tokenizer cuts it into.
        text = tokenizer.decode(ids, skip_special_tokens=False)
        ids_of_text = tokenizer(text, add_special_tokens=False)["input_ids"]
        got, num_tokens = llama.next_logprobs(text, num_compared)
        if num_tokens != len(ids_of_text):
            raise ExportError(
                f"export gate: llama.cpp cuts the text of a sample into {num_tokens} tokens, the student's tokenizer "
                f"into {len(ids_of_text)}: {text[-60:]!r}"
            )
        differences.append(_difference(_next_logprobs(student, inputs, ids_of_text, tokenizer.eos_token_id), got))
    difference = max(differences, key=lambda value: (value != value, value))  # a NaN stays a NaN
    require_within(difference, tolerance, "llama.cpp", file)
    return {"max_abs_diff": difference, "version": llama_cpp_version()}


def _next_logprobs(student: Any, inputs: ModelInputs, ids: Sequence[int], any_id: int) -> Tensor:
    """The student's logprobs [V] of what follows `ids`; which token does is of no matter."""
    ids_S = np.array([*ids, any_id], np.int64)
    is_last_S = np.arange(len(ids_S)) == len(ids)
    return response_logprobs(student, inputs, inputs.expand(ids_S, is_last_S, ()))[0]


def _difference(logp_V: Tensor, got: dict[int, float]) -> float:
    return float((logp_V[list(got)] - torch.tensor(list(got.values()))).abs().max())
