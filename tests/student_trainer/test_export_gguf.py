"""A student in GGUF is the student: every tensor bit for bit, and llama.cpp, really run, says what it says."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny_llava, save_tiny_text

from logitlake_shared.errors import ExportError
from logitlake_shared.rendering import Renderer
from logitlake_student.export.card import CardFacts
from logitlake_student.export.comparison import GateSample
from logitlake_student.export.gguf_file import export_gguf
from logitlake_student.export.gguf_gate import check_gguf
from logitlake_student.export.gguf_limits import why_not
from logitlake_student.export.gguf_vocab import read_vocab
from logitlake_student.models.load import load_student

gguf = pytest.importorskip("gguf")
# Other kernels for the same float32 sums: 4e-6 was measured on models of this size.
LLAMA_CPP_TOLERANCE = 1e-4

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "num_hidden_layers": 3}),
    "qwen3_moe": ("qwen3_moe", SPARSE),
}
FACTS = CardFacts({"teacher": "tiny"})


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Models this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama_cpp() -> None:
    """Skips where llama.cpp is not installed, except in the suite that promises to run the real engines."""
    if not os.environ.get("LOGITLAKE_REQUIRE_VLLM"):
        pytest.importorskip("xllamacpp", reason="xllamacpp, which brings llama.cpp, is not installed")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save("qwen3_moe")` is the folder of that random student; keyword arguments are its configuration's."""

    def make(name: str, **options: Any) -> Path:
        family, settings = STUDENTS[name]
        folder = tmp_path / "student"
        save_tiny_text(folder, family, **(settings | options))
        return folder

    return make


def samples_of(folder: Path) -> list[GateSample]:
    """Two rendered conversations, one of them with words that the tokenizer never saw."""
    renderer = Renderer(folder)
    samples = []
    for question, answer in (("what is there?", "a red seven"), ("Wie viele, ungefähr? 12,5 …\n\tgenau", "drei  ☃")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rendered = renderer.render(messages)
        ids_S = np.concatenate([rendered.prompt_ids, rendered.response_ids]).astype(np.int64)
        samples.append(GateSample(ids_S, np.arange(len(ids_S)) >= len(rendered.prompt_ids)))
    return samples


def export(folder: Path, out_dir: Path, weight_type: Any = "f32", **gate: Any) -> dict[str, Any]:
    """Through the gate; the gate's report."""
    trained = load_student(folder, dtype=torch.float32)
    settings = {"tolerance": LLAMA_CPP_TOLERANCE, "llama_cpp": "skip"} | gate
    result = export_gguf(
        folder,
        out_dir,
        facts=FACTS,
        weight_type=weight_type,
        gate=lambda file: check_gguf(file, folder, trained, samples_of(folder), **settings),
    )
    assert result.gate is not None
    assert result.gate["tensors"] == result.num_tensors
    assert result.parameters.total == trained.num_parameters()
    return result.gate


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("name", STUDENTS)
def test_llama_cpp_answers_as_the_student(name: str, tmp_path: Path, save: Callable[..., Path]) -> None:
    """Every response row by its ids, and the whole text cut by llama.cpp's own tokenizer."""
    report = export(save(name), tmp_path / "release", llama_cpp="require")
    assert 0.0 < report["llama.cpp"]["max_abs_diff"] <= LLAMA_CPP_TOLERANCE


@pytest.mark.usefixtures("llama_cpp")
def test_half_precision_is_the_rounded_student(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Matrices are the student's rounded to f16, norms and routers are not; llama.cpp is near the rounded student."""
    report = export(save("qwen3_moe"), tmp_path / "release", "f16", llama_cpp="require")
    assert report["llama.cpp"]["max_abs_diff"] > LLAMA_CPP_TOLERANCE  # what is multiplied is rounded, too
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "release" / "release-F16.gguf").tensors}
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.0.ffn_up_exps.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"


def test_the_folder_holds_one_file_and_a_card(tmp_path: Path, save: Callable[..., Path]) -> None:
    export(save("qwen3_moe"), tmp_path / "release")
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == ["README.md", "release-F32.gguf"]
    card = (tmp_path / "release" / "README.md").read_text()
    assert "llama-cli -m release-F32.gguf" in card
    assert "| parameters a token meets |" in card
    assert "| teacher | tiny |" in card


