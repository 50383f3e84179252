"""An edit on disk: a folder that PEFT reads as a LoRA adapter, plus `edit.json`.

`lora_A = u`, `lora_B = delta.mT`, `lora_alpha = r`, one rank for all matrices, zero-padded to one of `RANKS`, so that other
engines can serve it. An edit with more rows than the largest rank keeps an exact file beside it, `exact.safetensors`;
its adapter is then the best approximation, with the lost share in `edit.json`. A store keeps its exact rows as one safetensors
file instead (`to_bytes`).

Written without peft; knows no model.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mendlm.errors import FormatError, InputError
from mendlm.files import new_folder, read_json, sha256, write_json
from mendlm.lowrank import LowRank
from mendlm.tensors import hash_tensor, pack, read_tensors, unpack, write_tensors

FORMAT = "mendlm-edit-1"
ROWS_FORMAT = "mendlm-rows-1"
RANKS = (8, 16, 32, 64, 128, 256)
ADAPTER, CONFIG, EXACT, ABOUT = "adapter_model.safetensors", "adapter_config.json", "exact.safetensors", "edit.json"
_PREFIX = "base_model.model."


def write(
    folder: Path, updates: Mapping[str, LowRank], transposed: frozenset[str], about: Mapping[str, Any], *, force: bool = False
) -> None:
    """Write a single edit. All or nothing; an existing folder is refused unless `force`."""
    if any(update.batch for update in updates.values()):
        raise InputError("a batch of edits cannot be saved as one; save each, as batch[i].save(folder)")
    if transposed and transposed != frozenset(updates):
        raise InputError("PEFT stores one fan_in_fan_out for all layers; this edit mixes Conv1D and Linear layers")
    rows = {name: update.rows for name, update in updates.items()}
    rank = rank_of(updates)
    tensors, lost = {}, {}
    for name, update in updates.items():
        if update.rows > rank:
            update, share = update.compress(rank)
            lost[name] = share.item()
        padded = update.pad(rank)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = padded.u
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = padded.delta.mT
    with new_folder(folder, force=force) as temporary:
        write_tensors(temporary / ADAPTER, tensors)
        files = {ADAPTER: sha256(temporary / ADAPTER)}
        if lost:
            exact = {f"{n}.{part}": getattr(update, part) for n, update in updates.items() for part in ("u", "delta")}
            write_tensors(temporary / EXACT, exact)
            files[EXACT] = sha256(temporary / EXACT)
        write_json(temporary / CONFIG, peft_config(list(updates), rank, bool(transposed), about))
        content = {
            "format": FORMAT,
            **about,
            "id": fingerprint(updates),
            "layers": list(updates),
            "rows": rows,
            "transposed": sorted(transposed),
            "rank": rank,
            "lost_share": lost,
            "sha256": files,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        write_json(temporary / ABOUT, content)


@functools.cache  # each look takes a tenth of the time in which a small edit is written
def versions() -> dict[str, str]:
    """What runs, by package, as files that are written say."""
    return {package: importlib.metadata.version(package) for package in ("mendlm", "torch", "transformers")}


def fingerprint(updates: Mapping[str, LowRank]) -> str:
    """A short id of an edit's content: the same rows have the same id."""
    digest = hashlib.sha256()
    for name, update in updates.items():
        for factor in (update.u, update.delta):
            hash_tensor(digest, name, factor)
    return digest.hexdigest()[:12]


def rank_of(updates: Mapping[str, LowRank]) -> int:
    """The adapter's rank: the smallest of `RANKS` that holds every layer's rows, or the largest of all."""
    most = max(update.rows for update in updates.values())
    return next((rank for rank in RANKS if rank >= most), RANKS[-1])


def peft_config(layers: list[str], rank: int, fan_in_fan_out: bool, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `write` writes for PEFT: the adapter's configuration, of an edit of which `about` is said."""
    base = about.get("base")
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base.get("name") if isinstance(base, Mapping) else None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": layers,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }


def read(folder: Path) -> tuple[dict[str, LowRank], frozenset[str], dict[str, Any]]:
    """Read what `write` wrote: the exact rows, the transposed layers, and `edit.json`'s content.

    Raises `FormatError` for a folder that is not an edit, or whose files are missing, changed or corrupt.
    """
    if not folder.exists():
        raise FormatError(f"{folder} does not exist; name the folder of an edit")
    if not (folder / ABOUT).is_file():
        raise FormatError(f"{folder} is not an edit: it has no {ABOUT}; make one with `mendlm edit ... --out {folder}`")
    about = read_json(folder / ABOUT)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FormatError(f"{folder / ABOUT} has another format than {FORMAT}; it was written by another version of mendlm")
    try:
        updates = _read_rows(folder, about)
        transposed = frozenset(about["transposed"])
        if updates and fingerprint(updates) == about["id"] and transposed in (frozenset(), frozenset(updates)):
            return updates, transposed, about
    except (KeyError, TypeError, InputError):
        pass
    raise FormatError(f"{folder / ABOUT} is damaged: it does not fit the rows beside it; make the edit again")


def _read_rows(folder: Path, about: Mapping[str, Any]) -> dict[str, LowRank]:
    exact = EXACT in about["sha256"]
    file = folder / (EXACT if exact else ADAPTER)
    tensors, _ = read_tensors(file)
    if sha256(file) != about["sha256"][file.name]:
        raise FormatError(f"{file} has changed since it was written (its sha256 differs from {ABOUT}); make the edit again")
    updates = {}
    for name in about["layers"]:
        if exact:
            updates[name] = LowRank(tensors[f"{name}.u"], tensors[f"{name}.delta"])
        else:
            u, delta = (tensors[f"{_PREFIX}{name}.lora_{side}.weight"] for side in "AB")
            rows = about["rows"][name]
            updates[name] = LowRank(u[:rows], delta[:, :rows].mT.contiguous())
    return updates


def to_bytes(updates: Mapping[str, LowRank], transposed: frozenset[str], about: Mapping[str, Any]) -> bytes:
    """A single edit as the content of one safetensors file: its exact rows, and `about` in the metadata."""
    if any(update.batch for update in updates.values()):
        raise InputError("a batch of edits cannot be kept as one; keep each, as batch[i]")
    tensors = {f"{name}.{part}": getattr(update, part) for name, update in updates.items() for part in ("u", "delta")}
    content = {"layers": list(updates), "transposed": sorted(transposed), "about": dict(about)}
    return pack(tensors, {"format": ROWS_FORMAT, "edit": json.dumps(content)})


def from_bytes(content: bytes, name: str) -> tuple[dict[str, LowRank], frozenset[str], dict[str, Any]]:
    """Read what `to_bytes` made; `name` names it in a `FormatError`."""
    tensors, metadata = unpack(content, name)
    try:
        if metadata["format"] == ROWS_FORMAT:
            told = json.loads(metadata["edit"])
            updates = {layer: LowRank(tensors[f"{layer}.u"], tensors[f"{layer}.delta"]) for layer in told["layers"]}
            return updates, frozenset(told["transposed"]), told["about"]
    except (KeyError, TypeError, ValueError, InputError):
        pass
    raise FormatError(
        f"{name} holds no rows of an edit in the format {ROWS_FORMAT}; it was not written by this version of mendlm"
    )
