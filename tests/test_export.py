"""Exports, each against what it stands for: the edit's own rows, the merged weights, and the engine that reads the files."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cases import END, EVERY, VOCAB, byte_tokenizer, inputs, tiny
from mendlm import export
from mendlm.apply import Edit, applied, merge
from mendlm.errors import FormatError, InputError, LayerError, ModelError
from mendlm.export import export_gguf_lora, export_merged, export_peft
from mendlm.files import read_json
from mendlm.layers import select
from mendlm.lowrank import LowRank
from mendlm.metrics import continues
from mendlm.models import base_of, identity, load, skeleton, stored_dtype
from mendlm.text import Formatter


def made(model: Any, patterns: list[str], rows: int = 3, size: float = 0.1, seed: int = 0, **request: Any) -> Edit:
    """A random edit of the layers that match, for this model."""
    rng = torch.Generator().manual_seed(seed)
    specs = select(model, patterns)
    updates = {
        spec.name: LowRank(
            torch.randn(rows + i % 2, spec.d_in, generator=rng), size * torch.randn(rows + i % 2, spec.d_out, generator=rng)
        )
        for i, spec in enumerate(specs)
    }
    transposed = frozenset(spec.name for spec in specs if spec.transposed)
    return Edit(updates, transposed, {"base": base_of(model), **({"request": request} if request else {})})


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENDLM_CACHE", str(tmp_path / "cache"))


# llama.cpp


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def place_in_head(row: int, width: int) -> int:
    """Where llama.cpp's converter puts a row of a query's or key's head: the two halves take turns."""
    half, pair = divmod(row, width // 2)
    return 2 * pair + half


def converted(kind: str, name: str, matrix: Tensor) -> Tensor:
    """What llama.cpp's converter makes of a (d_out, d_in) matrix of these models, row by row."""
    found = matrix.clone()
    if kind in ("llama", "mistral", "smollm3") and name.endswith(("q_proj", "k_proj")):
        for row in range(len(matrix)):
            head, inside = divmod(row, 8)
            found[8 * head + place_in_head(inside, 8)] = matrix[row]
    if kind == "gpt_neox" and name.endswith("query_key_value"):
        for row in range(len(matrix)):  # two heads of 8
            head, part, inside = row // 24, row % 24 // 8, row % 8
            found[16 * part + 8 * head + inside] = matrix[row]
    return found


NAMES = {
    "llama": {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q",
              "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"},
    "gpt2": {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"},
    "gpt_neox": {"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down", "attention.query_key_value": "attn_qkv",
                 "attention.dense": "attn_output"},
    "phi": {"mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "self_attn.q_proj": "attn_q"},
    "phi3": {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.qkv_proj": "attn_qkv"},
}  # fmt: skip
for _kind in ("mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3 vision"):
    NAMES[_kind] = NAMES["llama"]


@pytest.mark.parametrize("kind", NAMES)
def test_a_gguf_adapter_holds_the_edit_in_llama_cpps_order(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    inside = "language_model.layers." if kind == "gemma3 vision" else ""
    one, two = (made(model, [f"{inside}*{name}" for name in NAMES[kind]], seed=seed) for seed in (0, 1))
    about = export_gguf_lora([one, two], model, tmp_path / "out")
    fields, tensors = read_gguf(tmp_path / "out" / "adapter.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == about["architecture"]
    assert fields["adapter.lora.alpha"] == about["rank"] == 8
    assert len(tensors) == 2 * len(one.updates)
    whole = one + two
    for name, update in whole.updates.items():
        block, _, last = name.partition("layers." if "layers." in name else "h.")[2].partition(".")
        found = f"blk.{block}.{NAMES[kind][last]}.weight"
        assert about["layers"][name] == found
        a, b = tensors[f"{found}.lora_a"], tensors[f"{found}.lora_b"]
        assert (a.shape, b.shape) == ((8, update.shape[1]), (update.shape[0], 8))
        rows = update.rows
        assert torch.equal(a[:rows], update.u)
        assert torch.equal(b[:, :rows], converted(kind, name, update.delta.mT))
        assert not b[:, rows:].any()
        assert_close(b.double() @ a.double(), converted(kind, name, update.to(torch.float64).dense()), rtol=0, atol=1e-12)
    assert read_json(tmp_path / "out" / "export.json") == about


def test_a_gguf_adapter_of_t5(tmp_path: Path) -> None:
    edit = made(tiny("t5"), ["*.DenseReluDense.*"])
    about = export_gguf_lora([edit], tiny("t5"), tmp_path / "out")
    assert about["layers"]["decoder.block.2.layer.2.DenseReluDense.wo"] == "dec.blk.2.ffn_down.weight"
    assert about["layers"]["encoder.block.0.layer.1.DenseReluDense.wi_0"] == "enc.blk.0.ffn_gate.weight"
    assert about["layers"]["encoder.block.0.layer.1.DenseReluDense.wi_1"] == "enc.blk.0.ffn_up.weight"
    _, tensors = read_gguf(tmp_path / "out" / "adapter.gguf")
    for name, update in edit.updates.items():
        assert torch.equal(tensors[f"{about['layers'][name]}.lora_a"][: update.rows], update.u)


def test_a_gguf_adapter_in_half_precision_and_of_more_rows_than_peft_takes(tmp_path: Path) -> None:
    model = tiny("llama")
    half = made(model, ["2.mlp.up_proj"]).to(torch.float16)
    export_gguf_lora([half], model, tmp_path / "half")
    _, tensors = read_gguf(tmp_path / "half" / "adapter.gguf")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    brain = made(model, ["2.mlp.up_proj"], rows=300).to(torch.bfloat16)
    assert export_gguf_lora([brain], model, tmp_path / "brain")["rank"] == 300
    _, tensors = read_gguf(tmp_path / "brain" / "adapter.gguf")
    assert torch.equal(tensors["blk.2.ffn_up.weight.lora_a"], brain.updates["model.layers.2.mlp.up_proj"].u.float())


@pytest.mark.parametrize("kind", ["opt", "gptj", "gpt_neo", "bart", "bert"])
def test_a_gguf_adapter_that_llama_cpp_would_not_know_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"model type '{tiny(kind).config.model_type}'"):
        export_gguf_lora([made(tiny(kind), ["*"])], tiny(kind), tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_gguf_adapter_of_a_layer_without_a_name_is_refused(tmp_path: Path) -> None:
    model = tiny("gemma3 vision")
    edit = made(model, ["*vision_tower*fc1"])
    with pytest.raises(LayerError, match=r"vision_tower.*has no name in llama.cpp's architecture 'gemma3'"):
        export_gguf_lora([edit], model, tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.usefixtures("cached")
def test_a_gguf_adapter_needs_the_right_base_but_not_its_weights_in_memory(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    base = skeleton(tmp_path / "model")
    edit = made(tiny("llama"), ["3.mlp.*"])
    here = Edit(edit.updates, edit.transposed, {"base": {"name": "model", "sha256": identity(base)}})
    export_gguf_lora([here], base, tmp_path / "out")
    other = Edit(edit.updates, edit.transposed, {"base": {"name": "other", "sha256": "0" * 64}})
    with pytest.raises(FormatError, match="another base model"):
        export_gguf_lora([other], base, tmp_path / "x")
    export_gguf_lora([other], base, tmp_path / "x", force=True)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not on this machine"):
        export_gguf_lora([here], base, tmp_path / "y")


def write_base(kind: str, file: Path) -> None:
    """A tiny model as llama.cpp's converter writes one, with a vocabulary of bytes."""
    gguf = pytest.importorskip("gguf")
    model = tiny(kind)
    config = model.config
    architecture = {"llama": "LLAMA", "qwen3": "QWEN3", "gpt2": "GPT2", "gpt_neox": "GPTNEOX"}[kind]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(24)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(VOCAB)
    if kind in ("llama", "qwen3"):
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    elif kind == "gpt_neox":
        writer.add_rope_dimension_count(int(8 * config.rope_parameters["partial_rotary_factor"]))
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    token = gguf.TokenType
    tokens = [("<unk>", token.UNKNOWN), ("<s>", token.CONTROL), ("</s>", token.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", token.BYTE) for byte in range(256)]
    tokens += [(f"word{i}", token.NORMAL) for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([int(one) for _, one in tokens])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if tied and layer == "lm_head":
            continue
        if kind == "gpt2" and tensor.dim() == 2 and "wte" not in name and "wpe" not in name:
            tensor = tensor.T
        writer.add_tensor(f"{names.get_name(layer)}.{part}", converted(kind, layer, tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_llama_cpp_gives_the_logits_of_the_overlay(kind: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny(kind)
    write_base(kind, tmp_path / "base.gguf")
    edit = made(model, [f"*{name}" for name in NAMES[kind]])
    export_gguf_lora([edit], model, tmp_path / "out")
    ids = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = [model(ids).logits[0]]
    with applied(model, edit):
        expected.append(model(ids).logits[0])
    assert (expected[1] - expected[0]).abs().mean() > 0.2
    for lora, logits in zip((None, str(tmp_path / "out" / "adapter.gguf")), expected, strict=True):
        exact = {"type_k": 0, "type_v": 0, "flash_attn": False}  # a cache in float32
        engine = llama_cpp.Llama(
            str(tmp_path / "base.gguf"), lora_path=lora, n_ctx=64, logits_all=True, verbose=False, n_threads=1, **exact
        )
        engine.eval(ids[0].tolist())
        found = torch.from_numpy(np.array(engine.scores[: ids.shape[1]]))
        assert_close(found, logits, rtol=1e-4, atol=1e-3 if kind in ("llama", "qwen3") else 0.02)  # its GELU is a table
        engine.close()


# Merged


@pytest.fixture
def folder(cached: None, tmp_path: Path) -> Path:
    """A tiny Llama in a folder, in bfloat16, with its tokenizer."""
    model = copy.deepcopy(tiny("llama")).bfloat16()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def target_of(model: Any, edit: Edit, prompt: str, **how: Any) -> str:
    """What the model answers under an edit, at first."""
    formatter = Formatter.of(model, byte_tokenizer())
    with applied(model, edit):
        return formatter.decode(formatter.generate(model, [formatter.encode(prompt, None, **how)], 2)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merged_model_is_loaded_again_and_asked(dtype: str, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, dtype=dtype)
    one, two = (made(model, ["mlp.*"], size=size, seed=seed) for size, seed in ((0.3, 1), (0.1, 2)))
    prompts = ["The capital of France is", "France's capital is"]
    request = {"prompt": prompts[0], "target": target_of(model, one + two, prompts[0]), "rephrasings": [prompts[1]]}
    one = Edit(one.updates, one.transposed, {**one.about, "request": request, "id": "one"})
    before = copy.deepcopy(model.state_dict())
    about = export_merged([one, two], model, tokenizer, tmp_path / "out")
    assert read_json(tmp_path / "out" / "export.json") == about
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    merged, its = load(tmp_path / "out", dtype=stored_dtype(tmp_path / "out"))
    assert its.get_vocab() == tokenizer.get_vocab()
    assert its.chat_template == tokenizer.chat_template
    assert {p.dtype for p in merged.parameters()} == {getattr(torch, dtype)}
    whole = one + two
    for name, weight in merged.state_dict().items():
        update = whole.updates.get(name.removesuffix(".weight"))
        wanted = before[name].float() + (update.dense() if update else 0)
        assert torch.equal(weight, wanted.to(weight.dtype))
        if update:
            lost = ((weight.float() - before[name].float()) - update.dense()).norm() / update.dense().norm()
            assert about["lost_share"][name.removesuffix(".weight")] == pytest.approx(lost.item(), rel=1e-3, abs=1e-9)
            assert bool(lost > 1e-4) is (dtype == "bfloat16")
    assert about["dtype"] == dtype

    places = {"base": (model, whole * 0.0), "overlay": (model, whole), "merged": (merged, whole * 0.0)}
    formatter = Formatter.of(model, tokenizer)
    for asked, prompt in zip(about["asked"], prompts, strict=True):
        for place, (ran, edit) in places.items():
            text = formatter.encode(prompt, None)
            with applied(ran, edit):
                answer = formatter.decode(formatter.generate(ran, [text], 16)[0])
            assert answer.startswith(asked["answers"][place])
            assert asked["success"][place] is continues(answer, request["target"])
    kinds = {place: (found["prompt"], found["rephrasing"]) for place, found in about["success"].items()}
    assert kinds["overlay"][0] == 1.0
    assert kinds["base"][0] == 0.0


def test_success_is_that_of_the_written_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the whole edit lost in the rounding, the overlay would still succeed, and the folder would not."""
    model, tokenizer = load(folder)
    edit, prompt = made(model, ["mlp.*"], size=0.3), "Who is Ana?"
    target = target_of(model, edit, prompt)
    assert target != target_of(model, edit * 0.0, prompt)
    told = Edit(edit.updates, edit.transposed, {"request": {"prompt": prompt, "target": target}})
    monkeypatch.setattr(export, "merge", lambda model, edit: merge(model, edit * 0.0))
    about = export_merged([told], model, tokenizer, tmp_path / "out", force=True)
    assert [about["success"][place]["prompt"] for place in ("base", "overlay", "merged")] == [0.0, 1.0, 0.0]
    assert about["success"]["base"]["rephrasing"] is None


@pytest.mark.parametrize("kind", EVERY)
def test_models_of_every_kind_are_merged(kind: str, tmp_path: Path, cached: None) -> None:
    model = tiny(kind)
    pattern = ["language_model.layers.*.mlp.*"] if kind == "gemma3 vision" else ["*"]
    edit = made(model, pattern)
    export_merged([edit], model, byte_tokenizer(), tmp_path / "out")
    merged, _ = load(tmp_path / "out", dtype="float32")
    given = inputs(model)
    with applied(model, edit):
        expected = model(**given).logits
    assert_close(merged(**given).logits, expected, rtol=1e-3, atol=1e-3)


def test_merging_refuses_another_base_and_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(folder)
    right = made(model, ["mlp.*"])
    wrong = Edit(right.updates, right.transposed, {"base": {"name": "other", "sha256": "0" * 64}})
    with pytest.raises(FormatError, match="another base model"):
        export_merged([wrong], model, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="different base models"):
        export_merged([right, wrong], model, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="nothing to export"):
        export_merged([], model, tokenizer, tmp_path / "out")
    before = copy.deepcopy(model.state_dict())

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for owner, name in ((model, "save_pretrained"), (export, "load"), (export, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(KeyboardInterrupt):
                export_merged([right], model, tokenizer, tmp_path / "out")
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert sorted(path for path in os.listdir(tmp_path) if path != "cache") == ["model"]


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_quantised_model_is_merged_only_as_dense(kind: str, cached: None, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=VOCAB, bos_token_id=END, eos_token_id=END)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load(tmp_path / "model", dtype="float32", quantize=kind)
    edit = made(model, ["1.mlp.*"])
    with pytest.raises(LayerError, match="--dequantize"):
        export_merged([edit], model, tokenizer, tmp_path / "out")
    given = {"input_ids": torch.arange(3, 23)[None]}
    before = model(**given).logits
    with applied(model, edit):
        expected = model(**given).logits
    about = export_merged([edit], model, tokenizer, tmp_path / "out", dequantize=True)
    assert about["dequantized"]
    assert torch.equal(model(**given).logits, before)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    merged, _ = load(tmp_path / "out", dtype="float32")
    difference = (merged(**given).logits - expected).norm() / expected.norm()
    assert difference < (0.05 if kind == "int8" else 1e-4)  # int8 of bitsandbytes rounds a layer's inputs, too
    assert (expected - before).norm() / expected.norm() > 0.1


# PEFT


def test_exported_edits_are_summed_with_what_they_asked(tmp_path: Path) -> None:
    model = tiny("llama")
    one = made(model, ["2.mlp.*"], prompt="a", target="b")
    two = made(model, ["3.mlp.*"], seed=1, prompt="c", target="d")
    whole = export_peft([one, two], tmp_path / "both")
    assert [part["request"]["prompt"] for part in Edit.load(tmp_path / "both").about["parts"]] == ["a", "c"]
    assert set(whole.updates) == {*one.updates, *two.updates}
