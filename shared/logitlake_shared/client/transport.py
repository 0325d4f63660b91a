"""Requests to one service: its address, its token, its problems as one exception; lists by the page.

What may be sent twice (reading, and whatever has an idempotency key) is sent again when the service is busy or the
connection breaks, for a bounded time; nothing else is. A token never goes unencrypted to another machine.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

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
        if "@" in self.address:  # it would be in every message
            raise ConfigError("the address of a service holds no user and no password; what opens it is a token")
        try:
            urlsplit(self.address)
        except ValueError as error:
            raise ConfigError(f"{address!r}: not the address of a service: {error}") from None
        self._patience_s = patience_s
        headers = {"Accept": "application/json"} | token_headers(self.address, token)
        # No environment: a proxy or a .netrc that happens to be there is not asked, and gets no token.
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def get(self, path: str, **params: Any) -> Any:
        """The JSON document at a path. Parameters that are None are left out. Raises `ServiceError`."""
        return _document(self._answer("GET", path, params=_given(params), again=True))

    def get_bytes(self, path: str, **params: Any) -> bytes:
        """The bytes at a path. Raises `ServiceError`."""
        return self._answer("GET", path, params=_given(params), again=True).content

    def post(self, path: str, body: Any = None, *, key: str | None = None, **params: Any) -> Any:
        """The JSON answer to a JSON body. With an idempotency `key` it is sent again where that helps."""
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = self._answer("POST", path, params=_given(params), json=body, headers=headers, again=key is not None)
        return _document(answer)

    def patch(self, path: str, body: Any, *, tag: str | None = None) -> Any:
        """The JSON answer to a JSON body that says what is to be there: sent again where that helps.

        With a `tag`, only where what is edited still has it; that is sent once, for the second time would find another.
        """
        headers = {} if tag is None else {"If-Match": f'"{tag}"'}
        return _document(self._answer("PATCH", path, json=body, headers=headers, again=tag is None))

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """The items of a list, page after page."""
        cursor = None
        while True:
            page = self.get(path, limit=_PAGE, cursor=cursor, **params)
            if not isinstance(page, dict) or not {"data", "has_more", "next_cursor"} <= page.keys():
                raise ServiceError(f"{self.address}{path}: answers with no page of a list; is it a LogitLake service?")
            yield from page["data"]
            if not page["has_more"]:
                return
            if page["next_cursor"] == cursor:
                raise ServiceError(f"{self.address}{path}: the list does not go on: every page names the same next one")
            cursor = page["next_cursor"]

    @contextmanager
    def stream(self, method: str, path: str, **asked: Any) -> Iterator[httpx.Response]:
        """An answer that is read while it comes. Raises `ServiceError`, also where it breaks off."""
        patience = _Patience(self._patience_s)
        while True:
            try:
                with self._http.stream(method, path, **asked) as answer:
                    if answer.is_success:
                        yield answer
                        return
                    answer.read()
                    failed = service_error(answer)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            patience.wait(failed, again=False)

    def _answer(self, method: str, path: str, *, again: bool, **asked: Any) -> httpx.Response:
        patience = _Patience(self._patience_s)
        while True:
            try:
                answer = self._http.request(method, path, **asked)
            except httpx.HTTPError as error:
                failed = self._unreachable(error)
                failed.__cause__ = error
            else:
                if answer.is_success:
                    return answer
                failed = service_error(answer)
            patience.wait(failed, again=again)

    def _unreachable(self, error: Exception) -> ServiceError:
        return ServiceError(f"{self.address}: no answer: {error or type(error).__name__}; check that it runs")


class _Patience:
    """How long it is worth asking again."""

    def __init__(self, seconds: float) -> None:
        self._end, self._wait_s = time.monotonic() + seconds, _FIRST_WAIT_S

    def wait(self, failed: ServiceError, *, again: bool) -> None:
        """Returns when it is time to ask again; raises `failed` where that is no use, or comes too late.

        Busy services (429, 503) have done nothing: they may be asked anything again. Where `again` says that twice is
        as good as once, so may those that failed, and those that did not answer.
        """
        wanted_s = self._wait_s if failed.retry_after_s is None else failed.retry_after_s
        is_worth_it = failed.status in (429, 503) or (again and (failed.retryable or not failed.status))
        if not is_worth_it or time.monotonic() + wanted_s > self._end:
            raise failed
        time.sleep(wanted_s)
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)


def service_error(answer: httpx.Response) -> ServiceError:
    """The problem that an answer is."""
    try:
        problem = answer.json()
        said = f"{problem['title']}: {problem['detail']}"
    except (ValueError, KeyError, TypeError):
        problem, said = {}, f"{answer.status_code} {answer.text[:200]!r}, which is no answer of a LogitLake service"
    number = problem.get("request_id")
    error = ServiceError(f"{answer.url.copy_with(query=None)}: {said}" + (f" ({number})" if number else ""))
    error.status, error.request_id = answer.status_code, number
    error.code, error.hint = problem.get("code", f"http_{answer.status_code}"), problem.get("hint", "")
    error.retryable = bool(problem.get("retryable", answer.status_code in (502, 503, 504)))
    error.retry_after_s = _seconds(answer.headers.get("retry-after"))
    return error


def _document(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise service_error(answer) from None


def _seconds(retry_after: str | None) -> float | None:
    """RFC 9110: seconds, or a date."""
    if retry_after is None or retry_after.isdecimal():
        return None if retry_after is None else float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
