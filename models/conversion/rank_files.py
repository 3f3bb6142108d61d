"""Legacy Megatron checkpoints: a `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` for each tensor-, pipeline- and
expert-parallel rank.

They are pickles that name classes of Megatron. `_Unpickler` builds tensors and plain containers and nothing else, so
neither Megatron nor trust in the file's author is needed. Reading merges pipeline and expert ranks; tensor-parallel
ranks stay apart, for merging them takes the sizes of the model.
"""

import pickle
import re
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.conversion.lazy_tensor import LazyTensor, from_tensor
from models.errors import CheckpointError

FILE_NAME = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"(?<=decoder\.layers\.)(\d+)(?=\.)")
_EXPERT = re.compile(
    r"(?<=\.mlp\.experts\.local_experts\.)(\d+)(?=\.)|(?<=\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$"
)
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_BROKEN = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, AttributeError, TypeError)

Weights = dict[str, Tensor]


def read_rank_files(directory: Path) -> tuple[list[dict[str, LazyTensor]], int]:
    """(tensors by name for each tensor-parallel rank, number of entries that are no tensors).

    Names have the numbers that layers and experts have in the whole model. Raises CheckpointError for a missing rank, a
    broken file and virtual pipeline stages.
    """
    grid = _find_ranks(directory)
    entries = {place: _read_model(path) for place, path in grid.items()}
    tensors = {place: _tensors_of(entry) for place, entry in entries.items()}
    num_others = sum(len(entry) - len(tensors[place]) for place, entry in entries.items())
    ranks = [_merge_stages(rank, tensors) for rank in sorted({place[0] for place in grid})]
    return ranks, num_others


def write_rank_file(directory: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write one tensor-parallel rank."""
    folder = directory / f"mp_rank_{rank:02d}"
    folder.mkdir(parents=True)
    torch.save({"model": dict(tensors), "checkpoint_version": 3.0, "iteration": 0}, folder / FILE_NAME)


def _find_ranks(directory: Path) -> dict[tuple[int, int, int], Path]:
    """Files by (tensor, second, third) rank. Raises CheckpointError unless they fill a grid."""
    grid = {}
    for folder in directory.glob("mp_rank_*"):
        if (found := _RANK.fullmatch(folder.name)) is None:
            raise CheckpointError(f"{folder} is no rank's name, mp_rank_TT, mp_rank_TT_PPP or mp_rank_TT_PPP_EEE is")
        place = (int(found[1]), int(found[2] or 0), int(found[3] or 0))
        grid[place] = folder / FILE_NAME
    sizes = [max(place[axis] for place in grid) + 1 for axis in range(3)]
    for place in ((i, j, k) for i in range(sizes[0]) for j in range(sizes[1]) for k in range(sizes[2])):
        if place not in grid or not grid[place].exists():
            numbers = "_".join(map(str, place))
            raise CheckpointError(f"{directory} lacks {FILE_NAME} of rank {numbers}: it is not complete, copy it again")
    return grid


def _read_model(path: Path) -> dict[str, Any]:
    try:
        whole = torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False, mmap=True)
    except _BROKEN as error:
        raise CheckpointError(f"{path} is not a readable checkpoint, copy it again: {error}") from None
    if isinstance(whole, dict) and "model0" in whole:
        raise CheckpointError(f"{path} has virtual pipeline stages (model0, ...): save it without, or as torch_dist")
    model = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(model, dict) or not any(isinstance(value, Tensor) for value in model.values()):
        raise CheckpointError(f"{path} has no 'model' with tensors: it is not a Megatron checkpoint")
    return model


def _tensors_of(model: dict[str, Any]) -> Weights:
    return {name: value for name, value in model.items() if isinstance(value, Tensor)}


def _merge_stages(rank: int, tensors: dict[tuple[int, int, int], Weights]) -> dict[str, LazyTensor]:
    """One tensor-parallel rank's weights of all its pipeline and expert ranks, numbered as in the whole model."""
    merged: dict[str, LazyTensor] = {}
    layers = 0
    for experts in _group_by_stage(rank, tensors):
        per_rank = max((_count(_EXPERT, weights) for weights in experts), default=0)
        for expert_rank, weights in enumerate(experts):
            for name, tensor in weights.items():
                whole_name = _renumber(_EXPERT, _renumber(_LAYER, name, layers), expert_rank * per_rank)
                _add(merged, whole_name, tensor)
        layers += _count(_LAYER, experts[0])
    return merged


def _group_by_stage(rank: int, tensors: dict[tuple[int, int, int], Weights]) -> list[list[Weights]]:
    """For each pipeline stage its expert ranks.

    With one number after TT the name does not tell which it is: expert ranks all have the same names, stages do not.
    """
    places = sorted(place for place in tensors if place[0] == rank)
    second = [tensors[place] for place in places if place[2] == 0]
    if len(second) == len(places) > 1 and len({frozenset(weights) for weights in second}) == 1:
        return [second]
    stages = sorted({place[1] for place in places})
    return [[tensors[place] for place in places if place[1] == stage] for stage in stages]


def _add(merged: dict[str, LazyTensor], name: str, tensor: Tensor) -> None:
    """Expert ranks and the ends of a pipeline have some weights more than once: they must be equal."""
    if name in merged and not torch.equal(merged[name].load(), tensor):
        raise CheckpointError(f"{name} differs between ranks that should have the same: the files are of several saves")
    merged[name] = from_tensor(name, tensor)


def _count(pattern: re.Pattern[str], weights: Weights) -> int:
    found = (pattern.search(name) for name in weights)
    return max((int(match[0]) + 1 for match in found if match), default=0)


def _renumber(pattern: re.Pattern[str], name: str, by: int) -> str:
    return pattern.sub(lambda match: str(int(match[0]) + by), name)


class _Inert:
    """Stands for an object of a class that is not needed: arguments of the run, optimizer, random states."""

    def __new__(cls, *_: object, **__: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> "_Inert":
        return self

    def append(self, _: object) -> None:
        """What pickle does to lists."""

    def extend(self, _: object) -> None:
        """What pickle does to lists."""

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    """Knows tensors and plain containers; every other global is `_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _REBUILDERS:
            return getattr(torch._utils, name)
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        value = getattr(torch, name, None) if module == "torch" else None
        is_plain = isinstance(value, torch.dtype) or value in (torch.Size, torch.device)
        return value if is_plain or (module == "torch" and name.endswith("Storage")) else _Inert


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load(), __name__="pickle")
