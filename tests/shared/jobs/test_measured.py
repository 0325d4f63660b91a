"""What attempts tell is counted once, whoever is killed between what lines; nonsense is not counted at all."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json
from tests.shared.jobs.book import FIGURES, values
from tests.shared.jobs.conftest import Workshop

from logitlake_shared.jobs.measured import BOUNDS_S, TIMES_SIZE, Meter, sound
from logitlake_shared.jobs.orders import cancel, pause, resume
from logitlake_shared.jobs.progress import MARK, parse_lines
from logitlake_shared.jobs.records import Job, JobState
from logitlake_shared.jobs.states import ACTIVE, ENDED, NEXT
from logitlake_shared.web.job_metrics import JobMetrics

S = JobState
SERVICE = (
    "import sys, time; from pathlib import Path\n"
    "from tests.shared.jobs.book import Book; from tests.shared.jobs.conftest import Workshop\n"
    "workshop = Workshop(Path(sys.argv[1]), look_s=0.01)\n"
    "workshop.store.observer = Book(workshop.store, Path(sys.argv[1], sys.argv[2]))\n"
    "workshop.supervisor.__enter__(); time.sleep(600)"
)
COUNTS = {"total": 1, "committed": 1, "failed": 0, "quarantined": 0}
NONSENSE = [
    *(json.dumps({"measured": {"work_items": value}}) for value in (7, None, "7", [], [-1], ["7"], [True], [[1]], {})),
    *(f'{{"measured": {{"work_items": [{number}]}}}}' for number in ("NaN", "Infinity", "1e400", "9" * 400)),
    *(json.dumps({"measured": value}) for value in (None, 7, [], {"nobody_knows": [1]})),
    *(json.dumps({"counts": value}) for value in (None, 7, [], {}, {"total": "4", "committed": 0})),
    *(
        json.dumps({"counts": COUNTS | {"errors": value}})
        for value in (None, 7, ["x"], {"x": -1}, {"x": "7"}, {"x": {}})
    ),
    '{"counts": {"total": -1, "committed": -1, "failed": 0, "quarantined": 0}}',
    f'{{"counts": {{"total": 1, "committed": {"9" * 400}, "failed": 0, "quarantined": 0}}}}',
    *(json.dumps({"phase": value}) for value in (None, [], "flying", "succeeded")),
    *(json.dumps({name: 7}) for name in ("figures", "result", "fault", "nothing")),
    '{"fault": {"error": 7, "message": null}}',
    *("", "7", "[]", "null", "{", "[" * 100_000, '{"measured": {"work_items": [5', "\x00"),
]
"""what may stand behind the mark in a log"""


def watched(workshop: Workshop) -> JobMetrics:
    """The figures of the workshop's service, from now on."""
    workshop.store.observer = metrics = JobMetrics(workshop.store, FIGURES)
    return metrics


def outcomes(job: Job) -> dict[str, float]:
    """The counts of a job, as Prometheus names them."""
    found = {"failed": job.counts.errors, "quarantined": {"teacher_crashed": job.counts.quarantined}}
    found |= {name: {"": getattr(job.counts, name)} for name in ("succeeded", "skipped_cached")}
    return {
        f"logitlake_samples_total code={code} outcome={outcome}": count
        for outcome, codes in found.items()
        for code, count in codes.items()
    }


def test_what_is_timed_adds_up() -> None:
    """In the first interval that it is not above, the last of which has no end."""
    meter = Meter()
    seconds = (0.0, 0.005, 0.006, 100.0, 101.0)
    for one in seconds:
        meter.time("t", one)
    total, *counts = meter.told()["t"]
    assert total == pytest.approx(sum(seconds))
    assert counts == [2, 1, *[0] * (len(BOUNDS_S) - 3), 1, 1]
    assert sound(json.loads(json.dumps(meter.told()))) == meter.told()
    assert len(meter.told()["t"]) == TIMES_SIZE


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=9))
def test_only_amounts_are_sound(value: Any) -> None:
    """Finite numbers, none of them below nothing, of a form that there is."""
    for numbers in sound({"a": value, "b": [value], "c": [value] * TIMES_SIZE}).values():
        assert len(numbers) in (1, TIMES_SIZE)
        assert all(type(number) in (int, float) and 0 <= number < float("inf") for number in numbers)


