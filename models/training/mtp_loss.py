"""The loss of a draft head that drafts `depth` tokens by recursion, and how often its drafts would be accepted.

With x the tokens, h the target's hidden states *after* its final norm, y^0 = h, at depth k = 1..D and position t:

    y^k_t = head_k([norm(embed(x_{t+k})) ; norm(y^{k-1}_t)]) ,   q^k_t = softmax(lm_head y^k_t)   predicts x_{t+k+1}
    CE_k = Σ_t m_t · (−log q^k_t[x_{t+k+1}]) / max(Σ_t m_t, 1) ,   mtp_loss = factor · mean_k CE_k

Each depth has a layer of its own, all that are deeper have the last one, as drafts do in mode `vanilla`. Row t counts
(m_t) when x_{t+1} .. x_{t+k+1} are all labels of one document. The target's own distribution p^k_t for x_{t+k+1} is
that of its row t + k: `soft_ce` replaces −log q[x] by −Σ p log q, `tv` by 1 − Σ min(p, q). By default gradients reach
the head alone. Rows [B, T] are documents, padded on the right (models/training/packing.py); H hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.forward_batch import ForwardBatch
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.mtp_settings import MTPSettings, TrainingError
from models.training.packing import IGNORED, Packing, intersect_mask, shift

ROWS_AT_ONCE = 2048  # of logits, which are as wide as the vocabulary


@dataclass(frozen=True)
class MTPOutput:
    """What the head has lost, and its metrics, all of D depths and without gradients but for `mtp_loss`.

    Attributes:
        mtp_loss: scalar, scaled: what is added to the loss.
        mtp_loss_per_depth: [D] means, not scaled.
        mtp_token_count: [D] int64, rows that count.
        mtp_accept_rate: [D] share of rows whose argmax is the label.
        mtp_cumulative_accept_rate: [D] share of rows that are right at this depth and at every one before it.
        mtp_greedy_accept_rate: [D] share of rows whose argmax is the target's argmax; None unless measured.
        mtp_overlap: [D] mean Σ min(p, q), the acceptance of speculative sampling; None unless measured.
        token_losses: [D, B, T], 0 where a row does not count.
    """

    mtp_loss: Tensor
    mtp_loss_per_depth: Tensor
    mtp_token_count: Tensor
    mtp_accept_rate: Tensor
    mtp_cumulative_accept_rate: Tensor
    mtp_greedy_accept_rate: Tensor | None
    mtp_overlap: Tensor | None
    token_losses: Tensor


def compute_mtp_loss(
    draft: Qwen35MTP, token_ids: Tensor, hidden: Tensor, labels: Tensor, settings: MTPSettings
) -> MTPOutput:
    """The loss of rows [B, T]: token_ids int64, hidden [B, T, H] of the target, labels = token_ids or IGNORED.

    Labels stand at their own tokens, as in transformers. All of them IGNORED gives a loss and gradients of 0. Raises
    TrainingError for shapes that do not fit.
    """
    _check(draft, token_ids, hidden, labels)
    teacher = hidden.detach() if settings.measure or settings.mtp_loss_type != "ce" else None
    state = hidden
    if settings.mtp_detach:
        state = hidden.detach().requires_grad_(torch.is_grad_enabled())  # reentrant recompute needs an input with one
    is_label = shift(labels, 1, IGNORED) != IGNORED
    is_right = torch.ones_like(is_label)
    depths = []
    for depth in range(1, settings.mtp_depth + 1):
        state = _run_depth(draft, shift(token_ids, depth, 0), state, depth, settings)
        counts = intersect_mask(is_label, depth)
        goals = shift(labels, depth + 1, IGNORED)
        policy = None if teacher is None else shift(teacher, depth, 0)[counts]
        rows = _score(draft, state[counts], goals[counts], policy, settings)
        is_right = is_right & counts.masked_scatter(counts, rows.is_right)
        depths.append(_Depth(rows, counts, is_right))
    return _summarise(depths, settings)


def compute_packed_mtp_loss(
    draft: Qwen35MTP, token_ids: Tensor, hidden: Tensor, labels: Tensor, packing: Packing, settings: MTPSettings
) -> MTPOutput:
    """`compute_mtp_loss` of packed documents: token_ids, labels [N], hidden [N, H], computed document by document
    (`packing.pack(target.forward_sequence(packing.unpack(token_ids)))`). `token_losses` stay rows."""
    return compute_mtp_loss(
        draft, packing.unpack(token_ids), packing.unpack(hidden), packing.unpack(labels, IGNORED), settings
    )


def run_head(draft: Qwen35MTP, embedding: Tensor, hidden: Tensor, layer: int = 0) -> Tensor:
    """The head over rows: embedding [B, T, H] of the tokens after those that hidden [B, T, H] belongs to -> [B, T, H]
    after its norm, in the head's dtype. The same as `draft.forward_sequence`, for an embedding that is given."""
    dtype = draft.fc.weight.dtype
    embedding, hidden = draft.pre_fc_norm_embedding(embedding.to(dtype)), draft.pre_fc_norm_hidden(hidden.to(dtype))
    x = draft.fc(fuse(embedding, hidden)).flatten(0, 1)
    forward = ForwardBatch.whole_sequences(torch.empty(hidden.shape[:2], dtype=torch.int64, device=hidden.device))
    x, delta = draft.layers[layer](x, None, forward, draft.target.rotary(forward.positions))
    return draft.norm.add(x, delta)[0].unflatten(0, hidden.shape[:2])


def fuse(embedding: Tensor, hidden: Tensor) -> Tensor:
    """What `mtp.fc` reads: the embedding first."""
    return torch.cat([embedding, hidden], dim=-1)


