"""Two processes on the CPU do what one does: training, resuming, evaluation, bulk edits, and a base split over them."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from cases import byte_tokenizer, tiny
from mendlm import processes
from mendlm.apply import Edit, applied, merge
from mendlm.checkpoint import Run, load_editor
from mendlm.cli import app, edits, main
from mendlm.errors import InputError, LayerError, MendError
from mendlm.evaluation import EvaluationConfig, Results, evaluate
from mendlm.files import plain
from mendlm.layers import default_layers
from mendlm.methods import method_types
from mendlm.methods.base import Learned
from mendlm.methods.finetune import FineTune, FineTuneConfig
from mendlm.models import identity, load, shard
from mendlm.replay import Trunk
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.tensors import read_tensors
from mendlm.text import Formatter, scored_logits
from mendlm.training import TrainConfig, train

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

TESTS = Path(__file__).parent
COUNT, SECONDS = 2, 240
"""How many processes work together, and after how long they count as stuck."""


def example(i: int) -> EditExample:
    return EditExample(
        prompt=f"Who is {'Ana' * (1 + i % 4)}?" if i % 3 else f"The home of number {i} is",
        target=("a baker", " town", "in Ulm or near it")[i % 3],
        rephrasings=(f"Where number {i} lives:",) if i % 4 else (),
        unrelated=(Probe(f"The river of {i}", "is long"), Probe(f"{i} likes")) if i % 5 else (),
        question=bool(i % 3),
    )


def facts(first: int, count: int) -> Dataset:
    examples = tuple(example(i) for i in range(first, first + count))
    return Dataset(f"records:{first}", f"{first}+{count}", examples, tuple(p for e in examples for p in e.unrelated))


DATA, VALID = facts(0, 11), facts(20, 6)
CONFIG = TrainConfig(steps=4, batch_size=6, num_edits=2, normalizer_examples=8, valid_every=2, checkpoint_every=2)
SETTINGS: dict[str, dict[str, Any]] = {
    "mend": {"rank": 4, "initial_rate": 0.1},
    "malmen": {"rank": 4, "initial_rate": 0.1, "decoupled_from": 2},
    "enn": {},
    "ke": {"hidden": 4},
}


def editor(name: str = "mend", model: Any = None, seed: int = 0) -> Learned:
    model = tiny("llama") if model is None else model
    kind, config = method_types(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kind.for_model(model, default_layers(model), config(**SETTINGS[name]))
    assert isinstance(made, Learned)
    return made


def go(folder: Path, config: TrainConfig = CONFIG, *, method: Learned | None = None, model: Any = None, **more: Any) -> None:
    model = tiny("llama") if model is None else model
    options = {"valid": VALID, **more}
    train(method or editor(seed=processes.rank()), model, byte_tokenizer(), DATA, config, folder, **options)


def scores(model: Any, method: Any, data: Dataset = DATA, **settings: Any) -> Results:
    config = EvaluationConfig(**{"batch_size": 4, "timed_edits": 1, "num_edits": 2, **settings})
    return evaluate(method, method.specs, model, byte_tokenizer(), data, config, locality=[VALID])


def rows_in(results: Results) -> str:
    return json.dumps(results.rows)


def said(error: type[MendError], work: Callable[[], object]) -> str:
    try:
        work()
    except error as problem:
        return str(problem)
    return "nothing was said"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_together(work: Callable[[Path], dict[str, Any]], folder: Path, count: int = COUNT) -> list[dict[str, Any]]:
    """What each of several processes finds; they are ended if they get stuck."""
    port = free_port()
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])  # imports once
    started = multiprocessing.start_processes(
        _enter, (count, port, work, folder), nprocs=count, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + SECONDS
    while not started.join(timeout=1):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            pytest.fail(f"{count} processes were stuck for {SECONDS} seconds")
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(count)]


def _enter(rank: int, count: int, port: int, work: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    (folder / f"found-{rank}.json").write_text(json.dumps(work(folder)))


ON = ("--model", "model", "--device", "cpu", "--dtype", "float32", "--data", "records:facts.jsonl")
TRAIN = ["train", *ON, "--steps", "2"]
for _setting in ("editor.rank=4", "batch_size=4", "normalizer_examples=4"):
    TRAIN += ["--set", _setting]
COMMANDS = (
    ("eval", *ON, "--editor", "one", "--set", "batch_size=4"),
    ("edit", *ON, "--editor", "one"),
    ("compare", *ON, "--methods", "mend,prompt", "--editor", "mend=one", "--num-edits", "1,2", "--set", "batch_size=4"),
)


def said_by_one(*arguments: str, at: Path, fails: bool = False) -> tuple[str, str]:
    """What a command writes to its two streams, in this process."""
    with (
        contextlib.chdir(at),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MENDLM_CACHE", "cache")
        patch.setattr(edits, "CHUNK", 4)
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
    assert stop.value.code == (2 if fails else 0), err.getvalue()
    return out.getvalue(), err.getvalue()


def whole_base(folder: Path) -> dict[str, Any]:
    """All that two processes do with a base that each holds whole."""
    rank, model = processes.rank(), tiny("llama")
    found: dict[str, Any] = {"gathered": processes.gathered({"I am": rank, "long": "ä" * (5 + 900 * rank)})}
    go(folder / "two")
    go(folder / "two in parts", replace(CONFIG, micro_batch_size=2))
    stop = replace(CONFIG, steps=4)
    steps: list[int] = []
    go(
        folder / "two-one",
        stop,
        callback=lambda progress: steps.append(progress.step),
        should_stop=lambda: rank == 1 and steps[-1] == 2,
    )
    go(folder / "one-two", resume=True)
    for name in ("malmen", "enn", "ke"):
        go(folder / f"two {name}", replace(CONFIG, steps=2), method=editor(name), valid=None)
    go(folder / "two cached", valid=None, trunk_cache=folder / "trunk")
    method, _ = load_editor(folder / "one")
    results = scores(model, method)
    found |= {"rows": rows_in(results), "success": results.summary["success"], "count": results.summary["count"]}
    tuned = FineTune(default_layers(model), FineTuneConfig(steps=3, rate=1e-2))
    found["ft"] = rows_in(scores(model, tuned, facts(0, 6), num_edits=1, generate=False))
    found["few"] = said(InputError, lambda: scores(model, method, facts(0, 3)))
    found["differ"] = said(InputError, lambda: scores(model, method, facts(0, 10 + rank)))
    found["differing runs"] = said(InputError, lambda: go(folder / "never", replace(CONFIG, clip=1.0 + rank)))
    found["too few"] = said(InputError, lambda: go(folder / "never", replace(CONFIG, batch_size=2)))
    told = [said_by_one(*command, "--out", f"{command[0]}-two", at=folder)[0] for command in COMMANDS]
    alone = ("edit", *ON[:-2], "--editor", "one", "--prompt", "Why?", "--target", "So", "--out", "never")
    found["commands"] = ("".join(told), said_by_one(*alone, at=folder, fails=True)[1])
    found["map"] = said(InputError, lambda: load(folder / "model", device_map="auto"))
    return found


class Gathered(TorchDispatchMode):
    """Counts how often weights are gathered."""

    times = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += "allgather" in str(function)
        return function(*args, **(kwargs or {}))


def split_base(folder: Path) -> dict[str, Any]:
    """All that two processes do with a base that is split over them."""
    found: dict[str, Any] = {}
    for name in ("llama", "gpt2", "t5"):
        plain_model, model = tiny(name), shard(copy.deepcopy(tiny(name)))
        form = Formatter.of(model, byte_tokenizer())
        batch = form.batch([form.encode(e.prompt, e.target) for e in DATA.examples[:4]])
        method = editor(model=plain_model)
        one, other = method.gradient(plain_model, batch), method.gradient(model, batch)
        worst = max((one[k].dense() - other[k].dense()).abs().max().item() for k in one)
        edit = method.edits(plain_model, batch)
        trunk, split_trunk = (Trunk.below(m, method.specs) for m in (plain_model, model))
        with torch.no_grad():
            with trunk.replay(trunk.run(plain_model, batch.inputs)), applied(plain_model, edit):
                wanted = scored_logits(plain_model, batch)
            tape = split_trunk.run(model, batch.inputs)
            with applied(model, edit):
                full = scored_logits(model, batch)
                with Gathered() as whole_pass:
                    scored_logits(model, batch)
                with split_trunk.replay(tape), Gathered() as replayed:
                    logits = scored_logits(model, batch)
        worst = max(worst, (logits - wanted).abs().max().item(), (full - wanted).abs().max().item())
        found[name] = [worst, whole_pass.times, replayed.times]
    model = shard(copy.deepcopy(tiny("llama")))
    found["identity"] = identity(model)
    go(folder / "split", model=model)
    go(folder / "split in parts", replace(CONFIG, micro_batch_size=2), model=model)
    go(folder / "split malmen", replace(CONFIG, steps=2), method=editor("malmen"), model=model, valid=None)
    for name in ("enn", "ke"):
        found[name] = said(LayerError, functools.partial(go, folder / "never", method=editor(name), model=model))
    method, _ = load_editor(folder / "one")
    found["rows"] = rows_in(scores(model, method, facts(0, 5)))
    form = Formatter.of(model, byte_tokenizer())
    batch = form.batch([form.encode(e.prompt, e.target) for e in DATA.examples[:4]])
    edit = method.edits(model, batch)[0]
    found["merge"] = said(LayerError, lambda: merge(model, edit))
    found["cache"] = said(InputError, lambda: go(folder / "never", model=model, trunk_cache=folder / "trunk"))
    split, _ = load(folder / "model", dtype="float32", device_map="shards")
    found["loaded"] = (scored_logits(split, batch) - scored_logits(tiny("llama"), batch)).abs().max().item()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process makes."""
    folder = tmp_path_factory.mktemp("processes")
    tiny("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": e.prompt, "target": e.target, "unrelated": [{"prompt": "Why?"}]}) for e in DATA.examples]
    (folder / "facts.jsonl").write_text("\n".join(lines))
    go(folder / "one")
    steps: list[int] = []
    stop: dict[str, Any] = {"callback": lambda p: steps.append(p.step), "should_stop": lambda: steps[-1] == 2}
    go(folder / "one-two", **stop)
    for name in ("malmen", "enn", "ke"):
        go(folder / f"one {name}", replace(CONFIG, steps=2), method=editor(name), valid=None)
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Any]]:
    return run_together(whole_base, folder)


