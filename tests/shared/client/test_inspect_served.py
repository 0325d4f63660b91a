"""`logitlake inspect --server URL` shows what `logitlake inspect LAKE` shows, to the last digit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.served import served
from tests.shared.conftest import made_scores, small_lake
from tests.teacher_service.api.conftest import teacher, tokens

from logitlake_schemas import CaptureSpec
from logitlake_shared.errors import ServiceError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.rendering import Renderer
from logitlake_shared.store import TOKEN_VARIABLE
from logitlake_shared.student_scores import scores_path
from logitlake_shared.tools.inspect_served import view_of_document
from logitlake_shared.web.tokens import TokenStore
from logitlake_teacher.api.app import teacher_app
from logitlake_teacher.config.serve import ServeConfig

__all__ = ["small_lake", "teacher", "tokens"]

Command = Callable[..., Any]
Teacher = Callable[..., tuple[Any, str]]

SAMPLE = "sample-0010"


@pytest.fixture
def spoken(
    small_lake: Path, capture_spec: CaptureSpec, tiny_teacher: Path, make_unit: Callable[..., UnitResult]
) -> Path:
    """The small lake with one cache more, `spoken`, of the tiny teacher's own token map; it holds `main`'s unit 1."""
    spec = capture_spec.model_copy(update={"tokenizer": Renderer(tiny_teacher).identity()})
    cache = Lake.open(small_lake).create_cache("spoken", spec)
    cache.publish_unit(make_unit(1))
    cache.snapshot()
    return small_lake


@pytest.mark.parametrize("output", ["json", "table"])
@pytest.mark.parametrize(
    "asked",
    [
        (SAMPLE,),
        ("pair-0001",),
        (SAMPLE, "--cache", "spoken"),
        ("sample-0021", "--top", "2"),
        ("pair-0002", "--cache=pairs"),
    ],
    ids=" ".join,
)
def test_a_sample_of_a_service_is_shown_as_that_of_its_lake(
    spoken: Path, teacher: Teacher, run_command: Command, asked: tuple[str, ...], output: str
) -> None:
    """Byte for byte, the first cache that holds it and the others named where none is asked for."""
    of_lake = run_command("logitlake", "inspect", spoken, *asked, "-o", output)
    of_service = run_command("logitlake", "inspect", "--server", teacher()[1], *asked, "-o", output)
    assert of_lake.code == 0, of_lake.err
    assert (of_service.code, of_service.out) == (0, of_lake.out)
    if (asked, output) == ((SAMPLE,), "table"):
        assert "spoken; choose with --cache" in of_lake.out


def test_a_student_stands_beside_as_of_its_file(
    small_lake: Path, teacher: Teacher, run_command: Command, tmp_path: Path
) -> None:
    """The service's student by its name is the same as its file on the disk; either option belongs to its own."""
    path = scores_path(tmp_path / "runs/demo/d2s", "main", None)
    made_scores(small_lake, path)
    _, url = teacher()
    for output in ("table", "json"):
        of_lake = run_command("logitlake", "inspect", small_lake, SAMPLE, "--scores", path, "-o", output)
        of_service = run_command("logitlake", "inspect", "--server", url, SAMPLE, "--student", "demo/d2s", "-o", output)
        assert of_service.code == 0, of_service.err
        assert of_service.out == of_lake.out
        assert "demo/d2s" in of_lake.out
    for wrong in ((small_lake, SAMPLE, "--student", "demo/d2s"), ("--server", url, SAMPLE, "--scores", path)):
        assert "--scores is for a LAKE" in run_command("logitlake", "inspect", *wrong).err


def test_images_come_byte_for_byte(
    small_lake: Path, teacher: Teacher, run_command: Command, tmp_path: Path, make_unit: Callable[..., UnitResult]
) -> None:
    """Under the names that a lake's have."""
    folder = tmp_path / "images"
    asked = (SAMPLE, "--save-images", folder, "-o", "json")
    of_lake = run_command("logitlake", "inspect", small_lake, *asked).out
    (saved,) = folder.iterdir()
    saved.unlink()
    assert run_command("logitlake", "inspect", "--server", teacher()[1], *asked).out == of_lake
    assert saved.read_bytes() == make_unit(1).images[0].data


def test_texts_come_from_a_tokenizer_of_either_machine(
    spoken: Path, teacher: Teacher, tiny_teacher: Path, run_command: Command, tmp_path: Path
) -> None:
    """From the service's where it has one; from the one that is named, and another cache's is refused as ever."""
    _, url = teacher()
    asked = (SAMPLE, "--cache", "spoken", "-o", "json")
    named = ("--tokenizer", tiny_teacher)
    of_lake = run_command("logitlake", "inspect", spoken, *asked, *named)
    assert run_command("logitlake", "inspect", "--server", url, *asked, *named).out == of_lake.out
    with served(
        teacher_app(
            ServeConfig.model_validate({"lake": str(spoken), "tokenizer": tiny_teacher, "sql": {"num_warm": 0}})
        )
    ) as speaking:
        told = json.loads(run_command("logitlake", "inspect", "--server", speaking, *asked).out)
    assert told.pop("tokenizer").endswith("tokenizer.json")
    expected = json.loads(of_lake.out)
    del expected["tokenizer"]
    assert told == expected
    assert all(token["text"] for token in told["responses"][0]["tokens"])
    foreign = run_command("logitlake", "inspect", "--server", url, SAMPLE, "--cache", "main", *named)
    assert (foreign.code, "a" * 64 in foreign.err) == (2, True)


def test_what_is_not_there_is_said_as_of_a_lake(
    small_lake: Path, teacher: Teacher, tokens: TokenStore, run_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ids that there are; a cache that the token does not cover holds nothing."""
    _, url = teacher()
    of_lake = run_command("logitlake", "inspect", small_lake, "nothing")
    of_service = run_command("logitlake", "inspect", "--server", url, "nothing")
    assert "no sample or pair 'nothing' in any cache; ids look like" in of_lake.err
    assert "no sample or pair 'nothing' in any cache; ids look like" in of_service.err
    assert of_lake.code == of_service.code == 2
    assert "no cache 'nope'" in run_command("logitlake", "inspect", "--server", url, SAMPLE, "--cache", "nope").err
    for arguments in ((), ("--server", url), (small_lake, SAMPLE, "--server", url), (small_lake,)):
        assert run_command("logitlake", "inspect", *arguments).code == 2
    monkeypatch.setenv(TOKEN_VARIABLE, tokens.create("ada", "read", ("pairs",))[0])
    assert "in any cache" in run_command("logitlake", "inspect", "--server", url, SAMPLE).err
    assert run_command("logitlake", "inspect", "--server", url, "pair-0001").code == 0


@pytest.mark.parametrize("document", [{}, {"images": 1}, {"images": [], "id": "x"}, {"images": [{"sha256": 1}]}])
def test_a_document_that_is_no_sample_is_an_error(document: dict[str, Any]) -> None:
    """Of the tree, not a half view."""
    with pytest.raises(ServiceError, match="no sample of this release"):
        view_of_document(document)
