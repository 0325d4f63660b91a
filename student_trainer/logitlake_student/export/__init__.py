"""A trained student as others load it: `logitlake-student export`.

    release     a finished stage of a run -> samples of its own lake, lineage, the parts below
    source      the trained checkpoint as it lies on disk
    checkpoint  the folder of a stock checkpoint (`hf`, `vllm`), built hidden, renamed when the gate lets it through
    layout      tensor names and layouts that transformers and vLLM both read
    gate        the export loaded again and asked: transformers; `vllm_gate` asks vLLM; `comparison` is what all share
    gguf_file   the same student as one file for llama.cpp; `gguf_gate` reads it back, `llama_cpp` runs it
    gguf_vocab  its tokenizer; `gguf_limits` says which students can be written
    card        the model card

An export appears whole or not at all, and only if what was loaded again says what the trained student says.
"""

from logitlake_student.export.release import is_released, release

__all__ = ["is_released", "release"]
