"""The C++ products against the law bit by bit, on every kind of processor that this one can stand for."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import quantized_linear as module
from kernels.cpu import library
from kernels.linear import linear
from kernels.quantized_linear import (
    GROUP,
    TILE,
    QuantizedWeight,
    quantize_rows,
    quantize_weights,
    quantized_linear,
    quantized_linear_torch,
)

SHAPES = [(16, 32), (5, 33), (130, 257), (1, 7), (33, 160)]
needs_compiler = pytest.mark.skipif(library.load_library() is None, reason="this machine has no C++ compiler")
# Compiler flags, and what /proc/cpuinfo calls the instructions that they need.
PROCESSORS = {"-march=x86-64": "sse2", "-march=haswell": "avx2", "-march=alderlake": "avx_vnni"}


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def make_weight(out_size: int, in_size: int, bits: int, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    weight = QuantizedWeight((out_size, in_size), bits, dtype)
    weight.store(torch.arange(out_size), draw(out_size, in_size, seed=1))
    return weight


@needs_compiler
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 65])
@pytest.mark.parametrize(("out_size", "in_size"), SHAPES)
@torch.inference_mode()
def test_it_equals_the_law_bit_by_bit(rows: int, out_size: int, in_size: int, bits: int) -> None:
    x, weight = draw(rows, in_size), make_weight(out_size, in_size, bits)
    assert torch.equal(quantized_linear(x, weight), quantized_linear_torch(x, weight))


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.11)])
@torch.inference_mode()
def test_the_law_is_about_the_product(bits: int, error: float) -> None:
    x, weight = draw(20, 257), make_weight(130, 257, bits)
    exact = x.double() @ draw(130, 257, seed=1).double().T
    out = quantized_linear_torch(x, weight)
    assert (out - exact).norm() < error * exact.norm()
    from_rounded = x.double() @ weight.dequantize(torch.arange(130)).double().T
    assert (out - from_rounded).norm() < 0.01 * exact.norm(), "what is left is the rounding of x"


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_a_row_gives_the_same_bits_in_any_company_and_with_any_threads(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = draw(600, 257), make_weight(131, 257, bits)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = linear(x, weight)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for count in (1, 2, 3, 5, 8, 64, 65):
        assert torch.equal(linear(x[:count], weight), together[:count])
    assert torch.equal(linear(x[-1:], weight), together[-1:])


@torch.inference_mode()
def test_the_law_gives_a_row_the_same_bits_in_any_company() -> None:
    x, weight = draw(70, 257), make_weight(131, 257, 8)
    together = quantized_linear_torch(x, weight)
    assert all(torch.equal(quantized_linear_torch(x[:count], weight), together[:count]) for count in (1, 2, 3, 64))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("flag", PROCESSORS)
@torch.inference_mode()
def test_other_processors_compute_the_same_bits(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists() or PROCESSORS[flag] not in info.read_text().split():
        pytest.skip(f"this processor does not run {flag}")
    compiler = shutil.which("g++") or shutil.which("clang++")
    source = Path(library.__file__).parent / "quantized_linear.cpp"
    flags = [flag if old == "-march=native" else old for old in library._FLAGS]
    subprocess.run([str(compiler), *flags, "-o", str(tmp_path / "other.so"), str(source)], check=True)
    other = ctypes.CDLL(str(tmp_path / "other.so"))
    for name in ("quantized_linear_float32", "store_quantized_float32"):
        getattr(other, name).argtypes = getattr(library.load_library(), name).argtypes
    monkeypatch.setattr(module, "load_library", lambda: other)
    for bits in (8, 4):
        for out_size, in_size in SHAPES:
            weight = make_weight(out_size, in_size, bits)
            weight.words.data[0, 0] = 0  # the smallest number there is
            for rows in (1, 3, 8, 11):
                x = draw(rows, in_size)
                assert torch.equal(quantized_linear(x, weight), quantized_linear_torch(x, weight))


@torch.inference_mode()
def test_without_a_compiler_the_law_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(3, 40), make_weight(20, 40, 8)
    expected = quantized_linear(x, weight)
    monkeypatch.setattr(module, "load_library", lambda: None)
    assert torch.equal(quantized_linear(x, weight), expected)


@pytest.mark.parametrize(("bits", "numbers"), [(8, 127), (4, 8)])
def test_weights_are_rounded_to_the_nearest_number(bits: int, numbers: int) -> None:
    values = draw(50, 100)
    values[7, 32:64] = 0
    rounded = quantize_weights(values, bits)
    assert rounded.numbers.shape == (50, 4 * GROUP) and rounded.scales.dtype == torch.bfloat16
    assert rounded.numbers.abs().amax() == numbers and (rounded.numbers[:, 100:] == 0).all()
    assert (rounded.numbers[7, 32:64] == 0).all() and rounded.scales[7, 1] == 0
    back = (rounded.numbers.float().view(50, 4, GROUP) * rounded.scales.float()[..., None]).view(50, -1)[:, :100]
    steps = rounded.scales.float().abs().repeat_interleave(GROUP, dim=1)[:, :100]
    # A number that is clipped at +7 is off by a whole step of int4, one at the end of int8 by what its scale is.
    assert ((back - values).abs() <= steps * (1.05 if bits == 4 else 0.8)).all()
    assert ((back - values).abs() <= steps * 0.51).float().mean() > 0.97


def test_rows_have_a_scale_for_each_group() -> None:
    values = draw(3, 70) * 10.0 ** torch.arange(-35, 35)
    rounded = quantize_rows(values)
    assert rounded.numbers.shape == (3, 96) and rounded.scales.shape == (3, 3)
    assert rounded.numbers.abs().view(3, 3, GROUP).amax(-1).eq(127).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_a_row_with_a_nan_or_infinity_is_nan_and_no_other(broken: float) -> None:
    x, weight = draw(9, 70), make_weight(33, 70, 4)
    expected = linear(x, weight)
    x[4, 40] = broken
    for multiply in (quantized_linear, quantized_linear_torch):
        out = multiply(x, weight)
        assert out[4].isnan().all()
        assert torch.equal(out[torch.arange(9) != 4], expected[torch.arange(9) != 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@torch.inference_mode()
def test_shapes_strides_and_dtypes_of_rows_are_kept(dtype: torch.dtype) -> None:
    x, weight = draw(3, 2, 40).to(dtype)[..., ::2], make_weight(18, 20, 8)
    out = linear(x, weight)
    assert out.shape == (3, 2, 18) and out.dtype == dtype
    assert torch.equal(out, quantized_linear_torch(x, weight))
    assert linear(x[:0], weight).shape == (0, 2, 18)


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_parts_of_a_matrix_give_their_outputs(bits: int) -> None:
    x, weight = draw(3, 70), make_weight(50, 70, bits)
    for first in (0, 5, TILE, 40):
        part = weight.outputs(first, weight.out_size)
        assert part.out_size == 50 - first
        for multiply in (quantized_linear, quantized_linear_torch):
            assert torch.equal(multiply(x, part), linear(x, weight)[:, first:])


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_experts_lie_side_by_side(bits: int) -> None:
    x, values = draw(3, 40), draw(4, 18, 40, seed=1)
    weights = QuantizedWeight((4, 18, 40), bits, torch.float32)
    assert weights.dim() == 3 and weights.numel() == values.numel()
    rows = torch.randperm(4 * 18, generator=torch.Generator().manual_seed(0))
    weights.store(rows, values.flatten(0, 1)[rows])
    for expert in range(4):
        alone = QuantizedWeight((18, 40), bits, torch.float32)
        alone.store(torch.arange(18), values[expert])
        assert torch.equal(linear(x, weights.expert(expert)), linear(x, alone))


@needs_compiler
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("out_size", "in_size"), SHAPES)
def test_weights_are_stored_as_the_law_says(
    out_size: int, in_size: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = draw(out_size, in_size) * 10 ** draw(out_size, 1, seed=1)
    values[0, :32] = 0
    rows = torch.randperm(out_size, generator=torch.Generator().manual_seed(0))
    stored = []
    for load in (library.load_library, lambda: None):
        monkeypatch.setattr(module, "load_library", load)
        weight = QuantizedWeight((out_size, in_size), bits, torch.float32)
        weight.store(rows, values)
        stored.append(weight)
    assert torch.equal(stored[0].words, stored[1].words) and torch.equal(stored[0].scales, stored[1].scales)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_stored_is_loaded_again_whatever_else_is_stored(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STORED_WEIGHTS", 200)
    weight, values = make_weight(50, 70, bits, torch.bfloat16), draw(3, 70, seed=2)
    before, rows = weight.load(torch.arange(50)), torch.tensor([3, 17, 18])
    weight.store(rows, values.double())
    expected = quantize_weights(values, bits)
    assert torch.equal(weight.load(rows).numbers, expected.numbers)
    others = [row for row in range(50) if row not in rows.tolist()]
    assert torch.equal(weight.load(torch.tensor(others)).numbers, before.numbers[others])
    assert weight.dequantize(rows[None]).shape == (1, 3, 70) and weight.dequantize(rows).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "per_weight"), [(8, 8.5), (4, 4.5)])
def test_bits_per_weight(bits: int, per_weight: float) -> None:
    weight = QuantizedWeight((64, 128), bits, torch.float32)
    assert 8 * sum(tensor.nbytes for tensor in weight.parameters()) == per_weight * weight.numel()


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_random_weights_leave_rows_about_as_large_as_they_are(bits: int) -> None:
    weight = QuantizedWeight((300, 256), bits, torch.float32)
    weight.fill_randomly(torch.Generator().manual_seed(0))
    assert 0.8 < float(linear(draw(50, 256), weight).std()) < 1.25
