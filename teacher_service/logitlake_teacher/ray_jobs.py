"""Captures as jobs of a Ray cluster, through its Jobs API.

A run is a command and its resolved configuration, named by their digest: the same submission twice is one run. What it
says lies in the lake (`jobs/<run>.toml`), so that a job's command line is a name that we made and nothing that a user
wrote, and a run outlives the cluster that it was submitted to. Each try is an attempt, `<run>-a<number>`; because a
capture goes on where it was stopped, an attempt costs what is left and no more.

Plain HTTP and not Ray's own client: no Ray is needed where jobs are submitted from, of whatever version. The token is
sent to the given address alone: a redirect is an error.
"""

import hashlib
import ipaddress
import json
import os
import shlex
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from logitlake_schemas import layout
from logitlake_shared.config import to_toml
from logitlake_shared.config_paths import absolute
from logitlake_shared.errors import ConfigError, JobError
from logitlake_shared.lake import Lake
from logitlake_teacher.config import CONFIGS, CaptureConfig, PairsConfig

__all__ = ["STOP_MARGIN_S", "Attempt", "RayJobs", "Run", "load_run", "store_run"]

# The job's driver finds its run by these: the name on its command line, the lake here.
LAKE_VARIABLE = "LOGITLAKE_JOB_LAKE"
_RUN_DIGITS = 12
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# The exit code of a driver that was asked to end, see `executors.stopping`.
_STOPPED = 143
_REQUEST_S = 30.0
# A head that has just started answers so (500) until the agents of its nodes have told it of themselves.
_NO_AGENT = "No available agent"
_AGENTS_S = 60.0
_AGENT_LOOK_S = 1.0
# After the grace for the units under way: the snapshot and the catalog. Then Ray kills.
STOP_MARGIN_S = 60


@dataclass(frozen=True)
class Run:
    """What a job is to do."""

    command: str
    """`capture` or `pairs`"""
    config: CaptureConfig | PairsConfig
    """resolved, its paths absolute: they must mean the same on the cluster's nodes"""

    @property
    def name(self) -> str:
        """`<command>-<digest of command and configuration>`."""
        return f"{self.command}-{hashlib.sha256(self.to_toml().encode()).hexdigest()[:_RUN_DIGITS]}"

    def to_toml(self) -> str:
        """As it lies in the lake."""
        return tomli_w.dumps({"command": self.command, "config": tomllib.loads(to_toml(self.config))})


@dataclass(frozen=True)
class Attempt:
    """One job of a run, as the cluster tells of it."""

    submission_id: str
    run: str
    number: int
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED"""
    message: str
    lake: str
    cache: str
    start_time_ms: int | None
    end_time_ms: int | None
    exit_code: int | None
    """the driver's, once it ended by itself"""

    @property
    def ended(self) -> bool:
        """Whether its status is final."""
        return self.status in _ENDED

    @property
    def code(self) -> int | None:
        """What its driver ended with, one that was asked to end included; None if it was killed, or goes on."""
        return {"SUCCEEDED": 0, "STOPPED": _STOPPED}.get(self.status, self.exit_code)


def store_run(command: str, config: CaptureConfig | PairsConfig) -> Run:
    """Puts a run into its lake, which is made if it is not there. Raises `LakeError`."""
    run = Run(command, absolute(config))
    lake = Lake.create(run.config.lake.uri)
    # Its name is its content: what is there already says the same.
    lake.store.put_new(layout.job_path(run.name), run.to_toml().encode())
    return run


def load_run(lake_uri: str, name: str) -> Run:
    """A run of the lake. Raises `JobError` if it holds none of that name, or one that somebody changed."""
    data = Lake.open(lake_uri).store.get(layout.job_path(name)) if layout.valid_name(name) else None
    if data is None:
        raise JobError(f"{lake_uri}: no run {name!r} in this lake; `logitlake-teacher jobs submit` makes one")
    document = tomllib.loads(data.decode())
    command = document["command"]
    run = Run(command, CONFIGS[command].model_validate(document["config"]))
    if run.name != name:
        raise JobError(
            f"{lake_uri}/{layout.job_path(name)}: its content is that of run {run.name}: it was edited, or written by "
            "another release; submit the configuration again"
        )
    return run


