from pathlib import Path

import pytest

from models.conversion.staging import staged
from models.errors import CheckpointError


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "out") as folder:
        (folder / "f").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "f").read_text() == "1" and len(list((tmp_path / "a").iterdir())) == 1


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    def interrupt() -> None:
        with staged(tmp_path / "out") as folder:
            (folder / "f").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_where_that_is_meant(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(CheckpointError, match="is there already"), staged(out):
        pass
    with pytest.raises(ValueError, match="x"), staged(out, replace=True):
        raise ValueError("x")
    assert (out / "old").exists()
    with staged(out, replace=True) as folder:
        (folder / "new").touch()
    assert [file.name for file in out.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1
