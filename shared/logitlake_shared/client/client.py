"""`logitlake.Client`: what a service knows and does, from Python.

    with logitlake.Client("http://127.0.0.1:8321") as client:
        frame = client.sql("SELECT task, avg(entropy) AS entropy FROM tokens GROUP BY task").polars()

Documents are dicts as the API gives them (its OpenAPI document says what is in them); answers in SQL are tables. Every
problem is a `ServiceError` with the code that docs/errors.md explains.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote

from logitlake_shared.client.jobs import Jobs
from logitlake_shared.client.sql import SqlAnswer
from logitlake_shared.client.transport import Transport
from logitlake_shared.errors import ServiceError
from logitlake_shared.lake import Lake
from logitlake_shared.store import open_store

__all__ = ["Client"]


class Client:
    """One service; a context manager. Not for several threads at once."""

    def __init__(
        self, address: str, token: str | None = None, *, timeout_s: float = 60.0, patience_s: float = 30.0
    ) -> None:
        """`token`: default LOGITLAKE_TOKEN. `timeout_s` is how long the service may say nothing, `patience_s` how long
        a busy or unreachable one is asked again. Raises `ConfigError`, and `LakeError` where the token would be sent
        unencrypted."""
        self._transport, self._token = Transport(address, token, timeout_s, patience_s), token
        self.jobs = Jobs(self._transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    def sql(
        self,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        caches: Sequence[str] | None = None,
        snapshot: Mapping[str, int] | None = None,
        timeout_s: float | None = None,
        max_rows: int | None = None,
        max_bytes: int | None = None,
    ) -> SqlAnswer:
        """The answer to one question over the lake's views: `.arrow()`, `.pandas()`, `.polars()`, `.rows()`.

        `params` stand for `?` (a sequence) or `$name` (a mapping); limits default to the service's.
        """
        body: dict[str, Any] = {
            "sql": sql,
            "params": dict(params) if isinstance(params, Mapping) else list(params),
            "caches": None if caches is None else list(caches),
            "snapshot": dict(snapshot or {}),
            "timeout_ms": None if timeout_s is None else round(timeout_s * 1000),
            "max_rows": max_rows,
            "max_bytes": max_bytes,
        }
        return SqlAnswer(self._transport, body)

    def schema(self) -> list[dict[str, Any]]:
        """The views that SQL may ask, with their columns."""
        views: list[dict[str, Any]] = self._transport.get("/v1/schema")
        return views

    def caches(self) -> Iterator[dict[str, Any]]:
        """The caches that may be seen, with the figures of their newest snapshots."""
        return self._transport.pages("/v1/caches")

    def cache(self, name: str) -> dict[str, Any]:
        """One cache."""
        cache: dict[str, Any] = self._transport.get(f"/v1/caches/{quote(name, safe='')}")
        return cache

    def files(self, cache: str, snapshot: int) -> Iterator[dict[str, Any]]:
        """The committed files of a snapshot, each with its sha256 and where its bytes are."""
        return self._transport.pages(f"/v1/caches/{quote(cache, safe='')}/snapshots/{snapshot}/files")

    def errors(self, cache: str, code: str | None = None) -> Iterator[dict[str, Any]]:
        """Samples that were not captured, and why."""
        return self._transport.pages(f"/v1/caches/{quote(cache, safe='')}/errors", code=code)

    def sample(self, cache: str, sample_id: str, top: int = 5, student: str | None = None) -> dict[str, Any]:
        """A sample or a pair, token by token, with what the teacher would have said instead; beside it one of the
        document's `students`."""
        path = f"/v1/caches/{quote(cache, safe='')}/samples/{quote(sample_id, safe='')}"
        sample: dict[str, Any] = self._transport.get(path, top=top, student=student)
        return sample

    def caches_of(self, sample_id: str) -> list[str]:
        """The caches that hold a sample or pair of this id, by name; as far as they may be seen."""
        found = self.sql("SELECT DISTINCT cache FROM sample_index WHERE sample_id = ? ORDER BY cache", [sample_id])
        return [row["cache"] for row in found.rows()]

    def image(self, cache: str, sample_id: str, sha256: str) -> bytes:
        """An image of a sample as it was captured. Raises `ServiceError` where its bytes are not those of its name."""
        path = f"/v1/caches/{quote(cache, safe='')}/images/{sha256}"
        data = self._transport.get_bytes(path, sample_id=sample_id)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ServiceError(f"{path}: came with other bytes than its name says; ask again, or verify the lake")
        return data

    def runs(self) -> Iterator[dict[str, Any]]:
        """The runs of a student service that may be seen."""
        return self._transport.pages("/v1/runs")

    def run(self, name: str) -> dict[str, Any]:
        """One run: its stages and how far they are."""
        run: dict[str, Any] = self._transport.get(f"/v1/runs/{quote(name, safe='')}")
        return run

    def metrics(self, run: str, stage: str | None = None, after_step: int = 0) -> list[dict[str, Any]]:
        """The metrics of a run's stages, a line each `log_every` steps."""
        path = f"/v1/runs/{quote(run, safe='')}/metrics"
        metrics: list[dict[str, Any]] = self._transport.get(path, stage=stage, after_step=after_step)
        return metrics

    def checkpoints(self, run: str) -> list[dict[str, Any]]:
        """What is saved of a run: checkpoints and finished models."""
        saved: list[dict[str, Any]] = self._transport.get(f"/v1/runs/{quote(run, safe='')}/checkpoints")
        return saved

    def lake(self) -> Lake:
        """The service's lake, as readers take it: shards are fetched by range and verified."""
        return Lake.of(open_store(f"{self._transport.address}/v1/files", self._token))
