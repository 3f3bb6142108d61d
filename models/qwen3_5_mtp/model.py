"""The multi-token-prediction head of Qwen3.5: `fc` over [embedding, hidden], full-attention layers, a norm.

It borrows the target's embedding, output head, KV cache (its layers are the last ones) and rows. Row p pairs the token
after position p with the target's hidden state at p; its output predicts the token two after p, and is the hidden state
of the next recursive call. N tokens, H hidden size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.cpu.decoder import DraftChain, DraftVocabulary
from kernels.quantized_linear import Weight
from models.config import ModelConfig
from models.forward_batch import ForwardBatch
from models.layers.cpu_decoder import CpuDecoder
from models.layers.linear import Linear
from models.layers.norm import RMSNorm
from models.qwen3_5.attention import Attention
from models.qwen3_5.model import DecoderLayer, FeedForward, Qwen35, dense_feed_forward
from models.weight_slot import WeightSlot


class Qwen35MTP(nn.Module):
    """The draft model. With several layers they share `fc` and the norms; each has its own KV layer.

    It guesses tokens of `vocabulary` only, which may be set to fewer than the target has: the output head is the
    largest matrix that a draft reads.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, target: Qwen35, feed_forward: FeedForward = dense_feed_forward
    ):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.num_layers = max(1, config.num_mtp_layers)
        self._target = (target,)  # a tuple, so that the target is no submodule of its draft
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps, dtype)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps, dtype)
        self.fc = Linear(2 * hidden, hidden, dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                Attention(config, config.num_full_layers + index, dtype),
                feed_forward(config, dtype),
                dtype,
            )
            for index in range(self.num_layers)
        )
        self.norm = RMSNorm(hidden, eps, dtype)
        self.vocabulary = DraftVocabulary(config.vocab_size, config.vocab_size)
        self._cpu_decoders = [
            CpuDecoder(config, self.kernel_front, [layer], self.norm)  # type: ignore[list-item]
            for layer in self.layers
        ]

    @property
    def target(self) -> Qwen35:
        return self._target[0]

    def forward(
        self, next_ids: Tensor, hidden: Tensor, forward: ForwardBatch, layer: int = 0, last: Tensor | None = None
    ) -> Tensor:
        """next_ids [N] are the tokens *after* forward.positions [N] (forward.token_ids is not read); hidden [N, H]
        belongs to the positions.

        Returns [N, H] after the draft's norm: the input of the target's output head as it is. Where only the rows
        `last` [b] (flat indices, of the first b requests one each, b may be 0) are wanted, the others leave their keys
        and values in the cache: [b, H].
        """
        if self._cpu_decoders[layer].serves(forward):
            out = self._cpu_decoders[layer](next_ids, forward, hidden)
            return out if last is None else out[last]
        embedding = self.pre_fc_norm_embedding(self.target.embed_tokens(next_ids))
        x = self.fc(torch.cat([embedding, self.pre_fc_norm_hidden(hidden)], dim=-1))
        if last is not None:
            self.layers[layer].store_keys(x, forward, self.target.rotary(forward.positions))  # type: ignore[operator]
            x, forward = x[last], forward.next_tokens(next_ids[last], forward.positions[last])
            if len(last) == 0:
                return x
        x, delta = self.layers[layer](x, None, forward, self.target.rotary(forward.positions))
        return self.norm.add(x, delta)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H], as `forward` gives it -> logits [N, V] in float32 or wider: -inf of what is never guessed."""
        return self.project(hidden).to(self.norm.scale.dtype)

    def project(self, hidden: Tensor) -> Tensor:
        """The same as the output head gives them."""
        vocab_size, (num_first, tail) = self.target.config.vocab_size, self.vocabulary
        if num_first >= tail:
            return self.target.project(hidden)
        parts = [self.target.project(hidden, tokens) for tokens in ((0, num_first), (tail, vocab_size))]
        between = parts[0].new_full((len(hidden), tail - num_first), -torch.inf)
        return torch.cat([parts[0], between, parts[1]], dim=-1)

    def can_propose(self, forward: ForwardBatch) -> bool:
        """Whether `propose` may be called for the pass: one layer, few rows, on a CPU with a compiler."""
        return len(self.layers) == 1 and self._cpu_decoders[0].serves(forward)

    def propose(
        self,
        next_ids: Tensor,
        hidden: Tensor,
        forward: ForwardBatch,
        last: Tensor,
        alive: list[int],
        temperatures: Tensor,
        seeds: Tensor,
    ) -> Tensor:
        """`forward` at the rows `last` and then a chain of guesses [B, D] int64, in one call; D may be 0.

        last [B]: flat index of each request's newest row; alive[d] requests, which come first, want more than d drafts.
        """
        chain = DraftChain(last, alive, self.target.lm_head.weight, self.vocabulary, temperatures, seeds)
        return self._cpu_decoders[0].propose(next_ids, forward, hidden, chain)

    def forward_sequence(self, next_ids: Tensor, hidden: Tensor, layer: int = 0) -> Tensor:
        """Whole sequences, nothing stored, differentiable: next_ids [B, T], hidden [B, T, H] -> [B, T, H]."""
        forward = ForwardBatch.whole_sequences(next_ids)
        return self(next_ids.flatten(), hidden.flatten(0, 1), forward, layer).unflatten(0, next_ids.shape)

    def forget_addresses(self) -> None:
        """Weights, the target's too, may lie elsewhere at the next pass."""
        for decoder in self._cpu_decoders:
            decoder.forget()

    def kernel_front(self) -> dict[str, Weight]:
        """What stands before the layers, by the names of kernels/cpu/decoder.py."""
        norms = {"embedding_norm": self.pre_fc_norm_embedding.scale, "hidden_norm": self.pre_fc_norm_hidden.scale}
        return {**self.target.kernel_front(), "fc": self.fc.weight, **norms}

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every `mtp.*` checkpoint tensor."""
        yield from self.pre_fc_norm_embedding.weight_slots("mtp.pre_fc_norm_embedding")
        yield from self.pre_fc_norm_hidden.weight_slots("mtp.pre_fc_norm_hidden")
        yield from self.fc.weight_slots("mtp.fc")
        for index, layer in enumerate(self.layers):
            yield from layer.weight_slots(f"mtp.layers.{index}")  # type: ignore[operator]
        yield from self.norm.weight_slots("mtp.norm")
