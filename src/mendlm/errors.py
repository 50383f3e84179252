"""Every error that a user can cause.

    MendError                 the root: catch this one
    ├── InputError            a prompt, target, option or file name that cannot be used  (also a ValueError)
    │   ├── LayerError        a layer pattern or layer type that cannot be edited
    │   └── RecordError       a malformed record: names file, line and field
    ├── ModelError            a model that cannot be fetched, loaded or used as asked
    ├── FormatError           a file of ours that is missing, corrupt, or made for something else
    ├── HubError             a hub repository that cannot be reached, read or written
    ├── StorageError          a file or folder that cannot be written: a full disk, no permission  (also an OSError)
    ├── GateError             an edit that failed its gate and was refused; `checks` says what was asked and answered
    ├── NumericalError        NaN or infinity where a finite number is needed
    └── MissingPackageError   an optional package; names the extra that brings it  (also an ImportError)

A message says what was given, what is allowed, and what to do. A broken invariant of our own is an `assert`, not one of these.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class MendError(Exception):
    """The root of all errors that mendlm raises on purpose."""


class InputError(MendError, ValueError):
    """A prompt, target, option or file name that cannot be used."""


class LayerError(InputError):
    """A layer pattern that matches nothing, or a layer that cannot be edited."""


class RecordError(InputError):
    """A malformed record of a data file."""

    def __init__(self, path: object, line: int | None, field: str | None, problem: str) -> None:
        where = str(path) if line is None else f"{path}, record {line}"
        super().__init__(f"{where}, field '{field}': {problem}" if field else f"{where}: {problem}")
        self.path, self.line, self.field, self.problem = path, line, field, problem


class ModelError(MendError):
    """A model that cannot be fetched, loaded or used as asked."""


class FormatError(MendError):
    """A file of ours that is missing, corrupt, or made for something else."""


class HubError(MendError):
    """A hub repository that cannot be reached, read or written."""


class StorageError(MendError, OSError):
    """A file or folder that cannot be written: a full disk, no permission."""


class GateError(MendError):
    """An edit that failed its gate and was refused."""

    def __init__(self, message: str, checks: tuple[Any, ...]) -> None:
        super().__init__(message)
        self.checks = checks


class NumericalError(MendError):
    """NaN or infinity where a finite number is needed."""


class MissingPackageError(MendError, ImportError):
    """An optional package is not installed."""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or raise `MissingPackageError` naming the extra that brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the package '{package}', which is not installed; run: pip install 'mendlm[{extra}]'"
        ) from error
