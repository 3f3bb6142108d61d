import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.errors import CheckpointError
from server.llm import LLM, SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.conversion.conversions import (
    from_megatron,
    make_pair,
    read_all,
    read_bytes,
    to_megatron,
    with_other_head,
)

HEAD = "mtp.layers.0.transformer_layer"


def serve(checkpoint: Path) -> tuple[list[list[int]], int, int]:
    """(token ids, accepted drafts, verify steps) of two prompts through the engine."""
    llm = LLM(model=str(checkpoint), mtp_step=2, speculation="fixed", dtype="float64", max_model_len=256, num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs = llm.generate(["How many apples?", "abc"], params)
    counts = (sum(output.num_accepted for output in outputs), sum(output.num_steps for output in outputs))
    return [output.token_ids for output in outputs], *counts


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merged_head_is_accepted_as_often_as_at_its_source(tmp_path: Path, shards: int) -> None:
    source = make_checkpoint(tmp_path / "source", num_layers=4, close_draft=True)
    other = with_other_head(source, tmp_path / "other", shards)
    trunk = {name: value for name, value in read_bytes(source).items() if not name.startswith("mtp.")}
    tokens, accepted, steps = serve(source)
    assert serve(other)[:2] == (tokens, 0) and accepted > 15
    to_megatron(source, tmp_path / "megatron", mtp_only=True)
    report = from_megatron(tmp_path / "megatron", other, None, mtp_only=True)
    assert "15 tensors of" in report.notes[0]
    assert serve(other) == (tokens, accepted, steps)
    after = read_bytes(other)
    assert {name: after[name] for name in trunk} == trunk and after == read_bytes(source)


def test_a_head_goes_into_a_directory_that_had_none(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path, prefix="vl", shards=2)
    before = read_all(base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file({name: t for name, t in before.items() if not name.startswith("mtp.")}, base / "model.safetensors")
    to_megatron(source, tmp_path / "megatron", mtp_only=True)
    from_megatron(tmp_path / "megatron", base, None, mtp_only=True)
    after, expected = read_all(base), read_all(source)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], (expected if "mtp." in name else before)[name]) for name in after)


def test_a_whole_checkpoint_gives_its_head_alone(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path, moe=True)
    to_megatron(source, tmp_path / "megatron", format="mp_rank", tensor_parallel=2)
    report = from_megatron(tmp_path / "megatron", base, tmp_path / "out", mtp_only=True)
    after, base_tensors, expected = (read_bytes(path) for path in (tmp_path / "out", base, source))
    assert all(after[name] == (expected if name.startswith("mtp.") else base_tensors)[name] for name in after)
    assert report.set_aside["of the trunk"] > 0


def test_a_directory_with_config_only_is_completed(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path, tied="no")
    (base / "model.safetensors").unlink()
    to_megatron(source, tmp_path / "megatron")
    from_megatron(tmp_path / "megatron", base, tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(source) and (tmp_path / "out" / "tokenizer.json").exists()


Edit = Callable[[dict[str, Tensor]], None]


def flat(tmp_path: Path, edit: Edit, **settings: object) -> tuple[Path, Path]:
    """A flat Megatron file with a mistake in it, and its base."""
    source, base = make_pair(tmp_path, **settings)
    to_megatron(source, tmp_path / "megatron", format="safetensors")
    tensors = read_all(tmp_path / "megatron")
    edit(tensors)
    save_file(tensors, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors", base


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{HEAD}.mlp.linear_fc2.weight"), rf"missing {HEAD}.mlp.linear_fc2.weight"),
        (lambda t: t.update({"mtp.layers.1.enorm.weight": torch.ones(64)}), "no rule for mtp.layers.1.enorm.weight"),
        (lambda t: t.update({"decoder.layers.4.x": torch.ones(2)}), "no rule for decoder.layers.4.x"),
        (
            lambda t: t.update({f"{HEAD}.mlp.linear_fc1.weight": torch.ones(96, 64)}),
            r"1 tensor-parallel ranks of \(96, 64\) do not make \(192, 64\)",
        ),
        (
            lambda t: t.update({"mtp.layers.0.eh_proj.weight": torch.ones(64, 128, dtype=torch.float8_e4m3fn)}),
            "quantised weights",
        ),
        (
            lambda t: t.update({"output_layer.weight": torch.ones(320, 64)}),
            "output_layer.weight differs from embedding",
        ),
    ],
)
def test_odd_weights_are_refused_by_name_and_nothing_is_written(tmp_path: Path, edit: Edit, message: str) -> None:
    source, base = flat(tmp_path, edit)
    before = read_bytes(base)
    there = set(tmp_path.iterdir())
    for out in (tmp_path / "out", None):
        with pytest.raises(CheckpointError, match=message):
            from_megatron(source, base, out)
        assert set(tmp_path.iterdir()) == there and read_bytes(base) == before


