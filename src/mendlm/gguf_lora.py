"""An edit as one LoRA adapter of llama.cpp: a GGUF file that its programs load beside the base model, as `--lora FILE`.

The format, as llama.cpp's `convert_lora_to_gguf.py` writes it and `src/llama-adapter.cpp` reads it (October 2026):

- `general.type` is "adapter", `adapter.type` "lora", `general.architecture` the base's; `adapter.lora.alpha` holds for all.
- A weight `W` (d_out, d_in) of the base's GGUF file, such as `blk.5.ffn_up.weight`, has `W.lora_a` (rank, d_in) and
  `W.lora_b` (d_out, rank), and runs as `W + alpha / rank * b @ a`. So `a = u`, `b = delta.mT`, and alpha is the rank.
- The converter of base models reorders the rows of a few weights; `b` has its rows in the same order (`row_order`).
- Matrices are (d_out, d_in) whatever the base's layer is: GPT-2's Conv1D is transposed by the converter.

Knows edits and a base's configuration; needs no weights. The names are those of the package `gguf`, imported when used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm.errors import InputError, LayerError, require
from mendlm.files import storing
from mendlm.lowrank import LowRank

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "smollm3": "SMOLLM3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3": "GEMMA3",
    "gemma3_text": "GEMMA3",
    "phi": "PHI2",
    "phi3": "PHI3",
    "gpt2": "GPT2",
    "gpt_neox": "GPTNEOX",
    "t5": "T5",
    "mt5": "T5",
}
"""Model types of transformers -> architectures of llama.cpp, as its `convert_hf_to_gguf.py` pairs them."""
_INTERLEAVED = ("llama", "mistral", "smollm3")
"""Model types whose rotary pairs are (i, i + half a head) in transformers, and neighbours in llama.cpp."""


def tensor_names(config: Any, layers: Mapping[str, LowRank]) -> dict[str, str]:
    """What a base's layers are called in its GGUF file, without `.weight`.

    `config` is the base's configuration of transformers. Raises `InputError` for a model type without an architecture there,
    and `LayerError` for a layer without a name.
    """
    gguf = require("gguf", "gguf")
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"no GGUF adapter can be written for the model type '{config.model_type}': llama.cpp does not serve it, or how is "
            f"not known here. What can be written is {', '.join(ARCHITECTURES)}; export to peft or merged instead"
        )
    text = config.get_text_config()
    blocks = max(text.num_hidden_layers, getattr(text, "num_decoder_layers", None) or 0)
    known = gguf.get_tensor_name_map(_architecture(config), blocks)
    names = {name: known.get_name(name.replace("model.language_model.", "model.")) for name in layers}
    for name, found in names.items():
        if found is None:
            raise LayerError(
                f"the layer '{name}' has no name in llama.cpp's architecture '{architecture(config)}', so no GGUF adapter can "
                "hold its edit; export to peft or merged instead"
            )
    return names


def architecture(config: Any) -> str:
    """What llama.cpp calls the base's architecture."""
    return str(require("gguf", "gguf").MODEL_ARCH_NAMES[_architecture(config)])


def _architecture(config: Any) -> Any:
    return getattr(require("gguf", "gguf").MODEL_ARCH, ARCHITECTURES[config.model_type])


def row_order(config: Any, name: str, d_out: int) -> Tensor | None:
    """Which row of a layer's weight stands at each place in the GGUF file (d_out,); None where they stay as they are.

    Queries and keys of llama types go from (head, half, pair) to (head, pair, half); GPT-NeoX's fused matrix goes from (head,
    q/k/v, dimension) to (q/k/v, head, dimension).
    """
    rows = torch.arange(d_out)
    last = name.rpartition(".")[2]
    if config.model_type in _INTERLEAVED and last in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if last == "q_proj" else config.num_key_value_heads
        return rows.view(heads, 2, -1).mT.flatten()
    if config.model_type == "gpt_neox" and last == "query_key_value":
        return rows.view(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()
    return None


def write(file: Path, updates: Mapping[str, LowRank], config: Any, base: str | None = None) -> int:
    """Write a single edit of a base with this configuration; returns the rank, which is the most rows of a layer.

    Every row is kept: llama.cpp has no largest rank. Rows in float16 stay so, all others are stored in float32, which holds
    bfloat16 exactly. `base` is the base's name, for the reader. Raises as `tensor_names`.
    """
    gguf = require("gguf", "gguf")
    names = tensor_names(config, updates)
    rank = max(1, *(update.rows for update in updates.values()))
    writer = gguf.GGUFWriter(file, architecture(config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
    for name, update in updates.items():
        padded = update.pad(rank)
        b, order = padded.delta.mT, row_order(config, name, update.shape[0])
        for side, factor in (("a", padded.u), ("b", b if order is None else b[order])):
            kept = factor.detach().cpu() if factor.dtype == torch.float16 else factor.detach().cpu().float()
            writer.add_tensor(f"{names[name]}.weight.lora_{side}", kept.contiguous().numpy())
    with storing(file):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    return rank
