from __future__ import annotations

import copy
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from cases import byte_tokenizer, tiny
from mendlm import training
from mendlm.checkpoint import Run, load_editor
from mendlm.errors import FormatError, InputError, MissingPackageError, NumericalError, StorageError
from mendlm.layers import default_layers
from mendlm.lowrank import LowRank
from mendlm.methods.mend import Mend, MendConfig
from mendlm.replay import Trunk
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.tensors import read_tensors
from mendlm.text import Encoded, Formatter
from mendlm.training import Drawn, TrainConfig, Trainer, descend, draw, outer_loss, train

NAMES = ("Ana", "Bo Rask", "Cy", "Dora Lund Vale", "Eli", "Fay Ott", "Gus", "Hedda of the North", "Ivo", "Jo", "Kim", "Lea")


def example(index: int) -> EditExample:
    name = NAMES[index % len(NAMES)]
    asked = index % 3 == 0
    return EditExample(
        prompt=f"Who is {name}?" if asked else f"The home of {name} is",
        target="a baker" if asked else f" town {index}",
        rephrasings=(f"{name} lives in", f"Where {name} lives:") if index % 4 else (),
        unrelated=(Probe(f"The river of {name}", "is long"), Probe(f"{name} likes")) if index % 5 else (),
        question=asked,
    )


def facts(first: int, count: int) -> Dataset:
    examples = tuple(example(i) for i in range(first, first + count))
    return Dataset(f"records:{first}", f"{first}+{count}", examples, tuple(p for e in examples for p in e.unrelated))


DATA, VALID = facts(0, 11), facts(20, 7)
ELSEWHERE = Dataset("nq:x", "x", (), (Probe("What is it?", "A thing"), Probe("Why?", "So"), Probe("How many are there", None)))
SMALL = TrainConfig(
    steps=6, batch_size=4, normalizer_examples=8, valid_every=2, checkpoint_every=2, chat_share=0.3, continuation_share=0
)


def new_method(name: str = "llama", seed: int = 0, **config: Any) -> Mend:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mend(default_layers(tiny(name)), MendConfig(rank=4, initial_rate=0.1, **config))


def fitted(name: str, model: Any, form: Formatter, drawn: Sequence[Drawn]) -> Mend:
    method = new_method(name).to(model.dtype)
    rng = torch.Generator().manual_seed(1)
    for one in drawn:
        method.fit_normalizer(method.gradient(model, form.batch([one.edit])))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype))
    return method


def draws(form: Formatter, config: TrainConfig, count: int = 8) -> list[Drawn]:
    rng = random.Random(5)
    return [draw(example(i), ELSEWHERE.probes, form, config, rng) for i in range(count)]


def dense_update(method: Mend, model: Any, form: Formatter, text: Encoded) -> dict[str, Tensor]:
    """Weight name -> the edit's change of it; `u` and `delta` by hooks and `retain_grad` on a trainable copy."""
    model = copy.deepcopy(model).requires_grad_(True)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return hook

    for spec in method.specs:
        model.get_submodule(spec.name).register_forward_hook(keep(spec.name))
    inputs, places = oracles.one_text(model, form, text)
    logits = model(**inputs, use_cache=False).logits[0, places]
    logits.log_softmax(-1)[range(len(text.target)), list(text.target)].mean().neg().backward()
    gradient = {
        name: LowRank(u.reshape(1, -1, u.shape[-1]), out.grad.reshape(1, -1, out.shape[-1])) for name, (u, out) in seen.items()
    }
    edit = method.transform(gradient)
    return {
        f"{s.name}.weight": edit.updates[s.name].dense()[0].T if s.transposed else edit.updates[s.name].dense()[0]
        for s in method.specs
    }


def naive_loss(method: Mend, model: Any, form: Formatter, drawn: Sequence[Drawn], config: TrainConfig) -> dict[str, Tensor]:
    def weights_of(texts: Sequence[Encoded]) -> dict[str, Tensor]:
        updates = [dense_update(method, model, form, text) for text in texts]
        return {name: model.get_parameter(name) + sum(update[name] for update in updates) for name in updates[0]}

    return oracles.outer_loss(model, form, drawn, config, weights_of)


