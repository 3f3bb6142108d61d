import pytest
import torch

from models.conversion import layouts


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_qkv_rows_stand_by_group_queries_gates_key_value(num_groups: int) -> None:
    heads, dim = 6, 2
    q = torch.tensor([[100 * head + 10 * gate + i] for head in range(heads) for gate in (0, 1) for i in range(dim)])
    k = 1000 + torch.arange(num_groups * dim)[:, None]
    v = 2000 + torch.arange(num_groups * dim)[:, None]
    whole = layouts.join_qkv(q, k, v, num_groups, dim)
    expected = []
    for group in range(num_groups):
        mine = range(group * heads // num_groups, (group + 1) * heads // num_groups)
        expected += [100 * head + 10 * gate + i for gate in (0, 1) for head in mine for i in range(dim)]
        expected += [base + group * dim + i for base in (1000, 2000) for i in range(dim)]
    assert whole[:, 0].tolist() == expected
    for part, back in zip((q, k, v), layouts.split_qkv(whole, num_groups, dim), strict=True):
        assert torch.equal(part, back)


def test_a_rank_holds_its_share_of_every_block() -> None:
    gate_up = torch.arange(8)[:, None]
    shards = [layouts.shard(gate_up, rank, 2, 0, (4, 4)) for rank in (0, 1)]
    assert [shard[:, 0].tolist() for shard in shards] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(layouts.merge(shards, 0, (4, 4)), gate_up)


def test_columns_are_shared_in_order() -> None:
    down = torch.arange(12).view(2, 6)
    shards = [layouts.shard(down, rank, 3, 1, (6,)) for rank in range(3)]
    assert shards[1].tolist() == [[2, 3], [8, 9]]
    assert torch.equal(layouts.merge(shards, 1, (6,)), down)


@pytest.mark.parametrize("by", [-1, 1])
def test_a_shifted_norm_comes_back_exactly_and_is_no_wider_than_it_must_be(by: int) -> None:
    weight = torch.linspace(0.01, 1.7, 301).bfloat16()
    moved = layouts.shift(weight, by)
    assert moved.dtype == torch.float32
    assert torch.equal(layouts.unshift(moved, by, torch.bfloat16), weight)
    assert (layouts.unshift((weight + by), by, torch.bfloat16) != weight).any(), "bfloat16 would have been enough"
    assert layouts.shift(torch.tensor([0.5, 1.0], dtype=torch.bfloat16), by).dtype == torch.bfloat16


def test_a_norm_next_to_zero_is_rounded_to_float32() -> None:
    moved = layouts.shift(torch.tensor([1e-30]), 1)
    assert moved.dtype == torch.float32 and moved.item() == 1


def test_gate_stands_above_up() -> None:
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    whole = layouts.join_rows([gate, up])
    assert whole[:, 0].tolist() == [0, 0, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(layouts.split_rows(whole, (2, 2)), (gate, up), strict=True))
    assert layouts.keep(gate) is gate
