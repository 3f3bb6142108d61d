"""Which tensors go to Triton, and that every op with a Triton version takes it there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kernels.gpu.activation
import kernels.gpu.moe
import kernels.gpu.rms_norm
import kernels.gpu.rotary
from kernels.activation import silu_and_mul
from kernels.gpu.dispatch import is_interpreted, runs_triton, triton_takes
from kernels.moe import route, run_experts
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import norm_rope_store


def test_a_cpu_tensor_is_tritons_only_inside_and_never_in_float64_or_with_gradients() -> None:
    x = torch.zeros(2)
    with torch.no_grad():
        assert not runs_triton(x)
        with triton_takes("cpu"):
            assert runs_triton(x) and runs_triton(x.bfloat16()) and not runs_triton(x.double())
            with torch.enable_grad():
                assert not runs_triton(x)
        assert not runs_triton(x)


def test_the_tests_run_in_the_interpreter() -> None:
    assert is_interpreted()


def few(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


CASES: dict[str, tuple[Any, Callable[..., Any], tuple[Any, ...]]] = {
    "rms_norm": (kernels.gpu.rms_norm, rms_norm, (few(2, 4), few(4), 1e-6)),
    "add_rms_norm": (kernels.gpu.rms_norm, add_rms_norm, (few(2, 4), few(2, 4), few(4), 1e-6)),
    "silu_and_mul": (kernels.gpu.activation, silu_and_mul, (few(2, 4),)),
    "route": (kernels.gpu.moe, route, (few(2, 4), 2)),
    "run_experts": (
        kernels.gpu.moe,
        run_experts,
        (few(2, 4), few(3, 4, 4), few(3, 4, 2), few(2, 1), few(2, 1).long(), few(2, 4), few(2, 1)),
    ),
    "norm_rope_store": (
        kernels.gpu.rotary,
        norm_rope_store,
        (few(1, 16), few(4), few(4), 1e-6, few(1, 1, 1), few(1, 1, 1), few(2, 2, 1, 1, 4), few(1).long()),
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_op_takes_its_triton_version_where_tensors_are_tritons(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, op, arguments = CASES[name]
    calls = []
    monkeypatch.setattr(module, name, lambda *args: calls.append(args))
    assert op(*arguments) is not None
    with triton_takes("cpu"):
        assert op(*arguments) is None
    assert len(calls) == 1
