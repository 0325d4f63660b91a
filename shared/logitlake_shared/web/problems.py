"""Every error that a service answers with: RFC 9457 `application/problem+json`, from one table of codes.

A code is a promise: its status, whether trying again can help, and a row of `docs/errors.md`, which the service shows
at `type`. Text that a user reads names no path of the machine. What is none of the user's doing is `internal`, with the
request id under which the log has the traceback, and nothing else of it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, Field

from logitlake_shared.errors import (
    ConfigError,
    DataError,
    EngineError,
    FingerprintMismatchError,
    JobError,
    JobStateError,
    JobSubmitError,
    LakeConflictError,
    LakeCorruptError,
    LakeError,
    LakeFormatError,
    LogitLakeError,
    NotInLakeError,
    QueryBusyError,
    QueryCancelledError,
    QueryCrashedError,
    QueryError,
    QueryMemoryError,
    QueryRefusedError,
    QueryTimeoutError,
    QueryTooLargeError,
    RunFilesError,
    ScoresError,
)
from logitlake_shared.web.tokens import without_tokens

__all__ = ["CODES", "Code", "Problem", "ProblemDocument", "problem_of", "scrubbed"]

MEDIA_TYPE = "application/problem+json"
_DOCS = "/errors"


@dataclass(frozen=True)
class Code:
    """A row of the table."""

    name: str
    status: int
    title: str
    hint: str
    """what to do, for whoever meets it"""
    retryable: bool = False
    """whether the same request may succeed later"""


CODES = {
    code.name: code
    for code in (
        Code("unauthenticated", 401, "No valid token", "send `Authorization: Bearer TOKEN`; tokens expire, too"),
        Code("forbidden", 403, "The token may not do this", "ask for a token of the scope that `detail` names"),
        Code(
            "not_found", 404, "Nothing of that name", "list what there is; what your token does not cover is not there"
        ),
        Code("method_not_allowed", 405, "Another method is wanted", "`Allow` names the methods"),
        Code("not_acceptable", 406, "No such representation", "`Accept` one of the media types in `detail`"),
        Code("request_timeout", 408, "The request did not come", "send its body faster, or less of it", retryable=True),
        Code("conflict", 409, "It is in another state", "look at it again, then decide"),
        Code("fingerprint_mismatch", 409, "These do not belong together", "`detail` names the field that differs"),
        Code("precondition_failed", 412, "It was changed meanwhile", "look at it again; send its `ETag` as `If-Match`"),
        Code("body_too_large", 413, "The body is too large", "send less than `detail` says"),
        Code("range_not_satisfiable", 416, "That part is not there", "`Content-Range` says how much there is"),
        Code("misdirected", 421, "Another host was asked for", "use a name that this service answers to"),
        Code("invalid_request", 422, "The request is not valid", "`errors` points at each fault"),
        Code("key_reused", 422, "The key is another request's", "send the same body again, or take another key"),
        Code("config_invalid", 422, "The configuration is not valid", "mend what `detail` names"),
        Code("data_invalid", 422, "The data is not valid", "mend the records that `detail` names"),
        Code("query_refused", 422, "That is not answered", "ask one SELECT over the views of `/v1/schema`"),
        Code("query_too_heavy", 422, "The question needs too much", "ask for fewer rows, or aggregate more"),
        Code("query_cancelled", 409, "The question was cancelled", "ask again", retryable=True),
        Code("query_failed", 422, "The query failed", "`detail` is DuckDB's own explanation"),
        Code("too_many_requests", 429, "Too many requests", "wait for `Retry-After` seconds", retryable=True),
        Code("internal", 500, "Our fault", "report `request_id`; the log has more under it"),
        Code("lake_corrupt", 500, "Committed bytes are damaged", "run `logitlake verify --repair` on the lake"),
        Code("lake_unusable", 500, "The lake cannot be read", "look at the lake's storage; `detail` says what failed"),
        Code(
            "scores_corrupt", 500, "A student's scores are damaged", "remove their file, run `logitlake-student score`"
        ),
        Code("run_corrupt", 500, "A run's files are damaged", "restore what `detail` names, or train the stage again"),
        Code("query_crashed", 502, "The question's process ended", "ask again, or ask for less", retryable=True),
        Code("upstream_failed", 502, "The cluster or engine failed", "look at its own log", retryable=True),
        Code("shutting_down", 503, "The service is ending", "try again soon", retryable=True),
        Code("timeout", 504, "It took too long", "ask for less, or for more time", retryable=True),
    )
}

# Of more classes than one the first counts: what is special stands before what it is a case of.
_OF_ERROR: tuple[tuple[type[LogitLakeError], str], ...] = (
    (QueryRefusedError, "query_refused"),
    (QueryTimeoutError, "timeout"),
    (QueryMemoryError, "query_too_heavy"),
    (QueryTooLargeError, "query_too_heavy"),
    (QueryCancelledError, "query_cancelled"),
    (QueryCrashedError, "query_crashed"),
    (QueryError, "query_failed"),
    (FingerprintMismatchError, "fingerprint_mismatch"),
    (LakeConflictError, "conflict"),
    (LakeCorruptError, "lake_corrupt"),
    (LakeFormatError, "lake_unusable"),
    (NotInLakeError, "not_found"),
    (LakeError, "lake_unusable"),
    (ScoresError, "scores_corrupt"),
    (RunFilesError, "run_corrupt"),
    (ConfigError, "config_invalid"),
    (DataError, "data_invalid"),
    (JobStateError, "conflict"),
    (JobSubmitError, "key_reused"),
    (JobError, "upstream_failed"),
    (EngineError, "upstream_failed"),
)
_OF_STATUS = {code.status: code.name for code in reversed(CODES.values())}

# A path from the root, two parts deep or more, that is neither the path of an address nor a pointer into a document.
_PATH = re.compile(r"(?<![\w:/.…}])/(?:[\w.@+#-]+/)+(?P<last>[\w.@+#-]*)")


class FieldError(BaseModel):
    """A fault of one field of the request."""

    pointer: str = Field(examples=["/body/timeout_s"])
    """JSON pointer into body, query or path"""
    detail: str = Field(examples=["Input should be greater than 0"])


class ProblemDocument(BaseModel):
    """The body of every answer that is an error (RFC 9457)."""

    type: str = Field(examples=[f"{_DOCS}#not_found"])
    title: str = Field(examples=["Nothing of that name"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["no cache 'main'"])
    code: str = Field(examples=["not_found"])
    hint: str = Field(examples=["list what there is"])
    retryable: bool = Field(examples=[False])
    request_id: str | None = Field(default=None, examples=["req_01K0000000000000000000000"])
    trace_id: str | None = Field(default=None, examples=["4bf92f3577b34da6a3ce929d0e0e4736"])
    """of the trace that the request belongs to; only there while traces are on"""
    errors: list[FieldError] = []


@dataclass(eq=False)
class Problem(Exception):  # noqa: N818  # the RFC's word
    """An answer that is an error. `code` is one of `CODES`."""

    code: str
    detail: str
    errors: Sequence[FieldError] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """HTTP's."""
        return CODES[self.code].status

    def document(self, request_id: str | None, trace_id: str | None = None) -> dict[str, Any]:
        """The body."""
        code = CODES[self.code]
        document = ProblemDocument(
            type=f"{_DOCS}#{code.name}",
            title=code.title,
            status=code.status,
            detail=scrubbed(self.detail),
            code=code.name,
            hint=code.hint,
            retryable=code.retryable,
            request_id=request_id,
            trace_id=trace_id,
            errors=list(self.errors),
        )
        return document.model_dump(mode="json", exclude={"trace_id"} if trace_id is None else None)


def problem_of(error: Exception) -> Problem:
    """What an exception is to the user."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, QueryBusyError):
        return Problem("too_many_requests", str(error), headers={"Retry-After": str(error.retry_after_s)})
    for cls, code in _OF_ERROR:
        if isinstance(error, cls):
            return Problem(code, str(error))
    return Problem("internal", "an unexpected error")


def problem_of_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Problem:
    """What a status that the framework came to is to the user."""
    other = "invalid_request" if 400 <= status < 500 else "internal"
    return Problem(_OF_STATUS.get(status, other), detail, headers=dict(headers or {}))


def scrubbed(text: str) -> str:
    """The text with every path of the machine cut to its last part, and no token."""
    return without_tokens(_PATH.sub(lambda path: f"…/{path['last']}", text))
