"""An operation in float32 against its law in float64: values, and gradients of a random weighting of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Operation = Callable[..., Any]


def run(operation: Operation, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the inputs' gradients, computed in `dtype`; the weighting depends on the outputs' sizes alone."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = operation(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    source = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=source, dtype=torch.float32).to(dtype) for x in outputs]
    return [x.detach() for x in outputs], list(torch.autograd.grad(outputs, leaves, weights))


def relative_errors(operation: Operation, inputs: Sequence[Tensor]) -> list[float]:
    """The largest differences of outputs and gradients between float32 and float64, over the largest number of each."""
    narrow, wide = run(operation, inputs, torch.float32), run(operation, inputs, torch.float64)
    pairs = zip([*narrow[0], *narrow[1]], [*wide[0], *wide[1]], strict=True)
    assert all(x.dtype == torch.float32 and x.shape == y.shape for x, y in pairs)
    pairs = zip([*narrow[0], *narrow[1]], [*wide[0], *wide[1]], strict=True)
    return [float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) if y.numel() else 0.0 for x, y in pairs]


def assert_matches_the_law(operation: Operation, inputs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Whatever the operation does not write is not a number."""
    with poisoned_memory():
        errors = relative_errors(operation, inputs)
    assert all(error <= tolerance for error in errors), errors  # a NaN is not


def assert_same_bits(operation: Operation, inputs: Sequence[Tensor]) -> None:
    """The same operation again, with one thread and with two."""
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            outputs, gradients = run(operation, inputs, torch.float32)
            results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, new float tensors are full of NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    try:
        torch.empty = lambda *size, **options: poison(empty(*size, **options))
        torch.empty_like = lambda *size, **options: poison(empty_like(*size, **options))
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
