"""Both directions in one call, the weights of a directory as bytes, and the fixtures, for the conversion tests."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.conversion.from_megatron import FromMegatron, convert_from_megatron
from models.conversion.report import Report
from models.conversion.to_megatron import ToMegatron, convert_to_megatron
from unit_tests.checkpoints import make_checkpoint, write_weights
from unit_tests.models.loading import load_ours, max_error

FIXTURES = Path(__file__).parent / "fixtures"


def to_megatron(source: Path, out: Path, **settings: Any) -> Report:
    """hf2mcore."""
    return convert_to_megatron(ToMegatron(source=source, out=out, **settings))


def from_megatron(source: Path, base: Path, out: Path | None, **settings: Any) -> Report:
    """mcore2hf."""
    return convert_from_megatron(FromMegatron(source=source, base=base, out=out, **settings))


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the directory's safetensors files, by its name there."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                assert name not in tensors, f"{name} is there twice"
                tensors[name] = opened.get_tensor(name)
    return tensors


def read_bytes(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """What `==` compares bit for bit."""
    tensors = read_all(directory).items()
    return {name: (tensor.dtype, tuple(tensor.shape), raw_bytes(tensor)) for name, tensor in tensors}


def raw_bytes(tensor: Tensor) -> bytes:
    """The tensor's memory."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def make_pair(folder: Path, **settings: Any) -> tuple[Path, Path]:
    """A checkpoint, and one of the same layout with other values for the base of the way back."""
    source = make_checkpoint(folder / "source", seed=1, num_layers=4, **settings)
    return source, make_checkpoint(folder / "base", seed=2, num_layers=4, **settings)


def with_other_head(source: Path, out: Path, shards: int = 1) -> Path:
    """A copy of a checkpoint of one file with another head, which guesses badly."""
    shutil.copytree(source, out)
    tensors = read_all(source)
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        if name.startswith("mtp."):
            tensors[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)).to(tensor.dtype)
    (out / "model.safetensors").unlink()
    write_weights(out, tensors, shards)
    return out


def convert_fixture(name: str, layout: str, out: Path) -> Path:
    """megatron-core's checkpoint ("dense" or "moe", "torch_dist" or "mp_rank") as a Hugging Face directory."""
    base = out.parent / f"{out.name}-base"
    base.mkdir()
    shutil.copy(FIXTURES / name / "config.json", base)
    from_megatron(FIXTURES / name / layout, base, out, norms="ones")
    return out


def check_forward(name: str, directory: Path) -> None:
    """Our forward pass of a converted fixture must be megatron-core's own, as it was recorded with the fixture."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    target, draft = load_ours(directory)
    hidden = target.forward_sequence(expected["ids"][None])
    next_ids = torch.cat([expected["ids"][1:], expected["ids"].new_zeros(1)])
    assert max_error(hidden[0], expected["hidden"]) < 1e-5, "trunk"
    assert max_error(target.compute_logits(hidden)[0], expected["logits"]) < 1e-5, "output head"
    head = draft.forward_sequence(next_ids[None], expected["hidden"][None])
    assert max_error(head[0], expected["mtp_hidden"]) < 1e-5, "MTP head"