def grads(loss: Tensor, method: Mend) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(method.parameters()))])


CASES = [
    ("gpt2", torch.float64, {}),
    ("gpt2", torch.float64, {"num_edits": 2, "edit_weight": 1.0, "locality_weight": 0.3}),
    ("llama", torch.float32, {"own_locality": 0.0, "target_end": "always"}),
    ("llama", torch.float32, {"num_edits": 4, "chat_share": 0.5}),
    ("opt", torch.float64, {"whole_target": True, "locality_scale": 0.01}),
    ("t5", torch.float32, {}),
    ("bart", torch.float64, {"num_edits": 2}),
]


@pytest.mark.parametrize(("name", "dtype", "settings"), CASES)
def test_the_outer_loss_and_its_gradient_equal_the_naive_ones(name: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    config = TrainConfig(batch_size=8, **settings)
    model = copy.deepcopy(tiny(name)).to(dtype)
    form = Formatter.of(model, byte_tokenizer())
    drawn = draws(form, config, 4)
    assert len({len(d.edit) for d in drawn}) >= 3
    method = fitted(name, model, form, drawn)
    expected = naive_loss(method, model, form, drawn, config)
    gradient = grads(expected["loss"], method)
    exact = dtype == torch.float64
    for trunk in (Trunk.below(model, method.specs), Trunk(())):
        loss, sums = outer_loss(method, model, form, trunk, drawn, config)
        for key, value in expected.items():
            torch.testing.assert_close(sums[key].double(), value.detach().double(), rtol=1e-9 if exact else 2e-5, atol=1e-6)
        found = grads(loss, method)
        assert ((found - gradient).norm() / gradient.norm()).item() < (1e-8 if exact else 2e-4)
    assert gradient.norm() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_of_a_batch_is_the_sum_of_its_examples() -> None:
    config, model = SMALL, tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    drawn = draws(form, config)
    method = fitted("llama", model, form, drawn)
    trunk = Trunk.below(model, method.specs)
    together, sums = outer_loss(method, model, form, trunk, drawn, config)
    alone = [outer_loss(method, model, form, trunk, [d], config) for d in drawn]
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)
    for name, value in sums.items():
        torch.testing.assert_close(value, sum(one[name] for _, one in alone), rtol=1e-5, atol=1e-5)
    gradient = sum(grads(loss, method) for loss, _ in alone)
    assert ((grads(together, method) - gradient).norm() / gradient.norm()).item() < 1e-4


@pytest.mark.parametrize(("k", "micro", "sizes"), [(1, 3, [3, 3, 2]), (2, 3, [2, 2, 2, 2]), (4, 2, [4, 4]), (1, None, [8])])
def test_a_step_in_parts_is_the_step(k: int, micro: int | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, num_edits=k, micro_batch_size=micro)
    model = copy.deepcopy(tiny("llama")).double()
    form = Formatter.of(model, byte_tokenizer())
    drawn = draws(form, config)
    method = fitted("llama", model, form, drawn)
    trunk = Trunk.below(model, method.specs)
    loss, expected = outer_loss(method, model, form, trunk, drawn, config)
    gradient = grads(loss / 8, method)
    asked: list[int] = []
    monkeypatch.setattr(training, "outer_loss", lambda *args: asked.append(len(args[4])) or outer_loss(*args))
    sums, norm = descend(method, model, form, trunk, torch.optim.SGD(method.parameters(), lr=0.0), drawn, config, 8)
    assert asked == sizes
    for name, value in expected.items():
        torch.testing.assert_close(sums[name], value)
    torch.testing.assert_close(norm, gradient.norm())
    found = torch.cat([parameter.grad.flatten() for parameter in method.parameters()])
    torch.testing.assert_close(found, gradient * min(1.0, config.clip / norm.item()), rtol=1e-5, atol=1e-6)


class Unsynchronised(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, and results whose shape the numbers decide."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"), name
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not by_mask, "index by a mask"
        return func(*args, **(kwargs or {}))


