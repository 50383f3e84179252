"""Bad luck, tried for real: full disks, kills, damaged and locked files, changed models, hostile text."""

# ruff: noqa: F811  (fixtures of another test file, imported by name)

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import test_tasks
from cases import files_limited_to
from mendlm.apply import Edit
from mendlm.files import locked
from mendlm.lowrank import LowRank
from mendlm.tensors import read_tensors
from test_cli import ON, TRAIN, Command, edit, place, run  # noqa: F401
from test_lowrank import pairs


def training(out: Path, *more: str) -> list[str]:
    return ["train", "--model", "model", "--data", "records:facts.jsonl", "--out", str(out), *TRAIN, *more]


def test_a_full_disk_at_a_checkpoint_keeps_the_last_one(run: Command, tmp_path: Path) -> None:
    every = ["--set", "checkpoint_every=2", "--steps"]
    run(*training(tmp_path / "run", *every, "2"))
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    with files_limited_to(len(before) // 2):
        message = run(*training(tmp_path / "run", *every, "6", "--resume"), fails=True)
    assert str(checkpoint) in message
    assert "File too large" in message
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "run").glob(".*safetensors*"))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')  # and in the middle of a line of the log
    run(*training(tmp_path / "run", *every, "6", "--resume"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_leaves_no_edit(run: Command, tmp_path: Path) -> None:
    with files_limited_to(2000):
        message = run("edit", *ON, "--prompt", "Who?", "--target", "Bo", "--out", tmp_path / "one", fails=True)
    assert "adapter_model.safetensors" in message
    assert not list(tmp_path.iterdir())


def test_a_second_training_into_one_folder_is_refused(run: Command, tmp_path: Path) -> None:
    run(*training(tmp_path / "run", "--steps", "1"))
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    with locked(tmp_path / "run"):
        message = run(*training(tmp_path / "run", "--steps", "3", "--resume"), fails=True)
    assert "another process is at work" in message
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_a_flipped_bit_is_named(run: Command, place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(place / "run", broken)
    made = ["edit", "--model", "model", "--editor", broken, "--prompt", "a", "--target", "b", "--out", tmp_path / "x"]
    for name, command in {
        "editor.safetensors": made,
        "checkpoint.safetensors": training(broken, "--steps", "5", "--resume"),
    }.items():
        content = bytearray((broken / name).read_bytes())
        content[len(content) // 2] ^= 4
        (broken / name).write_bytes(content)
        message = run(*command, fails=True)
        assert name in message
        assert "hash" in message


def test_a_base_model_whose_file_changed_is_noticed(run: Command, place: Path, tmp_path: Path) -> None:
    edit(run, tmp_path / "one")
    shutil.copytree(place / "model", tmp_path / "model")
    asked = ["generate", "--model", tmp_path / "model", "--prompt", "Who?", "--edit", tmp_path / "one", "--max-new-tokens", 2]
    run(*asked)
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert "another base model" in run(*asked, fails=True)


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MENDLM_CACHE", str(tmp_path / "file" / "cache"))
    edit(run, tmp_path / "one")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_an_edit_is_made_in_any_dtype(run: Command, tmp_path: Path, dtype: str) -> None:
    edit(run, tmp_path / "one", "--dtype", dtype)
    run("generate", "--model", "model", "--prompt", "Who?", "--edit", tmp_path / "one", "--max-new-tokens", 2)


ODD = {
    "emoji": "Who is 👩‍👩‍👧 🇫🇷?",
    "right to left": "من هو ‮آنا‬؟",
    "control characters": "Who\x00is\x07Ana\x1b[31m?",
    "windows line ends": "Who is\r\nAna?",
    "combining": "Who is A\u0301\u0308na?",
    "lone joiner": "\u200d?",
    "special token": "<|endoftext|> Who?",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_text_is_text(run: Command, tmp_path: Path, name: str) -> None:
    run("edit", *ON, "--prompt", ODD[name], "--target", ODD[name], "--out", tmp_path / "one")
    assert Edit.load(tmp_path / "one").about["request"]["prompt"] == ODD[name]
    run("generate", "--model", "model", "--prompt", ODD[name], "--edit", tmp_path / "one", "--max-new-tokens", 2)


def test_records_of_any_text_and_line_end(run: Command, place: Path, tmp_path: Path) -> None:
    records = [{"prompt": text, "target": text} for text in ODD.values()]
    (place / "odd.jsonl").write_bytes("\r\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode())
    assert run("edit", *ON, "--data", "records:odd.jsonl", "--out", tmp_path / "many")["count"] == len(ODD)


def test_a_prompt_of_a_hundred_thousand_characters_is_refused_at_once(run: Command, tmp_path: Path) -> None:
    begun = time.monotonic()
    message = run("edit", *ON, "--prompt", "x" * 100_000, "--target", "Bo", "--out", tmp_path / "one", fails=True)
    assert "window 128" in message
    assert len(message) < 500
    assert time.monotonic() - begun < 30


def test_a_text_that_is_too_long_is_named_before_any_edit_is_made(run: Command, tmp_path: Path) -> None:
    facts = [{"prompt": "Who is Ana?", "target": "a baker"}] * 300 + [{"prompt": "a b " * 25_000, "target": "c"}]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    asked = ["edit", "--model", "model", "--editor", "run", "--data", f"records:{tmp_path / 'facts.jsonl'}"]
    message = run(*asked, "--out", tmp_path / "x", fails=True)
    assert "request 301: " in message
    assert "tokens" in message
    assert "editing" not in message
    assert not (tmp_path / "x").exists()


def lines(run_folder: Path) -> int:
    path = run_folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_editor(place: Path, tmp_path: Path) -> None:
    settings = ["--set", "checkpoint_every=1", "--steps", "60"]
    killed, command = tmp_path / "killed", [sys.executable, "-m", "mendlm"]
    subprocess.run([*command, *training(tmp_path / "whole", *settings)], cwd=place, check=True, capture_output=True)
    command += training(killed, *settings)
    for number in range(6):
        resume = ["--resume"] if (killed / "checkpoint.safetensors").exists() else []
        process = subprocess.Popen(command + resume, cwd=place, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        begun, deadline = lines(killed), time.monotonic() + 120
        while process.poll() is None and lines(killed) <= begun + 1 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.007 * number)
        process.kill()
        assert process.wait() == -9
    subprocess.run([*command, "--resume"], cwd=place, check=True, capture_output=True)
    whole, after = (read_tensors(folder / "checkpoint.safetensors")[0] for folder in (tmp_path / "whole", killed))
    for name, tensor in whole.items():
        assert_close(after[name], tensor, rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
    assert not list(killed.glob(".*safetensors*"))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.sampled_from(sorted(test_tasks.TASKS)), test_tasks.RECORDS)
def test_fuzz_records(name: str, record: Any) -> None:
    test_tasks.test_any_json_value_is_a_request_or_a_record_error.hypothesis.inner_test(name, record)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}":,p1 \n\\', max_size=60).map(str.encode))
def test_fuzz_files(content: bytes) -> None:
    test_tasks.test_any_bytes_are_a_data_set_or_a_record_error.hypothesis.inner_test(content)


def extent(rows: LowRank) -> float:
    """The size of what may cancel in the sum, of which rounding leaves a share."""
    return (rows.u.norm(dim=(-2, -1)) * rows.delta.norm(dim=(-2, -1))).max().item()


STEPS = st.lists(st.sampled_from(["add", "scale", "negate", "pad", "compress"]), max_size=6)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(pairs(), STEPS, st.floats(-2, 2).map(lambda factor: round(factor, 6)))
def test_fuzz_low_rank_algebra(both: tuple[LowRank, LowRank], steps: list[str], factor: float) -> None:
    rows, other = both
    dense, size = rows.dense(), 0.0
    for step in steps:
        size = max(size, extent(rows))
        if step == "add":
            rows, dense = rows + other, dense + other.dense()
        elif step == "scale":
            rows, dense = rows * factor, dense * factor
        elif step == "negate":
            rows, dense = -rows, -dense
        elif step == "pad":
            rows = rows.pad(rows.rows + 2)
        else:
            rows, lost = rows.compress(min(rows.shape))
            assert (lost < 1e-6).all()
    assert_close(rows.dense(), dense, rtol=1e-6, atol=1e-8)
    assert_close(rows.norm(), dense.flatten(-2).norm(dim=-1), rtol=1e-6, atol=1e-6 * max(size, extent(rows)))
