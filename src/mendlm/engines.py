"""What other engines take: vLLM's published limits for LoRA adapters, checked on an adapter folder.

vLLM reads `adapter_config.json` and `adapter_model.safetensors`, and no more. Its rules are those of its files, as of
September 2026, each named beside the rule below: `vllm/lora/peft_helper.py` (what the configuration may say),
`vllm/config/lora.py` (the ranks that a server can have), `vllm/lora/utils.py` and `vllm/lora/lora_model.py` (what the
tensors may be called). A field that vLLM does not read is dropped without a word: what would then be computed wrongly is a
problem here, too. Which base models take adapters at all is not in the folder: see `docs/engines.md`.

Knows files only; neither vLLM nor peft is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from mendlm.adapter import ADAPTER, CONFIG
from mendlm.errors import FormatError
from mendlm.files import read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` can be (`vllm/config/lora.py`); 16 if nothing is said."""
_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")


def vllm_problems(folder: str | Path, *, max_lora_rank: int = VLLM_RANKS[-1]) -> list[str]:
    """Why vLLM would refuse an adapter folder, or serve it wrongly; empty for one that it serves.

    `max_lora_rank` is what the server was started with, by default the most that there is.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG)
        shapes = _shapes(folder / ADAPTER)
    except FormatError as error:
        return [str(error)]
    if not isinstance(config, dict):
        return [f"{folder / CONFIG} is no JSON object"]
    return [*_config_problems(config, max_lora_rank), *_tensor_problems(shapes, config.get("r"))]


def vllm_rank(folder: str | Path) -> int | None:
    """The least `--max-lora-rank` that serves an adapter folder; None if there is none."""
    rank = read_json(Path(folder) / CONFIG)["r"]
    return next((known for known in VLLM_RANKS if known >= rank), None)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():  # an `adapter_model.bin` would be read, too; it is a pickle
        raise FormatError(f"{path} does not exist; vLLM needs the adapter's tensors in it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is not a readable safetensors file ({error})") from None


def _config_problems(config: Mapping[str, Any], max_lora_rank: int) -> list[str]:
    problems = []
    # peft_helper.py, `from_dict`: fields without which it raises.
    missing = [name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]
    if missing:
        problems.append(f"{CONFIG} lacks {', '.join(missing)}, which vLLM requires")
    # `__post_init__` and `validate_legal`: a positive rank, up to the server's.
    rank = config.get("r")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0):
        problems.append(f"the rank r must be a positive integer, not {rank!r}")
    elif rank is not None and rank > max_lora_rank:
        problems.append(f"the rank {rank} is above max_lora_rank {max_lora_rank} (of {', '.join(map(str, VLLM_RANKS))})")
    # `_validate_features` and `validate_legal`: what it refuses.
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}; vLLM adds no adapter biases")
    if config.get("use_dora"):
        problems.append("use_dora is set; vLLM does not serve DoRA")
    if config.get("modules_to_save"):
        problems.append(f"modules_to_save is {config['modules_to_save']!r}; vLLM replaces no whole modules")
    if config.get("trainable_token_indices") is not None:
        problems.append("trainable_token_indices is set; vLLM refuses it unless it is started for it")
    # What it does not read, so that one rank and one alpha would be taken for all layers, and each for plain LoRA.
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {config['peft_type']!r}; vLLM reads every adapter as LORA")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            problems.append(f"{name} is set; vLLM ignores it and scales all layers alike")
    if config.get("lora_bias"):
        problems.append("lora_bias is set; vLLM ignores it")
    if config.get("alora_invocation_tokens"):
        problems.append("alora_invocation_tokens is set; vLLM ignores it and applies the adapter to every token")
    # No model of vLLM with Conv1D layers implements its interface `SupportsLoRA`.
    if config.get("fan_in_fan_out"):
        problems.append(
            "fan_in_fan_out is set: the adapter is for Conv1D layers (GPT-2), whose models take no adapters in vLLM"
        )
    return problems


def _tensor_problems(shapes: Mapping[str, tuple[int, ...]], rank: object) -> list[str]:
    """utils.py, `parse_fine_tuned_lora_name`: two factors a layer. lora_weights.py: each of the one rank."""
    problems, sides = [], dict[str, set[str]]()
    for name, shape in shapes.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            problems.append(f"the tensor {name} is neither lora_A nor lora_B of a layer; vLLM refuses such a file")
            continue
        side = found[2] or found[3]
        sides.setdefault(found[1], set()).add(side)
        if len(shape) != 2 or shape[0 if side == "A" else 1] != rank:
            wanted = f"({rank}, d_in)" if side == "A" else f"(d_out, {rank})"
            problems.append(f"the tensor {name} is {shape}, not {wanted} as r in {CONFIG} says")
    problems += [
        f"the layer {layer} has only lora_{min(found)}; both are needed" for layer, found in sides.items() if len(found) < 2
    ]
    return problems if shapes else ["the adapter holds no tensors: vLLM would serve the base model in its place"]
