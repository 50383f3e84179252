"""The trunk's outputs on disk, so that later epochs, other settings and other seeds run only the blocks above.

A text's hidden states below the first edited block never change while the base is frozen. They are kept in the base's own
dtype, in memory-mapped safetensors shards, and addressed by content: the folder by model, dtype, quantisation and depth, a
text by its tokens. A shard is written whole or not at all, by any number of processes; one that does not match its hash is
dropped and its texts are computed again.

Equal to the uncached pass for equal batches; in another batch a text's states differ within rounding.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mendlm.errors import FormatError, ModelError
from mendlm.files import storing
from mendlm.models import identity, quantization
from mendlm.replay import Tape, Trunk
from mendlm.tensors import read_tensors, write_tensors
from mendlm.text import sent

SHARD_BYTES = 64 << 20


class TrunkCache:
    """A trunk with a memory, which runs and replays as `Trunk` does. For one stack of blocks that return one tensor each."""

    def __init__(self, trunk: Trunk, model: Any, folder: str | Path) -> None:
        if len(trunk.groups) != 1:
            raise ModelError("a trunk cache serves models with one stack of blocks, edited above its first block")
        self.trunk = trunk
        about = {"base": identity(model), "dtype": str(model.dtype), "blocks": len(trunk.groups[0])}
        about |= {"quantization": [kind, _settings(model)]} if (kind := quantization(model)) else {}
        self.folder = Path(folder) / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self._states: dict[bytes, Tensor] = {}
        self._new: dict[bytes, Tensor] = {}
        self._found: set[Path] = set()
        with storing(self.folder):
            self._look()

    def _look(self) -> None:
        """Map the shards that are new since the last look, this process's and others'."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._found):
            self._found.add(path)
            try:
                self._read(path)
            except FormatError:
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        tensors, _ = read_tensors(path)
        parts = torch.split(tensors["states"], tensors["lengths"].tolist())
        self._states.update(zip(map(bytes, tensors["texts"].tolist()), parts, strict=True))

    def stored_bytes(self) -> int:
        """Bytes on the disk of this model's shards."""
        with storing(self.folder):
            return sum(path.stat().st_size for path in self._found if path.exists())

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tape:
        """The tape of a right-padded batch; what is not known yet is computed, and kept."""
        lengths = inputs["attention_mask"].sum(-1).tolist()
        texts = [_name(row[:n]) for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        missing = list({t: i for i, t in enumerate(texts) if t not in self._states and t not in self._new}.values())
        if missing:
            longest = max(lengths[i] for i in missing)
            (states,) = self.trunk.run(model, {name: value[missing, :longest] for name, value in inputs.items()})
            if not isinstance(states, Tensor):
                raise ModelError(
                    f"the blocks of {type(model).__name__} return more than hidden states; run without a trunk cache"
                )
            self._new |= {texts[i]: row[: lengths[i]].clone() for i, row in zip(missing, states.cpu(), strict=True)}
        rows = [self._states[text] if text in self._states else self._new[text] for text in texts]
        if sum(row.nbytes for row in self._new.values()) > SHARD_BYTES:
            self.flush()
        return [sent(nn.utils.rnn.pad_sequence(rows, batch_first=True), inputs["input_ids"].device)]

    def replay(self, tape: Tape) -> AbstractContextManager[None]:
        """As `Trunk.replay`."""
        return self.trunk.replay(tape)

    def flush(self) -> None:
        """Write what is new as a shard, and map it and what others wrote; `StorageError` where that cannot be written."""
        if not self._new:
            return
        tensors = {
            "states": torch.cat(list(self._new.values())),
            "lengths": torch.tensor([len(row) for row in self._new.values()]),
            "texts": torch.tensor([list(text) for text in self._new], dtype=torch.uint8),
        }
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)  # only now: a training that is refused leaves no folder
        write_tensors(self.folder / f"{uuid.uuid4().hex}.safetensors", tensors)
        self._look()
        self._new = {}


def _settings(model: Any) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    return None if config is None else str(config.to_json_string())


def _name(tokens: list[int]) -> bytes:
    return hashlib.sha256(json.dumps(tokens).encode()).digest()[:16]
