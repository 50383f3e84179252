"""The benchmark scripts run, at toy size; what they claim is not tested here, since a timed test would be a coin."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from cases import byte_tokenizer, tiny
from mendlm.checkpoint import save_editor
from mendlm.layers import default_layers
from mendlm.methods.mend import Mend, MendConfig
from test_cli import place  # noqa: F401
from test_report import CELL

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FOUND: dict[str, list[str]] = {
    "floor": ["share_of_floor", "cache_speed_up", "cache_speed_up_by_the_floor", "ms_per_edit.measured"],
    "training": ["last 3 of 4 blocks.ratio", "last 3 of 4 blocks.time_shares.trunk"],
    "floor-toy": ["share_of_floor", "cache_speed_up"],
    "training-toy": ["last 3 of 6 blocks.ratio"],
    "editing": ["edit_over_floor", "one_by_one_over_edit_many.8"],
    "batches": ["training_edits_per_second.4", "edits_per_second.1", "seconds_for_edits.4", "tenfold", "saving_over_making"],
    "replay": ["ratio", "bit_equal"],
    "memory": ["peak_over_floor", "peak_over_inference", "oracle_over_floor"],
    "memory-toy": ["peak_over_floor", "peak_over_inference"],
    "memory-toy-of-10": ["peak_over_inference"],
    "startup": ["help_over_python", "import_over_python"],
    "applying": ["tokens_per_second.own 32", "rows"],
    "quantised": ["kinds.dense.bytes", "kinds.nf4.made up.edit_ms.p50"],
    **{f"scale-{shape}": ["peak_gb", "edits_per_second", "edit_ms.p95", "plan.total"] for shape in ("toy", "toy-t5-nf4")},
}
"""Every benchmark of run_all.py, and what it is to have found: numbers above 0."""


@pytest.mark.slow
def test_fifty_edits_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    save_editor(tmp_path / "run.safetensors", Mend(default_layers(model), MendConfig(rank=2)), {})
    options = ["--model", str(tmp_path), "--editor", str(tmp_path / "run.safetensors")]
    monkeypatch.setattr(sys, "argv", ["by_eye.py", *options])
    runpy.run_path(str(BENCHMARKS / "by_eye.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert len(re.findall(r"^\| .+ → .+ \| [✓✗] \| .+ \| [✓✗] \| .+ \| [✓✗] \| .+ \|$", shown, re.MULTILINE)) == 50
    assert re.search(r"^\d+ of 50 edits took, \d+ rephrasings followed, \d+ neighbours kept", shown, re.MULTILINE)


def test_the_papers_driver_publishes_its_commands_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    paper = importlib.import_module("paper")
    work, data = tmp_path / "work", tmp_path / "data"
    (work / "ablations" / "compared" / "cells" / "mend-1").mkdir(parents=True)
    (work / "ablations" / "compared" / "cells" / "mend-1" / "summary.json").write_text(json.dumps(CELL))
    (work / "ablations" / "runs" / "mend@1").mkdir(parents=True)
    steps = [{**dict.fromkeys(paper.LOGGED, 0.25), "step": step, "gradient_norm": 3.0} for step in (1, 2)]
    (work / "ablations" / "runs" / "mend@1" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    driver = paper.Driver(data, work, 1.0, 1, "cpu")
    command = [
        "-c",
        "import time; time.sleep(0.1)",
        str(BENCHMARKS / "x.py"),
        f"zsre:{driver.data}/a.json",
        str(driver.work / "run"),
    ]
    for name, commit in (("ablations", "first"), ("many", "first"), ("ablations", "second"), ("ablations", "second")):
        monkeypatch.setattr(paper.bench, "commit", lambda commit=commit: commit)
        driver.run(f"train {name} mend@1", [sys.executable, *command])
    driver.publish("ablations", [""])
    result = json.loads((work / "results" / "paper-ablations.json").read_text())
    (ran,) = result["commands"].items()
    assert ran[0] == "train ablations mend@1"
    assert ran[1]["command"] == "python -c 'import time; time.sleep(0.1)' benchmarks/x.py zsre:DATA/a.json WORK/run"
    assert ran[1]["seconds"] >= 0.3
    assert ran[1]["commits"] == ["first", "second"]
    assert result["machine"]["torch"]
    assert [cell["method"] for cell in result["cells"]] == ["mend"]
    assert result["logs"] == {"mend@1": {key: [1, 2] if key == "step" else [0.25, 0.25] for key in paper.LOGGED}}


def test_the_papers_driver_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    paper = importlib.import_module("paper")
    order = ["gpt-counterfact", "gpt-counterfact-tuned", "gpt-zsre", "gpt-zsre-tuned", "t5-zsre", "fever-bert"]
    order += ["gpt2-wikitext", "bart-zsre", "many", "many-in-turn", "many-refined", "many-refined-in-turn", "ablations"]
    assert list(paper.PARTS) == order
    assert all(part.limit >= 200 for part in paper.PARTS.values())
    data, work = tmp_path / "data", tmp_path / "work"
    data.mkdir()
    work.mkdir()
    (data / "fever-claims-dev.jsonl").write_text('{"claim": "It is so.", "label": "SUPPORTS"}\n')
    (data / "nq-open-dev.jsonl").write_text('{"question": "who", "answer": ["me"]}\n')
    asked: list[tuple[str, bool]] = []

    def run(driver: Any, name: str, command: list[str]) -> None:
        """What the command leaves; one is interrupted at its first checkpoint."""
        asked.append((name, "--resume" in command))
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if not name.startswith("train"):
            return
        first = asked.count(("train t5-zsre ke@1", False)) == 1 and asked[-1] == ("train t5-zsre ke@1", False)
        (out / "checkpoint.safetensors").touch()
        done = 1 if first else int(command[command.index("--steps") + 1])
        (out / "metrics.jsonl").write_text((json.dumps(dict.fromkeys(paper.LOGGED, 0)) + "\n") * done)
        if first:
            raise KeyboardInterrupt

    monkeypatch.setattr(paper.Driver, "run", run)
    monkeypatch.setattr(paper.Driver, "publish", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        paper.Driver(data, work, 1.0, None, "cpu").part("t5-zsre")
    begun = len(asked)
    assert asked == [("base t5-questions", False), ("train t5-zsre mend@1", False), ("train t5-zsre ke@1", False)]
    paper.Driver(data, work, 1.0, None, "cpu").part("t5-zsre")
    assert asked[begun : begun + 3] == [
        ("train t5-zsre ke@1", True),
        ("train t5-zsre enn@1", False),
        ("train t5-zsre malmen@1", False),
    ]
    assert {name for name, _ in asked[:begun]} & {name for name, _ in asked[begun:]} == {"train t5-zsre ke@1"}


class Drive(Protocol):
    """Runs a part of the paper's driver without its commands: those by name, and the variants published each time."""

    def __call__(self, part: str, *editors: tuple[str, str, int, Path]) -> tuple[dict[str, list[str]], list[list[str]]]: ...


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    paper = importlib.import_module("paper")

    def driven(part: str, *editors: tuple[str, str, int, Path]) -> tuple[dict[str, list[str]], list[list[str]]]:
        asked: dict[str, list[str]] = {}
        published: list[list[str]] = []
        for name in ("divide", "prepare"):
            monkeypatch.setattr(paper.Driver, name, lambda *_: None)
        if editors:
            monkeypatch.setattr(paper.Driver, "editors", lambda *_: editors)
        monkeypatch.setattr(paper.Driver, "run", lambda _, name, command: asked.update({name: command}))
        monkeypatch.setattr(paper.Driver, "publish", lambda _, name, variants: published.append(variants))
        paper.Driver(tmp_path, tmp_path, 1.0, None, "cpu").part(part)
        return {name: command for name, command in asked.items() if not name.startswith("base ")}, published

    return driven


