"""Loading: every layout ends in the same parameters; every tensor that does not fit is an error that names it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import load_config
from models.errors import CheckpointError
from models.registry import build
from models.weights import (
    check_weights,
    export_tensors,
    fill_randomly,
    load_weights,
    normalise_name,
    save_weights,
)
from unit_tests.checkpoints import make_checkpoint, make_config, make_tensors, write_json

MAIN_FILE = "model.safetensors"
GATE = "model.layers.0.mlp.experts.2.gate_proj.weight"


def load(directory: Path, mtp: bool = True, dtype: torch.dtype = torch.float32, quantization: str = "none"):
    target, draft = build(load_config(directory), mtp, dtype, quantization=quantization)
    load_weights(directory, target, draft, show_progress=False)
    return target, draft


def parameters(models) -> list[torch.Tensor]:
    return [parameter.data for model in models if model is not None for parameter in model.parameters()]


def refusal(directory: Path, mtp: bool = True) -> str:
    """What loading says; looking at the headers alone must say the same."""
    with pytest.raises(CheckpointError) as caught:
        load(directory, mtp)
    with pytest.raises(CheckpointError) as checked:
        check_weights(directory, *build(load_config(directory), mtp, device="meta"))
    assert "\n" not in str(caught.value) and str(checked.value) == str(caught.value)
    return str(caught.value)


def rewrite(directory: Path, change) -> Path:
    """Apply `change` to the checkpoint's dictionary of tensors."""
    tensors = load_file(directory / MAIN_FILE)
    change(tensors)
    save_file(tensors, directory / MAIN_FILE)
    return directory


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["text", "vl", "language_model.model"])
@pytest.mark.parametrize("expert_layout", ["fused", "per_expert", "mixed"])
def test_every_layout_loads_to_the_same_parameters(expert_layout, prefix, shards, tmp_path):
    options = {"moe": True, "num_layers": 4}
    plain = load(make_checkpoint(tmp_path / "plain", **options))
    other = make_checkpoint(tmp_path / "other", expert_layout=expert_layout, prefix=prefix, shards=shards, **options)
    pairs = zip(parameters(plain), parameters(load(other)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_every_layout_is_quantized_to_the_same_numbers(quantization, tmp_path, monkeypatch):
    options = {"moe": True, "num_layers": 4, "tied": "no"}
    plain = load(make_checkpoint(tmp_path / "plain", **options), quantization=quantization)
    other = make_checkpoint(tmp_path / "other", expert_layout="mixed", prefix="vl", shards=3, **options)
    check_weights(other, *build(load_config(other), True, device="meta", quantization=quantization))
    monkeypatch.setattr("models.safetensors_file.BLOCK_BYTES", 3000)
    pairs = list(zip(parameters(plain), parameters(load(other, quantization=quantization)), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert any(ours.dtype == torch.uint8 for ours, _ in pairs)


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.01), ("int4", 0.12)])
def test_an_export_of_quantized_weights_is_what_is_left(quantization, error, tmp_path):
    target, draft = load(make_checkpoint(tmp_path, num_layers=4), quantization=quantization)
    original = load_file(tmp_path / MAIN_FILE)
    exported = export_tensors(target, draft)
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        limit = error if tensor.dim() == 2 else 0
        assert exported[name].shape == tensor.shape
        assert (exported[name] - tensor).norm() <= limit * tensor.norm(), name


def test_one_layer_may_mix_both_expert_layouts(tmp_path):
    directory = make_checkpoint(tmp_path, moe=True, num_layers=4)
    expected = parameters(load(directory))

    def split_down(tensors):
        fused = tensors.pop("model.layers.1.mlp.experts.down_proj")
        for expert, weight in enumerate(fused):
            tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = weight.contiguous()

    loaded = parameters(load(rewrite(directory, split_down)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded, expected, strict=True))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
def test_every_float_type_loads_into_every_other(stored, tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4, dtype=stored)
    raw = make_tensors(make_config(num_layers=4, dtype=stored))
    target, _ = load(directory, dtype=torch.bfloat16)
    assert torch.equal(target.embed_tokens.weight, raw["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(target.norm.scale, raw["model.norm.weight"].float() + 1)
    decay = target.layers[0].mixer.A_log
    assert decay.dtype == torch.float32
    assert torch.equal(decay, raw["model.layers.0.linear_attn.A_log"].float())


@pytest.mark.parametrize("options", [{}, {"moe": True, "expert_layout": "mixed"}, {"shards": 3, "prefix": "vl"}])
def test_headers_alone_tell_that_a_checkpoint_can_be_loaded(options, tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4, **options)
    num_tensors = check_weights(directory, *build(load_config(directory), True, device="meta"))
    assert num_tensors == sum(len(load_file(file)) for file in directory.glob("*.safetensors"))


def test_loading_again_updates_in_place(tmp_path):
    first = make_checkpoint(tmp_path / "first", num_layers=4)
    second = make_checkpoint(tmp_path / "second", num_layers=4, seed=1)
    models = load(first)
    pointers = [parameter.data_ptr() for parameter in parameters(models)]
    before = [parameter.clone() for parameter in parameters(models)]
    load_weights(second, *models, show_progress=False)
    assert [parameter.data_ptr() for parameter in parameters(models)] == pointers
    pairs = list(zip(parameters(models), parameters(load(second)), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not any(torch.equal(old, new) for old, new in zip(before, parameters(models), strict=True))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tied", ["outer", "no"])
def test_exported_tensors_load_to_the_same_model(tied, moe, tmp_path):
    directory = make_checkpoint(tmp_path, moe=moe, tied=tied, num_layers=4, dtype="bfloat16")
    models = load(directory)
    exported = export_tensors(*models)
    raw = make_tensors(make_config(moe=moe, tied=tied, num_layers=4, dtype="bfloat16"))
    assert exported.keys() == raw.keys()
    assert all(torch.equal(exported[name], raw[name].float()) for name in raw)
    save_weights(directory / MAIN_FILE, exported)
    pairs = zip(parameters(models), parameters(load(directory)), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_vision_tensors_are_skipped_with_one_log_line(tmp_path, caplog):
    directory = make_checkpoint(tmp_path, prefix="vl", vision=True, num_layers=4)
    with caplog.at_level(logging.INFO, logger="models"):
        load(directory)
    assert [record.getMessage() for record in caplog.records] == ["skipped 3 vision tensors"]


def test_the_draft_is_skipped_when_it_is_not_wanted(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="models"):
        load(make_checkpoint(tmp_path, num_layers=4), mtp=False)
    assert [record.getMessage() for record in caplog.records] == ["skipped 15 draft head (mtp.*) tensors"]


def test_a_tied_checkpoint_may_still_carry_its_head(tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 3

    target, _ = load(rewrite(directory, add_head))
    assert target.lm_head.weight is target.embed_tokens.weight
    assert torch.equal(target.embed_tokens.weight, make_tensors(make_config())["model.embed_tokens.weight"])


def test_drafting_without_a_draft_head_says_mtp_step_0(tmp_path):
    directory = make_checkpoint(tmp_path, mtp_layers=0, num_layers=4)
    assert "has no mtp.fc.weight" in refusal(directory)
    assert "--mtp-step 0" in refusal(directory)
    load(directory, mtp=False)


def test_a_config_that_promises_a_draft_head_is_not_believed(tmp_path):
    directory = rewrite(make_checkpoint(tmp_path, num_layers=4), lambda tensors: tensors.pop("mtp.fc.weight"))
    assert "--mtp-step 0" in refusal(directory)


def test_a_draft_head_that_the_config_hides_is_found(tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    write_json(directory / "config.json", make_config(num_layers=4) | {"mtp_num_hidden_layers": 0})
    assert load(directory)[1] is not None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model.norm.weight", {}),
        ("model.layers.2.linear_attn.A_log", {}),
        ("model.layers.3.self_attn.k_proj.weight", {}),
        ("mtp.layers.0.mlp.up_proj.weight", {}),
        ("lm_head.weight", {"tied": "no"}),
        ("model.layers.0.mlp.experts.gate_up_proj", {"moe": True}),
        ("model.layers.3.mlp.shared_expert_gate.weight", {"moe": True}),
        (GATE, {"moe": True, "expert_layout": "per_expert"}),
    ],
)
def test_a_missing_tensor_is_named(name, options, tmp_path):
    directory = rewrite(make_checkpoint(tmp_path, num_layers=4, **options), lambda tensors: tensors.pop(name))
    assert refusal(directory) == f"the checkpoint lacks {name}"


def test_many_missing_tensors_are_counted(tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    message = refusal(rewrite(directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".mlp." in n]))
    assert message.count("mlp") == 8
    assert message.endswith("and 7 more")


@pytest.mark.parametrize(
    "name", ["model.layers.4.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "mtp.layers.1.x", "decoder.w"]
)
def test_an_unexpected_tensor_is_named(name, tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    message = refusal(rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(2, 3)})))
    assert message.startswith(f"unexpected tensor {name} [2, 3]")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.linear_attn.conv1d.weight", "mtp.norm.weight"]
)
def test_a_misshapen_tensor_is_named_with_both_shapes(name, tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    shape = list(load_file(directory / MAIN_FILE)[name].shape)
    wrong = [shape[0] + 1, *shape[1:]]
    message = refusal(rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(wrong)})))
    assert message == f"tensor {name} has shape {wrong}, config.json asks for {shape}"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_that_is_not_a_plain_float_is_named(dtype, tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"tensor {name} is " in refusal(
        rewrite(directory, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    )


def test_a_tensor_under_two_spellings_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    twin = "model.language_model.norm.weight"
    message = refusal(rewrite(directory, lambda tensors: tensors.update({twin: tensors["model.norm.weight"].clone()})))
    assert "norm.weight is in the checkpoint twice" in message


def test_fused_and_separate_experts_of_one_layer_are_an_overlap(tmp_path):
    directory = make_checkpoint(tmp_path, moe=True, num_layers=4)
    message = refusal(rewrite(directory, lambda tensors: tensors.update({GATE: torch.zeros(24, 64)})))
    assert "overlap" in message
    assert GATE in message


def test_a_missing_shard_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, shards=3, num_layers=4)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is named by model.safetensors.index.json but missing" in refusal(directory)


def test_a_truncated_shard_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, shards=2, num_layers=4)
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} is not a complete safetensors file" in refusal(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_a_nonsense_index_is_named(index, tmp_path):
    directory = make_checkpoint(tmp_path, shards=2, num_layers=4)
    write_json(directory / "model.safetensors.index.json", index)
    assert "model.safetensors.index.json has no weight_map" in refusal(directory)


def test_a_directory_without_weights_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, num_layers=4)
    (directory / MAIN_FILE).unlink()
    assert f"{directory} has no *.safetensors file" in refusal(directory)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.layers.0.x", "model.layers.0.x"),
        ("model.language_model.layers.0.x", "model.layers.0.x"),
        ("language_model.model.layers.0.x", "model.layers.0.x"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("mtp.fc.weight", "mtp.fc.weight"),
        ("model.visual.blocks.0.x", "model.visual.blocks.0.x"),
    ],
)
def test_names_are_normalised_to_the_text_only_spelling(stored, name):
    assert normalise_name(stored) == name


