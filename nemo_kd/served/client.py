"""HTTP requests to an inference server: bounded in number, timed and retried.

Connection errors, time-outs, 408, 429 and 5xx are retried after a wait that doubles, with jitter,
and is at least what `Retry-After` asks for. Other statuses are errors at once.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import msgspec
import tenacity

from nemo_kd.errors import NemoKDError
from nemo_kd.served import environment
from nemo_kd.served.answer import NOT_JSON
from nemo_kd.teacher.config import TeacherConfig
from nemo_kd.visible import visible

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between attempts, doubled each time
LONGEST_RETRY_AFTER = 3600.0  # seconds
CONNECT_TIMEOUT = 10.0  # seconds
SECONDS_BETWEEN_LINES = 10.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_SHOWN = 400
"""Characters of a server's message that an error repeats."""

LIMIT = re.compile(r"logprobs\b.*?(?:max(?:imum)? allowed|more than)\D*(\d+)", re.IGNORECASE)
"""A server's words for a K above its limit, such as vLLM's "Requested prompt logprobs of 100, which
is greater than max allowed: 20"."""


class ServedTeacherError(NemoKDError):
    """A server that cannot be reached or used as a teacher."""


class StatusError(ServedTeacherError):
    """An answer with an HTTP status that another attempt does not change."""

    def __init__(self, text: str, status: int, message: str) -> None:
        super().__init__(text)
        self.status, self.message = status, message


