"""Which Megatron weight belongs to which Hugging Face weights: one Rule each, made from the sizes of the checkpoint.

Megatron names are canonical here: without prefix, the MTP block named `transformer_layer`, norms apart from the linear
layer they may be fused with, and all experts in one tensor. `names.py` knows every other spelling. Hugging Face names
are those of a text-only checkpoint. Source: megatron-core 0.16.1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from models.config import ModelConfig
from models.conversion import layouts

IsPacked = Callable[[str], bool]
Shape = tuple[int, ...]


class Layout(Protocol):
    """How one Megatron weight is made of Hugging Face weights, and back."""

    def join(self, parts: Sequence[Tensor]) -> Tensor: ...

    def split(self, whole: Tensor) -> Sequence[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One Megatron weight and its Hugging Face weights.

    shifts: what Megatron's zero-centred norms and its ones-based norms have on top of Hugging Face's weight. axis and
    blocks: along which axis tensor-parallel ranks share it, each block apart; axis None: every rank has all of it.
    fused_name: the norm's name on disk and, if te_fuses, in TransformerEngine's modules. sections: named parts on disk.
    copies: further Megatron weights that hold the same values; written ones are `written_copies`. plain_name: the same
    weight with Hugging Face's own values. may_exceed: Megatron may have padding rows.
    """

    megatron: str
    shape: Shape
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    layout: Layout
    shifts: tuple[int, int] = (0, 0)
    axis: int | None = None
    blocks: tuple[int, ...] = ()
    fused_name: str | None = None
    te_fuses: bool = True
    sections: tuple[tuple[str, int], ...] = ()
    is_experts: bool = False
    copies: tuple[str, ...] = ()
    written_copies: tuple[str, ...] = ()
    plain_name: str | None = None
    may_exceed: bool = False

    @property
    def is_head(self) -> bool:
        """Whether it belongs to the MTP head."""
        return self.megatron.startswith("mtp.")


@dataclass(frozen=True)
class Same:
    """One weight, the same on both sides."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return layouts.keep(parts[0])

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        return [layouts.keep(whole)]


@dataclass(frozen=True)
class Rows:
    """Weights one below the other."""

    sizes: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return layouts.join_rows(parts)

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        return layouts.split_rows(whole, self.sizes)


@dataclass(frozen=True)
class GatedQKV:
    """q_proj (with gates), k_proj and v_proj, interleaved by group."""

    num_groups: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return layouts.join_qkv(parts[0], parts[1], parts[2], self.num_groups, self.head_dim)

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        return layouts.split_qkv(whole, self.num_groups, self.head_dim)


@dataclass(frozen=True)
class PerExpert:
    """The weights of each expert (`num_parts` at a time, laid out as `inner` says), stacked."""

    num_parts: int
    inner: Layout = field(default_factory=Same)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        groups = [parts[start : start + self.num_parts] for start in range(0, len(parts), self.num_parts)]
        return torch.stack([self.inner.join(group) for group in groups])

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        return [part for expert in whole for part in self.inner.split(expert)]


def list_rules(config: ModelConfig, is_packed: IsPacked, mtp_only: bool = False) -> list[Rule]:
    """Every weight of the checkpoint, or of its head. `is_packed("model.layers.3")` tells the form of HF's experts."""
    trunk = [] if mtp_only else list(_trunk_rules(config, is_packed))
    return trunk + list(_head_rules(config, is_packed))


def _trunk_rules(config: ModelConfig, is_packed: IsPacked) -> Iterator[Rule]:
    embedding, output = "embedding.word_embeddings.weight", "output_layer.weight"
    copies = (output,) if config.tie_word_embeddings else ()
    yield _vocabulary(embedding, "model.embed_tokens.weight", config, copies)
    if not config.tie_word_embeddings:
        yield _vocabulary(output, "lm_head.weight", config)
    yield _norm("decoder.final_layernorm.weight", "model.norm.weight", config.hidden_size)
    for index, kind in enumerate(config.layer_types):
        megatron, hf = f"decoder.layers.{index}", f"model.layers.{index}"
        if kind == "full_attention":
            yield from _attention_rules(megatron, hf, config)
        else:
            yield from _delta_rules(megatron, hf, config)
        yield from _feed_forward_rules(megatron, hf, config, is_packed)