def test_a_tied_output_head_may_be_there_as_a_copy(tmp_path: Path) -> None:
    source, base = flat(
        tmp_path, lambda t: t.update({"output_layer.weight": t["embedding.word_embeddings.weight"] + 0})
    )
    from_megatron(source, base, tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "source")


def test_layers_that_share_one_fc_must_agree_on_it(tmp_path: Path) -> None:
    source, base = flat(tmp_path, lambda t: t["mtp.layers.1.eh_proj.weight"].add_(1), mtp_layers=2)
    with pytest.raises(CheckpointError, match=r"mtp.layers.1.eh_proj.weight differs from mtp.layers.0.eh_proj.weight"):
        from_megatron(source, base, tmp_path / "out", mtp_only=True)


def test_a_linear_attention_under_hugging_faces_names_is_read(tmp_path: Path) -> None:
    """As slime keeps it: also its norm, which is ones-based then whatever the others are."""

    def rename(tensors: dict[str, Tensor]) -> None:
        theirs = read_all(tmp_path / "source")
        for layer in range(3):
            stem = f"decoder.layers.{layer}.self_attention."
            for name in [name for name in tensors if name.startswith(stem) and "layer_norm" not in name]:
                del tensors[name]
            hf = f"model.layers.{layer}.linear_attn."
            named = {name.removeprefix(hf): tensor for name, tensor in theirs.items() if name.startswith(hf)}
            tensors |= {f"{stem}linear_attn.{name}": tensor for name, tensor in named.items()}

    source, base = flat(tmp_path, rename, dtype="bfloat16")
    from_megatron(source, base, tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "source")


def test_ranks_of_another_model_do_not_divide(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path)
    to_megatron(source, tmp_path / "megatron", format="mp_rank", tensor_parallel=2)
    shutil.rmtree(tmp_path / "megatron" / "release" / "mp_rank_01")
    with pytest.raises(CheckpointError, match=r"1 tensor-parallel ranks of .* do not make"):
        from_megatron(tmp_path / "megatron", base, tmp_path / "out")
    two = tmp_path / "megatron" / "release"
    for rank in (1, 2):
        shutil.copytree(two / "mp_rank_00", two / f"mp_rank_{rank:02d}")
    with pytest.raises(CheckpointError, match=r"3 tensor-parallel ranks of .* do not make"):
        from_megatron(tmp_path / "megatron", base, tmp_path / "out")


def test_an_out_inside_the_base_is_refused(tmp_path: Path) -> None:
    source, base = make_pair(tmp_path)
    with pytest.raises(CheckpointError, match="which is copied to it"):
        from_megatron(source, base, base / "new" / "out")


def test_a_base_without_a_head_takes_none(tmp_path: Path) -> None:
    source, _ = make_pair(tmp_path)
    base = make_checkpoint(tmp_path / "headless", num_layers=4, mtp_layers=0)
    to_megatron(source, tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="set mtp_num_hidden_layers"):
        from_megatron(tmp_path / "megatron", base, tmp_path / "out", mtp_only=True)
    with pytest.raises(CheckpointError, match=r"no rule for mtp\."):
        from_megatron(tmp_path / "megatron", base, tmp_path / "out")
