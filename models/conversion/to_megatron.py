"""hf2mcore: a Hugging Face directory into a Megatron checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from models.config import ModelConfig
from models.conversion import layouts
from models.conversion.depth import save_settings
from models.conversion.from_megatron import Norms, require_head
from models.conversion.hugging_face import HuggingFaceDirectory, is_vision, open_hugging_face
from models.conversion.lazy_tensor import LazyTensor
from models.conversion.megatron_directory import TRACKER
from models.conversion.names import Style, cut
from models.conversion.rank_files import write_rank_file
from models.conversion.report import Report
from models.conversion.rules import Rule, list_rules
from models.conversion.staging import require_free, staged
from models.conversion.torch_dist import write_torch_dist
from models.errors import CheckpointError
from models.weights import save_weights

Format = Literal["torch_dist", "mp_rank", "safetensors"]
SETTINGS = "megatron_settings.json"


@dataclass(frozen=True, kw_only=True)
class ToMegatron:
    """One conversion. prefix None: as the config is nested. padded_vocab_size None: no padding."""

    source: Path
    out: Path
    mtp_only: bool = False
    format: Format = "torch_dist"
    norms: Norms = "zero_centred"
    layer_spec: Literal["te", "local"] = "te"
    block: str = "transformer_layer"
    prefix: Literal["lm", "vl"] | None = None
    tensor_parallel: int = 1
    padded_vocab_size: int | None = None
    show_progress: bool = False


@dataclass(frozen=True)
class _Weight:
    """A rule, the Hugging Face tensors it takes, and how the Megatron weight differs from them."""

    rule: Rule
    parts: list[LazyTensor]
    shift: int
    rows: int

    def load(self) -> Tensor:
        """The whole Megatron weight."""
        whole = self.rule.layout.join([part.load() for part in self.parts])
        if self.shift:
            return layouts.shift(whole, self.shift)
        padding = whole.new_zeros(self.rows - whole.shape[0], *whole.shape[1:])
        return torch.cat([whole, padding]) if len(padding) else whole

    def without_data(self) -> Tensor:
        """A tensor of the same shape and dtype; only norms, which may be wider than in the file, are read for it."""
        if self.shift:
            return torch.empty_like(self.load(), device="meta")
        return torch.empty(self.rows, *self.rule.shape[1:], dtype=self.parts[0].dtype, device="meta")


def convert_to_megatron(job: ToMegatron) -> Report:
    """Write the Megatron checkpoint and megatron_settings.json. Raises CheckpointError; nothing is written then."""
    require_free(job.out)
    source = open_hugging_face(job.source)
    require_head(source, job.mtp_only)
    rules = list_rules(source.config, source.is_packed, job.mtp_only)
    check_tensor_parallel(job, source.config, rules)
    report = Report(f"Hugging Face directory {job.source}", len(source.names))
    weights = [weight for rule in rules if (weight := _find(rule, source, job, report)) is not None]
    _list_left_over(rules, source, job.mtp_only, report)
    report.require_complete()
    report.mapped = {weight.rule.megatron: weight.rule.hf for weight in weights}
    _note_norms(weights, report)
    style = Style(
        on_disk=job.format == "torch_dist",
        layer_spec=job.layer_spec,
        block=job.block,
        prefix="language_model." if (job.prefix or ("vl" if source.is_nested else "lm")) == "vl" else "",
    )
    with staged(job.out) as folder:
        _write(job, style, weights, folder)
        save_settings(folder / SETTINGS, source.config, job.norms)
    return report


def check_tensor_parallel(job: ToMegatron, config: ModelConfig, rules: list[Rule]) -> None:
    """Raises CheckpointError where the tensor-parallel size does not divide what is shared, or the format has none."""
    size = job.tensor_parallel
    if size < 1 or (size > 1 and job.format != "mp_rank"):
        raise CheckpointError(
            f"--tensor-parallel is {size}: {job.format} holds whole tensors, which ranks of any number can read; "
            "only --format mp_rank is cut"
        )
    delta = {"linear key heads": config.delta_key_heads, "linear value heads": config.delta_value_heads}
    shared = {"attention heads": config.num_heads}
    for what, count in (shared if job.mtp_only else shared | delta).items():
        if count % size:
            raise CheckpointError(f"--tensor-parallel {size} does not divide the {count} {what}")
    if config.num_kv_heads % size and size % config.num_kv_heads:  # in Megatron, ranks may share a key-value head
        raise CheckpointError(f"--tensor-parallel {size} does not divide the {config.num_kv_heads} key-value heads")
    for rule in rules:
        blocks = (job.padded_vocab_size or rule.shape[0],) if rule.may_exceed else rule.blocks
        for block in blocks:
            if block % size:
                raise CheckpointError(
                    f"--tensor-parallel {size} does not divide the {block} rows or columns of {rule.megatron}"
                    + (": give --padded-vocab-size" if rule.may_exceed else "")
                )


def _find(rule: Rule, source: HuggingFaceDirectory, job: ToMegatron, report: Report) -> _Weight | None:
    missing = [name for name in rule.hf if name not in source.names]
    if missing:
        report.missing += missing
        return None
    parts = [source.lazy(name) for name in rule.hf]
    for part, shape in zip(parts, rule.hf_shapes, strict=True):
        if part.shape != shape:
            raise CheckpointError(
                f"tensor {part.origin} has shape {list(part.shape)}, config.json asks for {list(shape)}"
            )
        if part.dtype != parts[0].dtype:
            raise CheckpointError(
                f"{parts[0].origin} is {parts[0].dtype} and {part.origin} {part.dtype}, "
                f"but both go into {rule.megatron}"
            )
    rows = rule.shape[0]
    if rule.may_exceed and job.padded_vocab_size is not None:
        rows = job.padded_vocab_size
        if rows < rule.shape[0]:
            raise CheckpointError(f"--padded-vocab-size is {rows}, the vocabulary has {rule.shape[0]} tokens")
    return _Weight(rule, parts, rule.shifts[0 if job.norms == "zero_centred" else 1], rows)


def _list_left_over(rules: list[Rule], source: HuggingFaceDirectory, mtp_only: bool, report: Report) -> None:
    used = {name for rule in rules for name in rule.hf}
    for name, raw_name in source.names.items():
        if is_vision(name):
            report.set_aside["of the vision tower"] += 1
        elif mtp_only and not name.startswith("mtp."):
            report.set_aside["of the trunk"] += 1
        elif name == "lm_head.weight" and source.config.tie_word_embeddings:
            report.set_aside["tied lm_head"] += 1
        elif name not in used:
            report.left_over.append(raw_name)


def _note_norms(weights: list[_Weight], report: Report) -> None:
    """Say which norms could not keep their dtype."""
    moved = [(weight, weight.load(), weight.parts[0].load()) for weight in weights if weight.shift]
    wider = sum(norm.dtype != before.dtype for _, norm, before in moved)
    rounded = sum(
        not torch.equal(layouts.unshift(norm, weight.shift, before.dtype), before) for weight, norm, before in moved
    )
    if wider:
        report.notes.append(f"{wider} norms moved by 1 are wider than in the source, so that they come back exactly")
    if rounded:
        report.notes.append(f"{rounded} norms moved by 1 are rounded: they have weights too close to 0")


def _write(job: ToMegatron, style: Style, weights: list[_Weight], folder: Path) -> None:
    if job.format == "safetensors":
        named = (item for weight in _progress(weights, job) for item in _cut(weight, style, weight.load()).items())
        save_weights(folder / "model.safetensors", {name: tensor.clone() for name, tensor in named})
        return
    release = folder / "release"
    release.mkdir()
    if job.format == "torch_dist":
        _write_whole(style, weights, release)
    else:
        for rank in range(job.tensor_parallel):
            shards = (_shard(weight, rank, job.tensor_parallel) for weight in _progress(weights, job))
            named = (item for weight, shard in shards for item in _cut(weight, style, shard).items())
            write_rank_file(release, rank, {name: tensor.clone() for name, tensor in named})
    (folder / TRACKER).write_text("release", encoding="utf-8")


def _write_whole(style: Style, weights: list[_Weight], folder: Path) -> None:
    owners = {}
    shapes = {}
    for weight in weights:
        for name, tensor in _cut(weight, style, weight.without_data()).items():
            owners[name], shapes[name] = weight, tensor
    write_torch_dist(folder, shapes, lambda name: _cut(owners[name], style, owners[name].load())[name])


def _progress(weights: list[_Weight], job: ToMegatron) -> Iterator[_Weight]:
    yield from tqdm(weights, desc="Converting", disable=not job.show_progress)


def _shard(weight: _Weight, rank: int, num_ranks: int) -> tuple[_Weight, Tensor]:
    rule, whole = weight.rule, weight.load()
    if rule.axis is None or num_ranks == 1:
        return weight, whole
    blocks = (whole.shape[0],) if rule.may_exceed else rule.blocks
    return weight, layouts.shard(whole, rank, num_ranks, rule.axis, blocks)


def _cut(weight: _Weight, style: Style, whole: Tensor) -> dict[str, Tensor]:
    """The weight, and the copies that Megatron has of it, under the names of the style."""
    names = (weight.rule.megatron, *weight.rule.written_copies)
    return {raw: part for name in names for raw, part in cut(weight.rule, name, whole, style).items()}
