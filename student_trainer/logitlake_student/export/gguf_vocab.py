"""A tokenizer as llama.cpp reads it: byte-level BPE with a way of splitting that llama.cpp knows.

A GGUF file does not hold how text is split before BPE sees it; it names one of the ways that are built into llama.cpp.
A wrong name loads, and cuts text into other tokens than the student learned. So the splitting in `tokenizer.json` must
be exactly one of those below, and anything else is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitlake_shared.errors import ExportError

__all__ = ["GgufVocab", "read_vocab"]

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# By llama.cpp's name: the steps of `pre_tokenizer` that it stands for.
_KNOWN: dict[str, list[tuple[str, Any]]] = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "qwen2": [("Split", _QWEN2), ("ByteLevel", False)],
    "llama-bpe": [("Split", _LLAMA3), ("ByteLevel", False)],
}

# As `gguf.TokenType` has them.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class GgufVocab:
    """Everything about a tokenizer that goes into a GGUF file."""

    pre: str
    """llama.cpp's name for how text is split"""
    tokens: list[str]
    """by id; as many as the embedding has rows"""
    token_types: list[int]
    merges: list[str]
    eos_id: int
    pad_id: int | None
    bos_id: int | None
    chat_template: str | None


def read_vocab(model_dir: Path, num_rows: int) -> GgufVocab:
    """The tokenizer in `model_dir`; ids that the embedding's `num_rows` have beyond it become unused tokens.

    Raises `ExportError` for one that llama.cpp would read as another.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ExportError(f"export to gguf: {model_dir} has no tokenizer.json; save its tokenizer with transformers")
    document = json.loads(path.read_text(encoding="utf-8"))
    bpe = document["model"]
    if bpe["type"] != "BPE" or bpe.get("byte_fallback") or bpe.get("ignore_merges"):
        raise ExportError(
            f"export to gguf: {path}: only plain byte-level BPE is written, got {bpe['type']} (byte_fallback "
            f"{bpe.get('byte_fallback')}, ignore_merges {bpe.get('ignore_merges')}); export to=hf instead"
        )
    by_id = {int(token_id): token for token, token_id in bpe["vocab"].items()}
    types = dict.fromkeys(by_id, _NORMAL)
    for added in document.get("added_tokens") or []:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if max(by_id) >= num_rows:
        raise ExportError(
            f"export to gguf: the tokenizer has ids up to {max(by_id)}, the embedding only {num_rows} rows; they do "
            "not belong together"
        )
    special = _special_ids(model_dir)
    return GgufVocab(
        pre=_pre(document, path),
        tokens=[by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(num_rows)],
        token_types=[types.get(token_id, _UNUSED) for token_id in range(num_rows)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]],
        **special,
    )


def _pre(document: dict[str, Any], path: Path) -> str:
    normalizer = (document.get("normalizer") or {}).get("type")
    steps = _steps(document.get("pre_tokenizer") or {})
    for name, known in _KNOWN.items():
        # Qwen's tokenizers compose characters (NFC), which llama.cpp leaves to its caller for them as for any other.
        if steps == known and normalizer in (None, "NFC"):
            return name
    raise ExportError(
        f"export to gguf: {path}: llama.cpp has no name for this way of splitting text (normalizer {normalizer}, "
        f"pre_tokenizer {steps}); it knows {', '.join(_KNOWN)} here. Export to=hf, or use llama.cpp's own converter"
    )


def _steps(pre_tokenizer: dict[str, Any]) -> list[tuple[str, Any]]:
    """The splitting as (step, what matters of it); a step set otherwise than any known one is left as it stands."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    told: list[tuple[str, Any]] = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            told.append((kind, step.get("use_regex", True)))
        elif kind == "Digits":
            told.append((kind, step["individual_digits"]))
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            told.append((kind, step["pattern"].get("Regex")))
        else:
            told.append((kind, step))
    return told


def _special_ids(model_dir: Path) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    if tokenizer.eos_token_id is None:
        raise ExportError(f"export to gguf: {model_dir}: the tokenizer names no EOS token, where answers end")
    return {
        "eos_id": int(tokenizer.eos_token_id),
        "pad_id": tokenizer.pad_token_id,
        "bos_id": tokenizer.bos_token_id,
        "chat_template": tokenizer.chat_template,
    }
