"""Every spelling of a Megatron weight's name, read and written.

Reading: a raw name says which canonical weight (see rules.py) it is, or of which it is a part and where. Writing: a
canonical weight becomes one or several raw ones, as a `Style` says. Source: megatron-core 0.16.1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.conversion import layouts, lazy_tensor
from models.conversion.lazy_tensor import LazyTensor
from models.conversion.rules import Rule
from models.errors import CheckpointError

BLOCKS = ("transformer_layer", "mtp_model_layer")
STACK, CONCAT = "stack", "concat"
_SECTIONS = {
    **dict(zip(("query", "key", "value", "z", "beta", "alpha"), range(6), strict=True)),
    **{f"in_proj_{name}": index for index, name in enumerate(("qkv", "z", "b", "a"))},
}
_HALVES = {"w": 0, "v": 1}
_NOT_WEIGHTS = {
    "extra state": re.compile(r"\._extra_state\b"),
    "optimizer and trainer state": re.compile(r"^(optimizer|chained_|opt_param_scheduler|rng_state|rerun_state)"),
    "rotary table": re.compile(r"rotary_pos_emb\."),
    "vision": re.compile(r"^(model\.)?(vision_model|visual)\."),
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a checkpoint that is written spells its names.

    on_disk: those of a torch_dist directory, else those of the modules in memory. layer_spec: "te" (TransformerEngine)
    or "local". prefix: "" or "language_model.".
    """

    on_disk: bool
    layer_spec: Literal["te", "local"] = "te"
    block: str = BLOCKS[0]
    prefix: str = ""


@dataclass(frozen=True)
class Place:
    """Where a raw weight belongs: to `name`, at steps like (("stack", 3), ("concat", 0)); no steps: it is all of it."""

    name: str
    steps: tuple[tuple[str, int], ...] = ()


Part = tuple[tuple[tuple[str, int], ...], LazyTensor]


def why_no_weight(raw_name: str) -> str | None:
    """What the entry is if it is none of the language model's weights."""
    name = _unwrap(raw_name)
    return next((kind for kind, pattern in _NOT_WEIGHTS.items() if pattern.search(name)), None)


def canonicalise(raw_name: str) -> Place:
    """The canonical weight that a raw name means; names that mean none come out as they are, or nearly."""
    name = re.sub(r"^(mtp\.layers\.\d+)\.mtp_model_layer\.", r"\1.transformer_layer.", _unwrap(raw_name))
    name = re.sub(r"\.self_attention\.((linear_qkv|in_proj)\.layer_norm_|input_layernorm\.)weight$", _INPUT_NORM, name)
    name = name.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")
    name = re.sub(r"\.linear_attn\.(conv1d\.weight|A_log|dt_bias|out_proj\.weight)$", r".\1", name)
    name, expert = _take(r"\.mlp\.experts\.(?:local_experts|experts)\.(\d+)\.", ".mlp.experts.", name)
    name = name.replace(".mlp.experts.experts.", ".mlp.experts.")
    name, grouped = _take(r"(?<=\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$", "", name)
    name, half = _take(r"(?<=\.linear_fc1\.weight)_([wv])$", "", name)
    name, section = _take(r"\.linear_attn\.(in_proj_(?:qkv|z|b|a))\.weight$", ".in_proj.weight", name)
    if section is None:
        name, section = _take(r"(?<=\.weight)\.(query|key|value|z|beta|alpha)$", "", name)
    steps = [(STACK, int(number)) for number in (expert, grouped) if number is not None]
    steps += [(CONCAT, _HALVES[half])] if half is not None else []
    steps += [(CONCAT, _SECTIONS[section])] if section is not None else []
    return Place(name, tuple(steps))


_INPUT_NORM = ".input_layernorm.weight"


def _unwrap(raw_name: str) -> str:
    return re.sub(r"^(module\.|model\.)*(language_model\.)?", "", raw_name)


def _take(pattern: str, replacement: str, name: str) -> tuple[str, str | None]:
    """The name with the pattern replaced, and the pattern's group where it stood."""
    found = re.search(pattern, name)
    return (name[: found.start()] + replacement + name[found.end() :], found[1]) if found else (name, None)


def assemble(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Canonical weights of raw ones. Raises CheckpointError for a weight that is there twice, or in part."""
    parts: dict[str, list[Part]] = {}
    for raw_name, tensor in tensors.items():
        for place, part in _unstack(raw_name, tensor):
            parts.setdefault(place.name, []).append((place.steps, part))
    return {name: _put_together(name, found) for name, found in parts.items()}


def _unstack(raw_name: str, tensor: LazyTensor) -> list[tuple[Place, LazyTensor]]:
    """Trunk layers of one kind may lie in one tensor, `decoder.layers.<weight>` [L, ...]."""
    place = canonicalise(raw_name)
    rest = place.name.removeprefix("decoder.layers.")
    if rest == place.name or rest[0].isdigit() or not tensor.shape:
        return [(place, tensor)]
    layers = range(tensor.shape[0])
    return [(Place(f"decoder.layers.{layer}.{rest}", place.steps), tensor.select(layer)) for layer in layers]


def _put_together(name: str, parts: list[Part]) -> LazyTensor:
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    origins = ", ".join(tensor.origin for _, tensor in parts[:4])
    if any(not steps for steps, _ in parts):
        raise CheckpointError(f"{name} is there more than once, whole and in parts or under two names: {origins}")
    kinds, indices = {steps[0][0] for steps, _ in parts}, sorted({steps[0][1] for steps, _ in parts})
    if len(kinds) > 1 or indices != list(range(len(indices))):
        raise CheckpointError(f"{name} is not complete: of its parts there are number {indices} ({origins})")
    groups = [[(steps[1:], tensor) for steps, tensor in parts if steps[0][1] == index] for index in indices]
    joined = [_put_together(f"{name}, part {index}", group) for index, group in enumerate(groups)]
    return lazy_tensor.stack(joined) if kinds == {STACK} else lazy_tensor.concat(joined)


def cut(rule: Rule, name: str, whole: Tensor, style: Style) -> dict[str, Tensor]:
    """A canonical weight as the raw ones that a checkpoint of this style has."""
    spelled = style.prefix + _spell(rule, name, style)
    if rule.is_experts and style.on_disk:
        return {spelled.replace(".mlp.experts.", ".mlp.experts.experts."): whole}
    if rule.is_experts and style.layer_spec == "te":
        return {f"{spelled}{index}": expert for index, expert in enumerate(whole)}
    if rule.is_experts:
        head, tail = spelled.split(".mlp.experts.")
        return {f"{head}.mlp.experts.local_experts.{index}.{tail}": expert for index, expert in enumerate(whole)}
    if rule.sections and style.on_disk:
        labels, sizes = zip(*rule.sections, strict=True)
        parts = layouts.split_rows(whole, sizes)
        return {f"{spelled}.{label}": part for label, part in zip(labels, parts, strict=True)}
    return {spelled: whole}


def _spell(rule: Rule, name: str, style: Style) -> str:
    is_fused = rule.te_fuses if style.layer_spec == "te" else style.on_disk
    if rule.fused_name is not None and is_fused:
        name = rule.fused_name
    return re.sub(r"^(mtp\.layers\.\d+)\.transformer_layer\.", rf"\1.{style.block}.", name)
