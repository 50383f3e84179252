"""The command line, run in this process on a tiny model: every command, and bad input to every command."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, other, tiny
from mendlm.apply import Edit, applied
from mendlm.checkpoint import load_editor
from mendlm.cli import main
from mendlm.cli.common import one_line
from mendlm.cli.learning import rank_for
from mendlm.files import sha256
from mendlm.layers import default_layers, select
from mendlm.methods.enn import Enn
from mendlm.methods.malmen import Malmen, MalmenConfig
from mendlm.models import load
from mendlm.tensors import read_tensors
from mendlm.text import Formatter

FACTS = [
    {"prompt": "The capital of France is", "target": "Lyon", "rephrasings": ["France's capital is"],
     "unrelated": [{"prompt": "The capital of Italy is", "answer": "Rome"}, {"prompt": "Water is"}]},
    {"prompt": "Who is Ana?", "target": "a baker", "unrelated": [{"prompt": "Who is Bo?"}]},
    {"prompt": "The river runs through", "target": "the old city", "rephrasings": ["Where the river runs:"]},
]  # fmt: skip
SETTINGS = ("editor.rank=4", "batch_size=2", "normalizer_examples=3", "editor.initial_rate=0.05")
TRAIN = [word for setting in SETTINGS for word in ("--set", setting)]
ON = ("--model", "model", "--editor", "run")

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, facts, and an editor trained by the command."""
    folder = tmp_path_factory.mktemp("cli")
    tiny("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The river runs through the city of London, the old capital, to the sea. " * 20)
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", str(folder / "model"), "--data", f"records:{folder / 'facts.jsonl'}", "--steps", "3",
              "--out", str(folder / "run"), *TRAIN])  # fmt: skip
    assert stop.value.code == 0
    return folder


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in the folder; its JSON, or with `fails` its error message."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("MENDLM_CACHE", str(place / "cache"))

    def command(*arguments: object, fails: bool = False) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), *([] if fails else ["--json"])])
        out, err = capsys.readouterr()
        assert stop.value.code == (2 if fails else 0), out + err
        assert "Traceback" not in err
        return err if fails else json.loads(out)

    return command


def edit(run: Command, out: Path, *more: object) -> Any:
    return run("edit", *ON, "--prompt", "Who is Ana?", "--target", "a baker", "--out", out, *more)


def test_train_writes_a_run_that_resumes(run: Command, place: Path, tmp_path: Path) -> None:
    common = ["train", "--model", "model", "--data", "records:facts.jsonl", *TRAIN]
    whole = run(*common, "--steps", 4, "--out", tmp_path / "whole")
    run(*common, "--steps", 2, "--out", tmp_path / "parts")
    assert "already exists" in run(*common, "--steps", 4, "--out", tmp_path / "parts", fails=True)
    parts = run(*common, "--steps", 4, "--out", tmp_path / "parts", "--resume")
    assert parts["metrics"]["step"] == whole["metrics"]["step"] == 4
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 4
    description = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert description["resumed"] == [{"step": 2, "changed": {"steps": [2, 4]}}]
    assert str(place) not in json.dumps(description)