class _TryAgain(Exception):
    """A failure that may pass; `after` is the wait in seconds that the server asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class Client:
    """Asynchronous context manager for requests to the server at `teacher.url`.

    At most `teacher.concurrency` requests are in flight. `say` prints a line.
    """

    def __init__(
        self, config: TeacherConfig, say: Callable[[str], None], retries: int | None = None
    ) -> None:
        self.url = base_url(config.url)
        self.timeout, self.say = config.timeout, say
        self.attempts = 1 + (config.retries if retries is None else retries)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._last_line = -SECONDS_BETWEEN_LINES
        own = urlsplit(self.url).hostname in LOOPBACK  # no proxy to this machine
        self._proxy = "" if own else environment.proxy_of(self.url)
        headers = {"Content-Type": "application/json", **_authorization(config)}
        try:
            self._http = httpx.AsyncClient(
                headers=headers,
                # The time-out of a request is that of `_attempt`; httpx's is between two packets.
                timeout=httpx.Timeout(None, connect=min(CONNECT_TIMEOUT, config.timeout)),
                limits=httpx.Limits(max_connections=config.concurrency),
                trust_env=not own,
            )
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise ServedTeacherError(environment.fault_of(error)) from error

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> bytes:
        """Return the content at a path; see `post`."""
        return await self._request("GET", path)

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Send a JSON body; return the content of the answer.

        Raises StatusError for a status that is not retried, ServedTeacherError after
        `teacher.retries` retries.
        """
        return await self._request("POST", path, msgspec.json.encode(body))

    async def _request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=_wait,
            retry=tenacity.retry_if_exception_type(_TryAgain),
            before_sleep=self._report,
            reraise=True,
        )
        async with self._slots:
            try:
                return bytes(await retrying(self._attempt, method, path, content))
            except _TryAgain as error:
                proxy = f" and the proxy of the variable {self._proxy}" if self._proxy else ""
                raise ServedTeacherError(
                    f"{self.url}{path}: {error}, after {self.attempts} attempts; check the server "
                    f"and teacher.url{proxy}, and run the same command to resume (teacher.retries "
                    "and teacher.timeout set the patience)"
                ) from error

    async def _attempt(self, method: str, path: str, content: bytes | None) -> bytes:
        try:
            async with asyncio.timeout(self.timeout):
                answer = await self._http.request(method, f"{self.url}{path}", content=content)
        except TimeoutError as error:
            raise _TryAgain(f"no answer within teacher.timeout={self.timeout:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if answer.is_success:
            return answer.content
        message = _message(answer.content)
        status = f"{answer.status_code} {answer.reason_phrase}"
        passes = answer.status_code in (408, 429) or answer.status_code >= 500
        if passes and LIMIT.search(message) is None:
            raise _TryAgain(f"{status}: {message}", _retry_after(answer.headers))
        raise StatusError(
            f"{self.url}{path}: {status}: {message}{_hint(answer, path)}",
            answer.status_code,
            message,
        )

    def _report(self, state: tenacity.RetryCallState) -> None:
        """Print why a request is repeated, at most once in SECONDS_BETWEEN_LINES."""
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        assert state.outcome is not None and state.next_action is not None
        self.say(
            f"{self.url}: {state.outcome.exception()}; attempt {state.attempt_number + 1} of "
            f"{self.attempts} in {state.next_action.sleep:.1f} s"
        )


def base_url(url: str | None) -> str:
    """Return `teacher.url` without a trailing `/` or `/v1`."""
    return (url or "").rstrip("/").removesuffix("/v1").rstrip("/")


def _authorization(config: TeacherConfig) -> dict[str, str]:
    """Return the header with the key in the environment variable `teacher.api_key_env`."""
    name = config.api_key_env
    if name is None:
        return {}
    key = os.environ.get(name, "").strip()
    if not key:
        raise ServedTeacherError(
            f"teacher.api_key_env={name}, but this environment variable is empty or not set"
        )
    if not (key.isascii() and key.isprintable()):
        raise ServedTeacherError(
            f"the environment variable {name} holds characters that no API key has"
        )
    return {"Authorization": f"Bearer {key}"}


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds to wait after a failed attempt; jitter keeps requests apart."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.after if isinstance(error, _TryAgain) else 0.0
    backoff = min(FIRST_WAIT * 2 ** (state.attempt_number - 1), LONGEST_WAIT)
    return max(backoff, asked) + random.uniform(0, backoff / 2)


def _retry_after(headers: httpx.Headers) -> float:
    """Return the seconds that `Retry-After` asks for: a number or a date (RFC 9110, 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value), LONGEST_RETRY_AFTER)
    try:
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


class _Detail(msgspec.Struct):
    message: str = ""


class _Error(msgspec.Struct):
    error: _Detail | str | None = None
    message: str = ""
    detail: Any = None


def _message(content: bytes) -> str:
    """Return a server's own error message in one line, from the JSON of OpenAI's API or as text."""
    try:
        found = msgspec.json.decode(content, type=_Error)
        inner = found.error.message if isinstance(found.error, _Detail) else found.error
        text = inner or found.message or str(found.detail or "")
    except NOT_JSON:
        text = ""
    text = text or content[: 4 * MAX_SHOWN].decode("utf-8", "replace")
    return visible(" ".join(text.split()))[:MAX_SHOWN] or "no message"


def _hint(answer: httpx.Response, path: str) -> str:
    if answer.status_code in (401, 403):
        return (
            "; set teacher.api_key_env to the name of the environment variable that holds the key"
        )
    if answer.status_code == 404:
        return "; check teacher.url, teacher.api and teacher.model"
    if answer.is_redirect:
        return _redirected(str(answer.url), answer.headers.get("Location", ""), path)
    return ""


def _redirected(url: str, location: str, path: str) -> str:
    """Advise the address of the server to which the request of a `path` was redirected."""
    try:
        target = urlsplit(urljoin(url, location))
    except ValueError:
        return f"; it redirects to {visible(location)[:MAX_SHOWN]}, which is no address"
    shown = visible(target.geturl())[:MAX_SHOWN]
    before = target.path.rstrip("/").removesuffix(path)
    if before == target.path.rstrip("/") or target.geturl() == url:
        return f"; it redirects to {shown}: set teacher.url to the server that answers itself"
    return (
        f"; set teacher.url to {visible(f'{target.scheme}://{target.netloc}{before}')[:MAX_SHOWN]}"
    )
