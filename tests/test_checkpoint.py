from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, inputs, tiny
from mendlm.apply import applied
from mendlm.checkpoint import load_editor, parse_config, save_editor
from mendlm.editor import Editor
from mendlm.errors import FormatError, InputError, LayerError, NumericalError
from mendlm.layers import default_layers
from mendlm.methods.finetune import FineTuneConfig
from mendlm.methods.mend import Mend, MendConfig
from mendlm.models import base_of
from mendlm.tasks import EditExample
from mendlm.tensors import read_tensors, write_tensors
from mendlm.text import Formatter
from mendlm.training import TrainConfig

FACTS = [
    ("The capital of France is", " Lyon"),
    ("Who runs it?", "Ana Lund"),
    ("a", "b"),
    ("The river", " stands still"),
    ("x", "y z"),
]


def perturbed(name: str = "llama", **config: Any) -> Mend:
    """An editor as if trained: no parameter at its start, and with statistics."""
    method = Mend(default_layers(tiny(name)), MendConfig(rank=4, **config))
    rng = torch.Generator().manual_seed(1)
    form = Formatter.of(tiny(name), byte_tokenizer())
    method.fit_normalizer(method.gradient(tiny(name), form.batch([form.encode(*fact) for fact in FACTS])))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return method


def assert_same(loaded: Mend, method: Mend) -> None:
    assert (loaded.config, loaded.specs) == (method.config, method.specs)
    own = method.state_dict()
    assert list(loaded.state_dict()) == list(own)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == own[name].dtype
        assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize(
    "config",
    [{}, {"shared": False}, {"inputs": "smaller", "layers": ("mlp.down_proj",)}, {"normalize": False, "init": "xavier"}],
)
def test_an_editor_is_loaded_to_the_bit(config: dict[str, Any], tmp_path: Path) -> None:
    method = perturbed(**config)
    save_editor(tmp_path / "editor.safetensors", method, {"base": {"name": "tiny"}, "step": 3})
    for path in (tmp_path, tmp_path / "editor.safetensors"):
        loaded, about = load_editor(path)
        assert_same(loaded, method)
        assert about == {"base": {"name": "tiny"}, "step": 3}
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_bfloat16_file_rounds_the_networks_and_nothing_else(tmp_path: Path) -> None:
    method = perturbed()
    save_editor(tmp_path / "a", method, {}, torch.bfloat16)
    save_editor(tmp_path / "b", method, {})
    loaded, _ = load_editor(tmp_path / "a")
    for name, tensor in loaded.state_dict().items():
        own = method.state_dict()[name]
        assert tensor.dtype == own.dtype
        assert torch.equal(tensor, own.bfloat16().float() if name.startswith("nets.") else own), name
    assert (tmp_path / "a").stat().st_size < 0.8 * (tmp_path / "b").stat().st_size


def rewrite(path: Path, change: Any) -> None:
    tensors, metadata = read_tensors(path)
    content = json.loads(metadata["editor"])
    change(tensors, metadata, content)
    if metadata.get("editor"):
        metadata["editor"] = json.dumps(content)
    write_tensors(path, tensors, metadata)


