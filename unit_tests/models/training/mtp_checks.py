"""The laws of the MTP loss as checks that raise AssertionError, so that mutated code can be shown to break them.

The reference computes document by document, from raw checkpoint tensors (unit_tests/models/mtp_formulas.py) and plain
indices; it shares nothing with the code under test but the target's hidden states.
"""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from models.config import load_config
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.training.head_checkpoint import load_models
from models.training.mtp_loss import MTPOutput, compute_packed_mtp_loss
from models.training.mtp_settings import MTPSettings
from models.training.packing import IGNORED, Packing
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.draft_equality import formula_weights
from unit_tests.models.loading import draw_ids
from unit_tests.models.mtp_formulas import Weights, head_logits, mtp_head

LENS = (7, 1, 12, 3, 9)
NUM_LAYERS = 4


@cache
def checkpoint(dtype: str = "float64", moe: bool = False, tied: str = "outer", mtp_layers: int = 1) -> Path:
    """A tiny checkpoint, written once per process."""
    folder = Path(tempfile.mkdtemp())
    options = {"dtype": dtype, "moe": moe, "tied": tied, "mtp_layers": mtp_layers, "num_layers": NUM_LAYERS}
    return make_checkpoint(folder, **options)  # type: ignore[arg-type]


def load_pair(
    dtype: str = "float64", moe: bool = False, tied: str = "outer", mtp_layers: int = 1
) -> tuple[Qwen35, Qwen35MTP]:
    """Fresh target and head of `checkpoint`, all parameters with gradients."""
    folder = checkpoint(dtype, moe, tied, mtp_layers)
    return load_models(folder, load_config(folder), dtype=getattr(torch, dtype))


def draw_packed(lens: Sequence[int] = LENS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels (a fifth of them IGNORED) and positions [N] of packed documents."""
    ids = draw_ids(sum(lens), seed=seed)
    labels = ids.masked_fill(draw_ids(sum(lens), seed=seed + 1, vocab_size=5) == 0, IGNORED)
    return ids, labels, torch.cat([torch.arange(length) for length in lens])


def run_packed(
    pair: tuple[Qwen35, Qwen35MTP], ids: Tensor, labels: Tensor, positions: Tensor, settings: MTPSettings
) -> MTPOutput:
    """The code under test, from positions to the loss."""
    target, draft = pair
    packing = Packing.find(ids, positions)
    hidden = packing.pack(target.forward_sequence(packing.unpack(ids)))
    return compute_packed_mtp_loss(draft, ids, hidden, labels, packing, settings)


def reference_losses(
    weights: Weights, ids: Tensor, labels: Tensor, hidden: Tensor, depth: int, mtp_layers: int = 1
) -> list[list[float]]:
    """Of one document: −log q of every row that counts, depth by depth."""
    found, state, length = [], hidden, len(ids)
    for k in range(1, depth + 1):
        next_ids = torch.tensor([int(ids[t + k]) if t + k < length else 0 for t in range(length)])
        state = mtp_head(weights, next_ids, state, layer=min(k, mtp_layers) - 1)
        log_q = head_logits(weights, state).log_softmax(-1)
        rows = [t for t in range(length - k - 1) if all(labels[t + j] != IGNORED for j in range(1, k + 2))]
        found.append([-float(log_q[t, ids[t + k + 1]]) for t in rows])
    return found


def check_loss_equals_the_formulas(moe: bool = False, depth: int = 2, mtp_layers: int = 1) -> None:
    """Loss, per-depth means and counts of packed documents against the reference, in float64."""
    pair, (ids, labels, positions) = load_pair(moe=moe, mtp_layers=mtp_layers), draw_packed()
    options = {"dtype": "float64", "moe": moe, "num_layers": NUM_LAYERS, "mtp_layers": mtp_layers}
    weights = formula_weights(torch.float64, **options)
    with torch.no_grad():
        output = run_packed(pair, ids, labels, positions, MTPSettings(mtp_depth=depth))
    per_depth: list[list[float]] = [[] for _ in range(depth)]
    for doc, doc_labels in zip(ids.split(LENS), labels.split(LENS), strict=True):
        hidden = pair[0].forward_sequence(doc[None])[0].detach()
        found = reference_losses(weights, doc, doc_labels, hidden, depth, mtp_layers)
        for losses, more in zip(per_depth, found, strict=True):
            losses += more
    expected = torch.tensor([sum(losses) / len(losses) for losses in per_depth], dtype=torch.float64)
    assert output.mtp_token_count.tolist() == [len(losses) for losses in per_depth]
    assert min(output.mtp_token_count) > 3
    assert (output.mtp_loss_per_depth - expected).abs().max() < 1e-9
    assert abs(output.mtp_loss - 0.1 * expected.mean()) < 1e-9


def check_documents_do_not_see_each_other(moe: bool = False, depth: int = 2, tolerance: float = 0.0) -> None:
    """Whatever stands in one document, every token's loss in the others keeps its bits, or nearly so."""
    pair, (ids, labels, positions) = load_pair("float32", moe), draw_packed()
    settings = MTPSettings(mtp_depth=depth)
    with torch.no_grad():
        losses = run_packed(pair, ids, labels, positions, settings).token_losses
        for index, doc in enumerate(torch.arange(len(ids)).split(LENS)):
            changed_ids = ids.clone()
            changed_ids[doc] = draw_ids(len(doc), seed=77)
            changed_labels = torch.where(labels == IGNORED, IGNORED, changed_ids)
            changed = run_packed(pair, changed_ids, changed_labels, positions, settings).token_losses
            others = [other for other in range(len(LENS)) if other != index]
            assert (losses[:, others] - changed[:, others]).abs().max() <= tolerance
            assert len(doc) < 5 or not torch.equal(losses[:, index], changed[:, index])
