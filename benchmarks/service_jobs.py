"""Jobs over HTTP: lists of very many, and very many who listen to one. Part of `python -m benchmarks.service`."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.harness import Figure, median
from logitlake_shared.jobs.records import NewJob
from logitlake_shared.jobs.store import JobStore

__all__ = ["event_figures", "fill_jobs", "list_figures"]

_TEACHER = Path(__file__).parents[1] / "examples" / "digit_scenes" / "models" / "teacher"
_PAGES = 60
_LIST_MS = 50.0
_COMMAND_S = 300.0


def fill_jobs(folder: Path, num_jobs: int) -> None:
    """Puts jobs that ended into the service's store: copies of one, under other ids and labels."""
    store = JobStore(folder / "jobs.sqlite")
    config = {
        "teacher": {"model_dir": "x"},
        "lake": {"cache": "main"},
        "data": [{"path": f"file {n}"} for n in range(5)],
    }
    job, _ = store.submit(NewJob(kind="capture", config=config, digest="0" * 64, subject="main"), "local")
    connection = store._connection()
    connection.execute("BEGIN")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(jobs)")]
    others = ", ".join(column for column in columns if column not in ("id", "state"))
    connection.executemany(
        f"INSERT INTO jobs (id, state, {others}) SELECT ?, 'succeeded', {others} FROM jobs WHERE id = ?",
        ((f"{job.id[:-6]}{number:06d}", job.id) for number in range(num_jobs)),
    )
    connection.execute("INSERT INTO labels SELECT 'team', substr(id, -1), id FROM jobs")
    connection.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
    connection.execute("COMMIT")
    store.close()


def list_figures(client: httpx.Client, num_jobs: int) -> list[Figure]:
    """Pages of 50 of all jobs, of one state, of one label; from the newest and from the middle."""
    figures = []
    for name, asked in (("all", {}), ("one state", {"state": "succeeded"}), ("one label", {"label": "team:7"})):
        seconds, cursor = [], None
        for _ in range(_PAGES):
            started = time.perf_counter()
            page = client.get("/v1/jobs", params=asked | ({"cursor": cursor} if cursor else {})).raise_for_status()
            seconds.append(time.perf_counter() - started)
            cursor = page.json()["next_cursor"]
        value = 1000 * median(seconds)
        reach = f"<= {_LIST_MS:.0f}"
        figures.append(Figure(f"a page of {num_jobs:,} jobs, {name}", value, "ms", reach, value <= _LIST_MS))
    return figures


def event_figures(service: str, num_listeners: int, num_samples: int) -> list[Figure]:
    """A capture by the fake engine, and so many who listen to its events from the first to the last."""
    config: dict[str, Any] = {
        "teacher": {"model_dir": str(_TEACHER)},
        "engine": {"type": "fake", "slow_s": 0.5},
        "lake": {"cache": "listened"},
        "plan": {"unit_tokens": 512},
        "data": [{"type": "fake", "num_samples": num_samples}],
    }
    with httpx.Client(base_url=service, timeout=_COMMAND_S) as client:
        job = client.post("/v1/jobs", json={"kind": "capture", "config": config}).raise_for_status().json()["id"]
        heard = asyncio.run(_listen(service, job, num_listeners))
        events = client.get(f"/v1/jobs/{job}/events").raise_for_status().json()["data"]
        state = client.get(f"/v1/jobs/{job}").json()["state"]
    told = [event["id"] for event in events]
    whole = sum(listener.ids == told for listener in heard.listeners)
    # The first event that everybody was there for: those before came out of the past.
    waits = sorted(
        1000 * (arrived - event["time"])
        for listener in heard.listeners
        for event, arrived in zip(events, listener.arrived, strict=False)
        if event["time"] > heard.all_there
    )
    late = waits[int(0.99 * len(waits))] if waits else float("nan")
    probe = 1000 * sorted(heard.probes)[int(0.99 * len(heard.probes))]
    who = f"{num_listeners:,} SSE clients"
    return [
        Figure(f"{who} heard every event once", whole, "", f"{num_listeners}", whole == num_listeners),
        Figure(f"{who}: events of the job ({state})", len(told), ""),
        Figure(f"{who}: from an event to a client, p99", late, "ms"),
        Figure(f"{who}: /readyz meanwhile, p99", probe, "ms"),
    ]


@dataclass
class _Listener:
    ids: list[int] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)


@dataclass
class _Heard:
    listeners: list[_Listener]
    all_there: float
    probes: list[float]


async def _listen(service: str, job: str, num_listeners: int) -> _Heard:
    listeners = [_Listener() for _ in range(num_listeners)]
    there = asyncio.Semaphore(0)
    tasks = []
    for place in range(0, num_listeners, 50):  # as they come in life: not all in one millisecond
        tasks += [asyncio.create_task(_one(service, job, one, there)) for one in listeners[place : place + 50]]
        for _ in range(min(50, num_listeners - place)):
            await asyncio.wait_for(there.acquire(), _COMMAND_S)
    all_there = time.time()
    probes: list[float] = []
    prober = asyncio.create_task(_probe(service, probes))
    await asyncio.wait_for(asyncio.gather(*tasks), _COMMAND_S)
    prober.cancel()
    return _Heard(listeners, all_there, probes)


async def _one(service: str, job: str, listener: _Listener, there: asyncio.Semaphore) -> None:
    """Plain sockets: a thousand clients of a library would measure the library."""
    address = urlsplit(service)
    while True:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        asked = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {address.netloc}\r\nAccept: text/event-stream\r\n\r\n"
        writer.write(asked.encode())
        status = await reader.readline()
        if b" 200 " in status:
            break
        writer.close()
        await asyncio.sleep(1.0)  # 429: come again
    there.release()
    while line := await reader.readline():
        if line.startswith(b"id: "):
            listener.ids.append(int(line[4:]))
            listener.arrived.append(time.time())
        if line == b"0\r\n":
            break
    writer.close()


async def _probe(service: str, seconds: list[float]) -> None:
    async with httpx.AsyncClient(base_url=service, timeout=_COMMAND_S) as client:
        while True:
            started = time.perf_counter()
            (await client.get("/readyz")).raise_for_status()
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(0.02)
