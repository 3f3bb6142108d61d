"""What is installed is told; what is not is left out."""

import importlib.metadata

import pytest

from server.versions import read_version, read_versions


@pytest.mark.parametrize(("installed", "version"), [({"tandem": "1.2.3"}, "1.2.3"), ({}, "0+checkout")])
def test_the_version_is_the_packages_unless_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], version: str
) -> None:
    def find(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", find)
    assert read_version() == version
    assert set(read_versions()) == {"tandem", "python"}


def test_versions_have_what_the_model_runs_on() -> None:
    assert {"tandem", "python", "torch", "tokenizers"} <= set(read_versions())
