"""Presets have the published sizes, and one that does not fit is refused with the bytes."""

import shutil
from types import SimpleNamespace

import pytest

from benchmarks.random_checkpoint import count_weights, make_config, writing_bytes
from benchmarks.static_throughput import presets
from benchmarks.static_throughput.presets import PRESET_NAMES, Preset, TooLarge, open_preset

# Billions of weights without the MTP layer, from the published dimensions.
PUBLISHED = {
    "0.8B": 0.752,
    "2B": 1.882,
    "4B": 4.206,
    "9B": 8.954,
    "27B": 26.90,
    "35B-A3B": 34.66,
    "122B-A10B": 122.1,
    "397B-A17B": 396.3,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_presets_have_as_many_weights_as_the_published_checkpoints(name: str, billions: float) -> None:
    assert name in PRESET_NAMES and count_weights(make_config(name)) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_demo_is_a_preset_of_its_own_tokens() -> None:
    with open_preset("demo", 3, "cpu") as preset:
        assert not preset.is_random and (preset.directory / "model.safetensors").exists()
        assert preset.dimensions.hidden == preset.config["hidden_size"] and preset.num_weights > 1e6


def test_a_random_checkpoint_is_there_as_long_as_it_is_open(nano: Preset) -> None:
    with open_preset("nano", 2, "cpu") as preset:
        assert preset.is_random and preset.dtype == "float32" and preset.num_weights == nano.num_weights
        directory = preset.directory
        assert (directory / "model.safetensors").stat().st_size > 4 * preset.num_weights
    assert not directory.exists()


@pytest.mark.parametrize(
    ("num_engines", "mend"), [(3, "fewer --mtp-steps, no comparison, or a smaller preset"), (1, "a smaller preset")]
)
def test_what_does_not_fit_in_memory_is_refused_with_the_bytes(
    num_engines: int, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "free_memory", lambda device: 50 * 2**30)
    weights = 2 * count_weights(make_config("27B"), has_mtp=True)
    message = f"{weights} bytes .*{num_engines} engines .*{50 * 2**30} bytes .*: give {mend}$"
    with pytest.raises(TooLarge, match=message), open_preset("27B", num_engines, "cpu"):
        pass


def test_what_fits_but_cannot_be_drawn_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    room = writing_bytes(make_config("4B"))
    assert 2 * count_weights(make_config("4B"), has_mtp=True) < room - 1
    monkeypatch.setattr(presets, "free_memory", lambda device: room - 1)
    with (
        pytest.raises(TooLarge, match=f"{room} while they are drawn, and {room - 1} are free"),
        open_preset("4B", 1, "cpu"),
    ):
        pass


def test_what_does_not_fit_on_the_disk_is_refused_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "free_memory", lambda device: 2**50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(TooLarge, match=f"{2**20} free: set TMPDIR"), open_preset("397B-A17B", 1, "cpu"):
        pass
