"""Refusals name what would work."""

from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from kernels.gpu.dispatch import triton_takes
from models.cache import Backends
from models.config import ModelConfig, parse_config
from server.backend import device
from server.backend.device import (
    check_gpu,
    check_quantization,
    choose_attention,
    choose_backends,
    choose_device,
    within_memory,
)
from server.config import EngineConfig
from server.errors import ConfigError
from unit_tests.checkpoints import make_config

MODEL = parse_config(make_config())
LARGE = replace(MODEL, head_dim=256, delta_key_dim=128, delta_value_dim=128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="sees no CUDA device here: use --device cpu"):
        choose_device("cuda")


def test_quantized_weights_are_refused_on_a_gpu() -> None:
    check_quantization(EngineConfig(quantization="int8"), "cpu")
    check_quantization(EngineConfig(), "cuda")
    with pytest.raises(ConfigError, match=r"--quantization is int8, .* run on a CPU only and the device is cuda: use"):
        check_quantization(EngineConfig(quantization="int8"), "cuda")


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
    assert choose_backends(config, MODEL, "cpu", torch.float32) == Backends("torch", "torch")
    with triton_takes("cpu"):
        assert choose_backends(config, MODEL, "cpu", torch.bfloat16) == Backends("triton", "triton")
        assert choose_backends(config, MODEL, "cpu", torch.float64) == Backends("torch", "torch")
        mixed = EngineConfig(attention_backend="torch", gdn_backend="triton")
        assert choose_backends(mixed, MODEL, "cpu", torch.float32) == Backends("torch", "triton")


# By compute capability: whose kernels serve each value of --attention-backend; what is not there is refused.
ANY_GPU = {"auto": "triton", "triton": "triton", "flashinfer": "flashinfer", "torch": "torch", "torch_native": "torch"}
ANY_GPU |= {"fa2": "triton", "flash_attn": "triton"}
ATTENTION: dict[tuple[int, int] | None, dict[str, str]] = {
    (8, 0): ANY_GPU,
    (8, 6): ANY_GPU,
    (8, 9): ANY_GPU,
    (9, 0): ANY_GPU | {"fa3": "triton"},
    (10, 0): ANY_GPU | {"trtllm_mha": "triton"},
    (10, 3): ANY_GPU | {"trtllm_mha": "triton"},
    (12, 0): ANY_GPU,
    None: {"auto": "torch", "torch": "torch", "torch_native": "torch"},
}
(ATTENTION_CHOICES,) = (
    setting.metadata["choices"] for setting in fields(EngineConfig) if setting.name == "attention_backend"
)


