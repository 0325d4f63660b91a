"""A text student as one GGUF file, which llama.cpp, Ollama and LM Studio run.

What llama.cpp cannot run is refused before anything is written (`gguf_limits`). Matrices are written as they are
(`f32`) or rounded (`f16`); norms, biases and routers are float32 in any case, as llama.cpp's own converter has them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from logitlake_shared.errors import ExportError
from logitlake_student.export.card import CardFacts, count_parameters, experts_of, model_card
from logitlake_student.export.checkpoint import ExportResult, building
from logitlake_student.export.gguf_limits import ARCHITECTURES, refuse_unless_covered
from logitlake_student.export.gguf_vocab import GgufVocab, read_vocab
from logitlake_student.export.source import read_config, weight_files

__all__ = ["WeightType", "export_gguf", "gguf_tensors", "import_gguf"]

WeightType = Literal["f32", "f16"]

_FILE_TYPES = {"f32": 0, "f16": 1}  # gguf.LlamaFileType.ALL_F32, MOSTLY_F16
_SUFFIXES = (".weight", ".bias")


def export_gguf(
    model_dir: Path,
    out_dir: Path,
    *,
    facts: CardFacts,
    weight_type: WeightType,
    gate: Callable[[Path], dict[str, Any]] | None = None,
) -> ExportResult:
    """Writes `out_dir` with `<name>-F32.gguf` (or F16) and a model card; the gate is given the file.

    Raises:
        ExportError: no checkpoint, an architecture or tokenizer that llama.cpp does not read, a weight beyond the range
            of `f16`, an occupied destination, or the gate said no. Nothing is left behind.
    """
    config = read_config(model_dir)
    refuse_unless_covered(model_dir, config)
    gguf = import_gguf()
    vocab = read_vocab(model_dir, int(config["vocab_size"]))
    sizes: dict[str, int] = {}
    with building(out_dir) as folder:
        file = folder / f"{out_dir.name}-{weight_type.upper()}.gguf"
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[_arch(gguf, config)])
        _write_settings(writer, config, out_dir.name, weight_type)
        _write_vocab(writer, vocab)
        for name, array in gguf_tensors(model_dir, config, weight_type):
            writer.add_tensor(name, array)
            sizes[name] = array.size
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parameters = count_parameters(config, {name.replace("_exps.", ".experts."): n for name, n in sizes.items()})
        loading = ["llama.cpp:", "", "```", f"llama-cli -m {file.name} --jinja", "```"]
        card = model_card(out_dir.name, config, parameters, facts, loading=loading, tags=["gguf"], library="gguf")
        (folder / "README.md").write_text(card, encoding="utf-8")
        report = gate(file) if gate is not None else None
    return ExportResult(out_dir, len(sizes), parameters, report)


def import_gguf() -> Any:
    """The `gguf` package. Raises `ExportError` where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ExportError(
            f"export to gguf: the package gguf cannot be imported ({error}); install logitlake[gguf]"
        ) from error
    return gguf


def gguf_tensors(
    model_dir: Path, config: Mapping[str, Any], weight_type: WeightType
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(llama.cpp's name, array) of every tensor; the experts of a layer stacked, [E, out, in].

    Raises `ExportError` for a tensor that has no place, or that `f16` cannot hold.
    """
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(_arch(gguf, config), int(config["num_hidden_layers"]))
    for name, tensor in _stacked(model_dir, config):
        target = names.get_name(name, try_suffixes=_SUFFIXES)
        if target is None:
            raise ExportError(f"export to gguf: {model_dir}: llama.cpp has no place for the tensor {name}")
        yield target, _as_array(name, tensor, weight_type)


def _stacked(model_dir: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors; the experts of a layer as one, once the last of them was read."""
    from safetensors import safe_open

    num_experts, _ = experts_of(config)
    waiting: dict[str, dict[int, Tensor]] = {}
    files, _ = weight_files(model_dir)
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                block, is_expert, rest = name.partition(".mlp.experts.")
                if not is_expert:
                    # A tied head is stored once and not written: llama.cpp takes the embedding.
                    if not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                        yield name, weights.get_tensor(name)
                    continue
                number, _, matrix = rest.partition(".")
                together = f"{block}.mlp.experts.{matrix}"
                found = waiting.setdefault(together, {})
                found[int(number)] = weights.get_tensor(name)
                if len(found) == num_experts:
                    del waiting[together]
                    yield together, torch.stack([found[expert] for expert in range(num_experts)])
    if waiting:
        raise ExportError(f"export to gguf: {model_dir}: experts are missing of {sorted(waiting)[:3]}")


def _as_array(name: str, tensor: Tensor, weight_type: WeightType) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.float().numpy()
    is_router = name.endswith(".mlp.gate.weight")
    if weight_type == "f32" or array.ndim == 1 or is_router:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(f"export to gguf: {name} holds values beyond the range of f16; use gguf_type=f32")
    return half


def _arch(gguf: Any, config: Mapping[str, Any]) -> Any:
    return getattr(gguf.MODEL_ARCH, ARCHITECTURES[config["model_type"]])


def _write_settings(writer: Any, config: Mapping[str, Any], name: str, weight_type: WeightType) -> None:
    num_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[weight_type])
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(int(config["num_key_value_heads"]))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(float(_rope_theta(config)))
    writer.add_vocab_size(int(config["vocab_size"]))
    num_experts, num_active = experts_of(config)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(num_active)
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


def _rope_theta(config: Mapping[str, Any]) -> float:
    """transformers 5 has it among `rope_parameters`, older checkpoints on its own."""
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ExportError(f"export to gguf: config.json names no rope_theta: {json.dumps(rope)}")
    return float(theta)


def _write_vocab(writer: Any, vocab: GgufVocab) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.token_types)
    writer.add_token_merges(vocab.merges)
    writer.add_eos_token_id(vocab.eos_id)
    if vocab.pad_id is not None:
        writer.add_pad_token_id(vocab.pad_id)
    if vocab.bos_id is not None:
        writer.add_bos_token_id(vocab.bos_id)
    # What a prompt begins with is written by the chat template alone.
    writer.add_add_bos_token(False)
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)
