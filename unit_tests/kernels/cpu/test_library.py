import logging
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