def test_progress_is_shown_on_standard_error(tmp_path, capfd):
    directory = make_checkpoint(tmp_path, num_layers=4)
    target, draft = build(load_config(directory), mtp=True)
    load_weights(directory, target, draft)
    assert "Loading weights: 100%" in capfd.readouterr().err


MEASURE = """
import sys, torch
from models.config import load_config
from models.registry import build
from models.weights import load_weights

def peak_bytes():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

config = load_config(sys.argv[1])
before = peak_bytes()
target, _ = build(config, mtp=False, dtype=torch.float32)
load_weights(sys.argv[1], target, None, show_progress=False)
print(peak_bytes() - before, sum(parameter.nbytes for parameter in target.parameters()))
"""


def measure_loading(directory: Path, num_bytes: int) -> tuple[int, int]:
    """(bytes by which a fresh process grew at its peak, bytes of the model) for one file of about num_bytes."""
    vocab_size = num_bytes // (2 * 64 * 4)
    config = make_config(tied="no", mtp_layers=0, num_layers=4)
    tensors = make_tensors(config) | dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"))
    header, end = {}, 0
    for name, tensor in tensors.items():
        shape = [vocab_size, 64] if tensor is None else list(tensor.shape)
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    write_json(directory / "config.json", config | {"vocab_size": vocab_size})
    with (directory / MAIN_FILE).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)  # zeros that take no disk
    command = [sys.executable, "-c", MEASURE, str(directory)]
    grown, weights = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(grown), int(weights)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux' /proc")
