"""`make demo`, whole: both services' command lines on the digit scenes, then once more when all is done."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from examples.digit_scenes.demo import steps

METRICS = {"vqa_accuracy", "hallucination_f1", "caption_hallucination_rate", "kl_to_teacher"}
STAGES = ["init", "d2d", "d2s", "preference"]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished demo."""
    out = tmp_path_factory.mktemp("demo")
    _run(out)
    return out


def _run(out: Path) -> str:
    command = [sys.executable, "-m", "examples.digit_scenes.demo", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_summary_is_complete(demo: Path) -> None:
    """Every figure of the table is there and finite."""
    summary = json.loads((demo / "summary.json").read_text())
    assert list(summary) == ["teacher", "stages", "lake", "student", "seconds"]
    assert list(summary["stages"]) == STAGES
    for model in (summary["teacher"], *summary["stages"].values()):
        assert set(model) == METRICS
        assert all(math.isfinite(value) for value in model.values())
    assert set(summary["lake"]) == {"samples", "tokens", "bytes_per_token", "shards"}
    assert summary["student"]["params_active"] < summary["student"]["params_total"]
    assert {step.name for step in steps()} - set(summary["seconds"]) == {"report"}
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 5
    assert "https://" not in page.replace("https://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_the_recipe_goes_where_the_paper_says(demo: Path) -> None:
    """Teacher above D2S, D2S not below D2D, KL falling, preference distillation curing hallucination."""
    summary = json.loads((demo / "summary.json").read_text())
    teacher, stages = summary["teacher"], summary["stages"]
    assert teacher["vqa_accuracy"] > stages["d2s"]["vqa_accuracy"] >= stages["d2d"]["vqa_accuracy"]
    assert stages["init"]["kl_to_teacher"] > stages["d2d"]["kl_to_teacher"] > stages["d2s"]["kl_to_teacher"]
    assert stages["preference"]["caption_hallucination_rate"] < stages["d2s"]["caption_hallucination_rate"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_run_again_it_says_that_all_is_done(demo: Path) -> None:
    """The second run changes no file of the lake or the student, and every command says so."""
    files = [path for path in demo.rglob("*") if path.is_file() and path.name not in ("report.html", "summary.json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    said = _run(demo)
    for sentence in ("everything is captured already", "trained already", "exported already"):
        assert sentence in said
    assert {path: path.stat().st_mtime_ns for path in files if path.name != "seconds.json"} == {
        path: time for path, time in before.items() if path.name != "seconds.json"
    }
