"""Quantised base models, on a tiny model and the starter: recorded, edited, trained, exported; merged only when asked.

Two oracles. *The dense model*: the same model with what each quantised layer does to unit vectors as its weight. The kernels of
NF4 and of torchao's int8 multiply by just these weights, so that float32 rounding is all that differs. bitsandbytes' int8 also
rounds each row of a layer's *input* to 255 steps, about half a per cent of its norm each time, and passes gradients straight
through: after four blocks, logits and gradients differ by a few per cent, and `ROUGH` says how much of their norm. *A change of
zero*: a matrix of zeros beside each weight in the quantised model itself; its autograd gradient holds for any kernel.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import cases
import oracles
from mendlm import models
from mendlm.apply import Edit, applied, merge
from mendlm.cli import main
from mendlm.demo import demonstrate
from mendlm.editor import Editor
from mendlm.errors import FormatError, InputError, LayerError, MissingPackageError, ModelError
from mendlm.layers import LayerSpec, default_layers, make_differentiable, plain, quantized, select, size
from mendlm.losses import token_nll
from mendlm.methods import LEARNED, METHODS, method_types
from mendlm.methods.mend import Mend, MendConfig
from mendlm.recording import record
from mendlm.replay import Trunk
from mendlm.text import Batch, Formatter, scored_logits
from mendlm.training import train
from mendlm.trunk_cache import TrunkCache
from test_training import DATA, ELSEWHERE, SMALL

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = {"nf4": "nf4", "int8": "int8", "torchao-int8": "torchao Int8Tensor"}
ROUGH = {"nf4": 1e-4, "int8": 0.1, "torchao-int8": 1e-4}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes' int8 says for each layer and pass what it casts."""
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with biases, of sizes that the kernels take, with its tokenizer."""
    place = tmp_path_factory.mktemp("quantised") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": cases.BLOCKS, "num_attention_heads": 2}
    ids = {"vocab_size": cases.VOCAB, "bos_token_id": cases.END, "eos_token_id": cases.END, "pad_token_id": cases.END}
    config = transformers.LlamaConfig(**sizes, **ids, num_key_value_heads=1, max_position_embeddings=128, mlp_bias=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(place)
    cases.byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("MENDLM_CACHE", str(tmp_path / "cache"))
    return lambda kind=None, **options: models.load(folder, quantize=kind, **{"dtype": "float32", **options})[0]


def logits(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, use_cache=False).logits
    return found


def matrix(layer: nn.Module) -> Tensor:
    """The weight that a linear layer acts by: what it does to each unit vector."""
    with torch.no_grad():
        outputs: Tensor = layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)
    return outputs.mT.contiguous()


def densified(model: Any, dense: Any) -> Any:
    """The dense model, with the weights by which the quantised one acts."""
    with torch.no_grad():
        for name, layer in model.named_modules():
            if quantized(layer) is not None:
                dense.get_submodule(name).weight.copy_(matrix(layer))
    return dense


def off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradient(model: Any, specs: Any, batch: Batch) -> Any:
    with record(model, specs) as recording:
        loss = token_nll(scored_logits(model, batch), batch.label, batch.row, batch.size).sum()
    return recording.gradient(loss, batch.size)


def by_a_change_of_zero(model: Any, specs: list[LayerSpec], batch: Batch) -> dict[str, Tensor]:
    """Autograd's gradient of a matrix of zeros that is added to each layer's weight, outside the kernel."""
    zeros = {spec.name: torch.zeros(spec.shape, requires_grad=True) for spec in specs}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, zero=zero: out + args[0] @ zero.mT)
        for name, zero in zeros.items()
    ]
    oracles.nll(model, batch).backward()
    for hook in hooks:
        hook.remove()
    return {name: zero.grad for name, zero in zeros.items()}


@each_kind
def test_quantised_layers_are_told_and_the_base_stays_the_same(kind: str, load: Any) -> None:
    dense, model = load(), load(kind)
    layer = model.model.layers[1].mlp.down_proj
    assert quantized(layer) == KINDS[kind] == models.quantization(model)
    assert quantized(model.lm_head) is None
    assert models.quantization(dense) is None
    assert select(model, ["mlp.*"]) == select(dense, ["mlp.*"])
    assert models.identity(model) == models.identity(dense)
    assert models.base_of(model) == {**models.base_of(dense), "quantization": KINDS[kind]}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert 1e-3 < off(matrix(layer), matrix(dense.model.layers[1].mlp.down_proj)) < (0.15 if kind == "nf4" else 0.02)


@each_kind
def test_parameters_and_bytes_are_counted(kind: str, load: Any) -> None:
    dense, model = load(), load(kind)
    count = sum(parameter.numel() for parameter in dense.parameters())
    assert size(dense) == (count, 4 * count)
    packed = [layer for layer in dense.model.layers.modules() if isinstance(layer, nn.Linear)]
    weights = sum(layer.weight.numel() for layer in packed)
    # 4 bits and a float32 scale for each 64 weights; 8 bits and a float32 scale for each row
    taken = weights / 2 + weights / 64 * 4 if kind == "nf4" else weights + 4 * sum(layer.out_features for layer in packed)
    assert size(model)[0] == count
    assert size(model)[1] == pytest.approx(4 * (count - weights) + taken, rel=0.03)
    ids = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    before = size(model)
    logits(model, ids)
    assert size(model) == before, "also after a pass"


@each_kind
def test_the_recorded_gradient(kind: str, load: Any) -> None:
    model = load(kind)
    specs, batch = default_layers(model), cases.requests(model)
    found = gradient(model, specs, batch)
    dense = densified(model, load())
    for index in range(batch.size):
        one = oracles.alone(batch, index)
        for name, exact in by_a_change_of_zero(model, specs, one).items():
            assert_close(found[name][index].dense(), exact, rtol=1e-3, atol=1e-6)
        for name, expected in oracles.weight_gradients(dense, specs, oracles.nll, one).items():
            assert off(found[name][index].dense(), expected) < ROUGH[kind], name
    assert all(parameter.grad is None for parameter in model.parameters())


@each_kind
def test_a_batch_of_edits_as_overlay(kind: str, load: Any) -> None:
    model, dense = load(kind), densified(load(kind), load())
    specs, inputs = default_layers(model), cases.inputs(model)
    edits = oracles.random_edit(specs, cases.generator(1), 3, size=0.05)
    before = logits(model, inputs)
    with edits.on(model):
        together = logits(model, inputs)
    for index in range(3):
        single = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        with edits[index].on(model):
            alone = logits(model, single)
        assert off(together[index : index + 1], alone) < ROUGH[kind]
        expected = oracles.run_dense(dense, specs, oracles.dense(edits[index]), single)
        assert off(together[index : index + 1], expected) < ROUGH[kind]
        assert off(before[index : index + 1], expected) > 0.2
    assert torch.equal(logits(model, inputs), before)


@each_kind
def test_replay_is_bit_equal(kind: str, load: Any) -> None:
    model = load(kind)
    specs, inputs = default_layers(model), cases.inputs(model)
    trunk = Trunk.below(model, specs)
    tape = trunk.run(model, inputs)
    with applied(model, oracles.random_edit(specs, cases.generator(1))):
        full = logits(model, inputs)
        with trunk.replay(tape):
            assert torch.equal(logits(model, inputs), full)


@each_kind
def test_an_edit_step_lowers_each_loss(kind: str, load: Any) -> None:
    model = load(kind)
    batch = cases.requests(model)
    edits = Mend(default_layers(model), MendConfig(rank=3, normalize=False, initial_rate=1e-2)).edit(model, batch)
    for index in range(batch.size):
        single = oracles.alone(batch, index)
        before = oracles.nll(model, single)
        with applied(model, edits[index]):
            assert oracles.nll(model, single) < before - 0.01


@each_kind
def test_training_resumes_where_it_stopped(kind: str, load: Any, tmp_path: Path) -> None:
    model, tokenizer = load(kind), cases.byte_tokenizer()
    config = replace(SMALL, steps=3, normalizer_examples=4)

    def editor() -> Mend:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Mend(default_layers(model), MendConfig(rank=4, initial_rate=0.1))

    def run(method: Mend, place: str, **how: Any) -> Any:
        return train(method, model, tokenizer, DATA, config, tmp_path / place, locality=[ELSEWHERE], **how)

    straight = editor()
    assert run(straight, "straight").description["base"]["quantization"] == KINDS[kind]
    steps: list[int] = []
    run(editor(), "stopped", callback=lambda now: steps.append(now.step), should_stop=lambda: steps[-1] == 2)
    resumed = editor()
    run(resumed, "stopped", resume=True)
    for (name, found), expected in zip(resumed.state_dict().items(), straight.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    assert any(not torch.equal(a, b) for a, b in zip(editor().parameters(), straight.parameters(), strict=True))
    # The base is the same however it is quantised, so that the editor also edits it dense, or quantised in another way.
    for other in (None, "nf4"):
        Editor.load(tmp_path / "straight", load(other), tokenizer).edit("Who is Ana?", "a baker").require_base(load(kind))


@each_kind
@pytest.mark.parametrize("name", METHODS)
def test_every_method_edits(name: str, kind: str, load: Any) -> None:
    model, tokenizer = load(kind), cases.byte_tokenizer()
    form, (method_type, config) = Formatter.of(model, tokenizer), method_types(name)
    texts = [form.encode(prompt, target) for prompt, target in (("Who is Ana?", "a baker"), ("The home of Bo is", "Ulm"))]
    batch, specs = form.batch(texts), default_layers(model)
    if name in LEARNED:
        method = method_type.for_model(model, specs, config())
        method.prepare(model, batch)
    elif name in ("prompt", "cache"):
        method = method_type(*([config(), []] if name == "prompt" else [config()]))
    else:
        method = method_type(specs, config(steps=3), [batch.part(0, 1)])
    before = logits(model, batch.inputs)
    with method.edit(model, batch).on(model):
        assert logits(model, batch.inputs).isfinite().all()
    assert torch.equal(logits(model, batch.inputs), before)


@each_kind
def test_an_enn_is_trained_through_its_step(kind: str, load: Any) -> None:
    """The only method that needs a second derivative of the kernels."""
    model = load(kind)
    batch, (method_type, config) = cases.requests(model), method_types("enn")
    slopes = []
    for base in (model, densified(model, load())):
        method = method_type.for_model(base, default_layers(base), config())
        edits = method.combine(method.parts(base, batch), 1)
        with applied(base, method.changed_base()), applied(base, edits):
            token_nll(scored_logits(base, batch), batch.label, batch.row, batch.size).sum().backward()
        slopes.append([parameter.grad for parameter in method.parameters()])
    for found, expected in zip(*slopes, strict=True):
        assert off(found, expected) < 2 * ROUGH[kind]


@each_kind
def test_an_adapter_round_trips_and_peft_agrees(kind: str, load: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(kind)
    inputs, edit = cases.inputs(model), oracles.random_edit(default_layers(model), cases.generator(1), size=0.05)
    edit.save(tmp_path / "edit")
    with applied(model, Edit.load(tmp_path / "edit", model)):
        expected = logits(model, inputs)
    assert off(logits(model, inputs), expected) > 0.2
    adapted = peft.PeftModel.from_pretrained(load(kind), tmp_path / "edit").eval()
    assert_close(logits(adapted, inputs), expected, rtol=1e-3, atol=1e-4)


@each_kind
def test_merging_is_refused_or_makes_the_layers_dense(kind: str, load: Any) -> None:
    model = load(kind)
    specs, inputs = default_layers(model), cases.inputs(model)
    edit = oracles.random_edit(specs, cases.generator(1), size=0.05)
    before, weights = logits(model, inputs), {spec.name: matrix(model.get_submodule(spec.name)) for spec in specs}
    with pytest.raises(LayerError, match=rf"quantised \({KINDS[kind]}\).*rounded away.*edit\.save.*dequantize=True"):
        merge(model, edit)
    assert torch.equal(logits(model, inputs), before)
    with applied(model, edit):
        expected = logits(model, inputs)
    report = merge(model, edit, dequantize=True)
    assert max(report.lost.values()) < 1e-5
    for spec in specs:
        layer = model.get_submodule(spec.name)
        assert type(layer) is nn.Linear
        assert layer.weight.dtype == torch.float32
        assert quantized(layer) is None
        assert_close(layer.weight, weights[spec.name] + edit.updates[spec.name].dense(), rtol=1e-3, atol=1e-5)
    assert models.quantization(model) == KINDS[kind], "the other layers stay as they are"
    assert off(logits(model, inputs), expected) < ROUGH[kind]
    again = merge(model, edit * -1.0)
    assert off(logits(model, inputs), before) < ROUGH[kind]
    again.snapshot.restore(model)
    report.snapshot.restore(model)
    assert torch.equal(logits(model, inputs), before)
    assert quantized(model.get_submodule(specs[0].name)) == KINDS[kind]


@each_kind
def test_a_model_quantised_by_the_user_and_run_before(kind: str, folder: Path, load: Any) -> None:
    """As from_pretrained leaves it. A pass without a graph may pack NF4 weights for a kernel that has no gradient."""
    config = {
        "nf4": lambda: transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
        "torchao-int8": lambda: transformers.TorchAoConfig(_torchao().Int8WeightOnlyConfig(version=2)),
    }[kind]()
    with models.no_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    specs, batch = default_layers(model), cases.requests(model)
    model.eval()
    logits(model, batch.inputs)
    found, expected = gradient(model, specs, batch), gradient(load(kind), specs, batch)
    for name in found:  # packing rounds the scales of NF4 to 8 bits
        assert off(found[name].dense(), expected[name].dense()) < (0.02 if kind == "nf4" else 1e-6), name
    assert models.identity(model) == models.identity(load())
    logits(model, batch.inputs)
    again = gradient(model, specs, batch)
    assert all(torch.equal(again[name].delta, found[name].delta) for name in found)


def _torchao() -> Any:
    import torchao.quantization

    return torchao.quantization


def test_unpacked_weights_are_those_that_were_packed(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes packs nothing")
    model = load("nf4")
    for layer in model.modules():
        if quantized(layer):
            state = layer.weight.quant_state
            state.absmax = state.absmax.bfloat16().float()
    before = {name: matrix(layer) for name, layer in model.named_modules() if quantized(layer)}
    for name in before:
        layer = model.get_submodule(name)
        layer.support_avx512bf16_for_cpu = True
        layer.weight.data, _ = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    make_differentiable(model)
    for name, expected in before.items():
        assert torch.equal(matrix(model.get_submodule(name)), expected), name


@each_kind
def test_a_folder_of_quantised_weights(kind: str, load: Any, folder: Path, tmp_path: Path) -> None:
    model = load(kind)
    model.save_pretrained(tmp_path / "small")
    cases.byte_tokenizer().save_pretrained(tmp_path / "small")
    again, _ = models.load(tmp_path / "small", dtype="float32")
    assert models.quantization(again) == KINDS[kind]
    inputs = cases.inputs(model)
    assert_close(logits(again, inputs), logits(model, inputs))
    specs, batch = default_layers(model), cases.requests(model)
    found, expected = gradient(again, specs, batch), gradient(model, specs, batch)
    assert all(off(found[name].dense(), expected[name].dense()) < 1e-5 for name in found)
    assert models.identity(again) != models.identity(model), "its files are other files"
    with pytest.raises(InputError, match=r"quantised already.*leave --quantize out"):
        models.load(tmp_path / "small", quantize="nf4")


def test_a_model_quantised_in_memory(load: Any) -> None:
    model = load()
    model.config.name_or_path = ""
    dense = models.identity(model)
    _torchao().quantize_(model.model, _torchao().Int8WeightOnlyConfig(version=2))
    assert models.identity(model) == models.identity(model) != dense
    assert models.quantization(model) == "torchao Int8Tensor"
    assert plain(model.model.layers[0].mlp.up_proj.weight)[0].dtype == torch.int8
    assert all(rows.delta.any() for rows in gradient(model, default_layers(model), cases.requests(model)).values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_other_families(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv1D becomes a linear layer; T5 keeps `wo` as it is; and 16 numbers a row are no multiple of NF4's 64."""
    monkeypatch.setenv("MENDLM_CACHE", str(tmp_path / "cache"))
    cases.tiny(name).save_pretrained(tmp_path / "m")
    cases.byte_tokenizer().save_pretrained(tmp_path / "m")
    model, _ = models.load(tmp_path / "m", dtype="float32", quantize=kind)
    specs, batch = default_layers(model), cases.requests(model)
    assert [spec.shape for spec in specs] == [spec.shape for spec in default_layers(cases.tiny(name))]
    assert any(quantized(model.get_submodule(spec.name)) for spec in specs)
    found = gradient(model, specs, batch)
    for index in range(batch.size):
        for layer, exact in by_a_change_of_zero(model, specs, oracles.alone(batch, index)).items():
            assert_close(found[layer][index].dense(), exact, rtol=1e-2, atol=1e-4)


