"""What dense and MoE must both show: the same logits and the same greedy tokens as transformers."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.qwen3_5.model import Qwen35
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.loading import draw_ids, load_ours, load_transformers, max_error

TOLERANCE = 1e-4


def check_logits_equal_transformers(directory: Path, *, prefix: str, tied: str, **options: Any) -> None:
    """One checkpoint of ours against transformers on the plainest checkpoint with the same values."""
    model, _ = load_ours(make_checkpoint(directory, prefix=prefix, tied=tied, **options))
    logits = model.compute_logits(model.forward_sequence(draw_ids(2, 90)))
    expected = _expected_logits(options.get("moe", False), tied != "no", prefix != "text")
    assert expected.abs().max() > 3
    assert max_error(logits, expected) < TOLERANCE


@functools.cache
def _expected_logits(moe: bool, is_tied: bool, nested: bool) -> Tensor:
    """transformers' logits; the vision-language class where `nested`."""
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(directory, moe=moe, prefix="vl" if nested else "text", tied="outer" if is_tied else "no")
        model = load_transformers(Path(directory))
    with torch.no_grad():
        return model(input_ids=draw_ids(2, 90)).logits


def check_greedy_tokens_equal_transformers(checkpoint: Path, count: int = 200) -> None:
    """`count` greedy tokens of two prompts: token by token, and with drafts that are sometimes right."""
    prompts = draw_ids(2, 37)
    generated = load_transformers(checkpoint).generate(
        prompts,
        attention_mask=torch.ones_like(prompts),  # otherwise prompt tokens equal to the pad id would be masked
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = generated[:, prompts.shape[1] :]
    model, _ = load_ours(checkpoint, mtp=False)
    assert torch.equal(_decode(model, prompts, count), expected)
    assert torch.equal(_decode_with_drafts(model, prompts, expected), expected)


def _decode(model: Qwen35, prompts: Tensor, count: int) -> Tensor:
    run, rows = CachedRun(model), [3, 1]
    forward, hidden = run.prefill(rows, prompts.tolist())
    newest = _greedy(model, hidden, forward.query_lens)[:, -1:]
    tokens = [newest]
    for _ in range(count - 1):
        _, hidden = run.prefill(rows, newest.tolist())
        newest = _greedy(model, hidden, (1, 1))
        tokens.append(newest)
    return torch.cat(tokens, dim=1)


def _decode_with_drafts(model: Qwen35, prompts: Tensor, truth: Tensor) -> Tensor:
    """Verify steps whose i-th step has i mod 4 right drafts of 3, for each request by itself."""
    results = []
    for row, prompt in enumerate(prompts.tolist(), start=1):
        run = CachedRun(model)
        run.prefill([row], [prompt[:20]])
        forward, hidden = run.prefill([row], [prompt[20:]])
        tokens = _greedy(model, hidden, forward.query_lens)[0, -1:].tolist()
        while len(tokens) < truth.shape[1]:
            drafts = (truth[row - 1, len(tokens) : len(tokens) + 3].tolist() + [0, 0, 0])[:3]
            drafts = [d if i < len(tokens) % 4 else (d + 1) % 320 for i, d in enumerate(drafts)]
            forward, hidden = run.verify([row], [[tokens[-1], *drafts]])
            targets = _greedy(model, hidden, forward.query_lens)[0].tolist()
            num_right = next((i for i in range(3) if targets[i] != drafts[i]), 3)
            run.accept([row], [num_right + 1])
            tokens += targets[: num_right + 1]
        results.append(tokens[: truth.shape[1]])
    return torch.tensor(results)


def _greedy(model: Qwen35, hidden: Tensor, query_lens: tuple[int, ...]) -> Tensor:
    return model.compute_logits(hidden).argmax(-1).view(len(query_lens), -1)
