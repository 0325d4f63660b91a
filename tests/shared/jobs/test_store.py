"""Jobs are never forgotten, never made twice, and never leave the state that they ended in."""

import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitlake_shared.errors import ConfigError, JobStateError, JobSubmitError
from logitlake_shared.jobs.orders import cancel, pause, resume
from logitlake_shared.jobs.records import Counts, Job, JobState, NewJob
from logitlake_shared.jobs.states import ACTIVE, ENDED, NEXT
from logitlake_shared.jobs.store import JobStore

PARALLEL = 50


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    """An empty store."""
    return JobStore(tmp_path / "jobs.sqlite")


def new(**fields: Any) -> NewJob:
    """A job that is like every other."""
    return NewJob(**({"kind": "work", "config": {}, "digest": "0", "subject": "main"} | fields))


def made(store: JobStore, **fields: Any) -> Job:
    """Such a job, submitted."""
    return store.submit(new(**fields), "tok_a")[0]


def in_state(store: JobStore, state: JobState, **fields: Any) -> Job:
    """A job that came into this state by the shortest way."""
    ways = {(): JobState.QUEUED}
    while state not in ways.values():
        ways |= {(*way, to): to for way, here in list(ways.items()) for to in NEXT[here]}
    job = made(store, **fields)
    for to in next(way for way, here in ways.items() if here is state):
        job = store.begin_attempt(job.id) if to is JobState.VALIDATING else store.move(job.id, to)
    return job


def test_a_submission_is_one_job_however_many_send_it_at_once(store: JobStore) -> None:
    """One key of one principal is one job; the same key of another principal is another."""
    barrier = threading.Barrier(PARALLEL)

    def submit(_: int) -> tuple[str, bool]:
        barrier.wait()
        job, replayed = store.submit(new(), "tok_a", "key", "same")
        store.close()
        return job.id, replayed

    with ThreadPoolExecutor(PARALLEL) as pool:
        answers = list(pool.map(submit, range(PARALLEL)))
    assert len({job_id for job_id, _ in answers}) == 1
    assert Counter(replayed for _, replayed in answers) == {False: 1, True: PARALLEL - 1}
    assert len(store.page(10)) == 1
    other, replayed = store.submit(new(), "tok_b", "key", "same")
    assert other.id != answers[0][0]
    assert not replayed


def test_a_key_with_another_body_is_refused_and_makes_nothing(store: JobStore) -> None:
    """It says which job the key made."""
    job, _ = store.submit(new(), "tok_a", "key", "one")
    with pytest.raises(JobSubmitError, match=job.id):
        store.submit(new(), "tok_a", "key", "other")
    assert [one.id for one in store.page(10)] == [job.id]


def test_a_job_is_there_for_whoever_opens_the_file(store: JobStore, tmp_path: Path) -> None:
    """With all that was said of it, and no one else may read the file."""
    job = made(store, name="nightly", labels={"team": "vision"}, config={"lake": {"cache": "main"}}, expires_in_s=60)
    assert JobStore(tmp_path / "jobs.sqlite").find(job.id) == job
    assert (tmp_path / "jobs.sqlite").stat().st_mode & 0o077 == 0
    mode = sqlite3.connect(tmp_path / "jobs.sqlite").execute("PRAGMA journal_mode").fetchone()
    assert mode == ("wal",)


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    """With its path."""
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database, and longer than a header" * 100)
    with pytest.raises(ConfigError, match=r"jobs\.sqlite"):
        JobStore(tmp_path / "jobs.sqlite")


@pytest.mark.parametrize("to", JobState)
@pytest.mark.parametrize("state", JobState)
def test_states_follow_the_table_and_leave_an_event_each(store: JobStore, state: JobState, to: JobState) -> None:
    """What the table does not name is refused and changes nothing."""
    job = in_state(store, state)
    if to in NEXT[state]:
        assert store.move(job.id, to).state is to
        assert store.events(job.id, job.last_event, 10)[-1].data == {"from": state, "to": to}
    else:
        with pytest.raises(JobStateError, match=state):
            store.move(job.id, to)
        assert store.find(job.id) == job