@pytest.fixture(scope="module")
def split(folder: Path) -> list[dict[str, Any]]:
    return run_together(split_base, folder)


def log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_equal_runs(one: Path, other: Path, tolerance: float = 1e-6, each: float = 1e-5) -> None:
    """The same weights within a relative difference, of all and of each tensor, and the same log within rounding.

    Of a tensor that starts at zeros Adam's first steps make rounding larger, where a gradient is near zero.
    """
    (tensors, _), (others, _) = (read_tensors(run / "checkpoint.safetensors") for run in (one, other))
    assert list(tensors) == list(others)
    names = [name for name in tensors if name.startswith("editor.")]
    mine, its = (torch.cat([t[name].double().flatten() for name in names]) for t in (tensors, others))
    assert ((mine - its).norm() / mine.norm()).item() <= tolerance
    for name in names:
        scale = tensors[name].double().norm().clamp(min=1e-12)
        assert ((tensors[name] - others[name]).double().norm() / scale).item() <= each, name
    for row, again in zip(log(one), log(other), strict=True):
        assert row == pytest.approx(again, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("pair", [("one", "two"), ("one", "one-two"), ("one", "two in parts"), ("one malmen", "two malmen"),
                                  ("one enn", "two enn"), ("one ke", "two ke")])  # fmt: skip
def test_two_processes_reach_the_weights_of_one(pair: tuple[str, str], folder: Path, together: Any) -> None:
    assert_equal_runs(folder / pair[0], folder / pair[1], each=1e-3 if "enn" in pair[0] else 1e-5)


def test_a_run_of_two_processes_is_resumed_by_one(folder: Path, together: Any) -> None:
    assert [row["step"] for row in log(folder / "two-one")] == [1, 2]  # stopped in both, though one alone was asked to
    go(folder / "two-one", resume=True)
    assert_equal_runs(folder / "one", folder / "two-one")
    assert "resumed" not in Run(folder / "two-one").description


def test_the_trunk_is_kept_by_all_processes_alike(folder: Path, together: Any) -> None:
    go(folder / "uncached", valid=None)
    assert_equal_runs(folder / "uncached", folder / "two cached", each=1e-4)
    before = sorted((folder / "trunk").rglob("*.safetensors"))
    assert len(before) > 1
    go(folder / "cached again", valid=None, trunk_cache=folder / "trunk")
    assert sorted((folder / "trunk").rglob("*.safetensors")) == before  # one process found all that two had kept


def test_two_processes_give_the_rows_of_one_bit_for_bit(folder: Path, together: Any) -> None:
    results = scores(tiny("llama"), load_editor(folder / "one")[0])
    assert [json.loads(found["rows"]) for found in together] == 2 * [plain(results.rows)]
    assert all(found["success"] == results.summary["success"] for found in together)
    tuned = FineTune(default_layers(tiny("llama")), FineTuneConfig(steps=3, rate=1e-2))
    assert together[0]["ft"] == rows_in(scores(tiny("llama"), tuned, facts(0, 6), num_edits=1, generate=False))


def test_processes_hear_each_other_in_order(together: Any) -> None:
    assert all(found["gathered"] == [{"I am": r, "long": "ä" * (5 + 900 * r)} for r in range(2)] for found in together)


def test_processes_that_do_not_fit_are_refused_in_each(folder: Path, together: Any) -> None:
    for found in together:
        assert "3 requests are 1 chunks of work, fewer than the 2 processes" in found["few"]
        assert "process 1 has data = 0+11, the main process 0+10" in found["differ"]
        assert "process 1 has training" in found["differing runs"]
        assert "leaves some of the 2 processes without work" in found["too few"]
        assert "spreads the model over one process's cards, but 2 processes run" in found["map"]
    assert not (folder / "never").exists()


def test_a_split_base_gives_the_numbers_of_the_whole_one(split: Any) -> None:
    for found in split:
        for name in ("llama", "gpt2", "t5"):
            worst, gathers, replayed = found[name]
            assert worst < 1e-6, name
            assert 0 < replayed < gathers, name
        assert found["identity"] == identity(tiny("llama"))
        assert found["loaded"] < 1e-6


@pytest.mark.parametrize("pair", [("one", "split"), ("one", "split in parts"), ("one malmen", "split malmen")])
def test_training_on_a_split_base_equals_that_on_the_whole_one(pair: tuple[str, str], folder: Path, split: Any) -> None:
    assert_equal_runs(folder / pair[0], folder / pair[1])


def test_evaluating_on_a_split_base_equals_that_on_the_whole_one(folder: Path, split: Any) -> None:
    results = scores(tiny("llama"), load_editor(folder / "one")[0], facts(0, 5))
    assert [json.loads(found["rows"]) for found in split] == 2 * [plain(results.rows)]


def test_what_a_split_base_cannot_do_is_refused(split: Any) -> None:
    for found in split:
        assert "is split over processes" in found["merge"]
        assert "trunk cache needs the whole base" in found["cache"]
        for name in ("enn", "ke"):
            assert f"'{name}' needs the whole base in each process" in found[name]


def test_one_process_has_nothing_to_split() -> None:
    with pytest.raises(InputError, match="there is one process"):
        shard(tiny("gpt2"))


GUIDE = (TESTS.parent / "docs" / "many-cards.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_the_guide_s_commands_are_understood(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "accelerate":
        given = launch_command_parser().parse_args(words[2:])
        assert (given.module, given.training_script) == (True, "mendlm")
        words = [given.training_script, *given.training_script_args]
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    command.make_context(words[1], words[2:])


def test_accelerate_launches_a_training_and_one_process_speaks(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MENDLM_CACHE": str(folder / "cache")}
    guided = next(line for line in LINES if line.startswith("accelerate")).partition(" -m mendlm")[0]
    _, *launcher = shlex.split(guided.replace("--num_processes 8", f"--main_process_port {free_port()} --num_processes 2"))
    accelerate = str(Path(sys.executable).parent / "accelerate")
    command = [accelerate, *launcher, "-m", "mendlm", *TRAIN, "--out", "launched", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["step"] == 2
    assert done.stderr.count("11 requests; editing") == 1
    said_by_one(*TRAIN, "--out", "unlaunched", at=folder)
    assert_equal_runs(folder / "unlaunched", folder / "launched")
    assert sorted(os.listdir(folder / "unlaunched")) == sorted(os.listdir(folder / "launched"))


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def summary_in(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "summary.json").read_text())
    return {
        key: value
        for key, value in content.items()
        if key not in ("command", "date", "edit_ms", "edit_memory_mb", "peak_memory_mb")
    }


def test_commands_of_two_processes_write_the_files_of_one(folder: Path, together: Any) -> None:
    for command in COMMANDS:
        said_by_one(*command, "--out", f"{command[0]}-one", at=folder)
    assert names_in(folder / "edit-one") == names_in(folder / "edit-two")
    assert len(list((folder / "edit-two").iterdir())) == len(DATA.examples)
    for path in (folder / "edit-one").iterdir():
        one, two = Edit.load(path), Edit.load(folder / "edit-two" / path.name)
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
        assert one.about["request"] == two.about["request"]
    for name in ("eval-{}", "compare-{}/cells/mend-2", "compare-{}/cells/prompt-1"):
        one, two = (folder / name.format(which) for which in ("one", "two"))
        assert (one / "results.jsonl").read_bytes() == (two / "results.jsonl").read_bytes()
        assert summary_in(one) == summary_in(two)
    assert names_in(folder / "compare-one") == names_in(folder / "compare-two")
    told = [found["commands"] for found in together]
    assert [len(out) > 0 for out, _ in told] == [True, False]  # the main process alone speaks
    assert all("one edit is the work of one process" in err for _, err in told)
