"""Whatever is written about the services' figures is true: names, kinds, labels, values, and where runbooks lead."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.served import served

from logitlake_shared.jobs.records import JobState
from logitlake_shared.lake import Lake
from logitlake_shared.web.job_figures import OUTCOMES
from logitlake_student.api.app import student_app
from logitlake_student.config.serve import StudentServeConfig
from logitlake_teacher.api.app import teacher_app
from logitlake_teacher.config.serve import ServeConfig

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "operations.md"
PROMETHEUS = REPOSITORY / "docker" / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in ALERTS for rule in group["rules"]]
DASHBOARD = json.loads((REPOSITORY / "docker" / "grafana" / "logitlake.json").read_text())
EXPRESSIONS = [
    *(rule["expr"] for rule in RULES),
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
]
SERIES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
"""what a figure of this kind is asked for by, behind its name on the page"""
VALUES = {
    "state": {*JobState, "ready", "busy"},
    "outcome": set(OUTCOMES),
    "code": {code for codes in OUTCOMES.values() for code in codes},
    "result": {"hit", "miss"},
    "kind": {"prompt", "image", "response"},
    "from": {*JobState, "none"},
    "to": set(JobState),
}
"""what labels may be, of those whose values are ours"""

Figures = dict[str, tuple[str, frozenset[str]]]
"""kind and labels of figures, by the names that the page has"""


def figures_at(url: str) -> Figures:
    """What a service exposes, after a question and a request that is not answered."""
    httpx.get(f"{url}/nothing")
    httpx.post(f"{url}/v1/sql", json={"sql": "DROP TABLE x"}, timeout=60)
    found: Figures = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        if not family.name.endswith("_created"):
            labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
            found[f"{family.name}_total" if family.type == "counter" else family.name] = (family.type, labels)
    return found


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Figures]]:
    """What each service exposes; both take jobs."""
    folder = tmp_path_factory.mktemp("services")
    Lake.create(folder / "lake")
    (folder / "runs").mkdir()
    jobs = [{"folder": folder / name} for name in ("teacher-jobs", "student-jobs")]
    teacher = ServeConfig.model_validate({"lake": str(folder / "lake"), "sql": {"num_warm": 0}, "jobs": jobs[0]})
    student = StudentServeConfig.model_validate({"runs": folder / "runs", "jobs": jobs[1]})
    students = student_app(student)
    students.state.jobs.metrics.measured({}, {"expert_load_max_ratio/0": [1.0]})  # there once a run told it
    with served(teacher_app(teacher)) as teacher_url, served(students) as student_url:
        yield {"teacher": figures_at(teacher_url), "student": figures_at(student_url)}


def on_the_page() -> dict[str, tuple[str, str, frozenset[str]]]:
    """Kind, service and labels of each figure in the page's table."""
    rows = re.findall(r"^\| `(logitlake_\w+)` \| (\w+) \| (\w+) \|(.*?)\| .+ \|$", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, service, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, service, labels in rows}


def headings(path: Path) -> list[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]


def test_the_table_is_what_is_exposed(exposed: dict[str, Figures]) -> None:
    """Every figure, with its kind, its service and its labels; and no other."""
    teacher, student = exposed["teacher"], exposed["student"]
    found = {
        name: (*of, "both" if name in teacher and name in student else "teacher" if name in teacher else "student")
        for name, of in (teacher | student).items()
    }
    assert {name: (kind, labels, service) for name, (kind, service, labels) in on_the_page().items()} == found


def test_what_is_asked_for_is_exposed(exposed: dict[str, Figures]) -> None:
    """By the dashboard, the alerts and the page's own text."""
    names = {
        f"{name}{behind}"
        for figures in exposed.values()
        for name, (kind, _) in figures.items()
        for behind in SERIES[kind]
    }
    asked = set(re.findall(r"\blogitlake_\w+", "\n".join(EXPRESSIONS)))
    assert len(asked) > 10
    assert asked <= names
    assert set(re.findall(r"\blogitlake_\w+", PAGE.read_text())) <= names | on_the_page().keys()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_labels_that_are_asked_for_are_there(exposed: dict[str, Figures], expression: str) -> None:
    """And their values can be; those of a scrape are Prometheus' own."""
    own = {label for figures in exposed.values() for _, labels in figures.values() for label in labels}
    by = {label.strip() for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in labels.split(",")}
    matched = re.findall(r"(\w+)(?:=~|!~|!=|=)\"([^\"]*)\"", expression)
    assert by | {label for label, _ in matched} <= own | {"le", "job", "instance"}
    for label, values in matched:
        assert set(values.split("|")) <= VALUES.get(label, set(values.split("|")))


def test_every_alert_leads_to_its_runbook_and_every_runbook_is_led_to() -> None:
    """Eight of each."""
    led_to = []
    for rule in RULES:
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in headings(REPOSITORY / path), rule["alert"]
        led_to.append(anchor)
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")
    assert len({rule["alert"] for rule in RULES}) == len(led_to) == 8
    runbooks = PAGE.read_text().partition("## When an alert comes")[2]
    assert len(led_to) == len(set(led_to)) == len(re.findall(r"^### ", runbooks, re.MULTILINE))


def test_prometheus_reads_the_services_where_they_are_served() -> None:
    """The addresses of the shipped configurations, the jobs that the first alert asks for, the rules beside it."""
    document = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert [(PROMETHEUS / name).is_file() for name in document["rule_files"]] == [True]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in document["scrape_configs"]}
    (down,) = (rule["expr"] for rule in RULES if rule["alert"] == "LogitLakeServiceDown")
    (jobs,) = re.findall(r'up\{job=~"(.*)"\}', down)
    for service, root in (("teacher", "teacher_service"), ("student", "student_trainer")):
        config = tomllib.loads((REPOSITORY / root / f"logitlake_{service}" / "configs" / "serve.toml").read_text())
        assert targets.pop(f"logitlake-{service}") == [f"localhost:{config['service']['port']}"]
        assert re.fullmatch(jobs, f"logitlake-{service}")
    assert not targets


def test_panels_stand_beside_each_other() -> None:
    """Each with an id and a place of its own, from the source that whoever looks chooses."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    (source,) = DASHBOARD["templating"]["list"]
    assert {panel["datasource"]["uid"] for panel in panels} == {f"${{{source['name']}}}"}
