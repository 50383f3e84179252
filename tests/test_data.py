"""`mendlm.data` and the commands of `mendlm data`, on a tiny model."""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, tiny
from mendlm.cli import main
from mendlm.data import Samples, passages, sample
from mendlm.errors import InputError
from mendlm.tasks import load_edits
from mendlm.text import Formatter, sampling

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("Ana", "Bo", "Cy", "Di", "Eva", "Ib", "Jo", "Kai", "Lea", "Mo")
TEXTS = [f"{one} and {other} walk along the river" for one in NAMES for other in NAMES if one != other]


@functools.cache
def wordy() -> Any:
    """A tiny model that says whole words only, so that what it says reads back as the same tokens."""
    model = copy.deepcopy(tiny("gptj"))
    words = [token for word, token in byte_tokenizer().get_vocab().items() if word.startswith("Ġ") and len(word) > 2]
    with torch.no_grad():
        model.lm_head.bias.fill_(-1e4)[words] = 0
        model.lm_head.weight.mul_(0.3)
    return model


def draw(**changed: Any) -> Samples:
    return sample(wordy(), byte_tokenizer(), TEXTS, **{"count": 6, "tokens": 3, "batch_size": 8, **changed})


@pytest.fixture(scope="module")
def made() -> Samples:
    return draw()


def test_each_sample_continues_its_passage_by_so_many_tokens(made: Samples) -> None:
    form = Formatter.of(wordy(), byte_tokenizer())
    assert made.n_tokens == 3
    assert len(made.original) == len(made.completions) == 6
    assert len(set(made.original)) == 6
    for passage, completion in zip(made.original, made.completions, strict=True):
        assert passage in TEXTS
        assert completion.startswith(passage)
        text = form.encode(passage, completion[len(passage) :])
        assert len(text.target) == 3
        assert form.generate(wordy(), [text], 3) != [text.target], "the model gives it anyway"


def test_samples_that_read_back_as_other_tokens_are_dropped() -> None:
    form = Formatter.of(tiny("llama"), byte_tokenizer())
    made = sample(tiny("llama"), byte_tokenizer(), TEXTS, count=90, tokens=3)
    assert made.unfit > 50, "this model says any bytes"
    assert len(made.original) + made.unfit + made.predicted == 90
    for passage, completion in zip(made.original, made.completions, strict=True):
        assert len(form.encode(passage, completion[len(passage) :]).target) == 3


