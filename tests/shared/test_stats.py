"""`logitlake stats`: every figure against numpy over the rows themselves, and what the pictures promise."""

import io
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from logitlake_schemas import CaptureSpec
from logitlake_shared.catalog import open_catalog
from logitlake_shared.cli import cli
from logitlake_shared.errors import ConfigError, LakeError
from logitlake_shared.lake import Lake, UnitResult
from logitlake_shared.reader import LakeDataset, PairDataset
from logitlake_shared.tools.stats import ENTROPY_STEP, PERCENTILES, By, CacheStats, GroupStats, PairGroup, lake_stats
from logitlake_shared.tools.stats_page import html_page
from logitlake_shared.tools.stats_text import print_stats

# SQL adds float64 in another order than numpy.
SUM_TOLERANCE = 1e-12


@pytest.mark.parametrize("by", ["task", "source", "split"])
def test_figures_are_numpys_over_the_rows(small_lake: Path, by: By) -> None:
    """Counts, means, percentiles, label agreement and perplexity of each group and of all."""
    dataset = LakeDataset(small_lake, "main")
    items = [dataset[i] for i in range(len(dataset))]
    stats = _stats(small_lake, "main", by)
    groups = {group.name: group for group in stats.groups}
    assert set(groups) == {getattr(item, by) for item in items}
    for name, group in {**groups, "all": stats.total}.items():
        assert isinstance(group, GroupStats)
        rows = [item.rows for item in items if name == "all" or getattr(item, by) == name]
        entropy = np.concatenate([row.entropy_T for row in rows]).astype(np.float64)
        labels = np.concatenate([row.label_logprob_T for row in rows]).astype(np.float64)
        ranks = np.concatenate([row.label_rank_T for row in rows])
        tail = np.exp(np.concatenate([row.log_tail_mass_T for row in rows]).astype(np.float64))
        assert (group.samples, group.tokens) == (len(rows), len(entropy))
        assert group.entropy_mean == pytest.approx(entropy.mean(), rel=SUM_TOLERANCE)
        assert group.tail_mass_mean == pytest.approx(tail.mean(), rel=SUM_TOLERANCE)
        assert group.top1_is_label == (ranks == 1).mean()
        assert group.label_perplexity == pytest.approx(np.exp(-labels.mean()), rel=SUM_TOLERANCE)
        assert group.mean_k == np.concatenate([row.k_T for row in rows]).mean()
        for percentile in PERCENTILES:
            exact = np.percentile(entropy, percentile, method="inverted_cdf")
            assert abs(group.entropy_percentiles[percentile] - exact) <= ENTROPY_STEP / 2 + 1e-9


def test_histograms_count_every_token_in_its_bin(small_lake: Path) -> None:
    """Counts are numpy's over the same edges; they add up to all tokens."""
    dataset = LakeDataset(small_lake, "main")
    rows = [dataset[i].rows for i in range(len(dataset))]
    values = {
        "entropy": np.concatenate([row.entropy_T for row in rows]),
        "tail mass": np.exp(np.concatenate([row.log_tail_mass_T for row in rows]).astype(np.float64)),
        "k": np.concatenate([row.k_T for row in rows]),
    }
    stats = _stats(small_lake, "main")
    assert isinstance(stats.total, GroupStats)
    for histogram in stats.histograms:
        expected, _ = np.histogram(values[histogram.title], bins=np.array(histogram.edges))
        assert list(histogram.counts) == expected.tolist()
        assert sum(histogram.counts) == stats.total.tokens
        assert len(histogram.labels) == len(histogram.counts) == len(histogram.edges) - 1
        assert sum(histogram.shares) == pytest.approx(1)


def test_groups_add_up_to_all(small_lake: Path) -> None:
    """Whatever the grouping, the total is the same."""
    totals = [_stats(small_lake, "main", by).total for by in ("task", "source", "split")]
    assert totals[0] == totals[1] == totals[2]
    stats = _stats(small_lake, "main")
    assert sum(group.tokens for group in stats.groups) == stats.total.tokens


