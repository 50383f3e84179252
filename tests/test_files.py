from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cases import files_limited_to
from mendlm.errors import FormatError, InputError, StorageError
from mendlm.files import locked, new_folder, write_json
from mendlm.tensors import read_tensors, write_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2], dtype=torch.int64)}


def flipped(content: bytes) -> Iterator[bytes]:
    """The content with each of its bits flipped."""
    for index in range(len(content)):
        for bit in range(8):
            yield content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :]


def truncated(content: bytes) -> Iterator[bytes]:
    """Every beginning of the content."""
    return (content[:length] for length in range(len(content)))


@pytest.mark.parametrize("damage", [flipped, truncated])
def test_every_damage_is_noticed(damage: Callable[[bytes], Iterator[bytes]], tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, {"format": "x-1", "about": '{"k": "ä"}'})
    tensors, metadata = read_tensors(path)
    assert metadata == {"format": "x-1", "about": '{"k": "ä"}'}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    for damaged in damage(path.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"t\.safetensors"):
            read_tensors(path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    with (
        pytest.raises(StorageError, match=r"cannot write .*t\.safetensors: File too large"),
        files_limited_to(1000),  # inside the test alone: pytest's own output may go to a file
    ):
        write_tensors(path, {"a": torch.zeros(1000)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_a_full_disk_leaves_no_half_folder(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "edit") as folder:
            write_json(folder / "small.json", {})
            write_tensors(folder / "big.safetensors", {"a": torch.zeros(1000)})

    with pytest.raises(StorageError), files_limited_to(1000):
        fill()
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file"), new_folder(tmp_path / "file" / "edit"):
        pass
    with pytest.raises(StorageError, match=r"none/x\.json"):
        write_json(tmp_path / "none" / "x.json", {})


@pytest.mark.parametrize("place", ["a volume", "a link", "."])
def test_an_empty_folder_is_filled_where_it_is(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    path = {"a volume": real, "a link": tmp_path / "link", ".": Path()}[place]
    replace = os.replace

    def no_renaming_of_volumes(source: Path, target: Path) -> None:
        assert real not in (Path(source), Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_renaming_of_volumes)

    def stopped() -> None:
        with new_folder(path) as folder:
            (folder / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert os.listdir(real) == []
    inode = real.stat().st_ino

    def second_fails(source: Path, target: Path) -> None:
        seen.append(source)
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    seen: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_fails)
        with pytest.raises(StorageError, match="No space left"), new_folder(path) as folder:
            [(folder / name).mkdir() for name in "abc"]
    assert os.listdir(real) == []
    with new_folder(path) as folder:
        (folder / "a").write_text("a")
        (folder / "b").mkdir()
    assert sorted(os.listdir(real)) == ["a", "b"]
    assert real.stat().st_ino == inode
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_where_the_process_is_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "project" / "inside"
    inside.mkdir(parents=True)
    (inside / "precious").write_text("a")
    (tmp_path / "link").symlink_to(inside)
    monkeypatch.chdir(inside)
    for path in (Path(), Path(".."), Path("../.."), inside, inside.parent, tmp_path / "link"):
        with pytest.raises(InputError, match="cannot be replaced; name another folder"), new_folder(path, force=True):
            pass
    assert (inside / "precious").read_text() == "a"
    assert os.listdir(inside) == ["precious"]
    assert os.listdir(inside.parent) == ["inside"]


def test_what_a_killed_process_left_of_filling_a_folder_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".new.0123456789ab").mkdir()
    with new_folder(tmp_path) as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "a").read_text() == "a"


def test_what_cannot_be_renamed_is_said_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(StorageError, match="out: Device or resource busy"), new_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


@pytest.mark.parametrize(("mask", "folder_mode", "file_mode"), [(0o077, 0o700, 0o600), (0o022, 0o755, 0o644)])
def test_who_may_read_what_is_written_is_as_the_mask_says(mask: int, folder_mode: int, file_mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "edit") as folder:
            write_json(folder / "edit.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "edit").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "edit" / "edit.json").stat().st_mode & 0o777 == file_mode


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(InputError, match="another process is at work"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # nothing came of it
    with locked(tmp_path / "runs" / "run"):
        pass
    with pytest.raises(InputError), new_folder(tmp_path / "edits" / "edit"):
        raise InputError("no")
    assert not list(tmp_path.iterdir())  # nor of the folders around it
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "a").write_text("a")
    with locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "a").exists()
