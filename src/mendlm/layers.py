"""What can be edited: linear layers of any kind, seen as one (d_out, d_in) matrix, and how to name them.

A registry maps a layer class to a function that reads its shape; adding a kind of layer is one function. The paper's
choice of layers per architecture is one table. Knows nothing of editing.

A quantised layer of bitsandbytes or torchao is an `nn.Linear` of `in_features` and `out_features`, whatever the shape of its
packed weight. It is told by the type of that weight, so that neither package is imported here.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mendlm.errors import LayerError


@dataclass(frozen=True)
class LayerSpec:
    """One editable layer: its module name and the shape of its matrix."""

    name: str
    d_out: int
    d_in: int
    transposed: bool = False
    """The weight is stored (d_in, d_out), as in GPT-2's Conv1D; PEFT calls this `fan_in_fan_out`."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.d_out, self.d_in

    def weight(self, layer: nn.Module) -> Tensor:
        """The layer's weight as a (d_out, d_in) view."""
        weight = layer.get_parameter("weight")
        return weight.T if self.transposed else weight


SpecReader = Callable[[str, nn.Module], LayerSpec]
_READERS: dict[type[nn.Module], SpecReader] = {}


def register(kind: type[nn.Module]) -> Callable[[SpecReader], SpecReader]:
    """Teach mendlm a kind of layer: a function from (name, layer) to its `LayerSpec`."""

    def add(reader: SpecReader) -> SpecReader:
        _READERS[kind] = reader
        return reader

    return add


@register(nn.Linear)
def _linear(name: str, layer: nn.Module) -> LayerSpec:
    assert isinstance(layer, nn.Linear)
    return LayerSpec(name, layer.out_features, layer.in_features)


@register(Conv1D)
def _conv1d(name: str, layer: nn.Module) -> LayerSpec:
    return LayerSpec(name, layer.nf, layer.nx, transposed=True)  # type: ignore[arg-type]


def spec_of(name: str, layer: nn.Module) -> LayerSpec | None:
    """The layer's `LayerSpec`, or None if it cannot be edited."""
    for kind in type(layer).__mro__:
        if kind in _READERS:
            return _READERS[kind](name, layer)
    return None


def quantized(layer: nn.Module) -> str | None:
    """What a weight is quantised to: "nf4", "fp4" or "int8" of bitsandbytes, or a tensor type of torchao; None if dense."""
    weight: Any = getattr(layer, "weight", None)
    package, kind = type(weight).__module__.partition(".")[0], type(weight).__name__
    if package == "torchao":
        return f"torchao {kind}"
    if package != "bitsandbytes":
        return None
    return str(weight.quant_state.quant_type) if kind == "Params4bit" else "int8"


def dequantized(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A quantised layer as a dense one in the given dtype, with the weights that it stands for."""
    assert isinstance(layer, nn.Linear)
    weight: Any = layer.weight
    match quantized(layer):
        case "nf4" | "fp4":
            from bitsandbytes.functional import dequantize_4bit

            values = dequantize_4bit(weight.data, weight.quant_state)
        case "int8":  # W = CB * SCB / 127; the first pass moves the scales from the weight to the layer's state
            state: Any = layer.state
            scales = weight.SCB if state.SCB is None else state.SCB
            values = weight.data.float() * (scales / 127).unsqueeze(1)
        case _:
            values = weight.dequantize()
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)


def make_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from a kernel without a gradient, which some CPUs would use from the first pass without a graph on.

    With AVX512-BF16, a `Linear4bit` in evaluation mode packs its weight for an inference kernel, for good. That kernel has no
    backward pass: what should flow through the layer is lost, with no more than a warning. Here layers are kept unpacked, or
    unpacked again; the scales then stay rounded to bf16. Costs nothing where bitsandbytes is not in use.
    """
    if "bitsandbytes" not in sys.modules:
        return
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                _unpack(layer)


def _unpack(layer: Any) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, layer.weight.quant_state)
    if not state.nested:  # these scales it leaves transposed, and in bf16
        state.absmax = state.absmax.T.reshape(-1).float()


def plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or the parts of a quantised one of torchao."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain(getattr(tensor, name))]


def size(model: nn.Module) -> tuple[int, int]:
    """A model's parameters, a quantised weight counted as the matrix that it stands for; and the bytes that they take."""
    packed = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and quantized(layer)]
    hidden = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in packed)
    parts = {part.data_ptr(): part.nbytes for tensor in model.state_dict().values() for part in plain(tensor)}
    return sum(p.numel() for p in model.parameters()) + hidden, sum(parts.values())


def editable(model: nn.Module) -> dict[str, LayerSpec]:
    """Every editable layer inside the model's blocks, in model order. Heads and embeddings are not offered."""
    inside = tuple(f"{stack}." for stack in block_stacks(model))
    specs = ((name, spec_of(name, module)) for name, module in model.named_modules())
    return {name: spec for name, spec in specs if spec is not None and name.startswith(inside)}


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's stacks of blocks: the outermost module lists with an editable layer in their first block."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{stack}.") for stack in stacks)
        if nested or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(spec_of(child, layer) for child, layer in module[0].named_modules()):
            stacks[name] = module
    return stacks