def test_figures_of_pairs(small_lake: Path) -> None:
    """Preference, margins and logprobs a token, as numpy finds them."""
    dataset = PairDataset(small_lake, "pairs")
    pairs = [dataset[i] for i in range(len(dataset))]
    total = _stats(small_lake, "pairs").total
    assert isinstance(total, PairGroup)
    chosen = np.array([pair.chosen_logprobs.sum(dtype=np.float64) for pair in pairs])
    rejected = np.array([pair.rejected_logprobs.sum(dtype=np.float64) for pair in pairs])
    assert total.pairs == len(pairs)
    assert total.teacher_prefers_chosen == (chosen > rejected).mean()
    assert total.margin_mean == pytest.approx((chosen - rejected).mean())
    assert total.rejected_logprob_mean == pytest.approx(rejected.sum() / sum(len(p.rejected_ids) for p in pairs))


def test_a_teacher_that_is_sure_has_no_infinite_figure(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: Callable[..., UnitResult]
) -> None:
    """With the whole vocabulary stored the tail is -inf: mass 0, in the lowest bin."""
    codec = capture_spec.codec.model_copy(update={"k_max": 40, "p_min": 0.0})
    spec = capture_spec.model_copy(update={"codec": codec})
    cache = Lake.create(tmp_path / "lake").create_cache("main", spec)
    cache.publish_unit(make_unit(1, codec=codec))
    cache.snapshot()
    stats = _stats(tmp_path / "lake", "main")
    assert isinstance(stats.total, GroupStats)
    assert stats.total.tail_mass_mean == 0
    assert stats.histograms[1].counts == (8,)


def test_json_holds_every_figure(small_lake: Path) -> None:
    """One object a cache."""
    lines = CliRunner().invoke(cli, ["stats", str(small_lake), "-o", "json"]).stdout.splitlines()
    documents = {document["cache"]: document for document in map(json.loads, lines)}
    assert documents["main"]["total"]["tokens"] == 24
    assert documents["pairs"]["total"]["pairs"] == 2


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_terminal_is_not_overrun(small_lake: Path, width: int) -> None:
    """All groups and all histograms are there, no line is too long."""
    console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    print_stats([_stats(small_lake, "main"), _stats(small_lake, "pairs")], console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(len(line) for line in shown.splitlines()) <= width
    for said in ("caption", "reading", "entropy (nats)", "tail mass (probability)", "k (stored entries)", "█"):
        assert said in shown


def test_the_page_stands_alone(small_lake: Path, tmp_path: Path) -> None:
    """Balanced HTML with inline SVG; no script, nothing that a browser would fetch; names are escaped."""
    path = tmp_path / "stats.html"
    result = CliRunner().invoke(cli, ["stats", str(small_lake), "--html", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    page = path.read_text(encoding="utf-8")
    _Balanced().feed(page)
    assert "<script" not in page
    assert not re.search(r"(src|href|url)\s*[=(]", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 4
    for name in ("caption", "reading", "main", "pairs"):
        assert name in page
    assert "<lake>" not in html_page("<lake>", [])


def test_the_picture_is_a_png(small_lake: Path, tmp_path: Path) -> None:
    """Wide enough to read, and not empty."""
    path = tmp_path / "stats.png"
    result = CliRunner().invoke(cli, ["stats", str(small_lake), "--png", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 16


def test_without_matplotlib_the_message_names_the_extra(
    small_lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base install draws pages, not pictures."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(cli, ["stats", str(small_lake), "--png", str(tmp_path / "a.png")])
    assert isinstance(result.exception, ConfigError)
    assert 'pip install "logitlake[plot]"' in str(result.exception)


def test_an_unknown_cache_is_answered_with_the_caches(small_lake: Path) -> None:
    """A typo costs one line."""
    with open_catalog(small_lake) as catalog, pytest.raises(LakeError, match="caches in this lake: main, pairs"):
        lake_stats(catalog, "mian")


def _stats(lake: Path, cache: str, by: By = "task") -> CacheStats:
    with open_catalog(lake) as catalog:
        (stats,) = lake_stats(catalog, cache, by)
    return stats


class _Balanced(HTMLParser):
    """Fails at an element that is closed and not open."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
