"""Directories that appear whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import CheckpointError


@contextmanager
def staged(out: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out`, which becomes `out` at the end; after an exception nothing of it is left.

    Raises CheckpointError where `out` is there already, unless it is to be replaced.
    """
    if not replace:
        require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.{kind}" for kind in ("partial", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def require_free(out: Path) -> None:
    """Raises CheckpointError where `out` is there already and not an empty directory."""
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out} is there already: give an --out that is not")
