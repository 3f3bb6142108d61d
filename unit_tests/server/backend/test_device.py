"""Refusals name what would work."""

import pytest
import torch

from kernels.gpu.dispatch import triton_takes
from models.cache import Backends
from server.backend import device
from server.backend.device import check_gpu, choose_backends, choose_device, within_memory
from server.config import EngineConfig
from server.errors import ConfigError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="sees no CUDA device here: use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((9, 0), ["sm_80", "sm_90a"]),
        ((8, 9), ["sm_75", "sm_86", "sm_120"]),
        ((8, 0), ["sm_80"]),
        ((12, 0), ["sm_120"]),
        ((10, 3), ["sm_90", "compute_90"]),
    ],
)
def test_a_gpu_that_torch_was_built_for_is_taken(capability: tuple[int, int], built_for: list[str]) -> None:
    check_gpu("Some GPU", capability, built_for)


@pytest.mark.parametrize(
    ("capability", "built_for", "message"),
    [
        ((7, 5), ["sm_75"], "the GPU Old GPU has compute capability 7.5, at least 8.0 is needed: use --device cpu"),
        ((9, 0), ["sm_80", "sm_89"], "built for sm_80 sm_89, the GPU Old GPU is sm_90"),
        ((8, 0), ["sm_86", "sm_90"], "built for sm_86 sm_90, the GPU Old GPU is sm_80"),
    ],
)
def test_a_gpu_that_cannot_run_this_is_refused(capability: tuple[int, int], built_for: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_gpu("Old GPU", capability, built_for)
    assert "\n" not in str(caught.value)


def test_backends_are_torch_on_a_cpu_and_triton_where_it_can_run() -> None:
    config = EngineConfig()
    assert choose_backends(config, "cpu", torch.float32) == Backends("torch", "torch")
    with triton_takes("cpu"):
        assert choose_backends(config, "cpu", torch.bfloat16) == Backends("triton", "triton")
        assert choose_backends(config, "cpu", torch.float64) == Backends("torch", "torch")
        mixed = EngineConfig(attention_backend="torch", gdn_backend="triton")
        assert choose_backends(mixed, "cpu", torch.float32) == Backends("torch", "triton")


@pytest.mark.parametrize("flag", ["attention_backend", "gdn_backend"])
def test_triton_that_cannot_run_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(**{flag: "triton"})  # type: ignore[arg-type]
    name = flag.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{name} is triton, but Triton's kernels do not run on the cpu"):
        choose_backends(config, "cpu", torch.float32)
    with triton_takes("cpu"):
        monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="Triton, which is not installed: pip install"):
            choose_backends(config, "cpu", torch.float32)


def test_running_out_of_memory_is_one_line_with_part_bytes_and_mend() -> None:
    with pytest.raises(ConfigError) as caught, within_memory("weights", 3 * 2**20, "take less"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has 80 GiB.\nSee more")
    assert caught.value.message == "out of GPU memory for weights, which takes 3.0 MiB (CUDA out of memory): take less"
    with pytest.raises(ZeroDivisionError), within_memory("weights", 1, "take less"):
        1 // 0  # noqa: B018