def eager_case(config: TrainConfig, device: str) -> tuple[Any, ...]:
    """What `outer_loss` takes, on a model whose attention does not ask whether a mask is all ones."""
    model = copy.deepcopy(tiny("llama")).to(device)
    model.set_attn_implementation("eager")
    form = Formatter.of(model, byte_tokenizer())
    drawn, method = draws(form, config), new_method().to(device)
    return method, model, form, Trunk.below(model, method.specs), drawn, config


@pytest.mark.parametrize("num_edits", [1, 2])
def test_a_step_reads_no_number_of_the_device(num_edits: int) -> None:
    case = eager_case(replace(SMALL, num_edits=num_edits), "cpu")
    with Unsynchronised():
        loss, _ = outer_loss(*case)
        loss.backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_edits", [1, 2])
def test_a_step_never_waits_for_the_device(num_edits: int) -> None:
    case = eager_case(replace(SMALL, num_edits=num_edits), "cuda")
    outer_loss(*case)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outer_loss(*case)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_requests_without_anything_unrelated_have_no_locality_loss() -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    drawn = [draw(example(0), (), form, SMALL, random.Random(0)) for _ in range(2)]
    assert all(d.unrelated is None for d in drawn)
    method = fitted("llama", model, form, drawn)
    _, sums = outer_loss(method, model, form, Trunk(()), drawn, SMALL)
    assert sums["locality_loss"].item() == sums["locality"].item() == 0


def test_a_long_unrelated_answer_is_scored_in_a_run_from_a_random_place() -> None:
    form, config, rng = (
        Formatter.of(tiny("llama"), byte_tokenizer()),
        TrainConfig(locality_tokens=3, continuation_share=0),
        random.Random(0),
    )
    probe = Probe("The river", "runs to the sea")
    whole = form.encode(probe.prompt, probe.answer)
    texts = [draw(example(0), [probe], form, config, rng).unrelated for _ in range(200)]
    assert {len(text.target) for text in texts if text} == {3}
    assert all((whole.prompt + whole.target)[: len(text)] == text.prompt + text.target for text in texts if text)
    assert {len(text.prompt) for text in texts if text} == set(range(len(whole.prompt), len(whole) - 2))
    form = Formatter.of(tiny("t5"), byte_tokenizer())  # its decoder starts from nothing: the answer's beginning is scored
    whole, text = form.encode(probe.prompt, probe.answer), draw(example(0), [probe], form, config, rng).unrelated
    assert text == Encoded(whole.prompt, whole.target[:3])


@pytest.mark.parametrize("place", ["prompt", "rephrasings", "unrelated", "elsewhere", "valid"])
@pytest.mark.parametrize("letter", ["a", "ä"])
def test_a_text_that_does_not_fit_is_said_before_the_first_step(place: str, letter: str, tmp_path: Path) -> None:
    long, end = letter * (129 if letter == "a" else 65), facts(0, 9)
    change = {
        "prompt": {"prompt": long},
        "rephrasings": {"rephrasings": ("short", long)},
        "unrelated": {"unrelated": (Probe("Why?", long),)},
    }.get(place, {})
    data = replace(end, examples=(*end.examples[:-1], replace(end.examples[-1], **change)))
    valid = replace(end, examples=(replace(end.examples[0], prompt=long),)) if place == "valid" else None
    locality = [replace(ELSEWHERE, probes=(*ELSEWHERE.probes, Probe(long, None)))] if place == "elsewhere" else []
    config = replace(SMALL, steps=1, batch_size=1, normalizer_examples=1, valid_examples=1, own_locality=0.0)
    with pytest.raises(InputError, match="the model's window 128"):
        train(new_method(), tiny("llama"), byte_tokenizer(), data, config, tmp_path / "run", valid=valid, locality=locality)
    assert not (tmp_path / "run").exists()
    if place == "unrelated":  # with another source and own_locality at 0 it is never drawn
        train(new_method(), tiny("llama"), byte_tokenizer(), data, config, tmp_path / "run", locality=[ELSEWHERE])
    if place == "valid":  # nor is what lies behind the first valid_examples
        valid = replace(end, examples=(end.examples[0], *valid.examples))
        train(new_method(), tiny("llama"), byte_tokenizer(), data, config, tmp_path / "run", valid=valid)


