"""The row-wise operations of a training step in C++ against their laws in float64, in both directions."""

import pytest
import torch

from kernels.activation import silu_and_mul
from kernels.cpu import training
from kernels.cpu.library import load_library
from kernels.linear import linear
from kernels.rms_norm import add_rms_norm, gated_rms_norm, rms_norm
from kernels.rotary import norm_rotary, rotary_angles
from unit_tests.kernels.cpu.gradients import assert_matches_the_law, assert_same_bits, run

pytestmark = pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")

EPS = 1e-6


def draw(*sizes, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=source) for size in sizes]


def rotate(x, scale):
    """A norm with a rotation of 6 dimensions."""
    return norm_rotary(x, scale, EPS, *rotary_angles(torch.arange(len(x)) * 3, 6, 1e4, x.dtype))


def gate(x, wide, weight):
    """A gate that is some columns of a wider tensor."""
    gates = wide[..., 2:-3].unflatten(-1, x.shape[-2:])
    return gated_rms_norm(x, gates, weight, EPS)


OPERATIONS = {
    "rms_norm": (lambda x, scale: rms_norm(x, scale, EPS), [(300, 19), (19,)]),
    "rms_norm of heads": (lambda x, scale: rms_norm(x[..., 3:], scale, EPS), [(2, 5, 3, 36), (33,)]),
    "rms_norm of one row": (lambda x, scale: rms_norm(x, scale, EPS), [(7,), (7,)]),
    "add_rms_norm": (lambda x, delta, scale: add_rms_norm(x, delta, scale, EPS), [(131, 48), (131, 48), (48,)]),
    "add_rms_norm, the norm alone": (
        lambda x, delta, scale: add_rms_norm(x.mT.contiguous().mT, delta, scale, EPS)[0],
        [(9, 20), (9, 20), (20,)],
    ),
    "gated_rms_norm": (gate, [(3, 50, 2, 21), (3, 50, 2 * 21 + 5), (21,)]),
    "gated_rms_norm of rows": (lambda x, z, w: gated_rms_norm(x, z, w, EPS), [(40, 16), (40, 16), (16,)]),
    "norm_rotary": (rotate, [(140, 3, 10), (10,)]),
    "norm_rotary of columns": (lambda x, scale: rotate(x.chunk(2, -1)[0], scale), [(20, 2, 44), (22,)]),
    "norm_rotary without a rest": (rotate, [(5, 1, 6), (6,)]),
    "silu_and_mul": (silu_and_mul, [(2, 70, 34)]),
    "linear": (linear, [(70, 24), (40, 24)]),
    "linear of batches": (linear, [(3, 5, 40), (24, 40)]),
    "linear of columns": (lambda x, w: linear(x[:, 4:], w).sum(0), [(9, 20), (5, 16)]),
    "linear of nothing": (linear, [(0, 8), (5, 8)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_those_of_the_law(name):
    operation, sizes = OPERATIONS[name]
    assert_matches_the_law(operation, draw(*sizes))


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_depend_on_no_thread(name):
    operation, sizes = OPERATIONS[name]
    assert_same_bits(operation, draw(*sizes))


def test_many_rows_are_shared_by_threads_and_keep_their_bits():
    operation, _ = OPERATIONS["add_rms_norm"]
    assert_same_bits(operation, draw((3000, 64), (3000, 64), (64,)))
    assert_same_bits(linear, draw((3000, 64), (96, 64)))
    assert_same_bits(silu_and_mul, draw((3000, 64)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_float32_with_gradients_takes_the_kernels(name):
    operation, sizes = OPERATIONS[name]
    inputs = draw(*sizes)
    names = {function for function in dir(training) if isinstance(getattr(training, function), type)}

    def backward_nodes(dtype):
        out = operation(*(x.to(dtype).requires_grad_() for x in inputs))
        pending, found = [x.grad_fn for x in (out if isinstance(out, tuple) else (out,))], set()
        while pending:
            node = pending.pop()
            found.add(type(node).__name__.removesuffix("Backward"))
            pending += [parent for parent, _ in node.next_functions if parent is not None]
        return found & names

    assert backward_nodes(torch.float32)
    assert not backward_nodes(torch.float64) and not backward_nodes(torch.bfloat16)


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_a_compiler_the_law_serves(name, monkeypatch):
    operation, sizes = OPERATIONS[name]
    monkeypatch.setattr(training, "load_library", lambda: None)
    assert_matches_the_law(operation, draw(*sizes))


def test_serving_and_autocast_stay_on_their_own_ways():
    (x,) = draw((4, 4))
    assert training.trains(x) and training.runs(x)
    with torch.no_grad():
        assert not training.trains(x) and training.runs(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not training.trains(x)
        assert linear(x, x).dtype == torch.bfloat16


def test_gradients_that_nobody_wants_are_not_computed():
    x, weight = draw((6, 8), (4, 8))
    (frozen,) = torch.autograd.grad(linear(x.requires_grad_(), weight).sum(), [x])
    (trained,) = torch.autograd.grad(linear(x.detach(), weight.requires_grad_()).sum(), [weight])
    _, both = run(lambda x, weight: linear(x, weight).sum(-1).sum(), [x, weight], torch.float64)
    torch.testing.assert_close([frozen, trained], [weight.sum(0).expand(6, 8), x.sum(0).expand(4, 8)])
    assert len(both) == 2


def test_without_onednn_torch_multiplies(monkeypatch):
    monkeypatch.setattr(training.torch.backends.mkldnn, "is_available", lambda: False)
    assert_matches_the_law(linear, draw((70, 24), (40, 24)))
