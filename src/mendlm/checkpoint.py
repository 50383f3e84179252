"""A run folder: what a training run leaves, and how an editor is read back.

    run.json                what was trained on what, with the resolved configuration
    editor.safetensors      the editor (the best by validation, where there is one)
    checkpoint.safetensors  the latest training state: editor, optimiser and progress in one file
    metrics.jsonl           a line a step
    changed_base/           of a method that changes the base itself, such as ENN: that change as an edit, once trained

safetensors and JSON only. Every file is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import torch
from torch import Tensor

from mendlm.apply import CHANGED_BASE
from mendlm.errors import FormatError, InputError
from mendlm.files import LOCK, plain, read_json, refuse_existing, storing, write_bytes, write_json
from mendlm.layers import LayerSpec
from mendlm.methods import LEARNED, method_types
from mendlm.methods.base import Learned
from mendlm.tensors import read_tensors, write_tensors

FORMAT = "mendlm-editor-1"
_T = TypeVar("_T")


def parse_config(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """A configuration dataclass from plain values; unknown fields and wrong types are an `InputError`."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise InputError(f"unknown setting '{name}' of {kind.__name__}; it has {', '.join(known)}")
    try:
        made = pydantic.TypeAdapter(kind).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise cause from None
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"setting '{where}' of {kind.__name__}: {first['msg']}, got {first['input']!r}") from None
    for name, value in values.items():
        if isinstance(value, bool) and not isinstance(getattr(made, name), bool):
            raise InputError(f"setting '{name}' of {kind.__name__}: expected {type(getattr(made, name)).__name__}, got {value}")
    return made