def test_a_request_and_its_rephrasing_have_one_form() -> None:
    form, config, rng = Formatter.of(tiny("llama"), byte_tokenizer()), TrainConfig(chat_share=0.5), random.Random(0)
    drawn = [draw(example(1), (), form, config, rng) for _ in range(40)]
    forms = {tuple(form.decode(text.prompt).startswith("[user]") for text in (d.edit, d.rephrasing)) for d in drawn}
    assert forms == {(True, True), (False, False)}


def test_an_unrelated_text_mostly_has_its_request_s_form_and_is_seen_in_the_other_too() -> None:
    form, config, rng = Formatter.of(tiny("llama"), byte_tokenizer()), TrainConfig(chat_share=0.2), random.Random(0)
    drawn = [draw(example(0), ELSEWHERE.probes, form, config, rng) for _ in range(1000)]
    chats = [[form.decode(text.prompt).startswith("[user]") for text in (d.edit, d.unrelated) if text] for d in drawn]
    shares = [
        sum(other for own, other in chats if own == chat) / sum(own == chat for own, _ in chats) for chat in (True, False)
    ]
    assert shares == pytest.approx([0.6, 0.1], abs=0.08)  # half of them, and of the other half a fifth


def test_what_follows_an_edited_statement_is_watched_and_what_follows_an_ended_answer_is_not() -> None:
    form, rng = Formatter.of(tiny("llama"), byte_tokenizer()), random.Random(0)
    config = TrainConfig(continuation_share=1.0)
    statement, question = (replace(example(1), question=asked) for asked in (False, True))
    for _ in range(20):
        texts = draw(statement, ELSEWHERE.probes, form, config, rng)
        assert texts.unrelated in [Encoded(said.prompt + said.target, ()) for said in (texts.edit, texts.rephrasing)]
    known = {form.encode(p.prompt, p.answer) for p in (*ELSEWHERE.probes, *question.unrelated)}
    assert all(draw(question, ELSEWHERE.probes, form, config, rng).unrelated in known for _ in range(20))


def test_draws_mix_sources_forms_and_ends_as_configured() -> None:
    form = Formatter.of(tiny("llama"), byte_tokenizer())
    probes = ELSEWHERE.probes

    def drawn(**settings: Any) -> list[Drawn]:
        config, rng = TrainConfig(**{"continuation_share": 0} | settings), random.Random(0)
        return [draw(example(i % 3 + 1), probes, form, config, rng) for i in range(90)]

    def share(settings: dict[str, Any]) -> float:
        own = {form.encode(p.prompt, p.answer) for i in (1, 2, 3) for p in example(i).unrelated}
        return sum(d.unrelated in own for d in drawn(**settings)) / 90

    assert (share({"own_locality": 0.0}), share({"own_locality": 1.0})) == (0, 1)
    assert 0.35 < share({"own_locality": 0.5}) < 0.65
    chats = [d.edit for d in drawn(chat_share=0.5) if form.decode(d.edit.prompt).startswith("[user]")]
    assert 0.35 < len(chats) / 90 < 0.65
    assert all(text.ended for text in chats)
    assert [d.edit.ended for d in drawn()] == [example(i % 3 + 1).question for i in range(90)]
    assert all(d.edit.ended for d in drawn(target_end="always"))
    assert not any(d.rephrasing.ended for d in drawn(target_end="never", chat_share=1.0))
    asked = {form.decode(d.rephrasing.prompt) for d in drawn()}
    assert asked == {p for i in (1, 2, 3) for p in example(i).rephrasings}


def trainer(folder: Path, config: TrainConfig = SMALL, method: Mend | None = None, **more: Any) -> Trainer:
    run = training.Run(folder)
    return Trainer(method or new_method(), tiny("llama"), byte_tokenizer(), DATA, more.get("valid"), [ELSEWHERE], config, run)


def go(folder: Path, config: TrainConfig = SMALL, *, seed: int = 0, model: str = "llama", **more: Any) -> Mend:
    method = new_method(model, seed)
    options = {"locality": [ELSEWHERE], "about": {"note": "x"}, **more}
    train(method, tiny(model), byte_tokenizer(), DATA, config, folder, **options)
    return method


