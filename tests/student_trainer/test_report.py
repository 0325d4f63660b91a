"""The report of a run: the summary's shape, the page's figures, its safety, and charts of little or odd data."""

import html
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from logitlake_schemas import CaptureSpec
from logitlake_shared.config import load_config
from logitlake_shared.errors import ConfigError, DataError, FingerprintMismatchError
from logitlake_shared.lake import Lake
from logitlake_student.config import ReportConfig
from logitlake_student.report import write_report
from logitlake_student.report_charts import Band, Series, bar_chart, heat_map, legend, line_chart, nice_ticks
from logitlake_student.report_page import mark_hallucinated

STAGES = ("init", "d2d", "d2s", "preference")
FIGURES = {
    "teacher": (0.955, 0.97, 0.11, 0.0001),
    "init": (0.212, 0.55, 0.93, 0.88),
    "d2d": (0.871, 0.91, 0.24, 0.041),
    "d2s": (0.893, 0.925, 0.21, 0.024),
    "preference": (0.889, 0.93, 0.13, 0.031),
}
KEYS = ("vqa_accuracy", "hallucination_f1", "caption_hallucination_rate", "kl_to_teacher")
PATTERN = r"\b(red|blue) (six|two)\b"
HOSTILE = '"><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>'


class _Page(HTMLParser):
    """Tags with attributes, balance of elements, and the cells of the first table."""

    VOID = frozenset({"meta", "img", "rect", "line", "circle", "polyline", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.tables = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.tables += tag == "table"
        if tag not in self.VOID:
            self.open.append(tag)
        if self.tables == 1 and tag == "tr":
            self.rows.append([])
        if self.tables == 1 and tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.tables == 1 and self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture
def make_run(
    tmp_path: Path, capture_spec: CaptureSpec, make_unit: Callable[..., Any], png: Callable[[int], bytes]
) -> Callable[..., ReportConfig]:
    """Writes a lake of four samples, finished stages and their evaluations; returns the report's configuration."""

    def make(stages: tuple[str, ...] = STAGES, **changes: Any) -> ReportConfig:
        cache = Lake.create(tmp_path / "lake").create_cache("main", capture_spec)
        for number in range(2):
            cache.publish_unit(make_unit(number))
        cache.snapshot()
        (tmp_path / "scene.png").write_bytes(png(3))
        for stage in stages:
            _write_stage(tmp_path / "run" / stage, stage, cache.fingerprint)
        for name in ("teacher", *stages):
            document = _evaluation(name, cache.fingerprint, tmp_path) | changes.get(name, {})
            _write(tmp_path / "eval" / f"{name}.json", document)
        return ReportConfig(
            run=tmp_path / "run",
            evaluation=tmp_path / "eval",
            lake=str(tmp_path / "lake"),
            cache="main",
            html=tmp_path / "out" / "report.html",
            summary=tmp_path / "out" / "summary.json",
            title=changes.get("title", "A run"),
        )

    return make


def _write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def _write_stage(folder: Path, stage: str, fingerprint: str) -> None:
    figures = {"steps": 20, "seconds": 1.5, "params_total": 1000, "params_active": 1000, "params_trainable": 10}
    if stage in ("d2s", "preference"):
        figures |= {"params_total": 3000, "params_active": 2000}
    _write(folder / "done.json", {"identity": {"lake": {"samples": fingerprint, "snapshot": 1}}, "figures": figures})
    lines = [{"step": step, "forward_kl": 1 / step, "ce": 0.5, "loss": 1.0} for step in (10, 20)]
    if stage in ("d2s", "preference"):
        experts = [{"load": [0.25, 0.75], "entropy": 0.5, "dead": 0}]
        lines = [line | {"balance": 1.1, "experts": experts, "margin": 0.1, "preferred": 0.6} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if stage != "preference":
        _write(folder / "cached-mass.json", {"samples_by_mass": [0] * 18 + [3, 1]})


def _evaluation(name: str, fingerprint: str, root: Path) -> dict[str, Any]:
    return {
        "name": name,
        "identity": {
            "lake": {"fingerprint": fingerprint},
            "settings": {"image_root": str(root), "mention_pattern": PATTERN},
        },
        **dict(zip(KEYS, FIGURES[name], strict=True)),
        "tasks": {"reading": 0.5, "caption": 0.25},
        "existence": {"accuracy": 0.8, "precision": 0.7, "recall": None, "yes_ratio": 0.5},
        "captions": {"hallucination_rate": 0.1},
        "experts_by_task": {"caption": [[0.9, 0.1]], "reading": [[0.3, 0.7]]} if name in ("d2s", "preference") else {},
        "examples": [
            {
                "id": "1",
                "image": "scene.png",
                "question": "What?",
                "gold": "a red six",
                "answer": "a red six and a blue two",
                "objects": ["red six"],
            }
        ],
    }


def test_the_page_shows_which_experts_serve_which_task(make_run: Callable[..., ReportConfig]) -> None:
    """A row a task, a column an expert, the share in each cell's tooltip."""
    config = make_run()
    write_report(config)
    page = config.html.read_text()
    assert "Experts by task, sparse layer 1" in page
    assert "caption, expert 1: 90" in page
    assert "reading, expert 2: 70" in page


def test_the_page_shows_how_much_of_the_teacher_the_lake_holds(make_run: Callable[..., ReportConfig]) -> None:
    """C8: from the first part that holds a sample to the last."""
    config = make_run()
    write_report(config)
    page = config.html.read_text(encoding="utf-8")
    assert "What the lake holds of the teacher" in page
    assert page.index("90–95") < page.index("95–100")
    assert "85–90" not in page


def test_summary_has_exactly_the_promised_shape(make_run: Callable[..., ReportConfig]) -> None:
    """Programs read it: these keys, this order, the evaluations' own numbers, the lake's own counts."""
    config = make_run()
    write_report(config)
    summary = json.loads(config.summary.read_text())
    assert list(summary) == ["teacher", "stages", "lake", "student", "seconds"]
    assert summary["teacher"] == dict(zip(KEYS, FIGURES["teacher"], strict=True))
    assert list(summary["stages"]) == list(STAGES)
    for stage in STAGES:
        assert summary["stages"][stage] == dict(zip(KEYS, FIGURES[stage], strict=True))
    # Two units of two samples with four response tokens each; a unit is a file of rows and one of images.
    assert summary["lake"].keys() == {"samples", "tokens", "bytes_per_token", "shards"}
    assert (summary["lake"]["samples"], summary["lake"]["tokens"], summary["lake"]["shards"]) == (4, 16, 4)
    rows = sum(path.stat().st_size for path in Path(config.lake).rglob("*.parquet") if "images" not in path.parts)
    assert summary["lake"]["bytes_per_token"] == rows / 16
    assert summary["student"] == {"params_total": 3000, "params_active": 2000}
    assert summary["seconds"] == dict.fromkeys(STAGES, 1.5)


def test_stages_that_are_not_trained_are_left_out(make_run: Callable[..., ReportConfig]) -> None:
    """A run of two stages gives a summary and a page of two stages."""
    config = make_run(stages=("init", "d2d"))
    write_report(config)
    assert list(json.loads(config.summary.read_text())["stages"]) == ["init", "d2d"]
    assert [row[0] for row in _Page(config.html.read_text()).rows[1:]] == ["teacher", "init", "d2d"]


def test_table_of_page_and_terminal_equal_the_evaluations(
    make_run: Callable[..., ReportConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers in both, rounded as they are written."""
    config = make_run()
    write_report(config)
    said = capsys.readouterr().out
    rows = _Page(config.html.read_text(encoding="utf-8")).rows
    assert "↑" in rows[0][1]
    assert "↓" in rows[0][3]
    for row, (name, (accuracy, f1, rate, kl)) in zip(rows[1:], FIGURES.items(), strict=True):
        expected = [name, f"{100 * accuracy:.1f}\u00a0%", f"{f1:.3f}", f"{100 * rate:.1f}\u00a0%", f"{kl:.4f}"]
        assert row == expected
        assert re.search(r"\s+".join(map(re.escape, expected)), said)
    assert "4 samples, 16 tokens" in said
    assert "3,000 parameters, 2,000 active" in said


def test_unknown_figures_are_unknown_and_not_zero(make_run: Callable[..., ReportConfig]) -> None:
    """A share of nothing is null in the summary and a dash in the table."""
    config = make_run(d2d={"hallucination_f1": None})
    write_report(config)
    assert json.loads(config.summary.read_text())["stages"]["d2d"]["hallucination_f1"] is None
    assert _Page(config.html.read_text()).rows[3][2] == "–"


def test_page_asks_nobody_and_runs_nothing(make_run: Callable[..., ReportConfig]) -> None:
    """Well formed, no script, and every resource is inside."""
    config = make_run()
    write_report(config)
    text = config.html.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "use"} & {tag for tag, _ in page.tags}
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert pictures
    assert all(str(source).startswith("data:image/png;base64,") for source in pictures)
    assert not re.search(r"https?://", text)
    assert "@import" not in text
    assert "url(" not in text


def test_hostile_names_and_texts_stay_text(
    make_run: Callable[..., ReportConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Titles, tasks, answers and image names come from files that others wrote."""
    example = {"id": HOSTILE, "image": HOSTILE, "question": HOSTILE, "gold": HOSTILE, "answer": HOSTILE}
    change = {"tasks": {HOSTILE: 0.5}, "examples": [example | {"objects": [HOSTILE]}]}
    config = make_run(title=f"[red]{HOSTILE}", teacher=change, d2d=change)
    _write(config.run.parent / "seconds.json", {HOSTILE: 1.0})
    write_report(config.model_copy(update={"seconds": config.run.parent / "seconds.json"}))
    text = config.html.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert not any(tag in ("script", "img") or "onerror" in attributes for tag, attributes in page.tags)
    assert html.escape(HOSTILE, quote=True).replace("&quot;", "&#34;") in text
    # Square brackets are markup to the terminal's library.
    assert "[red]" in capsys.readouterr().out


def test_only_mentions_of_what_is_not_there_are_marked() -> None:
    """What is around a mention is escaped, case does not matter, and the text is the same without the marks."""
    marked = mark_hallucinated("<b> Red six, blue two & blue", ["red six"], re.compile(PATTERN, re.IGNORECASE))
    assert marked == "&lt;b&gt; Red six, <mark>blue two</mark> &amp; blue"


def test_a_trained_stage_without_evaluation_names_the_command(make_run: Callable[..., ReportConfig]) -> None:
    """And nothing is written."""
    config = make_run()
    (config.evaluation / "d2s.json").unlink()
    with pytest.raises(ConfigError, match=r"stage d2s has not been examined; run `logitlake-student eval .*'d2s'"):
        write_report(config)
    assert not config.html.exists()
    assert not config.summary.exists()


def test_an_evaluation_on_another_lake_is_refused(make_run: Callable[..., ReportConfig]) -> None:
    """Its KL is about other tokens."""
    config = make_run()
    path = config.evaluation / "d2d.json"
    document = json.loads(path.read_text())
    document["identity"]["lake"]["fingerprint"] = "f" * 64
    _write(path, document)
    with pytest.raises(FingerprintMismatchError, match=r"d2d\.json: measured against .*ffff"):
        write_report(config)


def test_a_run_on_another_lake_is_refused(make_run: Callable[..., ReportConfig]) -> None:
    """The lake's card would tell of tokens that the student never saw."""
    config = make_run()
    _write_stage(config.run / "d2d", "d2d", "e" * 64)
    with pytest.raises(FingerprintMismatchError, match=r"d2d: trained on .*eeee"):
        write_report(config)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda text: text[:40], "document: Invalid JSON"),
        (lambda text: text.replace('"vqa_accuracy"', '"accuracy"'), "vqa_accuracy: Field required"),
        (lambda text: text.replace("0.871", "NaN"), "vqa_accuracy: Input should be a finite number"),
    ],
)
def test_a_broken_evaluation_is_refused(
    make_run: Callable[..., ReportConfig], damage: Callable[[str], str], complaint: str
) -> None:
    """Not JSON, not complete, not finite: the file, the fault and the command are named."""
    config = make_run()
    path = config.evaluation / "d2d.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=rf"d2d\.json: {complaint}.*logitlake-student eval"):
        write_report(config)


def test_an_empty_run_is_refused(make_run: Callable[..., ReportConfig]) -> None:
    """There is nothing to tell of."""
    config = make_run(stages=())
    with pytest.raises(ConfigError, match="no finished stage"):
        write_report(config)


def test_a_missing_file_of_seconds_is_refused(make_run: Callable[..., ReportConfig]) -> None:
    """It was asked for."""
    config = make_run().model_copy(update={"seconds": Path("nowhere.json")})
    with pytest.raises(ConfigError, match=r"nowhere\.json: no such file"):
        write_report(config)


def test_a_picture_that_is_gone_is_said_to_be(make_run: Callable[..., ReportConfig]) -> None:
    """The page shows the reason in its place."""
    config = make_run()
    (config.run.parent / "scene.png").unlink()
    write_report(config)
    assert "scene.png cannot be read" in config.html.read_text()


def _line(points: list[tuple[float, float]], **settings: Any) -> str:
    return str(line_chart("t", [Series("a", points)], x_label="x", y_label="y", **settings))


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "values",
    [[], [0.5], [0.5, 0.5], [math.nan], [math.nan, 1.0], [1.0, math.nan, 2.0], [math.inf, 1e-300], [0.0, -1.0]],
)
def test_line_charts_of_little_or_odd_data(values: list[float], log_y: bool) -> None:
    """Always one well-formed picture without a coordinate that is no number; as many dots as drawable values."""
    chart = _line([(float(x), y) for x, y in enumerate(values)], log_y=log_y)
    assert _Page(chart).open == []
    assert not re.search(r'"[^"]*(nan|inf)[^"]*"', chart)
    drawable = [value for value in values if math.isfinite(value) and (value > 0 or not log_y)]
    assert chart.count("<circle") == len(drawable)
    assert ("no data" in chart) == (not drawable)


def test_a_gap_breaks_the_line() -> None:
    """NaN between two stretches: two lines, none across."""
    points = [(0.0, 1.0), (1.0, 2.0), (math.nan, math.nan), (2.0, 1.0), (3.0, 2.0)]
    assert _line(points).count("<polyline") == 2


def test_line_charts_put_values_where_the_axis_says() -> None:
    """By hand: 0…1 spans y = 196…30 and steps 0…10 span x = 46…390, so (5, 0.5) lies at (218, 113)."""
    chart = _line([(5.0, 0.5)], y_range=(0.0, 1.0), bands=[Band("s", 0.0, 10.0)])
    assert '<circle class="dot c0" cx="218" cy="113"' in chart


def test_bars_and_fields_of_little_or_odd_data() -> None:
    """Nothing, zeros and NaN give a picture too."""
    for chart in (
        bar_chart("t", [], label="l"),
        bar_chart("t", [("a", 0.0), ("b", math.nan)], label="l"),
        bar_chart("t", [("a", math.nan)], label="l"),
        heat_map("t", [], [], []),
        heat_map("t", ["r"], ["a", "b"], [[0.0, math.nan]]),
    ):
        assert _Page(str(chart)).open == []
        assert not re.search(r'"[^"]*nan[^"]*"', str(chart))
    assert "no data" in bar_chart("t", [], label="l")
    assert "no data" in heat_map("t", [], [], [])


def test_bars_are_as_long_as_their_values() -> None:
    """Twice the value, twice the length."""
    chart = str(bar_chart("t", [("a", 1.0), ("b", 2.0)], label="l"))
    short, long = (float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', chart))
    assert long == pytest.approx(2 * short, abs=0.11)  # coordinates are written to a tenth


def test_names_in_charts_are_escaped() -> None:
    """Experts, tasks and steps are named by files."""
    charts = (
        line_chart(
            HOSTILE,
            [Series(HOSTILE, [(0.0, 1.0)])],
            x_label=HOSTILE,
            y_label=HOSTILE,
            x_names=[HOSTILE],
            bands=[Band(HOSTILE, 0, 1e9)],
        ),
        bar_chart(HOSTILE, [(HOSTILE, 1.0)], label=HOSTILE),
        heat_map(HOSTILE, [HOSTILE], [HOSTILE], [[1.0]]),
        legend([Series(HOSTILE, [])]),
    )
    for chart in charts:
        assert not {"script", "img"} & {tag for tag, _ in _Page(str(chart)).tags}
        assert "&lt;script&gt;" in chart


def test_ticks_are_round_and_cover() -> None:
    """Inside the range by default, around it on request."""
    assert nice_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(0.03, 0.31) == [0.1, 0.2, 0.3]
    assert nice_ticks(0.03, 0.31, outside=True) == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_the_shipped_configuration_loads() -> None:
    """examples/digit_scenes/configs/report.toml, as the demo runs it."""
    root = Path(__file__).parents[2]
    config = load_config(ReportConfig, root / "examples/digit_scenes/configs/report.toml", [])
    assert config.summary == Path("runs/demo/summary.json")
