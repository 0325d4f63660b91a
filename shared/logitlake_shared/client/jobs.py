"""Jobs of a service: submit, follow, order. A job is the document that the service answers with."""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from logitlake_shared.client.transport import Transport
from logitlake_shared.errors import ServiceError
from logitlake_shared.ids import new_id

__all__ = ["ENDED", "Jobs"]

ENDED = frozenset({"succeeded", "failed", "cancelled", "expired"})
_WAIT_S = 20.0


def _path(job_id: str) -> str:
    """Of a job: whatever its id is, nothing else is asked for."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


class Jobs:
    """Those of one service."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def submit(
        self,
        kind: str,
        config: Mapping[str, Any],
        *,
        name: str = "",
        labels: Mapping[str, str] | None = None,
        key: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """The job of this configuration; safe to repeat with the same `key`, and sent again where that helps.

        `more`: `max_attempts`, `expires_in_s`, `plan_digest`. Raises `ServiceError`.
        """
        body = {"kind": kind, "config": dict(config), "name": name, "labels": dict(labels or {})} | more
        job: dict[str, Any] = self._transport.post("/v1/jobs", body, key=key or new_id("key"))
        return job

    def plan(self, kind: str, config: Mapping[str, Any], *, wait_s: float = _WAIT_S) -> dict[str, Any]:
        """What such a job would do: a job of kind `plan`, ended where that takes no longer; `result` is the plan."""
        job: dict[str, Any] = self._transport.post(
            "/v1/plans", {"kind": kind, "config": dict(config)}, wait=min(wait_s, 60.0)
        )
        return job

    def all(self, *, state: str | None = None, label: str | None = None, **asked: Any) -> Iterator[dict[str, Any]]:
        """The jobs that may be seen, the newest first. `asked`: `kind`, `subject`; a label is `name:value`."""
        return self._transport.pages("/v1/jobs", state=state, label=label, **asked)

    def get(self, job_id: str) -> dict[str, Any]:
        """A job as it is now."""
        job: dict[str, Any] = self._transport.get(_path(job_id))
        return job

    def edit(
        self,
        job_id: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        tag: str | None = None,
    ) -> dict[str, Any]:
        """The job with another name, or with these labels for all that it had; None leaves them.

        With the job's `tag`, as it was looked at, only where nobody edited it since. Raises `ServiceError`
        `precondition_failed`.
        """
        wanted = {"name": name, "labels": None if labels is None else dict(labels)}
        body = {key: value for key, value in wanted.items() if value is not None}
        job: dict[str, Any] = self._transport.patch(_path(job_id), body, tag=tag)
        return job

    def events(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """A job's events after the event `after`, as they come, until it ended; each once, through whatever breaks."""
        while True:
            some = self._transport.get(f"{_path(job_id)}/events", after=after, wait=_WAIT_S)
            yield from some["data"]
            after = some["next_after"]
            if some["ended"]:
                return

    def stream(self, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
        """The same by Server-Sent Events: without delay, and without coming again where the connection breaks."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._transport.stream("GET", f"{_path(job_id)}/events", headers=headers, timeout=60.0) as answer:
            event: dict[str, str] = {}
            for line in answer.iter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    event[name] = value
                    continue
                if "data" in event:
                    data = json.loads(event["data"])
                    yield {"id": int(event["id"]), "event": event["event"], "time": data.pop("time"), "data": data}
                event = {}

    def wait(self, job_id: str) -> dict[str, Any]:
        """The job once it ended. Raises `ServiceError` `job_failed` where that was not in success."""
        for _ in self.events(job_id):
            pass
        job = self.get(job_id)
        if job["state"] != "succeeded":
            fault = job["fault"] or {"error": "", "message": "it was ended"}
            failed = ServiceError(f"job {job_id} {job['state']}: {fault['error']} {fault['message']}")
            failed.code = f"job_{job['state']}"
            raise failed
        return job

    def logs(self, job_id: str, *, tail: int = 200, attempt: int | None = None) -> str:
        """The last lines that an attempt wrote; default: the newest attempt."""
        return self._transport.get_bytes(f"{_path(job_id)}/logs", tail=tail, attempt=attempt).decode()

    def cancel(self, job_id: str, *, now: bool = False) -> dict[str, Any]:
        """Ends a job; `now` without finishing what is under way. What is committed stays."""
        return self._order(job_id, "cancel", {"mode": "now" if now else "drain"})

    def pause(self, job_id: str) -> dict[str, Any]:
        """Has a job wait until it is resumed."""
        return self._order(job_id, "pause")

    def resume(self, job_id: str) -> dict[str, Any]:
        """Has a paused job go on."""
        return self._order(job_id, "resume")

    def _order(self, job_id: str, order: str, body: Any = None) -> dict[str, Any]:
        job: dict[str, Any] = self._transport.post(f"{_path(job_id)}/{order}", body)
        return job
