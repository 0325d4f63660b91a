"""The JSON documents of a lake as strict, frozen pydantic models.

Unknown keys are errors: a document from a newer format is refused, never half understood. No document holds a time
or a host name, so that the same capture writes the same bytes wherever and whenever it runs. A field that was added
after the first release is left out of a document where it has its default, so that a document that does not use it
keeps its bytes and its fingerprint.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from logitlake_schemas.fingerprint import canonical_json, fingerprint

__all__ = [
    "ADDED_LATER",
    "ERROR_CODES",
    "FORMAT_VERSION",
    "SET_ASIDE_CODES",
    "CacheKind",
    "CaptureMode",
    "CaptureSpec",
    "Codec",
    "CodecPolicy",
    "CommitRecord",
    "DatasetIdentity",
    "EngineIdentity",
    "GenerateMode",
    "GrownRecord",
    "LakeManifest",
    "QuarantineRecord",
    "Record",
    "SampledPolicy",
    "ScoreMode",
    "ScoresRecord",
    "ShardEntry",
    "ShardKind",
    "Snapshot",
    "StoredError",
    "Temperature",
    "TokenizerIdentity",
    "UnitError",
]

FORMAT_VERSION = 1

CacheKind = Literal["samples", "pairs"]
ShardKind = Literal["samples", "pairs", "images"]
Temperature = Literal[2, 4]

SET_ASIDE_CODES = ("teacher_crashed", "teacher_timeout")
"""codes of samples that ended, or held up, every process that tried them"""
ERROR_CODES = (
    "record_invalid",
    "image_missing",
    "image_format",
    "image_decode",
    "image_too_large",
    "image_animated",
    "image_timeout",
    "image_url_refused",
    "image_fetch_failed",
    "image_fetch_timeout",
    "image_shape",
    "image_placeholders",
    "too_many_images",
    "prompt_too_long",
    "teacher_nonfinite",
    "teacher_invalid",
    "teacher_refused",
    *SET_ASIDE_CODES,
)
"""codes of the samples and pairs that could not be captured"""


class Record(BaseModel):
    """Base of every document: frozen, strict about keys, with one canonical byte form."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def to_bytes(self) -> bytes:
        """The canonical JSON of the document, with a final newline."""
        return canonical_json(self.document()) + b"\n"

    def document(self) -> dict[str, Any]:
        """The document as plain JSON types: what is written and fingerprinted."""
        return self.model_dump(mode="json", context=_AS_DOCUMENT)


_AS_DOCUMENT = {"document": True}
ADDED_LATER = "added later"
"""Marks a field of a `GrownRecord` that the first release did not have: `Annotated[int, ADDED_LATER] = 0`."""


class GrownRecord(Record):
    """A record with fields that were added later. (Not every record: a snapshot of thousands is written in C.)"""

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        if info.context != _AS_DOCUMENT:
            return document
        unused = {
            name
            for name, field in type(self).model_fields.items()
            if ADDED_LATER in field.metadata and getattr(self, name) == field.get_default(call_default_factory=True)
        }
        return {name: value for name, value in document.items() if name not in unused}


class LakeManifest(Record):
    """`lake.json`: what makes a folder a lake."""

    format_version: int = FORMAT_VERSION


class TokenizerIdentity(Record):
    """What teacher and student must share for cached ids to mean the same to both."""

    token_map_sha256: str
    """sha256 of the canonical JSON of the token -> id map"""
    chat_template_sha256: str
    """sha256 of the chat template's text"""
    renderer: str
    """name and version of the rule that cuts a conversation into prompt and response ids"""
    vocab_size: int = Field(gt=0)
    """number of real tokens; a padded lm_head is trimmed to it"""
    eos_id: int = Field(ge=0)
    """the token that closes every response"""
    image_token_id: int | None
    """the placeholder of one image, if the model sees images"""


