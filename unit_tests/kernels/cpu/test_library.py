import logging
import shutil
from pathlib import Path

import pytest

from kernels.cpu import library


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


def test_it_is_built_once_and_then_only_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load_library() is None:
        pytest.skip("this machine has no C++ compiler")
    (built,) = (tmp_path / "tandem").iterdir()
    library.load_library.cache_clear()
    monkeypatch.setattr(library, "_build", lambda *_: pytest.fail("built twice"))
    assert library.load_library() is not None and list((tmp_path / "tandem").iterdir()) == [built]


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_file_that_cannot_be_loaded_is_built_again(content: bytes, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("this machine has no g++")
    flags = (*library._FLAGS, *library._COMPILERS["g++"])
    kept = tmp_path / "tandem" / f"tandem-{library._fingerprint(compiler, flags)}.so"
    kept.parent.mkdir()
    kept.write_bytes(content)
    assert library.load_library() is not None and kept.stat().st_size > 10_000


def test_the_second_compiler_is_asked_where_the_first_one_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if library.load_library() is None:
        pytest.skip("this machine has no C++ compiler")
    library.load_library.cache_clear()
    places = {"old": shutil.which("false"), **{name: shutil.which(name) for name in library._COMPILERS}}
    monkeypatch.setattr(library, "_COMPILERS", {"old": (), **library._COMPILERS})
    monkeypatch.setattr(library.shutil, "which", places.get)
    assert library.load_library() is not None
    assert len(caplog.records) == 1 and "could not be built by" in caplog.text


def test_without_a_home_torch_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def find() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(library.Path, "home", find)
    assert library.load_library() is None
    assert "home directory" in caplog.text or "no g++" in caplog.text


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert library.load_library() is None
        assert library.load_library() is None
    assert len(caplog.records) == 1 and "torch version" in caplog.text


def test_a_build_that_fails_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_FLAGS", ("--no-such-flag",))
    assert library.load_library() is None
    assert len(caplog.records) == 1 and "could not be built" in caplog.text
