"""Triton's sparse mixture of experts against the law, interpreted."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import moe as law
from kernels.gpu import moe

E, K, H, INNER = 8, 3, 40, 24


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, and the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


GATE_UP, DOWN = draw(E, 2 * INNER, H, seed=1) / H**0.5, draw(E, H, INNER, seed=2) / INNER**0.5


def draw_inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, shared, and a shared_gate that is the last column of a wider product."""
    return draw(num_tokens, H), draw(num_tokens, H, seed=4), draw(num_tokens, E + 1, seed=5)[:, -1:]


def run_law(x: Tensor, weights: Tensor, experts: Tensor, shared: Tensor, shared_gate: Tensor) -> Tensor:
    return law.run_experts_torch(x, GATE_UP, DOWN, weights, experts, shared, shared_gate)


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 3), (11, 1), (40, 8), (5, 5)])
def test_route_reads_strided_rows(num_experts: int, num_chosen: int) -> None:
    logits = draw(6, num_experts + 1)[:, :num_experts]
    weights, experts = moe.route(logits, num_chosen)
    expected_weights, expected_experts = law.route_torch(logits, num_chosen)
    assert experts.equal(expected_experts)
    torch.testing.assert_close(weights, expected_weights)


def test_route_widens_bfloat16() -> None:
    logits = draw(4, E).bfloat16()
    weights, experts = moe.route(logits, K)
    assert weights.dtype == torch.float32
    torch.testing.assert_close((weights, experts), law.route_torch(logits, K))


def test_ties_go_to_the_lowest_expert() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert moe.route(logits, 3)[1].tolist() == [[1, 3, 4], [0, 1, 2]]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_of_nan_choose_experts_that_exist() -> None:
    weights, experts = moe.route(torch.full((1, 5), torch.nan), 3)
    assert weights.isnan().all() and (experts < 5).all()


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_experts_and_shared_expert_are_summed(num_tokens: int) -> None:
    x, shared, shared_gate = draw_inputs(num_tokens)
    routed = law.route_torch(draw(num_tokens, E, seed=3), K)
    out = moe.run_experts(x, GATE_UP, DOWN, *routed, shared, shared_gate)
    torch.testing.assert_close(out, run_law(x, *routed, shared, shared_gate), rtol=1e-5, atol=1e-5)


def test_sizes_beyond_a_tile() -> None:
    gate_up, down = draw(2, 2 * 70, 133, seed=1) / 133**0.5, draw(2, 133, 70, seed=2) / 70**0.5
    x, shared, shared_gate = draw(3, 133), draw(3, 133, seed=4), draw(3, 1, seed=5)
    routed = law.route_torch(draw(3, 2, seed=3), 1)
    expected = law.run_experts_torch(x, gate_up, down, *routed, shared, shared_gate)
    out = moe.run_experts(x, gate_up, down, *routed, shared, shared_gate)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", [0, 4, E - 1])
def test_all_tokens_at_one_expert(expert: int) -> None:
    x, shared, shared_gate = draw_inputs(19)
    routed = torch.ones(19, 1), torch.full((19, 1), expert)
    gate_up, down = torch.full_like(GATE_UP, torch.nan), torch.full_like(DOWN, torch.nan)
    gate_up[expert], down[expert] = GATE_UP[expert], DOWN[expert]
    out = moe.run_experts(x, gate_up, down, *routed, shared, shared_gate)
    torch.testing.assert_close(out, run_law(x, *routed, shared, shared_gate), rtol=1e-5, atol=1e-5)


def test_a_token_has_the_same_bits_in_company() -> None:
    x, shared, shared_gate = draw_inputs(40)
    weights, experts = law.route_torch(draw(40, E, seed=3), K)
    together = moe.run_experts(x, GATE_UP, DOWN, weights, experts, shared, shared_gate)
    for token in (0, 17, 39):
        rows = slice(token, token + 1)
        alone = moe.run_experts(x[rows], GATE_UP, DOWN, weights[rows], experts[rows], shared[rows], shared_gate[rows])
        assert alone.equal(together[rows])


def test_bfloat16_is_rounded_where_the_law_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, shared, shared_gate = (part.bfloat16() for part in draw_inputs(5))
    routed = law.route_torch(draw(5, E, seed=3), K)
    weights = [weight.bfloat16() for weight in (GATE_UP, DOWN)]
    expected = law.run_experts_torch(x, *weights, *routed, shared, shared_gate)
    for limit in (5, 4):  # the tiles of a decode step and of a long prefill
        monkeypatch.setattr(moe, "MAX_DECODE_TOKENS", limit)
        out = moe.run_experts(x, *weights, *routed, shared, shared_gate)
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_tokens", [1, 50])
def test_both_sorts_give_the_same_order(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = torch.randint(0, E - 1, (num_tokens, K), generator=torch.Generator().manual_seed(0))
    counted = moe.sort_pairs(experts, E)
    monkeypatch.setattr(moe, "MAX_COUNTED_PAIRS", 0)
    order, offsets = moe.sort_pairs(experts, E)
    assert counted[0].equal(order) and counted[1].equal(offsets)
    assert experts.flatten()[order].diff().ge(0).all() and offsets[-1] == num_tokens * K


def test_no_tokens_are_no_launch() -> None:
    weights, experts = moe.route(torch.empty(0, E), K)
    assert weights.shape == experts.shape == (0, K)
    x, shared, shared_gate = draw_inputs(0)
    assert moe.run_experts(x, GATE_UP, DOWN, weights, experts, shared, shared_gate).shape == (0, H)
