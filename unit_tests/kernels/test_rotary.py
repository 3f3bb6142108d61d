"""The rotary embedding against a rotation of each pair."""

import math

import pytest
import torch

from kernels.rms_norm import rms_norm
from kernels.rotary import (
    apply_rotary,
    norm_rope_store,
    norm_rope_store_torch,
    norm_rotary,
    rotary_angles,
    rotary_frequencies,
)

HEADS, D, ROTARY_DIM, THETA = 3, 20, 8, 1e7


def test_each_pair_turns_by_its_own_angle_and_the_rest_stays():
    positions = torch.tensor([0, 1, 7, 100, 5000])
    x = torch.randn(5, HEADS, D, dtype=torch.float64)
    out = apply_rotary(x, *rotary_angles(positions, ROTARY_DIM, THETA, torch.float64))
    half = ROTARY_DIM // 2
    for i, position in enumerate(positions.tolist()):
        for j in range(half):
            angle = position * THETA ** (-2 * j / ROTARY_DIM)
            first, second = x[i, :, j], x[i, :, j + half]
            torch.testing.assert_close(out[i, :, j], first * math.cos(angle) - second * math.sin(angle))
            torch.testing.assert_close(out[i, :, j + half], second * math.cos(angle) + first * math.sin(angle))
    assert torch.equal(out[..., ROTARY_DIM:], x[..., ROTARY_DIM:])


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, D, dtype=torch.float64), torch.randn(1, 1, D, dtype=torch.float64)

    def score(q_position, k_position):
        angles = rotary_angles(torch.tensor([q_position, k_position]), ROTARY_DIM, THETA, torch.float64)
        q_turned, k_turned = apply_rotary(torch.cat([q, k]), *angles)
        return (q_turned * k_turned).sum()

    torch.testing.assert_close(score(9, 4), score(1009, 1004))


def test_angles_of_far_positions_are_exact_in_float32():
    positions = torch.tensor([200_000])
    cos, sin = rotary_angles(positions, ROTARY_DIM, THETA, torch.float32)
    wide_cos, wide_sin = rotary_angles(positions, ROTARY_DIM, THETA, torch.float64)
    torch.testing.assert_close(cos.double(), wide_cos, rtol=0, atol=1e-3)
    torch.testing.assert_close(sin.double(), wide_sin, rtol=0, atol=1e-3)


def test_the_input_type_is_kept():
    x = torch.randn(2, HEADS, D).bfloat16()
    assert apply_rotary(x, *rotary_angles(torch.arange(2), ROTARY_DIM, THETA, torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("rotary_dim", [2, 16, 34, 64])
def test_frequencies_fall_from_one_by_a_constant_factor(rotary_dim):
    frequencies = rotary_frequencies(rotary_dim, THETA, torch.float64, torch.device("cpu"))
    assert len(frequencies) >= rotary_dim // 2 and frequencies[0] == 1
    expected = [THETA ** (-2 * j / rotary_dim) for j in range(rotary_dim // 2)]
    assert frequencies[: rotary_dim // 2].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("op", [norm_rope_store, norm_rope_store_torch])
def test_queries_and_keys_are_normed_and_rotated_and_keys_and_values_stored(op):
    """Per query head (query | gate), then keys, then values."""
    kv_heads, source = 2, torch.Generator().manual_seed(0)
    qkv = torch.randn(5, (2 * HEADS + 2 * kv_heads) * D, generator=source, dtype=torch.float64)
    q_scale, k_scale = torch.randn(2, D, generator=source, dtype=torch.float64)
    cos, sin = rotary_angles(torch.arange(3, 8), ROTARY_DIM, THETA, torch.float64)
    kv, slots = torch.zeros(2, 3, 4, kv_heads, D, dtype=torch.float64), torch.tensor([9, 0, 4, 5, 11])
    q = op(qkv, q_scale, k_scale, 1e-6, cos, sin, kv, slots)
    heads = qkv.view(5, -1, D)
    expected = apply_rotary(rms_norm(heads[:, 0 : 2 * HEADS : 2], q_scale, 1e-6), cos, sin)
    torch.testing.assert_close(q, expected)
    keys = apply_rotary(rms_norm(heads[:, 2 * HEADS : 2 * HEADS + kv_heads], k_scale, 1e-6), cos, sin)
    torch.testing.assert_close(kv[0].flatten(0, 1)[slots], keys)
    assert torch.equal(kv[1].flatten(0, 1)[slots], heads[:, 2 * HEADS + kv_heads :])
    assert (kv[0].flatten(0, 1)[[1, 2, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_are_normed_and_then_turned(dtype):
    angles = rotary_angles(torch.tensor([0, 3, 70]), ROTARY_DIM, THETA, torch.float64)
    x, scale = torch.randn(3, HEADS, D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    found = norm_rotary(x.to(dtype), scale.to(dtype), 1e-6, *(part.to(dtype) for part in angles))
    torch.testing.assert_close(found.double(), apply_rotary(rms_norm(x, scale, 1e-6), *angles), rtol=1e-5, atol=1e-5)
