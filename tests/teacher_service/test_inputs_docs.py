"""Every example of `docs/inputs.md` is what it says: files are read, tables are configurations, all are captured."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from logitlake_shared.data_formats import BadRecord
from logitlake_shared.images import DecodedImage
from logitlake_shared.lake import Lake
from logitlake_teacher.config import ImagesConfig, Source, TokensSource

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text(encoding="utf-8")
FILES = re.findall(r'```json title="(.+?)"\n(.*?)```', PAGE, re.DOTALL)
SCRIPTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TABLES = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
SOURCES = [table["data"][0] for table in TABLES if "data" in table]
# Records that each example leaves once its own filters are through.
COUNTS = {"llava": 2, "openai": 2, "hf_dataset": 1, "tokens": 1, "rlaif_v": 1, "fake": 20}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]) -> Path:
    """The working directory of a reader of the page, with the files that the examples write and two photos."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for digit in (2, 7):
        (tmp_path / "photos" / f"{digit}.png").write_bytes(png(digit))
    for name, text in FILES:
        (tmp_path / name).write_text(text, encoding="utf-8")
    for script in SCRIPTS:
        exec(script, {})
    return tmp_path


def test_the_page_has_an_example_of_every_type() -> None:
    """A type that is added without an example, or a fence that changed, is noticed."""
    types = {cls.model_fields["type"].default for cls in get_args(Source)}
    assert {source["type"] for source in SOURCES} == set(COUNTS) == types


@pytest.mark.parametrize("table", [one for one in SOURCES if one["type"] != "tokens"], ids=lambda table: table["type"])
def test_an_example_is_read(page: Path, table: dict[str, Any]) -> None:
    """Every record that the table wants is good, and each of its images is loaded and decoded."""
    source: Any = TypeAdapter(Source).validate_python(table)
    records = list(source.read())
    assert not [record for record in records if isinstance(record, BadRecord)]
    assert len(records) == COUNTS[table["type"]]
    config = ImagesConfig()
    with config.open_loader() as loader, config.open_decoder() as decoder:
        loaded = [loader.load(image) for record in records for image in record.images]
        assert all(isinstance(answer, DecodedImage) for answer in decoder.decode_all(loaded))


def test_the_example_of_token_ids_is_read(page: Path) -> None:
    """Columns and not records: no row has a problem."""
    (table,) = [one for one in SOURCES if one["type"] == "tokens"]
    (batch,) = TypeAdapter(TokensSource).validate_python(table).read()
    assert len(batch) == COUNTS["tokens"]
    assert batch.columns.column("problem").null_count == len(batch)


def test_the_section_of_images_is_a_configuration() -> None:
    """`[images]` as it stands."""
    (section,) = [table["images"] for table in TABLES if "images" in table]
    assert ImagesConfig.model_validate(section).max_pixels == 20_000_000


def test_all_examples_together_are_captured(page: Path, tiny_teacher: Path, run_command: Callable[..., Any]) -> None:
    """One capture of every conversation of the page, one of its pairs, with the fake teacher."""
    import tomli_w

    common = {
        "teacher": {"model_dir": str(tiny_teacher)},
        "engine": {"type": "fake"},
        "plan": {"folder": str(page / "plans")},
    }
    for command, wanted in (("capture", {"llava", "openai", "hf_dataset", "tokens", "fake"}), ("pairs", {"rlaif_v"})):
        data = [source for source in SOURCES if source["type"] in wanted]
        document = common | {"lake": {"uri": "lake", "cache": command}, "data": data}
        (page / f"{command}.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
        done = run_command("logitlake-teacher", command, f"{command}.toml")
        assert done.code == 0, done.err
        snapshot = Lake.open("lake").cache(command).open_snapshot()
        rows = sum(entry.rows for commit in snapshot.commits for entry in commit.shards if entry.kind != "images")
        assert rows == sum(COUNTS[kind] for kind in wanted)