def test_the_file_tells_llama_cpp_what_the_configuration_says(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Spot checks by hand, of what no tensor shows."""
    export(save("qwen3_moe", rope_theta=5000.0), tmp_path / "release")
    reader = gguf.GGUFReader(tmp_path / "release" / "release-F32.gguf")
    told = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert told["general.architecture"] == "qwen3moe"
    assert (told["qwen3moe.expert_count"], told["qwen3moe.expert_used_count"]) == (4, 2)
    assert told["qwen3moe.expert_feed_forward_length"] == 48
    assert told["qwen3moe.attention.key_length"] == 32
    assert told["qwen3moe.rope.freq_base"] == 5000.0
    assert told["tokenizer.ggml.pre"] == "gpt-2"
    assert told["tokenizer.ggml.eos_token_id"] == 1
    assert told["tokenizer.ggml.add_bos_token"] is False
    assert "<assistant>" in told["tokenizer.chat_template"]


# ---- damage ----


def flip_a_bit(file: Path) -> None:
    """The lowest bit of one number of one expert."""
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    tensor.data.view(np.uint32)[2, 5, 7] ^= 1


def swap_gate_and_up(file: Path) -> None:
    """Same shapes, same numbers, other places."""
    reader = gguf.GGUFReader(file, "r+")
    by_name = {tensor.name: tensor.data for tensor in reader.tensors}
    gate, up = by_name["blk.0.ffn_gate_exps.weight"], by_name["blk.0.ffn_up_exps.weight"]
    kept = gate.copy()
    gate[:], up[:] = up, kept


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one bit": (flip_a_bit, "blk.1.ffn_down_exps.weight is not the student's"),
    "swapped": (swap_gate_and_up, "blk.0.ffn_gate_exps.weight is not the student's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path, save: Callable[..., Path]) -> None:
    """One bit of one weight is enough; nothing gets the destination's name."""
    break_it, said = DAMAGES[damage]
    folder = save("qwen3_moe")
    trained = load_student(folder, dtype=torch.float32)

    def gate(file: Path) -> dict[str, Any]:
        settings: dict[str, Any] = {"tolerance": LLAMA_CPP_TOLERANCE, "llama_cpp": "skip"}
        check_gguf(file, folder, trained, samples_of(folder), **settings)
        break_it(file)
        return check_gguf(file, folder, trained, samples_of(folder), **settings)

    with pytest.raises(ExportError, match=said):
        export_gguf(folder, tmp_path / "release", facts=FACTS, weight_type="f32", gate=gate)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


@pytest.mark.usefixtures("llama_cpp")
def test_a_wrong_configuration_shows_in_llama_cpp(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Every tensor is right and the rotary base is not: only running it can tell."""
    folder = save("qwen3", rope_theta=10_000.0)
    trained = load_student(folder, dtype=torch.float32)
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(document))
    settings: dict[str, Any] = {"tolerance": LLAMA_CPP_TOLERANCE, "llama_cpp": "require"}
    with pytest.raises(ExportError, match=r"llama\.cpp gives other logprobs"):
        export_gguf(
            folder,
            tmp_path / "release",
            facts=FACTS,
            weight_type="f32",
            gate=lambda file: check_gguf(file, folder, trained, samples_of(folder), **settings),
        )


# ---- what is not covered ----


def test_what_llama_cpp_cannot_run_is_refused_with_a_way_out(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Each reason by name, before anything is written."""
    save_tiny_llava(tmp_path / "llava")
    with pytest.raises(ExportError, match=r"llava has a vision tower.*export to=hf"):
        export_gguf(tmp_path / "llava", tmp_path / "release", facts=FACTS, weight_type="f32")
    folder = save("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1, 3])
    with pytest.raises(ExportError, match=r"layers \[1, 3\] are dense.*layers = \"all\""):
        export_gguf(folder, tmp_path / "release", facts=FACTS, weight_type="f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "student"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoder_sparse_step": 2}, r"layers \[0\] are dense"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"model_type": "mixtral"}, "mixtral is not written as GGUF here"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "type 'yarn'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"attention_bias": True}, "no attention bias"),
    ],
)
def test_each_limit_has_its_reason(changes: dict[str, Any], said: str, save: Callable[..., Path]) -> None:
    """One field differs from a configuration that passes."""
    config = json.loads((save("qwen3_moe") / "config.json").read_text())
    assert why_not(config) is None
    reason = why_not(config | changes)
    assert reason is not None
    assert re.search(said, reason), reason


def test_a_number_too_large_for_half_is_refused(tmp_path: Path, save: Callable[..., Path]) -> None:
    """Infinity is not a rounded weight."""
    folder = save("qwen2")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"up_proj.*beyond the range of f16; use gguf_type=f32"):
        export_gguf(folder, tmp_path / "release", facts=FACTS, weight_type="f16")


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(save: Callable[..., Path]) -> None:
    """Another splitting, another normaliser, another kind, and ids that the embedding does not have."""
    folder = save("qwen2")
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    assert read_vocab(folder, 300).tokens[:2] == ["<pad>", "<end>"]
    assert read_vocab(folder, 302).tokens[-1] == "[PAD301]"
    with pytest.raises(ExportError, match="only 10 rows"):
        read_vocab(folder, 10)
    for changes, said in (
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "no name for this way of splitting"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"model": document["model"] | {"byte_fallback": True}}, "only plain byte-level BPE"),
    ):
        path.write_text(json.dumps(document | changes))
        with pytest.raises(ExportError, match=said):
            read_vocab(folder, 300)
