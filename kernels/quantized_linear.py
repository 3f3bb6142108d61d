"""`x · Wᵀ` with weights of 8 or 4 bits, on a CPU.

Inputs are taken in groups of 32. Of an output's weights a group is whole numbers times a scale in bfloat16; of a row it
is numbers of 8 bits times a scale in float32, made when the row comes:

    y = Σ_g (Σ_i x_gi w_gi) · (scale(w_g) · scale(x_g))     numbers of int8: -127..127, of int4: -8..7

The inner sum is exact, and groups are added one after the other by fused multiply-adds in float32. So a row's bits do
not depend on the other rows, on threads or on the processor. N rows, `in` and `out` sizes, G groups, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cpu.library import load_library

GROUP = 32
TILE = 16  # outputs that lie side by side
BITS = {"int8": 8, "int4": 4}
_PARALLEL_PRODUCTS = 2**19
# Outputs that the law unpacks, and weights that are quantized, at a time.
_LAW_OUTPUTS, _STORED_WEIGHTS = 4096, 2**22


class Quantized(NamedTuple):
    """Rows of numbers [R, G · GROUP] int8, zeros behind the last input, and their scales [R, G]."""

    numbers: Tensor
    scales: Tensor


class QuantizedWeight(nn.Module):
    """A matrix of `shape` [out, in], or one per expert [E, out, in]; its weights are given back in `dtype`.

    words [E · tiles, in / n, TILE, 4] uint8: of each output 4 bytes with n = 4 or 8 inputs; of 8 inputs the first 4
    are the lower halves. The numbers there are 2^(bits - 1) too large. scales [E · tiles, G, TILE]. The matrix begins
    at the output `first` of its memory.
    """

    def __init__(self, shape: tuple[int, ...], bits: int, dtype: torch.dtype):
        super().__init__()
        self.shape, self.bits, self.dtype, self.first = torch.Size(shape), bits, dtype, 0
        tiles, groups = self.shape[:-2].numel() * self.num_tiles, _count(self.in_size, GROUP)
        words = torch.zeros(tiles, groups * bits, TILE, 4, dtype=torch.uint8)
        self.words = nn.Parameter(words, requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(tiles, groups, TILE, dtype=torch.bfloat16), requires_grad=False)

    @property
    def in_size(self) -> int:
        """Inputs of a row."""
        return self.shape[-1]

    @property
    def out_size(self) -> int:
        """Outputs, of one expert."""
        return self.shape[-2]

    @property
    def num_tiles(self) -> int:
        """Tiles of one expert."""
        return _count(self.out_size, TILE)

    def dim(self) -> int:
        """Of the matrix, not of its memory."""
        return len(self.shape)

    def numel(self) -> int:
        """Weights of the matrix."""
        return self.shape.numel()

    def expert(self, index: int) -> "QuantizedWeight":
        """The matrix of one expert, in the same memory."""
        tiles = slice(index * self.num_tiles, (index + 1) * self.num_tiles)
        return self._part(self.words[tiles], self.scales[tiles], self.shape[-2:], 0)

    def outputs(self, first: int, end: int) -> "QuantizedWeight":
        """The outputs from `first` to `end`, in the same memory."""
        return self._part(self.words, self.scales, (end - first, self.in_size), self.first + first)

    def _part(self, words: Tensor, scales: Tensor, shape: tuple[int, ...], first: int) -> "QuantizedWeight":
        part = QuantizedWeight((0, self.in_size), self.bits, self.dtype)
        part.shape, part.first = torch.Size(shape), first
        part.words, part.scales = (nn.Parameter(tensor, requires_grad=False) for tensor in (words, scales))
        return part

    @torch.no_grad()
    def store(self, rows: Tensor, values: Tensor) -> None:
        """Put values [R, in], any float dtype, in place of the weights of rows [R] int64, counted over all experts."""
        step = max(1, _STORED_WEIGHTS // self.in_size)
        for part, part_values in zip(rows.split(step), values.split(step), strict=True):
            self._store(part, part_values)

    def _store(self, rows: Tensor, values: Tensor) -> None:
        tiles, lanes = self._places(rows)
        library = None if self.words.is_meta else load_library()
        if library is None:
            quantized = quantize_weights(values, self.bits)
            self._packed[tiles, :, lanes] = _pack(quantized.numbers, self.bits)
            self.scales.data[tiles, :, lanes] = quantized.scales
            return
        inputs = (values.float().contiguous(), tiles * TILE + lanes, self.words, self.scales)
        pointers = (tensor.data_ptr() for tensor in inputs)
        library.store_quantized_float32(*pointers, self.bits, len(rows), self.in_size, torch.get_num_threads())

    @torch.no_grad()
    def fill_randomly(self, generator: torch.Generator) -> None:
        """Numbers of all sizes, under scales that leave outputs as large as inputs."""
        self.words.random_(0, 256, generator=generator)
        self.scales.fill_((12 / self.in_size) ** 0.5 / 2**self.bits)

    def load(self, rows: Tensor) -> Quantized:
        """The numbers and scales of rows [R] int64."""
        tiles, lanes = self._places(rows)
        return Quantized(_unpack(self._packed[tiles, :, lanes], self.bits), self.scales.data[tiles, :, lanes])

    def dequantize(self, rows: Tensor) -> Tensor:
        """The weights of rows [...] int64: [..., in]."""
        numbers, scales = self.load(rows.flatten())
        values = numbers.float().unflatten(1, (-1, GROUP)) * scales.float()[..., None]
        return values.flatten(1)[:, : self.in_size].to(self.dtype).view(*rows.shape, self.in_size)

    @property
    def _packed(self) -> Tensor:
        """The words [tiles, in / n, TILE] as int32, in the same memory."""
        return self.words.data.view(torch.int32).squeeze(-1)

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        output = rows % self.out_size + self.first
        return rows // self.out_size * self.num_tiles + output // TILE, output % TILE


Weight = Tensor | QuantizedWeight


def quantize_weights(values: Tensor, bits: int) -> Quantized:
    """values [R, in] -> the nearest numbers at a scale that the largest of a group sets. Of int4 it becomes -8."""
    groups = _by_group(values)
    low, high = (extreme.unsqueeze(-1) for extreme in groups.aminmax(dim=-1))
    scales = (torch.maximum(high, -low) / 127 if bits == 8 else torch.where(high > -low, high, low) / -8).bfloat16()
    numbers = groups.div(torch.where(scales == 0, 1, scales).float()).round_()
    numbers = numbers.clamp_(-127 if bits == 8 else -8, 127 if bits == 8 else 7)
    return Quantized(numbers.to(torch.int8).flatten(1), scales.squeeze(-1))


def quantize_rows(values: Tensor) -> Quantized:
    """values [N, in] -> numbers of 8 bits with scales in float32. A group with a NaN or infinity has such a scale."""
    groups = _by_group(values)
    largest = groups.abs().amax(-1, keepdim=True)
    numbers = (groups * torch.where(largest > 0, 127 / largest, 0)).round().clamp(-127, 127)
    poison = (groups * 0).sum(-1)
    return Quantized(numbers.nan_to_num().to(torch.int8).flatten(1), largest.squeeze(-1) / 127 + poison)


def quantized_linear(x: Tensor, weight: QuantizedWeight, rounds: bool = True) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out], summed in float32, and in x's dtype if it `rounds`. There are no
    gradients."""
    library = load_library()
    if library is None:
        return quantized_linear_torch(x, weight, rounds)
    inputs = x.detach().float().contiguous()
    out = torch.empty(*x.shape[:-1], weight.out_size)
    num_rows = inputs.numel() // weight.in_size
    sizes = (weight.bits, weight.first, num_rows, weight.in_size, weight.out_size)
    num_threads = torch.get_num_threads() if num_rows * weight.numel() >= _PARALLEL_PRODUCTS else 1
    pointers = (tensor.data_ptr() for tensor in (inputs, weight.words, weight.scales, out))
    library.quantized_linear_float32(*pointers, *sizes, num_threads)
    return out.to(x.dtype) if rounds else out


