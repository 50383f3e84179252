from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import inputs, tiny
from mendlm import adapter
from mendlm.apply import Edit, applied
from mendlm.errors import FormatError, InputError
from mendlm.layers import default_layers
from mendlm.lowrank import LowRank
from mendlm.tensors import read_tensors


def random_edit(name: str, rows: int, size: float = 0.1) -> Edit:
    rng = torch.Generator().manual_seed(rows)
    specs = default_layers(tiny(name))
    updates = {
        spec.name: LowRank(
            torch.randn(rows - i % 2, spec.d_in, generator=rng), size * torch.randn(rows - i % 2, spec.d_out, generator=rng)
        )
        for i, spec in enumerate(specs)
    }
    transposed = frozenset(spec.name for spec in specs if spec.transposed)
    return Edit(updates, transposed, {"request": {"prompt": "p", "target": "é"}, "base": {"name": "tiny"}})


def assert_same(loaded: Edit, edit: Edit) -> None:
    assert list(loaded.updates) == list(edit.updates)
    assert loaded.transposed == edit.transposed
    for name, update in edit.updates.items():
        for part in ("u", "delta"):
            before, after = getattr(update, part), getattr(loaded.updates[name], part)
            assert after.dtype == before.dtype
            assert torch.equal(after, before)
    assert {key: loaded.about[key] for key in edit.about} == edit.about


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("rows", "rank"), [(2, 8), (8, 8), (9, 16), (40, 64), (256, 256)])
def test_a_saved_edit_is_loaded_to_the_bit(name: str, rows: int, rank: int, tmp_path: Path) -> None:
    edit = random_edit(name, rows)
    edit.save(tmp_path / "edit")
    assert_same(Edit.load(tmp_path / "edit"), edit)
    config = json.loads((tmp_path / "edit" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert not {"rank_pattern", "alpha_pattern"} & set(config)
    assert set(os.listdir(tmp_path / "edit")) == {"adapter_config.json", "adapter_model.safetensors", "edit.json"}
    tensors, _ = read_tensors(tmp_path / "edit" / "adapter_model.safetensors")
    for name_, update in edit.updates.items():
        a, b = (tensors[f"base_model.model.{name_}.lora_{side}.weight"] for side in "AB")
        assert (a.shape, b.shape) == ((rank, update.shape[1]), (update.shape[0], rank))
        torch.testing.assert_close(b @ a, update.dense())


def test_a_bfloat16_edit_and_one_without_rows(tmp_path: Path) -> None:
    edit = random_edit("llama", 3).to(torch.bfloat16)
    edit.save(tmp_path / "half")
    assert_same(Edit.load(tmp_path / "half"), edit)
    none = Edit({name: LowRank(u.u[:0], u.delta[:0]) for name, u in edit.updates.items()})
    none.save(tmp_path / "none")
    assert_same(Edit.load(tmp_path / "none"), none)


@pytest.mark.parametrize("transposed", [False, True])
def test_more_rows_than_the_largest_rank_keep_an_exact_file(transposed: bool, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    large = LowRank(torch.randn(300, 280, generator=rng), torch.randn(300, 270, generator=rng))
    small = LowRank(torch.randn(5, 280, generator=rng), torch.randn(5, 270, generator=rng))
    updates = {"large": large, "small": small}
    edit = Edit(updates, frozenset(updates) if transposed else frozenset())
    edit.save(tmp_path / "edit")
    assert_same(Edit.load(tmp_path / "edit"), edit)
    about = json.loads((tmp_path / "edit" / "edit.json").read_text())
    values = torch.linalg.svdvals(large.dense().double())
    share = (values[256:].square().sum() / values.square().sum()).sqrt().item()
    assert about["lost_share"] == {"large": pytest.approx(share, rel=1e-5)}
    assert share > 0.003
    assert about["rank"] == 256
    tensors, _ = read_tensors(tmp_path / "edit" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.large.lora_{side}.weight"] for side in "AB")
    lost = (b @ a - large.dense()).norm() / large.dense().norm()
    assert lost.item() == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert"])
def test_peft_gives_the_logits_of_the_overlay(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, edit = tiny(name), random_edit(name, 5)
    edit.save(tmp_path / "edit")
    given = inputs(model)
    with applied(model, Edit.load(tmp_path / "edit")):
        expected = model(**given).logits
    base = model(**given).logits
    with_adapter = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "edit").eval()
    torch.testing.assert_close(with_adapter(**given).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 0.05


DAMAGED = ["adapter_model.safetensors", "edit.json", "exact.safetensors"]


def saved(folder: Path, file: str) -> Path:
    if file == "exact.safetensors":
        edit = Edit({"layer": LowRank(torch.ones(300, 4), torch.ones(300, 3))})
    else:
        edit = random_edit("llama", 3)
    edit.save(folder)
    return folder / file


@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize("kind", ["start", "middle", "end", "truncated", "empty", "missing"])
def test_a_damaged_file_is_named(file: str, kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "edit", file)
    content = bytearray(path.read_bytes())
    places = {"start": 1, "middle": len(content) // 2, "end": len(content) - 2}
    if kind in places:
        content[places[kind]] ^= 0x15
    content = content[: {"truncated": len(content) // 2, "empty": 0}.get(kind, len(content))]
    path.write_bytes(content)
    if kind == "missing":
        path.unlink()
    with pytest.raises(FormatError) as caught:
        Edit.load(tmp_path / "edit")
    assert file in str(caught.value)


@pytest.mark.parametrize("key", ["sha256", "layers", "rows", "transposed", "id", "format"])
@pytest.mark.parametrize("value", ["absent", None, 3, "text", ["layer"]])
def test_a_damaged_description_is_named(key: str, value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "edit", "edit.json")
    about = json.loads(path.read_text())
    if value == "absent":
        del about[key]
    else:
        about[key] = value
    path.write_text(json.dumps(about))
    with pytest.raises(FormatError, match=r"edit\.json"):
        Edit.load(tmp_path / "edit")


def test_a_changed_number_of_rows_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "edit", "edit.json")
    about = json.loads(path.read_text())
    about["rows"] = dict.fromkeys(about["rows"], 2)
    path.write_text(json.dumps(about))
    with pytest.raises(FormatError, match=r"edit\.json"):
        Edit.load(tmp_path / "edit")


def test_what_is_no_edit_is_said(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "is not an edit"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(FormatError, match=said):
            Edit.load(folder)
    path = saved(tmp_path / "edit", "edit.json")
    path.write_text(path.read_text().replace("mendlm-edit-1", "mendlm-edit-0"))
    with pytest.raises(FormatError, match="another format"):
        Edit.load(tmp_path / "edit")
    path.write_text("[]")
    with pytest.raises(FormatError, match="another format"):
        Edit.load(tmp_path / "edit")


def test_a_batch_and_mixed_layer_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch"):
        Edit({"a": LowRank(torch.ones(2, 1, 3), torch.ones(2, 1, 3))}).save(tmp_path / "edit")
    one = LowRank(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(InputError, match="mixes"):
        Edit({"a": one, "b": one}, frozenset("a")).save(tmp_path / "edit")
    assert not os.listdir(tmp_path)


def test_an_existing_folder_is_refused_and_replaced_by_force(tmp_path: Path) -> None:
    first, second = random_edit("llama", 3), random_edit("llama", 4)
    first.save(tmp_path / "edit")
    with pytest.raises(InputError, match="--force"):
        second.save(tmp_path / "edit")
    assert_same(Edit.load(tmp_path / "edit"), first)
    (tmp_path / "edit" / "left over").touch()
    second.save(tmp_path / "edit", force=True)
    assert_same(Edit.load(tmp_path / "edit"), second)
    assert os.listdir(tmp_path) == ["edit"]
    assert "left over" not in os.listdir(tmp_path / "edit")
    (tmp_path / "empty").mkdir()
    first.save(tmp_path / "empty")
    assert_same(Edit.load(tmp_path / "empty"), first)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        first.save(tmp_path / "file", force=True)


@pytest.mark.parametrize("failing", ["write_json", "fsync", "replace 1", "replace 4", "replace 5"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_nothing_and_keeps_the_old(
    failing: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = random_edit("llama", 3), random_edit("llama", 4)
    if existing:
        first.save(tmp_path / "edit")

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    name, _, place = failing.partition(" ")
    replace, calls = os.replace, []

    def fail_at(source: Any, target: Any) -> None:
        calls.append(source)
        replace(source, target) if len(calls) != int(place) else fail()

    with monkeypatch.context() as patch:
        if place:  # three files are renamed, then the old folder away, then the new folder in
            patch.setattr(os, "replace", fail_at)
        else:
            owner = {"write_json": adapter, "fsync": os}[name]
            patch.setattr(owner, name, fail)
        if failing == "replace 5" and not existing:
            second.save(tmp_path / "edit")
            shutil.rmtree(tmp_path / "edit")
        else:
            with pytest.raises(KeyboardInterrupt):
                second.save(tmp_path / "edit", force=True)
    if existing:
        assert_same(Edit.load(tmp_path / "edit"), first)
    assert [name for name in os.listdir(tmp_path) if os.listdir(tmp_path / name)] == (["edit"] if existing else [])