class EngineIdentity(Record):
    """Who computed the logprobs."""

    engine: str
    """`hf`, `vllm`, `fake`"""
    engine_version: str
    """version of the library that ran the forward pass"""
    model: str
    """name of the teacher, for people; identity is the digest"""
    weights_sha256: str
    """digest over the teacher's weight files and config"""
    dtype: str
    """dtype of the forward pass, and the quantisation if any"""
    image_processor_sha256: str | None
    """digest of the image processor's configuration, if the model sees images"""
    options: dict[str, str | int | float | bool | None] = {}
    """engine options that can move the numbers"""


class CodecPolicy(GrownRecord):
    """The default codec: the most probable entries of a token, how many of them, and how exactly."""

    type: Literal["topk"] = "topk"
    k_max: int = Field(default=32, gt=0, le=65535)
    """entries captured for each token, at most"""
    k_min: int = Field(default=1, gt=0)
    """entries kept for each token, at least"""
    p_min: float = Field(default=2e-3, ge=0, lt=1)
    """entries below this probability are dropped beyond `k_min`; 0 keeps `k_max` of each token"""
    grid: Literal["companded256", "exact"] = "companded256"
    """`companded256` snaps logprobs to 256 levels, uniform in sqrt(p); `exact` keeps float32"""
    max_mean_kl: float = Field(default=2e-4, gt=0)
    """a shard whose mean KL(captured‖stored), in nats, is above this budget is refused"""
    temperatures: Annotated[tuple[Temperature, ...], ADDED_LATER] = ()
    """temperatures beside 1 at which the tail mass is stored too, for a loss at them: 2, 4 or both"""

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min must be at most k_max, got k_min={self.k_min} and k_max={self.k_max}")
        if list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError(f"temperatures must rise, each named once, got {list(self.temperatures)}")
        return self


class SampledPolicy(Record):
    """Random-Sampling KD: the counts of `draws` tokens drawn from the full distribution, an unbiased estimate of it.

    For engines that see the full distribution. Anshumann et al., ACL 2025: the mean gradient over many tokens is that
    of full distillation, while a top-k with a tail keeps a small bias; at a few thousand tokens a step the top-k has
    the smaller error.
    """

    type: Literal["sampled"]
    draws: int = Field(default=50, gt=0, le=255)
    """tokens drawn with replacement; at most 255, so that a dictionary of one-byte codes holds every count"""
    seed: int = Field(default=0, ge=0)
    """the draws are a function of the seed, the sample and the token"""


def _codec_type(value: Any) -> str:
    return str(value.get("type", "topk") if isinstance(value, dict) else value.type)


def _mode_type(value: Any) -> str:
    return str(value.get("type", "score") if isinstance(value, dict) else value.type)


Codec = Annotated[
    Annotated[CodecPolicy, Tag("topk")] | Annotated[SampledPolicy, Tag("sampled")], Discriminator(_codec_type)
]
"""What is kept of a token's distribution; `type` says which, `topk` where it is not given."""


class DatasetIdentity(Record):
    """Which data was captured, and how it was cut into units."""

    snapshot_sha256: str
    """digest over every record that was planned, images included"""
    num_samples: int = Field(ge=0)
    """planned samples or pairs"""
    unit_tokens: int = Field(gt=0)
    """token budget of a unit"""


class ScoreMode(Record):
    """The responses are given; the teacher says what it thinks of them."""

    type: Literal["score"] = "score"


