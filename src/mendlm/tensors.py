"""Safetensors files of ours: each holds a hash of its own content, so that a flipped bit is noticed when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mendlm.errors import FormatError
from mendlm.files import write_bytes

_HASH = "sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, with a hash over its tensors and metadata."""
    write_bytes(path, pack(tensors, metadata))


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """What `write_tensors` writes: the same bytes for the same content."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = dict(metadata or {"format": "pt"})
    content = safetensors.torch.save(contiguous, {**described, _HASH: _content(contiguous, described)})
    end = 8 + int.from_bytes(content[:8], "little")
    # The order of safetensors' metadata is random. Without escapes: \u00e4 and \u00E4, a bit apart, would be the same.
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, content[end:]])


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata. A missing, truncated or changed file is a `FormatError`."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _unreadable(str(path), error) from None
    return tensors, _checked(str(path), tensors, metadata)


def unpack(content: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file's content; `name` names it in a `FormatError`."""
    try:
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise _unreadable(name, error) from None
    return tensors, _checked(name, tensors, metadata)


def _unreadable(name: str, error: Exception) -> FormatError:
    return FormatError(f"{name} is not a readable safetensors file ({error}); restore it or make it again")


def _checked(name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    stored = metadata.pop(_HASH, None)
    if stored is None:
        raise FormatError(f"{name} holds no hash of its content: it is damaged, or of an earlier version; make it again")
    if stored != _content(tensors, metadata):
        raise FormatError(f"{name} has changed since it was written: its content does not match its hash; make it again")
    return metadata


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        hash_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor's name, dtype, shape and content to a hash."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
