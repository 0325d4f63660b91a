"""A stock transformers model as the engine needs it: last hidden states of many sequences, logits of chosen rows.

Sequences are packed one after the other into a single row, so that no padded position is computed. What a family needs
beside token ids is taken from the family itself: its image processor's arrays by name, its own encoding of images (once
an image, however many sequences of a batch show it) and, where positions have three axes, its own `get_rope_index`.

Two things are proved when the model is loaded, on its own weights: that the lm_head alone makes its logits, and that
sequences in one row do not see each other. A model that fails is refused instead of being captured wrong.

Axes: B batch, S positions, R response rows, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from logitlake_shared.errors import EngineError
from logitlake_teacher.config import HfEngineConfig
from logitlake_teacher.engines.base import EngineSetup, Sampling, ScoreRequest, seed_of
from logitlake_teacher.engines.hf.attention import PACKED_ATTENTION, packed

__all__ = ["TeacherModel", "TeacherSequence"]

# The model's own logits and ours come from the same weights; only the order of a dot product can differ.
_HEAD_TOLERANCE = 1e-3
# Hidden states are normed to about 1. Rounding moves them by 1e-6 in float32 and by a few 1e-2 in bfloat16; a sequence
# that saw its neighbour, or counted its positions on, moves by about as much as they are large.
_PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
_PROBE_LENGTHS = (3, 6, 6)


@dataclass(frozen=True)
class TeacherSequence:
    """A request as the model sees it."""

    index: int
    request: ScoreRequest
    ids_S: NDArray[np.int64]
    """images expanded"""
    rows_R: NDArray[np.int64]
    """positions that predict a response token"""
    image_inputs: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    """what the image processor made of each image, by the image's sha256"""


