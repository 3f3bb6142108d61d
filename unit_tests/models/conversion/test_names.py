import pytest
import torch

from models.conversion.lazy_tensor import LazyTensor, from_tensor
from models.conversion.names import Place, Style, assemble, canonicalise, cut, why_no_weight
from models.conversion.rules import Rule, Same
from models.errors import CheckpointError

LAYER = "mtp.layers.0.transformer_layer"
FC1 = "decoder.layers.3.mlp.experts.linear_fc1.weight"


@pytest.mark.parametrize(
    ("raw", "name", "steps"),
    [
        (
            "module.language_model.mtp.layers.0.mtp_model_layer.mlp.linear_fc2.weight",
            f"{LAYER}.mlp.linear_fc2.weight",
            (),
        ),
        (f"{LAYER}.self_attention.linear_qkv.layer_norm_weight", f"{LAYER}.input_layernorm.weight", ()),
        ("decoder.layers.1.self_attention.in_proj.layer_norm_weight", "decoder.layers.1.input_layernorm.weight", ()),
        (f"{LAYER}.mlp.linear_fc1.layer_norm_weight", f"{LAYER}.pre_mlp_layernorm.weight", ()),
        ("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", FC1, ()),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight7", FC1, (("stack", 7),)),
        ("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight", FC1, (("stack", 7),)),
        ("decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_v", FC1, (("stack", 7), ("concat", 1))),
        (f"{LAYER}.mlp.linear_fc1.weight_w", f"{LAYER}.mlp.linear_fc1.weight", (("concat", 0),)),
        ("a.self_attention.in_proj.weight.alpha", "a.self_attention.in_proj.weight", (("concat", 5),)),
        ("a.self_attention.conv1d.weight.key", "a.self_attention.conv1d.weight", (("concat", 1),)),
        ("a.self_attention.linear_attn.in_proj_z.weight", "a.self_attention.in_proj.weight", (("concat", 1),)),
        ("a.self_attention.linear_attn.A_log", "a.self_attention.A_log", ()),
        ("a.self_attention.input_layernorm.weight", "a.input_layernorm.weight", ()),
        ("a.self_attention.linear_attn.norm.weight", "a.self_attention.linear_attn.norm.weight", ()),
    ],
)
def test_every_spelling_is_known(raw: str, name: str, steps: tuple[tuple[str, int], ...]) -> None:
    assert canonicalise(raw) == Place(name, steps)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("decoder.layers.0.mlp.linear_fc1._extra_state", "extra state"),
        ("optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight", "optimizer and trainer state"),
        ("vision_model.patch_embed.weight", "vision"),
        ("module.decoder.layers.0.mlp.linear_fc1.weight", None),
    ],
)
def test_what_is_no_weight_has_a_reason(raw: str, reason: str | None) -> None:
    assert why_no_weight(raw) == reason


def lazy(**tensors: torch.Tensor) -> dict[str, LazyTensor]:
    return {name: from_tensor(name, tensor) for name, tensor in tensors.items()}


def test_parts_are_put_together_in_their_order() -> None:
    halves = {
        f"a.mlp.experts.experts.{i}.linear_fc1.weight_{h}": torch.full((1, 2), 2.0 * i + (h == "v"))
        for i in (1, 0)
        for h in "vw"
    }
    found = assemble(lazy(**halves))
    assert list(found) == ["a.mlp.experts.linear_fc1.weight"]
    assert found["a.mlp.experts.linear_fc1.weight"].load()[..., 0].tolist() == [[0, 1], [2, 3]]


def test_stacked_trunk_layers_come_apart() -> None:
    found = assemble(lazy(**{"decoder.layers.mlp.linear_fc2.weight": torch.arange(6.0).view(3, 2, 1)}))
    assert found["decoder.layers.2.mlp.linear_fc2.weight"].load().tolist() == [[4], [5]] and len(found) == 3


def test_a_missing_or_doubled_part_is_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"not complete: of its parts there are number \[0, 2\]"):
        assemble(lazy(**{f"a.mlp.experts.linear_fc2.weight{i}": one for i in (0, 2)}))
    names = (f"{LAYER}.input_layernorm.weight", "mtp.layers.0.mtp_model_layer.input_layernorm.weight")
    with pytest.raises(CheckpointError, match="more than once"):
        assemble(lazy(**dict.fromkeys(names, one)))


def make_rule(name: str, **fields: object) -> Rule:
    return Rule(megatron=name, shape=(4, 2), hf=("x",), hf_shapes=((4, 2),), layout=Same(), **fields)


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("layer_spec", ["te", "local"])
@pytest.mark.parametrize("block", ["transformer_layer", "mtp_model_layer"])
def test_what_is_written_is_read_back(on_disk: bool, layer_spec: str, block: str) -> None:
    style = Style(on_disk=on_disk, layer_spec=layer_spec, block=block, prefix="language_model.")
    norm = make_rule(f"{LAYER}.pre_mlp_layernorm.weight", fused_name=f"{LAYER}.mlp.linear_fc1.layer_norm_weight")
    experts = make_rule(f"{LAYER}.mlp.experts.linear_fc1.weight", is_experts=True)
    delta = make_rule("decoder.layers.0.self_attention.in_proj.weight", sections=(("query", 1), ("key", 3)))
    whole = torch.arange(8.0).view(4, 2)
    for rule in (norm, experts, delta):
        raw = cut(rule, rule.megatron, whole, style)
        assert all(name.startswith("language_model.") for name in raw)
        assert all((block in name) == (rule is not delta) for name in raw)
        assert torch.equal(assemble(lazy(**raw))[rule.megatron].load(), whole)


def test_names_follow_the_layer_spec() -> None:
    norm = make_rule("a.pre_mlp_layernorm.weight", fused_name="a.mlp.linear_fc1.layer_norm_weight", te_fuses=False)
    one = torch.zeros(1)
    names = {
        (disk, spec): next(iter(cut(norm, norm.megatron, one, Style(on_disk=disk, layer_spec=spec))))
        for disk in (True, False)
        for spec in ("te", "local")
    }
    fused = [key for key, name in names.items() if name == norm.fused_name]
    assert fused == [(True, "local")]
