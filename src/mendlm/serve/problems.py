"""What went wrong, as a client is told: an HTTP status and OpenAI's form of an error.

A message is about what the client sent. What concerns the server, a path or a traceback, stays in the server's log.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from mendlm.errors import GateError, InputError, MendError, NumericalError, StorageError
from mendlm.serve.worker import Busy, Closed, TimedOut, UnknownEdit

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_AGAIN = {429: "1", 503: "5", 504: "5"}
"""Seconds after which it is worth while to try again."""


class Problem(Exception):
    """Why a request is refused: an HTTP status, a message, a code for programs, and the field that is wrong."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, checks: Sequence[Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.checks = status, message, code, param, checks

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error if self.checks is None else {**error, "checks": list(self.checks)}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        found = {"Retry-After": _AGAIN[self.status]} if self.status in _AGAIN else {}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error."""
    match error:
        case Problem():
            return error
        case UnknownEdit():
            return Problem(404, str(error), "unknown_edit")
        case Busy():
            return Problem(429, str(error), "busy")
        case Closed():
            return Problem(503, "the service is closing, and takes no more work", "closing")
        case TimedOut():
            return Problem(504, str(error), "too_late")
        case GateError():
            return Problem(409, str(error), "gate_refused", checks=error.checks)
        case StorageError():
            if isinstance(error.__cause__, sqlite3.Error) and getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF in (
                sqlite3.SQLITE_BUSY,
                sqlite3.SQLITE_LOCKED,
            ):
                return Problem(503, "another process holds the store; try again", "store_busy")
            return Problem(507, "the server cannot write: its disk is full, or read-only; nothing was changed", "storage")
        case NumericalError():
            return Problem(400, str(error), "not_finite")
        case InputError():
            return Problem(400, str(error), "bad_input")
        case MendError():
            return Problem(500, "the server's model or store cannot be used; its log says why", "damaged")
    return Problem(500, "something went wrong in the server; its log says what", "internal")
