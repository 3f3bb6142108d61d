"""What the card gives, and how long work on it takes: CUDA graphs timed by events, with the caches emptied before.

Whatever is CUDA's alone stands here, so that the rest of the suite also runs where there is none.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from subprocess import SubprocessError
from typing import Any

import torch
from triton.errors import TritonError

# What may go wrong in a measurement without ending the suite: memory, compilers, libraries with another interface.
FAILURES = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError, OSError),
    *(ArithmeticError, SubprocessError, TritonError),
)
_L2_BYTES = 64 * 2**20  # where torch does not tell
_COPY_BYTES, _MATMUL_SIZE = 2**31, 8192


@dataclass(frozen=True)
class CardSpeed:
    """Measured: bytes per second of a copy (read and written) or a sum (read), the faster of both; bfloat16 operations
    per second of a large product; seconds that an empty graph takes between two events, which every time here
    contains."""

    bandwidth: float
    matmul_rate: float
    empty_seconds: float

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Timer:
    """Times functions on the device. `capture` makes a function's repetition: see `capture_graph`."""

    def __init__(self, device: str = "cuda"):
        self.device = device
        num_bytes = 4 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", _L2_BYTES)
        self._flush = torch.zeros(num_bytes // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def seconds(self, function: Callable[[], object], rounds: int = 20) -> float:
        """Median of one call, without what the host does and with nothing in the L2 cache."""
        replay = capture_graph(function)[0]
        return statistics.median(time_rounds(replay, rounds, self._empty_cache))

    def _empty_cache(self) -> None:
        # Reading leaves nothing to be written back later; it also takes longer than launching what is timed.
        torch.sum(self._flush, 0, out=self._sum)


def capture_graph(function: Callable[[], object], pool: Any = None) -> tuple[Callable[[], None], Any, int]:
    """What repeats the function, its results' place, and the bytes that its graph keeps. The function runs twice."""
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
    # A stream of its own: what libraries keep per stream must not end with another graph.
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream()):
        results = function()
    return graph.replay, results, torch.cuda.memory_reserved() - before


def time_rounds(
    function: Callable[[], object], rounds: int, prepare: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each of so many calls on the device, after two to warm up; `prepare` runs before each, untimed."""
    events = []
    for _ in range(rounds + 2):
        prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events[2:]]


def measure_card(device: str = "cuda") -> CardSpeed:
    """Needs 4 GiB of memory."""
    timer = Timer(device)
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = timer.seconds(lambda: target.copy_(source), rounds=30)
    total = torch.zeros((), device=device)
    read = timer.seconds(lambda: torch.sum(source, 0, out=total), rounds=30)
    left, right = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)
    product = timer.seconds(lambda: torch.mm(left, right, out=out), rounds=30)
    nothing = torch.zeros(1, device=device)
    empty = timer.seconds(lambda: nothing.zero_())
    return CardSpeed(max(2 * _COPY_BYTES / copy, _COPY_BYTES / read), 2 * _MATMUL_SIZE**3 / product, empty)


def speed_row(num_bytes: float, num_flops: float, seconds: float, card: CardSpeed) -> dict[str, float]:
    """Bytes and operations per second, and the share of the time that the card's own limits would need."""
    least = max(num_bytes / card.bandwidth, num_flops / card.matmul_rate)
    return {
        "us": 1e6 * seconds,
        "gb_s": num_bytes / seconds / 1e9,
        "tflop_s": num_flops / seconds / 1e12,
        "share": least / seconds,
    }