class TeacherModel:
    """The checkpoint of `setup.model_dir`, loaded and checked. Raises `EngineError`."""

    def __init__(self, config: HfEngineConfig, setup: EngineSetup, sees_images: bool) -> None:
        self._setup = setup
        self._device = _device(config)
        self._model = _load(setup, sees_images, config, self._device)
        self._base = self._model.base_model
        self._decoder = self._model.get_decoder()
        self._head = self._model.get_output_embeddings()
        self._packs = config.batching == "packed"
        self._own_attention = self._decoder.config._attn_implementation
        if setup.vocab_size > self.head_size:
            raise EngineError(
                f"{setup.model_dir}: the tokenizer has {setup.vocab_size} tokens, the lm_head only {self.head_size} "
                "rows; tokenizer and checkpoint do not belong together"
            )
        self._check_head()
        if self._packs:
            self._check_packing()

    @property
    def head_size(self) -> int:
        """Rows of the lm_head: the vocabulary, and what it may be padded with."""
        return int(self._head.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    def response_states(self, batch: Sequence[TeacherSequence]) -> torch.Tensor:
        """`hidden_RH`: the last hidden states that predict the batch's response tokens, one sequence after another."""
        if self._packs:
            hidden_SH = self._packed_states(batch)
            starts = np.cumsum([0, *(len(sequence.ids_S) for sequence in batch)])[:-1]
            rows_R = np.concatenate([start + sequence.rows_R for start, sequence in zip(starts, batch, strict=True)])
            return hidden_SH[torch.from_numpy(rows_R).to(self._device)]
        hidden_BSH = self._padded_states(batch)
        return torch.cat(
            [hidden_BSH[b, torch.from_numpy(item.rows_R).to(self._device)] for b, item in enumerate(batch)]
        )

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """`logits_RV` float32 over the real tokens. The tensor is the caller's own."""
        logits_RV: torch.Tensor = self._head(hidden_RH)[:, : self._setup.vocab_size].float()
        return logits_RV

    def candidates(self, sequence: TeacherSequence, sampling: Sampling) -> list[NDArray[np.int32]]:
        """`sampling.n` responses to a prompt, drawn from a generator of its own; each is cut behind its EOS."""
        torch.manual_seed(seed_of(sampling, sequence.request))
        ids_1S = self._tensor(sequence.ids_S)[None]
        inputs = {"input_ids": ids_1S, "attention_mask": torch.ones_like(ids_1S)}
        inputs |= self._arrays(self._images(sequence))
        if self._has_rope_index:
            inputs["mm_token_type_ids"] = self._is_image(ids_1S)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p}
        # Slots of a padded lm_head must never be drawn, and a response cannot hold an image.
        impossible = list(range(self._setup.vocab_size, self.head_size))
        impossible += [] if self._setup.image_token_id is None else [self._setup.image_token_id]
        with self._plain_attention():
            ids_NS = self._model.generate(
                **inputs,
                **(drawn if sampling.temperature > 0 else {"do_sample": False}),
                num_return_sequences=sampling.n,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self._setup.eos_id,
                pad_token_id=self._setup.eos_id,
                suppress_tokens=impossible or None,
            )
        return [_cut_at_eos(ids, self._setup.eos_id) for ids in ids_NS[:, len(sequence.ids_S) :].cpu().numpy()]

    def _packed_states(self, batch: Sequence[TeacherSequence]) -> torch.Tensor:
        """`hidden_SH` of the sequences laid one after the other."""
        ids_1S = self._tensor(np.concatenate([item.ids_S for item in batch]))[None]
        positions = torch.cat([self._positions(item) for item in batch], dim=-1).to(self._device)
        with packed([len(item.ids_S) for item in batch]):
            output = self._base(input_ids=ids_1S, position_ids=positions, use_cache=False, **self._features(batch))
        hidden_SH: torch.Tensor = output.last_hidden_state[0]
        return hidden_SH

    def _positions(self, sequence: TeacherSequence) -> torch.Tensor:
        """`[1, S]`, from 0; for M-RoPE `[4, 1, S]`: the same for the mask, then time, height and width."""
        text_1S = torch.arange(len(sequence.ids_S))[None]
        if not self._has_rope_index:
            return text_1S
        ids_1S = torch.from_numpy(sequence.ids_S)[None]
        grid_N3 = self._arrays(self._images(sequence)).get("image_grid_thw")
        positions_31S, _ = self._base.get_rope_index(ids_1S, self._is_image(ids_1S), grid_N3)
        return torch.cat([text_1S[None], positions_31S])

    def _padded_states(self, batch: Sequence[TeacherSequence]) -> torch.Tensor:
        """`hidden_BSH`; right padding changes nothing before it under a causal mask."""
        longest = max(len(item.ids_S) for item in batch)
        ids_BS = torch.zeros((len(batch), longest), dtype=torch.long, device=self._device)
        mask_BS = torch.zeros_like(ids_BS)
        for b, item in enumerate(batch):
            ids_BS[b, : len(item.ids_S)] = self._tensor(item.ids_S)
            mask_BS[b, : len(item.ids_S)] = 1
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, **self._features(batch)}
        if self._has_rope_index:
            inputs["mm_token_type_ids"] = self._is_image(ids_BS)
            grids = [image for item in batch for image in self._images(item)]
            inputs["image_grid_thw"] = self._arrays(grids).get("image_grid_thw")
        hidden_BSH: torch.Tensor = self._base(**inputs, use_cache=False).last_hidden_state
        return hidden_BSH

    def _features(self, batch: Sequence[TeacherSequence]) -> dict[str, Any]:
        """The images of the batch as the model encodes them, each encoded once, in the order of their placeholders."""
        unique = {sha256: inputs for item in batch for sha256, inputs in item.image_inputs.items()}
        if not unique:
            return {}
        encoded = self._base.get_image_features(**self._arrays(list(unique.values())), return_dict=True)
        number_of = {sha256: number for number, sha256 in enumerate(unique)}
        order = [number_of[image.image_sha256] for item in batch for image in item.request.images]
        encoded.pooler_output = [encoded.pooler_output[number] for number in order]
        if getattr(encoded, "deepstack_features", None) is not None:
            encoded.deepstack_features = [[layer[number] for number in order] for layer in encoded.deepstack_features]
        return {"mm_encoder_outputs": {"image": encoded}}

    def _images(self, sequence: TeacherSequence) -> list[dict[str, NDArray[Any]]]:
        return [sequence.image_inputs[image.image_sha256] for image in sequence.request.images]

    def _arrays(self, images: Sequence[dict[str, NDArray[Any]]]) -> dict[str, torch.Tensor]:
        """Arrays of several images, joined along the first axis; pixels in the dtype of the model."""
        if not images:
            return {}
        joined = {name: torch.from_numpy(np.concatenate([image[name] for image in images])) for name in images[0]}
        return {
            name: value.to(self._device, self._model.dtype if value.is_floating_point() else None)
            for name, value in joined.items()
        }

    @property
    def _has_rope_index(self) -> bool:
        return hasattr(self._base, "get_rope_index")

    def _is_image(self, ids: torch.Tensor) -> torch.Tensor:
        """What transformers calls `mm_token_type_ids`: 1 at the placeholders of images, 0 at text."""
        return torch.eq(ids, -1 if self._setup.image_token_id is None else self._setup.image_token_id).int()

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Within, the decoder attends as it was loaded: for generation, whose steps have a cache behind them."""
        self._decoder.set_attn_implementation(self._own_attention)
        try:
            yield
        finally:
            if self._packs:
                self._decoder.set_attn_implementation(PACKED_ATTENTION)

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuses a model whose logits are not lm_head(last hidden state)."""
        ids_1S = self._probe_ids(4)[None]
        own = self._model(input_ids=ids_1S, use_cache=False).logits.float()
        ours = self._head(self._base(input_ids=ids_1S, use_cache=False).last_hidden_state).float()
        difference = float((own - ours).abs().max())
        if not difference <= _HEAD_TOLERANCE:
            raise EngineError(
                f"{self._setup.model_dir}: the model's logits differ from lm_head(hidden states) by {difference:.3g}, "
                f"expected at most {_HEAD_TOLERANCE}; models with soft-capped or scaled logits, or with non-finite "
                "weights, cannot be captured by the engine `hf`"
            )

    @torch.inference_mode()
    def _check_packing(self) -> None:
        """Refuses a model in which a sequence is not alone when it shares its row."""
        ids_S, nothing = self._probe_ids(sum(_PROBE_LENGTHS)), np.zeros(0, np.int32)
        empty = ScoreRequest("probe", nothing, nothing, nothing, nothing)
        pieces = np.split(ids_S.cpu().numpy(), np.cumsum(_PROBE_LENGTHS)[:-1])
        batch = [TeacherSequence(n, empty, ids, nothing.astype(np.int64)) for n, ids in enumerate(pieces)]
        alone_SH = torch.cat([self._padded_states([sequence])[0] for sequence in batch])
        try:
            self._decoder.set_attn_implementation(PACKED_ATTENTION)
            together_SH = self._packed_states(batch)
        except ValueError as error:
            raise EngineError(self._cannot_pack(str(error))) from error
        difference = float((alone_SH.float() - together_SH.float()).abs().max())
        if not difference <= _PACKING_TOLERANCE[self._model.dtype]:
            raise EngineError(
                self._cannot_pack(
                    f"its last hidden states differ by {difference:.3g}, expected at most "
                    f"{_PACKING_TOLERANCE[self._model.dtype]}"
                )
            )

    def _cannot_pack(self, why: str) -> str:
        return (
            f"{self._setup.model_dir}: {type(self._model).__name__} cannot take several sequences in one row: {why}; "
            "set engine.batching=padded"
        )

    def _probe_ids(self, length: int) -> torch.Tensor:
        """Real tokens that are no image."""
        ids_S = torch.arange(length, device=self._device) % self._setup.vocab_size
        image_token_id = self._setup.image_token_id
        return ids_S if image_token_id is None else ids_S.masked_fill(ids_S == image_token_id, self._setup.eos_id)


def _device(config: HfEngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EngineError("engine.device is 'cuda', but torch sees no GPU; use 'cpu' or install a CUDA build of torch")
    return torch.device(config.device)


def _load(setup: EngineSetup, sees_images: bool, config: HfEngineConfig, device: torch.device) -> Any:
    # The command shows its own progress; a second bar for a second of loading only breaks it.
    transformers.utils.logging.disable_progress_bar()
    auto = transformers.AutoModelForImageTextToText if sees_images else transformers.AutoModelForCausalLM
    try:
        model, loading = auto.from_pretrained(
            setup.model_dir, dtype=getattr(torch, config.dtype), local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineError(f"{setup.model_dir}: transformers cannot load the teacher: {error}") from error
    strays = {name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys") if loading[name]}
    if strays:
        raise EngineError(
            f"{setup.model_dir}: the checkpoint does not fit its config: {strays}; transformers would fill in random "
            "weights, so nothing was captured"
        )
    return model.to(device).eval()


def _cut_at_eos(ids: NDArray[np.int64], eos_id: int) -> NDArray[np.int32]:
    ends = np.flatnonzero(ids == eos_id)
    return ids[: ends[0] + 1 if len(ends) else None].astype(np.int32)
