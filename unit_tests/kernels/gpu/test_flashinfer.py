"""What we hand to FlashInfer and make of its results, against our law and Triton's kernels; a stand-in computes."""

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import paged_attention_torch
from kernels.gated_delta_net import DeltaNetShape
from kernels.gated_delta_rule import DeltaRing
from kernels.gpu import gated_delta_rule as triton_rule
from kernels.gpu.flashinfer import (
    AttentionPlanner,
    PageSpans,
    compile_delta_rule,
    gated_delta_rule_prefill,
    prefill_attention,
)
from kernels.gpu.gated_delta_rule import DeltaInputs
from unit_tests.kernels.gpu import fake_flashinfer

HQ, HKV, D, PAGE_SIZE = 6, 2, 16, 4
SHAPE = DeltaNetShape(2, 6, 12, 20)
NUM_ROWS, RING_LEN = 5, 8


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return fake_flashinfer.install(monkeypatch)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def count(fake: ModuleType, name: str) -> int:
    return sum(call[0] == name for call in fake.calls)


def make_planner() -> AttentionPlanner:
    return AttentionPlanner(HQ, HKV, D, PAGE_SIZE, torch.float32, "cpu")


def attend(starts: list[int], counts: list[int], planner: AttentionPlanner, gated: bool = True) -> None:
    """Requests of these lengths in shuffled pages, among what is not a number; equal to the law."""
    ends = [start + number for start, number in zip(starts, counts, strict=True)]
    width = max(-(-end // PAGE_SIZE) for end in ends) + 1
    table = torch.randperm(len(ends) * width, generator=torch.Generator().manual_seed(1)).view(len(ends), width)
    kv = torch.full((2, table.numel(), PAGE_SIZE, HKV, D), torch.nan)
    for row, end in zip(table, ends, strict=True):
        tokens = torch.arange(end)
        kv[:, row[tokens // PAGE_SIZE], tokens % PAGE_SIZE] = draw(2, end, HKV, D, seed=end)
    q = draw(sum(counts), HQ, D, seed=7)
    gate = draw(sum(counts), HQ, 2 * D, seed=8)[..., D:] if gated else None
    out = prefill_attention(q, kv, PageSpans.of(table, PAGE_SIZE, starts, counts), gate, planner)
    expected = [
        paged_attention_torch(part, kv.nan_to_num(), row[None], start + torch.arange(len(part))[None])
        for part, row, start in zip(q.split(counts), table, starts, strict=True)
    ]
    law = torch.cat(expected)
    torch.testing.assert_close(out, law if gate is None else law * gate.sigmoid())


@pytest.mark.parametrize("gated", [True, False])
def test_ragged_requests_attend_to_their_own_pages_up_to_themselves(fake: ModuleType, gated: bool) -> None:
    planner = make_planner()
    attend([0, 5, 8, 3, 12], [7, 1, 4, 9, 3], planner, gated)
    attend([0], [1], planner, gated)


def test_spans_say_whose_tokens_and_pages_are_whose() -> None:
    table = torch.tensor([[9, 8, 7, 0], [5, 4, 3, 2]])
    spans = PageSpans.of(table, PAGE_SIZE, [3, 0], [5, 13])
    assert spans.query_starts.tolist() == [0, 5, 18]
    assert spans.page_starts.tolist() == [0, 2, 6]
    assert spans.pages.tolist() == [9, 8, 5, 4, 3, 2]
    assert spans.last_page_lens.tolist() == [4, 1]


def test_all_layers_of_a_pass_share_one_plan_and_passes_do_not(fake: ModuleType) -> None:
    planner = make_planner()
    assert count(fake, "plan") == 1, "made once, so that everything is compiled"
    kv, table = draw(2, 3, PAGE_SIZE, HKV, D), torch.tensor([[2, 1]])
    spans, others = PageSpans.of(table, PAGE_SIZE, [0], [5]), PageSpans.of(table, PAGE_SIZE, [5], [1])
    for _ in range(3):
        prefill_attention(draw(5, HQ, D), kv, spans, None, planner)
    assert count(fake, "plan") == 2
    first = prefill_attention(draw(5, HQ, D), kv, spans, None, planner)
    prefill_attention(draw(1, HQ, D), kv, others, None, planner)
    assert torch.equal(prefill_attention(draw(5, HQ, D), kv, spans, None, planner), first)
    assert count(fake, "plan") == 4


def draw_inputs(num_tokens: int, seed: int = 0) -> DeltaInputs:
    channels = 2 * SHAPE.key_heads * SHAPE.key_dim + SHAPE.value_heads * SHAPE.value_dim
    gates = draw(num_tokens, 2 * SHAPE.value_heads + 5, seed=seed)[:, 5:]  # strided, as the projection gives it
    heads = SHAPE.value_heads
    return DeltaInputs(draw(num_tokens, channels, seed=seed + 1), gates, draw(heads, seed=2), draw(heads, seed=3))


def make_memory() -> tuple[Tensor, DeltaRing]:
    """Row 0, which is padding, is not a number."""
    key_heads, heads, key_dim, value_dim = SHAPE
    state = draw(NUM_ROWS, heads, key_dim, value_dim, seed=4)
    ring = DeltaRing(
        draw(NUM_ROWS, RING_LEN, key_heads, key_dim, seed=5),
        draw(NUM_ROWS, RING_LEN, heads, value_dim, seed=6),
        draw(NUM_ROWS, RING_LEN, heads, seed=7).sigmoid(),
    )
    for tensor in (state, *ring):
        tensor[0] = torch.nan
    return state, ring


@pytest.mark.parametrize("accepted", [[0, 0, 0], [3, 0, 1]])
def test_the_delta_rule_folds_runs_and_stores_as_tritons_does(fake: ModuleType, accepted: list[int]) -> None:
    inputs, counts = draw_inputs(23), [1, 20, 2]
    starts = torch.tensor([0, 1, 21, 23])
    where = (torch.tensor([3, 1, 4]), torch.tensor([9, 6, 30]), torch.tensor(accepted))
    (state, ring), (other, other_ring) = make_memory(), make_memory()
    out = gated_delta_rule_prefill(inputs, SHAPE, state, ring, *where, starts, max(counts))
    expected = triton_rule.gated_delta_rule_prefill(inputs, SHAPE, other, other_ring, *where, starts, max(counts))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(state[2], make_memory()[0][2]), "nobody's row"
    assert out.is_contiguous()


def test_a_bfloat16_model_hands_over_bfloat16(fake: ModuleType) -> None:
    """Triton's interpreter cannot compute with it, so nothing is folded here."""
    inputs, (state, ring) = draw_inputs(6), make_memory()
    where = (torch.tensor([2]), torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 6]))
    exact = gated_delta_rule_prefill(inputs, SHAPE, state.clone(), ring, *where, 6)
    halved = inputs._replace(gates=inputs.gates.bfloat16())
    out = gated_delta_rule_prefill(halved, SHAPE, state, ring, *where, 6)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def run_everything() -> None:
    """Every call that we make."""
    attend([0, 5], [7, 2], make_planner())
    compile_delta_rule(SHAPE, torch.float32, "cpu")
    where = (torch.tensor([2]), torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 6]))
    gated_delta_rule_prefill(draw_inputs(6), SHAPE, *make_memory(), *where, 6)


def test_the_calls_fit_the_signatures_of_the_flashinfer_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = pytest.importorskip("flashinfer")
    fake: Any = fake_flashinfer.install(monkeypatch)
    run_everything()
    names = [name for name, _, _ in fake.calls]
    assert set(names) == {"__init__", "plan", "run", "chunk_gated_delta_rule"}
    for name, args, kwargs in fake.calls:
        if name == "chunk_gated_delta_rule":
            inspect.signature(real.chunk_gated_delta_rule).bind(*args, **kwargs)
        else:
            inspect.signature(getattr(real.BatchPrefillWithPagedKVCacheWrapper, name)).bind(None, *args, **kwargs)
