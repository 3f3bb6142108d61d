"""The C++ kernels of this folder as one shared library, built on first use and kept in the user's cache directory.

Without a compiler (GCC 12 or later, or clang) everything works on the torch versions, which one log line says.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCES = sorted([*Path(__file__).parent.glob("*.cpp"), *Path(__file__).parent.glob("*.h")])
_FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-fPIC", "-shared", "-fopenmp-simd", "-pthread"),
)
# Products and sums are fused in every loop or in none: a row's bits must not depend on which one it goes through. GCC
# leaves some out for processors on which that is faster, and clang obeys a pragma that forbids it only if asked to.
_COMPILERS = {
    "g++": ("-ffp-contract=fast", "--param=avoid-fma-max-bits=0"),
    "clang++": ("-ffp-contract=fast-honor-pragmas",),
}
_MAX_LINES = 10  # of what a compiler complains
_POINTER, _SIZE, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_SIGNATURES = {
    "linear": ((*[_POINTER] * 3, *[_SIZE] * 3, _COUNT), ("bfloat16", "float32", "float64")),
    "quantized_linear": ((*[_POINTER] * 4, *[_SIZE] * 5, _COUNT), ("float32",)),
    "store_quantized": ((*[_POINTER] * 4, *[_SIZE] * 3, _COUNT), ("float32",)),
    "attention": ((_POINTER, _SIZE, _SIZE, *[_POINTER] * 5, _COUNT), ("bfloat16", "float32", "float64")),
    "rms_norm": ((*[_POINTER] * 3, _SIZE, _SIZE, _REAL), ("float32", "float64")),
    "accept": ((*[_POINTER] * 7, *[_SIZE] * 3), ("int64",)),
    "draw": ((*[_POINTER] * 5, _SIZE, _SIZE, _COUNT), ("float32", "float64")),
    "mask": ((*[_POINTER] * 3, _SIZE, _SIZE, _COUNT), ("float32", "float64")),
    "penalise": ((*[_POINTER] * 4, _SIZE, *[_POINTER] * 3, _SIZE, _SIZE, _COUNT), ("float32", "float64")),
    "count_outputs": ((*[_POINTER] * 4, *[_SIZE] * 3), ("int32",)),
    "logprobs": ((*[_POINTER] * 7, *[_SIZE] * 3, _COUNT), ("float32", "float64")),
    "decoder": (
        (*[_POINTER] * 3, _SIZE, _POINTER, _POINTER, _REAL, *[_POINTER] * 5, _COUNT),
        ("bfloat16", "float32", "float64"),
    ),
    "add_norm": ((*[_POINTER] * 5, _SIZE, _SIZE, _REAL, _COUNT), ("float32",)),
    "add_norm_backward": ((*[_POINTER] * 6, _SIZE, _SIZE, _REAL, _COUNT), ("float32",)),
    "gated_norm": ((*[_POINTER] * 5, _REAL, _COUNT), ("float32",)),
    "gated_norm_backward": ((*[_POINTER] * 8, _REAL, _COUNT), ("float32",)),
    "norm_rotary": ((*[_POINTER] * 5, _REAL, _COUNT), ("float32",)),
    "norm_rotary_backward": ((*[_POINTER] * 7, _REAL, _COUNT), ("float32",)),
    "silu_and_mul": ((_POINTER, _POINTER, _SIZE, _SIZE, _COUNT), ("float32",)),
    "silu_and_mul_backward": ((*[_POINTER] * 3, _SIZE, _SIZE, _COUNT), ("float32",)),
    "convolve_heads": ((*[_POINTER] * 4, _COUNT), ("float32",)),
    "convolve_heads_backward": ((*[_POINTER] * 6, _COUNT), ("float32",)),
    "fold_recorded": ((*[_POINTER] * 6, _SIZE, _COUNT), ("float32", "float64")),
    "delta_rule": ((*[_POINTER] * 5, _COUNT), ("float32",)),
    "delta_rule_backward": ((*[_POINTER] * 5, _COUNT), ("float32",)),
}


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, built if this machine has not built these sources yet; None where that is not possible.

    Functions are named `op_dtype` and take addresses and sizes as plain integers.
    """
    compilers = {path: flags for name, flags in _COMPILERS.items() if (path := shutil.which(name))}
    if not compilers:
        logger.warning("no g++ or clang++ found: CPU decoding stays on the slower torch version")
    for compiler, flags in compilers.items():
        try:
            return _load(compiler, (*_FLAGS, *flags))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home directory
            lines = str(getattr(error, "stderr", None) or error).splitlines()[:_MAX_LINES]
            message = "the CPU kernels could not be built by %s, decoding stays on the torch version (needs GCC 12): %s"
            logger.warning(message, compiler, "\n".join(lines))
    return None


def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    path = _cache_directory() / f"tandem-{_fingerprint(compiler, flags)}.so"
    if path.exists():
        with contextlib.suppress(OSError):  # what was cut short, or made for other system libraries, is built again
            return _declare(ctypes.CDLL(str(path)))
    _build(compiler, flags, path)
    return _declare(ctypes.CDLL(str(path)))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (arguments, dtypes) in _SIGNATURES.items():
        for dtype in dtypes:
            getattr(library, f"{name}_{dtype}").argtypes = arguments
    return library


def _build(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    logger.info("building the CPU kernels (once, a few seconds)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        built = Path(directory) / path.name
        command = [
            compiler,
            *flags,
            "-o",
            str(built),
            *(str(source) for source in _SOURCES if source.suffix == ".cpp"),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        built.replace(path)  # atomic: two processes may build at once


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the flags, the compiler and the processor the code is made for."""
    about = os.stat(compiler)
    digest = hashlib.sha256(repr((compiler, about.st_size, about.st_mtime, flags)).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
        digest.update("".join(lines[:1]).encode())
    return digest.hexdigest()[:16]


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
