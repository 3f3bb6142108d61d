"""Triton's norm, rotation and store of queries and keys against the law, interpreted."""

import pytest
import torch

from kernels.gpu.rotary import norm_rope_store
from kernels.rotary import norm_rope_store_torch, rotary_angles

PAGES, PAGE_SIZE = 4, 5


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary_dim"), [(6, 2, 32, 8), (4, 1, 24, 24), (3, 3, 16, 4)])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_queries_come_back_and_keys_and_values_are_stored(
    heads: int, kv_heads: int, dim: int, rotary_dim: int, num_tokens: int
) -> None:
    source = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_tokens, 3 + (2 * heads + 2 * kv_heads) * dim, generator=source)[:, 3:]
    q_scale, k_scale = torch.randn(2, dim, generator=source)
    positions = torch.arange(7, 7 + num_tokens)
    cos, sin = rotary_angles(positions, rotary_dim, 1e7, torch.float32)
    slots = torch.randperm(PAGES * PAGE_SIZE, generator=source)[:num_tokens]
    caches, results = [torch.full((2, PAGES, PAGE_SIZE, kv_heads, dim), torch.nan) for _ in range(2)], []
    for kv, op in zip(caches, (norm_rope_store, norm_rope_store_torch), strict=True):
        results.append(op(qkv, q_scale, k_scale, 1e-6, cos, sin, kv, slots))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*caches, equal_nan=True)
    assert caches[0].isnan().sum() == 2 * (PAGES * PAGE_SIZE - num_tokens) * kv_heads * dim
