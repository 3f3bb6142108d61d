"""Qwen3.5, dense: three Gated DeltaNet layers, one full-attention layer, and so on; pre-norm, SwiGLU.

The MoE model is this one with another feed-forward class; the draft head reuses `DecoderLayer`. N tokens, H hidden
size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from kernels.linear import MAX_ROWS, linear
from kernels.quantized_linear import QuantizedWeight, Weight
from kernels.rotary import rotary_angles
from models.config import ModelConfig
from models.forward_batch import ForwardBatch
from models.layers.cpu_decoder import CpuDecoder
from models.layers.embedding import Embedding
from models.layers.linear import Linear
from models.layers.mlp import MLP
from models.layers.norm import RMSNorm
from models.qwen3_5.attention import Attention, Rotary
from models.qwen3_5.gated_delta_net import GatedDeltaNet
from models.weight_slot import WeightSlot

FeedForward = Callable[[ModelConfig, torch.dtype], nn.Module]


def dense_feed_forward(config: ModelConfig, dtype: torch.dtype) -> MLP:
    """The feed-forward layer of the dense family."""
    return MLP(config.hidden_size, config.intermediate_size, dtype)


class DecoderLayer(nn.Module):
    """`x += mixer(norm(x)); x += mlp(norm(x))` with full attention or a delta net.

    x [N, H] comes with the last layer's `delta` (None: nothing) not added yet, so that a sum and the norm behind it are
    one pass over memory; what this layer adds last is returned in the same way.
    """

    def __init__(self, config: ModelConfig, mixer: Attention | GatedDeltaNet, mlp: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mixer = mixer
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = mlp

    def forward(self, x: Tensor, delta: Tensor | None, forward: ForwardBatch, rotary: Rotary) -> tuple[Tensor, Tensor]:
        normed, x = self.input_norm.add(x, delta)
        is_attention = isinstance(self.mixer, Attention)
        mixed = self.mixer(normed, forward, rotary) if is_attention else self.mixer(normed, forward)
        normed, x = self.post_norm.add(x, mixed)
        return x, self.mlp(normed)

    def store_keys(self, x: Tensor, forward: ForwardBatch, rotary: Rotary) -> None:
        """What later tokens will attend to of x [N, H], the input of an attention layer."""
        self.mixer.store_keys(self.input_norm(x), forward, rotary)  # type: ignore[operator]

    def kernel_weights(self) -> tuple[dict[str, Weight], int]:
        """Weights by the names of kernels/cpu/decoder.py, and the layer's index in its part of the cache."""
        norms = {"input_norm": self.input_norm.scale, "post_norm": self.post_norm.scale}
        return norms | self.mixer.kernel_weights() | self.mlp.kernel_weights(), self.mixer.layer  # type: ignore[operator]

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        mixer_name = "self_attn" if isinstance(self.mixer, Attention) else "linear_attn"
        yield from self.input_norm.weight_slots(f"{prefix}.input_layernorm")
        yield from self.mixer.weight_slots(f"{prefix}.{mixer_name}")
        yield from self.post_norm.weight_slots(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.weight_slots(f"{prefix}.mlp")  # type: ignore[operator]


class Qwen35(nn.Module):
    """The target model. `forward` gives the hidden states after the final norm, which the head and the draft read."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, feed_forward: FeedForward = dense_feed_forward):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, mixer, feed_forward(config, dtype), dtype) for mixer in self._mixers(dtype)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self._cpu_decoder = CpuDecoder(config, self.kernel_front, list(self.layers), self.norm)  # type: ignore[arg-type]
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _mixers(self, dtype: torch.dtype) -> Iterator[Attention | GatedDeltaNet]:
        counts = {"full_attention": 0, "linear_attention": 0}
        for kind in self.config.layer_types:
            mixer_class = Attention if kind == "full_attention" else GatedDeltaNet
            yield mixer_class(self.config, counts[kind], dtype)
            counts[kind] += 1

    def forward(self, forward: ForwardBatch) -> Tensor:
        """Hidden states [N, H] after the final norm."""
        if self._cpu_decoder.serves(forward):
            return self._cpu_decoder(forward.token_ids, forward)
        rotary = self.rotary(forward.positions)
        x, delta = self.embed_tokens(forward.token_ids), None
        for layer in self.layers:
            x, delta = layer(x, delta, forward, rotary)
        x, _ = self.norm.add(x, delta)
        if forward.view is not None and forward.view.is_verify:
            forward.record(x)
        return x

    @property
    def max_joint_tokens(self) -> int:
        """Known tokens that `forward_jointly` runs faster beside a decode step than after it; 0: never."""
        return self._cpu_decoder.max_known_rows

    def forward_jointly(self, passes: Sequence[ForwardBatch]) -> list[Tensor]:
        """Hidden states [N, H] of each pass; they share no row of the cache. Where a CPU's kernel can, the weights are
        read once for all of them."""
        if len(passes) > 1 and self.max_joint_tokens:
            return self._cpu_decoder.run_jointly(passes)
        return [self(forward) for forward in passes]

    def forward_sequence(self, token_ids: Tensor) -> Tensor:
        """Whole sequences, nothing stored, differentiable: token_ids [B, T] -> hidden states [B, T, H]."""
        return self(ForwardBatch.whole_sequences(token_ids)).unflatten(0, token_ids.shape)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] after the final norm -> logits [..., V] in float32 or wider."""
        return self.project(hidden).to(self.norm.scale.dtype)

    def project(self, hidden: Tensor, tokens: tuple[int, int] | None = None) -> Tensor:
        """Logits [..., V] as the output head gives them, as wide as it sums them on a CPU, or [..., n] of the n tokens
        from the first of `tokens` to the one before the second."""
        weight: Weight = self.lm_head.weight
        if tokens is not None:
            weight = weight.outputs(*tokens) if isinstance(weight, QuantizedWeight) else weight[slice(*tokens)]
        is_decode = hidden.device.type == "cpu" and hidden.dim() == 2 and not torch.is_grad_enabled()
        parts = hidden.split(MAX_ROWS) if is_decode else (hidden,)  # a row's bits do not depend on the others
        logits = [linear(part, weight, rounds=not is_decode) for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def forget_addresses(self) -> None:
        """Weights may lie elsewhere at the next pass."""
        self._cpu_decoder.forget()

    def kernel_front(self) -> dict[str, Weight]:
        """What stands before the layers, by the names of kernels/cpu/decoder.py."""
        return {"embedding": self.embed_tokens.weight}

    def rotary(self, positions: Tensor) -> Rotary:
        """cos and sin for positions [N]."""
        return rotary_angles(positions, self.config.rotary_dim, self.config.rope_theta, self.norm.scale.dtype)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every checkpoint tensor of the target, under the text-only prefix `model.`."""
        yield from self.embed_tokens.weight_slots("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.weight_slots(f"model.layers.{index}")  # type: ignore[operator]
        yield from self.norm.weight_slots("model.norm")
        if not self.config.tie_word_embeddings:
            yield from self.lm_head.weight_slots("lm_head")
