"""`logitlake inspect`: what it shows is what the lake holds, in the words of the right tokenizer or in none."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from logitlake_schemas import CaptureSpec
from logitlake_shared.cli import cli
from logitlake_shared.errors import ConfigError, DataError, FingerprintMismatchError, LakeError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.rendering import Renderer
from logitlake_shared.tools.inspect_sample import SampleView, find_sample, view_sample
from logitlake_shared.tools.inspect_text import print_sample
from logitlake_shared.tools.token_text import find_token_text

SAMPLE = "sample-0010"


def test_json_is_the_stored_row(small_lake: Path) -> None:
    """Ids, logprobs, ranks, entropies, tails and choices are those that the dataset reads."""
    view = _json("inspect", str(small_lake), SAMPLE, "--top", "2")
    item = LakeDataset(small_lake, "main")[0]
    tokens = view["responses"][0]["tokens"]
    assert (view["id"], view["task"], view["cache"]) == (SAMPLE, item.task, "main")
    assert [token["token_id"] for token in tokens] == item.response_ids.tolist()
    assert [token["rank"] for token in tokens] == item.rows.label_rank_T.tolist()
    np.testing.assert_array_equal([token["logprob"] for token in tokens], item.rows.label_logprob_T)
    np.testing.assert_array_equal([token["entropy"] for token in tokens], item.rows.entropy_T)
    np.testing.assert_allclose([token["tail_mass"] for token in tokens], np.exp(item.rows.log_tail_mass_T))
    starts = np.cumsum(item.rows.k_T) - item.rows.k_T
    for token, start in zip(tokens, starts, strict=True):
        assert [choice["token_id"] for choice in token["alternatives"]] == item.rows.topk_ids[
            start : start + 2
        ].tolist()
    image = view["images"][0]
    assert (image["sha256"], image["format"], image["width"]) == (item.image_sha256[0], "PNG", 4)


def test_every_sample_and_pair_is_found_by_its_id(small_lake: Path) -> None:
    """With and without a published catalog, in whatever unit and row it lies."""
    lake = Lake.open(small_lake)
    for _ in range(2):
        for name, ids in (
            ("main", LakeDataset(small_lake, "main").ids()),
            ("pairs", PairDataset(small_lake, "pairs").ids()),
        ):
            for row_id in ids:
                found = find_sample(lake, row_id)
                assert found.cache.name == name
                assert view_sample(found, None, "").id == row_id
        _run("rebuild", str(small_lake))


def test_a_pair_shows_chosen_beside_rejected(small_lake: Path) -> None:
    """Both responses with their own tokens and sums."""
    view = _json("inspect", str(small_lake), "pair-0001")
    chosen, rejected = view["responses"]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    assert [token["token_id"] for token in rejected["tokens"]] == [8, 9, 1]
    assert chosen["logprob_sum"] == pytest.approx(-0.75)
    shown = _shown(find_view(small_lake, "pair-0001"), width=100)
    assert any("chosen" in line and "rejected" in line for line in shown.splitlines())


def test_ids_stand_alone_where_no_tokenizer_is_known(small_lake: Path) -> None:
    """And the output says how to get text."""
    shown = _run("inspect", str(small_lake), SAMPLE).stdout
    assert "ids only: name the folder of the teacher 'teacher' with --tokenizer DIR" in shown
    assert "#7" in shown


def test_another_tokenizer_is_refused(small_lake: Path, tiny_teacher: Path) -> None:
    """Ids in the words of a foreign token map would be a lie; the message names both digests."""
    result = _run("inspect", str(small_lake), SAMPLE, "--tokenizer", str(tiny_teacher))
    assert isinstance(result.exception, FingerprintMismatchError)
    assert "a" * 64 in str(result.exception)
    with pytest.raises(ConfigError, match=r"there is no tokenizer\.json"):
        find_token_text(Lake.open(small_lake).cache("main").spec, small_lake)


def test_the_teachers_tokenizer_speaks_as_the_renderer_does(capture_spec: CaptureSpec, tiny_teacher: Path) -> None:
    """`tokenizers` alone finds the digest and the texts that transformers finds."""
    renderer = Renderer(tiny_teacher)
    spec = capture_spec.model_copy(update={"tokenizer": renderer.identity()})
    decode, note = find_token_text(spec, tiny_teacher)
    assert decode is not None
    assert str(tiny_teacher) in note
    ids = renderer.render_response("a red seven").tolist()
    assert [decode(token) for token in ids] == [renderer.token(token) for token in ids]


def test_a_folder_of_the_teachers_name_is_found(
    capture_spec: CaptureSpec, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the working folder, if and only if its token map is the one of the spec."""
    monkeypatch.chdir(tiny_teacher.parent)
    engine = capture_spec.engine.model_copy(update={"model": tiny_teacher.name})
    spec = capture_spec.model_copy(update={"engine": engine, "tokenizer": Renderer(tiny_teacher).identity()})
    assert find_token_text(spec, None)[0] is not None
    assert find_token_text(capture_spec.model_copy(update={"engine": engine}), None)[0] is None


def test_without_the_tokenizers_package_the_message_says_so(
    small_lake: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base install has none."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = _run("inspect", str(small_lake), SAMPLE, "--tokenizer", str(tiny_teacher))
    assert 'pip install "logitlake[inspect]"' in str(result.exception)


def test_images_are_saved_byte_for_byte(small_lake: Path, tmp_path: Path, make_unit: Callable[..., UnitResult]) -> None:
    """Under their digest and format."""
    view = _json("inspect", str(small_lake), SAMPLE, "--save-images", str(tmp_path / "images"))
    assert Path(view["images"][0]["saved_to"]).read_bytes() == make_unit(1).images[0].data


def test_colours_only_where_they_are_wanted(small_lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal is coloured by surprise, NO_COLOR and a pipe are not."""
    view = find_view(small_lake, SAMPLE)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in _shown(view, 100, color="standard") or "\x1b[1;31m" in _shown(view, 100, color="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in _shown(view, 100, color="standard")
    assert "\x1b" not in _run("inspect", str(small_lake), SAMPLE).stdout


@pytest.mark.parametrize("width", [80, 140])
def test_it_stays_within_the_terminal(small_lake: Path, width: int) -> None:
    """Every token has its line, no line is too long."""
    for row_id in (SAMPLE, "pair-0001"):
        shown = _shown(find_view(small_lake, row_id), width)
        assert max(len(line) for line in shown.splitlines()) <= width


def test_an_unknown_id_is_answered_with_ids_there_are(small_lake: Path) -> None:
    """And an unknown cache with the caches."""
    with pytest.raises(DataError, match="no sample or pair 'nothing' in any cache; ids look like"):
        find_sample(Lake.open(small_lake), "nothing")
    with pytest.raises(LakeError, match="caches in this lake: main, pairs"):
        find_sample(Lake.open(small_lake), SAMPLE, "nowhere")


def find_view(lake: Path, row_id: str) -> SampleView:
    """The view without texts."""
    return view_sample(find_sample(Lake.open(lake), row_id), None, "ids only")


def _shown(view: SampleView, width: int, color: str | None = None) -> str:
    console = Console(width=width, force_terminal=True, color_system=color, file=io.StringIO())  # type: ignore[arg-type]
    print_sample(view, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def _json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, [*arguments, "-o", "json"], catch_exceptions=False)
    document: dict[str, Any] = json.loads(result.stdout)
    return document