@given(st.lists(st.sampled_from(NONSENSE) | st.text(), max_size=5))
def test_no_line_of_a_log_keeps_the_others_from_being_heard(lines: list[str]) -> None:
    """Whatever stands behind the mark."""
    good = json.dumps({"phase": "running", "measured": {"a": [1]}})
    log = "".join(f"{MARK.decode()}{line}\n" for line in [*lines, good]).encode()
    said, num_bytes = parse_lines(log)
    assert said[-1] == {"phase": "running", "measured": {"a": [1]}}
    assert num_bytes == len(log)


@pytest.mark.parametrize("line", NONSENSE, ids=range(len(NONSENSE)))
def test_what_cannot_be_meant_is_not_heard(line: str) -> None:
    """Of each line by itself: no number that is none, no phase or count that there is not."""
    for said in parse_lines(f"{MARK.decode()}{line}\n".encode())[0]:
        assert said.get("measured", {}) in ({}, {"nobody_knows": [1]})
        assert said.keys() <= {"measured"}


@pytest.mark.parametrize("fact", ["figures", "result", "fault"])
@pytest.mark.parametrize(
    "value", ["NaN", "-Infinity", "1e400", r'"\ud800"', r'{"\ud800": 1}', '{"a":' * 300 + "1" + "}" * 300]
)
def test_what_is_heard_can_be_told_again(fact: str, value: str) -> None:
    """By a service, in strict JSON, in UTF-8, of a depth that it can write; the rest of the line is heard as it is."""
    line = f'{{"{fact}": {{"error": "E", "message": "m", "what": {value}}}, "phase": "running"}}'
    (said,), _ = parse_lines(MARK + line.encode() + b"\n")
    assert said["phase"] == "running"
    assert (said[fact]["error"], said[fact]["message"]) == ("E", "m")
    told = to_json(said[fact], inf_nan_mode="constants")
    assert json.loads(told, parse_constant=lambda name: pytest.fail(name)) == said[fact]


def test_nonsense_in_a_log_changes_nothing(workshop: Workshop) -> None:
    """The job succeeds, its counts and figures are those of its work."""
    metrics = watched(workshop)
    lines = "\n".join(f"{MARK.decode()}{line}" for line in NONSENSE)
    job = workshop.until_state(workshop.submit(items=3, bad=1, writes=lines.replace("\x00", "")), *ENDED)
    assert job.state is S.SUCCEEDED, workshop.log(job)
    found = values(metrics)
    assert outcomes(job).items() <= found.items()
    assert (job.counts.succeeded, job.counts.failed, job.counts.errors) == (2, 1, {"image_missing": 1})
    assert found["logitlake_work_items_total"] == 3
    assert found["logitlake_work_seconds_sum"] == pytest.approx(0.9)
    assert found["logitlake_work_seconds_bucket le=0.25"] == 0
    assert found["logitlake_work_seconds_bucket le=0.5"] == found["logitlake_work_seconds_count"] == 3
    assert (found["logitlake_work_place parity=0"], found["logitlake_work_place parity=1"]) == (2, 1)


def test_what_is_counted_is_what_jobs_counted_over_all_their_attempts(workshop: Workshop) -> None:
    """What was done before is skipped, once; a second attempt measures its own part."""
    metrics = watched(workshop)
    (workshop.folder / "done").write_text("0\n1\n")
    job = workshop.until_state(workshop.submit(items=6, bad=3, dies_at=4), *ENDED)
    assert len(job.attempts) == 2
    found = values(metrics)
    assert outcomes(job).items() <= found.items()
    assert (job.counts.skipped_cached, job.counts.errors) == (2, {"image_missing": 1})
    assert found["logitlake_cache_lookups_total result=hit"] == 2
    assert found["logitlake_cache_lookups_total result=miss"] == 4
    assert found["logitlake_work_items_total"] == found["logitlake_work_seconds_count"] == 4