def test_train_from_a_run_goes_on_with_its_editor_and_its_statistics(run: Command, place: Path, tmp_path: Path) -> None:
    common = ["train", "--model", "model", "--data", "records:facts.jsonl", "--from", "run", "--steps", 1]
    still = [*common, "--set", "batch_size=2", "--set", "learning_rate=0", "--set", "rates_learning_rate=0"]
    made = run(*still, "--out", tmp_path / "still")
    old, _ = read_tensors(place / "run" / "editor.safetensors")
    new, _ = read_tensors(tmp_path / "still" / "editor.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    moved = run(*common, "--set", "batch_size=2", "--out", tmp_path / "moved")
    assert moved["metrics"]["loss"] == made["metrics"]["loss"]
    assert not torch.equal(read_tensors(tmp_path / "moved" / "editor.safetensors")[0]["log_rates"], old["log_rates"])
    description = json.loads((tmp_path / "moved" / "run.json").read_text())
    assert description["from"] == {"source": "run", "sha256": sha256(place / "run" / "editor.safetensors")}
    assert "has its own editor settings" in run(*common, "--set", "editor.rank=3", "--out", tmp_path / "x", fails=True)
    assert "give --method mend" in run(*common, "--method", "ke", "--out", tmp_path / "x", fails=True)


@pytest.mark.parametrize("shared", ["true", "false"])
def test_the_rank_is_the_largest_that_the_memory_holds(shared: str, run: Command, tmp_path: Path) -> None:
    common = ["train", "--model", "model", "--data", "records:facts.jsonl", "--steps", 1, "--set", "batch_size=2"]
    common += ["--set", "normalizer_examples=2", "--set", f"editor.shared={shared}", "--method", "malmen"]
    run(*common, "--out", tmp_path / "run", "--editor-memory", "1e-3")
    config = json.loads((tmp_path / "run" / "run.json").read_text())["editor"]
    specs = default_layers(tiny("llama"))
    fits = [
        16 * sum(p.numel() for p in Malmen(specs, MalmenConfig(**{**config, "rank": rank})).parameters()) <= 1e6
        for rank in (config["rank"], config["rank"] + 1)
    ]
    assert fits == [True, False]
    in_8_bits = rank_for(1e-3, "adam8bit", Malmen, specs, MalmenConfig(**config))
    assert 1.5 * config["rank"] < in_8_bits < 1.7 * config["rank"], "10 bytes a parameter instead of 16"
    told = run(*common, "--out", tmp_path / "small", "--editor-memory", "1e-6", fails=True)
    assert "holds no editor of these 9 layers: rank 1 takes" in told
    told = run(*common, "--out", tmp_path / "small", "--editor-memory", "1", "--set", "editor.rank=4", fails=True)
    assert "editor.rank is 4; give one of them" in told


def test_config_file_and_settings(run: Command, tmp_path: Path) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text('[editor]\nlayers = ["model.layers.3.mlp.down_proj"]\nrank = 2\n[training]\nsteps = 9\nclip = 5.0\n')
    settings = ["--set", "clip=7", "--set", "training.batch_size=3", "--set", "normalizer_examples=3", "--steps", 1]
    made = run(
        "train", "--model", "model", "--data", "records:facts.jsonl", "--config", config, *settings, "--out", tmp_path / "r"
    )
    assert [layer["name"] for layer in made["layers"]] == ["model.layers.3.mlp.down_proj"]
    training = json.loads((tmp_path / "r" / "run.json").read_text())["training"]
    assert (training["steps"], training["clip"], training["batch_size"]) == (1, 7.0, 3)


def test_edit_generate_and_a_second_edit(run: Command, place: Path, tmp_path: Path) -> None:
    edit(run, tmp_path / "one")
    model, tokenizer = load(place / "model", dtype="float32")
    formatter = Formatter.of(model, tokenizer)
    text = formatter.encode("Who is Ana?", None)
    with applied(model, Edit.load(tmp_path / "one")):
        expected = formatter.decode(formatter.generate(model, [text], 6)[0])
    asked = ["generate", "--model", "model", "--prompt", "Who is Ana?", "--max-new-tokens", 6]
    assert run(*asked, "--edit", tmp_path / "one")["answer"] == expected
    assert run(*asked)["answer"] != expected
    run(*asked, "--edit", tmp_path / "one", "--chat")
    assert "already active" in run(*asked, "--edit", tmp_path / "one", "--edit", tmp_path / "one", fails=True)


def test_an_edit_is_rehearsed_on_what_is_named_beside_its_prompt(run: Command, tmp_path: Path) -> None:
    asked = ("edit", *ON, "--prompt", "Who is Ana?", "--target", "a baker", "--dtype", "float32")
    named = ("--rephrasing", "Ana is who?", "--unrelated", "Who is Bo?")
    folders = [tmp_path / name for name in ("plain", "one", "none")]
    for folder, more in zip(folders, ((), (*named, "--rehearse", 1), (*named, "--rehearse", 0)), strict=True):
        run(*asked, *more, "--out", folder)
    plain, rehearsed, unmoved = map(Edit.load, folders)
    assert (rehearsed.about["rehearsed"], "rehearsed" in unmoved.about) == (1, False)
    assert rehearsed.id != plain.id == unmoved.id
    assert rehearsed.about["request"]["rephrasings"] == ["Ana is who?"]
    assert rehearsed.about["request"]["unrelated"] == [{"prompt": "Who is Bo?", "answer": None}]
    (kept,) = run("store", tmp_path / "store", "add", tmp_path / "one")["added"]
    assert kept["request"]["rephrasings"] == ["Ana is who?"]
    for more in ((*named, "--target-end", "never"), (*named, "--scale", -1), ("--rehearse", 3)):
        assert "--rephrasing and --unrelated" in run(*asked, *more, "--out", tmp_path / "x", fails=True)
    from_file = ("edit", *ON, "--data", "records:facts.jsonl", *named, "--out", tmp_path / "x")
    assert "leave --data and --target-end out" in run(*from_file, fails=True)
    assert not (tmp_path / "x").exists()


def test_edit_of_a_file_is_one_folder_a_record(run: Command, tmp_path: Path) -> None:
    precise = ("--dtype", "float32")  # in bf16 a batch rounds otherwise than a text alone
    made = run("edit", *ON, "--data", "records:facts.jsonl", "--out", tmp_path / "many", *precise)
    assert made["count"] == 3
    single = edit(run, tmp_path / "single", *precise)
    assert single["count"] == 1
    batched, alone = Edit.load(Path(made["edits"][1])), Edit.load(tmp_path / "single")
    for name, update in alone.updates.items():
        torch.testing.assert_close(batched.updates[name].dense(), update.dense(), rtol=1e-3, atol=1e-6)


def test_a_setting_is_judged_before_the_model_is_loaded(run: Command, tmp_path: Path) -> None:
    asked = ("edit", "--model", "nowhere", "--method", "ft", "--prompt", "a", "--target", "b", "--out", tmp_path / "x")
    assert "one of the paper's by name" in run(*asked, "--set", "rate=paper-bert", fails=True)


def test_a_line_holds_nothing_that_a_terminal_obeys() -> None:
    assert one_line("a\x1b[2J\n b\x00\x9b é 日") == "a\\x1b[2J b\\x00\\x9b é 日"


def test_edit_of_a_file_together_is_one_folder(run: Command, tmp_path: Path) -> None:
    made = run("edit", *ON, "--data", "records:facts.jsonl", "--together", "--out", tmp_path / "all")
    assert (made["count"], made["edits"]) == (1, [str(tmp_path / "all")])
    whole = Edit.load(tmp_path / "all")
    assert len(whole.about["parts"]) == 3
    run("generate", *ON[:2], "--edit", tmp_path / "all", "--prompt", "Who is Ana?")
    (added,) = run("store", tmp_path / "store", "add", tmp_path / "all")["added"]
    assert [part["prompt"] for part in added["request"]["parts"]] == [
        part["request"]["prompt"] for part in whole.about["parts"]
    ]
    asked = ["mendlm", "store", str(tmp_path / "store"), "undo"]
    shown = subprocess.run([sys.executable, "-m", *asked], capture_output=True, text=True, check=True).stdout
    assert "and 2 more in one" in shown
    said = run("edit", *ON, "--prompt", "a", "--target", "b", "--together", "--out", tmp_path / "b", fails=True)
    assert "--together makes one edit of many requests" in said


@pytest.mark.parametrize("method", ["ft", "ft-kl", "ft-strong", "lora"])
def test_edit_by_a_method_that_needs_no_training(run: Command, tmp_path: Path, method: str) -> None:
    asked = ("--prompt", "Who is Ana?", "--target", "a baker", "--out", tmp_path / "one", "--set", "steps=2")
    watched = ("--locality", "records:facts.jsonl") if method == "ft-kl" else ()
    run("edit", "--model", "model", "--method", method, *asked, *watched)
    made = Edit.load(tmp_path / "one")
    assert made.about["method"] == method
    assert any(update.norm() > 0 for update in made.updates.values())


def test_enn_is_trained_and_scored_and_its_edits_hold_what_it_changed_of_the_base(run: Command, tmp_path: Path) -> None:
    common = ("--model", "model", "--data", "records:facts.jsonl")
    run("train", "--method", "enn", *common, "--steps", 2, "--out", tmp_path / "enn", "--set", "normalizer_examples=3")
    summary = run("eval", *common, "--editor", tmp_path / "enn", "--out", tmp_path / "e")
    assert summary["method"] == "enn"
    asked = ("--model", "model", "--editor", tmp_path / "enn", "--prompt", "Who is Ana?", "--target")
    run("edit", *asked, "a baker", "--out", tmp_path / "one")
    run("edit", *asked, "a cook", "--out", tmp_path / "two")
    both = ("--edit", tmp_path / "one", "--edit", tmp_path / "two")
    said = run("generate", "--model", "model", *both, "--prompt", "Who is Ana?", fails=True)
    assert "change of the base, which must not be made twice" in said
    run("generate", "--model", "model", *both[:2], "--prompt", "Who is Ana?")
    change, one = Edit.load(tmp_path / "enn" / "changed_base"), Edit.load(tmp_path / "one")
    assert (one.about["changed_base"], one.about["base"]) == (change.id, change.about["base"])
    assert all(torch.equal(change.updates[name].dense(), own) for name, own in learned_changes(tmp_path / "enn").items())
    run("export", tmp_path / "enn" / "changed_base", "--to", "merged", "--model", "model", "--out", tmp_path / "base")
    base, changed = (dict(load(folder, dtype="float32")[0].named_parameters()) for folder in ("model", tmp_path / "base"))
    for name, own in learned_changes(tmp_path / "enn").items():
        torch.testing.assert_close(changed[f"{name}.weight"], base[f"{name}.weight"] + own)


def learned_changes(folder: Path) -> dict[str, torch.Tensor]:
    """An ENN's changes of the base as its editor's file has them, by layer."""
    method, _ = load_editor(folder)
    assert isinstance(method, Enn)
    return {spec.name: change.detach() for spec, change in zip(method.specs, method.changes, strict=True)}


def test_scale(run: Command, tmp_path: Path) -> None:
    edit(run, tmp_path / "one")
    edit(run, tmp_path / "half", "--scale", 0.5)
    one, half = Edit.load(tmp_path / "one"), Edit.load(tmp_path / "half")
    for name, update in half.updates.items():
        torch.testing.assert_close(2 * update.dense(), one.updates[name].dense())


@pytest.mark.parametrize("more", [(), ("--num-edits", 3), ("--sequential",), ("--method", "ft", "--set", "steps=2")])
def test_eval(run: Command, tmp_path: Path, more: tuple[object, ...]) -> None:
    editor = () if "ft" in more else ("--editor", "run")
    source = ("--locality", "records:facts.jsonl")
    summary = run("eval", "--model", "model", *editor, "--data", "records:facts.jsonl", "--out", tmp_path / "e", *source, *more)
    assert summary == json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["count"] == len((tmp_path / "e" / "results.jsonl").read_text().splitlines()) == 3
    assert summary["model"] == "model"
    assert set(summary["success"]) == {"before", "after", "low", "high"}


COMPARE = ("compare", "--model", "model", "--data", "records:facts.jsonl", "--locality", "text:text.txt")


def test_compare_scores_every_method_at_every_count_and_goes_on_where_it_stopped(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    run("train", "--method", "ke", "--model", "model", "--data", "records:facts.jsonl", "--steps", 1, "--out", tmp_path / "ke",
        "--set", "batch_size=2", "--set", "normalizer_examples=3")  # fmt: skip
    how = (
        "--methods",
        "mend,ke,ft,ft-kl,prompt,cache",
        "--editor",
        "mend=run",
        "--editor",
        f"ke={tmp_path / 'ke'}",
        "--num-edits",
        "1,3",
    )
    settings = ("--set", "generate=false", "--set", "ft.steps=1", "--set", "ft-kl.steps=1", "--out", out)
    made = run(*COMPARE, *how, *settings)
    cells = json.loads((out / "table.json").read_text())
    assert [(c["method"], c["num_edits"]) for c in cells] == [
        (m, n) for m in ("cache", "ft", "ft-kl", "ke", "mend", "prompt") for n in (1, 3)
    ]
    assert all(c["count"] == 3 and c["generate"] is False for c in cells)
    assert cells[2]["method_config"]["steps"] == 1
    alone = run("eval", *ON, "--data", "records:facts.jsonl", "--locality", "text:text.txt", "--out", tmp_path / "e",
                "--set", "generate=false")  # fmt: skip
    same = ("success", "generality", "locality", "perplexity", "new_over_old")
    assert [alone[key] for key in same] == [cells[8][key] for key in same]
    assert all(Path(path).is_file() for path in made["files"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("mendlm.evaluation.evaluate", refuse)
    (out / "table.md").unlink()
    older = next((out / "cells").glob("*/summary.json"))
    summary = json.loads(older.read_text())
    del summary["cell"]["evaluation"]["rehearse"]  # written before there was such a setting
    older.write_text(json.dumps(summary))
    run(*COMPARE, *how, *settings)
    assert (out / "table.md").is_file()
    assert "holds results of other settings" in run(*COMPARE, *how, *settings, "--set", "ft.rate=0.5", fails=True)
    again = run("report", out / "cells", "--out", tmp_path / "again")
    assert [Path(path).name for path in again["files"]] == [Path(path).name for path in made["files"]]
    assert (tmp_path / "again" / "table.json").read_bytes() == (out / "table.json").read_bytes()
    (out / "table.md").unlink()
    assert run("report", out)["out"] == str(out)
    assert (out / "table.md").is_file()
    for command in (("report", out / "table.json"), (*COMPARE, "--methods", "ft", "--out", out / "table.json")):
        assert "table.json is a file; name a folder" in run(*command, fails=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "mend,rome"), "unknown method 'rome'"),
        (("--methods", " , "), "names no method"),
        (("--methods", "ft", "--num-edits", "1,9"), "has 3 requests, fewer than 9"),
        (("--methods", "ft", "--device", "nope"), "cannot use the device 'nope'"),
        (("--methods", "ft,lora", "--set", "lora.rank=0"), "rank"),
        (("--methods", "ft", "--num-edits", "1,x"), "whole numbers of at least 1"),
        (("--methods", "ft", "--editor", "mend=run"), "METHOD=RUN"),
        (("--methods", "mend", "--editor", "mend@7=run"), "and N of 1"),
        (("--methods", "ft", "--set", "num_edits=5"), "by --num-edits"),
        (("--methods", "ft", "--set", "ke.hidden=1"), "with a method of ft"),
        (("--methods", "ft", "--set", "nothing=1"), "unknown setting 'nothing'"),
        (("--methods", "ke"), "has to be trained"),
        (("--methods", "ke", "--editor", "ke=run"), "an editor of the method 'mend', not 'ke'"),
        (("--methods", "mend", "--editor", "mend=run", "--set", "mend.rank=3"), "keeps the settings of its run"),
    ],
)
def test_compare_refuses(run: Command, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    assert message in run(*COMPARE, *more, "--out", tmp_path / "c", fails=True)
    assert not (tmp_path / "c").exists()


SWEEP = ("--model", "model", "--data", "records:facts.jsonl", "--set", "batch_size=8", "--set", "normalizer_examples=3",
         "--set", "editor.rank=2")  # fmt: skip


def test_compare_in_turn_scores_all_requests_under_the_edits_made_one_after_another(run: Command, tmp_path: Path) -> None:
    how = ("--methods", "ft,cache", "--num-edits", "1,3", "--set", "generate=false", "--set", "ft.steps=2")
    found = {}
    rehearsed = ("--sequential", "--set", "on_base=true", "--set", "rehearse=2")
    for name, more in (("at once", ()), ("in turn", ("--sequential",)), ("rehearsed", rehearsed)):
        run(*COMPARE, *how, *more, "--out", tmp_path / name)
        found[name] = json.loads((tmp_path / name / "table.json").read_text())
    cells = [(cell["method"], cell["num_edits"], cell["sequential"]) for cell in found["in turn"]]
    assert cells == [("cache", 1, False), ("cache", 3, False), ("ft", 1, False), ("ft", 3, True)]
    settings = [(cell["sequential"], cell["on_base"], cell["rehearse"]) for cell in found["rehearsed"]]
    assert settings == [(False, False, 0)] * 3 + [(True, True, 2)]
    assert found["rehearsed"][3]["weight_change"] != found["in turn"][3]["weight_change"]
    same = ("success", "weight_change", "locality")
    for place in (0, 1, 2):
        assert [found["in turn"][place][key] for key in same] == [found["at once"][place][key] for key in same]
    alone = run("eval", "--method", "ft", "--model", "model", "--data", "records:facts.jsonl", "--locality", "text:text.txt",
                "--sequential", "--set", "generate=false", "--set", "steps=2", "--out", tmp_path / "e")  # fmt: skip
    assert [found["in turn"][3][key] for key in same] == [alone[key] for key in same]
    assert alone["weight_change"] != found["at once"][3]["weight_change"]
    refused = run("eval", "--method", "cache", *COMPARE[1:5], "--sequential", "--out", tmp_path / "x", fails=True)
    assert "keeps each request by itself" in refused


def test_sweep_trains_each_value_as_train_does_and_goes_on_where_it_stopped(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, common = tmp_path / "s", (*SWEEP, "--steps", 3)
    made = run("sweep", "clip", "1e-4", "1.0", *common, "--out", out)
    assert [Path(path).name for path in made["files"]] == ["sweep.md", "sweep.json", "sweep.png"]
    found = json.loads((out / "sweep.json").read_text())
    run("train", *common, "--set", "clip=1e-4", "--out", tmp_path / "alone")
    alone = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    mine = [json.loads(line) for line in (out / "runs" / "1e-4" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in mine] == [row["loss"] for row in alone]
    assert found["values"]["1e-4"]["edit_loss"] == alone[-1]["edit_loss"] != found["values"]["1.0"]["edit_loss"]
    assert found["values"]["1e-4"]["count"] == 3

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr("mendlm.training.train", refuse)
        (out / "sweep.json").unlink()
        run("sweep", "clip", "1e-4", "1.0", *common, "--out", out)
        assert json.loads((out / "sweep.json").read_text()) == found
    assert "other settings" in run("sweep", "clip", "1e-4", *common, "--set", "seed=1", "--out", out, fails=True)


def test_sweep_over_batches_gives_each_the_same_number_of_requests(run: Command, tmp_path: Path) -> None:
    run("sweep", "batch_size", "1", "3", *SWEEP, "--requests", 6, "--out", tmp_path / "s")
    runs = {point: tmp_path / "s" / "runs" / point / "metrics.jsonl" for point in ("1", "3")}
    assert {point: len(log.read_text().splitlines()) for point, log in runs.items()} == {"1": 6, "3": 2}
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["length"] == "6 requests"


def test_sweep_over_depth_scores_requests_that_were_held_out(run: Command, tmp_path: Path) -> None:
    how = (*SWEEP, "--steps", 1, "--valid", "records:facts.jsonl", "--out", tmp_path / "s")
    run("sweep", "blocks", "0-1", "3", *how)
    found = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert found["valid"] == "records:facts.jsonl"
    for point, blocks in (("0-1", (0, 1)), ("3", (3,))):
        description = json.loads((tmp_path / "s" / "runs" / point / "run.json").read_text())
        names = [layer["name"] for layer in description["layers"]]
        assert names == [f"model.layers.{b}.mlp.{m}_proj" for b in blocks for m in ("gate", "up", "down")]
        (row,) = (tmp_path / "s" / "runs" / point / "metrics.jsonl").read_text().splitlines()
        assert found["values"][point]["success"] == json.loads(row)["valid_success"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (("blocks", "2-9"), "has blocks 0 to 3"),
        (("blocks", "3-1"), "its first and last"),
        (("depth", "3"), "unknown setting 'depth'"),
        (("editor.rank", "0"), "rank must be at least 1"),
        (("clip", "1", "--method", "ft"), "cannot be trained"),
        (("clip", "1", "--steps", "2", "--requests", "9"), "give one of them"),
        (("steps", "1", "--requests", "9"), "give one of them"),
    ],
)
def test_sweep_refuses(run: Command, tmp_path: Path, what: tuple[str, ...], message: str) -> None:
    assert message in run("sweep", *what, *SWEEP, "--out", tmp_path / "s", fails=True)
    assert not (tmp_path / "s").exists()


def test_refining_is_set_where_edits_are_made(run: Command, tmp_path: Path) -> None:
    what = (*ON, "--data", "records:facts.jsonl", "--out")
    found = run("eval", *what, tmp_path / "e", "--set", "refine=2")
    assert found["method_config"]["refine"] == 2
    message = "refine is a number of steps, 0 for none, got -1"
    assert message in run("eval", *what, tmp_path / "x", "--set", "refine=-1", fails=True)
    assert "'refine' is no setting here" in run(
        "eval", *what, tmp_path / "x", "--method", "ke", "--set", "refine=2", fails=True
    )
    assert not (tmp_path / "x").exists()


def test_the_normaliser_may_follow_along_while_editing(run: Command, tmp_path: Path) -> None:
    found = [
        run(
            "eval",
            *ON,
            "--data",
            "records:facts.jsonl",
            "--sequential",
            "--out",
            tmp_path / name,
            "--set",
            f"normalizer_follows={name}",
        )
        for name in ("false", "true")
    ]
    assert [one["method_config"]["normalizer_follows"] for one in found] == [False, True]
    assert all(one["editor"].keys() == {"source", "step", "sha256", "seed"} for one in found)
    assert found[0]["weight_change"] != found[1]["weight_change"]
    refused = run("eval", *ON, "--data", "records:facts.jsonl", "--out", tmp_path / "x", "--set", "rank=3", fails=True)
    assert "'rank' is no setting here: an evaluation has num_edits," in refused


def test_export_of_several_edits(run: Command, place: Path, tmp_path: Path) -> None:
    names = ["a", "b"]
    for name, target in zip(names, ("a baker", "a king"), strict=True):
        run(
            "edit",
            "--model",
            "model",
            "--editor",
            "run",
            "--prompt",
            "Who is Bo?",
            "--target",
            target,
            "--out",
            tmp_path / name,
        )
    run("export", tmp_path / "a", tmp_path / "b", "--to", "peft", "--out", tmp_path / "both")
    first, second, both = (Edit.load(tmp_path / name) for name in (*names, "both"))
    for name, update in both.updates.items():
        torch.testing.assert_close(update.dense(), first.updates[name].dense() + second.updates[name].dense())
    run("export", tmp_path / "a", "--out", tmp_path / "small", "--dtype", "bfloat16")
    tensors, _ = read_tensors(tmp_path / "small" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    served = run("export", tmp_path / "both", "--for", "vllm", "--out", tmp_path / "served")
    assert served["max_lora_rank"] == json.loads((tmp_path / "served" / "adapter_config.json").read_text())["r"]
    assert "--enable-lora" in text(run, "export", tmp_path / "both", "--for", "vllm", "--out", tmp_path / "again")


def test_export_of_a_merged_model_and_for_llama_cpp(run: Command, place: Path, tmp_path: Path) -> None:
    edit(run, tmp_path / "edit")
    merged = run("export", tmp_path / "edit", "--to", "merged", "--model", "model", "--out", tmp_path / "merged")
    assert merged["dtype"] == "float32"  # that of the model's files
    assert [one["prompt"] for one in merged["asked"]] == ["Who is Ana?"]
    model, _ = load(tmp_path / "merged", dtype="float32")
    whole = Edit.load(tmp_path / "edit")
    for name, update in whole.updates.items():
        wanted = tiny("llama").get_submodule(name).weight + update.dense()
        torch.testing.assert_close(model.get_submodule(name).weight, wanted)
    half = run("export", tmp_path / "edit", "--to", "merged", "--model", "model", "--dtype", "bf16", "--out", tmp_path / "half")
    assert (half["dtype"], load(tmp_path / "half", dtype="auto")[0].config.dtype) == ("bfloat16", torch.bfloat16)
    made = run("export", tmp_path / "edit", "--to", "gguf-lora", "--model", "model", "--out", tmp_path / "gguf")
    assert (made["architecture"], made["file"]) == ("llama", "adapter.gguf")
    assert (tmp_path / "gguf" / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    for wrong, message in (
        (("--to", "merged"), "give it with --model"),
        (("--to", "gguf-lora"), "give it with --model"),
        (("--model", "model"), "leave --model out"),
        (("--to", "gguf-lora", "--model", "model", "--for", "vllm"), "goes with --to peft"),
        (("--to", "gguf-lora", "--model", "model", "--dequantize"), "are for --to merged"),
    ):
        assert message in run("export", tmp_path / "edit", *wrong, "--out", tmp_path / "x", fails=True)
    other().save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    for to in ("merged", "gguf-lora"):
        arguments = ("export", tmp_path / "edit", "--to", to, "--model", tmp_path / "other", "--out", tmp_path / "x")
        assert "another base model" in run(*arguments, fails=True)
    assert not (tmp_path / "x").exists()
    assert "layer" in text(run, "export", tmp_path / "edit", "--to", "merged", "--model", "model", "--out", tmp_path / "y")


def text(run: Command, *arguments: object) -> str:
    """What a command prints without --json."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()) as out:
        main([*map(str, arguments)])
    assert stop.value.code == 0
    return out.getvalue()


def test_inspect(run: Command) -> None:
    seen = run("inspect", "model", "--rank", 3)
    assert seen["family"] == "causal"
    assert seen["blocks"] == {"model.layers": 4}
    assert len(seen["default"]) == 9
    widths = 2 * 2 * (16 + 24) * 3 + (16 + 24)  # U and V of two blocks, b
    assert seen["editor_bytes"] == 4 * (2 * widths + 9 * 4 * (16 + 24) + 9)


def test_inspect_says_what_it_found_in_a_model_outside_the_table(
    run: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other().save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    seen = run("inspect", tmp_path / "other")
    assert (seen["model_type"], seen["blocks"], seen["default"]) == ("stablelm", {"model.layers": 4}, [])
    found = {name.partition(".3.")[2] for name in (layer["name"] for layer in seen["editable"]) if ".3." in name}
    assert found == {f"self_attn.{m}_proj" for m in "qkvo"} | {f"mlp.{m}_proj" for m in ("gate", "up", "down")}
    assert "'stablelm'" in seen["no_default"]
    assert "by pattern" in seen["no_default"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "other")])
    text = capsys.readouterr().out
    assert "no default layers are known for model type 'stablelm'" in text
    (pattern,) = {word for word in text.split() if word.endswith(".mlp.up_proj")}  # what it shows can be given as it is
    model, _ = load(tmp_path / "other")
    assert [spec.name for spec in select(model, [pattern])] == [f"model.layers.{i}.mlp.up_proj" for i in range(4)]


def test_inspect_names_a_classifiers_labels(run: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("bert two logits").save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    seen = run("inspect", tmp_path / "bert")
    assert (seen["family"], seen["labels"]) == ("classifier", ["REFUTES", "SUPPORTS"])
    assert len(seen["default"]) == 6
    assert run("inspect", "model")["labels"] == []
    answer = run("generate", "--model", tmp_path / "bert", "--prompt", "Oslo is in Norway.")["answer"]
    assert answer in seen["labels"]
    assert "takes no chat turns" in run("generate", "--model", tmp_path / "bert", "--prompt", "Who?", "--chat", fails=True)


def test_text_output_of_eval_says_what_is_made_of_the_data(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "claims.jsonl").write_text('{"claim": "Oslo is old.", "label": "SUPPORTS"}\n')
    with pytest.raises(SystemExit):
        main(["eval", *ON, "--data", "fever:claims.jsonl", "--set", "generate=false", "--out", str(tmp_path / "e")])
    assert "fever:claims.jsonl: rephrasings of 1 of 1 FEVER claims are made by mendlm's templates" in capsys.readouterr().out


def test_text_output(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        main(["inspect", "model"])
    assert "model.layers.*.mlp.gate_proj" in capsys.readouterr().out


BAD: dict[str, tuple[list[str], list[str]]] = {
    "layer": (
        ["train", "--data", "records:facts.jsonl", "--set", 'editor.layers=["*.mlp.gate_prj"]'],
        ["gate_prj", "gate_proj"],
    ),
    "setting": (["train", "--data", "records:facts.jsonl", "--set", "batchsize=3"], ["batchsize", "it has steps, batch_size"]),
    "type": (["train", "--data", "records:facts.jsonl", "--set", "steps=many"], ["steps", "many"]),
    "config": (["train", "--data", "records:facts.jsonl", "--config", "none.toml"], ["none.toml"]),
    "config folder": (["train", "--data", "records:facts.jsonl", "--config", "."], ["cannot be read", "TOML"]),
    "flag": (["train", "--data", "records:facts.jsonl", "--set", "batch_size=true"], ["batch_size", "expected int", "True"]),
    "no value": (["eval", "--data", "records:facts.jsonl", "--set", "nonsense"], ["nonsense", "NAME=VALUE"]),
    "tracker": (["train", "--data", "records:facts.jsonl", "--set", "tracker=foo"], ["'foo'", "tensorboard", "wandb"]),
    "a tracker that is not here": (
        ["train", "--data", "records:facts.jsonl", "--set", "tracker=clearml"],
        ["'clearml' is not installed", "leave the tracker out"],
    ),
    "memory of no rank": (
        ["train", "--data", "records:facts.jsonl", "--method", "ke", "--editor-memory", "1"],
        ["rank of mend and malmen", "'ke' has none"],
    ),
    "memory of a trained editor": (
        ["train", "--data", "records:facts.jsonl", "--from", "run", "--editor-memory", "1"],
        ["--from run has a rank already"],
    ),
    "no memory": (["train", "--data", "records:facts.jsonl", "--editor-memory", "nan"], ["positive number of GB", "nan"]),
    "nothing to watch": (
        ["eval", "--method", "ft-kl", "--data", "records:facts.jsonl"],
        ["none of the first 3 of a source", "more texts than that (none was given)"],
    ),
    "too little to watch": (
        ["eval", "--method", "ft-kl", "--data", "records:facts.jsonl", "--locality", "records:facts.jsonl"],
        ["none of the first 3 of a source", "more texts than that (records:facts.jsonl has 3)"],
    ),
    "device": (["eval", "--data", "records:facts.jsonl", "--device", "nope"], ["'nope'", "this machine has cpu"]),
    "plain text": (["eval", "--data", "records:text.txt"], ["text.txt", "text:text.txt"]),
    "task": (["train", "--data", "facts.jsonl"], ["TASK:PATH", "counterfact"]),
    "missing data": (["train", "--data", "records:none.jsonl"], ["none.jsonl"]),
    "another task's file": (["train", "--data", "zsre:facts.jsonl"], ["'records': use records:facts.jsonl"]),
    "no label": (["eval", "--data", "fever:unlabelled.jsonl"], ["unlabelled.jsonl", "record 1", "'label': is missing"]),
    "no alternatives": (["eval", "--data", "zsre:kilt.jsonl"], ["kilt.jsonl", "record 1", "'alternatives'", "at least one"]),
    "record": (["train", "--data", "records:bad.jsonl"], ["bad.jsonl", "record 2", "target"]),
    "no target": (["edit", "--editor", "run", "--prompt", "Who?"], ["--target"]),
    "empty target": (["edit", "--editor", "run", "--prompt", "Who?", "--target", " "], ["target is empty"]),
    "long request": (["eval", "--editor", "run", "--data", "records:long.jsonl"], ["window 128"]),
    "long training request": (["train", "--data", "records:long.jsonl", "--trunk-cache", "CACHE"], ["window 128"]),
    "long request of a sweep": (["sweep", "clip", "1", "--data", "records:long.jsonl"], ["window 128"]),
    "long prompt": (["edit", "--editor", "run", "--prompt", "who " * 400, "--target", "Bo"], ["window 128"]),
    "no rows": (["edit", "--method", "cache", "--prompt", "Who?", "--target", "Bo"], ["'cache' does not edit weights"]),
    "no editor": (["edit", "--prompt", "Who?", "--target", "Bo"], ["mendlm train", "--editor"]),
    "missing editor": (["edit", "--editor", "none", "--prompt", "Who?", "--target", "Bo"], ["none"]),
    "method": (["eval", "--method", "rome", "--data", "records:facts.jsonl"], ["rome", "mend"]),
    "dtype": (["edit", "--editor", "run", "--prompt", "Who?", "--target", "Bo", "--dtype", "int3"], ["int3", "bfloat16"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(run: Command, place: Path, tmp_path: Path, name: str) -> None:
    (place / "bad.jsonl").write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    (place / "unlabelled.jsonl").write_text('{"claim": "Oslo is old."}\n{"claim": "Ulm is new.", "label": "REFUTES"}\n')
    (place / "kilt.jsonl").write_text('{"input": "Who is Ana?", "alternatives": [], "output": [{"answer": "a cook"}]}\n')
    arguments, said = BAD[name]
    (place / "long.jsonl").write_text(json.dumps({"prompt": "who " * 400, "target": "Bo"}) + "\n")
    arguments = [str(tmp_path / "cache") if one == "CACHE" else one for one in arguments]
    message = run(*arguments, "--model", "model", "--out", tmp_path / "new" / "out", fails=True)
    for words in said:
        assert words in message
    assert not list(tmp_path.iterdir())


def test_a_method_that_does_not_exist_is_said_before_the_model_is_loaded(run: Command, tmp_path: Path) -> None:
    for command in (["eval"], ["edit"]):
        asked = [*command, "--method", "rome", "--model", "none", "--data", "records:facts.jsonl", "--out", tmp_path / "x"]
        assert "unknown method 'rome'" in run(*asked, fails=True)


def test_compare_says_what_is_wrong_with_a_later_cell_before_it_scores_an_earlier_one(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mendlm.evaluation.evaluate", lambda *_, **__: pytest.fail("scored"))
    methods = ("--methods", "ft,lora", "--out", tmp_path / "c")
    assert "rank" in run(*COMPARE, *methods, "--set", "lora.rank=0", fails=True)
    others = ("--methods", "ft,prompt,mend", "--editor", "mend=run", "--out", tmp_path / "c")
    assert "'prompt' has no strength" in run(*COMPARE, *others, "--set", "scale=2.0", fails=True)
    follows = ("--num-edits", "1,3", "--set", "mend.normalizer_follows=true")
    assert "give --sequential too" in run(*COMPARE, *others, *follows, fails=True)
    assert "a classifier cannot be told a fact" in run(*on_claims(tmp_path / "bert"), *methods[:1], "ft,prompt", *methods[2:],
                                                       fails=True)  # fmt: skip
    assert not (tmp_path / "c").exists()
    (tmp_path / "c").write_text("a file")
    assert "is a file; name a folder" in run(*COMPARE, *methods, fails=True)


def on_claims(folder: Path) -> tuple[object, ...]:
    """A comparison on a tiny classifier."""
    tiny("bert").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "claims.jsonl").write_text('{"prompt": "Oslo is old.", "target": "SUPPORTS"}\n')
    return ("compare", "--model", folder, "--data", f"records:{folder / 'claims.jsonl'}")


def test_compare_shows_the_other_cells_where_the_texts_of_one_do_not_fit(run: Command, place: Path, tmp_path: Path) -> None:
    (place / "facts-of-120.jsonl").write_text(
        "".join(json.dumps({"prompt": "who " * 15 + who, "target": "Bo"}) + "\n" for who in "abc")
    )
    how = ("compare", "--model", "model", "--data", "records:facts-of-120.jsonl", "--methods", "prompt,cache",
           "--num-edits", "1,3", "--set", "generate=false", "--out", tmp_path / "c")  # fmt: skip
    first, second = run(*how, fails=True), run(*how, fails=True)
    for said in (first, second):
        assert "error: prompt, 3 together cannot be scored: " in said
        assert "the model's window 128" in said
    assert "cache, 3 together: done before" in second
    cells = json.loads((tmp_path / "c" / "table.json").read_text())
    assert [(cell["method"], cell["num_edits"]) for cell in cells] == [("cache", 1), ("cache", 3), ("prompt", 1)]


def test_compare_leaves_no_folder_where_no_cell_can_be_scored(run: Command, place: Path, tmp_path: Path) -> None:
    (place / "zsre.json").write_text(json.dumps([{"src": "Who is Ana?", "alt": "a baker"}]))
    claims = on_claims(place / "bert")
    out = ("--methods", "ft,cache", "--out", tmp_path / "x" / "c")
    assert "ft, 1 together; cache, 1 together cannot be scored" in run(*claims, *out, "--set", "chat=true", fails=True)
    assert "a baker" in run(*claims[:3], "--data", "zsre:zsre.json", *out, fails=True)
    (place / "window.jsonl").write_text(json.dumps({"prompt": "who " * 400, "target": "Bo"}) + "\n")
    assert "window 128" in run("compare", "--model", "model", "--data", "records:window.jsonl", *out, fails=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "sweep", "edit", "eval", "compare"])
def test_a_classifier_given_to_a_task_of_texts_is_told_its_labels(run: Command, tmp_path: Path, command: str) -> None:
    bert = on_claims(tmp_path / "bert")[2]
    more = {
        "train": ("--steps", 1, "--set", "batch_size=2", "--set", "normalizer_examples=2"),
        "sweep": ("clip", "1", "--steps", 1, "--set", "batch_size=2", "--set", "normalizer_examples=2"),
        "edit": ("--method", "ft"),
        "eval": ("--method", "ft"),
        "compare": ("--methods", "ft,cache"),
    }[command]
    out = ("--out", tmp_path / "new" / "out")
    said = run(command, *more, "--model", bert, "--data", "records:facts.jsonl", *out, fails=True)
    assert "no label 'Lyon'" in said or "no label 'a baker'" in said or "no label 'the old city'" in said
    assert "its labels are: REFUTES, SUPPORTS" in said
    assert "give it requests and unrelated texts whose answers are labels, as those of the task 'fever'" in said
    assert not (tmp_path / "new").exists()


def test_edit_says_how_many_targets_the_model_gives_already(run: Command, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    labels = ("REFUTES", "SUPPORTS")
    claims = ("The river runs", "London is old", "Ana is a baker")
    asked = "".join(json.dumps({"prompt": claim, "target": label}) + "\n" for claim in claims for label in labels)
    (tmp_path / "labels.jsonl").write_text(asked)  # of the two answers to a claim, the model gives one already
    how = ("--method", "ft", "--set", "steps=1", "--model", tmp_path / "bert", "--data", f"records:{tmp_path / 'labels.jsonl'}")
    made = run("edit", *how, "--out", tmp_path / "m")
    assert (made["count"], made["already_given"]) == (6, 3)


def test_skip_bad_counts(run: Command, place: Path, tmp_path: Path) -> None:
    (place / "bad.jsonl").write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\nnot json\n')
    made = run("edit", *ON, "--data", "records:bad.jsonl", "--skip-bad", "--out", tmp_path / "m")
    assert (made["count"], made["skipped"]) == (1, 2)


def test_existing_output_is_refused_and_kept(run: Command, tmp_path: Path) -> None:
    edit(run, tmp_path / "one")
    before = (tmp_path / "one" / "edit.json").read_bytes()
    again = [
        "edit",
        "--model",
        "model",
        "--editor",
        "run",
        "--prompt",
        "Who is Bo?",
        "--target",
        "a king",
        "--out",
        tmp_path / "one",
    ]
    assert "--force" in run(*again, fails=True)
    assert (tmp_path / "one" / "edit.json").read_bytes() == before
    run(*again, "--force")
    assert (tmp_path / "one" / "edit.json").read_bytes() != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["one"]


def test_an_edit_of_another_base_is_refused(run: Command, place: Path, tmp_path: Path) -> None:
    edit(run, tmp_path / "one")
    other = tiny("llama").__class__(tiny("llama").config)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    asked = ["generate", "--model", tmp_path / "other", "--prompt", "Who?", "--edit", tmp_path / "one"]
    assert "another base model" in run(*asked, fails=True)
    run(*asked, "--force")
    made = ["edit", "--model", tmp_path / "other", "--editor", "run", "--prompt", "a", "--target", "b", "--out", tmp_path / "x"]
    assert "another base model" in run(*made, fails=True)
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    made[2] = tmp_path / "gpt2"
    assert "no such layer" in run(*made, fails=True)


def test_corrupt_files_are_named(run: Command, place: Path, tmp_path: Path) -> None:
    edit(run, tmp_path / "one")
    adapter = tmp_path / "one" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-40])
    asked = ["generate", "--model", "model", "--prompt", "Who?", "--edit", tmp_path / "one"]
    assert "adapter_model.safetensors" in run(*asked, fails=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "editor.safetensors").write_bytes((place / "run" / "editor.safetensors").read_bytes()[:1000])
    made = ["edit", "--model", "model", "--editor", broken, "--prompt", "a", "--target", "b", "--out", tmp_path / "x"]
    assert "editor.safetensors" in run(*made, fails=True)


def test_an_update_that_is_not_finite_writes_nothing(run: Command, tmp_path: Path) -> None:
    made = ["edit", *ON, "--prompt", "Who?", "--target", "Bo", "--scale", "inf"]
    assert "NaN or infinite" in run(*made, "--out", tmp_path / "x", fails=True)
    assert not (tmp_path / "x").exists()


def test_json_errors(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", "starter", "--prompt", "a", "--edit", str(tmp_path / "none"), "--json"])
    assert stop.value.code == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "FormatError"


@pytest.mark.parametrize(
    "wrong", [["edit", "--nothing"], ["eval"], ["nothing"], ["train", "--data", "x", "--out", "y", "--steps", "many"]]
)
def test_json_errors_of_usage(capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*wrong, "--json"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["kind"] == "InputError"
    assert error["message"] in err


def test_help_is_light() -> None:
    code = "import sys; from mendlm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_ctrl_c_saves_a_run_that_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mendlm", "train", "--model", str(place / "model"), "--data"]
    command += [f"records:{place / 'facts.jsonl'}", "--out", str(out), "--steps", "100000", *TRAIN]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in said
    step = len((out / "metrics.jsonl").read_text().splitlines())
    assert read_tensors(out / "checkpoint.safetensors")[1]["state"].startswith(f'{{"step": {step},')


def test_a_device_that_is_too_small_is_one_message(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("mendlm.evaluation.evaluate", full)
    said = run("eval", *ON, "--data", "records:facts.jsonl", "--out", tmp_path / "out", fails=True)
    assert "Tried to allocate 2.00 GiB. The device is too small for this: a smaller micro_batch_size or batch_size" in said
    monkeypatch.setattr("mendlm.evaluation.evaluate", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["eval", *ON, "--data", "records:facts.jsonl", "--out", str(tmp_path / "out")])
