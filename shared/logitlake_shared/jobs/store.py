"""The jobs of a service, in an SQLite file that only its owner reads.

Promises: what `submit` returned outlives the process and the machine's power (WAL, synced at each commit); a state
changes only as `states.NEXT` says, whoever asks, and each change leaves an event in the same transaction; the same key
of the same principal is one job, however many submit it at once. May be used from several threads.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from logitlake_shared.errors import ConfigError, JobStateError, JobSubmitError
from logitlake_shared.ids import least_id, new_id
from logitlake_shared.jobs.measured import Measured
from logitlake_shared.jobs.observer import Observer
from logitlake_shared.jobs.records import Attempt, Counts, Event, Job, JobFault, JobState, NewJob, Outcome, Wish
from logitlake_shared.jobs.states import ENDED, NEXT

__all__ = ["JobStore"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, labels TEXT NOT NULL, subject TEXT NOT NULL,
    lane TEXT, arguments TEXT NOT NULL,
    digest TEXT NOT NULL, config TEXT NOT NULL, principal TEXT NOT NULL, state TEXT NOT NULL, wish TEXT NOT NULL,
    outcome TEXT, counts TEXT NOT NULL, baseline TEXT, figures TEXT NOT NULL, result TEXT, fault TEXT,
    entered TEXT NOT NULL, max_attempts INTEGER NOT NULL, expires REAL, retry_at REAL,
    forgotten INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, id);
CREATE INDEX IF NOT EXISTS jobs_that_expire ON jobs (expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS attempts (
    job TEXT NOT NULL, number INTEGER NOT NULL, started REAL NOT NULL, ended REAL, exit_code INTEGER,
    log_offset INTEGER NOT NULL, asked_to_end REAL, PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measured (
    job TEXT NOT NULL, attempt INTEGER NOT NULL, figures TEXT NOT NULL, PRIMARY KEY (job, attempt)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS labels (
    name TEXT NOT NULL, value TEXT NOT NULL, job TEXT NOT NULL, PRIMARY KEY (name, value, job)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, time REAL NOT NULL, event TEXT NOT NULL, data TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS events_by_job ON events (job, id);
CREATE TABLE IF NOT EXISTS submissions (
    principal TEXT NOT NULL, key TEXT NOT NULL, body_sha256 TEXT NOT NULL, job TEXT NOT NULL,
    PRIMARY KEY (principal, key)
) STRICT, WITHOUT ROWID;
"""
_JSON = ("arguments", "labels", "config", "counts", "baseline", "figures", "result", "fault", "entered")
# Of a job's events of progress so many are kept, the newest; the others are one `gap`.
_PROGRESS_KEPT = 500


