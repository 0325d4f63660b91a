"""The student's pages in real Chromium: runs that go on, that are empty, that hold what is no number, or very much."""

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from playwright.sync_api import expect
from tests.browser.pages import HOSTILE, SCREENS, NewPage, is_whole
from tests.student_trainer.api.conftest import StudentApi, student_api, training
from tests.student_trainer.conftest import (
    capture_pairs,
    capture_samples,
    student_checkpoint,
    student_data,
    student_lake,
    student_records,
    student_world,
)

__all__ = [
    "capture_pairs",
    "capture_samples",
    "student_api",
    "student_checkpoint",
    "student_data",
    "student_lake",
    "student_records",
    "student_world",
    "training",
]

PATIENCE_MS = 120_000
STAGES = ({"type": "d2d", "steps": 60}, {"type": "d2s", "steps": 4})


def made_up(runs: Path, name: str, lines: list[dict[str, Any]], stage: str = "d2d") -> None:
    """A run whose metrics are these."""
    folder = runs / name / stage
    folder.mkdir(parents=True)
    (folder / "started.json").write_text(json.dumps({"identity": {"stage": {"steps": 10**6}}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pages_and_charts_style_no_class_of_the_other_s() -> None:
    """Both sheets are on a run's page: a rule for one's bar would stretch the other's."""
    sheets = (files("logitlake_shared.web") / "static/style.css", files("logitlake_student") / "charts.css")
    page, chart = (set(re.findall(r"\.([a-z][\w-]*)(?=[^{}]*\{)", sheet.read_text())) for sheet in sheets)
    assert page, chart
    assert not page & chart


@SCREENS
def test_a_run_is_followed_from_its_submission_to_its_experts(
    student_api: StudentApi,
    new_page: NewPage,
    training: Callable[..., dict[str, Any]],
    width: int,
    scheme: str,
) -> None:
    """From the job to its run; curves while it trains, the experts' field at the end; axe finds nothing."""
    client = student_api()
    job = client.post("/v1/jobs", json=training("demo", *STAGES)).json()["id"]
    page = new_page(width, color_scheme=scheme)
    page.goto(f"{client.base_url}/jobs/{job}")
    expect(page.locator("#live .state")).to_have_text("succeeded", timeout=PATIENCE_MS)
    is_whole(page)
    page.get_by_role("link", name="demo", exact=True).click()
    expect(page.get_by_role("img", name="Distillation losses")).to_be_visible()
    expect(page.get_by_role("img", name="Load at the end")).to_be_visible()
    is_whole(page)
    page.get_by_role("link", name="Runs", exact=True).first.click()
    expect(page.get_by_role("link", name="demo")).to_be_visible()
    is_whole(page)


def test_a_page_holds_nothing_one_point_no_number_a_hundred_thousand_points_and_two_thousand_experts(
    student_api: StudentApi, new_page: NewPage, tmp_path: Path
) -> None:
    """D6: each renders, whole, at 320 px."""
    client = student_api()
    runs = tmp_path / "runs"
    load = [1 / 2000] * 2000
    made_up(runs, "nothing", [])
    made_up(runs, "one", [{"step": 1, "loss": 1.0, "forward_kl": 0.5}])
    made_up(runs, "nan", [{"step": step, "loss": float("nan"), "forward_kl": float("inf")} for step in range(1, 5)])
    made_up(runs, "long", [{"step": step, "loss": 1.0, "forward_kl": 1 / step} for step in range(1, 100_001)])
    made_up(runs, "experts", [{"step": 1, "loss": 1.0, "experts": [{"load": load, "entropy": 1.0}]}], "d2s")
    page = new_page(320)
    page.goto(str(client.base_url))
    is_whole(page)
    for name in ("nothing", "one", "nan", "long", "experts"):
        page.goto(f"{client.base_url}/runs/{name}")
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
        is_whole(page)


def test_hostile_metrics_stay_text(student_api: StudentApi, new_page: NewPage, tmp_path: Path) -> None:
    """Caches' names, losses that are texts, runs that are not there."""
    client = student_api()
    made_up(tmp_path / "runs", "demo", [{"step": 1, "loss": HOSTILE[0]}])
    (tmp_path / "runs" / "demo" / "snapshots.json").write_text(json.dumps(dict.fromkeys(HOSTILE, 1)))
    page = new_page(320)
    for path in ("/", "/runs/demo", f"/runs/{HOSTILE[1]}"):
        page.goto(f"{client.base_url}{path}")
        is_whole(page)
