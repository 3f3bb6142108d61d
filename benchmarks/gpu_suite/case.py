"""A kernel case: an operation on random inputs, its law on copies of them, and what it must move and multiply."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_suite.bytes import Moved
from benchmarks.gpu_suite.dimensions import Dimensions

WORST = 1e9  # what is infinitely wrong is reported as
# By the dtype of a setting: the most that a value may be off, in units of itself plus the root mean square of its
# tensor or row, whichever is larger.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Setting:
    """What a case is made for: B = batch requests with T = num_tokens each behind `context` ones, in `dtype`, on
    `device`. `is_ragged`: each has fewer behind it, and the prompts of a prefill are of different lengths."""

    model: str
    sizes: Dimensions
    batch: int
    num_tokens: int
    dtype: torch.dtype
    device: str = "cuda"
    context: int = 2048
    is_ragged: bool = False
    prefill_tokens: int = 2048
    page_size: int = 16

    @property
    def rows(self) -> int:
        """B · T."""
        return self.batch * self.num_tokens

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return self.dtype.itemsize

    def key(self, op: str) -> dict[str, Any]:
        """What names a case of this setting in a table."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"op": op, "model": self.model, "batch": self.batch, "tokens": self.num_tokens, "dtype": dtype}

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Random values, new ones at every call."""
        return (torch.randn(shape, device=self.device) * scale).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in low..high - 1."""
        return torch.randint(low, high, shape, device=self.device)

    def row_ids(self) -> Tensor:
        """Rows 1..B of a table, in this order."""
        return torch.arange(1, self.batch + 1, device=self.device)

    def start_lens(self) -> Tensor:
        """Tokens in the cache of each request [B]."""
        if self.is_ragged:
            return self.integers(8, self.context + 1, self.batch)
        return torch.full((self.batch,), self.context, device=self.device)

    def prompt_lens(self) -> list[int]:
        """Of a prefill of about prefill_tokens in all, one or more tokens each."""
        share = max(1, self.prefill_tokens // self.batch)
        if self.is_ragged:
            return (1 + torch.randint(0, 2 * share, (self.batch,))).tolist()
        return [share] * self.batch


def alone(result: Tensor) -> Sequence[Tensor]:
    """Nothing but what the operation returns, one tensor."""
    return [result]


@dataclass(frozen=True)
class Case:
    """`run` is the Triton operation, what is timed; `read` makes of what it returns the results to compare, with
    whatever it changed in place. `law` gives the same of torch, on memory of its own. `slack`: the share of integers
    that may differ. `peers`: others that do the same, or less."""

    op: str
    setting: Setting
    run: Callable[[], Any]
    read: Callable[[Any], Sequence[Tensor]]
    law: Callable[[], Sequence[Tensor]]
    moved: Moved
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    slack: float = 0.0

    @property
    def key(self) -> dict[str, Any]:
        """What names the case in a table."""
        return self.setting.key(self.op)


def check(case: Case) -> dict[str, Any]:
    """Run the case once in poisoned memory and compare: `ok`, and the largest error of all results."""
    with torch.no_grad(), _PoisonedMemory():
        results = list(case.read(case.run()))
    # Kernels take no part where gradients are on: what the law calls is torch as well.
    with torch.enable_grad():
        expected = list(case.law())
    errors = [
        compare(one, other, TOLERANCES[case.setting.dtype], case.slack)
        for one, other in zip(results, expected, strict=True)
    ]
    return {**case.key, "ok": max(errors) <= 1, "error": min(max(errors), WORST)}


def compare(result: Tensor, expected: Tensor, tolerance: float, slack: float = 0.0) -> float:
    """How far both are apart, in units of what is allowed; infinite for NaN or another shape."""
    if result.shape != expected.shape:
        return math.inf
    if not result.is_floating_point():
        share = (result != expected).float().mean().item() if result.numel() else 0.0
        return share / slack if slack else (0.0 if share == 0 else math.inf)
    if not result.numel():
        return 0.0
    result, expected = result.float(), expected.float()
    # A row may be larger than most: what few keys give to attention, for example, is not averaged away.
    squares = expected.square()
    size = torch.maximum(squares.mean(), squares.mean(-1, keepdim=True)).sqrt()
    error = ((result - expected).abs() / (expected.abs() + size + 1e-20)).max().item()
    return error / tolerance if math.isfinite(error) else math.inf


class _PoisonedMemory:
    """Inside, new tensors without contents are full of NaN, or of the largest integer."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
