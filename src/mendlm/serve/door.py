"""The service's door: an ASGI layer that every request passes before anything else sees it.

It asks for a bearer token where there are tokens, and for a request from this machine where there are none; it takes no body
that is too large, too slow, or not strict JSON; it gives every answer its security headers; it counts; and it turns an error
that nobody foresaw into an answer that says nothing about the server.

Without tokens, any web page that the user opens could send requests to a port of the user's machine. So the Host header must
name this machine (against DNS rebinding), and a request that changes something must not come from another origin.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import from_json

from mendlm.errors import FormatError
from mendlm.serve.metrics import Metrics
from mendlm.serve.problems import Problem, problem_of
from mendlm.serve.tokens import Token, Tokens

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SAFE = ("GET", "HEAD", "OPTIONS")
METHODS = (*SAFE, "POST", "PUT", "PATCH", "DELETE")
READERS_POST = ("/v1/completions", "/v1/chat/completions", "/v1/preview")
"""What a token of the role `read` may post to. All else that is no `SAFE` method needs `edit`."""
CLOSED_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
CALLER, NUMBER = "mendlm.caller", "mendlm.number"
"""Where a request's scope has the name of its token, and the number under which the log tells of it."""
_log = logging.getLogger("mendlm.serve")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the door lets in."""

    body: int = 2**20
    """Bytes of a request's body."""
    seconds: float = 30.0
    """In which the body must have come, and each part of the answer be taken."""
    requests: int = 256
    """Requests that are answered at a time."""
    public: Collection[str] = ("/", "/healthz", "/openapi.json", "/docs")
    """Paths that need no token."""


class Door:
    """An ASGI layer around `app`."""

    def __init__(self, app: App, *, tokens: Tokens | None, metrics: Metrics, rules: Rules) -> None:
        self.app, self.tokens, self.metrics, self.rules = app, tokens, metrics, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":  # there are none here
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status, number = time.perf_counter(), 0, secrets.token_hex(8)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_headers(message.get("headers", ()), number)}
            async with asyncio.timeout(self.rules.seconds):
                await send(message)

        scope[NUMBER] = number
        self.metrics.open += 1
        try:
            inside = await self._let_in(scope, receive)
            await self.app(scope, inside, answer)
        except Problem as problem:
            await _refuse(problem, answer)
        except TimeoutError:
            if not status:
                raise
            _log.warning("request %s: the client does not read its answer", number)
        except Exception as error:
            _log.exception("request %s failed", number)
            if status:  # the client sees an answer that was cut off
                raise
            await _refuse(problem_of(error), answer)
        finally:
            self.metrics.open -= 1
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.answered(method, route, status, time.perf_counter() - begun)

    async def _let_in(self, scope: Scope, receive: Receive) -> Receive:
        """Raise `Problem`, or return the request's messages anew: its whole body, then what comes after it."""
        if self.metrics.open > self.rules.requests:
            raise Problem(429, f"{self.rules.requests} requests are being answered, the most at a time; try again", "busy")
        if self.tokens is None:
            _require_local(scope)
        elif scope["path"] not in self.rules.public or scope["method"] not in SAFE:
            scope[CALLER] = _known(self.tokens, scope).name
        return receive if scope["method"] in SAFE else await self._body(scope, receive)

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        try:
            async with asyncio.timeout(self.rules.seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            raise Problem(408, f"the body did not come within {self.rules.seconds:g} seconds", "slow_body") from None
        if body:
            _require_json(scope, body)
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        most = self.rules.body
        large = Problem(413, f"the body is larger than {most:,} bytes, the most that is taken", "too_large")
        said = _one(scope, "content-length")
        if said is not None and said.isdecimal() and (len(said) > 18 or int(said) > most):
            raise large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "the request ended before its body did", "cut_off")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise large
        return bytes(body)


def _values(scope: Scope, name: str) -> Iterator[str]:
    return (value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name.encode())


def _one(scope: Scope, name: str) -> str | None:
    """A header that may come once."""
    found = list(_values(scope, name))
    if len(found) > 1:
        raise Problem(400, f"the header {name} comes {len(found)} times; send it once", "bad_header")
    return found[0].strip() if found else None


def _known(tokens: Tokens, scope: Scope) -> Token:
    """The request's token, if it may do what is asked."""
    kind, _, secret = (_one(scope, "authorization") or "").partition(" ")
    try:
        token = tokens.find(secret.strip()) if kind.lower() == "bearer" else None
    except FormatError as error:
        _log.error("no token is valid: %s", error)
        raise Problem(503, "the server cannot read its tokens; its log says why", "no_tokens") from None
    if token is None:
        raise Problem(401, "this needs a token: send the header 'Authorization: Bearer TOKEN' with a valid one", "no_token")
    needs_edit = scope["method"] not in SAFE and scope["path"] not in READERS_POST
    if needs_edit and token.role != "edit":
        raise Problem(403, f"a token of the role '{token.role}' may not change anything; this needs the role 'edit'", "role")
    return token


def _require_local(scope: Scope) -> None:
    """Raise `Problem` unless the request names this machine, and comes from no other web page."""
    host = _one(scope, "host") or ""
    if not is_loopback(_name_in(f"//{host}") or ""):
        message = "the Host header must name this machine, as localhost or 127.0.0.1; a server for others needs tokens"
        raise Problem(403, message, "host")
    if scope["method"] in SAFE:
        return
    origin = _one(scope, "origin")
    strange = origin is not None and origin.lower() != f"{scope.get('scheme', 'http')}://{host}".lower()
    if strange or _one(scope, "sec-fetch-site") in ("cross-site", "same-site"):
        raise Problem(403, "a request that comes from a web page of another origin may not change anything here", "origin")


def _name_in(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require_json(scope: Scope, body: bytes) -> None:
    """Raise `Problem` for a body that is not strict JSON: no NaN, no lone surrogates, not nested beyond 200 levels."""
    kind = (_one(scope, "content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, f"the content type {kind[:80]!r} is not taken; send application/json", "content_type")
    if (coding := _one(scope, "content-encoding")) not in (None, "identity"):
        raise Problem(
            415, f"the content encoding {str(coding)[:80]!r} is not taken; send the body as it is", "content_encoding"
        )
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, f"the body is not valid JSON: {error}", "bad_json") from None


def _with_headers(headers: Any, number: str) -> list[tuple[bytes, bytes]]:
    given = [(bytes(name), bytes(value)) for name, value in headers]
    has = {name.lower() for name, _ in given}
    more = {**HEADERS, "content-security-policy": CLOSED_POLICY, "x-request-id": number}
    return given + [(n.encode(), v.encode()) for n, v in more.items() if n.encode() not in has]


async def _refuse(problem: Problem, send: Send) -> None:
    body = json.dumps(problem.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
    if problem.status in (408, 413):  # the rest of the body is not read
        headers["connection"] = "close"
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
