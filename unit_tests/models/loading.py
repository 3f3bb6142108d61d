"""Our models and transformers' from tiny checkpoints, for the model tests."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from models.config import load_config
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.registry import build
from models.weights import load_weights

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_ours(
    directory: Path, dtype: torch.dtype = torch.float32, mtp: bool = True, quantization: str = "none"
) -> tuple[Qwen35, Qwen35MTP]:
    """Target and draft; the draft is None without `mtp`."""
    target, draft = build(load_config(directory), mtp, dtype, quantization=quantization)
    load_weights(directory, target, draft, show_progress=False)
    target.requires_grad_(False)
    if draft is not None:
        draft.requires_grad_(False)
    return target, draft


def load_transformers(directory: Path) -> Any:
    """transformers' model of the checkpoint, by the architecture in its config, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()


def draw_ids(*shape: int, seed: int = 0, vocab_size: int = 320) -> Tensor:
    """Random token ids, int64."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def max_error(ours: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    assert ours.shape == expected.shape
    return (ours - expected).abs().nan_to_num(torch.inf).max().item()
