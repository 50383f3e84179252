"""A port to listen on, and a server on it that ends well: it takes nothing new, finishes what it has, and returns."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from mendlm.errors import InputError, require

_LOG = logging.getLogger("mendlm.serve")
BACKLOG = 256
"""Connections that may wait to be accepted."""
_LOG_CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": level, "propagate": False}
        for name, level in (("uvicorn", "WARNING"), ("uvicorn.access", "INFO"), ("mendlm.serve", "INFO"))
    },
}


def bound(host: str, port: int, *, guarded: bool) -> socket.socket:
    """A socket that holds the port, and does not yet listen. Port 0 is any free one.

    Raises `InputError` for a host that is none, a port that is taken or not allowed, and, unless it is `guarded` by tokens, for
    an address that others can reach.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"the host {host!r} is not known ({error}); give an address of this machine, as 127.0.0.1") from None
    if not guarded and not ipaddress.ip_address(address[0]).is_loopback:
        raise InputError(
            f"others can reach {host}: give --token-file, so that only they who have a token may use it "
            "(`mendlm token add FILE --role edit --name NAME` makes one), or --host 127.0.0.1"
        )
    found = socket.socket(kind, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise _taken(host, port, error) from None
    return found


def place(listening: socket.socket) -> str:
    """The address as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Any, listening: socket.socket, *, grace: int, access_log: bool, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish the requests that were accepted, for at most `grace` seconds, and return.

    A second SIGINT ends it at once. `ready` is called when it listens. To be called on the main thread.
    """
    uvicorn = require("uvicorn", "serve")
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        access_log=access_log,
        log_config=_LOG_CONFIG,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=grace,
    )

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                _LOG.warning("ending: finishing what was accepted, for at most %d seconds; Ctrl-C ends it at once", grace)
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

    def already(number: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal that ended it again when it is done: that is no reason to die of it."""

    host, port = listening.getsockname()[:2]
    before = {number: signal.signal(number, already) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(config).run([listening])
    except OSError as error:  # it could be bound, but another process came first
        raise _taken(host, port, error) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()


def _taken(host: str, port: int, error: OSError) -> InputError:
    why = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return InputError(f"cannot listen on port {port} of {host}: {why}; choose another --port, or end that program")
