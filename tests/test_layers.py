import pytest
import torch
from torch import nn

import cases
from mendlm.errors import LayerError
from mendlm.layers import LayerSpec, block_of, block_stacks, default_layers, editable, register, select, spec_of

MLP = {
    "gpt2": ("transformer.h", ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neo": ("transformer.h", ["mlp.c_fc", "mlp.c_proj"]),
    "gptj": ("transformer.h", ["mlp.fc_in", "mlp.fc_out"]),
    "opt": ("model.decoder.layers", ["fc1", "fc2"]),
    "llama": ("model.layers", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "qwen3": ("model.layers", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "gemma3": ("model.layers", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "bert": ("bert.encoder.layer", ["intermediate.dense", "output.dense"]),
}
HEADS = ("lm_head", "shared", "embed", "wte", "wpe", "classifier", "pooler", "project")


def names(specs) -> list[str]:
    return [spec.name for spec in specs]


@pytest.mark.parametrize("case", MLP)
def test_defaults_are_the_mlp_matrices_of_the_last_three_blocks(case):
    stack, matrices = MLP[case]
    model = cases.tiny(case)
    assert list(block_stacks(model)) == [stack]
    assert names(default_layers(model)) == [f"{stack}.{i}.{m}" for i in (1, 2, 3) for m in matrices]


def test_defaults_of_encoder_decoders_are_the_last_two_blocks_of_each():
    bart = [f"model.{side}.layers.{i}.{m}" for side in ("encoder", "decoder") for i in (1, 2) for m in ("fc1", "fc2")]
    assert names(default_layers(cases.tiny("bart"))) == bart
    places = [f"{side}.block.{i}.layer.{k}" for side, k in (("encoder", 1), ("decoder", 2)) for i in (1, 2)]
    t5 = [f"{place}.DenseReluDense.{m}" for place in places for m in ("wi_0", "wo")]
    assert names(default_layers(cases.tiny("t5"))) == t5
    assert list(block_stacks(cases.tiny("t5"))) == ["encoder.block", "decoder.block"]


@pytest.mark.parametrize("case", cases.ALL)
def test_specs_read_the_layer_right_and_leave_heads_out(case):
    model = cases.tiny(case)
    offered = editable(model)
    linears = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert list(offered) == [name for name in linears if not name.split(".")[-1].startswith(HEADS) and "pooler" not in name]
    rng = cases.generator()
    for name, spec in offered.items():
        layer = model.get_submodule(name)
        x = torch.randn(2, spec.d_in, generator=rng)
        y = x @ spec.weight(layer).mT + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x), y)
        assert spec.weight(layer).shape == spec.shape
        assert spec.weight(layer).data_ptr() == layer.weight.data_ptr()


def test_conv1d_is_stored_transposed():
    layers = editable(cases.tiny("gpt2"))
    assert layers["transformer.h.0.mlp.c_fc"] == LayerSpec("transformer.h.0.mlp.c_fc", 24, 16, transposed=True)
    assert editable(cases.tiny("gpt_neo"))["transformer.h.0.mlp.c_fc"].transposed is False


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["model.layers.2.mlp.up_proj"], ["model.layers.2.mlp.up_proj"]),
        (["3.mlp.up_proj", "1.mlp.up_proj"], ["model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"]),
        (["down_proj"], [f"model.layers.{i}.mlp.down_proj" for i in range(4)]),
        (["model.layers.[0-1].self_attn.[qk]_proj"], [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qk"]),
        (["*.3.mlp.*", "up_proj"], [f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2)] + [
            f"model.layers.3.mlp.{m}_proj" for m in ("gate", "up", "down")]),
    ],
)  # fmt: skip
def test_select_by_name_suffix_and_pattern_in_model_order(patterns, found):
    assert names(select(cases.tiny("llama"), patterns)) == found


@pytest.mark.parametrize("pattern", ["own_proj", "proj", "lm_head", "layers.1", "*.embed_tokens"])
def test_select_finds_whole_names_only_and_no_head(pattern):
    with pytest.raises(LayerError, match="matches no editable layer"):
        select(cases.tiny("llama"), ["down_proj", pattern])


def test_an_unknown_pattern_is_answered_with_near_names():
    with pytest.raises(LayerError, match=r"'model.layers.2.mlp.downproj'.*near names: model\.layers\.2\.mlp\.down_proj"):
        select(cases.tiny("llama"), ["model.layers.2.mlp.downproj"])


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.config = type("Config", (), {"model_type": "unheard_of"})()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(2, 2)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.down = nn.Parameter(torch.zeros(2, 3, 3))


def test_nested_lists_belong_to_the_outer_stack():
    model = Blocks(Blocks(nn.Linear(2, 3)), Blocks(nn.Linear(2, 3)))
    assert list(block_stacks(model)) == ["blocks"]
    assert block_of("blocks.1.blocks.0", ["blocks"]) == ("blocks", 1)
    with pytest.raises(LayerError, match=r"'head' lies in no block.*: blocks"):
        block_of("head", ["blocks"])


def test_models_that_offer_nothing_say_why():
    with pytest.raises(LayerError, match=r"unheard_of.*choose layers by pattern"):
        default_layers(Blocks(nn.Linear(2, 2)))
    with pytest.raises(LayerError, match="3-d parameters"):
        select(Blocks(Expert()), ["*"])
    with pytest.raises(LayerError, match="no Linear or Conv1D"):
        select(Blocks(nn.LayerNorm(2)), ["*"])


def test_a_new_kind_of_layer_is_one_registered_function(monkeypatch):
    monkeypatch.setattr("mendlm.layers._READERS", {})
    bilinear = nn.Bilinear(2, 3, 4)
    assert spec_of("b", bilinear) is None
    register(nn.Bilinear)(lambda name, layer: LayerSpec(name, layer.out_features, layer.in1_features))
    assert spec_of("b", bilinear) == LayerSpec("b", 4, 2)