@pytest.mark.parametrize("state", JobState)
def test_every_order_is_right_or_refused_in_every_state(store: JobStore, state: JobState) -> None:
    """Cancel, twice; pause, twice; resume. A job that ended stays as it is."""
    ended = state in ENDED
    job = in_state(store, state)
    for order in (cancel, pause, resume):
        if ended:
            with pytest.raises(JobStateError):
                order(store, job)
            assert store.find(job.id) == job
    if ended:
        return
    cancelled = cancel(store, job)
    assert cancelled.state is (JobState.CANCELLING if state in ACTIVE else JobState.CANCELLED)
    if state in ACTIVE:
        assert cancel(store, cancelled) == cancelled
        assert cancel(store, cancelled, now=True).wish == "cancel_now"
    other = in_state(store, state)
    if state is JobState.CANCELLING:
        with pytest.raises(JobStateError):
            pause(store, other)
        return
    paused = pause(store, other)
    assert (paused.state is JobState.PAUSED) == (state not in ACTIVE)
    assert paused.wish == ("pause" if state in ACTIVE else "go_on")
    assert pause(store, paused).state is paused.state
    if state not in ACTIVE:
        assert resume(store, paused).state is JobState.QUEUED


@pytest.mark.parametrize("order", [pause, resume])
def test_an_order_is_right_for_whoever_gave_it_after_somebody_else_did(store: JobStore, order: Any) -> None:
    """Two who looked at the same time and then say the same get the same: twice is fine."""
    looked = pause(store, made(store)) if order is resume else made(store)
    first = order(store, looked)
    assert order(store, looked) == first


def test_a_job_that_was_cancelled_since_somebody_looked_is_not_resumed(store: JobStore) -> None:
    looked = pause(store, made(store))
    cancel(store, looked)
    with pytest.raises(JobStateError, match="submit the same again"):
        resume(store, looked)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([cancel, pause, resume]), max_size=6), st.lists(st.sampled_from(JobState), max_size=6))
def test_no_sequence_of_orders_and_moves_leaves_an_end(
    tmp_path_factory: pytest.TempPathFactory, orders: list[Any], moves: list[JobState]
) -> None:
    """Whatever is asked and happens, in whatever order: from the first end on the state is the same."""
    store = JobStore(tmp_path_factory.mktemp("jobs") / "jobs.sqlite")
    job = made(store)
    for act in [step for pair in zip(orders, moves, strict=False) for step in pair]:
        before = store.find(job.id)
        assert before is not None
        try:
            after = store.move(job.id, act) if isinstance(act, JobState) else act(store, before)
        except JobStateError:
            continue
        assert before.state not in ENDED or after.state is before.state
    store.close()


def test_events_come_once_in_order_from_where_one_asks(store: JobStore) -> None:
    """Those of other jobs are not among them."""
    job, other = made(store), made(store)
    for number in range(5):
        store.begin_attempt(job.id) if not number else store.heard(job.id, 1, number, figures={"n": number})
        store.move(other.id, JobState.PAUSED if number % 2 == 0 else JobState.QUEUED)
    everything = store.events(job.id, 0, 100)
    assert [event.event for event in everything] == ["state", "attempt", "state", *["progress"] * 4]
    for place, event in enumerate(everything):
        assert store.events(job.id, event.id, 100) == everything[place + 1 :]
    assert [one.id for one in store.events(job.id, 0, 2)] == [one.id for one in everything[:2]]


def test_forgotten_progress_is_one_gap(store: JobStore) -> None:
    """A job of a week does not fill the disk; who has missed something is told so, once for each time they ask."""
    job = store.begin_attempt(made(store).id)
    for number in range(600):
        store.heard(job.id, 1, number, figures={"n": number})
    events = store.events(job.id, 0, 10_000)
    assert [event.event for event in events[:4]] == ["gap", "state", "attempt", "state"]
    assert [event.data["figures"]["n"] for event in events[4:]] == list(range(100, 600))
    assert events[0].id == 0
    assert [event.event for event in store.events(job.id, events[4].id, 10_000)].count("gap") == 0


