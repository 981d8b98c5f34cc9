"""Ask a model on an OpenAI-compatible server, many requests at a time. Replies are cached by content.

Rewards ask it for scores. It knows nothing of them, so that comparisons of two responses can ask it too.
"""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from utils import UserError, clipped, content_hash, printable, write_atomically

Messages = list[dict[str, str]]

BUSY = {408, 409, 425, 429}  # statuses of requests worth repeating, beside those from 500 on
OF_REQUEST = {400, 413, 422}  # statuses of a request that the server does not take; others may be fine
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a request is repeated; each wait doubles
MAX_REPLY_BYTES = 10 * 2**20
MIN_FAILED = 4  # requests in a row, after all their retries, before a server counts as down


class JudgeError(Exception):
    """A request has no reply, after all its retries."""


class _Retry(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """The reply to a request.

    Args:
        text: of the model; empty if it said nothing.
        error: in place of a reply; None for a reply.
        num_attempts: requests sent.
        is_cached: it was on disk, or of an equal request.
    """

    text: str
    error: JudgeError | None = None
    num_attempts: int = 0
    is_cached: bool = False


class ServerOptions(Protocol):
    """What users set of a server; see the judge of rewards.py, and Endpoint."""

    @property
    def model(self) -> str: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def extra(self) -> dict[str, Any]: ...
    @property
    def key_variable(self) -> str: ...
    @property
    def timeout(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def concurrency(self) -> int: ...


@dataclass(frozen=True)
class Server:
    """A model on an OpenAI-compatible server.

    Args:
        key: the reward or option that names it, for errors.
        url: up to and without /chat/completions.
        parameters: of each request, such as temperature.
        key_variable: the environment variable with the API key.
        timeout: seconds of a request.
        retries: of a request that has failed.
        concurrency: requests at a time.
        first_wait: seconds before the first retry.
    """

    key: str
    url: str
    model: str
    parameters: dict[str, Any] = field(default_factory=dict)
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    concurrency: int = 8
    first_wait: float = FIRST_WAIT

    @classmethod
    def of(cls, key: str, url: str, options: ServerOptions) -> "Server":
        """The server of a user's options. Those that are None are left to it."""
        parameters = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        return cls(
            key=key,
            url=url,
            model=options.model,
            parameters={name: value for name, value in parameters.items() if value is not None} | options.extra,
            key_variable=options.key_variable,
            timeout=options.timeout,
            retries=options.retries,
            concurrency=options.concurrency,
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: urllib would hand the API key to the other host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class JudgeClient:
    """Asks a server.

    Args:
        cache: directory of replies.

    Raises:
        UserError: CONFIG for a url of another kind, or with a password in it.
    """

    def __init__(self, server: Server, cache: Path):
        parts = urlsplit(server.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            fix = "give the address up to and without /chat/completions"
            raise UserError("CONFIG", f"{server.key}: {clipped(server.url)} is not an address of a server", fix)
        if parts.username is not None or parts.password is not None:
            problem = f"{server.key}: the url has a user or password in it, and urls are logged"
            raise UserError("CONFIG", problem, f"put the key into the environment variable {server.key_variable}")
        self._server, self._cache = server, cache
        self._api_key = os.environ.get(server.key_variable, "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):  # else an error of http would quote it
            problem = f"{server.key}: the environment variable {server.key_variable} holds no API key"
            raise UserError("CONFIG", problem, "correct it, or name another as key_variable")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._stop = threading.Event()
        self._num_failed = 0  # in a row

    def replies(self, conversations: Sequence[Messages]) -> Iterator[Reply]:
        """The reply to each conversation, in order. Equal ones are asked once.

        A server that fails as many requests in a row as are sent at a time gets no others: each takes minutes.

        Raises:
            UserError: CONFIG if the server refuses all requests, as for a wrong key or model.
        """
        texts = [self._body(messages) for messages in conversations]
        self._stop.clear()
        self._num_failed = 0
        with ThreadPoolExecutor(self._server.concurrency) as pool:
            futures = {text: pool.submit(self._reply, text) for text in dict.fromkeys(texts)}
            seen: set[str] = set()
            try:
                for text in texts:
                    reply = futures[text].result()
                    yield Reply(reply.text, reply.error, 0, True) if text in seen else reply
                    seen.add(text)
            finally:
                self._stop.set()  # nobody waits for the others any more
                pool.shutdown(wait=False, cancel_futures=True)

    def _body(self, messages: Messages) -> str:
        body = {"model": self._server.model, "messages": messages, **self._server.parameters}
        return json.dumps(body, sort_keys=True)

    def _reply(self, body: str) -> Reply:
        path = self._cache / f"{content_hash([self._server.url, body])}.json"
        try:
            return Reply(json.loads(path.read_bytes())["reply"], is_cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none, or damaged
        if self._num_failed >= max(self._server.concurrency, MIN_FAILED):
            return Reply("", JudgeError(f"{self._server.url}: not asked, as {self._num_failed} requests failed"))
        for attempt in range(self._server.retries + 1):
            try:
                text = self._request(body)
            except JudgeError as error:
                return Reply("", error, attempt + 1)
            except _Retry as error:
                reason = error
                if attempt == self._server.retries or self._stop.is_set():
                    break
                # Not all at the same moment.
                wait = min(self._server.first_wait * 2**attempt, LONGEST_WAIT) * random.Random().uniform(0.5, 1)
                self._stop.wait(max(wait, min(error.wait, LONGEST_WAIT)))
            else:
                self._num_failed = 0
                if text:  # an empty one may be a limit of tokens or a fault: ask again next time
                    write_atomically(path, json.dumps({"reply": text}).encode())
                return Reply(text, None, attempt + 1)
        self._num_failed += 1
        return Reply("", JudgeError(f"{self._server.url}: {reason}, after {attempt + 1} requests"), attempt + 1)

    def _request(self, body: str) -> str:
        """Send a request; returns the text of the reply."""
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        url = self._server.url.rstrip("/") + "/chat/completions"
        deadline = time.monotonic() + self._server.timeout
        try:
            request = urllib.request.Request(url, body.encode(), headers, method="POST")
            with self._opener.open(request, timeout=self._server.timeout) as response:
                return _text_of(_read(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                self._explain(error)
        except TimeoutError as error:
            raise _Retry(f"no reply within {self._server.timeout:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Retry(f"no reply within {self._server.timeout:g} s") from error
            raise _Retry(self._readable(str(error.reason))) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(self._readable(str(error) or type(error).__name__)) from error
        raise AssertionError("unreachable")

    def _explain(self, error: urllib.error.HTTPError) -> None:
        """Raise the error that stands for a status of HTTP."""
        reason = f"HTTP {error.code}"
        with suppress(OSError, http.client.HTTPException):  # else the status alone
            reason += f" {self._readable(error.read(2000).decode(errors='replace'))}"
        if error.code in BUSY or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            raise _Retry(reason, float(wait) if wait.isdecimal() else 0.0)
        if error.code in OF_REQUEST:
            raise JudgeError(f"{self._server.url}: {reason}")
        problem = f"{self._server.key}: {self._server.url} refuses requests ({reason})"
        key = "that of" if self._api_key else "as none is in"
        raise UserError("CONFIG", problem, f"check url, model and API key ({key} {self._server.key_variable})")

    def _readable(self, text: str) -> str:
        """The text as part of an error, without the API key: servers repeat it."""
        if self._api_key:
            text = text.replace(self._api_key, "***")
        return clipped(printable(text.strip()), 200)


def _read(response: Any, deadline: float) -> bytes:
    """Read a response. The timeout of a socket is of each packet: a slow server could send one at a time."""
    data = b""
    while chunk := response.read1(2**16):
        data += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(data) > MAX_REPLY_BYTES:
            raise _Retry(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
    return data


def _text_of(data: bytes) -> str:
    """The text of the first choice of a completion."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Retry("the reply is not a chat completion") from error
    if content is not None and not isinstance(content, str):
        raise _Retry("the reply is not a text")
    return content or ""