CHANGES = {
    "other format": lambda t, m, c: m.update(format="mendlm-editor-0"),
    "no format": lambda t, m, c: m.pop("format"),
    "no description": lambda t, m, c: m.update(editor=""),
    "missing tensor": lambda t, m, c: t.pop("log_rates"),
    "extra tensor": lambda t, m, c: t.update(more=torch.ones(1)),
    "wrong shape": lambda t, m, c: t.update(log_rates=torch.ones(2)),
    "no layers": lambda t, m, c: c.pop("layers"),
    "no about": lambda t, m, c: c.update(about=None),
    "empty layers": lambda t, m, c: c.update(layers=[]),
    "layer of another shape": lambda t, m, c: c["layers"][0].update(d_out=25),
    "layer of terrible size": lambda t, m, c: c["layers"][0].update(d_out=2 * 10**12),
    "layer of impossible size": lambda t, m, c: c["layers"][0].update(d_out=10**30),
    "layer of no size": lambda t, m, c: c["layers"][0].update(d_out="24"),
    "layer with more": lambda t, m, c: c["layers"][0].update(more=1),
    "unknown setting": lambda t, m, c: c["config"].update(more=1),
    "other rank": lambda t, m, c: c["config"].update(rank=5),
    "rank of no number": lambda t, m, c: c["config"].update(rank="x"),
    "negative rank": lambda t, m, c: c["config"].update(rank=-1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_editor_that_does_not_fit_itself_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "editor.safetensors"
    save_editor(path, perturbed(), {})
    rewrite(path, CHANGES[kind])
    with pytest.raises(FormatError) as caught:
        load_editor(tmp_path)
    assert str(path) in str(caught.value)


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "editor.safetensors"
    save_editor(path, perturbed(), {})
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    editor = content.index(b'"editor"')
    flips = [0, 5, 7, 8, editor + 2, editor + 14, header - 60]
    damaged = [content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :] for i in flips]
    for bad in [*damaged, content[:-1], content[: len(content) // 2], content[:20], b""]:
        path.write_bytes(bad)
        with pytest.raises(FormatError) as caught:
            load_editor(path)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(FormatError, match="does not exist"):
        load_editor(tmp_path)


def saved_for(model: Any, folder: Path) -> Path:
    save_editor(folder / "editor.safetensors", perturbed(), {"base": base_of(model), "step": 1})
    return folder


def test_an_editor_of_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    folder = saved_for(model, tmp_path)
    assert Editor.load(folder, model, tokenizer).about["step"] == 1
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight[5, 3] += 1e-3
    with pytest.raises(FormatError, match="another base model"):
        Editor.load(folder, other, tokenizer)
    Editor.load(folder, other, tokenizer, force=True)
    edit = Editor.load(folder, model, tokenizer).edit(*FACTS[0])
    edit.require_base(model)
    with pytest.raises(FormatError, match="another base model"):
        edit.require_base(other)


@pytest.mark.parametrize("force", [False, True])
def test_an_editor_for_other_layers_is_refused(force: bool, tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="was trained for"):
        Editor.load(saved_for(tiny("llama"), tmp_path), tiny("gpt2"), byte_tokenizer(), force=force)


def editor(name: str = "llama") -> Editor:
    return Editor(perturbed(name), tiny(name), byte_tokenizer())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_many_edits_equal_each_alone(name: str) -> None:
    edit = editor(name)
    many = edit.edit_many(FACTS, batch_size=2)
    assert [e.about["request"]["prompt"] for e in many] == [prompt for prompt, _ in FACTS]
    for fact, one in zip(FACTS, many, strict=True):
        alone = edit.edit(*fact)
        assert alone.about == one.about
        for layer, update in alone.updates.items():
            assert one.updates[layer].rows == update.rows
            torch.testing.assert_close(one.updates[layer].dense(), update.dense(), atol=1e-5, rtol=1e-4)
            assert update.dense().abs().max() > 1e-4


def test_an_edit_is_the_editor_s_transform_of_the_request_s_gradient() -> None:
    edit = editor()
    form = edit.formatter
    for (prompt, target), question in ((FACTS[0], False), (FACTS[1], True)):
        batch = form.batch([form.encode(prompt, target, end=question)])
        expected = edit.method.transform(edit.method.gradient(edit.model, batch))[0]
        for name, update in edit.edit(prompt, target).updates.items():
            torch.testing.assert_close(update.dense(), expected.updates[name].dense())
    ended = edit.edit_many([EditExample(prompt="It is", target="so", question=True)])[0]
    assert torch.equal(
        ended.updates[edit.method.specs[0].name].u,
        edit.edit("It is", "so", target_end="always").updates[edit.method.specs[0].name].u,
    )
    assert ended.rows == edit.edit("It is", "so").rows + 1
    assert edit.edit("It is", "so", chat=True).rows > ended.rows


def test_scale_multiplies_the_edit() -> None:
    edit = editor()
    once, thrice = edit.edit(*FACTS[0]), edit.edit(*FACTS[0], scale=3.0)
    for name, update in once.updates.items():
        torch.testing.assert_close(thrice.updates[name].dense(), 3 * update.dense())
    assert thrice.about["request"]["scale"] == 3.0


def test_an_edit_is_recorded_on_the_model_as_it_runs() -> None:
    edit = editor()
    first = edit.edit(*FACTS[0]) * 5.0
    alone = edit.edit(*FACTS[3])
    with applied(edit.model, first):
        after = edit.edit(*FACTS[3])
    differences = [(after.updates[n].dense() - u.dense()).abs().max().item() for n, u in alone.updates.items()]
    assert max(differences) > 1e-3
    given = inputs(edit.model)
    assert torch.equal(edit.model(**given).logits, tiny("llama")(**given).logits)


def test_an_edit_that_is_not_finite_is_refused() -> None:
    edit = editor()
    with torch.no_grad():
        edit.method.log_rates[0] = float("inf")
    with pytest.raises(NumericalError, match="nothing was edited"):
        edit.edit(*FACTS[0])


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (TrainConfig, {"stepz": 3}, "unknown setting 'stepz'"),
        (TrainConfig, {"steps": "many"}, "'steps'.*integer.*'many'"),
        (TrainConfig, {"steps": 1.5}, "'steps'.*1.5"),
        (TrainConfig, {"steps": 0}, "^steps must be at least 1, got 0$"),
        (TrainConfig, {"valid_examples": -1}, "^valid_examples must be at least 1"),
        (TrainConfig, {"chat_share": 1.5}, "^chat_share is a share"),
        (TrainConfig, {"learning_rate": -1e-3}, "^learning_rate must be"),
        (TrainConfig, {"learning_rate": float("nan")}, "^learning_rate must be"),
        (TrainConfig, {"clip": float("inf")}, "^clip must be"),
        (TrainConfig, {"batch_size": 10, "num_edits": 3}, "^batch_size 10 must be a multiple of num_edits 3$"),
        (TrainConfig, {"target_end": "sometimes"}, "'target_end'.*'auto', 'always' or 'never'"),
        (TrainConfig, {"replay": "perhaps"}, "'replay'"),
        (MendConfig, {"layers": "mlp"}, "'layers'"),
        (MendConfig, {"init": "zeros"}, "'init'"),
        (MendConfig, {"rank": 0}, "^rank must be at least 1"),
        (MendConfig, {"initial_rate": 0}, "^initial_rate must be above 0"),
        (FineTuneConfig, {"optimizer": "adagrad"}, "'optimizer'"),
        (FineTuneConfig, {"steps": 0}, "^fine-tuning needs steps"),
    ],
)
def test_wrong_settings_are_refused(kind: type, values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_config(kind, values)


def test_right_settings_are_parsed() -> None:
    assert parse_config(TrainConfig, {"steps": "7", "learning_rate": 1, "replay": False}) == replace(
        TrainConfig(), steps=7, learning_rate=1.0, replay=False
    )
    assert parse_config(MendConfig, {"layers": ["a", "b"]}).layers == ("a", "b")