def test_lists_hold_what_is_asked_for_and_stay_whole_while_jobs_are_added(store: JobStore) -> None:
    """The newest first; by state, kind, subject, label; only what may be seen."""
    jobs = [
        made(store, subject=f"team-{place % 2}", kind=f"kind-{place % 3}", labels={"place": str(place)})
        for place in range(12)
    ]
    jobs.sort(key=lambda job: job.id, reverse=True)
    first = store.page(5)
    made(store)
    second = store.page(5, before=first[-1].id)
    assert [job.id for job in first + second] == [job.id for job in jobs[:10]]
    assert {job.subject for job in store.page(20, lambda subject: subject == "team-0")} == {"team-0"}
    assert len(store.page(20, kind="kind-1")) == 4
    assert [job.labels["place"] for job in store.page(20, label=("place", "7"))] == ["7"]
    for job in jobs:
        later = {other.id for other in jobs if other.created >= job.created}
        assert later <= {other.id for other in store.page(20, created_after=job.created)}
    assert len(store.page(20, created_after=-1.0)) == 13
    assert store.page(20, created_after=time.time() + 60) == []
    store.move(jobs[3].id, JobState.PAUSED)
    assert [job.id for job in store.page(20, state=JobState.PAUSED)] == [jobs[3].id]
    assert store.counted()[JobState.PAUSED] == 1


def test_what_is_heard_of_an_attempt_is_kept_with_how_far_its_log_was_read(store: JobStore) -> None:
    """Together, so that a service that is killed in between counts nothing twice."""
    job = store.begin_attempt(made(store).id)
    counts = Counts(total=10, pending=4, succeeded=6)
    store.heard(job.id, 1, 123, counts=counts, figures={"tokens": 5})
    found = store.find(job.id)
    assert found is not None
    assert (found.counts, found.figures, found.attempts[0].log_offset) == (counts, {"tokens": 5}, 123)


@pytest.mark.parametrize("state", list(JobState))
def test_name_and_labels_are_edited_in_every_state(store: JobStore, state: JobState) -> None:
    """One event for what changed and none for what did not; the tag changes with it, and with no state."""
    job = in_state(store, state, name="a", labels={"team": "x"})
    assert job.tag == made(store, name="a", labels={"team": "x"}).tag
    edited = store.edit(job.id, name="b", labels={"tier": "1"})
    assert (edited.name, edited.labels, edited.state) == ("b", {"tier": "1"}, state)
    assert store.edit(job.id, name="b") == store.edit(job.id, labels={"tier": "1"}) == store.edit(job.id) == edited
    events = store.events(job.id, job.last_event, 10)
    assert [(event.event, event.data) for event in events] == [("edited", {"name": "b", "labels": {"tier": "1"}})]
    assert edited.tag != job.tag
    assert [found.id for found in store.page(9, label=("tier", "1"))] == [job.id]
    assert job.id not in [found.id for found in store.page(9, label=("team", "x"))]
    assert store.edit(job.id, name="a", labels={"team": "x"}).tag == job.tag


def test_what_an_edit_is_checked_for_holds_while_it_is_made(store: JobStore) -> None:
    """Of many who saw the same job and edit it at once, one does; the others change nothing."""
    job, barrier = made(store), threading.Barrier(PARALLEL)

    def unchanged(found: Job) -> None:
        if found.tag != job.tag:
            raise JobStateError("it is another")

    def edit(number: int) -> bool:
        barrier.wait()
        try:
            store.edit(job.id, name=str(number), labels={"by": str(number)}, check=unchanged)
        except JobStateError:
            return False
        return True

    with ThreadPoolExecutor(PARALLEL) as pool:
        did = list(pool.map(edit, range(PARALLEL)))
    assert did.count(True) == 1
    edited = store.find(job.id)
    assert edited is not None
    assert edited.name == edited.labels["by"] == str(did.index(True))
    assert [event.event for event in store.events(job.id, 0, 99)].count("edited") == 1