def clip_separately(groups: Mapping[str, Iterable[nn.Parameter]], max_norm: float) -> dict[str, float]:
    """Scale the gradients of each group down to `max_norm` by its own norm, so that a head that learns does not shrink
    the step of its target. Returns the norms before."""
    return {name: float(nn.utils.clip_grad_norm_(list(group), max_norm)) for name, group in groups.items()}


class _Rows(NamedTuple):
    """M rows that count: losses [M] with gradients; is_right, agrees [M] bool and overlap [M] without."""

    losses: Tensor
    is_right: Tensor
    agrees: Tensor | None
    overlap: Tensor | None


@dataclass(frozen=True)
class _Depth:
    """The rows of one depth, where they stand [B, T], and which are right up to here [B, T]."""

    rows: _Rows
    counts: Tensor
    is_right: Tensor


def _check(draft: Qwen35MTP, token_ids: Tensor, hidden: Tensor, labels: Tensor) -> None:
    expected = (*token_ids.shape, draft.fc.weight.shape[0])
    if token_ids.dim() != 2 or labels.shape != token_ids.shape or tuple(hidden.shape) != expected:
        raise TrainingError(
            f"token ids are {list(token_ids.shape)}, labels {list(labels.shape)}, hidden states {list(hidden.shape)}: "
            "[B, T] twice and [B, T, hidden_size] are needed"
        )


def _run_depth(draft: Qwen35MTP, next_ids: Tensor, state: Tensor, depth: int, settings: MTPSettings) -> Tensor:
    weight = draft.target.embed_tokens.weight
    assert isinstance(weight, Tensor), "quantized weights have no gradients"
    embedding = F.embedding(next_ids, weight.detach() if settings.mtp_detach else weight)
    run = partial(run_head, draft, layer=min(depth, draft.num_layers) - 1)
    if settings.recompute == "none" or not torch.is_grad_enabled():
        return run(embedding, state)
    return checkpoint(run, embedding, state, use_reentrant=settings.recompute == "reentrant")


def _score(draft: Qwen35MTP, y: Tensor, goals: Tensor, policy: Tensor | None, settings: MTPSettings) -> _Rows:
    """Losses of y [M, H] against goals [M] int64 and the target's hidden states policy [M, H], some rows at a time."""
    weight = draft.target.lm_head.weight
    assert isinstance(weight, Tensor), "quantized weights have no gradients"
    score = partial(_score_rows, weight.detach() if settings.mtp_detach else weight, settings.mtp_loss_type)
    policies = [None] * len(goals.split(ROWS_AT_ONCE)) if policy is None else policy.split(ROWS_AT_ONCE)
    parts = list(zip(y.split(ROWS_AT_ONCE), goals.split(ROWS_AT_ONCE), policies, strict=True))
    if len(parts) == 1:
        return score(*parts[0])
    scored = [checkpoint(score, *part, use_reentrant=False) for part in parts]  # keeps no logits
    agrees = None if policy is None else torch.cat([rows.agrees for rows in scored])
    overlap = None if policy is None else torch.cat([rows.overlap for rows in scored])
    return _Rows(
        torch.cat([rows.losses for rows in scored]), torch.cat([rows.is_right for rows in scored]), agrees, overlap
    )


def _score_rows(weight: Tensor, loss_type: str, y: Tensor, goals: Tensor, policy: Tensor | None) -> _Rows:
    """Logits and what follows from them in float32 or wider."""
    log_q = _log_probs(y.to(weight.dtype), weight)
    is_right = log_q.detach().argmax(-1) == goals
    if policy is None:
        return _Rows(F.nll_loss(log_q, goals, reduction="none"), is_right, None, None)
    with torch.no_grad():
        log_p = _log_probs(policy, weight)
        agrees = log_q.argmax(-1) == log_p.argmax(-1)
        p = log_p.exp()
    overlap = torch.minimum(p, log_q.exp()).sum(-1)
    losses = {
        "ce": lambda: F.nll_loss(log_q, goals, reduction="none"),
        "soft_ce": lambda: -(p * log_q).sum(-1),
        "tv": lambda: 1 - overlap,
    }
    return _Rows(losses[loss_type](), is_right, agrees, overlap.detach())


def _log_probs(rows: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(rows, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _summarise(depths: list[_Depth], settings: MTPSettings) -> MTPOutput:
    count = torch.stack([depth.counts.sum() for depth in depths])

    def mean(sums: list[Tensor]) -> Tensor:
        return torch.stack(sums) / count.clamp(min=1)

    def mean_or_none(columns: list[Tensor | None]) -> Tensor | None:
        present = [column.sum() for column in columns if column is not None]
        return mean(present) if present else None

    losses = mean([depth.rows.losses.sum() for depth in depths])
    return MTPOutput(
        mtp_loss=settings.mtp_loss_scaling_factor * losses.mean(),
        mtp_loss_per_depth=losses.detach(),
        mtp_token_count=count,
        mtp_accept_rate=mean([depth.rows.is_right.sum() for depth in depths]),
        mtp_cumulative_accept_rate=mean([depth.is_right.sum() for depth in depths]),
        mtp_greedy_accept_rate=mean_or_none([depth.rows.agrees for depth in depths]),
        mtp_overlap=mean_or_none([depth.rows.overlap for depth in depths]),
        token_losses=torch.stack([_spread(depth) for depth in depths]),
    )


def _spread(depth: _Depth) -> Tensor:
    """The losses at their places [B, T]."""
    losses = depth.rows.losses.detach()
    return torch.zeros(depth.counts.shape, dtype=losses.dtype, device=losses.device).masked_scatter(
        depth.counts, losses
    )
