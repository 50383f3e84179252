"""Every architecture in the table of default layers has every property of an edit, by MLP and by attention matrices."""

import copy
import re

import pytest
import torch
from torch.testing import assert_close

import cases
import oracles
from mendlm.apply import Edit, applied
from mendlm.errors import LayerError
from mendlm.layers import MLP_MATRICES, block_stacks, default_layers, editable, select
from mendlm.losses import token_nll
from mendlm.methods.mend import Mend, MendConfig
from mendlm.recording import record
from mendlm.replay import Trunk
from mendlm.text import Formatter, scored_logits
from test_text import greedy

ATTENTION = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "modernbert"), "attn.*"),
    **dict.fromkeys(("gpt_neox", "bert", "roberta", "distilbert"), "attention.*"),
    **dict.fromkeys(("t5", "mt5"), "*Attention.*"),
    **dict.fromkeys(("bart", "mbart"), "*_attn.*"),
    "gemma3": "language_model.*.self_attn.*",
}
MLP = {
    "gpt2": ("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neo": ("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_in", "mlp.fc_out"),
    "opt": ("model.decoder.layers", "fc1", "fc2"),
    "phi": ("model.layers", "mlp.fc1", "mlp.fc2"),
    "phi3": ("model.layers", "mlp.gate_up_proj", "mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gemma3": ("model.language_model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "bert": ("bert.encoder.layer", "intermediate.dense", "output.dense"),
    "roberta": ("roberta.encoder.layer", "intermediate.dense", "output.dense"),
    "distilbert": ("distilbert.transformer.layer", "ffn.lin1", "ffn.lin2"),
    "modernbert": ("model.layers", "mlp.Wi", "mlp.Wo"),
}
GATED = ("model.layers", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
each_case = pytest.mark.parametrize("case", cases.EVERY)
each_choice = pytest.mark.parametrize("choice", ["mlp", "attention"])


def chosen(model, choice):
    if choice == "mlp":
        return default_layers(model)
    return select(model, [ATTENTION.get(model.config.model_type, "self_attn.*")])


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def test_every_architecture_of_the_table_is_tested():
    assert {cases.tiny(case).config.model_type for case in cases.EVERY} == set(MLP_MATRICES)


@pytest.mark.parametrize(("case", "tied"), [("t5 v1.0", True), ("t5", True), ("t5 v1.1", False), ("mt5", False)])
def test_t5_is_tested_with_a_head_of_its_own_and_with_a_tied_one(case, tied):
    model = cases.tiny(case)
    assert (model.lm_head.weight is model.shared.weight) == tied


@each_case
def test_the_default_is_the_papers_choice(case):
    model = cases.tiny(case)
    found = [spec.name for spec in default_layers(model)]
    if not model.config.is_encoder_decoder:
        stack, *matrices = MLP.get(model.config.model_type, GATED)
        assert found == [f"{stack}.{i}.{matrix}" for i in (1, 2, 3) for matrix in matrices]
    elif "bart" in case:
        assert found == [f"model.{s}.layers.{i}.{m}" for s in ("encoder", "decoder") for i in (1, 2) for m in ("fc1", "fc2")]
    else:
        places = [f"{side}.block.{i}.layer.{k}" for side, k in (("encoder", 1), ("decoder", 2)) for i in (1, 2)]
        assert found == [f"{p}.DenseReluDense.{m}" for p in places for m in ("wi" if case == "t5 v1.0" else "wi_0", "wo")]


@each_case
def test_one_pattern_selects_all_attention_matrices(case):
    model = cases.tiny(case)
    named = [n for n in editable(model) if "att" in n.lower() and "vision" not in n]
    assert [spec.name for spec in chosen(model, "attention")] == named
    assert len(named) >= sum(map(len, block_stacks(model).values())) - 2 * ("vision" in case)


@each_choice
@each_case
def test_each_recorded_gradient_is_autograds_of_that_example_alone(case, choice):
    model = cases.tiny(case)
    specs, batch = chosen(model, choice), cases.requests(model)
    with record(model, specs) as recording:
        loss = token_nll(scored_logits(model, batch), batch.label, batch.row, batch.size).sum()
    gradient = recording.gradient(loss, batch.size)
    for index in range(batch.size):
        expected = oracles.weight_gradients(model, specs, oracles.nll, oracles.alone(batch, index))
        for name, exact in expected.items():
            assert_close(gradient[name][index].dense(), exact, rtol=1e-3, atol=1e-5)
    assert sum(rows.delta.any().item() for rows in gradient.values()) == len(specs)


@each_choice
@each_case
def test_a_batch_of_edits_as_overlay_is_each_in_dense_weights_alone(case, choice):
    model = cases.tiny(case)
    specs, inputs = chosen(model, choice), cases.inputs(model)
    edits = oracles.random_edit(specs, cases.generator(1), 3, size=0.1)
    before = logits(model, inputs)
    with edits.on(model):
        together = logits(model, inputs)
    for index in range(3):
        single = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        expected = oracles.run_dense(model, specs, oracles.dense(edits[index]), single)
        assert_close(together[index : index + 1], expected, rtol=1e-3, atol=1e-4)
        assert (expected - before[index]).abs().max() > 1e-3
    assert torch.equal(logits(model, inputs), before)


@each_case
def test_replay_is_bit_equal_and_keeps_off_a_decoder_above_an_edited_encoder(case):
    model = cases.tiny(case)
    inputs, defaults = cases.inputs(model), default_layers(model)
    choices = {"all": defaults}
    if model.config.is_encoder_decoder:
        choices["decoder"] = [spec for spec in defaults if "decoder" in spec.name]
    for which, specs in choices.items():
        trunk = Trunk.below(model, specs)
        names = {module: name for name, module in model.named_modules()}
        replayed = [names[block] for group in trunk.groups for block in group]
        stacks = [
            f"{name}.{i}" for name, blocks in block_stacks(model).items() for i in range(len(blocks)) if "vision" not in name
        ]
        # all of an unedited encoder, and the one block below the edited ones of the first edited stack
        assert replayed == (stacks[:1] if which == "all" else stacks[:4])
        tape = trunk.run(model, inputs)
        with applied(model, oracles.random_edit(specs, cases.generator(1))):
            full = logits(model, inputs)
            with trunk.replay(tape):
                assert torch.equal(logits(model, inputs), full)
        assert not torch.equal(full, logits(model, inputs))


@each_case
def test_an_edit_step_lowers_each_loss(case):
    model = copy.deepcopy(cases.tiny(case)).double()
    batch = cases.requests(model)
    editor = Mend(default_layers(model), MendConfig(rank=3, normalize=False, initial_rate=1e-3)).double()
    edits = editor.edit(model, batch)
    for index in range(batch.size):
        single = oracles.alone(batch, index)
        before = oracles.nll(model, single)
        with applied(model, edits[index]):
            assert oracles.nll(model, single) < before


@each_case
def test_an_adapter_round_trips_and_peft_agrees(case, tmp_path):
    peft = pytest.importorskip("peft")
    model = cases.tiny(case)
    edit, inputs = oracles.random_edit(default_layers(model), cases.generator(1), size=0.1), cases.inputs(model)
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    for name, update in edit.updates.items():
        assert torch.equal(loaded.updates[name].u, update.u)
        assert torch.equal(loaded.updates[name].delta, update.delta)
    with applied(model, loaded):
        expected = logits(model, inputs)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "edit").eval()
    assert_close(logits(adapted, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(expected, logits(model, inputs))


@pytest.mark.parametrize("case", [case for case in cases.MORE if cases.tiny(case).get_output_embeddings() is not None])
def test_batched_greedy_answers_under_edits_are_those_of_a_full_forward_a_token(case):
    model = cases.tiny(case)
    form = Formatter.of(model, cases.byte_tokenizer())
    prompts = [form.encode(text, None) for text in ("The capital of France is", "a", "x<|end|>y Who?")]
    edits = oracles.random_edit(default_layers(model), cases.generator(2), 3, size=0.1)
    with applied(model, edits):
        found = form.generate(model, prompts, 5)
    for index, prompt in enumerate(prompts):
        with applied(model, edits[index]):
            assert found[index] == greedy(model, form, prompt, 5, cases.END)
    assert any(found)


def test_experts_are_refused_with_the_reason():
    model = cases.mixture()
    with pytest.raises(LayerError, match=r"'mixtral'.*3-d parameters, not layers.*layers\.0\.mlp\.experts\.") as refused:
        default_layers(model)
    (pattern,) = re.findall(r"layers=\['(.*?)'\]", str(refused.value))
    assert len(select(model, [pattern])) == 2
    with pytest.raises(LayerError, match=r"'mlp\.experts\.\*' matches no editable layer.*3-d parameters, not layers"):
        select(model, ["mlp.experts.*"])
    assert len(select(model, ["self_attn.q_proj"])) == 2
