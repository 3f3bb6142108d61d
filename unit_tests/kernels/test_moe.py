"""Routing and experts against one token at a time."""

import math

import pytest
import torch

from kernels.moe import route, route_torch, run_experts, run_experts_torch

E, K, H, INNER = 5, 3, 7, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GATE_UP, DOWN = draw(E, 2 * INNER, H, seed=1), draw(E, H, INNER, seed=2)


@pytest.mark.parametrize("op", [route, route_torch])
def test_routing_takes_the_best_and_renormalises(op):
    logits = draw(9, E)
    weights, experts = op(logits, K)
    for row in range(9):
        order = sorted(range(E), key=lambda e: -logits[row, e])[:K]
        assert experts[row].tolist() == order
        total = sum(math.exp(logits[row, e]) for e in order)
        expected = torch.tensor([math.exp(logits[row, e]) / total for e in order], dtype=torch.float64)
        torch.testing.assert_close(weights[row], expected)


def test_bfloat16_logits_are_routed_in_float32():
    assert route(draw(2, E).bfloat16(), K)[0].dtype == torch.float32


def draw_shared(num_tokens):
    return draw(num_tokens, H, seed=4), draw(num_tokens, 1, seed=5)


@pytest.mark.parametrize("num_tokens", [1, 2, 11])
def test_experts_are_weighted_by_their_outputs(num_tokens):
    x = draw(num_tokens, H)
    weights, experts = route(draw(num_tokens, E, seed=3), K)
    expected = torch.zeros_like(x)
    for t in range(num_tokens):
        for choice in range(K):
            expert = experts[t, choice]
            gate, up = (GATE_UP[expert] @ x[t]).chunk(2)
            expected[t] += weights[t, choice] * (DOWN[expert] @ (gate * gate.sigmoid() * up))
    shared, gate = draw_shared(num_tokens)
    expected += gate.sigmoid() * shared
    for op in (run_experts, run_experts_torch):
        torch.testing.assert_close(op(x, GATE_UP, DOWN, weights, experts, shared, gate), expected)


def test_an_expert_nobody_chose_is_not_read():
    x, poisoned = draw(2, H), DOWN.clone()
    poisoned[4] = torch.nan
    experts = torch.tensor([[0, 1, 2], [3, 0, 1]])
    weights = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    assert run_experts(x, GATE_UP, poisoned, weights, experts, *draw_shared(2)).isfinite().all()


def test_a_token_does_not_depend_on_the_others():
    x, logits = draw(8, H), draw(8, E, seed=3)
    shared, gate = draw_shared(8)
    together = run_experts(x, GATE_UP, DOWN, *route(logits, K), shared, gate)
    for t in range(8):
        one = slice(t, t + 1)
        alone = run_experts(x[one], GATE_UP, DOWN, *route(logits[one], K), shared[one], gate[one])
        torch.testing.assert_close(together[t : t + 1], alone, rtol=0, atol=1e-13)