def test_what_a_line_leaves_out_is_not_told_anew_by_the_next(workshop: Workshop) -> None:
    """Nor what one attempt told by another, which begins at nothing; nor what a sum had been before it fell."""
    metrics = watched(workshop)
    job = workshop.store.begin_attempt(workshop.submit().id)
    lines = ({"work_items": [3]}, {"work_place/1": [1]}, {"work_items": [5]}, {"work_items": [4]})
    for offset, line in enumerate(lines):
        workshop.store.heard(job.id, 1, offset, measured=line)
    assert values(metrics)["logitlake_work_items_total"] == 5
    workshop.store.move(job.id, S.INTERRUPTED)
    workshop.store.begin_attempt(job.id)
    workshop.store.heard(job.id, 2, 1, measured={"work_items": [2]})
    assert values(metrics)["logitlake_work_items_total"] == 7


def test_moves_counted_are_the_events_of_the_store(workshop: Workshop) -> None:
    """Of jobs that succeed, fail, are interrupted, paused, cancelled: each move once, and no other is named."""
    metrics = watched(workshop)
    assert sum(value for name, value in values(metrics).items() if "transitions" in name) == 0
    jobs = [workshop.submit(subject="a", dies_at=1), workshop.submit(subject="b", refuses="no")]
    for job in jobs:
        workshop.until_state(job, *ENDED)
    jobs.append(workshop.until_it_waits(workshop.submit(subject="c", items=9, wait_in="running")))
    pause(workshop.store, workshop.job(jobs[-1]))
    workshop.until_state(jobs[-1], S.PAUSED)
    resume(workshop.store, workshop.job(jobs[-1]))
    workshop.until_it_waits(jobs[-1])
    cancel(workshop.store, workshop.job(jobs[-1]))
    workshop.until_state(jobs[-1], *ENDED)
    events = [event.data for job in jobs for event in workshop.store.events(job.id, 0, 1000) if event.event == "state"]
    told = Counter((event["from"] or "none", event["to"]) for event in events)
    name = "logitlake_job_transitions_total from={} to={}"
    counted = {name: value for name, value in values(metrics).items() if "transitions" in name}
    possible = {("none", "queued"), *((before, after) for before, to in NEXT.items() for after in to)}
    assert counted == {name.format(*move): told[move] for move in possible}


def test_a_service_that_is_killed_between_lines_and_its_successor_count_each_line_once(tmp_path: Path) -> None:
    """By SIGKILL. What was told while nobody listened is counted by the second, what the first had counted is not."""
    workshop = Workshop(tmp_path)
    workshop.supervisor.step = lambda: None  # type: ignore[method-assign]  # the services' work
    job = workshop.submit(items=6, wait_in="running")

    def counted(service: str) -> dict[str, float]:
        path = tmp_path / service
        return json.loads(path.read_text()) if path.exists() else {}

    def start(service: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", SERVICE, str(tmp_path), service])

    first = start("first")
    try:
        for _ in range(2):
            workshop.open_gate()
        workshop.until(job, lambda _: counted("first").get("logitlake_work_items_total") == 2)
    finally:
        first.kill()
        first.wait()
    for _ in range(2):
        workshop.open_gate()
    workshop.until(job, lambda _: len(workshop.done()) == 4)
    second = start("second")
    try:
        for _ in range(2):
            workshop.open_gate()
        workshop.until_state(job, *ENDED)
    finally:
        second.kill()
        second.wait()
        for left in workshop.store.unfinished(*ACTIVE):
            workshop.runner.stop(left, len(left.attempts), now=True)
        os.close(workshop.gate)
    for name, expected in {
        "work_items_total": [2, 4],
        "work_seconds_count": [2, 4],
        "samples_total code= outcome=succeeded": [2, 4],
        "cache_lookups_total result=miss": [6, 0],
    }.items():
        assert [counted(service)[f"logitlake_{name}"] for service in ("first", "second")] == expected, name