def test_the_papers_driver_scores_fine_tuning_at_the_papers_rate_too(drive: Drive) -> None:
    asked, published = drive("fever-bert", ("", "mend", 1, Path("run")))
    usual, other = asked["compare fever-bert"], asked["compare fever-bert paper rate"]
    assert published == [[""], ["", "paper rate"]]
    assert usual[usual.index("--methods") + 1].startswith("mend,ke,enn,malmen,ft,ft-kl,")
    assert other[other.index("--methods") + 1] == "ft,ft-kl"
    assert "--editor" in usual
    assert "--editor" not in other
    assert not [word for word in usual if "rate=" in word]
    assert {"ft.rate=paper-small", "ft-kl.rate=paper-small"} <= set(other)


def test_the_papers_driver_scores_edits_refined_too(drive: Drive) -> None:
    asked, published = drive("many-refined", ("", "mend", 5, Path("run")))
    plain, refined = asked["compare many-refined"], asked["compare many-refined refined"]
    assert published == [[""], ["", "refined"]]
    assert {"mend.refine=20", "malmen.refine=20"} <= set(refined)
    assert not [word for word in plain if "refine=" in word]
    for words in (plain, refined):
        assert words[words.index("--methods") + 1] == "mend,malmen"
        assert words[words.index("--editor") + 1] == "mend@5=run"


