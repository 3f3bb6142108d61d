"""Where a checkpoint can run, and with whose kernels. Every refusal is one line that says what would work."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kernels.gpu.dispatch import runs_triton
from models.cache import Backends
from models.config import ModelConfig
from server.config import EngineConfig
from server.errors import ConfigError

# bfloat16 arithmetic begins with Ampere.
LEAST_CAPABILITY = (8, 0)
MIB = 2**20

logger = logging.getLogger(__name__)


class OtherKernels(NamedTuple):
    """Attention kernels that are none of ours: their name, the compute capabilities that they are made for, from
    `least` to `most`, and what GPUs these are."""

    title: str
    least: tuple[int, int]
    most: tuple[int, int]
    gpus: str


# By the values of --attention-backend. Who asks for them gets Triton's wherever their own would run.
OTHER_ATTENTION = {
    "fa2": OtherKernels("FlashAttention 2", LEAST_CAPABILITY, (99, 9), "8.0 and more"),
    "flash_attn": OtherKernels("FlashAttention 2", LEAST_CAPABILITY, (99, 9), "8.0 and more"),
    "fa3": OtherKernels("FlashAttention 3", (9, 0), (9, 0), "9.0 (Hopper)"),
    "trtllm_mha": OtherKernels("TensorRT-LLM", (10, 0), (10, 9), "10.x (Blackwell of data centers)"),
}


def choose_device(name: str) -> str:
    """ "cuda" or "cpu". Raises ConfigError for a GPU that is not there or cannot run this."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, torch sees no CUDA device here: use --device cpu")
    device = "cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name
    if device == "cuda":
        check_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.get_arch_list())
    return device


def check_quantization(config: EngineConfig, device: str) -> None:
    """Raises ConfigError for quantized weights where no kernels run them."""
    if config.quantization != "none" and device != "cpu":
        raise ConfigError(
            f"--quantization is {config.quantization}, quantized weights run on a CPU only and the device is {device}: "
            "use --quantization none, or --device cpu"
        )


def check_gpu(name: str, capability: tuple[int, int], built_for: list[str]) -> None:
    """Raises ConfigError for a GPU that is too old, or that this torch was not built for."""
    major, minor = capability
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise ConfigError(
            f"the GPU {name} has compute capability {major}.{minor}, at least {least} is needed: use --device cpu"
        )
    # Code for sm_80 runs on sm_86 and sm_89, too; PTX (compute_*) on everything newer.
    of_family = [arch.removeprefix(f"sm_{major}").rstrip("af") for arch in built_for if arch.startswith(f"sm_{major}")]
    runs = any(rest.isdigit() and int(rest) <= minor for rest in of_family)
    if not runs and not any(arch.startswith("compute_") for arch in built_for):
        raise ConfigError(
            f"this torch is built for {' '.join(built_for)}, the GPU {name} is sm_{major}{minor}: install a torch "
            "build for it, or use --device cpu"
        )


@contextmanager
def within_memory(part: str, num_bytes: int, mend: str) -> Iterator[None]:
    """Turns running out of GPU memory inside into one line: what for, how much of it was wanted, what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of GPU memory for {part}, which takes {num_bytes / MIB:.1f} MiB ({_first_line(error)}): {mend}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).split(". ")[0].splitlines()[0]


def choose_backends(
    config: EngineConfig,
    model: ModelConfig,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None = None,
) -> Backends:
    """Whose kernels run attention and delta nets; the capability is the GPU's. Raises ConfigError for what cannot be
    had."""
    with torch.no_grad():
        can_run = runs_triton(torch.empty(0, dtype=dtype, device=device))
    if can_run and importlib.util.find_spec("triton") is None:
        raise ConfigError("a GPU is served with Triton, which is not installed: pip install '.[cuda]'")
    names, chosen = {"triton": "Triton", "flashinfer": "FlashInfer"}, {}
    for flag in ("attention", "gdn"):
        asked = getattr(config, f"{flag}_backend")
        if flag == "attention":
            asked = choose_attention(asked, capability)
        if asked in names and not can_run:
            where = f"{names[asked]}'s kernels do not run on the {device}"
            reason = "float64 is torch's alone" if device == "cuda" else where
            raise ConfigError(f"--{flag}-backend is {asked}, but {reason}: use --{flag}-backend torch, or auto")
        if asked == "flashinfer":
            _check_flashinfer(flag, model, dtype, capability)
        if flag == "attention" and asked != "torch" and can_run and not _serves_heads(model.head_dim):
            raise ConfigError(
                f"the checkpoint's attention heads have {model.head_dim} dimensions, Triton's kernels serve powers of "
                "two from 16 on: use --attention-backend torch"
            )
        chosen[flag] = "torch" if not can_run else "triton" if asked == "auto" else asked
    return Backends(**chosen)


def choose_attention(asked: str, capability: tuple[int, int] | None) -> str:
    """The value of --attention-backend by our own name: auto, triton, flashinfer or torch. `capability` is None without
    a GPU. Raises ConfigError for other kernels than ours where these would not run either."""
    if asked == "torch_native":
        return "torch"
    if (other := OTHER_ATTENTION.get(asked)) is None:
        return asked
    if capability is None or not other.least <= capability <= other.most:
        seen = "there is no GPU" if capability is None else "the GPU's is {}.{}".format(*capability)
        raise ConfigError(
            f"--attention-backend is {asked}, {other.title}'s kernels are for compute capability {other.gpus}, and "
            f"{seen}: use --attention-backend auto"
        )
    logger.warning("--attention-backend is %s: Triton's kernels serve in place of %s's", asked, other.title)
    return "triton"


def _serves_heads(head_dim: int) -> bool:
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def _check_flashinfer(flag: str, model: ModelConfig, dtype: torch.dtype, capability: tuple[int, int] | None) -> None:
    """Raises ConfigError where FlashInfer cannot run the prefill of the layers that `flag` is about."""
    from kernels.gpu.flashinfer import DELTA_CAPABILITY, DELTA_DIM, HEAD_DIMS  # needs Triton

    delta_dims = (model.delta_key_dim, model.delta_value_dim)
    if importlib.util.find_spec("flashinfer") is None:
        reason = "which is not installed: pip install flashinfer-python, or"
    elif dtype != torch.bfloat16:
        reason = f"whose kernels take bfloat16, the dtype is {str(dtype).removeprefix('torch.')}: set --dtype, or"
    elif flag == "attention" and model.head_dim not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        reason = f"whose heads have {dims} dimensions, the checkpoint's have {model.head_dim}:"
    elif flag == "gdn" and capability != DELTA_CAPABILITY:
        needed, seen = (".".join(map(str, pair or ("none",))) for pair in (DELTA_CAPABILITY, capability))
        reason = f"whose kernel is for compute capability {needed}, the GPU's is {seen}:"
    elif flag == "gdn" and delta_dims != (DELTA_DIM, DELTA_DIM):
        reason = f"whose heads have {DELTA_DIM} dimensions, the checkpoint's have {delta_dims[0]} and {delta_dims[1]}:"
    else:
        return
    raise ConfigError(f"--{flag}-backend is flashinfer, {reason} use --{flag}-backend triton")
