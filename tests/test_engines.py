"""Adapters for other engines: vLLM's rules, each broken once, and PEFT's swapping of adapters against the overlay."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from cases import inputs, tiny
from mendlm.apply import applied
from mendlm.engines import VLLM_RANKS, vllm_problems, vllm_rank
from mendlm.errors import InputError
from mendlm.export import export_peft
from test_export import made

ONE = "base_model.model.model.layers.3.mlp.down_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    made(tiny("llama"), ["3.mlp.*"]).save(tmp_path / "edit")
    return tmp_path / "edit"


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gemma3 vision", "phi3", "opt", "mistral"])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_our_adapters_pass(kind: str, rows: int, tmp_path: Path) -> None:
    pattern = "language_model.layers.1.*proj" if kind == "gemma3 vision" else "*layers.1.*"
    edit = made(tiny(kind), [pattern], rows=rows)
    export_peft([edit], tmp_path / "edit", engine="vllm")
    assert vllm_problems(tmp_path / "edit") == []
    assert vllm_rank(tmp_path / "edit") == {1: 8, 9: 16, 300: 256}[rows]


@pytest.mark.parametrize("kept", ["rslora", "nothing said"])
def test_what_vllm_takes_besides_ours(kept: str, adapter: Path) -> None:
    change(adapter, **({"use_rslora": True} if kept == "rslora" else {"bias": "absent", "peft_type": "absent"}))
    assert vllm_problems(adapter) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": "absent"}, "lacks r,"),
        ({"lora_alpha": "absent"}, "lacks lora_alpha,"),
        ({"target_modules": "absent"}, "lacks target_modules,"),
        ({"r": 0}, "positive integer"),
        ({"r": 1024}, "above max_lora_rank 512"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"rank_pattern": {"down_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"down_proj": 4}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [5, 6]}, "every token"),
        ({"fan_in_fan_out": True}, "Conv1D"),
    ],
)
def test_each_rule_of_the_configuration_is_checked(values: dict[str, Any], message: str, adapter: Path) -> None:
    change(adapter, **values)
    problems = vllm_problems(adapter)
    assert any(message in problem for problem in problems)
    assert len(problems) == 1 or "r" in values  # another rank does not fit the tensors either


def test_the_rank_of_the_server_counts(adapter: Path) -> None:
    assert vllm_problems(adapter, max_lora_rank=8) == []
    assert "above max_lora_rank 1 " in vllm_problems(adapter, max_lora_rank=1)[0]
    change(adapter, r=VLLM_RANKS[-1] + 1)
    assert vllm_rank(adapter) is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("shape", "not (8, d_in)"),
        ("vector", "not (8, d_in)"),
        ("alone", "has only lora_B"),
        ("bias", "neither lora_A nor lora_B"),
        ("dora", "neither lora_A nor lora_B"),
        ("whole", "neither lora_A nor lora_B"),
        ("empty", "holds no tensors"),
    ],
)
def test_each_rule_of_the_tensors_is_checked(broken: str, message: str, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    layer = ONE.removesuffix(".lora_A.weight")
    match broken:
        case "shape":
            tensors[ONE] = torch.ones(4, 24)
        case "vector":
            tensors[ONE] = torch.ones(24)
        case "alone":
            del tensors[ONE]
        case "bias":
            tensors[f"{layer}.lora_B.bias"] = torch.ones(16)
        case "dora":
            tensors[f"{layer}.lora_magnitude_vector.weight"] = torch.ones(16)
        case "whole":
            tensors["base_model.model.lm_head.weight"] = torch.ones(300, 16)
        case "empty":
            tensors = {}
    save_file(tensors, path)
    assert [message in problem for problem in vllm_problems(adapter)] == [True]


@pytest.mark.parametrize("broken", ["missing", "damaged", "no config", "list"])
def test_an_unreadable_adapter_is_said(broken: str, adapter: Path) -> None:
    tensors, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    match broken:
        case "missing":
            tensors.rename(adapter / "adapter_model.bin")
        case "damaged":
            tensors.write_bytes(b"no tensors")
        case "no config":
            config.unlink()
        case "list":
            config.write_text("[]")
    assert len(vllm_problems(adapter)) == 1


def test_an_adapter_that_vllm_would_not_serve_is_not_written_for_it(tmp_path: Path) -> None:
    edit = made(tiny("gpt2"), ["3.mlp.*"])
    with pytest.raises(InputError, match="Conv1D"):
        export_peft([edit], tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_peft_switches_between_edits_and_swaps_them(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.hotswap import hotswap_adapter

    model, given = tiny(kind), inputs(tiny(kind))
    pattern = ["*.DenseReluDense.*"] if kind == "t5" else ["*.mlp.*"]
    edits = {name: made(model, pattern, seed=seed) for seed, name in enumerate(("one", "two"))}
    expected = {}
    for name, edit in edits.items():
        edit.save(tmp_path / name)
        with applied(model, edit):
            expected[name] = model(**given).logits
    assert (expected["one"] - expected["two"]).abs().max() > 0.05
    both = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "one", adapter_name="one").eval()
    both.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("two", "one", "two"):
        both.set_adapter(name)
        assert_close(both(**given).logits, expected[name], rtol=1e-5, atol=1e-5)
    with both.disable_adapter():
        assert_close(both(**given).logits, model(**given).logits, rtol=0, atol=0)
    swapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "one").eval()
    for name in ("one", "two", "one"):
        hotswap_adapter(swapped, str(tmp_path / name), adapter_name="default", torch_device="cpu")
        assert_close(swapped(**given).logits, expected[name], rtol=1e-5, atol=1e-5)