@pytest.mark.parametrize("asked", ATTENTION_CHOICES)
@pytest.mark.parametrize("capability", ATTENTION)
def test_every_gpu_serves_the_names_of_recipes_or_refuses_them_at_start(
    capability: tuple[int, int] | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_installed(monkeypatch, "triton", "flashinfer")
    config, expected = EngineConfig(attention_backend=asked), ATTENTION[capability].get(asked)
    with nullcontext() if capability is None else triton_takes("cpu"):
        if expected is not None:
            chosen = choose_backends(config, LARGE, "cpu", torch.bfloat16, capability)
            assert chosen == Backends(expected, "torch" if capability is None else "triton")
            return
        with pytest.raises(ConfigError, match=f"^--attention-backend is {asked}, .*: use --attention-backend .*auto$"):
            choose_backends(config, LARGE, "cpu", torch.bfloat16, capability)


@pytest.mark.parametrize(
    ("asked", "capability", "message"),
    [
        ("fa3", (8, 9), "FlashAttention 3's kernels are for compute capability 9.0 (Hopper), and the GPU's is 8.9"),
        ("fa3", (10, 0), "FlashAttention 3's kernels are for compute capability 9.0 (Hopper), and the GPU's is 10.0"),
        ("fa3", None, "FlashAttention 3's kernels are for compute capability 9.0 (Hopper), and there is no GPU"),
        ("trtllm_mha", (12, 0), "for compute capability 10.x (Blackwell of data centers), and the GPU's is 12.0"),
        ("flash_attn", None, "FlashAttention 2's kernels are for compute capability 8.0 and more, and there is no GPU"),
    ],
)
def test_kernels_made_for_another_gpu_are_refused_with_what_works(
    asked: str, capability: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_attention(asked, capability)
    assert caught.value.message.startswith(f"--attention-backend is {asked}, ")
    assert caught.value.message.endswith(f"{message}: use --attention-backend auto")


def test_one_line_says_whose_kernels_serve_in_place_of_others(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_attention("fa3", (9, 0)) == "triton"
    assert choose_attention("triton", (9, 0)) == "triton"
    assert caplog.messages == ["--attention-backend is fa3: Triton's kernels serve in place of FlashAttention 3's"]


def set_installed(patch: pytest.MonkeyPatch, *installed: str) -> None:
    spec = device.importlib.util.find_spec  # type: ignore[attr-defined]
    patch.setattr(
        device.importlib.util,  # type: ignore[attr-defined]
        "find_spec",
        lambda name: (object() if name in installed else None) if name in ("triton", "flashinfer") else spec(name),
    )


@pytest.mark.parametrize("flag", ["attention_backend", "gdn_backend"])
@pytest.mark.parametrize(("backend", "owner"), [("triton", "Triton"), ("flashinfer", "FlashInfer")])
def test_a_backend_that_cannot_run_is_refused(
    flag: str, backend: str, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(**{flag: backend})  # type: ignore[arg-type]
    name = flag.replace("_", "-")
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ConfigError, match=f"--{name} is {backend}, but {owner}'s kernels do not run on the cpu"):
            choose_backends(config, MODEL, "cpu", dtype)
    with triton_takes("cpu"):
        set_installed(monkeypatch)
        with pytest.raises(ConfigError, match="Triton, which is not installed: pip install"):
            choose_backends(config, MODEL, "cpu", torch.float32)


def test_flashinfer_is_taken_where_it_is_asked_for_and_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    set_installed(monkeypatch, "triton", "flashinfer")
    with triton_takes("cpu"):
        for attention, gdn, capability in (
            ("flashinfer", "flashinfer", (9, 0)),
            ("flashinfer", "auto", (8, 9)),
            ("torch", "flashinfer", (9, 0)),
            ("auto", "auto", (9, 0)),
        ):
            config = EngineConfig(attention_backend=attention, gdn_backend=gdn)
            expected = Backends(*(name.replace("auto", "triton") for name in (attention, gdn)))
            assert choose_backends(config, LARGE, "cpu", torch.bfloat16, capability) == expected


@pytest.mark.parametrize(
    ("flag", "model", "dtype", "capability", "message"),
    [
        ("attention", MODEL, torch.bfloat16, (9, 0), "64, 128, 256 dimensions, the checkpoint's have 32: use"),
        ("attention", LARGE, torch.float32, (9, 0), "take bfloat16, the dtype is float32: set --dtype, or use"),
        ("gdn", LARGE, torch.float32, (9, 0), "take bfloat16, the dtype is float32: set --dtype, or use"),
        ("gdn", MODEL, torch.bfloat16, (9, 0), "128 dimensions, the checkpoint's have 16 and 24: use"),
        ("gdn", LARGE, torch.bfloat16, (8, 9), "for compute capability 9.0, the GPU's is 8.9: use"),
        ("gdn", LARGE, torch.bfloat16, (10, 0), "for compute capability 9.0, the GPU's is 10.0: use"),
        ("gdn", LARGE, torch.bfloat16, None, "for compute capability 9.0, the GPU's is none: use"),
    ],
)
def test_flashinfer_that_cannot_serve_the_model_is_refused(
    flag: str,
    model: ModelConfig,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EngineConfig(**{f"{flag}_backend": "flashinfer"})  # type: ignore[arg-type]
    set_installed(monkeypatch, "triton", "flashinfer")
    with (
        triton_takes("cpu"),
        pytest.raises(ConfigError, match=f"--{flag}-backend is flashinfer, .*{message}") as caught,
    ):
        choose_backends(config, model, "cpu", dtype, capability)
    assert caught.value.message.endswith(f"use --{flag}-backend triton")


@pytest.mark.parametrize("flag", ["attention", "gdn"])
def test_flashinfer_that_is_not_installed_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(**{f"{flag}_backend": "flashinfer"})  # type: ignore[arg-type]
    set_installed(monkeypatch, "triton")
    with triton_takes("cpu"), pytest.raises(ConfigError) as caught:
        choose_backends(config, LARGE, "cpu", torch.bfloat16, (9, 0))
    assert caught.value.message == (
        f"--{flag}-backend is flashinfer, which is not installed: pip install flashinfer-python, or use "
        f"--{flag}-backend triton"
    )


def test_running_out_of_memory_is_one_line_with_part_bytes_and_mend() -> None:
    with pytest.raises(ConfigError) as caught, within_memory("weights", 3 * 2**20, "take less"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has 80 GiB.\nSee more")
    assert caught.value.message == "out of GPU memory for weights, which takes 3.0 MiB (CUDA out of memory): take less"
    with pytest.raises(ZeroDivisionError), within_memory("weights", 1, "take less"):
        1 // 0  # noqa: B018


def test_heads_that_tritons_attention_does_not_serve_are_refused() -> None:
    odd = replace(MODEL, head_dim=48)
    with triton_takes("cpu"):
        with pytest.raises(ConfigError, match=r"heads have 48 dimensions, .* use --attention-backend torch"):
            choose_backends(EngineConfig(), odd, "cpu", torch.float32)
        chosen = choose_backends(EngineConfig(attention_backend="torch"), odd, "cpu", torch.float32)
        assert chosen == Backends("torch", "triton")