def log(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    assert (one / "run.json").read_bytes() == (other / "run.json").read_bytes()
    for name in ("editor.safetensors", "checkpoint.safetensors"):
        (tensors, metadata), (others, other_metadata) = read_tensors(one / name), read_tensors(other / name)
        assert metadata == other_metadata
        assert list(tensors) == list(others)
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    assert log(one) == log(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run without validation."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    go(folder)
    return folder


@pytest.mark.parametrize(("stop", "valid"), [(1, None), (3, VALID), (4, None)])
def test_a_stopped_run_resumed_equals_an_uninterrupted_one(
    stop: int, valid: Dataset | None, tmp_path: Path, whole: Path
) -> None:
    if valid:
        whole = tmp_path / "whole"
        go(whole, valid=valid)
    seen: list[int] = []
    options: dict[str, Any] = {"valid": valid, "callback": lambda progress: seen.append(progress.step)}
    go(tmp_path / "parts", should_stop=lambda: seen[-1] == stop, **options)
    assert seen == list(range(1, stop + 1))
    assert len(log(tmp_path / "parts")) == stop
    go(tmp_path / "parts", seed=99, resume=True, **options)
    assert seen == list(range(1, 7))
    assert_same_run(whole, tmp_path / "parts")


needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
EIGHT_BITS = replace(SMALL, steps=4, optimizer="adam8bit")


def go_wide(folder: Path, config: TrainConfig, **more: Any) -> Mend:
    """A run whose networks' matrices are large enough for 8 bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = Mend(default_layers(tiny("llama")), MendConfig(rank=64, initial_rate=0.1))
    train(method, tiny("llama"), byte_tokenizer(), DATA, config, folder, locality=[ELSEWHERE], **more)
    return method


@pytest.mark.slow
@needs_bitsandbytes
def test_moments_in_8_bits_train_alike_and_are_resumed_exactly(tmp_path: Path) -> None:
    method, dense = go_wide(tmp_path / "whole", EIGHT_BITS), go_wide(tmp_path / "dense", replace(EIGHT_BITS, optimizer="adam"))
    seen: list[int] = []
    options: dict[str, Any] = {"callback": lambda progress: seen.append(progress.step)}
    go_wide(tmp_path / "parts", EIGHT_BITS, should_stop=lambda: seen[-1] == 3, **options)
    go_wide(tmp_path / "parts", EIGHT_BITS, resume=True, **options)
    assert seen == [1, 2, 3, 4]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    tensors, _ = read_tensors(tmp_path / "whole" / "checkpoint.safetensors")
    moments = [tensor for name, tensor in tensors.items() if name.endswith((".state1", ".state2"))]
    assert {tensor.dtype for tensor in moments} == {torch.uint8, torch.float32}
    assert all((tensor.dtype == torch.uint8) == (tensor.numel() >= 4096) for tensor in moments)
    rows = {name: log(tmp_path / name)[-1]["loss"] for name in ("whole", "dense")}
    assert rows["whole"] == pytest.approx(rows["dense"], rel=0.02)
    for one, other in zip(method.parameters(), dense.parameters(), strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


@needs_bitsandbytes
def test_a_run_keeps_its_optimizer(tmp_path: Path) -> None:
    go(tmp_path / "run", replace(SMALL, steps=1))
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError, match="with the optimizer 'adam', whose state 'adam8bit' cannot take on"):
        go(tmp_path / "run", replace(SMALL, steps=2, optimizer="adam8bit"), resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_moments_in_8_bits_need_a_package_and_others_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"mendlm\[quant\]"):
        go(tmp_path / "run", EIGHT_BITS)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="adam or adam8bit, got sgd"):
        replace(SMALL, optimizer="sgd")


def test_a_killed_run_is_resumed_from_its_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    def kill(progress: Any) -> None:
        if progress.step == 5:
            with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
                file.write('{"step": 6, "half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "parts", callback=kill)
    steps: list[int] = []
    go(tmp_path / "parts", seed=99, resume=True, callback=lambda progress: steps.append(progress.step))
    assert steps == [5, 6]
    assert_same_run(whole, tmp_path / "parts")


def test_a_finished_run_resumed_is_left_as_it_is(tmp_path: Path) -> None:
    go(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    go(tmp_path / "a", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_a_run_folder_holds_what_is_needed(tmp_path: Path) -> None:
    method = go(tmp_path / "run", valid=None)
    loaded, about = load_editor(tmp_path / "run")
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert about["step"] == 6
    assert (about["note"], about["training"]["steps"]) == ("x", 6)
    assert about["data"] == [{"name": "records:0", "sha256": "0+11"}]
    assert [row["step"] for row in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "success", "generality", "locality", "gradient_norm"} <= set(row) for row in log(tmp_path / "run"))


def test_another_resume_or_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        go(tmp_path / "run", resume=True)
    go(tmp_path / "run", replace(SMALL, steps=2))
    with pytest.raises(InputError, match="already exists"):
        go(tmp_path / "run")
    for change in ({"locality": []}, {"valid": VALID}):
        with pytest.raises(InputError, match="was trained with"):
            go(tmp_path / "run", **{"config": replace(SMALL, steps=2), **change}, resume=True)
    with pytest.raises(InputError, match="editor"):
        train(
            new_method(normalize=False), tiny("llama"), byte_tokenizer(), DATA, replace(SMALL, steps=2), tmp_path / "run",
            locality=[ELSEWHERE], resume=True,
        )  # fmt: skip
    another = transformers.LlamaForCausalLM(tiny("llama").config)
    with pytest.raises(InputError, match=r"was trained on another base model .*resume with that model"):
        train(
            new_method(), another, byte_tokenizer(), DATA, replace(SMALL, steps=2), tmp_path / "run",
            locality=[ELSEWHERE], resume=True,
        )  # fmt: skip
    for name, content in {"run.json": "[]", "metrics.jsonl": "x\n"}.items():
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_text(content)
        with pytest.raises(FormatError, match=f"{re.escape(name)} is damaged"):
            go(tmp_path / "run", replace(SMALL, steps=2), resume=True)
        (tmp_path / "run" / name).write_bytes(whole)
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="checkpoint"):
        go(tmp_path / "run", replace(SMALL, steps=2), resume=True)


def test_a_resumed_run_says_that_its_base_was_loaded_in_another_dtype(tmp_path: Path) -> None:
    go(tmp_path / "run", replace(SMALL, steps=2))
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**(stored := json.loads(path.read_text())), "base": {**stored["base"], "dtype": "float16"}}))
    go(tmp_path / "run", replace(SMALL, steps=3), resume=True)
    resumed = json.loads(path.read_text())["resumed"]
    assert [one["changed"] for one in resumed] == [{"dtype": ["float16", "float32"]}, {"steps": [2, 3]}]


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", full)
        with pytest.raises(StorageError):
            go(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists()
    (tmp_path / "run" / ".checkpoint.safetensors.0123456789ab").write_bytes(b"half")  # as a kill leaves it
    go(tmp_path / "run")
    go(tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_changed_settings_of_a_resumed_run_are_written_down(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    go(tmp_path / "run", replace(SMALL, steps=2))
    go(tmp_path / "run", replace(SMALL, steps=4, edit_weight=0.2), resume=True)
    assert run.description["resumed"] == [{"step": 2, "changed": {"steps": [2, 4], "edit_weight": [0.1, 0.2]}}]
    assert run.description["training"]["edit_weight"] == 0.2
    go(tmp_path / "run", replace(SMALL, steps=4, edit_weight=0.2), resume=True)
    assert len(run.description["resumed"]) == 1


def test_a_run_older_than_a_setting_is_resumed_with_its_default_alone(tmp_path: Path) -> None:
    go(tmp_path / "run", replace(SMALL, steps=2))
    path = tmp_path / "run" / "run.json"
    whole = json.loads(path.read_text())
    older = {**whole, "editor": {name: value for name, value in whole["editor"].items() if name != "normalize"}}
    path.write_text(json.dumps(older))
    with pytest.raises(InputError, match="was trained with editor"):
        train(
            new_method(normalize=False), tiny("llama"), byte_tokenizer(), DATA, replace(SMALL, steps=2), tmp_path / "run",
            locality=[ELSEWHERE], resume=True,
        )  # fmt: skip
    assert json.loads(path.read_text()) == older
    go(tmp_path / "run", replace(SMALL, steps=2), resume=True)
    assert json.loads(path.read_text())["editor"] == whole["editor"]


def test_a_run_killed_before_its_first_step_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "killed")
    assert not (tmp_path / "killed" / "editor.safetensors").exists()
    resumed, whole = go(tmp_path / "killed", resume=True), go(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True))


def test_too_few_requests_are_refused(tmp_path: Path) -> None:
    config = replace(SMALL, batch_size=12, num_edits=12)
    with pytest.raises(InputError, match="11 requests, fewer than num_edits 12"):
        go(tmp_path / "run", config)
    with pytest.raises(InputError, match="7 validation requests"):
        go(tmp_path / "run", replace(SMALL, batch_size=8, num_edits=8), valid=VALID)
    assert not os.listdir(tmp_path)


def test_a_share_of_the_steps_edits_requests_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone, mixed = (tmp_path / name for name in ("together", "alone", "mixed"))
    seen: list[int] = []

    def noted(*args: Any) -> Any:
        seen.append(args[-1].num_edits)
        return outer_loss(*args)

    monkeypatch.setattr(training, "outer_loss", noted)
    one, other = go(together, replace(SMALL, num_edits=2, single_share=1.0)), go(alone, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    seen.clear()
    go(mixed, replace(SMALL, num_edits=2, single_share=0.5, steps=12))
    assert set(seen) == {1, 2}
    first = [*seen]
    seen.clear()
    go(tmp_path / "parts", replace(SMALL, num_edits=2, single_share=0.5, steps=5))
    go(tmp_path / "parts", replace(SMALL, num_edits=2, single_share=0.5, steps=12), resume=True)
    assert seen == first


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(*args: Any) -> Any:
        calls.append(1)
        loss, sums = outer_loss(*args)
        return (loss * float("nan"), {**sums, "loss": loss * float("nan")}) if len(calls) == 4 else (loss, sums)

    monkeypatch.setattr(training, "outer_loss", broken)
    with pytest.raises(NumericalError, match="step 4"):
        go(tmp_path / "run")
    assert len(log(tmp_path / "run")) == 3
    assert load_editor(tmp_path / "run")[0].log_rates.isfinite().all()
    go(tmp_path / "run", resume=True, seed=3)
    assert_same_run(whole, tmp_path / "run")


def test_a_step_draws_by_seed_and_number_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(config: TrainConfig, at: int, method: Mend) -> list[Drawn]:
        found: list[Drawn] = []
        monkeypatch.setattr(training, "outer_loss", lambda *args: found.extend(args[4]) or outer_loss(*args))
        one = trainer(tmp_path, config, method)
        one.step = at
        one.train_step()
        return found

    torch.manual_seed(1)
    random.seed(1)
    third = texts(SMALL, 3, new_method())
    torch.manual_seed(2)
    random.seed(2)
    assert texts(SMALL, 3, new_method(seed=5, normalize=False)) == third
    assert texts(replace(SMALL, seed=1), 3, new_method()) != third
    assert texts(SMALL, 5, new_method()) != third
    assert len(third) == 4


def test_an_epoch_shows_every_request_once_in_a_new_order(tmp_path: Path) -> None:
    one = trainer(tmp_path, replace(SMALL, batch_size=3))
    epochs = [[e for step in range(3 * n, 3 * n + 3) for e in one.batch(step)] for n in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 9
        assert set(epoch) <= set(DATA.examples)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(trainer(tmp_path, replace(SMALL, batch_size=64)).batch(0)) == 11
    assert len(trainer(tmp_path, replace(SMALL, batch_size=64, num_edits=4)).batch(0)) == 8


def test_a_step_is_adam_on_the_mean_loss_with_its_own_rates(tmp_path: Path) -> None:
    config = replace(SMALL, steps=3, clip=0.01, learning_rate=1e-2, rates_learning_rate=1e-3, final_learning_rate=0.1)
    one = trainer(tmp_path, config)
    one.prepare()
    twin = copy.deepcopy(one.method)
    networks = [p for name, p in twin.named_parameters() if name != "log_rates"]
    optimizer = torch.optim.Adam([{"params": networks}, {"params": [twin.log_rates]}])
    for step, factor in enumerate((1.0, 0.55, 0.1)):  # 0.1 + 0.9 * (1 + cos(pi * step / 2)) / 2
        drawn = one._drawn(one.batch(step), f"step/{step}")
        loss, _ = outer_loss(twin, one.model, one.formatter, one.trunk, drawn, config)
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = rate * factor
        parameters = [*networks, twin.log_rates]
        for parameter, slope in zip(parameters, torch.autograd.grad(loss / len(drawn), parameters), strict=True):
            parameter.grad = slope
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        assert norm > config.clip
        for parameter in parameters:
            parameter.grad *= min(1.0, 0.01 / norm.item())
        optimizer.step()
        metrics = one.train_step()
        assert metrics["loss"].item() == pytest.approx(loss.item() / len(drawn), rel=1e-4)
        assert metrics["gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
        for (name, mine), its in zip(one.method.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("micro", "most"), [(None, 3), (2, 2), (100, 3)])
def test_the_normalizer_sees_the_first_requests_once(
    micro: int | None, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tmp_path, replace(SMALL, batch_size=4, normalizer_examples=7, micro_batch_size=micro))
    seen: list[int] = []
    prepare = Mend.prepare
    monkeypatch.setattr(Mend, "prepare", lambda self, model, batch: (seen.append(batch.size), prepare(self, model, batch)))
    one.prepare()
    assert (max(seen), sum(seen)) == (most, 7)
    twin = new_method()
    for d in one._drawn([*one.batch(0), *one.batch(1)][:7], "normalizer"):
        twin.fit_normalizer(twin.gradient(one.model, one.formatter.batch([d.edit])))
    for (name, mine), its in zip(one.method.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("micro", "sizes"), [(None, [4, 2]), (3, [2, 2, 2]), (100, [4, 2])])
def test_validation_is_the_mean_over_whole_groups_and_always_the_same(
    micro: int | None, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, num_edits=2, micro_batch_size=micro)
    one = trainer(tmp_path, config, valid=VALID)
    asked: list[int] = []
    monkeypatch.setattr(training, "outer_loss", lambda *args: asked.append(len(args[4])) or outer_loss(*args))
    one.prepare()
    first = one.validate()
    assert asked == sizes
    assert one.validate() == first
    drawn = one._drawn(VALID.examples, "valid")[:6]
    loss, sums = outer_loss(one.method, one.model, one.formatter, Trunk(()), drawn, config)
    assert first["valid_loss"] == pytest.approx(loss.item() / 6, rel=1e-4)
    assert first["valid_locality"] == pytest.approx(sums["locality"].item() / 6)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    left = iter(losses)
    monkeypatch.setattr(Trainer, "validate", lambda self: {"valid_loss": next(left)})


def test_the_editor_that_validates_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [3.0, 1.0, 2.0, 1.0])
    states: list[Tensor] = []
    method = new_method()
    config = replace(SMALL, steps=4, valid_every=1)
    train(
        method, tiny("llama"), byte_tokenizer(), DATA, config, tmp_path / "run", valid=VALID,
        callback=lambda progress: states.append(method.log_rates.detach().clone()),
    )  # fmt: skip
    loaded, about = load_editor(tmp_path / "run")
    assert about["step"] == 2
    assert torch.equal(loaded.log_rates, states[1])
    assert not torch.equal(states[1], states[3])
    assert [row.get("valid_loss") for row in log(tmp_path / "run")] == [3.0, 1.0, 2.0, 1.0]


def test_training_stops_after_patience_steps_without_a_better_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [3.0, 2.0, 2.5, 2.5, 2.5, 2.5])
    go(tmp_path / "run", replace(SMALL, steps=20, valid_every=2, patience=4), valid=VALID)
    assert len(log(tmp_path / "run")) == 8


def test_validation_comes_at_its_steps_and_at_the_last(tmp_path: Path) -> None:
    go(tmp_path / "run", replace(SMALL, steps=5), valid=VALID)
    assert [row["step"] for row in log(tmp_path / "run") if "valid_loss" in row] == [2, 4, 5]
