"""Weight stores of tiny checkpoints, and tensors for their sessions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import load_config
from models.registry import build
from models.weight_store import WeightStore
from models.weight_update import TensorSpec, UpdateReport, combine_checksums, hash_tensor
from unit_tests.checkpoints import make_checkpoint, make_config, make_tensors


def load_store(
    directory: Path, dtype: torch.dtype = torch.float32, mtp: bool = True, quantization: str = "none"
) -> WeightStore:
    """The models of a checkpoint, loaded through their store."""
    target, draft = build(load_config(directory), mtp, dtype, quantization=quantization)
    for model in (target, draft):
        if model is not None:
            model.requires_grad_(False)
    store = WeightStore(target, draft, is_quantized=quantization != "none")
    store.load(directory, show_progress=False)
    return store


def make_store(directory: Path, served: torch.dtype = torch.float32, mtp: bool = True, **options: Any) -> WeightStore:
    """The same of a new tiny checkpoint with 4 layers."""
    return load_store(make_checkpoint(directory, num_layers=4, **options), served, mtp)


def draw_tensors(seed: int = 1, **options: Any) -> dict[str, Tensor]:
    """All tensors of such a checkpoint."""
    return make_tensors(make_config(num_layers=4, **options), seed=seed)


def describe(tensors: Mapping[str, Tensor], hashed: bool = True) -> list[TensorSpec]:
    """What is declared of them."""
    return [
        TensorSpec(
            name, str(value.dtype).removeprefix("torch."), tuple(value.shape), hash_tensor(value) if hashed else ""
        )
        for name, value in tensors.items()
    ]


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of all of them."""
    return combine_checksums({name: hash_tensor(value) for name, value in tensors.items()})


def update(store: WeightStore, weights: Mapping[str, Tensor], **terms: Any) -> UpdateReport:
    """A whole session."""
    session = store.begin(**terms)
    for name, value in weights.items():
        session.add(name, value)
    session.prepare()
    report = session.commit()
    session.close()
    return report


def parameters(store: WeightStore) -> list[Tensor]:
    """All memory of the models' weights."""
    models = [model for model in (store.target, store.draft) if model is not None]
    return [tensor.data for model in models for tensor in model.parameters()]


def are_equal(store: WeightStore, other: WeightStore) -> bool:
    """Whether both serve the same bits."""
    pairs = zip(parameters(store), parameters(other), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def change(tensor: Tensor, share: float, seed: int = 0) -> Tensor:
    """A copy in which this share of the numbers, at least one unless it is 0, is another."""
    generator = torch.Generator().manual_seed(seed)
    changed = tensor.clone().flatten()
    count = max(1, round(share * changed.numel())) if share else 0
    places = torch.randperm(changed.numel(), generator=generator)[:count]
    changed[places] = changed[places] * 2 + 1
    return changed.view(tensor.shape)
