"""Counts and times of the service in Prometheus' text format, version 0.0.4.

Knows no HTTP and no model: it is told of each request when it has been answered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds: the histogram's upper bounds."""


class Number(NamedTuple):
    """A value with its name, what it is, and its labels."""

    name: str
    kind: Literal["counter", "gauge"]
    what: str
    value: float
    labels: Mapping[str, str] = {}


class Metrics:
    """What is counted. One thread uses it."""

    def __init__(self) -> None:
        self.open = 0
        """Requests that are being answered."""
        self._requests: dict[tuple[str, str, str], int] = defaultdict(int)
        self._slots: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
        self._seconds: dict[str, float] = defaultdict(float)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request has been answered, to its last byte. `route` is a template such as `/v1/edits/{id}`: there are few."""
        self._requests[method, route, str(status)] += 1
        self._slots[route][sum(bound < seconds for bound in BOUNDS)] += 1
        self._seconds[route] += seconds

    def text(self, more: Sequence[Number] = ()) -> str:
        """All of it, and further numbers; those of one name stand together."""
        route = {name: {"route": name} for name in self._slots}
        found = [
            Number(
                "mendlm_requests_total", "counter", "Requests, by outcome; status 0: the client went away first.", count, labels
            )
            for labels, count in (
                ({"method": method, "route": path, "status": status}, count)
                for (method, path, status), count in sorted(self._requests.items())
            )
        ]
        found.append(Number("mendlm_requests_open", "gauge", "Requests that are being answered.", self.open))
        lines = _lines([*found, *more])
        lines += _head("mendlm_request_seconds", "histogram", "From a request's beginning to the last byte of its answer.")
        for path, slots in sorted(self._slots.items()):
            total = 0
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), slots, strict=True):
                total += count
                lines.append(_line("mendlm_request_seconds_bucket", total, {**route[path], "le": bound}))
            lines.append(_line("mendlm_request_seconds_sum", self._seconds[path], route[path]))
            lines.append(_line("mendlm_request_seconds_count", total, route[path]))
        return "\n".join(lines) + "\n"


def _lines(numbers: Sequence[Number]) -> list[str]:
    lines: list[str] = []
    last = None
    for number in numbers:
        if number.name != last:
            lines += _head(number.name, number.kind, number.what)
        lines.append(_line(number.name, number.value, number.labels))
        last = number.name
    return lines


def _head(name: str, kind: str, what: str) -> tuple[str, str]:
    return f"# HELP {name} {what}", f"# TYPE {name} {kind}"


def _line(name: str, value: float, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{inside}}} {value!r}" if inside else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
