"""The format is declared once, and what it declares does not move by accident."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

import logitlake_schemas
from logitlake_schemas import (
    IMAGE_COLUMNS,
    PAIR_COLUMNS,
    SAMPLE_COLUMNS,
    SCORE_COLUMNS,
    CaptureSpec,
    CodecPolicy,
    Column,
    GenerateMode,
    ScoreMode,
    arrow_schema,
    canonical_json,
    layout,
)
from logitlake_schemas.records import ADDED_LATER, GrownRecord, Record

GOLDEN = Path(__file__).parents[1] / "golden" / "columns-format-1.json"


def test_columns_of_format_1_are_the_golden_ones() -> None:
    """A change of a column's name, type, order or nullability is a change of the format and must be deliberate.

    Remake (only together with FORMAT_VERSION, or to add a nullable column): print the document below into the file.
    """
    declared = {
        kind: [[column.name, str(column.type), column.grain, column.nullable] for column in columns]
        for kind, columns in (
            ("samples", SAMPLE_COLUMNS),
            ("pairs", PAIR_COLUMNS),
            ("images", IMAGE_COLUMNS),
            ("scores", SCORE_COLUMNS),
        )
    }
    assert declared == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_no_list_element_is_nullable() -> None:
    """Lists hold values, never nulls: readers cut numpy arrays from their buffers."""
    for columns in (SAMPLE_COLUMNS, PAIR_COLUMNS, SCORE_COLUMNS):
        for field in arrow_schema(columns):
            if pa.types.is_list(field.type):
                assert not field.type.value_field.nullable, field.name


def test_canonical_json_forgets_order_and_refuses_nan() -> None:
    """Two documents that say the same have the same bytes."""
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_fingerprint_changes_with_every_part(capture_spec: CaptureSpec) -> None:
    """Same inputs, same fingerprint; other teacher, tokenizer, codec or data, another one."""
    others = [
        capture_spec.model_copy(update={"kind": "pairs"}),
        capture_spec.model_copy(update={"tokenizer": capture_spec.tokenizer.model_copy(update={"eos_id": 3})}),
        capture_spec.model_copy(update={"engine": capture_spec.engine.model_copy(update={"dtype": "bfloat16"})}),
        capture_spec.model_copy(update={"codec": CodecPolicy(k_max=9, k_min=2)}),
        capture_spec.model_copy(update={"dataset": capture_spec.dataset.model_copy(update={"unit_tokens": 99})}),
    ]
    fingerprints = {spec.fingerprint for spec in others}
    assert len(fingerprints) == len(others)
    assert capture_spec.fingerprint not in fingerprints
    assert CaptureSpec.model_validate_json(capture_spec.to_bytes()).fingerprint == capture_spec.fingerprint


def test_a_field_that_was_added_later_changes_nothing_until_it_is_used(capture_spec: CaptureSpec) -> None:
    """A spec that does not use it has the bytes of a release that does not know it, nested records included."""
    document = json.loads(capture_spec.to_bytes())
    assert "temperatures" not in document["codec"]
    assert not {"mode", "no_image_pass"} & document.keys()
    said = capture_spec.model_copy(
        update={"mode": ScoreMode(), "no_image_pass": False, "codec": CodecPolicy(k_max=8, k_min=2, temperatures=())}
    )
    assert said.to_bytes() == capture_spec.to_bytes()
    assert said.fingerprint == capture_spec.fingerprint
    # Where nobody counts bytes, every field is shown.
    assert capture_spec.model_dump(mode="json")["codec"]["temperatures"] == []


@pytest.mark.parametrize(
    "used",
    [
        {"mode": GenerateMode(type="generate", max_new_tokens=8)},
        {"no_image_pass": True},
        {"codec": CodecPolicy(k_max=8, k_min=2, temperatures=(2, 4))},
    ],
)
def test_a_field_that_was_added_later_is_written_once_it_is_used(
    capture_spec: CaptureSpec, used: dict[str, Any]
) -> None:
    """Used, it is part of the identity and survives the document."""
    spec = capture_spec.model_copy(update=used)
    assert spec.fingerprint != capture_spec.fingerprint
    assert CaptureSpec.model_validate_json(spec.to_bytes()) == spec


@pytest.mark.parametrize("record", [Record, *Record.__subclasses__(), *GrownRecord.__subclasses__()])
def test_only_records_that_leave_them_out_have_fields_that_were_added_later(record: type[Record]) -> None:
    """The mark does nothing on another record, and a field without a default cannot be left out."""
    for name, field in record.model_fields.items():
        if ADDED_LATER in field.metadata:
            assert issubclass(record, GrownRecord), name
            assert not field.is_required(), name


def test_temperatures_have_one_spelling() -> None:
    """The same temperatures are the same spec: rising, each once."""
    for wrong in ((4, 2), (2, 2)):
        with pytest.raises(ValidationError, match="temperatures must rise"):
            CodecPolicy(temperatures=wrong)
    with pytest.raises(ValidationError, match="temperatures"):
        CodecPolicy.model_validate({"temperatures": [3]})


def test_records_refuse_unknown_keys(capture_spec: CaptureSpec) -> None:
    """A document from a newer format is refused, not half understood."""
    document = json.loads(capture_spec.to_bytes()) | {"surprise": 1}
    with pytest.raises(ValidationError, match="surprise"):
        CaptureSpec.model_validate(document)


def test_codec_bounds_must_agree() -> None:
    """k_min above k_max is refused with both numbers."""
    with pytest.raises(ValidationError, match="k_min=9 and k_max=8"):
        CodecPolicy(k_min=9, k_max=8)


def test_paths_and_their_inverses() -> None:
    """Each name that is parsed back comes from the function that made it."""
    assert layout.unit_of_commit(layout.commit_path("c", "000001-ab")) == "000001-ab"
    assert layout.snapshot_number(layout.snapshot_path("c", 12)) == 12
    assert not layout.valid_name("../up")
    assert not layout.valid_name("")
    assert layout.valid_name("llava-665k.v1")


def test_exports_are_what_is_there() -> None:
    """`__all__` names public things that exist."""
    assert all(hasattr(logitlake_schemas, name) for name in logitlake_schemas.__all__)


@pytest.mark.parametrize("columns", [SAMPLE_COLUMNS, PAIR_COLUMNS, IMAGE_COLUMNS, SCORE_COLUMNS])
def test_the_documentation_lists_every_column(columns: tuple[Column, ...]) -> None:
    """docs/format.md says what each declared column is, in the declaration's own words."""
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    for column in columns:
        shown = str(column.type).replace("element: ", "").replace(" not null", "")
        assert f"| `{column.name}` | {shown} | {column.grain} | {column.doc} |" in text
