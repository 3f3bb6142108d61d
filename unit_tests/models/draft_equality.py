"""What both draft heads must show: the formulas' logits, whole and cached, also when they call themselves again."""

from pathlib import Path

import torch
from torch import Tensor

from models.qwen3_5_mtp.model import Qwen35MTP
from unit_tests.checkpoints import make_config, make_tensors
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.loading import draw_ids, load_ours, max_error
from unit_tests.models.mtp_formulas import Weights, head_logits, mtp_head

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


def formula_weights(dtype: torch.dtype, /, **options: object) -> Weights:
    """The raw tensors of the checkpoint that `make_checkpoint` writes with these options."""
    config = make_config(**options)  # type: ignore[arg-type]
    return {name: tensor.to(dtype) for name, tensor in make_tensors(config).items()}


def check_whole_sequence_equals_formulas(
    checkpoint: Path, dtype: torch.dtype, weights: Weights, layer: int = 0
) -> None:
    """One pass over 30 tokens, from the target's own hidden states."""
    target, draft = load_ours(checkpoint, dtype)
    ids = draw_ids(1, 31)
    hidden = target.forward_sequence(ids[:, :-1])
    y = draft.forward_sequence(ids[:, 1:], hidden, layer)[0]
    expected = mtp_head(weights, ids[0, 1:], hidden[0], layer=layer)
    assert max_error(y, expected) < TOLERANCES[dtype]
    logits = head_logits(weights, expected)
    assert logits.abs().max() > 3
    assert max_error(target.compute_logits(y), logits) < TOLERANCES[dtype]


def check_recursion_equals_formulas(checkpoint: Path, dtype: torch.dtype, weights: Weights) -> None:
    """Four greedy drafts after a prompt: step s pairs draft s - 1 with the head's own output of step s - 1."""
    target, draft = load_ours(checkpoint, dtype)
    ids = draw_ids(21).tolist()
    run = CachedRun(target, draft)
    forward, hidden = run.prefill([2], [ids[:-1]])
    ours = _recursive_logits(run, forward, hidden, ids[1:], len(ids) - 2, count=4)

    next_ids, states = torch.tensor(ids[1:]), hidden
    for logits in ours:
        y = mtp_head(weights, next_ids, states)[-1:]
        expected = head_logits(weights, y)[0]
        assert max_error(logits, expected) < TOLERANCES[dtype]
        next_ids = torch.cat([next_ids, expected.argmax()[None]])
        states = torch.cat([states, y])


def _recursive_logits(run, forward, hidden, next_ids, newest_row, count) -> list[Tensor]:
    """One extension pass of the cached draft, then count - 1 single tokens after row `newest_row`: logits of each."""
    draft: Qwen35MTP = run.draft
    y = draft(torch.tensor(next_ids), hidden, forward)[newest_row : newest_row + 1]
    position = forward.positions[newest_row : newest_row + 1]
    all_logits = [draft.target.compute_logits(y)[0]]
    for step in range(1, count):
        draft_id = all_logits[-1].argmax()[None]
        y = draft(draft_id, y, forward.next_tokens(draft_id, position + step))
        all_logits.append(draft.target.compute_logits(y)[0])
    return all_logits


def check_cached_rounds_equal_whole_sequences(checkpoint: Path) -> None:
    """Prefill in chunks, then rounds of verify, extend and recurse; rejected and guessed rows leave no trace."""
    target, draft = load_ours(checkpoint, torch.float64)
    ids = draw_ids(80).tolist()
    run, length = CachedRun(target, draft), 0
    for chunk in (1, 7, 13):
        forward, hidden = run.prefill([1], [ids[length : length + chunk]])
        _recursive_logits(run, forward, hidden, ids[length + 1 : length + chunk + 1], chunk - 1, count=1)
        length += chunk
    for accepted in (2, 4, 1, 3, 4, 1, 1, 2, 3, 4):
        guess = ids[length : length + accepted] + [5] * (4 - accepted)
        forward, hidden = run.verify([1], [guess])
        run.accept([1], [accepted])
        next_ids = ids[length + 1 : length + accepted + 1] + [9] * (4 - accepted)
        ours = _recursive_logits(run, forward, hidden, next_ids, accepted - 1, count=4)
        length += accepted
        assert max_error(torch.stack(ours), _uncached_logits(draft, ids[: length + 1], count=4)) < 1e-10


def _uncached_logits(draft: Qwen35MTP, ids: list[int], count: int) -> Tensor:
    """The same drafts without any cache: everything is computed again from the tokens."""
    target = draft.target
    next_ids, states = torch.tensor([ids[1:]]), target.forward_sequence(torch.tensor([ids[:-1]]))
    all_logits = []
    for _ in range(count):
        y = draft.forward_sequence(next_ids, states)[:, -1:]
        all_logits.append(target.compute_logits(y)[0, 0])
        next_ids = torch.cat([next_ids, all_logits[-1].argmax()[None, None]], dim=1)
        states = torch.cat([states, y], dim=1)
    return torch.stack(all_logits)
