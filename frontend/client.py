"""A small blocking client of a Branchwise server: JSON in, JSON or server-sent events out. Standard library only.

For commands that make one request and print the answer; load is made by `branchwise.frontend.bench` instead.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ..runtime.errors import BranchwiseError, InvalidRequest

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class ServerError(BranchwiseError):
    """A server that cannot be reached or that refuses a request: one line for the user.

    ``status`` is 0 if the server is unreachable. ``answered`` says who refused and how, ``invalid`` what is wrong with
    the request, where the server named a field.
    """

    def __init__(
        self, message: str, status: int = 0, *, answered: str = "", invalid: InvalidRequest | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.answered = answered
        self.invalid = invalid


class ServerClient:
    """Talks to one server. Raises `ServerError`, and nothing else, when the server or the way to it fails.

    ``key_from``: where a person gives a key, for the message when one is wanted."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        key_from: str = "--api-key or BRANCHWISE_API_KEY",
    ) -> None:
        # People copy the address from an OpenAI client, whose base URL ends in /v1.
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1").rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"not a server's address: {url!r} (try http://127.0.0.1:8000)")
        self._has_key, self._key_from = bool(api_key), key_from
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._timeout = timeout
        # A proxy set for the outside world does not serve this machine's own loopback.
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> Any:
        return self._json(path, None)

    def get_text(self, path: str) -> str:
        return self._read(path, None).decode("utf-8", "replace")

    def post(self, path: str, body: Any) -> Any:
        return self._json(path, body)

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """The JSON of each ``data:`` line of a server-sent event stream, until ``[DONE]``."""
        with self._open(path, body) as response:
            while line := self._guarded(response.readline):
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = self._parse(data)
                if isinstance(event, dict) and "error" in event:
                    raise ServerError(error_message(event) or "the server ended the stream with an error")
                yield event

    def _json(self, path: str, body: Any) -> Any:
        return self._parse(self._read(path, body))

    def _read(self, path: str, body: Any) -> bytes:
        with self._open(path, body) as response:
            return self._guarded(response.read)

    def _open(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        return self._guarded(lambda: self._opener.open(request, timeout=self._timeout))

    def _guarded(self, action: Any) -> Any:
        try:
            return action()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read()) from error
        except urllib.error.URLError as error:
            raise ServerError(f"no server answers at {self.url} ({_reason(error)}); is it running?") from error
        except TimeoutError as error:
            raise ServerError(f"{self.url} did not answer within {self._timeout:g} s") from error
        except (http.client.HTTPException, OSError) as error:
            raise ServerError(f"the connection to {self.url} broke: {error}") from error

    def _refused(self, status: int, body: bytes) -> ServerError:
        if status == 401:
            problem = "refused this key: give another" if self._has_key else "wants a key: give it"
            return ServerError(f"{self.url} {problem} with {self._key_from}", status)
        try:
            return refused(self.url, status, json.loads(body))
        except ValueError:
            return refused(self.url, status, None)

    def _parse(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise ServerError(f"{self.url} answered something that is not JSON; is it a model server?") from error


def refused(url: str, status: int, reply: Any) -> ServerError:
    """The error for an answer with an error status; ``reply``: its JSON, None if it is not JSON."""
    said = error_message(reply) or "without saying why; is it a model server?"
    answered, invalid = f"{url} answered {status}", None
    param = reply["error"].get("param") if isinstance(reply, dict) and isinstance(reply.get("error"), dict) else None
    if isinstance(param, str) and said.startswith(f"{param} "):
        invalid = InvalidRequest(param, said.removeprefix(f"{param} "), status=status)
    return ServerError(f"{answered}: {said}", status, answered=answered, invalid=invalid)


def error_message(reply: Any) -> str | None:
    """The message of an error in OpenAI's shape, or in FastAPI's."""
    if not isinstance(reply, dict):
        return None
    error = reply.get("error", reply.get("detail"))
    return str(error.get("message", error)) if isinstance(error, dict) else (None if error is None else str(error))


def _reason(error: urllib.error.URLError) -> str:
    reason = error.reason
    return (reason.strerror or str(reason)).lower() if isinstance(reason, OSError) else str(reason)