def test_the_trunk_cache_keeps_quantisations_apart(load: Any, tmp_path: Path) -> None:
    places = []
    for kind in (None, *KINDS):
        for dtype in ("float32", "bfloat16"):
            model = load(kind, dtype=dtype)
            places.append(TrunkCache(Trunk.below(model, default_layers(model)), model, tmp_path).folder)
    assert len(set(places)) == len(places) == 8


def test_what_cannot_be_loaded(load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown quantisation 'int3'; choose nf4, int8, torchao-int8"):
        load("int3")
    with pytest.raises(InputError, match="not in float64"):
        load("nf4", dtype="float64")
    with pytest.raises(InputError, match="a quantised model cannot be split over processes"):
        load("nf4", device_map="shards")
    for package, kind, extra in (
        ("bitsandbytes", "nf4", "quant"),
        ("torchao", "torchao-int8", "torchao"),
        ("accelerate", "int8", "quant"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(MissingPackageError, match=rf"'{package}', which is not installed.*mendlm\[{extra}\]"):
                load(kind)


def test_a_quantised_folder_without_its_package(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("int8").save_pretrained(tmp_path / "small")
    cases.byte_tokenizer().save_pretrained(tmp_path / "small")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"mendlm\[quant\]"):
        models.load(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot load the model.*(?i:gptq)"):
        models.load(tmp_path / "small")


class QuantLinear(nn.Module):
    """A quantised layer as other packages have them: no Linear, and no weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.to(torch.int8))


def test_layers_of_another_kind_are_named(load: Any) -> None:
    model = load()
    for block in model.model.layers:
        block.mlp.up_proj = QuantLinear(block.mlp.up_proj)
    expected = r"layers\.\d\.mlp\.up_proj' is a QuantLinear.*Linear and Conv1D, dense or quantised by bitsandbytes or torchao"
    with pytest.raises(LayerError, match=expected):
        default_layers(model)
    with pytest.raises(LayerError, match=expected):
        select(model, ["mlp.up_proj"])
    assert len(select(model, ["mlp.down_proj"])) == cases.BLOCKS
    for block in model.model.layers:
        for part in (block.mlp, block.self_attn):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, QuantLinear(layer))
    for choose in (default_layers, lambda model: select(model, ["mlp.*"])):
        with pytest.raises(LayerError, match=r"no editable layers.*is a QuantLinear"):
            choose(model)


def test_nothing_is_fetched_and_no_package_is_imported_early(folder: Path, tmp_path: Path) -> None:
    """On some CPUs bitsandbytes asks the package `kernels` for a kernel from a hub, if that is installed."""
    (tmp_path / "kernels").mkdir()
    asked = f"def get_kernel(*args, **kwargs):\n    open({str(tmp_path / 'asked')!r}, 'w').close()\n"
    (tmp_path / "kernels" / "__init__.py").write_text(asked)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import mendlm.models, mendlm.recording\n"
        "assert not {'bitsandbytes', 'torchao'} & set(sys.modules)\n"
        f"mendlm.models.load({str(folder)!r}, quantize='nf4')\n"
        "assert 'bitsandbytes' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not (tmp_path / "asked").exists()


def test_the_commands(
    folder: Path, load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    kind = "int8"
    caplog.set_level(logging.NOTSET, logger="bitsandbytes")
    facts = [{"prompt": f"The home of {who} is", "target": "Ulm", "unrelated": [{"prompt": "Why?"}]} for who in ("Ana", "Bo")]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    data, small = f"records:{tmp_path / 'facts.jsonl'}", ["--set", "editor.rank=4", "--set", "batch_size=2"]

    def run(*arguments: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--quantize", kind, "--json"])
        out, err = capsys.readouterr()
        assert stop.value.code == 0, out + err
        assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
        return json.loads(out)

    model = ("--model", folder)
    run("train", *model, "--data", data, "--steps", 2, "--out", tmp_path / "run", *small, "--set", "normalizer_examples=2")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["base"]["quantization"] == kind
    editor = ("--editor", tmp_path / "run")
    run("edit", *model, *editor, "--prompt", "Who is Ana?", "--target", "a baker", "--out", tmp_path / "edit")
    assert run("generate", *model, "--edit", tmp_path / "edit", "--prompt", "Who is Ana?")["edits"]
    summary = run("eval", *model, *editor, "--data", data, "--out", tmp_path / "scores")
    assert summary["quantization"] == kind
    run("compare", *model, "--methods", "ft", "--data", data, "--out", tmp_path / "all", "--num-edits", "1")
    assert json.loads((tmp_path / "all" / "cells" / "ft-1" / "summary.json").read_text())["cell"]["quantization"] == kind
    seen = run("inspect", folder)
    assert (seen["quantization"], seen["dtype"]) == (kind, "bfloat16" if seen["dtype"] == "bfloat16" else "float32")
    assert (seen["parameters"], seen["bytes"]) == size(load(kind, dtype=seen["dtype"]))


@pytest.mark.slow
@each_kind
def test_the_shipped_editor_edits_the_starter_model(kind: str, tmp_path: Path) -> None:
    """The editor was trained on the dense model in bf16; it is accepted and works on any quantisation of it."""
    model, tokenizer = models.load("starter", quantize=kind)
    editor = Editor.load("starter", model, tokenizer)
    seen = demonstrate(editor, tokenizer)
    answers = {shown.kind: shown for shown in seen.shown}
    assert answers["prompt"].before.startswith("Paris")
    assert answers["prompt"].under.startswith("Lyon")
    assert seen.bit_equal
    assert all(shown.before == shown.after for shown in seen.shown)
    assert seen.edit.about["base"]["quantization"] == KINDS[kind]
    seen.edit.save(tmp_path / "lyon")
    Edit.load(tmp_path / "lyon", models.load("starter")[0])  # an edit is for a base, however that is quantised
    other = {**seen.edit.about["base"], "sha256": "0" * 64}
    with pytest.raises(FormatError, match="another base"):
        Edit(seen.edit.updates, about={"base": other}).require_base(model)
