"""The README's code runs: Python blocks as they stand, and `mendlm` commands with short training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mendlm.cli import main

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_two_commands_are_there() -> None:
    shell = "\n".join(blocks("bash"))
    assert "pip install -c constraints.txt -e '.[all]' && mendlm demo" in shell
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in shell


@pytest.mark.slow
def test_the_code_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (facts,) = blocks("json")
    (tmp_path / "facts.jsonl").write_text(facts)
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("mendlm"):
                continue
            line = re.sub(r"--steps \d+", "--steps 1 --set batch_size=2 --set normalizer_examples=2", line)
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(line.split("#")[0])[1:])
            assert stop.value.code == 0, line
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
