"""One meta-training edit in the shape of the published MEND code: the yardstick of `training.py` and `memory.py`.

One request at a time; a full forward pass with all logits for every term; the update as dense weights, through which the
outer loss is differentiated by a functional call; float32. Written from the paper's formulas, and as fast as that
shape allows: gradients stop at the lowest edited layer, and nothing is deep-copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mendlm.methods.mend import Mend
from mendlm.recording import record
from mendlm.training import Drawn, TrainConfig


def outer_loss(method: Mend, model: Any, drawn: Drawn, config: TrainConfig) -> Tensor:
    """The outer loss of one request; differentiable in the editor's parameters."""
    with record(model, method.specs) as recording:
        nll = _nll(model(**_inputs(model, drawn.edit), use_cache=False).logits, drawn.edit)
    edit = method.transform(recording.gradient(nll, 1))
    weights = {}
    for spec in method.specs:
        weight = model.get_parameter(f"{spec.name}.weight")
        change = edit.updates[spec.name].dense()[0].to(weight.dtype)
        weights[f"{spec.name}.weight"] = weight + (change.mT if spec.transposed else change)

    def edited(text: Any) -> Tensor:
        logits: Tensor = functional_call(model, weights, kwargs={**_inputs(model, text), "use_cache": False}).logits
        return logits

    loss = config.edit_weight * sum(_nll(edited(text), text) for text in (drawn.edit, drawn.rephrasing)) / 2
    if drawn.unrelated is not None:
        places = _places(drawn.unrelated)
        with torch.no_grad():
            base = model(**_inputs(model, drawn.unrelated), use_cache=False).logits[0, places].log_softmax(-1)
        changed = edited(drawn.unrelated)[0, places].log_softmax(-1)
        loss = loss + config.locality_weight * (base.exp() * (base - changed)).sum(-1).mean()
    return loss


def _inputs(model: Any, text: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[*text.prompt, *text.target[:-1]]], device=model.device)}


def _places(text: Any) -> slice:
    first = len(text.prompt) - 1
    return slice(first, first + max(1, len(text.target)))


def _nll(logits: Tensor, text: Any) -> Tensor:
    target = torch.tensor(text.target, device=logits.device)
    return torch.nn.functional.cross_entropy(logits[0, _places(text)].float(), target)
