"""Plans: what the fake run counts is what a real run takes, and the command says so without reading a weight."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cases import byte_tokenizer, other, tiny
from mendlm import plan as planning
from mendlm.cli import main
from mendlm.errors import InputError
from mendlm.layers import default_layers, select
from mendlm.methods import mend, method_types
from mendlm.models import fake_model, skeleton, weight_bytes
from mendlm.plan import Counted, Lengths, formatter_of, plans, step, texts
from mendlm.tasks import load_edits, load_unrelated
from mendlm.text import Formatter
from mendlm.training import TrainConfig, states_bytes

RANK, BATCH = 4, 3


SLOW = [("gpt2", "mend", 1), ("t5", "mend", 1), ("bert", "mend", 1), ("t5", "malmen", 3), ("bert", "enn", 1)]


@pytest.mark.parametrize(
    ("name", "kind", "k"),
    [
        *(("llama", *one) for one in (("mend", 1), ("mend", 3), ("malmen", 3), ("enn", 1))),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW),
    ],
)
def test_the_plan_is_what_a_real_step_holds_and_computes(name: str, kind: str, k: int) -> None:
    model = copy.deepcopy(tiny(name)).bfloat16()
    model.config.architectures = [type(model).__name__]  # as in a saved configuration
    expected = plans(fake_model(model.config), method=kind, rank=RANK, batch_size=BATCH, num_edits=k)["bf16"]
    formatter, config = formatter_of(model), TrainConfig(batch_size=BATCH, num_edits=k)
    made, settings = method_types(kind)
    method = made(default_layers(model), settings() if kind == "enn" else settings(rank=RANK))
    optimizer = torch.optim.Adam(method.parameters())
    drawn = texts(BATCH, Lengths(), formatter.family)
    step(method, model, formatter, optimizer, drawn, config)
    optimizer.zero_grad()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    known = [*model.parameters(), *model.buffers(), *method.parameters(), *method.buffers(), *moments]
    with Counted(known) as seen, FlopCounterMode(display=False) as counted:
        step(method, model, formatter, optimizer, drawn, config)
    # A fake run takes other attention kernels, whose own buffers show in so small an encoder.
    assert expected.step == pytest.approx(seen.peak, rel=0.25 if name == "bert" else 0.15)
    assert expected.flops == pytest.approx(counted.get_total_flops() / BATCH, rel=0.02)
    assert expected.editor == sum(t.nbytes for t in (*method.parameters(), *method.buffers()))
    assert expected.optimizer == sum(tensor.nbytes for tensor in moments)
    assert expected.base == sum(parameter.nbytes for parameter in model.parameters())
    with Counted(known) as first:  # the pass that fixes an editor's statistics takes no more
        method.prepare(model, formatter.batch([one.edit for one in drawn]))
    assert first.peak < expected.step


def test_a_method_that_cannot_be_planned_is_refused() -> None:
    for name in ("ke", "ft"):
        with pytest.raises(InputError, match=f"no training is planned for '{name}'; choose one of mend, malmen, enn"):
            plans(fake_model(tiny("llama").config), method=name)


def test_fewer_requests_at_a_time_take_less_memory_and_the_same_work() -> None:
    config = tiny("llama").config
    whole, parts = (plans(fake_model(config), rank=RANK, batch_size=12, micro_batch_size=n)["bf16"] for n in (None, 3))
    assert parts.step < 0.5 * whole.step
    assert parts.flops == pytest.approx(whole.flops, rel=0.01)


def test_storages_count_what_lives_and_each_once() -> None:
    kept = torch.zeros(5)
    with Counted([kept]) as seen:
        twice = torch.zeros(100) + 0  # one of the two dies at once
        view = twice[10:]
        assert (seen.now, seen.peak) == (400, 800)
        _ = kept.view(5)
        del twice
        assert seen.now == 400
        del view
        assert seen.now == 0


def test_operations_are_those_of_the_formula() -> None:
    model = fake_model(tiny("llama").config)
    lengths = Lengths(edit=20, rephrasing=30, unrelated=40, target=1, scored=1)
    found = plans(model, rank=RANK, batch_size=BATCH, lengths=lengths)["bf16"]
    specs = default_layers(model)
    trunk = sum(p.numel() for block in model.model.layers[:1] for p in block.parameters() if p.dim() == 2)
    top = sum(p.numel() for block in model.model.layers[1:] for p in block.parameters() if p.dim() == 2)
    head = model.lm_head.weight.numel()
    edit, rephrasing, unrelated = 20, 30, 39  # the last token of a target is not read
    products = trunk * (edit + rephrasing + unrelated)
    products += top * (4 * edit + 2 * rephrasing + 3 * unrelated) + head * (4 + 2 + 3)
    width = sum(sum(spec.shape) for spec in specs)
    products += 4 * (4 * RANK * width * edit)  # the networks: forward, again, and the two products of backward
    products += 3 * width * edit * (edit + rephrasing + unrelated)  # the overlay, forward and backward
    # Attention by plain products: two of a text's states, forward in three blocks, and twice that back in two.
    square, inner = (edit**2, rephrasing**2, unrelated**2), model.config.num_attention_heads * model.config.head_dim
    products += 2 * inner * (3 * (2 * square[0] + square[1] + 2 * square[2]) + 2 * 2 * (2 * square[0] + square[1] + square[2]))
    assert found.flops == pytest.approx(2 * products, rel=0.06)


@pytest.mark.slow
def test_a_large_vocabulary_makes_passes_of_fewer_texts_not_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import mendlm.training as training

    config = copy.deepcopy(tiny("llama").config)
    config.vocab_size = 30_000
    monkeypatch.setattr(training, "LOGITS", 1 << 40)
    whole = plans(fake_model(config), rank=RANK, batch_size=12)["bf16"]
    monkeypatch.setattr(training, "LOGITS", 30_000 * 16)
    parts = plans(fake_model(config), rank=RANK, batch_size=12)["bf16"]
    assert parts.step < whole.step / 3
    assert parts.flops == pytest.approx(whole.flops, rel=1e-3)


def test_bytes_of_a_quantised_base() -> None:
    model = fake_model(tiny("llama").config)
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    rest = sum(p.numel() for p in model.parameters()) - blocks
    assert weight_bytes(model) == 2 * (blocks + rest)
    assert weight_bytes(model, "int8") == blocks + 2 * rest
    assert weight_bytes(model, "nf4") == int(0.5625 * blocks) + 2 * rest


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    fact = {"prompt": "Ana is a", "target": "baker", "unrelated": [{"prompt": "Bo is a", "answer": "cook"}]}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_plans_without_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "model", "--plan", "--rank", "4", "--data", "records:facts.jsonl", "--json"])
    assert not stop.value.code
    content = json.loads(capsys.readouterr().out)
    expected = plans(skeleton(place / "model"), rank=4)
    assert content["plans"]["nf4"]["total"] == expected["nf4"].total
    assert content["plans"]["bf16"]["fits_gb"] == [16, 24, 48, 80]
    with pytest.raises(SystemExit):
        main(["inspect", "model", "--plan", "--method", "enn", "--num-edits", "4"])
    shown = capsys.readouterr().out
    assert "memory of training, computed" in shown
    assert "parameters; enn; 64 requests a step, 4 edited at once\n" in shown
    assert "\nprompts of 14 tokens, rephrasings of 26, unrelated texts of 24; longer ones" in shown
    with pytest.raises(SystemExit):
        main(["inspect", "model", "--plan", "--rank", "4", "--micro-batch-size", "8", "--json"])
    parts = json.loads(capsys.readouterr().out)
    assert parts["micro_batch_size"] == 8
    assert parts["plans"]["bf16"]["step"] < content["plans"]["bf16"]["step"]
    for option, value in (("--micro-batch-size", "8"), ("--method", "malmen"), ("--num-edits", "2")):
        with pytest.raises(SystemExit):
            main(["inspect", "model", option, value])
        assert f"{option} is for the plan of a training" in capsys.readouterr().err


def test_layers_are_chosen_where_no_default_is_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other().save_pretrained(place / "other")
    with pytest.raises(SystemExit):
        main(["inspect", "other", "--plan", "--rank", "4"])
    assert "choose layers by pattern" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "other", "--plan", "--rank", "4", "--layers", "layers.3.mlp.down_proj", "--json"])
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)["plans"]["bf16"]["editor"]
    specs = select(skeleton(place / "other"), ["layers.3.mlp.down_proj"])
    method = mend.Mend(specs, mend.MendConfig(rank=4))
    assert found == sum(tensor.nbytes for tensor in (*method.parameters(), *method.buffers()))


def test_the_command_plans_the_trunk_cache_that_training_fills(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(model: str, dtype: str, *more: str) -> Any:
        with pytest.raises(SystemExit) as stop:
            main(
                ["inspect", model, "--plan", "--rank", "4", "--data", "records:facts.jsonl", "--dtype", dtype, "--json", *more]
            )
        assert not stop.value.code
        return json.loads(capsys.readouterr().out)["trunk_cache_bytes"]

    expected = states_bytes(tiny("llama"), Formatter.of(tiny("llama"), byte_tokenizer()), [load_edits("records:facts.jsonl")])
    assert planned("model", "float32") == expected == 2 * planned("model", "bfloat16")
    (place / "text.txt").write_text("the river runs through the old city and on " * 9)
    assert planned("model", "float32", "--data", "text:text.txt") > expected
    tiny("t5").save_pretrained(place / "t5")  # whose blocks pass on more than hidden states
    byte_tokenizer().save_pretrained(place / "t5")
    assert planned("t5", "float32") is None


def test_the_disk_that_a_trunk_cache_takes_is_each_text_once(place: Path) -> None:
    formatter = Formatter.of(tiny("llama"), byte_tokenizer())
    asked = (("Ana is a", "baker"), ("Bo is a", "cook"))
    tokens = sum(len(formatter.encode(*pair)) for pair in asked)
    assert states_bytes(tiny("llama"), formatter, [load_edits("records:facts.jsonl")]) == tokens * 16 * 4
    twice = [load_edits("records:facts.jsonl")] * 2
    assert states_bytes(tiny("llama"), formatter, twice) == tokens * 16 * 4
    assert states_bytes(tiny("llama"), formatter, twice, most=1) == tokens * 16 * 4 / 2


def test_a_long_unrelated_text_takes_disk_for_each_cut_of_it(place: Path) -> None:
    formatter = Formatter.of(tiny("llama"), byte_tokenizer())
    (place / "text.txt").write_text("the river runs through the old city and on " * 9)
    source = load_unrelated("text:text.txt")
    tokens = 0
    for probe in source.probes:
        text = formatter.encode(probe.prompt, probe.answer)
        ends = range(len(text.prompt) + min(5, len(text.target)), len(text) + 1)
        tokens += sum(ends)
    assert len(ends) > 1
    assert states_bytes(tiny("llama"), formatter, [source], locality_tokens=5) == tokens * 16 * 4


def test_cards_keep_a_tenth_free() -> None:
    one = planning.Plan(base=int(21e9), editor=0, optimizer=0, step=0, flops=1, edit_flops=1)
    assert one.fits() == (24, 48, 80)
    assert planning.Plan(base=int(22e9), editor=0, optimizer=0, step=0, flops=1, edit_flops=1).fits() == (48, 80)


@pytest.mark.slow
def test_the_plan_is_near_the_memory_that_a_process_takes(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "scale.py"
    options = ["--shape", "100m", "--rank", "256", "--batch", "16", "--steps", "1", "--edits", "1", "--device", "cpu"]
    # What is freed goes back to the system at once, so that the peak is of what lives, not of what the allocator keeps.
    quiet = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run([sys.executable, str(script), *options, "--out", str(tmp_path)], check=True, env=quiet, timeout=550)
    result = json.loads((tmp_path / "scale-100m-cpu.json").read_text())
    assert result["plan_over_peak"] == pytest.approx(1, abs=0.15)


def test_what_an_architecture_never_quantises_is_planned_dense() -> None:
    model = fake_model(tiny("t5").config)
    weights = {name: weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2 and ".block." in name}
    kept = sum(count for name, count in weights.items() if name.endswith(".wo.weight"))
    assert kept
    assert weight_bytes(model) - weight_bytes(model, "int8") == sum(weights.values()) - kept
