"""The benchmark scripts run, at toy size; what they claim is not tested here, since a timed test would be a coin."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import byte_tokenizer, tiny
from mendlm.checkpoint import save_editor
from mendlm.layers import default_layers
from mendlm.methods.mend import Mend, MendConfig
from test_report import CELL

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS: dict[str, tuple[list[str], list[str]]] = {
    "training": (["--batch", "8", "--oracle-edits", "2"], ["last 3 of 4 blocks.ratio", "last 3 of 4 blocks.time_shares.trunk"]),
    "editing": (["--editor", "none", "--requests", "8"], ["edit_over_floor", "one_by_one_over_edit_many"]),
    "replay": (["--texts", "4"], ["ratio", "bit_equal"]),
    "memory": (["--batch", "4"], ["peak_over_floor", "oracle_over_floor"]),
    "startup": (["--no-demo"], ["help_over_python", "import_over_python"]),
}


def test_the_papers_driver_publishes_its_commands_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    paper = importlib.import_module("paper")
    work, data = tmp_path / "work", tmp_path / "data"
    (work / "ablations" / "compared" / "cells" / "mend-1").mkdir(parents=True)
    (work / "ablations" / "compared" / "cells" / "mend-1" / "summary.json").write_text(json.dumps(CELL))
    driver = paper.Driver(data, work, 1.0, 1, "cpu")
    for name in ("train ablations mend@1", "train many mend@1"):
        driver.run(
            name,
            [sys.executable, "-c", "pass", str(BENCHMARKS / "x.py"), f"zsre:{driver.data}/a.json", str(driver.work / "run")],
        )
    driver.publish("ablations", [""])
    result = json.loads((work / "results" / "paper-ablations.json").read_text())
    assert result["commands"] == {"train ablations mend@1": "python -c pass benchmarks/x.py zsre:DATA/a.json WORK/run"}
    assert result["seconds"].keys() == result["commands"].keys()
    assert result["machine"]["torch"]
    assert [cell["method"] for cell in result["cells"]] == ["mend"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["toy", "toy-t5"])
def test_scale_measures_beside_its_plan(shape: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--shape", shape, "--rank", "8", "--batch", "4", "--device", "cpu"]
    subprocess.run([*command, "--steps", "1", "--edits", "2", "--out", str(tmp_path)], check=True, timeout=300)
    result = json.loads((tmp_path / f"scale-{shape}-cpu.json").read_text())
    assert min(result["peak_gb"], result["plan"]["total"], result["edits_per_second"], result["edit_ms"]["p95"]) > 0


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
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_measures_and_writes(name: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    options, keys = SCRIPTS[name]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    subprocess.run([*command, "--rounds", "1", "--out", str(tmp_path), *options], check=True, timeout=300)
    result = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    for key in keys:
        value: Any = result
        for part in key.split("."):
            value = value[part]
        assert value is True or value > 0, key
    assert result["machine"]["torch"]
