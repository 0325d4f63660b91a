"""Logs as lines of JSON, one schema: time, level, logger, message, the ids of what was going on, and no secret.

The formatter is the last to touch a line, so what looks like a token leaves as `llk_***` wherever it came from: a
header that somebody printed, a query, an exception's text.
"""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

from logitlake_shared.web.tokens import without_tokens

__all__ = ["REQUEST_ID", "TRACE_ID", "JsonFormatter", "log_to"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""of the request that is being answered"""
TRACE_ID: ContextVar[str | None] = ContextVar("trace_id", default=None)
"""of the trace that it belongs to, while traces are on"""

_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; keywords of `extra` are keys of the line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a newline."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        if (trace_id := TRACE_ID.get()) is not None:
            line["trace_id"] = trace_id
        line |= {key: value for key, value in vars(record).items() if key not in _KNOWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_tokens(json.dumps(line, default=str))


def log_to(stream: TextIO = sys.stderr, level: int = logging.INFO) -> None:
    """Sends every log of the process to `stream` as JSON, those of uvicorn included."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
