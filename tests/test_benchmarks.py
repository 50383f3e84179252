"""The benchmark scripts run, at toy size; what they claim is not tested here, since a timed test would be a coin."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import byte_tokenizer, tiny
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
