"""A Megatron checkpoint of any layout: torch_dist, mp_rank_* files or flat safetensors."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from models.conversion.lazy_tensor import LazyTensor, from_file
from models.conversion.names import why_no_weight
from models.conversion.rank_files import read_rank_files
from models.conversion.torch_dist import read_torch_dist
from models.errors import CheckpointError
from models.safetensors_file import read_tensor_index
from models.weights import list_weight_files

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass
class MegatronSource:
    """The language model's tensors of each tensor-parallel rank, by raw name; one rank where tensors are whole."""

    description: str
    ranks: list[dict[str, LazyTensor]]
    num_read: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)


def open_megatron(path: Path) -> MegatronSource:
    """Read names and shapes. `path`: a checkpoint directory, the one above its iterations, or a safetensors file.

    Raises CheckpointError for a directory that is none of these, is not complete, or is broken.
    """
    path = _find_iteration(path)
    if path.is_file():
        return _sort(f"flat safetensors {path}", [_read_flat([path])], 0)
    if (path / ".metadata").exists() or any(path.glob("*.distcp")):
        tensors, num_objects = read_torch_dist(path)
        return _sort(f"torch_dist {path}", [tensors], num_objects)
    if any(path.glob("mp_rank_*")):
        ranks, num_objects = read_rank_files(path)
        return _sort(f"{len(ranks)} tensor-parallel ranks in {path}", ranks, num_objects)
    if any(path.glob("*.safetensors")):
        return _sort(f"flat safetensors {path}", [_read_flat(list_weight_files(path))], 0)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} holds {found}: no Megatron checkpoint (.metadata with *.distcp, mp_rank_*, or *.safetensors)"
    )


def _find_iteration(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    word = tracker.read_text(encoding="utf-8").strip()
    if word != "release" and not word.isdigit():
        raise CheckpointError(f"{tracker} says {word!r}, a number or 'release' is needed")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {folder.name}, which is missing: copy it again")
    return folder


def _read_flat(files: list[Path]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in read_tensor_index(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in {file} and in another file")
            tensors[name] = from_file(name, tensor)
    return tensors


def _sort(description: str, ranks: list[dict[str, LazyTensor]], num_objects: int) -> MegatronSource:
    """Set aside what belongs to the trainer."""
    source = MegatronSource(description, [], num_objects)
    source.set_aside["objects that are no tensors"] += num_objects
    for tensors in ranks:
        kinds = {name: why_no_weight(name) for name in tensors}
        source.num_read += len(tensors)
        source.set_aside.update(kind for kind in kinds.values() if kind)
        source.ranks.append({name: tensor for name, tensor in tensors.items() if not kinds[name]})
    source.set_aside = +source.set_aside
    return source