def quantized_linear_torch(x: Tensor, weight: QuantizedWeight, rounds: bool = True) -> Tensor:
    """The law: see `quantized_linear`. The fused multiply-add is rounded twice, from float64 the second time."""
    rows = quantize_rows(x.detach().reshape(-1, weight.in_size))
    parts = torch.arange(weight.out_size).split(_LAW_OUTPUTS)
    out = torch.cat([_multiply(rows, weight.load(part)) for part in parts], dim=-1)
    out = out.view(*x.shape[:-1], weight.out_size)
    return out.to(x.dtype) if rounds else out


def _multiply(rows: Quantized, weight: Quantized) -> Tensor:
    """[N, R] in float32. Sums of a group are below 2^24, so float32 has them whole in any order."""
    total = torch.zeros(len(rows.numbers), len(weight.numbers))
    for group in range(rows.scales.shape[1]):
        span = slice(group * GROUP, (group + 1) * GROUP)
        sums = F.linear(rows.numbers[:, span].float(), weight.numbers[:, span].float())
        scale = rows.scales[:, group, None] * weight.scales[:, group].float()
        total = (total.double() + sums.double() * scale.double()).float()
    return total


def _by_group(values: Tensor) -> Tensor:
    """[R, in] -> [R, G, GROUP] in float32, zeros behind the last input."""
    padding = _count(values.shape[1], GROUP) * GROUP - values.shape[1]
    return F.pad(values.float(), (0, padding)).unflatten(1, (-1, GROUP))


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """[R, inputs] int8 -> words [R, inputs / n] int32."""
    unsigned = (numbers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        lower, upper = unsigned.unflatten(1, (-1, 2, 4)).unbind(2)
        unsigned = (lower | upper << 4).flatten(1)
    return unsigned.contiguous().view(torch.int32)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        quads = unsigned.unflatten(1, (-1, 4))
        unsigned = torch.stack([quads & 15, quads >> 4], dim=2).flatten(1)
    return (unsigned.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _count(size: int, part: int) -> int:
    return -(-size // part)
