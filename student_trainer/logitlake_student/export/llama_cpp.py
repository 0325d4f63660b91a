"""llama.cpp's half of the GGUF gate, and the one file that imports xllamacpp, which brings llama.cpp compiled.

It runs in this process, its attention cache in float32 like the student's, and gives its memory back with the object.
(xllamacpp is llama.cpp's server: while it runs it also listens on a free port of 127.0.0.1.)

Axes: K compared tokens of a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logitlake_shared.errors import ExportError

__all__ = ["LlamaCpp", "llama_cpp_version"]

# Contexts are rounded up to this by llama.cpp anyway.
_CONTEXT_STEP = 256
# Added to a logit, it makes the token certain.
_CERTAIN = 1e6


def llama_cpp_version() -> str | None:
    """The version of the xllamacpp that is installed; None where there is none. Loads nothing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


class LlamaCpp:
    """A GGUF file in llama.cpp, for prompts of at most `num_positions` tokens.

    Raises `ExportError` where xllamacpp cannot be imported, or llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, num_positions: int, eos_id: int) -> None:
        self._eos_id = eos_id
        try:
            import xllamacpp
        except ImportError as error:
            raise ExportError(
                f"export gate: llama.cpp was required but xllamacpp cannot be imported ({error}); install "
                "logitlake[llama-cpp], or do without its check: llama_cpp=skip"
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = (num_positions // _CONTEXT_STEP + 1) * _CONTEXT_STEP
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ExportError(f"export gate: llama.cpp cannot load {file.name}: {error}") from error

    def next_logprobs(self, prompt: Sequence[int] | str, num_compared: int) -> tuple[dict[int, float], int]:
        """llama.cpp's K most likely tokens after a prompt, and how many tokens it took the prompt for.

        A text is cut by llama.cpp's own tokenizer. Raises `ExportError` for a request that it refuses.
        """
        request = {
            "prompt": list(prompt) if not isinstance(prompt, str) else prompt,
            "max_tokens": 1,
            "logprobs": num_compared,
            "temperature": 0,
            # The figures are those before this bias. Without it the token drawn may be half a character, of which
            # llama.cpp says nothing until the other half has come.
            "logit_bias": [[self._eos_id, _CERTAIN]],
        }
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "choices" not in answer:
            raise ExportError(f"export gate: llama.cpp refused a prompt of {len(prompt)}: {answer}")
        (token,) = answer["choices"][0]["logprobs"]["content"]
        logprobs = {int(entry["id"]): float(entry["logprob"]) for entry in token["top_logprobs"]}
        return logprobs, int(answer["usage"]["prompt_tokens"])