class RayJobs:
    """The Jobs API of one cluster."""

    def __init__(self, address: str | None) -> None:
        """`address`: `http(s)://host:port` of the dashboard; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

        Raises `ConfigError` if it is none, or if it is not this machine's and there is no token.
        """
        found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
        parts = urllib.parse.urlsplit(found)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"the address of the cluster's Jobs API is {found!r}, expected http(s)://host:port of its dashboard "
                "(port 8265); give --address, or set RAY_ADDRESS"
            )
        self.address = found.rstrip("/")
        token = _token()
        if token is None and not _is_loopback(parts.hostname):
            raise ConfigError(
                f"{self.address} is not this machine, and there is no token for it: the Jobs API runs any command of "
                "anybody. Start the cluster with RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here"
            )
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._opener = urllib.request.build_opener(_NoRedirect)

    def attempts(self, run: str | None = None) -> list[Attempt]:
        """The attempts of a run, or of all runs, oldest first. Jobs that are none of ours are left out."""
        found = [_attempt(job) for job in self._call("GET", "") if _is_ours(job)]
        return sorted(
            (one for one in found if run in (None, one.run)), key=lambda one: (one.start_time_ms or 0, one.number)
        )

    def find(self, name: str) -> Attempt:
        """The attempt of that submission id, or the newest of the run of that name. Raises `JobError`."""
        known = self.attempts()
        named = [one for one in known if one.submission_id == name] or [one for one in known if one.run == name]
        if not named:
            said = ", ".join(dict.fromkeys(one.run for one in known)) or "none"
            raise JobError(f"{self.address}: no run {name!r}; runs of this cluster: {said}")
        return max(named, key=lambda one: one.number)

    def get(self, submission_id: str) -> Attempt:
        """An attempt as it is now."""
        return _attempt(self._call("GET", submission_id))

    def submit(
        self,
        run: Run,
        number: int,
        submission_id: str | None = None,
        arguments: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> tuple[Attempt, bool]:
        """The attempt, and whether this call began it; False: somebody else submitted the same before.

        `submission_id` is its name at the cluster, `<run>-a<number>` unless somebody has one of their own; `arguments`
        and environment `variables` are its command's.
        """
        submission_id = submission_id or f"{run.name}-a{number}"
        environment = {
            LAKE_VARIABLE: run.config.lake.uri,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray kills three seconds after SIGTERM unless it is told otherwise.
            "RAY_JOB_STOP_WAIT_TIME_S": str(int(run.config.executor.grace_s) + STOP_MARGIN_S),
            **(variables or {}),
        }
        body = {
            # A shell reads it: nothing in it but names that were made here.
            "entrypoint": shlex.join(["logitlake-teacher", "jobs", "drive", run.name, "--", *arguments]),
            "submission_id": submission_id,
            "runtime_env": {"env_vars": environment},
            "metadata": {
                "logitlake_run": run.name,
                "logitlake_attempt": str(number),
                "logitlake_lake": run.config.lake.uri,
                "logitlake_cache": run.config.lake.cache,
            },
        }
        try:
            self._post_job(body)
        except JobError:
            # Ray answers a taken submission id like any failure: only a look tells them apart.
            known = [one for one in self.attempts(run.name) if one.submission_id == submission_id]
            if not known:
                raise
            return known[0], False
        return self.get(submission_id), True

    def stop(self, submission_id: str) -> None:
        """Asks the driver to end: it finishes the units under way and takes a snapshot. Twice is fine."""
        self._call("POST", f"{submission_id}/stop")

    def logs(self, submission_id: str) -> str:
        """All that the driver wrote until now."""
        text: str = self._call("GET", f"{submission_id}/logs")["logs"] or ""
        return text

    def _post_job(self, body: object) -> None:
        """Posts it, again while the cluster is still finding its agents: the submission id makes that one job."""
        end = time.monotonic() + _AGENTS_S
        while True:
            try:
                self._call("POST", "", body)
            except JobError as error:
                if _NO_AGENT not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(_AGENT_LOOK_S)
            else:
                return

    def _call(self, method: str, path: str, body: object = None) -> Any:
        url = f"{self.address}/api/jobs/{urllib.parse.quote(path)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers, method=method)  # http(s) alone
        try:
            with self._opener.open(request, timeout=_REQUEST_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise JobError(self._explain(error)) from error
        except OSError as error:
            raise JobError(
                f"{self.address}: no Jobs API answers: {getattr(error, 'reason', error)}; check the address, and that "
                "the head runs with its dashboard (ray[default])"
            ) from error
        except ValueError as error:
            raise JobError(f"{url}: not the answer of a Jobs API: {error}") from error

    def _explain(self, error: urllib.error.HTTPError) -> str:
        with error:
            said = " ".join(error.read(2000).decode(errors="replace").split())
        if error.code in (401, 403):
            return (
                f"{self.address} refused the token ({error.code}): set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the "
                "one that the cluster was started with"
            )
        return f"{self.address}: the Jobs API answered {error.code}: {said[-500:]}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the answer that it is: it could carry the token anywhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _token() -> str | None:
    """Where Ray itself looks, in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if given:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {given!r}, which cannot be read: {error}") from error
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_ours(job: Mapping[str, Any]) -> bool:
    return "logitlake_run" in (job.get("metadata") or {}) and bool(job.get("submission_id"))


def _attempt(job: Mapping[str, Any]) -> Attempt:
    metadata = job["metadata"]
    return Attempt(
        submission_id=job["submission_id"],
        run=metadata["logitlake_run"],
        number=int(metadata["logitlake_attempt"]),
        status=job["status"],
        message=" ".join((job.get("message") or "").split()),
        lake=metadata["logitlake_lake"],
        cache=metadata["logitlake_cache"],
        start_time_ms=job.get("start_time"),
        end_time_ms=job.get("end_time"),
        exit_code=job.get("driver_exit_code"),
    )
