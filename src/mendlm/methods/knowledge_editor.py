"""KnowledgeEditor: a recurrent network reads the request, and masks, shifts and scales the gradient.

De Cao, Aziz and Titov, "Editing Factual Knowledge in Language Models", EMNLP 2021. A bidirectional LSTM over the base's
embeddings of the prompt, its old answer and the new one gives a vector; for each layer with gradient `G`, a small network
makes of it `a`, `c` (d_out), `b`, `d` (d_in) and `s`:

    W' = W - sigmoid(s) * (G o (softmax(a) b^T) + softmax(c) d^T)

In rows: each token's `delta o softmax(a)` with `u o b`, and one row more, `softmax(c)` with `d`. The old answer is what the
base gives greedily at the answer's positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from mendlm.apply import Edit
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.lowrank import LowRank
from mendlm.methods.base import Learned, transposed
from mendlm.text import Batch


@dataclass(frozen=True, kw_only=True)
class KnowledgeEditorConfig:
    """The shape of a KnowledgeEditor."""

    layers: tuple[str, ...] = ()
    """Patterns of the layers to edit; empty: the paper's choice for the architecture."""
    hidden: int = 128
    """Width of the LSTM, in each direction, and of the layers' networks."""
    embedding: int = 0
    """Width of the base's embeddings; 0 is read from the model."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise InputError(f"hidden must be at least 1, got {self.hidden}")


class KnowledgeEditor(Learned):
    """A KnowledgeEditor for the given layers of one model."""

    name = "ke"
    learning_rate = 1e-3
    needs_whole_base = True

    def __init__(self, specs: Sequence[LayerSpec], config: KnowledgeEditorConfig) -> None:
        super().__init__(specs, config)
        hidden = config.hidden
        self.kinds = nn.Embedding(3, config.embedding)
        self.reader = nn.LSTM(config.embedding, hidden, batch_first=True, bidirectional=True)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2 * (spec.d_out + spec.d_in) + 1))
            for spec in self.specs
        )

    @classmethod
    def for_model(cls, model: Any, specs: Sequence[LayerSpec], config: KnowledgeEditorConfig) -> KnowledgeEditor:
        """An untrained editor, as wide as the model's embeddings."""
        return cls(specs, replace(config, embedding=model.get_input_embeddings().embedding_dim))

    def read(self, model: Any, batch: Batch, old: Int[Tensor, "scored"]) -> Float[Tensor, "size hidden2"]:
        """The LSTM's last states, both directions, over prompt, old and new answer; each kind has a mark of its own."""
        texts, kinds = [], []
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        # A decoder's sequence holds the answer too; elsewhere all of it is prompt.
        decoder = "decoder_input_ids" not in batch.inputs and model.get_output_embeddings() is not None
        for index in range(batch.size):
            mine = batch.row == index
            end = int(batch.column[mine][0]) + 1 if decoder else int(mask[index].sum())
            parts = [ids[index, :end], old[mine], batch.label[mine].clamp(min=0)]
            texts.append(torch.cat(parts))
            kinds.append(torch.cat([torch.full_like(part, kind) for kind, part in enumerate(parts)]))
        lengths = torch.tensor([len(text) for text in texts])
        with torch.no_grad():
            words = model.get_input_embeddings()(pad_sequence(texts, batch_first=True)).to(self.kinds.weight.dtype)
        marked = words + self.kinds(pad_sequence(kinds, batch_first=True))
        last: Tensor = self.reader(pack_padded_sequence(marked, lengths, batch_first=True, enforce_sorted=False))[1][0]
        return last.transpose(0, 1).flatten(1)

    def parts(self, model: Any, batch: Batch) -> Edit:
        """One edit for each example; `u` and `delta` are constants."""
        gradient, logits = self.record(model, batch)
        state = self.read(model, batch, logits.argmax(-1))
        updates = {}
        for spec, head in zip(self.specs, self.heads, strict=True):
            a, c, b, d, s = head(state).unsqueeze(1).split([spec.d_out, spec.d_out, spec.d_in, spec.d_in, 1], -1)
            rows, dtype = gradient[spec.name], state.dtype
            u = torch.cat([rows.u.to(dtype) * b, d], 1)
            delta = torch.cat([rows.delta.to(dtype) * a.softmax(-1), c.softmax(-1)], 1)
            updates[spec.name] = LowRank(u, -s.sigmoid() * delta)
        return Edit(updates, transposed(self.specs))
