"""mcore2hf: a Megatron checkpoint into a Hugging Face directory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from models.conversion import layouts
from models.conversion.hugging_face import HuggingFaceDirectory, open_hugging_face, renew
from models.conversion.lazy_tensor import LazyTensor
from models.conversion.megatron_directory import open_megatron
from models.conversion.names import assemble
from models.conversion.report import Report
from models.conversion.rules import IsPacked, Rule, list_rules
from models.conversion.staging import require_free
from models.errors import CheckpointError
from models.safetensors_file import FLOAT_TYPES

Norms = Literal["zero_centred", "ones"]
Experts = Literal["as_base", "packed", "per_expert"]
Rank = dict[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class FromMegatron:
    """One conversion: source, the directory it completes, and where to. out None: in place of base."""

    source: Path
    base: Path
    out: Path | None = None
    mtp_only: bool = False
    norms: Norms = "zero_centred"
    experts: Experts = "as_base"
    show_progress: bool = False


@dataclass(frozen=True)
class _Weight:
    """A rule and its Megatron weight of every tensor-parallel rank."""

    rule: Rule
    shards: list[LazyTensor]
    copies: list[list[LazyTensor]]
    shift: int


def convert_from_megatron(job: FromMegatron) -> Report:
    """Write base's copy with the Megatron weights. Raises CheckpointError; nothing is written then."""
    if job.out is not None:
        require_free(job.out)
        if job.base.resolve() in job.out.resolve().parents:
            raise CheckpointError(f"{job.out} is inside {job.base}, which is copied to it: give an --out elsewhere")
    base = open_hugging_face(job.base, needs_weights=False)
    require_head(base, job.mtp_only)
    source = open_megatron(job.source)
    report = Report(source.description, source.num_read, set_aside=source.set_aside)
    ranks = [assemble(rank) for rank in source.ranks]
    rules = list_rules(base.config, _choose_form(job, base), job.mtp_only)
    weights = [weight for rule in rules if (weight := _find(rule, ranks, job.norms, report)) is not None]
    _list_left_over(weights, ranks, job.mtp_only, report)
    report.require_complete()
    for weight in weights:
        _check(weight)
        report.mapped[weight.rule.megatron] = tuple(map(base.spell, weight.rule.hf))
    replaced = _list_replaced(base, job.mtp_only)
    if replaced:
        report.notes.append(f"{len(replaced)} tensors of {job.base} were replaced, {len(base.names)} were there")
    tensors = _convert(tqdm(weights, desc="Converting", disable=not job.show_progress), base)
    renew(base, replaced, tensors, job.out or job.base.resolve(), in_place=job.out is None)
    return report


def require_head(directory: HuggingFaceDirectory, mtp_only: bool) -> None:
    """Raises CheckpointError where only the head is wanted and config.json has none."""
    if mtp_only and not directory.config.num_mtp_layers:
        raise CheckpointError(
            f"{directory.path}/config.json has no MTP layers, there is nothing for --mtp-only: "
            "set mtp_num_hidden_layers to the number of the head's layers"
        )


def read_weight(rule: Rule, shards: list[Tensor]) -> Tensor:
    """The whole Megatron weight of its tensor-parallel shards, padding rows cut off. Raises CheckpointError."""
    first = shards[0]
    if len(shards) == 1:
        return first[: rule.shape[0]] if rule.may_exceed else first
    if tuple(first.shape) == rule.shape:
        if not all(torch.equal(first, other) for other in shards[1:]):
            raise CheckpointError(f"{rule.megatron} differs between ranks that should have the same")
        return first
    assert rule.axis is not None
    blocks = rule.blocks if not rule.may_exceed else (first.shape[0] * len(shards),)
    whole = layouts.merge(shards, rule.axis, blocks)
    return whole[: rule.shape[0]] if rule.may_exceed else whole


def _choose_form(job: FromMegatron, base: HuggingFaceDirectory) -> IsPacked:
    return base.is_packed if job.experts == "as_base" else lambda _: job.experts == "packed"


def _find(rule: Rule, ranks: list[Rank], norms: Norms, report: Report) -> _Weight | None:
    shift = rule.shifts[0 if norms == "zero_centred" else 1]
    name = rule.megatron
    if rule.plain_name is not None and rule.plain_name in ranks[0]:
        name, shift = rule.plain_name, 0
    if any(name not in rank for rank in ranks):
        report.missing.append(name)
        return None
    copies = [[rank[copy] for rank in ranks if copy in rank] for copy in rule.copies]
    report.missing += [copy for copy in rule.written_copies if any(copy not in rank for rank in ranks)]
    return _Weight(rule, [rank[name] for rank in ranks], copies, shift)


def _list_left_over(weights: list[_Weight], ranks: list[Rank], mtp_only: bool, report: Report) -> None:
    used = {name for weight in weights for name in (weight.rule.megatron, *weight.rule.copies)}
    used |= {weight.rule.plain_name for weight in weights if weight.rule.plain_name}
    for name, tensor in sorted({name: tensor for rank in ranks for name, tensor in rank.items()}.items()):
        if mtp_only and not name.startswith("mtp."):
            report.set_aside["of the trunk"] += 1
        elif name not in used:
            report.left_over.append(tensor.origin)


def _check(weight: _Weight) -> None:
    """Raises CheckpointError unless the shards make the shape that config.json asks for, in floating point."""
    rule = weight.rule
    for shards in (weight.shards, *filter(None, weight.copies)):
        shapes = {shard.shape for shard in shards}
        for shard in shards:
            if shard.dtype not in FLOAT_TYPES.values():
                raise CheckpointError(f"{shard.origin} is {shard.dtype}: quantised weights are not converted")
        if len(shapes) > 1 or not _fits(rule, next(iter(shapes)), len(shards)):
            raise CheckpointError(
                f"{rule.megatron}: {len(shards)} tensor-parallel ranks of {' and '.join(map(str, sorted(shapes)))} "
                f"do not make {rule.shape}, which config.json asks for"
            )


def _fits(rule: Rule, shape: tuple[int, ...], num_ranks: int) -> bool:
    if shape == rule.shape:
        return True
    if rule.axis is None or len(shape) != len(rule.shape):
        return False
    whole = list(shape)
    whole[rule.axis] *= num_ranks
    if rule.may_exceed:
        return whole[0] >= rule.shape[0] and whole[1:] == list(rule.shape[1:])
    return tuple(whole) == rule.shape and all(block % num_ranks == 0 for block in rule.blocks)


def _list_replaced(base: HuggingFaceDirectory, mtp_only: bool) -> set[str]:
    """The tensors of base that the new ones stand for, whatever the form of their experts."""
    forms: tuple[IsPacked, ...] = (lambda _: True, lambda _: False)
    names = {name for form in forms for rule in list_rules(base.config, form, mtp_only) for name in rule.hf}
    return names & set(base.names)


def _convert(weights: "tqdm[_Weight]", base: HuggingFaceDirectory) -> Iterator[tuple[str, Tensor]]:
    for weight in weights:
        rule = weight.rule
        whole = read_weight(rule, [shard.load() for shard in weight.shards])
        for copy in filter(None, weight.copies):
            if not torch.equal(read_weight(rule, [shard.load() for shard in copy]), whole):
                raise CheckpointError(
                    f"{copy[0].origin} differs from {rule.megatron}, Hugging Face's format has one weight for both"
                )
        for name, part in zip(rule.hf, rule.layout.split(whole), strict=True):
            yield name, layouts.unshift(part, weight.shift, base.dtype_of(name)) if weight.shift else part