def test_the_papers_driver_tunes_the_starter_in_parts_of_their_own(drive: Drive) -> None:
    asked, _ = drive("gpt-zsre-tuned")
    assert list(asked) == ["compare gpt-zsre-tuned", "compare gpt-zsre-tuned paper rate"]
    usual, other = asked.values()
    assert usual[usual.index("--methods") + 1] == "ft-kl"
    assert other[other.index("--methods") + 1] == "ft,ft-kl"
    assert {"ft.rate=paper-gpt", "ft-kl.rate=paper-gpt"} <= set(other)
    for words, methods in ((usual, {"ft-kl"}), (other, {"ft", "ft-kl"})):
        assert {word.split(".")[0] for word in words if ".layers=" in word} == methods


@pytest.mark.slow
def test_scale_computes_what_no_device_can_measure(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--shape", "13b", "--quantize", "nf4", "--plan", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, timeout=300)
    result = json.loads((tmp_path / "scale-13b-nf4-cpu.json").read_text())
    assert "peak_gb" not in result
    assert 7e9 < result["plan"]["base"] < 8e9


@pytest.mark.slow
def test_an_editor_is_scored_on_quantised_bases(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for task in ("counterfact", "zsre"):
        shutil.copy(Path(__file__).parent / "fixtures" / f"{task}-flat.json", tmp_path / f"{task}-dev.json")
    save_editor(tmp_path / "editor.safetensors", Mend(default_layers(tiny("llama")), MendConfig(rank=4)), {})
    command = [sys.executable, str(BENCHMARKS / "quantised.py"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    options = ["--data-dir", str(tmp_path), "--editor", str(tmp_path / "editor.safetensors"), "--limit", "2"]
    subprocess.run([*command, *options, "--out", str(tmp_path)], check=True, timeout=300)
    result = json.loads((tmp_path / "quantised-cpu.json").read_text())
    dense, int8, nf4 = (result["kinds"][kind] for kind in ("dense", "int8", "nf4"))
    assert dense["parameters"] == int8["parameters"] == nf4["parameters"]
    assert dense["bytes"] > int8["bytes"] > nf4["bytes"]
    assert [kind["quantization"] for kind in (dense, int8, nf4)] == [None, "int8", "nf4"]
    assert dense["model_sha256"] == nf4["model_sha256"]
    assert all(kind[task]["success"]["after"] is not None for kind in (dense, int8, nf4) for task in ("counterfact", "zsre"))


@pytest.mark.slow
def test_all_benchmarks_run_and_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    assert set(importlib.import_module("run_all").TOY) == {name.partition("-")[0] for name in FOUND}
    model, docs, out = tmp_path / "model", tmp_path / "docs", tmp_path / "results"
    tiny("llama").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    shutil.copytree(BENCHMARKS.parent / "docs", docs, ignore=shutil.ignore_patterns("images"))
    command = [sys.executable, str(BENCHMARKS / "run_all.py"), "--toy", "--model", str(model), "--device", "cpu"]
    subprocess.run([*command, "--docs", str(docs), "--out", str(out)], check=True, timeout=590)
    found = json.loads((out / "all-cpu.json").read_text())
    for name, keys in FOUND.items():
        for key in keys:
            value: Any = found[name]
            for part in key.split("."):
                value = value[part]
            assert value is True or value > 0, (name, key)
        assert found[name]["machine"]["torch"]
    page = (docs / "performance.md").read_text()
    rows = [
        "| toy | bf16 |",
        "| toy-t5 | nf4 |",
        "| toy | ",
        "| **floor**, ",
        "seconds for 1,000 edits",
        "| one edit over one f",
    ]
    assert [row for row in rows if row not in page] == []
    assert "| nf4 | " in (docs / "results.md").read_text()
    assert {path.stem for path in (docs / "images").iterdir()} == {f"performance-{n}" for n in ("scale", "sizes", "batches")}
    # What else a page says stays: only what stands between the marks is new.
    assert _without_tables(page) == _without_tables((BENCHMARKS.parent / "docs" / "performance.md").read_text())


def test_a_card_is_shown_beside_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    driver = importlib.import_module("run_all")
    for page in ("performance.md", "results.md"):
        (tmp_path / page).write_text("<!-- claims -->\nold\n<!-- end -->, <!-- scale -->\n<!-- end -->.")
    plan = {"total": 9e9, "flops": 1e12, "base": 2e9, "fits_gb": [16]}
    shape = {"shape": "1b", "base": "bf16", "plan": plan}
    seen = {"peak_gb": 8.5, "seconds_per_step": {"median": 0.5}, "hours_for_100000_edits": 2.0, "edit_ms": {"p50": 7}}
    card = {
        "scale-1b": shape | seen | {"machine": {"device": "a card"}},
        "replay": {"ratio": 0.25},
        "memory": {"peak_over_floor": 2},
    }
    driver.publish({"cpu": {"scale-1b": shape, "replay": {"ratio": 0.125}, "startup": {}}, "cuda": card}, "cpu", tmp_path)
    text = (tmp_path / "performance.md").read_text()
    for row in (
        "| ratio | measured (cpu) | measured (cuda) | wanted |",
        "| peak memory of training over process, base, editor state and one batch's activations | - | 2 |  |",
        "| a replayed pass over a full one, last 3 of 30 blocks | 0.125 | 0.25 | at most 0.2 |",
        "| 1b | bf16 | 9.0 | 16 | 1.00 | 8.5 GB, 0.50 s a step, 2.00 h for 100,000 edits, edit 7 ms (a card) |",
    ):
        assert row in text
    assert "old" not in text


def _without_tables(page: str) -> str:
    return re.sub(r"(<!-- \w+ -->).*?<!-- end -->", r"\1", page, flags=re.DOTALL)


@pytest.mark.slow
def test_a_soak_finds_no_error_no_leak_and_no_lost_edit(place: Path, tmp_path: Path) -> None:  # noqa: F811
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--model", str(place / "model"), "--editor", str(place / "run")]
    subprocess.run([*command, "--seconds", "20", "--clients", "4", "--out", str(tmp_path)], check=True, capture_output=True)
    found = json.loads((tmp_path / "soak-cpu.json").read_text())
    assert found["server_errors"] == 0
    assert not any("unexpected" in status for status in found["statuses"])
    assert found["answers"]["asked"] > 10
    assert found["answers"]["leaks"] == 0
    assert found["killed"]["lost_edits"] == found["store"]["problems"] == []
    assert found["stopped_with"] == 0
    assert found["store"]["edits"] >= 4
    assert {"edit", "own edit", "base"} <= set(found["latency_ms"])
