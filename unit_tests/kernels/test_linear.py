import pytest
import torch
import torch.nn.functional as F

from kernels.cpu.library import load_library
from kernels.linear import MAX_ROWS, linear
from kernels.quantized_linear import QuantizedWeight, quantized_linear_torch

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-13}
needs_compiler = pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")


def draw(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=source, dtype=torch.float64).to(dtype) * size[-1] ** -0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 64, 65])
@pytest.mark.parametrize(("out_size", "in_size"), [(8, 16), (5, 33), (130, 257), (1, 7)])
@torch.inference_mode()
def test_it_is_the_product_for_any_shape(rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> None:
    x, weight = draw(rows, in_size, dtype=dtype), draw(out_size, in_size, dtype=dtype, seed=1)
    expected = F.linear(x.double(), weight.double())
    out = linear(x, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_row_gives_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    x, weight = draw(MAX_ROWS, 257, dtype=dtype), draw(131, 257, dtype=dtype, seed=1)
    together = linear(x, weight)
    for count in (1, 2, 3, 5, 8):
        assert torch.equal(linear(x[:count], weight), together[:count])
    assert torch.equal(linear(x[-1:], weight), together[-1:])


@needs_compiler
@torch.inference_mode()
def test_sums_are_rounded_unless_they_are_wanted_as_they_are() -> None:
    x, weight = draw(5, 257, dtype=torch.bfloat16), draw(131, 257, dtype=torch.bfloat16, seed=1)
    sums = linear(x, weight, rounds=False)
    assert sums.dtype == torch.float32 and torch.equal(sums.bfloat16(), linear(x, weight))
    torch.testing.assert_close(sums, F.linear(x.float(), weight.float()), rtol=1e-5, atol=1e-5)
    for bits in (8, 4):
        quantized = QuantizedWeight((131, 257), bits, torch.bfloat16)
        quantized.store(torch.arange(131), weight)
        sums = linear(x, quantized, rounds=False)
        assert sums.dtype == torch.float32 and torch.equal(sums.bfloat16(), linear(x, quantized))
        law = quantized_linear_torch(x, quantized, rounds=False)
        assert law.dtype == torch.float32 and torch.equal(law.bfloat16(), quantized_linear_torch(x, quantized))


@torch.inference_mode()
def test_leading_dimensions_and_strides_are_kept() -> None:
    x = draw(3, 2, 40, dtype=torch.float32)[..., ::2]
    weight = draw(6, 20, dtype=torch.float32)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    for dtype in (torch.float32, torch.bfloat16):
        assert linear(x[:0].to(dtype), weight.to(dtype)).shape == (0, 2, 6)


def test_gradients_flow_where_they_are_wanted() -> None:
    weight = draw(4, 6, dtype=torch.float32).requires_grad_()
    linear(draw(2, 6, dtype=torch.float32), weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
