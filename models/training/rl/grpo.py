"""The loss of a step: group-relative policy optimisation (Shao et al., 2024), and the draft head's imitation.

With rewards R_1 .. R_n of one prompt's samples, token t of sample i and ρ the policy's probability over that of the
weights that drew the token:

    A_i = (R_i − mean R) / (std R + ε) ,   L = −mean_{i,t} min(ρ A_i, clip(ρ, 1 − c, 1 + c) A_i)

The head learns the sampled tokens by cross entropy, whatever they earned: it is to imitate the policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.qwen3_5.model import Qwen35
from models.training.demo_batches import collate
from models.training.packing import IGNORED
from models.training.rollout_server import Rollout

_LEAST_STD = 1e-3


@dataclass(frozen=True)
class Batch:
    """Samples as rows [B, T], padded on the right.

    Attributes:
        token_ids: int64, prompts and samples.
        is_sampled: bool, true at the samples' tokens.
        logprobs: float32, of the weights that drew them; 0 elsewhere.
        advantages: [B] float32.
    """

    token_ids: Tensor
    is_sampled: Tensor
    logprobs: Tensor
    advantages: Tensor

    @property
    def labels(self) -> Tensor:
        """[B, T]: what the head learns."""
        return torch.where(self.is_sampled, self.token_ids, IGNORED)


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, a scalar with gradients, and what is told of it.

    Attributes:
        loss: scalar.
        logprob_gap: largest difference from the log-probabilities of those who drew the tokens.
        clip_share: share of tokens whose ratio is outside its range.
    """

    loss: Tensor
    logprob_gap: float
    clip_share: float


def make_batch(groups: Sequence[Sequence[Rollout]], rewards: Sequence[Sequence[float]]) -> Batch:
    """The samples of several prompts, those of one prompt compared with each other."""
    rollouts = [rollout for group in groups for rollout in group]
    rows = collate([(rollout.prompt_ids, rollout.output_ids) for rollout in rollouts])
    logprobs = torch.zeros(rows.token_ids.shape)
    for row, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids)
        logprobs[row, start : start + len(rollout.output_ids)] = torch.tensor(rollout.logprobs)
    return Batch(rows.token_ids, rows.is_target, logprobs, torch.cat([compare(group) for group in rewards]))


def compare(rewards: Sequence[float]) -> Tensor:
    """Advantages [n] of the samples of one prompt."""
    values = torch.tensor(rewards)
    return (values - values.mean()) / (values.std(correction=0) + _LEAST_STD)


def score(target: Qwen35, hidden: Tensor, token_ids: Tensor, is_sampled: Tensor) -> Tensor:
    """Log-probabilities of the sampled tokens, in row order; hidden [B, T, H] is the target's of token_ids [B, T]."""
    goals = is_sampled[:, 1:]
    logits = target.compute_logits(hidden[:, :-1][goals])
    return logits.log_softmax(-1).gather(-1, token_ids[:, 1:][goals][:, None])[:, 0]


def compute_policy_loss(target: Qwen35, hidden: Tensor, batch: Batch, eps_clip: float) -> PolicyLoss:
    """L of a batch; hidden [B, T, H] is the target's of its tokens."""
    logprobs = score(target, hidden, batch.token_ids, batch.is_sampled)
    gap = logprobs - batch.logprobs[:, 1:][batch.is_sampled[:, 1:]]
    advantages = batch.advantages[:, None].expand_as(batch.logprobs)[:, 1:][batch.is_sampled[:, 1:]]
    ratio = gap.exp()
    clipped = ratio.clamp(1 - eps_clip, 1 + eps_clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    return PolicyLoss(loss, float(gap.detach().abs().max()), float((ratio != clipped).float().mean()))
