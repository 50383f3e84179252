from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, tiny
from mendlm.checkpoint import load_editor
from mendlm.errors import ModelError, StorageError
from mendlm.layers import default_layers
from mendlm.methods.mend import Mend, MendConfig
from mendlm.replay import Trunk
from mendlm.text import Formatter
from mendlm.training import outer_loss, states_bytes, train
from mendlm.trunk_cache import TrunkCache
from test_training import DATA, ELSEWHERE, SMALL, draws, fitted, new_method


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of the trunk has run."""
    counts: list[int] = []
    run = Trunk.run

    def counting(trunk: Trunk, model: Any, inputs: Any) -> Any:
        counts.append(len(inputs["input_ids"]))
        return run(trunk, model, inputs)

    monkeypatch.setattr(Trunk, "run", counting)
    return counts


def test_a_text_is_run_once_and_the_loss_stays(tmp_path: Path, computed: list[int]) -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    drawn = draws(form, SMALL)
    method, trunk = fitted("llama", model, form, drawn), Trunk.below(model, new_method().specs)
    plain, _ = outer_loss(method, model, form, trunk, drawn, SMALL)
    computed.clear()
    cache = TrunkCache(trunk, model, tmp_path)
    first, _ = outer_loss(method, model, form, cache, drawn, SMALL)
    assert torch.equal(first, plain), "equal batches, equal bits"
    texts = {t.prompt + t.target[:-1] for d in drawn for t in (d.edit, d.rephrasing, d.unrelated) if t}
    assert sum(computed) == len(texts)
    cache.flush()
    for known in (cache, TrunkCache(trunk, model, tmp_path)):
        again, _ = outer_loss(method, model, form, known, drawn[::-1], SMALL)
        torch.testing.assert_close(again, plain)
        assert sum(computed) == len(texts)


def test_a_damaged_shard_is_dropped_and_made_again(tmp_path: Path) -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    trunk = Trunk.below(model, default_layers(model))
    inputs = form.batch([form.encode("The river", " stands"), form.encode("Ana Lund of", " Oslo")]).inputs
    cache = TrunkCache(trunk, model, tmp_path)
    cache.run(model, inputs)
    cache.flush()
    (shard,) = tmp_path.rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    (tape,) = TrunkCache(trunk, model, tmp_path).run(model, inputs)
    assert not list(tmp_path.rglob("*.safetensors"))
    (expected,) = trunk.run(model, inputs)
    assert torch.equal(tape * inputs["attention_mask"][..., None], expected * inputs["attention_mask"][..., None])


def test_models_and_depths_do_not_share(tmp_path: Path) -> None:
    model = tiny("llama")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    trunk = Trunk.below(model, default_layers(model))
    folders = {TrunkCache(trunk, m, tmp_path).folder for m in (model, changed, tiny("llama"))}
    assert len(folders) == 2
    assert TrunkCache(Trunk((tuple(model.model.layers[:2]),)), model, tmp_path).folder not in folders


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    model = tiny("bart")
    decoder = [spec for spec in default_layers(model) if "decoder" in spec.name]
    with pytest.raises(ModelError, match="one stack"):
        TrunkCache(Trunk.below(model, decoder), model, tmp_path)
    model = tiny("t5")  # its blocks pass position biases on
    form = Formatter.of(model, byte_tokenizer())
    cache = TrunkCache(Trunk.below(model, default_layers(model)), model, tmp_path)
    with pytest.raises(ModelError, match="more than hidden states"):
        cache.run(model, form.batch([form.encode("The river", "stands")]).inputs)


def test_the_encoder_below_its_edits_is_kept(tmp_path: Path) -> None:
    model = tiny("bart")
    form, trunk = Formatter.of(model, byte_tokenizer()), Trunk.below(model, default_layers(model))
    inputs = form.batch([form.encode("The river", "stands still for days"), form.encode("Ana Lund of", "Oslo")]).inputs
    cache = TrunkCache(trunk, model, tmp_path)
    for _ in range(2):
        (found,), (expected,) = cache.run(model, inputs), trunk.run(model, inputs)
        torch.testing.assert_close(found, expected * inputs["attention_mask"][..., None])


def test_training_with_a_cache_is_training(tmp_path: Path, computed: list[int]) -> None:
    texts = []
    for number in range(3):
        model = tiny("llama")
        computed.clear()
        options = {"trunk_cache": tmp_path / "cache"} if number else {}
        train(new_method(), model, byte_tokenizer(), DATA, SMALL, tmp_path / f"{number}", locality=[ELSEWHERE], **options)
        texts.append(sum(computed))
    assert texts[0] > texts[1] > texts[2] == 0
    plain, *cached = (dict(load_editor(tmp_path / f"{n}")[0].named_parameters()) for n in range(3))
    for other in cached:
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    needed = states_bytes(model, Formatter.of(model, byte_tokenizer()), [DATA, ELSEWHERE])
    assert needed > states_bytes(model, Formatter.of(model, byte_tokenizer()), [DATA]), "locality sources count"
    asked: list[Path] = []
    free = needed - 1

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)

    def go(name: str) -> None:
        options = {"trunk_cache": tmp_path / "deep" / "cache", "locality": [ELSEWHERE]}
        train(new_method(), model, byte_tokenizer(), DATA, SMALL, tmp_path / name, **options)

    with pytest.raises(StorageError, match=r"0\.00 GB more, and .* has 0\.00 GB free; free the disk"):
        go("refused")
    assert asked == [tmp_path], "the nearest folder that exists"
    assert not list(tmp_path.iterdir())
    free = needed
    go("first")
    free = needed - 1  # what the cache holds already is not needed again
    go("second")


def test_a_cache_that_cannot_be_is_refused_before_a_run_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    data = replace(DATA, examples=DATA.examples[:4])
    config = replace(SMALL, steps=1, num_edits=1, target_end="auto")
    for name, place, error, message in (
        ("llama", tmp_path / "file", StorageError, "cannot be written into .*file, which is no folder"),
        ("llama", tmp_path / "file" / "cache", StorageError, "cannot be written into .*file, which is no folder"),
        ("t5", tmp_path / "cache", ModelError, "more than hidden states"),  # its blocks pass position biases on
    ):
        method = Mend(default_layers(tiny(name)), MendConfig(rank=4))
        with pytest.raises(error, match=message):
            train(method, tiny(name), byte_tokenizer(), data, config, tmp_path / "run", trunk_cache=place)
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
