"""Log-probabilities of prompt tokens, taken from the hidden states that prefill computes anyhow.

A chunk scores the prompt token behind each of its own, so the last one of a chunk scores the first one of the next
chunk, and chunk borders leave no gap. N tokens of the pass, H hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from kernels.sampling import Logprobs, compute_logprobs
from models.forward_batch import to_device
from models.qwen3_5.model import Qwen35
from server.backend.lane import Readback
from server.backend.pass_result import PassLogprobs
from server.backend.request_table import RequestTable
from server.request import Batch

# Rows of logits at a time, at least: fewer make a long prompt a long loop.
_LEAST_ROWS = 16


def score_prompts(target: Qwen35, table: RequestTable, hidden: Tensor, batch: Batch) -> PassLogprobs | None:
    """What the requests of a prefill asked for of the prompt tokens behind their chunks' own, on its way to the host;
    None if none did. hidden [N, H] of the whole pass.

    Runs in pieces of no more rows than a decode step may have: the memory plan has room for their logits.
    """
    num_tops = [work.sampling.prompt_logprobs if work.num_scored else None for work in batch.works]
    if all(num_top is None for num_top in num_tops):
        return None
    most = min(max(num_top or 0 for num_top in num_tops), table.vocab_size)
    rows: list[int] = []
    token_ids: list[int] = []
    spans, first = [], 0
    for work in batch.works:
        spans.append(range(len(rows), len(rows) + work.num_scored))
        rows += range(first, first + work.num_scored)
        token_ids += work.request.prompt_ids[work.start + 1 : work.start + 1 + work.num_scored]
        first += work.num_tokens
    size = max(_LEAST_ROWS, table.next_ids.numel())
    pieces = zip(
        to_device(rows, hidden.device).split(size), to_device(token_ids, hidden.device).split(size), strict=True
    )
    parts = [_score(target.compute_logits(hidden[at]), ids, most) for at, ids in pieces]
    return PassLogprobs(num_tops, spans, Readback(*(torch.cat(column) for column in zip(*parts, strict=True))))


def _score(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    return compute_logprobs(logits.to(torch.promote_types(logits.dtype, torch.float32)), token_ids, num_top)