class JobStore:
    """The jobs in the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self.on_change: Callable[[str], None] = lambda _: None
        """called with a job's id after a change of it is there to be read"""
        self.observer = Observer()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connection().executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{path}: cannot be opened as a file of jobs: {error}") from error

    def submit(self, job: NewJob, principal: str, key: str | None = None, body_sha256: str = "") -> tuple[Job, bool]:
        """The job, and whether it is of an earlier submission with this key.

        Raises `JobSubmitError` where the key came with another body before.
        """
        now, job_id = time.time(), new_id("job")
        with self._writing() as connection:
            if key is not None:
                earlier = connection.execute(
                    "SELECT job, body_sha256 FROM submissions WHERE principal = ? AND key = ?", (principal, key)
                ).fetchone()
                if earlier is not None:
                    if earlier[1] != body_sha256:
                        raise JobSubmitError(
                            f"the idempotency key {key!r} came with another body before, which made job {earlier[0]}; "
                            "send the same body, or another key"
                        )
                    return self._one(connection, earlier[0]), True
                connection.execute("INSERT INTO submissions VALUES (?, ?, ?, ?)", (principal, key, body_sha256, job_id))
            expires = None if job.expires_in_s is None else now + job.expires_in_s
            values = {
                **job.model_dump(exclude={"expires_in_s"}),
                **{"id": job_id, "principal": principal, "state": JobState.QUEUED, "wish": "go_on"},
                **{"counts": Counts(), "figures": {}, "entered": {JobState.QUEUED: now}, "expires": expires},
            }
            names = ", ".join(values)
            marks = ", ".join("?" * len(values))
            connection.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", [_stored(v) for v in values.values()])
            _label(connection, job_id, job.labels)
            _tell(connection, job_id, "state", {"from": None, "to": JobState.QUEUED})
            made = self._one(connection, job_id)
        self.observer.moved(None, JobState.QUEUED)
        self.on_change(job_id)
        return made, False

    def find(self, job_id: str) -> Job | None:
        """The job of this id."""
        rows = self._jobs("WHERE id = ?", (job_id,))
        return rows[0] if rows else None

    def page(
        self,
        limit: int,
        sees: Callable[[str], bool] | None = None,
        *,
        before: str | None = None,
        created_after: float | None = None,
        state: JobState | None = None,
        kind: str | None = None,
        subject: str | None = None,
        label: tuple[str, str] | None = None,
    ) -> list[Job]:
        """Up to `limit` jobs, the newest first, without their attempts: those that came before job `before` and not
        before `created_after` (seconds since the epoch), are what is asked for, and whose subject `sees` says yes to.
        """
        parts, values = ["TRUE"], []
        first = None if created_after is None else least_id("job", created_after)
        asked = (("id <", before), ("id >=", first), ("state =", state), ("kind =", kind), ("subject =", subject))
        for column, value in asked:
            if value is not None:
                parts.append(f"{column} ?")
                values.append(str(value))
        if label is not None:
            # A name may have colons, as a value may: what reads the same is meant.
            words = ":".join(label).split(":")
            pairs = [(":".join(words[:place]), ":".join(words[place:])) for place in range(1, len(words))]
            is_one = " OR ".join(["(name = ? AND value = ?)"] * len(pairs))
            parts.append(f"id IN (SELECT job FROM labels WHERE {is_one})")
            values += chain.from_iterable(pairs)
        if sees is not None:
            self._connection().create_function("sees", 1, sees)
            parts.append("sees(subject)")
        condition = f"WHERE {' AND '.join(parts)} ORDER BY id DESC LIMIT {limit:d}"
        return self._jobs(condition, values, with_attempts=False)

    def unfinished(self, *states: JobState) -> list[Job]:
        """The jobs in these states, the oldest first."""
        marks = ", ".join("?" * len(states))
        return self._jobs(f"WHERE state IN ({marks}) ORDER BY id", states)

    def next_queued(self, busy: Collection[str], limit: int) -> list[Job]:
        """The oldest queued job of each lane that is not `busy`, the oldest first."""
        marks = ", ".join("?" * len(busy))
        oldest = f"SELECT min(id) FROM jobs WHERE state = 'queued' AND lane NOT IN ({marks}) GROUP BY lane"
        return self._jobs(f"WHERE id IN ({oldest}) ORDER BY id LIMIT {limit:d}", busy)

    def next_light(self, limit: int) -> list[Job]:
        """The oldest queued jobs without a lane."""
        return self._jobs(f"WHERE state = 'queued' AND lane IS NULL ORDER BY id LIMIT {limit:d}")

    def overdue(self, now: float) -> list[Job]:
        """The jobs that nobody works on and whose time is over."""
        waiting = (JobState.QUEUED, JobState.PAUSED, JobState.INTERRUPTED)
        return self._jobs("WHERE expires <= ? AND state IN (?, ?, ?)", (now, *waiting))

    def counted(self) -> dict[JobState, int]:
        """Number of jobs in each state."""
        rows = self._connection().execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        return dict.fromkeys(JobState, 0) | {JobState(state): count for state, count in rows}

    def move(
        self,
        job_id: str,
        to: JobState,
        reason: str = "",
        *,
        only_from: frozenset[JobState] | None = None,
        wish: Wish | None = None,
        outcome: Outcome | None = None,
        fault: JobFault | None = None,
        retry_at: float | None = None,
        counts: Counts | None = None,
    ) -> Job:
        """Brings a job into another state. Raises `JobStateError`, changing nothing, where that may not follow."""
        with self._writing() as connection:
            job = self._one(connection, job_id)
            if to not in NEXT[job.state] or (only_from is not None and job.state not in only_from):
                raise JobStateError(f"job {job_id} is {job.state}: it cannot become {to}")
            changes: dict[str, Any] = {
                "state": to,
                "entered": job.entered | {to: time.time()},
                "retry_at": retry_at,
                "outcome": outcome,
                "fault": fault,
                "wish": wish or ("go_on" if to in ENDED or to in (JobState.QUEUED, JobState.PAUSED) else job.wish),
            }
            if counts is not None:
                changes["counts"] = counts
            _update(connection, job_id, changes)
            told = {"from": job.state, "to": to} | ({"reason": reason} if reason else {})
            _tell(connection, job_id, "state", told | ({} if fault is None else {"fault": fault.model_dump()}))
            moved = self._one(connection, job_id)
        self.observer.moved(job.state, to)
        self.on_change(job_id)
        return moved

    def ask(self, job_id: str, wish: Wish, only_from: frozenset[JobState]) -> Job:
        """Writes down what the job's attempt is to do. Raises `JobStateError`."""
        with self._writing() as connection:
            job = self._one(connection, job_id)
            if job.state not in only_from:
                raise JobStateError(f"job {job_id} is {job.state}: it cannot be asked to {wish.replace('_', ' ')}")
            _update(connection, job_id, {"wish": wish})
            asked = self._one(connection, job_id)
        self.on_change(job_id)
        return asked

    def edit(
        self,
        job_id: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        check: Callable[[Job], None] = lambda _: None,
    ) -> Job:
        """Gives a job, in whatever state, another name, or these labels for those that it has; None leaves them.

        `check` sees the job as it was, in the same transaction: what it raises is raised, and nothing is changed.
        """
        with self._writing() as connection:
            job = self._one(connection, job_id)
            check(job)
            wanted: dict[str, Any] = {"name": name, "labels": None if labels is None else dict(labels)}
            changes = {key: value for key, value in wanted.items() if value not in (None, getattr(job, key))}
            if changes:
                _update(connection, job_id, changes)
                if "labels" in changes:
                    connection.execute("DELETE FROM labels WHERE job = ?", (job_id,))
                    _label(connection, job_id, changes["labels"])
                _tell(connection, job_id, "edited", changes)
            edited = self._one(connection, job_id)
        if changes:
            self.on_change(job_id)
        return edited

    def begin_attempt(self, job_id: str) -> Job:
        """The job with a new attempt, `validating`. Raises `JobStateError`."""
        with self._writing() as connection:
            job = self._one(connection, job_id)
            if JobState.VALIDATING not in NEXT[job.state]:
                raise JobStateError(f"job {job_id} is {job.state}: no attempt may begin")
            number, now = len(job.attempts) + 1, time.time()
            connection.execute("INSERT INTO attempts VALUES (?, ?, ?, NULL, NULL, 0, NULL)", (job_id, number, now))
            entered = job.entered | {JobState.VALIDATING: now}
            _update(
                connection,
                job_id,
                {"state": JobState.VALIDATING, "entered": entered, "retry_at": None, "wish": "go_on", "fault": None},
            )
            _tell(connection, job_id, "attempt", {"number": number})
            _tell(connection, job_id, "state", {"from": job.state, "to": JobState.VALIDATING})
            begun = self._one(connection, job_id)
        self.observer.moved(job.state, JobState.VALIDATING)
        self.on_change(job_id)
        return begun

    def change_attempt(self, job_id: str, number: int, **changes: float | int | None) -> None:
        """Writes down what is known of an attempt: `ended`, `exit_code`, `log_offset`, `asked_to_end`."""
        with self._writing() as connection:
            _change_attempt(connection, job_id, number, changes)

    def heard(
        self,
        job_id: str,
        number: int,
        log_offset: int,
        *,
        counts: Counts | None = None,
        baseline: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
        measured: Measured | None = None,
        result: Mapping[str, Any] | None = None,
        fault: JobFault | None = None,
    ) -> None:
        """Writes down what an attempt said of itself, and up to where its log was read: nothing is counted twice.

        A `fault` is the job's own once it failed (`move`). What was `measured` is the attempt's.
        """
        changes = {"counts": counts, "baseline": baseline, "figures": figures, "result": result, "fault": fault}
        said = {name: value for name, value in changes.items() if value is not None}
        with self._writing() as connection:
            _change_attempt(connection, job_id, number, {"log_offset": log_offset})
            counts_before = self._one(connection, job_id).counts
            measured_before = _measure(connection, job_id, number, measured or {})
            if said:
                _update(connection, job_id, said)
            told = {name: _plain(value) for name, value in said.items() if name in ("counts", "figures")}
            if told:
                _tell(connection, job_id, "progress", told)
                _forget_old_progress(connection, job_id)
        if counts is not None:
            self.observer.counted(counts_before, counts)
        if measured:
            self.observer.measured(measured_before, measured)
        if said:
            self.on_change(job_id)

    def events(self, job_id: str, after: int, limit: int) -> list[Event]:
        """A job's events after the event of this id, the oldest first.

        Where events of progress were forgotten, the first is a `gap`. It has the id that was asked with: it stands for
        no event of its own, and whoever asks with it once more gets all that follows once more.
        """
        connection = self._connection()
        forgotten = connection.execute("SELECT forgotten FROM jobs WHERE id = ?", (job_id,)).fetchone()
        rows = connection.execute(
            "SELECT id, time, event, data FROM events WHERE job = ? AND id > ? ORDER BY id LIMIT ?",
            (job_id, after, limit),
        ).fetchall()
        found = [Event(id=id_, time=when, event=event, data=json.loads(data)) for id_, when, event, data in rows]
        if forgotten is not None and after < forgotten[0]:
            found.insert(0, Event(id=after, time=time.time(), event="gap", data={"up_to": forgotten[0]}))
        return found

    def close(self) -> None:
        """Closes this thread's connection."""
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.close()
            self._local.connection = None

    def _one(self, connection: sqlite3.Connection, job_id: str) -> Job:
        rows = self._jobs("WHERE id = ?", (job_id,), connection=connection)
        if not rows:
            raise JobStateError(f"no job {job_id!r}")
        return rows[0]

    def _jobs(
        self,
        condition: str,
        values: Any = (),
        *,
        with_attempts: bool = True,
        connection: sqlite3.Connection | None = None,
    ) -> list[Job]:
        connection = connection or self._connection()
        newest = "(SELECT coalesce(max(e.id), 0) FROM events e WHERE e.job = jobs.id) AS last_event"
        cursor = connection.execute(f"SELECT *, {newest} FROM jobs {condition}", tuple(values))
        names = [column[0] for column in cursor.description]
        found = []
        for row in cursor.fetchall():
            job = dict(zip(names, row, strict=True))
            job |= {name: json.loads(job[name]) for name in _JSON if job[name] is not None}
            if with_attempts:
                job["attempts"] = self._attempts(connection, job["id"])
            found.append(Job.model_validate(job))
        return found

    def _attempts(self, connection: sqlite3.Connection, job_id: str) -> tuple[Attempt, ...]:
        columns = ("number", "started", "ended", "exit_code", "log_offset", "asked_to_end")
        rows = connection.execute(
            f"SELECT {', '.join(columns)} FROM attempts WHERE job = ? ORDER BY number", (job_id,)
        ).fetchall()
        return tuple(Attempt(**dict(zip(columns, row, strict=True))) for row in rows)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes in."""
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = sqlite3.connect(self._path, timeout=30, isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        return connection


def _label(connection: sqlite3.Connection, job_id: str, labels: Mapping[str, str]) -> None:
    connection.executemany(
        "INSERT INTO labels VALUES (?, ?, ?)", [(name, value, job_id) for name, value in labels.items()]
    )


def _tell(connection: sqlite3.Connection, job_id: str, event: str, data: Mapping[str, Any]) -> None:
    connection.execute(
        "INSERT INTO events (job, time, event, data) VALUES (?, ?, ?, ?)",
        (job_id, time.time(), event, json.dumps(data)),
    )


def _forget_old_progress(connection: sqlite3.Connection, job_id: str) -> None:
    oldest = connection.execute(
        "SELECT id FROM events WHERE job = ? AND event = 'progress' ORDER BY id DESC LIMIT 1 OFFSET ?",
        (job_id, _PROGRESS_KEPT),
    ).fetchone()
    if oldest is not None:
        connection.execute("DELETE FROM events WHERE job = ? AND event = 'progress' AND id <= ?", (job_id, oldest[0]))
        connection.execute("UPDATE jobs SET forgotten = ? WHERE id = ?", (oldest[0], job_id))


def _update(connection: sqlite3.Connection, job_id: str, changes: Mapping[str, Any]) -> None:
    parts = ", ".join(f"{name} = ?" for name in changes)
    values = [_stored(value) for value in changes.values()]
    connection.execute(f"UPDATE jobs SET {parts} WHERE id = ?", (*values, job_id))


def _change_attempt(
    connection: sqlite3.Connection, job_id: str, number: int, changes: Mapping[str, float | int | None]
) -> None:
    parts = ", ".join(f"{name} = ?" for name in changes)
    connection.execute(f"UPDATE attempts SET {parts} WHERE job = ? AND number = ?", (*changes.values(), job_id, number))


def _measure(connection: sqlite3.Connection, job_id: str, number: int, measured: Measured) -> Measured:
    """Writes down what an attempt measured, and returns what was known of it before."""
    row = connection.execute("SELECT figures FROM measured WHERE job = ? AND attempt = ?", (job_id, number)).fetchone()
    before: dict[str, list[float]] = {} if row is None else json.loads(row[0])
    if measured:
        # A figure that this line does not have is kept: else the next one would tell all of it anew.
        figures = json.dumps(before | dict(measured))
        connection.execute("INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", (job_id, number, figures))
    return before


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _stored(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = dict(value)  # what no answer shows, too
    return json.dumps(value) if isinstance(value, dict | tuple) else value