def _head_rules(config: ModelConfig, is_packed: IsPacked) -> Iterator[Rule]:
    """Several MTP layers share `fc` and the norms in Hugging Face's format; Megatron has them once per layer."""
    if config.num_mtp_layers:
        size = config.hidden_size
        yield _shared(_same("eh_proj.weight", "mtp.fc.weight", (size, 2 * size), 0), config)
        norms = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "final_layernorm": "norm"}
        for megatron, hf in norms.items():
            yield _shared(_norm(f"{megatron}.weight", f"mtp.{hf}.weight", size), config)
    for index in range(config.num_mtp_layers):
        megatron, hf = f"mtp.layers.{index}.transformer_layer", f"mtp.layers.{index}"
        yield from _attention_rules(megatron, hf, config)
        yield from _feed_forward_rules(megatron, hf, config, is_packed)


def _shared(rule: Rule, config: ModelConfig) -> Rule:
    first, *others = (f"mtp.layers.{index}.{rule.megatron}" for index in range(config.num_mtp_layers))
    fields = {name: getattr(rule, name) for name in ("shape", "hf", "hf_shapes", "layout", "shifts", "axis", "blocks")}
    return Rule(megatron=first, copies=tuple(others), written_copies=tuple(others), **fields)


def _attention_rules(megatron: str, hf: str, config: ModelConfig) -> Iterator[Rule]:
    hidden, dim = config.hidden_size, config.head_dim
    query_rows, key_rows = 2 * config.num_heads * dim, config.num_kv_heads * dim
    rows = query_rows + 2 * key_rows
    yield _input_norm(megatron, hf, hidden, "linear_qkv")
    yield Rule(
        megatron=f"{megatron}.self_attention.linear_qkv.weight",
        shape=(rows, hidden),
        hf=tuple(f"{hf}.self_attn.{name}_proj.weight" for name in "qkv"),
        hf_shapes=((query_rows, hidden), (key_rows, hidden), (key_rows, hidden)),
        layout=GatedQKV(config.num_kv_heads, dim),
        axis=0,
        blocks=(rows,),
    )
    for name in "qk":
        yield _norm(f"{megatron}.self_attention.{name}_layernorm.weight", f"{hf}.self_attn.{name}_norm.weight", dim)
    output = (hidden, config.num_heads * dim)
    yield _same(f"{megatron}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", output, 1)


def _delta_rules(megatron: str, hf: str, config: ModelConfig) -> Iterator[Rule]:
    """Megatron's in_proj is HF's qkv, z, b and a; every rank has its heads of q, k, v, z, b and a."""
    hidden, heads = config.hidden_size, config.delta_value_heads
    keys, values = config.delta_key_heads * config.delta_key_dim, heads * config.delta_value_dim
    blocks = (keys, keys, values, values, heads, heads)
    megatron_attention, hf_attention = f"{megatron}.self_attention", f"{hf}.linear_attn"
    yield _input_norm(megatron, hf, hidden, "in_proj")
    sizes = (config.conv_channels, values, heads, heads)
    yield Rule(
        megatron=f"{megatron_attention}.in_proj.weight",
        shape=(sum(blocks), hidden),
        hf=tuple(f"{hf_attention}.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")),
        hf_shapes=tuple((size, hidden) for size in sizes),
        layout=Rows(sizes),
        axis=0,
        blocks=blocks,
        sections=tuple(zip(("query", "key", "value", "z", "beta", "alpha"), blocks, strict=True)),
    )
    yield _conv_rule(megatron_attention, hf_attention, config, blocks[:3])
    for name in ("A_log", "dt_bias"):
        yield _same(f"{megatron_attention}.{name}", f"{hf_attention}.{name}", (heads,), 0)
    yield Rule(
        megatron=f"{megatron_attention}.out_norm.weight",
        shape=(config.delta_value_dim,),
        hf=(f"{hf_attention}.norm.weight",),
        hf_shapes=((config.delta_value_dim,),),
        layout=Same(),
        shifts=(-1, 0),
        plain_name=f"{megatron_attention}.linear_attn.norm.weight",
    )
    yield _same(f"{megatron_attention}.out_proj.weight", f"{hf_attention}.out_proj.weight", (hidden, values), 1)


def _conv_rule(megatron: str, hf: str, config: ModelConfig, blocks: tuple[int, ...]) -> Rule:
    shape = (config.conv_channels, 1, config.conv_width)
    return Rule(
        megatron=f"{megatron}.conv1d.weight",
        shape=shape,
        hf=(f"{hf}.conv1d.weight",),
        hf_shapes=(shape,),
        layout=Same(),
        axis=0,
        blocks=blocks,
        sections=tuple(zip(("query", "key", "value"), blocks, strict=True)),
    )


