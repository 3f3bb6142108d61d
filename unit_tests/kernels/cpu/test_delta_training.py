"""The delta rule and the convolution in C++ against their laws in float64, in both directions."""

import pytest
import torch

from kernels.cpu import training
from kernels.cpu.library import load_library
from kernels.gated_delta_net import DeltaNetShape, convolve_heads
from kernels.gated_delta_rule import gated_delta_rule
from unit_tests.kernels.cpu.gradients import assert_matches_the_law, assert_same_bits, relative_errors, run

pytestmark = pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")

TAPS = 4
SHAPES = {
    "grouped": DeltaNetShape(2, 6, 5, 7),
    "whole": DeltaNetShape(1, 1, 16, 32),
    "wide": DeltaNetShape(1, 2, 40, 70),
}


def draw_inputs(shape, length, decay="any", batch=2, seed=0):
    """q, k, v, log_alpha and beta as the layer makes them. Decays: hardly any; almost none to all; always strong."""
    source = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(batch, length, *size, generator=source)

    q, k = (torch.nn.functional.normalize(normal(shape.key_heads, shape.key_dim), dim=-1) for _ in range(2))
    gate = normal(shape.value_heads)
    log_alpha = {"weak": -(gate - 4).exp(), "any": -(3 * gate).exp().clamp(max=50), "strong": -50 * gate.sigmoid()}
    inputs = [q * shape.key_dim**-0.5, k, normal(shape.value_heads, shape.value_dim)]
    return [*inputs, log_alpha[decay], normal(shape.value_heads).sigmoid()]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70, 161])
def test_the_rule_and_its_gradients_are_those_of_the_law(shape, length):
    assert_matches_the_law(gated_delta_rule, draw_inputs(shape, length))


@pytest.mark.parametrize("decay", ["weak", "any", "strong"])
def test_decays_of_every_strength_keep_all_digits(decay):
    """Neighbours behind thousands of decay: a sum in float32 has lost what is between them."""
    assert_matches_the_law(gated_delta_rule, draw_inputs(SHAPES["grouped"], 200, decay), tolerance=2e-6)


def test_decays_that_underflow_give_finite_gradients():
    q, k, v, log_alpha, beta = draw_inputs(SHAPES["grouped"], 70, "strong")
    outputs, gradients = run(gated_delta_rule, [q, k, v, log_alpha * 1000, beta], torch.float32)
    assert all(x.isfinite().all() for x in [*outputs, *gradients])


@pytest.mark.parametrize("batch", [1, 5])
def test_any_number_of_requests_is_served(batch):
    assert_matches_the_law(gated_delta_rule, draw_inputs(SHAPES["grouped"], 40, batch=batch))


def test_padding_behind_a_sequence_changes_neither_outputs_nor_gradients():
    """Rows that are ignored by the loss, whatever is in them, also at the end of a chunk that is full."""
    inputs = draw_inputs(SHAPES["grouped"], 96)

    def prefix(*parts, length=41):
        return gated_delta_rule(*parts)[:, :length]

    (out,), gradients = run(prefix, inputs, torch.float32)
    (alone,), expected = run(gated_delta_rule, [x[:, :41] for x in inputs], torch.float32)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-6)
    for gradient, short in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient[:, :41], short, rtol=0, atol=1e-5)
        assert (gradient[:, 41:] == 0).all()


def test_inputs_that_lie_apart_and_gradients_that_repeat_are_understood():
    def transposed_sum(q, k, v, log_alpha, beta):
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        return gated_delta_rule(q, k, v.expand(-1, -1, 6, -1), log_alpha, beta).sum(-1)

    q, k, v, log_alpha, beta = draw_inputs(SHAPES["grouped"], 35)
    assert_matches_the_law(transposed_sum, [q, k, v[:, :, :1], log_alpha, beta])


def test_the_law_itself_has_the_gradients_of_its_outputs():
    inputs = [x.double().requires_grad_() for x in draw_inputs(DeltaNetShape(1, 2, 3, 2), 5, "weak", batch=1)]
    assert torch.autograd.gradcheck(gated_delta_rule, inputs)


def test_float32_takes_the_kernel_and_float64_the_law(monkeypatch):
    inputs = [x.requires_grad_() for x in draw_inputs(SHAPES["grouped"], 9)]
    assert type(gated_delta_rule(*inputs).grad_fn).__name__ == "DeltaRuleBackward"
    assert type(gated_delta_rule(*(x.double() for x in inputs)).grad_fn).__name__ != "DeltaRuleBackward"
    monkeypatch.setattr(training, "load_library", lambda: None)
    assert type(gated_delta_rule(*inputs).grad_fn).__name__ != "DeltaRuleBackward"
    assert max(relative_errors(gated_delta_rule, inputs)) < 1e-3


def draw_convolution(shape, length, batch=2):
    source = torch.Generator().manual_seed(2)
    channels = 2 * shape.key_heads * shape.key_dim + shape.value_heads * shape.value_dim
    qkv = torch.randn(batch, length, channels + 3, generator=source)
    return qkv, torch.randn(channels, TAPS, generator=source)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 3, 4, 63, 64, 65, 130])
def test_the_convolution_and_its_gradients_are_those_of_the_law(shape, length):
    """Of some columns of a wider tensor, as the projection is."""
    inputs = draw_convolution(shape, length)
    assert_matches_the_law(lambda wide, conv: convolve_heads(wide[..., 1:-2], conv, shape), inputs)


def test_a_batch_that_lies_apart_is_convolved_as_well():
    shape = SHAPES["grouped"]
    inputs = draw_convolution(shape, 21)
    assert_matches_the_law(lambda wide, conv: convolve_heads(wide[:, 1:-2, 3:], conv, shape), inputs)
    assert_matches_the_law(lambda wide, conv: convolve_heads(wide.mT.contiguous().mT[..., 3:], conv, shape), inputs)


@pytest.mark.parametrize("taps", [1, 2, 6])
def test_a_convolution_may_have_any_number_of_taps(taps):
    shape = SHAPES["grouped"]
    qkv, _ = draw_convolution(shape, 70)
    conv = torch.randn(qkv.shape[2] - 3, taps, generator=torch.Generator().manual_seed(4))
    assert_matches_the_law(lambda wide, conv: convolve_heads(wide[..., 3:], conv, shape), [qkv, conv])


def test_results_depend_on_no_thread():
    shape = SHAPES["wide"]
    assert_same_bits(gated_delta_rule, draw_inputs(shape, 100, batch=3))
    assert_same_bits(lambda wide, conv: convolve_heads(wide[..., 3:], conv, shape), draw_convolution(shape, 100, 3))


def test_without_gradients_the_same_bits_come_out():
    inputs = draw_inputs(SHAPES["grouped"], 70)
    with torch.no_grad():
        plain = gated_delta_rule(*inputs)
    assert torch.equal(plain, run(gated_delta_rule, inputs, torch.float32)[0][0])