def with_defaults(kind: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings of a configuration dataclass, with the defaults of those that are younger than the file."""
    return {**plain(asdict(kind())), **stored}


def save_editor(path: Path, method: Learned, about: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write an editor as one safetensors file; its networks in `dtype` if given, rates and statistics as they are."""
    tensors = {
        name: tensor.to(dtype) if dtype is not None and name.startswith("nets.") else tensor
        for name, tensor in method.state_dict().items()
    }
    layers = [asdict(spec) for spec in method.specs]
    content = {"method": method.name, "config": asdict(method.config), "layers": layers, "about": dict(about)}
    write_tensors(path, tensors, {"format": FORMAT, "editor": json.dumps(content)})


def editor_path(path: Path) -> Path:
    """An editor's file: a run folder's, or the file itself."""
    return path / "editor.safetensors" if path.is_dir() else path


def load_editor(path: Path) -> tuple[Learned, dict[str, Any]]:
    """Read an editor file, or a run folder's, in float32: the method and what is said about it."""
    path = editor_path(path)
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path} is not an editor of format {FORMAT}; train one with `mendlm train`")
    try:
        content = json.loads(metadata["editor"])
        specs, about = [LayerSpec(**spec) for spec in content["layers"]], dict(content["about"])
        name = content.get("method", "mend")  # the first editors did not say
        if name not in LEARNED:
            raise InputError(f"the method '{name}' is none of {', '.join(LEARNED)}")
        kind, config = method_types(name)
        with torch.device("meta"):  # the description is checked before it decides how much memory to take
            method: Learned = kind(specs, parse_config(config, content["config"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(f"{path} has a damaged description ({error}); restore it or train the editor again") from None
    _load_state(method, tensors, path)
    return method, about


def _load_state(method: Learned, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = method.state_dict()
    different = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    if different or len(tensors) != len(own):
        raise FormatError(f"{path} does not fit its own description (as {(different or sorted(tensors))[0]}); it is damaged")
    if next(method.parameters()).is_meta:
        method.to_empty(device="cpu")
    method.load_state_dict(dict(tensors))


class Run:
    """A run folder's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def require_new(self) -> None:
        """Raise `InputError` if the folder already holds something; a run that ended before its first checkpoint is nothing."""
        if self.folder.is_dir() and {found.name for found in self.folder.iterdir()} <= {"run.json", LOCK}:
            return
        refuse_existing(self.folder, force=False, instead="name another; a training that it holds goes on by --resume")

    def create(self, description: Mapping[str, Any]) -> None:
        """Start a new run; raises as `require_new`."""
        self.require_new()
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "run.json", {"format": "mendlm-run-1", **description})

    @property
    def description(self) -> dict[str, Any]:
        """What `create` wrote."""
        content = read_json(self.folder / "run.json")
        if not isinstance(content, dict) or not {"method", "base", "training", "editor"} <= content.keys():
            raise FormatError(f"{self.folder / 'run.json'} is damaged: it does not describe a training; restore it from a copy")
        return content

    def continue_with(self, wanted: Mapping[str, Any]) -> None:
        """Check that a resumed run has the editor and data that it was started with; raises `InputError` if not.

        Training settings other than the optimizer may differ, as may the form in which the base is loaded; the description then
        says from which step on.
        """
        if not (self.folder / "checkpoint.safetensors").is_file():
            raise InputError(f"{self.folder} holds no checkpoint to resume; start a run in a new folder, without --resume")
        stored = self.description
        for key, value in plain(wanted).items():
            if key == "base" and stored[key]["sha256"] != value["sha256"]:
                raise InputError(
                    f"{self.folder} was trained on another base model ({stored[key].get('name')}, sha256 "
                    f"{stored[key]['sha256'][:12]}...), not on this one ({value['sha256'][:12]}...); resume with that model"
                )
            if key == "training" and (before := stored[key].get("optimizer", "adam")) != (now := value["optimizer"]):
                raise InputError(
                    f"{self.folder} was trained with the optimizer '{before}', whose state '{now}' cannot take on; resume "
                    "with the same, or train its editor further in another folder (--from)"
                )
            if key in ("base", "training"):
                names = ("dtype", "quantization") if key == "base" else value
                pairs = {name: [stored[key].get(name), value.get(name)] for name in names}
                changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
                if changed:
                    change = {"step": self.last_metrics()["step"], "changed": changed}
                    stored |= {key: value, "resumed": [*stored.get("resumed", []), change]}
            elif key == "editor" and with_defaults(method_types(stored["method"])[1], stored[key]) == value:
                stored[key] = value
            elif stored.get(key) != value:
                raise InputError(
                    f"{self.folder} was trained with {key} = {stored.get(key)}, now {value} is asked; "
                    "resume with the same, or start a new run in another folder"
                )
        write_json(self.folder / "run.json", stored)

    def log(self, row: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        with storing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop lines after a step: they will be made again."""
        kept = [row for row in self._rows() if row["step"] <= step]
        write_bytes(self.folder / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in kept).encode())

    def last_metrics(self) -> dict[str, float]:
        """The last line of metrics.jsonl; step 0 before there is one."""
        rows = self._rows()
        return rows[-1] if rows else {"step": 0}

    def _rows(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; one that a full disk or a power cut left half-written is none."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        try:
            rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
            if all("step" in row for row in rows):
                return rows
        except (ValueError, TypeError):
            pass
        raise FormatError(f"{path} is damaged: a line of it is no step of a training; restore it, or take the line out")

    def save_editor(self, method: Learned, about: Mapping[str, Any]) -> None:
        """Write editor.safetensors."""
        save_editor(self.folder / "editor.safetensors", method, {**self.description, **about})

    def save_changed_base(self) -> None:
        """Write what the saved editor's method has changed of the base, if anything, as an edit's folder."""
        method, about = load_editor(self.folder)
        if (change := method.changed_base()) is not None:
            about = {"method": method.name, "base": about["base"], "step": about["step"], CHANGED_BASE: change.id}
            replace(change.detach(), about=about).save(self.folder / CHANGED_BASE, force=True)

    def save_checkpoint(self, method: Learned, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Write checkpoint.safetensors: everything that a resumed run needs, in one file."""
        tensors = {f"editor.{name}": tensor for name, tensor in method.state_dict().items()}
        # Not the optimiser's own `state_dict`: that of bitsandbytes nests its tensors.
        for number, moments in torch.optim.Optimizer.state_dict(optimizer)["state"].items():
            for name, value in moments.items():  # bitsandbytes counts steps by an int, and all parameters share its maps
                tensor = value.clone() if name.startswith("qmap") else torch.as_tensor(value)
                tensors[f"optimizer.{number}.{name}"] = tensor
        metadata = {"format": "mendlm-checkpoint-1", "state": json.dumps(state)}
        write_tensors(self.folder / "checkpoint.safetensors", tensors, metadata)

    def load_checkpoint(self, method: Learned, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put a checkpoint's state back; returns what was saved as `state`."""
        path = self.folder / "checkpoint.safetensors"
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != "mendlm-checkpoint-1":
            raise FormatError(f"{path} is not a checkpoint of this version of mendlm")
        _load_state(method, {n[7:]: t for n, t in tensors.items() if n.startswith("editor.")}, path)
        moments: dict[int, dict[str, Tensor | int]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, field = name.split(".", 2)
                value = int(tensor) if tensor.dim() == 0 and tensor.dtype == torch.int64 else tensor
                moments.setdefault(int(number), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        state = json.loads(metadata["state"])
        assert isinstance(state, dict)
        return state