def block_of(name: str, stacks: Sequence[str]) -> tuple[str, int]:
    """The stack that a layer belongs to, and its block's index there."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return stack, int(name[len(stack) + 1 :].split(".", 1)[0])
    raise LayerError(f"the layer '{name}' lies in no block; the model's stacks of blocks are: {', '.join(stacks) or 'none'}")


def select(model: nn.Module, patterns: Sequence[str]) -> list[LayerSpec]:
    """The layers that match any of the patterns, in model order.

    A pattern is a module name or the end of one, as in PEFT's `target_modules`, and may hold shell wildcards, as in
    `layers.2[0-2].mlp.*`. Raises `LayerError` for a pattern that matches nothing, with the reason or near names.
    """
    available = _available(model)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in available if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")}
        if not found:
            near = difflib.get_close_matches(pattern, available, n=3, cutoff=0.3)
            raise LayerError(
                f"the layer pattern '{pattern}' matches no editable layer; near names: {', '.join(near) or 'none'} "
                f"({len(available)} layers can be edited, as {next(iter(available))}; `mendlm inspect` lists them)"
                f"{_about_others(model)}"
            )
        chosen |= found
    return [spec for name, spec in available.items() if name in chosen]


def _available(model: nn.Module) -> dict[str, LayerSpec]:
    available = editable(model)
    if not available:
        reason = "no Linear or Conv1D layer in a stack of blocks"
        raise LayerError(f"{type(model).__name__} has no editable layers: {reason}{_about_others(model)}")
    return available


def _about_others(model: nn.Module) -> str:
    """Why a model's experts, and its layers of an unknown kind, cannot be chosen; empty for a model without any."""
    experts = [name for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3]
    about = f"; its experts are 3-d parameters, not layers, and cannot be edited: {experts[0]}, ..." if experts else ""
    for name, layer in model.named_modules():
        if hasattr(layer, "in_features") and spec_of(name, layer) is None:
            return f"{about}; {_unknown(name, layer)}"
    return about


def _unknown(name: str, layer: nn.Module) -> str:
    return (
        f"'{name}' is a {type(layer).__name__}, which cannot be edited: what can be is Linear and Conv1D, dense or quantised "
        "by bitsandbytes or torchao; load the model in such a form, or teach mendlm that kind by mendlm.layers.register"
    )


# The MLP matrices that the paper edits, by model type, as names inside a block (shell patterns). Blocks are not named
# here: `block_stacks` finds them by structure, which holds for models outside the table too.
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MLP_MATRICES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3"), _GATED),
    **dict.fromkeys(("gpt2", "gpt_neo"), ("mlp.c_fc", "mlp.c_proj")),
    **dict.fromkeys(("opt", "bart", "mbart"), ("fc1", "fc2")),
    "gptj": ("mlp.fc_in", "mlp.fc_out"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    # The released T5 configuration edits wi_0 and wo, never wi_1.
    **dict.fromkeys(("t5", "mt5"), ("*.DenseReluDense.wi", "*.DenseReluDense.wi_0", "*.DenseReluDense.wo")),
    **dict.fromkeys(("bert", "roberta"), ("intermediate.dense", "output.dense")),
    "distilbert": ("ffn.lin1", "ffn.lin2"),
    "modernbert": ("mlp.Wi", "mlp.Wo"),
}


def choose(model: nn.Module, patterns: Sequence[str]) -> list[LayerSpec]:
    """The layers that match the patterns, as `select`; without any pattern the paper's choice."""
    return select(model, patterns) if patterns else default_layers(model)


def default_layers(model: nn.Module, blocks: range | None = None) -> list[LayerSpec]:
    """The paper's choice: the MLP matrices of the last 3 blocks, or of the last 2 of encoder and of decoder.

    `blocks` are others, of each stack. Raises `LayerError` for blocks that a stack lacks, and for a model type that the
    table does not name: choose layers by pattern there.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", "?")
    available, stacks = _available(model), block_stacks(model)
    if model_type not in MLP_MATRICES:
        last = [*available][-1]
        stack, index = block_of(last, list(stacks))
        raise LayerError(
            f"no default layers are known for model type '{model_type}' (known: {', '.join(sorted(MLP_MATRICES))}); choose "
            f"layers by pattern, for example layers=['*{last.removeprefix(f'{stack}.{index}')}']; `mendlm inspect` lists what "
            f"can be edited{_about_others(model)}"
        )
    if blocks is not None:
        for stack, held in stacks.items():
            if not blocks or blocks[-1] >= len(held):
                asked = f"{blocks.start} to {blocks.stop - 1}"
                raise LayerError(f"no blocks {asked} in '{stack}': it has blocks 0 to {len(held) - 1}")
    depth = 2 if config.is_encoder_decoder else 3
    chosen = []
    for name, layer in model.named_modules():
        if not name.startswith(tuple(f"{stack}." for stack in stacks)):
            continue
        stack, index = block_of(name, list(stacks))
        inside = re.sub(r"^\d+\.", "", name[len(stack) + 1 :])
        wanted = index in blocks if blocks is not None else index >= len(stacks[stack]) - depth
        if wanted and any(fnmatch.fnmatchcase(inside, p) for p in MLP_MATRICES[model_type]):
            spec = spec_of(name, layer)
            if spec is None:
                raise LayerError(f"the default layers of '{model_type}' cannot be edited here: {_unknown(name, layer)}")
            chosen.append(spec)
    return chosen