def test_peak_memory_of_loading_is_the_weights_and_one_block(tmp_path):
    grown, weights = measure_loading(tmp_path, 600 << 20)
    assert weights >= 600 << 20
    assert grown < weights + (160 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux' /proc")
def test_peak_memory_of_one_big_file_stays_under_weights_and_one_gib(tmp_path):
    grown, weights = measure_loading(tmp_path, 5 << 29)
    assert weights >= 5 << 29
    assert grown < weights + (1 << 30)


@pytest.mark.parametrize("moe", [False, True])
def test_random_weights_fill_every_parameter_and_give_ordinary_numbers(tmp_path: Path, moe: bool) -> None:
    target, draft = build(load_config(make_checkpoint(tmp_path, moe=moe)), mtp=True, dtype=torch.float32)
    for parameter in parameters((target, draft)):
        parameter.fill_(torch.nan)
    fill_randomly(target, draft)
    assert all(parameter.isfinite().all() for parameter in parameters((target, draft)))
    hidden = target.forward_sequence(torch.arange(20)[None])
    assert hidden.isfinite().all() and 0.1 < float(hidden.detach().std()) < 10
    before = [parameter.clone() for parameter in parameters((target, draft))]
    fill_randomly(target, draft)
    assert all(torch.equal(*pair) for pair in zip(before, parameters((target, draft)), strict=True))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_random_quantized_weights_give_ordinary_numbers(tmp_path: Path, quantization: str) -> None:
    target, draft = build(load_config(make_checkpoint(tmp_path)), mtp=True, quantization=quantization)
    fill_randomly(target, draft)
    with torch.inference_mode():
        hidden = target.forward_sequence(torch.arange(20)[None])
    assert hidden.isfinite().all() and 0.1 < float(hidden.std()) < 10
    before = [parameter.clone() for parameter in parameters((target, draft))]
    fill_randomly(target, draft)
    assert all(torch.equal(*pair) for pair in zip(before, parameters((target, draft)), strict=True))
