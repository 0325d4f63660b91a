"""Requests to one service: its address, its token, its problems as one exception; lists by the page.

What may be sent twice (reading, and whatever has an idempotency key) is sent again when the service is busy or the
connection breaks, for a bounded time; nothing else is. A token never goes unencrypted to another machine.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    import httpx
except ModuleNotFoundError as missing:
    from logitlake_shared.errors import ConfigError

    raise ConfigError(f"the client needs {missing.name}; pip install 'logitlake[client]'") from None

from logitlake_shared.errors import ConfigError, ServiceError
from logitlake_shared.store import token_headers

__all__ = ["Transport", "service_error"]

_PAGE = 200
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 10.0


class Transport:
    """One service's."""

    def __init__(self, address: str, token: str | None, timeout_s: float, patience_s: float) -> None:
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"{address!r}: not the address of a service, expected http(s)://host:port")
        self._patience_s = patience_s
        headers = {"Accept": "application/json"} | token_headers(self.address, token)
        # No environment: a proxy or a .netrc that happens to be there is not asked, and gets no token.
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """The JSON document at a path. Parameters that are None are left out. Raises `ServiceError`."""
        return self._answer("GET", path, params=_given(params), again=True).json()

    def get_bytes(self, path: str, **params: Any) -> bytes:
        """The bytes at a path. Raises `ServiceError`."""
        return self._answer("GET", path, params=_given(params), again=True).content

    def post(self, path: str, body: Any = None, *, key: str | None = None, **params: Any) -> Any:
        """The JSON answer to a JSON body. With an idempotency `key` it is sent again where that helps."""
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = self._answer("POST", path, params=_given(params), json=body, headers=headers, again=key is not None)
        return answer.json()

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """The items of a list, page after page."""
        cursor = None
        while True:
            page = self.get(path, limit=_PAGE, cursor=cursor, **params)
            yield from page["data"]
            cursor = page["next_cursor"]
            if not page["has_more"]:
                return

    @contextmanager
    def stream(self, method: str, path: str, **asked: Any) -> Iterator[httpx.Response]:
        """An answer that is read while it comes. Raises `ServiceError`, also where it breaks off."""
        try:
            with self._http.stream(method, path, **asked) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise service_error(answer)
                yield answer
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _answer(self, method: str, path: str, *, again: bool, **asked: Any) -> httpx.Response:
        end, wait_s = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        while True:
            try:
                answer = self._http.request(method, path, **asked)
            except httpx.HTTPError as error:
                failed, wanted_s = self._unreachable(error), wait_s
                failed.__cause__ = error
            else:
                if answer.status_code < 400:
                    return answer
                failed = service_error(answer)
                wanted_s = float(answer.headers.get("retry-after", wait_s))
            # Busy services (429, 503) have done nothing: then anything may be sent again.
            may_again = failed.status in (429, 503) or (again and (failed.retryable or not failed.status))
            if not may_again or time.monotonic() + wanted_s > end:
                raise failed
            time.sleep(wanted_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _unreachable(self, error: Exception) -> ServiceError:
        return ServiceError(f"{self.address}: no answer: {error or type(error).__name__}; check that it runs")


def service_error(answer: httpx.Response) -> ServiceError:
    """The problem that an answer is."""
    try:
        problem = answer.json()
        said = f"{problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        problem, said = {}, answer.text[:200]
    number = problem.get("request_id")
    error = ServiceError(f"{answer.url.copy_with(query=None)}: {said}" + (f" ({number})" if number else ""))
    error.status, error.request_id = answer.status_code, number
    error.code, error.hint = problem.get("code", f"http_{answer.status_code}"), problem.get("hint", "")
    error.retryable = bool(problem.get("retryable", answer.status_code in (502, 503, 504)))
    return error


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