def _feed_forward_rules(megatron: str, hf: str, config: ModelConfig, is_packed: IsPacked) -> Iterator[Rule]:
    hidden = config.hidden_size
    yield Rule(
        megatron=f"{megatron}.pre_mlp_layernorm.weight",
        shape=(hidden,),
        hf=(f"{hf}.post_attention_layernorm.weight",),
        hf_shapes=((hidden,),),
        layout=Same(),
        shifts=(0, 1),
        fused_name=f"{megatron}.mlp.linear_fc1.layer_norm_weight",
        te_fuses=not config.is_moe,
    )
    if not config.is_moe:
        yield from _mlp_rules(f"{megatron}.mlp", f"{hf}.mlp", config.intermediate_size, hidden)
        return
    yield _same(f"{megatron}.mlp.router.weight", f"{hf}.mlp.gate.weight", (config.num_experts, hidden), None)
    yield from _expert_rules(f"{megatron}.mlp.experts", f"{hf}.mlp.experts", config, is_packed(hf))
    yield from _mlp_rules(
        f"{megatron}.mlp.shared_experts", f"{hf}.mlp.shared_expert", config.shared_expert_size, hidden
    )
    gate = "mlp.shared_expert_gate.weight"
    yield _same(f"{megatron}.mlp.shared_experts.gate_weight", f"{hf}.{gate}", (1, hidden), None)


def _mlp_rules(megatron: str, hf: str, size: int, hidden: int) -> Iterator[Rule]:
    yield Rule(
        megatron=f"{megatron}.linear_fc1.weight",
        shape=(2 * size, hidden),
        hf=(f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
        hf_shapes=((size, hidden), (size, hidden)),
        layout=Rows((size, size)),
        axis=0,
        blocks=(size, size),
    )
    yield _same(f"{megatron}.linear_fc2.weight", f"{hf}.down_proj.weight", (hidden, size), 1)


def _expert_rules(megatron: str, hf: str, config: ModelConfig, is_packed: bool) -> Iterator[Rule]:
    count, size, hidden = config.num_experts, config.expert_size, config.hidden_size
    kinds: tuple[tuple[str, Shape, tuple[str, ...], str, Layout, int], ...] = (
        ("linear_fc1", (2 * size, hidden), ("gate_proj", "up_proj"), "gate_up_proj", Rows((size, size)), 1),
        ("linear_fc2", (hidden, size), ("down_proj",), "down_proj", Same(), 2),
    )
    for name, shape, parts, packed, inner, axis in kinds:
        split = tuple(f"{hf}.{expert}.{part}.weight" for expert in range(count) for part in parts)
        part_shape = (shape[0] // len(parts), shape[1])
        yield Rule(
            megatron=f"{megatron}.{name}.weight",
            shape=(count, *shape),
            hf=(f"{hf}.{packed}",) if is_packed else split,
            hf_shapes=((count, *shape),) if is_packed else (part_shape,) * len(split),
            layout=Same() if is_packed else PerExpert(len(parts), inner),
            axis=axis,
            blocks=(size, size) if axis == 1 else (size,),
            is_experts=True,
        )


def _vocabulary(megatron: str, hf: str, config: ModelConfig, copies: tuple[str, ...] = ()) -> Rule:
    shape = (config.vocab_size, config.hidden_size)
    return Rule(
        megatron=megatron,
        shape=shape,
        hf=(hf,),
        hf_shapes=(shape,),
        layout=Same(),
        axis=0,
        blocks=shape[:1],
        copies=copies,
        may_exceed=True,
    )


def _input_norm(megatron: str, hf: str, size: int, linear: str) -> Rule:
    return Rule(
        megatron=f"{megatron}.input_layernorm.weight",
        shape=(size,),
        hf=(f"{hf}.input_layernorm.weight",),
        hf_shapes=((size,),),
        layout=Same(),
        shifts=(0, 1),
        fused_name=f"{megatron}.self_attention.{linear}.layer_norm_weight",
    )


def _norm(megatron: str, hf: str, size: int) -> Rule:
    return Rule(megatron=megatron, shape=(size,), hf=(hf,), hf_shapes=((size,),), layout=Same(), shifts=(0, 1))


def _same(megatron: str, hf: str, shape: Shape, axis: int | None) -> Rule:
    blocks = () if axis is None else (shape[axis],)
    return Rule(megatron=megatron, shape=shape, hf=(hf,), hf_shapes=(shape,), layout=Same(), axis=axis, blocks=blocks)
