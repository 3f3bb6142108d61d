"""config.json: every spelling that exists is read, and what cannot be served is refused by name."""

import json

import pytest

from models.config import MTP_COUNTS, SUPPORTED, load_config, parse_config
from models.errors import CheckpointError
from unit_tests.checkpoints import make_checkpoint, make_config


def refusal(outer) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_config(outer)
    return str(caught.value)


def changed(**changes):
    """A good text-only config with some fields replaced; None takes the field away."""
    config = make_config() | changes
    return {name: value for name, value in config.items() if value is not None}


@pytest.mark.parametrize("moe", [False, True])
def test_nested_and_flat_configs_mean_the_same(moe):
    assert parse_config(make_config(moe=moe, nested=True)) == parse_config(make_config(moe=moe, nested=False))


def test_sizes_are_read(tmp_path):
    config = load_config(make_checkpoint(tmp_path, moe=True, num_layers=8))
    assert (config.vocab_size, config.hidden_size, config.head_dim, config.rotary_dim) == (320, 64, 32, 8)
    assert (config.delta_key_dim, config.delta_value_dim, config.conv_channels) == (16, 24, 2 * 2 * 16 + 6 * 24)
    assert (config.num_full_layers, config.num_delta_layers, config.num_mtp_layers) == (2, 6, 1)
    assert (config.num_experts, config.experts_per_token, config.intermediate_size) == (8, 3, 0)
    assert config.is_moe


@pytest.mark.parametrize(
    ("outer_flag", "inner_flag", "expected"),
    [(True, None, True), (None, True, True), (None, None, False), (False, True, False), (True, False, True)],
)
def test_the_outer_tie_flag_rules_and_the_inner_one_stands_in(outer_flag, inner_flag, expected):
    config = make_config(nested=True, tied="no")
    config["tie_word_embeddings"] = outer_flag
    config["text_config"]["tie_word_embeddings"] = inner_flag
    assert parse_config(config).tie_word_embeddings is expected


def test_older_flat_rope_fields_are_read():
    config = parse_config(changed(rope_parameters=None, rope_theta=5e5, partial_rotary_factor=0.5))
    assert (config.rope_theta, config.rotary_dim) == (5e5, 16)


def test_the_rotary_part_is_a_quarter_when_nothing_says_otherwise():
    assert parse_config(changed(rope_parameters=None)).rotary_dim == 8


def test_layer_types_follow_the_interval_when_absent():
    config = parse_config(changed(layer_types=None))
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [3, 7]


@pytest.mark.parametrize("value", [0, None])
def test_a_checkpoint_may_have_no_mtp_layers(value):
    assert parse_config(changed(mtp_num_hidden_layers=value)).num_mtp_layers == 0


@pytest.mark.parametrize("names", [["Qwen3NextForCausalLM"], ["LlamaForCausalLM"], [], None, "GPT2LMHeadModel", [7]])
def test_another_family_is_refused_by_name_with_what_is_supported(names):
    message = refusal(changed(architectures=names))
    assert all(supported in message for supported in SUPPORTED)
    for name in [names] if isinstance(names, str) else names or []:
        assert str(name) in message


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "linear_num_key_heads",
        "linear_value_head_dim",
        "intermediate_size",
    ],
)
def test_a_missing_text_field_is_named(field):
    assert f"'{field}' is missing" in refusal(changed(**{field: None}))


def test_a_vision_config_without_text_fields_is_refused():
    config = make_config(nested=True)
    del config["text_config"]
    assert "the text field" in refusal(config)
    config["text_config"] = "qwen3_5_text"
    assert "text_config is a str" in refusal(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 0),
        ("hidden_size", -4),
        ("hidden_size", True),
        ("rms_norm_eps", "small"),
        ("rope_parameters", [1]),
        ("layer_types", ["linear_attention"]),
        ("layer_types", ["sliding_attention"] * 8),
        ("layer_types", 3),
        ("mtp_num_hidden_layers", "one"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("attn_output_gate", False),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(field, value):
    assert f"{field}" in refusal(changed(**{field: value}))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_key_value_heads": 4}, "6 attention heads do not divide into 4 kv heads"),
        ({"linear_num_key_heads": 4}, "6 linear value heads do not divide into 4 key heads"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "rotary dimension 3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(changes, part):
    assert part in refusal(changed(**changes))


def test_more_experts_per_token_than_experts_are_refused():
    assert "num_experts_per_tok is 9" in refusal(make_config(moe=True) | {"num_experts_per_tok": 9})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist: --model must be a Hugging Face checkpoint directory"),
        (b"{", "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[1]", "holds a list"),
    ],
)
def test_a_broken_config_file_is_named(content, part, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=part) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_file_written_by_transformers_is_read(tmp_path):
    import transformers

    config = make_config(moe=True, nested=True)
    transformers.Qwen3_5MoeConfig(**config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert parse_config(saved | {"architectures": config["architectures"]}) == parse_config(config)


@pytest.mark.parametrize("name", MTP_COUNTS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_name_of_the_number_of_mtp_layers_is_read_at_its_place(name, depth):
    config = make_config(nested=True)
    del config["text_config"]["mtp_num_hidden_layers"]
    assert parse_config(config).num_mtp_layers == 0
    config["text_config"][name] = depth
    assert parse_config(config).num_mtp_layers == depth


def test_names_of_that_number_that_contradict_each_other_are_refused_an_explicit_zero_included():
    config = make_config(mtp_layers=1)
    assert parse_config(config | {"num_nextn_predict_layers": 1, "mtp_num_layers": None}).num_mtp_layers == 1
    for other in (0, 2):
        with pytest.raises(CheckpointError, match=f"mtp_num_hidden_layers = 1, num_mtp_layers = {other} are names of"):
            parse_config(config | {"num_mtp_layers": other})
