"""Checkpoints that NVIDIA's megatron-core 0.16.1 wrote (fixtures/write_fixture.py), and what it computed with them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.conversion import from_megatron, layouts, to_megatron
from models.conversion.megatron_directory import open_megatron
from models.conversion.names import assemble
from models.conversion.rules import Rule, list_rules
from unit_tests.models.conversion import conversions
from unit_tests.models.conversion.conversions import FIXTURES, check_forward, convert_fixture, read_bytes

NAMES = ("dense", "moe")


def test_the_fixtures_are_small() -> None:
    assert sum(file.stat().st_size for file in FIXTURES.rglob("*") if file.is_file()) < 800_000


@pytest.mark.parametrize("name", NAMES)
def test_our_forward_pass_is_megatrons_own(tmp_path: Path, name: str) -> None:
    check_forward(name, convert_fixture(name, "torch_dist", tmp_path / "back"))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_that_megatron_cut_make_the_same_weights(tmp_path: Path, name: str) -> None:
    whole = convert_fixture(name, "torch_dist", tmp_path / "whole")
    merged = convert_fixture(name, "mp_rank", tmp_path / "merged")
    assert read_bytes(merged) == read_bytes(whole)


@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_has_the_names_and_bytes_that_megatron_wrote(tmp_path: Path, name: str) -> None:
    back = convert_fixture(name, "torch_dist", tmp_path / "back")
    check_disk(name, back, tmp_path / "megatron")
    settings = {"norms": "ones", "layer_spec": "local", "format": "mp_rank", "tensor_parallel": 2}
    conversions.to_megatron(back, tmp_path / "ranks", **settings)
    ours, theirs = (open_megatron(path).ranks for path in (tmp_path / "ranks", FIXTURES / name / "mp_rank"))
    for our_rank, their_rank in zip(ours, theirs, strict=True):
        assert set(our_rank) == set(their_rank)
        assert all(equal(our_rank[key].load(), their_rank[key].load()) for key in their_rank)


def check_disk(name: str, directory: Path, out: Path) -> None:
    """Our torch_dist of a converted fixture against megatron-core's."""
    conversions.to_megatron(directory, out, norms="ones", layer_spec="local")
    (ours,), (theirs,) = (open_megatron(path).ranks for path in (out, FIXTURES / name / "torch_dist"))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert equal(ours[key].load(), tensor.load()), key


def equal(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit; a norm whose 1 + w was moved by 1 and back may have become wider."""
    return torch.equal(ours.to(theirs.dtype), theirs)


def test_trunk_and_head_convert_apart(tmp_path: Path) -> None:
    whole = convert_fixture("dense", "torch_dist", tmp_path / "whole")
    other = conversions.with_other_head(whole, tmp_path / "other")
    with pytest.raises(AssertionError, match="MTP head"):
        check_forward("dense", other)
    source = FIXTURES / "dense" / "mp_rank"
    report = conversions.from_megatron(source, other, None, mtp_only=True, norms="ones")
    assert report.set_aside["of the trunk"] > 0
    check_forward("dense", other)
    assert read_bytes(other) == read_bytes(whole)


# A mutation is applied to one direction at a time: a mistake made in both would cancel out in a round trip.


def reverse_pair(parts: Sequence[Tensor]) -> list[Tensor]:
    return list(reversed(parts)) if len(parts) == 2 else list(parts)


def naive_join(q: Tensor, k: Tensor, v: Tensor, *_: int) -> Tensor:
    return torch.cat([q, k, v])


def naive_split(qkv: Tensor, num_groups: int, head_dim: int) -> list[Tensor]:
    keys = num_groups * head_dim
    return [part.contiguous() for part in qkv.split([len(qkv) - 2 * keys, keys, keys])]


def ungrouped_gates_join(q: Tensor, k: Tensor, v: Tensor, num_groups: int, head_dim: int) -> Tensor:
    """Each head's gate beside its query, as in Hugging Face's rows, but keys and values by group."""
    parts = [part.unflatten(0, (num_groups, -1)) for part in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def ungrouped_gates_split(qkv: Tensor, num_groups: int, head_dim: int) -> list[Tensor]:
    groups = qkv.unflatten(0, (num_groups, -1))
    sizes = [groups.shape[1] - 2 * head_dim, head_dim, head_dim]
    return [part.flatten(0, 1).contiguous() for part in groups.split(sizes, dim=1)]


@dataclasses.dataclass(frozen=True)
class SwappedColumns:
    """[hidden, embedding] instead of [embedding, hidden]."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(parts[0].chunk(2, 1)[::-1], 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        return [self.join([whole])]


def rules_with_swapped_concat(*arguments: object) -> list[Rule]:
    rules = list_rules(*arguments)
    assert any("eh_proj" in rule.megatron for rule in rules)
    return [
        dataclasses.replace(rule, layout=SwappedColumns()) if "eh_proj" in rule.megatron else rule for rule in rules
    ]


JOIN_ROWS, SPLIT_ROWS = layouts.join_rows, layouts.split_rows
Patch = tuple[object, str, Callable[..., object]]
MUTATIONS: dict[str, tuple[Patch, Patch]] = {
    "swapped concat": (
        (from_megatron, "list_rules", rules_with_swapped_concat),
        (to_megatron, "list_rules", rules_with_swapped_concat),
    ),
    "naive QKV": ((layouts, "split_qkv", naive_split), (layouts, "join_qkv", naive_join)),
    "gates not grouped": (
        (layouts, "split_qkv", ungrouped_gates_split),
        (layouts, "join_qkv", ungrouped_gates_join),
    ),
    "swapped gate and up": (
        (layouts, "split_rows", lambda *arguments: reverse_pair(SPLIT_ROWS(*arguments))),
        (layouts, "join_rows", lambda parts: JOIN_ROWS(reverse_pair(parts))),
    ),
    "norm not moved": (
        (layouts, "unshift", lambda weight, by, dtype: weight.to(dtype)),
        (layouts, "shift", lambda weight, by: weight.clone()),
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_mcore2hf_changes_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str, name: str
) -> None:
    monkeypatch.setattr(*MUTATIONS[mutation][0])
    mutated = convert_fixture(name, "torch_dist", tmp_path / "back")
    with pytest.raises(AssertionError, match="MTP head" if mutation == "swapped concat" else "trunk"):
        check_forward(name, mutated)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_hf2mcore_changes_what_megatron_would_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str, name: str
) -> None:
    back = convert_fixture(name, "torch_dist", tmp_path / "back")
    monkeypatch.setattr(*MUTATIONS[mutation][1])
    wrong = {"swapped concat": "eh_proj", "swapped gate and up": "linear_fc1", "norm not moved": "norm"}
    with pytest.raises(AssertionError, match=wrong.get(mutation, "linear_qkv")):
        check_disk(name, back, tmp_path / "megatron")


def test_tensor_parallel_shards_merged_block_by_block_only() -> None:
    """The rows of a rank's gate and up are apart from the other rank's: plain concatenation has the same shape."""
    ranks = [assemble(rank) for rank in open_megatron(FIXTURES / "dense" / "mp_rank").ranks]
    whole = assemble(open_megatron(FIXTURES / "dense" / "torch_dist").ranks[0])
    name = "mtp.layers.0.transformer_layer.mlp.linear_fc1.weight"
    shards, expected = [rank[name].load() for rank in ranks], whole[name].load()
    assert not torch.equal(torch.cat(shards), expected)
    assert torch.equal(layouts.merge(shards, 0, (24, 24)), expected)
