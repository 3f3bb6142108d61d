"""Which versions are installed: Tandem's own, and those of what it runs on. No torch."""

import importlib.metadata
import platform

# What a checkout says that nobody has installed.
_NO_VERSION = "0+checkout"
_PACKAGES = ("torch", "triton", "flashinfer-python", "tokenizers", "xgrammar", "fastapi", "uvicorn")


def read_version() -> str:
    """The version of Tandem."""
    return _find("tandem") or _NO_VERSION


def read_versions() -> dict[str, str]:
    """Versions by package, as far as they are installed, and Python's."""
    found = {name: _find(name) for name in _PACKAGES}
    return {"tandem": read_version(), "python": platform.python_version()} | {n: v for n, v in found.items() if v}


def _find(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
