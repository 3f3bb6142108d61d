"""What the machine has and gives, measured beside the benchmark: bandwidth of its memory, and bytes in use."""

import ctypes
import gc
import statistics
import time
from pathlib import Path

import torch

_READ_BYTES = 2**29  # more than any cache holds
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class BandwidthProbe:
    """Reads a large buffer now and then, between what else is measured."""

    def __init__(self, device: str, num_bytes: int = _READ_BYTES):
        self._buffer = torch.ones(num_bytes // 4, device=device)
        self._seconds: list[float] = []
        self._read()
        self.read()

    def read(self) -> None:
        """Once, timed."""
        self._seconds.append(self._read())

    @property
    def bytes_per_second(self) -> float:
        """Median of all reads."""
        return self._buffer.nbytes / statistics.median(self._seconds)

    def _read(self) -> float:
        start = time.perf_counter()
        self._buffer.sum().item()
        return time.perf_counter() - start


def free_memory(device: str) -> int:
    """Bytes that can be had now, on the GPU or on the machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _read_field(Path("/proc/meminfo"), "MemAvailable")


def used_memory(device: str) -> int:
    """Bytes that this process has now, on the GPU or resident; what was freed before is handed back first."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
    return _read_field(_STATUS, "VmRSS")


def reset_peak(device: str) -> None:
    """Begin anew to look for the most."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR.write_text("5")  # see proc(5)


def peak_memory(device: str) -> int:
    """The most bytes that this process had since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _read_field(_STATUS, "VmHWM")


def _read_field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
