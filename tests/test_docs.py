"""The code in README and guides runs: Python blocks as they stand, `mendlm` commands with short training; and the examples."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from cases import byte_tokenizer, tiny
from mendlm.checkpoint import parse_config
from mendlm.cli import app, main
from mendlm.cli.common import read_settings
from mendlm.methods.network import NetworkConfig
from mendlm.tasks import load_edits
from mendlm.training import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/quickstart.md", "docs/methods.md", "docs/models.md", "docs/baseline.md", "docs/extending.md")
PAGES += ("docs/performance.md", "docs/reliability.md", "docs/engines.md")
ELSEWHERE = {"docs/tasks.md": "test_data.py", "docs/many-cards.md": "test_processes.py", "docs/service.md": "test_serve.py"}
"""Pages whose code another test runs."""
LEFT_OUT = re.compile(r"--head HASH|mendlm store edits check.*")
"""What a reader fills in, and what rightly says that the starter's edit failed."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_two_commands_are_there() -> None:
    shell = "\n".join(blocks("README.md", "bash"))
    assert "pip install -c constraints.txt -e '.[all]' && mendlm demo" in shell
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in shell


def test_every_page_with_code_is_run_somewhere() -> None:
    with_code = {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if re.search(r"```(bash|python)", path.read_text())
    }
    assert with_code == {*PAGES[1:], *ELSEWHERE}


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/tasks.md", "docs/models.md"])
def test_the_records_shown_are_records(page: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "json")):
        (tmp_path / f"{number}.jsonl").write_text(block)
        assert len(load_edits(f"records:{tmp_path / f'{number}.jsonl'}").examples) == len(block.splitlines())


def test_commands_that_no_test_can_run_are_there_with_their_options() -> None:
    lines = [line for page in (ROOT / "docs").glob("*.md") for line in blocks(f"docs/{page.name}", "(?:console|bash)")]
    asked = [line.removeprefix("$ ") for block in lines for line in block.replace("\\\n", " ").splitlines()]
    parsed = 0
    for line in asked:
        if re.match(r"mendlm (push|pull|serve) ", line):
            arguments = shlex.split(line, comments=True)[1:]
            click = get_command(app)
            click.commands[arguments[0]].make_context(arguments[0], arguments[1:])  # an unknown option raises
            parsed += 1
    assert parsed >= 4


@pytest.mark.parametrize(
    "recipe", ["docs/methods.md", *sorted(f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml"))]
)
def test_the_settings_shown_are_settings(recipe: str, tmp_path: Path) -> None:
    texts = blocks(recipe, "toml") if recipe.endswith(".md") else [(ROOT / recipe).read_text()]
    for text in texts:
        (tmp_path / "recipe.toml").write_text(text)
        editor, training = read_settings(tmp_path / "recipe.toml", [])
        parse_config(NetworkConfig, editor)
        assert training
        parse_config(TrainConfig, training)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (facts,) = blocks("README.md", "json")
    (tmp_path / "facts.jsonl").write_text(facts)
    (tmp_path / "guards.jsonl").write_text("".join(blocks("docs/reliability.md", "json")))
    (tmp_path / "some-text.txt").write_text("The river runs through the old city and on to the sea, past mills and farms. " * 9)
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = LEFT_OUT.sub("", line)
            if not line.startswith("mendlm") or line.startswith("mendlm serve"):  # which does not end
                continue
            line = re.sub(r"--steps \d+", "--steps 1 --set batch_size=2 --set normalizer_examples=2", line)
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(line, comments=True)[1:])
            assert stop.value.code == 0, line
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_the_examples_run(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = [{"prompt": f"The home of {who} is", "target": "Ulm", "unrelated": [{"prompt": "Why?"}]} for who in ("Ana", "Bo")]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model), "--data", "records:facts.jsonl", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert "success" in capsys.readouterr().out