def test_samples_are_seeded_and_leave_the_global_generator_alone(made: Samples) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert again == made
    assert draw(seed=1) != made


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    model, form = tiny("gpt2"), Formatter.of(tiny("gpt2"), byte_tokenizer())
    prompt = form.encode(TEXTS[0], None)
    count, generator = 4000, torch.Generator().manual_seed(0)
    with sampling(model, generator):
        drawn = [tokens for _ in range(8) for tokens in form.generate(model, [prompt] * (count // 8), 1)]
    found = torch.zeros(model.config.vocab_size)
    for tokens in drawn:
        found[tokens[0] if tokens else byte_tokenizer().eos_token_id] += 1 / count
    with torch.no_grad():
        wanted = model(torch.tensor([prompt.prompt])).logits[0, -1].softmax(-1)
    assert (found - wanted).abs().sum() / 2 < 0.5 * (len(wanted) / count) ** 0.5  # total variation of 4,000 true draws is less
    assert wanted.max() < 0.9
    assert form.generate(model, [prompt], 1) == [(int(wanted.argmax()),)], "outside the block the model is greedy again"


def test_what_the_model_gives_anyway_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.fill_(1))  # no noise: samples are greedy
    with pytest.raises(InputError, match=r"none of 90 passages is left \(90 predicted, 0 unfit\)"):
        draw()


def test_only_causal_models_are_sampled() -> None:
    with pytest.raises(InputError, match="'encoder-decoder'"):
        sample(tiny("t5"), byte_tokenizer(), TEXTS, count=1)


def test_passages_are_different_and_32_words_long(tmp_path: Path) -> None:
    found = passages(FIXTURES / "text.txt")
    assert [len(text.split()) for text in found] == [32, 32]
    twice = tmp_path / "twice.txt"
    twice.write_text((FIXTURES / "text.txt").read_text() * 2)
    assert passages(twice) == found


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert stop.value.code == code, out + err
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "model"
    wordy().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "raw.txt"
    path.write_text("".join(f"{one} and {other} " + "walk by the river " * 8 + "\n" for one in NAMES for other in NAMES))
    return path


def test_what_the_builder_writes_is_read_by_the_task(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, common = tmp_path / "set.json", ("--model", model, "--text", text, "--count", 4, "--tokens", 3)
    shown, err = run(capsys, "data", "wikitext", *common, "--out", out, "--json")
    content = json.loads(shown)
    assert (content["count"], content["passages"]) == (4, 100)
    assert "sampling 4/4" in err
    whole = json.loads(out.read_text())
    assert list(whole) == ["n_tokens", "original", "completions"]
    assert whole["n_tokens"] == 3
    examples = load_edits(f"wikitext:{out}").examples
    assert [e.prompt + e.target for e in examples] == whole["completions"]
    assert "already exists" in run(capsys, "data", "wikitext", *common, "--out", out, code=2)[1]
    run(capsys, "data", "wikitext", *common, "--out", out, "--force")
    assert json.loads(out.read_text()) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "none.txt"}, "none.txt does not exist"),
        ({"--text": "short.txt"}, "holds no usable record"),
        ({"--text": str(FIXTURES / "nq.jsonl")}, "looks like the task 'nq'"),
        ({"--out": "folder/set.json"}, "folder folder does not exist"),
        ({"--out": "."}, "already exists"),
        ({"--model": "./nowhere/at/all"}, "does not exist"),
    ],
)
def test_bad_input_writes_nothing(
    change: dict[str, str], message: str, model: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short\n")
    before = sorted(tmp_path.rglob("*"))
    options: dict[str, Any] = {"--model": model, "--text": text, "--out": "set.json", **change}
    _, err = run(capsys, "data", "wikitext", *(word for pair in options.items() for word in pair), code=2)
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_describe_prints_counts_lengths_notes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    source = f"fever:{FIXTURES / 'fever-claims.jsonl'}"
    shown, _ = run(capsys, "data", "describe", source)
    for part in ("fever:fever-claims.jsonl", "sha256", "left out", "characters", "made by mendlm's templates", "example 3"):
        assert part in shown
    content = json.loads(run(capsys, "data", "describe", source, "--json")[0])
    assert (content["requests"], content["left_out"], len(content["examples"])) == (3, 1, 3)
    knowedit, _ = run(capsys, "data", "describe", f"knowedit:{FIXTURES / 'knowedit.json'}")
    assert "Subject_Aliasing" in knowedit
    assert "portability: 'The river in the home town of Ana Lund is' -> 'the Elk'" in knowedit


def test_describe_of_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "claims.jsonl"
    path.write_text('{"claim": "It is so.", "label": "SUPPORTS"}\n{"claim": "It is not so."}\n')
    _, err = run(capsys, "data", "describe", f"fever:{path}", code=2)
    assert err == f"error: {path}, record 2, field 'label': is missing (the record has the fields 'claim')\n"
    assert json.loads(run(capsys, "data", "describe", f"fever:{path}", "--skip-bad", "--json")[0])["skipped"] == 1
    _, err = run(capsys, "data", "describe", f"zsre:{FIXTURES / 'fever-claims.jsonl'}", code=2)
    assert "looks like the task 'fever'" in err


def test_describe_is_light() -> None:
    code = (
        "import sys; from mendlm.cli import main\n"
        f"try: main(['data', 'describe', 'nq:{FIXTURES / 'nq.jsonl'}'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_the_guide_shows_works(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / "fever-claims.jsonl", "claims.jsonl")
    text.rename("wikitext-2-a.txt")
    guide = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    (record,) = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    Path("own.jsonl").write_text(record)
    assert load_edits("records:own.jsonl").examples[0].portability
    blocks = "".join(re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)).replace("--model starter", f"--model {model}")
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    assert [command[:3] for command in commands] == [["mendlm", "data", kind] for kind in ("describe", "wikitext", "describe")]
    for command in commands:
        run(capsys, *command[1:])
    train, valid = load_edits("fever:claims.jsonl").split(0.1)
    assert len(train.examples) + len(valid.examples) == 3