class GenerateMode(Record):
    """The teacher writes the last answer itself, and says what it thought of every token as it wrote it.

    What it says is its own distribution at T = 1, whatever the tokens were drawn with.
    """

    type: Literal["generate"]
    max_new_tokens: int = Field(default=256, gt=0)
    """longest answer, EOS included; one that is longer is stored as far as it went, with finish_reason `length`"""
    temperature: float = Field(default=0.0, ge=0)
    """of the drawing; 0 takes the most probable token"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """draws from the fewest tokens whose probability reaches this"""
    seed: int = Field(default=0, ge=0)
    """another seed is another answer, where `temperature` is above 0"""


CaptureMode = Annotated[
    Annotated[ScoreMode, Tag("score")] | Annotated[GenerateMode, Tag("generate")], Discriminator(_mode_type)
]
"""Whose responses are captured; `type` says which, `score` where it is not given."""


class CaptureSpec(GrownRecord):
    """`spec.json`: everything that determines the content of a cache. Its fingerprint is the cache's identity."""

    format_version: int = FORMAT_VERSION
    kind: CacheKind
    tokenizer: TokenizerIdentity
    engine: EngineIdentity
    codec: Codec
    dataset: DatasetIdentity
    mode: Annotated[CaptureMode, ADDED_LATER] = ScoreMode()
    no_image_pass: Annotated[bool, ADDED_LATER] = False
    """whether responses to images were scored once more with the images left out"""
    pair_making: Annotated[dict[str, Any] | None, ADDED_LATER] = None
    """how the teacher made pairs: every option, as configured; none where the data gave them"""

    @property
    def fingerprint(self) -> str:
        """sha256 over the canonical JSON of the spec."""
        return fingerprint(self.document())


class ShardEntry(Record):
    """One Parquet file of a unit."""

    kind: ShardKind
    path: str
    """relative to the lake's root"""
    sha256: str
    """of the whole file"""
    bytes: int = Field(gt=0)
    footer_sha256: str
    """of the last `footer_bytes` bytes: Parquet's footer has no checksum of its own, and a reader of a few columns
    should not have to read the file to trust it"""
    footer_bytes: int = Field(gt=8)
    """Parquet's metadata, its length and the closing `PAR1`"""
    rows: int = Field(gt=0)
    tokens: int = Field(ge=0)
    """response tokens in the shard (chosen and rejected for pairs)"""


class UnitError(Record):
    """A sample that could not be captured. It is counted, never dropped in silence."""

    sample_id: str
    code: str
    """stable, for machines: one of `ERROR_CODES`, or `pair_…`, which says why a prompt gave no pair"""
    message: str
    """for people"""

    @property
    def is_failure(self) -> bool:
        """Not where the teacher answered a prompt, and no pair could be made of its answers."""
        return not self.code.startswith("pair_")


class StoredError(Record):
    """What storing cost, measured by the writer on the unit itself."""

    kl_mean: float | None
    """mean KL(captured‖stored) over the unit's tokens, in nats; none for draws, which estimate and do not round"""
    kl_max: float | None
    """the largest of them"""
    mean_stored_mass: float
    """mean probability covered by the stored entries"""
    mean_k: float
    """mean number of stored entries"""


class CommitRecord(Record):
    """`commits/<unit>.json`: the unit is done. Created once; the first publisher wins."""

    format_version: int = FORMAT_VERSION
    cache: str
    unit: str
    spec_fingerprint: str
    shards: tuple[ShardEntry, ...]
    errors: tuple[UnitError, ...]
    stored_error: StoredError | None
    """none where the unit stores no top-k"""


class QuarantineRecord(Record):
    """`quarantine/<unit>-<n>.json`: a committed unit was damaged; its commit record was taken back.

    Written before the commit record is removed, so that the unit's history is never lost.
    """

    format_version: int = FORMAT_VERSION
    cache: str
    unit: str
    reasons: tuple[str, ...]
    """what was found, for people"""
    commit: str
    """the text of the commit record that was removed, as it was found"""


class Snapshot(Record):
    """`snapshots/<n>.json`: the units that were committed at that moment. Readers pin one."""

    format_version: int = FORMAT_VERSION
    cache: str
    number: int = Field(gt=0)
    spec_fingerprint: str
    commits: tuple[CommitRecord, ...]
    """sorted by unit"""


class ScoresRecord(Record):
    """The footer of a file of scores: which student they are of, and of which samples."""

    format_version: int = FORMAT_VERSION
    student: str
    """for people: `<run>/<stage>`"""
    model_sha256: str
    """digest of the checkpoint"""
    dtype: str
    """of its weights while it was asked"""
    cache: str
    spec_fingerprint: str
    snapshot: int = Field(gt=0)
    split: str | None
    """of the samples; none: all of them"""
    top: int = Field(gt=0)
    """entries a token"""
