"""ModelConfig -> (target, draft)."""

import torch

from models.config import ModelConfig
from models.layers.quantization import quantize_layers
from models.qwen3_5.model import Qwen35
from models.qwen3_5_moe.model import build_target as build_moe_target
from models.qwen3_5_moe_mtp.model import build_draft as build_moe_draft
from models.qwen3_5_mtp.model import Qwen35MTP


def build(
    config: ModelConfig,
    mtp: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantization: str = "none",
) -> tuple[Qwen35, Qwen35MTP | None]:
    """The target model and, with `mtp`, its draft head, with uninitialised weights, those of matrices quantized if
    wanted."""
    with torch.device(device):
        target = build_moe_target(config, dtype) if config.is_moe else Qwen35(config, dtype)
        draft_builder = build_moe_draft if config.is_moe else Qwen35MTP
        draft = draft_builder(config, dtype, target) if mtp else None
        for model in (target, draft):
            if model is not None and quantization != "none":
                quantize_layers(model, quantization)
    return target, draft
