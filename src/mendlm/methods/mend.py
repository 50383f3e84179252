"""MEND: small networks that turn a raw fine-tuning gradient into an edit.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022. With `u~`, `delta~` the network's rows (`mendlm.methods.network`):

    W' = W - alpha * sum_tokens delta~ u~^T

Note the sign: a descent step. Several edits at once are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mendlm.apply import Edit
from mendlm.layers import LayerSpec
from mendlm.methods.base import transposed
from mendlm.methods.network import NetworkConfig, RowEditor
from mendlm.recording import Gradient
from mendlm.text import Batch


@dataclass(frozen=True, kw_only=True)
class MendConfig(NetworkConfig):
    """The shape of a MEND editor."""


class Mend(RowEditor):
    """A MEND editor for the given layers of one model. Untrained until `mendlm.train` has run."""

    name = "mend"

    def __init__(self, specs: Sequence[LayerSpec], config: MendConfig | None = None) -> None:
        super().__init__(specs, config or MendConfig())

    def transform(self, gradient: Gradient) -> Edit:
        """The edit that the networks make of a gradient; differentiable in the editor's parameters.

        Rows that do not count (padding, no gradient) come out as zeros.
        """
        return Edit(self.changed(gradient), transposed(self.specs))

    def parts(self, model: Any, batch: Batch) -> Edit:
        """One MEND edit for each example; `u` and `delta` are constants."""
        return self.transform(self.gradient(model, batch))
