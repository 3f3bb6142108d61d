"""The MTP head of Qwen3.5 MoE: the dense head with sparse feed-forward layers."""

import torch

from models.config import ModelConfig
from models.qwen3_5.model import Qwen35
from models.qwen3_5_moe.model import SparseMLP
from models.qwen3_5_mtp.model import Qwen35MTP


def build_draft(config: ModelConfig, dtype: torch.dtype, target: Qwen35) -> Qwen35MTP:
    """The MoE draft model."""
    return Qwen35MTP(config, dtype, target, SparseMLP)
