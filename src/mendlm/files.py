"""Writing files so that nothing is ever half-written, and reading JSON so that a bad file is named.

Everything is written to a temporary name beside its place, flushed to the disk, and renamed. Knows no tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from mendlm.errors import FormatError, InputError, MendError, StorageError

LOCK = ".lock"
"""The file whose lock means that a process is at work in a folder."""
_NEW = "new"
"""What is to fill a folder lies in it under such a name."""


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Name the file in what the operating system refuses inside the block, a lock included, as a `StorageError`."""
    try:
        yield
    except MendError:
        raise
    except filelock.Timeout:
        raise StorageError(f"{path} is held by another process; try again") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; free the disk or name another place") from error


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Make a folder for the block, parents included; those that it made and left empty are taken away in the end."""
    made = [one for one in (path, *path.parents) if not one.exists()]
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for one in made:  # the innermost first
            with contextlib.suppress(OSError):
                one.rmdir()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that becomes `path` when the block ends well, on the disk for good; on an error nothing is left.

    Raises `StorageError` where the disk is full or the folder cannot be written.
    """
    with storing(path):
        temporary = _beside(path)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, as `writing`."""
    with writing(path) as file:
        file.write(content)


def sync(folder: Path) -> None:
    """See a folder's list of names to the disk: a file renamed into it is then there after a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, whole or not at all."""
    write_bytes(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def plain(content: Any) -> Any:
    """Content as it is after a journey through a JSON file: tuples are lists, keys are text."""
    return json.loads(json.dumps(content))


def read_json(path: Path) -> Any:
    """Read JSON; a missing or malformed file is a `FormatError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
    except (RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Fill a temporary folder that becomes `path` when the block ends well; on an error nothing is left.

    An existing `path` that holds something is refused, or with `force` replaced in the end, unless the process is in it. One
    that holds nothing is filled, file by file: it may be a volume, or where the process is, which cannot be renamed.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    fills = path.is_dir() and not _held(path)
    with folder(path.parent):
        temporary = _beside(path / _NEW if fills else path)
        with storing(path):
            temporary.mkdir()
        try:
            yield temporary
            with storing(path):
                if fills:
                    _move_up(temporary)
                elif path.exists():
                    _put_in_place_of(path, temporary)
                else:
                    os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _move_up(folder: Path) -> None:
    """Move all that a folder holds to where it lies itself, or nothing."""
    moved = []
    try:
        for found in list(folder.iterdir()):
            os.replace(found, folder.parent / found.name)
            moved.append(found)
    except BaseException:
        for found in moved:
            os.replace(folder.parent / found.name, found)
        raise
    folder.rmdir()


def _put_in_place_of(path: Path, folder: Path) -> None:
    """Replace a folder by another, or leave it as it is."""
    old = _beside(path)
    os.replace(path, old)
    try:
        os.replace(folder, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _beside(path: Path) -> Path:
    """A name of nothing yet, beside a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def sweep(folder: Path) -> None:
    """Remove the files that killed processes left half-written in a folder, which no other process writes now."""
    for found in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{12}", found.name) and found.is_file():
            found.unlink(missing_ok=True)


def require_folder(path: Path) -> None:
    """Raise `InputError` for an output folder that is a file."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder for the output")


def refuse_existing(path: Path, *, force: bool, instead: str = "name another or replace it with --force") -> None:
    """Raise `InputError` for an output folder that holds something: without `force`, and where it could not be replaced.

    `instead` is what the user can do.
    """
    require_folder(path)
    if not (path.exists() and _held(path)):
        return
    if not force:
        raise InputError(f"the folder {path} already exists and is not empty; {instead}")
    if path.is_symlink() or Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"{path} is not empty, and a link or where you are, which cannot be replaced; name another folder")


def _held(path: Path) -> bool:
    """Whether a folder holds anything but a lock and what a killed process left of filling it."""
    return any(found.name != LOCK and not found.name.startswith(f".{_NEW}.") for found in path.iterdir())


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a folder for this process alone; raises `InputError` if another holds it. The system frees it on any end.

    A folder that was made for it and is empty in the end is taken away again.
    """
    lock, made = filelock.FileLock(path / LOCK, timeout=0), not path.exists()
    with folder(path):
        with storing(path):
            try:
                lock.acquire()
            except filelock.Timeout:
                raise InputError(f"another process is at work in {path}; wait for it, or name another folder") from None
        try:
            yield
        finally:
            lock.release()
            if made and [found.name for found in path.iterdir()] == [LOCK]:  # nothing came of it
                (path / LOCK).unlink()
