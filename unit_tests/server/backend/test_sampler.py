"""Rules and draws of a mixed batch equal a plain loop over requests and rows; logits [B, T, V]."""

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.sampling import draw
from models.forward_batch import CacheView, ForwardBatch
from server.backend.request_table import RequestTable
from server.backend.sampler import Sampler
from server.messages import SamplingParams, TokenLogprobs
from server.request import Batch, Request
from unit_tests.server.backend.tables import VOCAB_SIZE, admit, make_request, make_table, prefill_work, verify_work

EOS_IDS = (0, 1)
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6, "frequency_penalty": 0.9, "presence_penalty": -0.7},
    {"frequency_penalty": -1.1, "logit_bias": {3: 4.0, 4: -100.0}},
    {"presence_penalty": 1.7, "min_tokens": 6},
    {"min_tokens": 7, "stop_token_ids": (1, 5, 6), "logit_bias": {5: 2.0, 19: 1.0}},
)
LAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.6, "top_k": 5, "seed": -2},
    {"temperature": 1.2, "top_p": 0.7, "min_p": 0.05, "seed": 3},
)


def draw_settings(rng: random.Random) -> dict[str, Any]:
    return rng.choice(RULES) | rng.choice(LAWS)


def draw_request(rng: random.Random, row: int, settings: dict[str, Any]) -> Request:
    prompt, output = ([rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 6))] for _ in range(2))
    return make_request(row, prompt, output, **settings)


def draw_logits(num_requests: int, num_rows: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn((num_requests, num_rows, VOCAB_SIZE), generator=source, dtype=torch.float64)


def make_sampler(requests: list[Request], mtp_step: int = 3) -> Sampler:
    table: RequestTable = make_table(mtp_step)
    for request in requests:
        admit(table, request)
    return Sampler(table, EOS_IDS)


def verify_pass(requests: list[Request], drafts: list[list[int]]) -> tuple[ForwardBatch, Batch]:
    """Rows [newest token, drafts] of every request, from its last known position on."""
    window = [[request.output_ids[-1], *row] for request, row in zip(requests, drafts, strict=True)]
    counts = [len(row) for row in window]
    starts = [request.num_known - 1 for request in requests]
    positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
    token_ids = torch.tensor([token for row in window for token in row])
    rows = [request.row for request in requests]
    view = CacheView(
        cache=None,  # type: ignore[arg-type]
        rows=tuple(rows),  # type: ignore[arg-type]
        start_lens=torch.tensor(starts),
        accept_lens=torch.zeros(len(rows), dtype=torch.int64),
        page_table=torch.zeros(len(rows), 0, dtype=torch.int64),
        is_verify=True,
        row_ids=torch.tensor(rows),
    )
    forward = ForwardBatch(token_ids, torch.tensor(positions), tuple(counts), view)
    works = [verify_work(request, count) for request, count in zip(requests, counts, strict=True)]
    return forward, Batch(works, is_verify=True)


def prefill_pass(requests: list[Request], counts: list[int]) -> tuple[ForwardBatch, Batch]:
    """Chunks of counts[i] tokens from where each request stands."""
    spans = [range(one.num_computed, one.num_computed + count) for one, count in zip(requests, counts, strict=True)]
    ids = [token for one, span in zip(requests, spans, strict=True) for token in one.known_ids(span.start, span.stop)]
    positions = [position for span in spans for position in span]
    forward = ForwardBatch(torch.tensor(ids), torch.tensor(positions), tuple(counts))
    works = [prefill_work(request, count) for request, count in zip(requests, counts, strict=True)]
    return forward, Batch(works, is_verify=False)


def naive_ruled(logits: Tensor, request: Request, position: int, drafted: list[int]) -> list[float]:
    """logits [V] after the request's output and the drafted tokens, by its rules for the token at `position`."""
    params, row = request.sampling, logits.tolist()
    if position - len(request.prompt_ids) < params.min_tokens:
        for stop_id in (*EOS_IDS, *params.stop_token_ids):
            row[stop_id] = -float("inf")
    for token, bias in params.logit_bias.items():
        row[token] += bias
    written = Counter(request.output_ids + drafted)
    for token in range(VOCAB_SIZE):
        if token in written or token in request.prompt_ids:
            scale = params.repetition_penalty
            row[token] = row[token] / scale if row[token] > 0 else row[token] * scale
        row[token] -= params.frequency_penalty * written[token] + params.presence_penalty * (token in written)
    return row


def naive_token(logits: Tensor, request: Request, position: int, drafted: list[int]) -> int:
    """The token at `position` by the request's settings alone."""
    params, row = request.sampling, naive_ruled(logits, request, position, drafted)
    if params.temperature == 0:
        return max(range(VOCAB_SIZE), key=row.__getitem__)
    numbers = (params.temperature, params.top_k, params.top_p, params.min_p, request.seed, position)
    return int(draw(torch.tensor([row], dtype=logits.dtype), *(torch.tensor([number]) for number in numbers)))


def naive_logprobs(row: list[float], params: SamplingParams) -> list[float]:
    """The logarithm of the law of a request's draw, by sorting and adding up; row: see `naive_ruled`."""
    if params.temperature:
        row = [value / params.temperature for value in row]
        order = sorted(range(VOCAB_SIZE), key=lambda token: -row[token])
        kept = order[: params.top_k] if params.top_k else order
        kept = [token for token in kept if math.exp(row[token] - row[order[0]]) >= params.min_p]
        total, before, nucleus = math.fsum(math.exp(row[token]) for token in kept), 0.0, []
        for token in kept:
            nucleus += [token] if before < params.top_p else []
            before += math.exp(row[token]) / total
        row = [value if token in nucleus else -math.inf for token, value in enumerate(row)]
    total = math.log(math.fsum(map(math.exp, row)))
    return [value - total for value in row]


@pytest.fixture(params=["library", "torch"])
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the C++ kernels, and as without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr("kernels.sampling.load_library", lambda: None)
    return request.param


@pytest.mark.parametrize("seed", range(40))
def test_a_mixed_verify_batch_draws_what_a_loop_over_requests_and_rows_draws(seed: int, version: str) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng, row, draw_settings(rng)) for row in rng.sample(range(1, 6), rng.randint(1, 5))]
    drafts = [[rng.randrange(VOCAB_SIZE) for _ in range(3)] for _ in requests]
    forward, batch = verify_pass(requests, drafts)
    logits = draw_logits(len(requests), 4, seed)
    raw = logits.clone()
    expected = [
        [naive_token(logits[i, t], request, request.num_known + t, drafts[i][:t]) for t in range(4)]
        for i, request in enumerate(requests)
    ]
    sampled = make_sampler(requests).sample(logits.flatten(0, 1), forward, batch)
    assert sampled.token_ids.tolist() == expected
    assert torch.equal(sampled.logits, raw.flatten(0, 1)), "the raw logits stay raw"
    naive_lens = [1 + next((t for t in range(3) if row[t] != d[t]), 3) for row, d in zip(expected, drafts, strict=True)]
    assert sampled.match_lens.tolist() == naive_lens


@pytest.mark.parametrize(
    "rule",
    [
        {"logit_bias": {3: 40.0}},
        {"min_tokens": 30, "stop_token_ids": tuple(range(15))},
        {"repetition_penalty": 50.0},
        {"frequency_penalty": -40.0},
        {"presence_penalty": -40.0},
    ],
)
def test_one_rule_alone_moves_a_greedy_request_that_is_alone(rule: dict[str, Any]) -> None:
    request = make_request(2, list(range(12)), [12, 13, 14], temperature=0, **rule)
    logits = torch.arange(VOCAB_SIZE).flip(0).double().expand(1, 4, -1) / 10 + 1
    sampled = make_sampler([request]).sample(logits.flatten(0, 1), *verify_pass([request], [[1, 2, 3]]))
    expected = [naive_token(logits[0, t], request, request.num_known + t, [1, 2, 3][:t]) for t in range(4)]
    assert sampled.token_ids.tolist() == [expected] and 0 not in expected


@pytest.mark.parametrize("seed", range(10))
def test_a_mixed_prefill_batch_draws_at_the_end_of_each_chunk(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng, row, draw_settings(rng)) for row in rng.sample(range(1, 6), 4)]
    counts = [request.num_known - rng.choice([0, 0, 1]) for request in requests]
    forward, batch = prefill_pass(requests, counts)
    logits = draw_logits(4, 1, seed)
    sampled = make_sampler(requests).sample(logits.flatten(0, 1), forward, batch)
    ends = [int(count == request.num_known) for request, count in zip(requests, counts, strict=True)]
    assert sampled.accept_lens.tolist() == ends
    for i in range(4):
        if ends[i]:
            assert sampled.token_ids[i, 0] == naive_token(logits[i, 0], requests[i], counts[i], [])


def test_inside_prompts_nothing_is_drawn_and_nothing_emitted() -> None:
    rng = random.Random(0)
    requests = [draw_request(rng, row, draw_settings(rng) | {"logprobs": 2}) for row in (1, 3)]
    forward, batch = prefill_pass(requests, [request.num_known - 1 for request in requests])
    sampler = make_sampler(requests)
    sampled = sampler.sample(torch.empty(0, VOCAB_SIZE), forward, batch)
    assert sampled.accept_lens.tolist() == sampled.match_lens.tolist() == [0, 0] and sampled.is_finite.all()
    assert sampled.token_ids.shape == (2, 1) and sampler.logprobs(sampled, batch) is None


@pytest.mark.parametrize(
    ("drafts", "accept_len"), [([7, 8, 9], 4), ([7, 8, 3], 3), ([7, 3, 9], 2), ([3, 8, 9], 1), ([3, 3, 3], 1)]
)
def test_drafts_count_up_to_the_first_wrong_one_and_one_token_comes_on_top(drafts: list[int], accept_len: int) -> None:
    request = make_request(2, [1, 2], [6], temperature=0)
    logits = torch.zeros(1, 4, VOCAB_SIZE)
    logits[0, torch.arange(4), torch.tensor([7, 8, 9, 4])] = 1
    sampled = make_sampler([request]).sample(logits.flatten(0, 1), *verify_pass([request], [drafts]))
    assert sampled.token_ids.tolist() == [[7, 8, 9, 4]] and sampled.accept_lens.tolist() == [accept_len]


@pytest.mark.parametrize("num_output", [1, 2, 3, 4, 5, 6, 7])
def test_stop_ids_are_held_back_in_exactly_the_first_min_tokens_rows(num_output: int) -> None:
    request = make_request(3, [2, 2], [9] * num_output, temperature=0, min_tokens=5, stop_token_ids=(7,))
    logits = torch.zeros(1, 4, VOCAB_SIZE)
    logits[..., [7, *EOS_IDS]] = torch.tensor([5.0, 4.0, 3.0])
    logits[..., 8] = 2
    sampled = make_sampler([request]).sample(logits.flatten(0, 1), *verify_pass([request], [[8, 8, 8]]))
    num_held = min(4, max(0, 5 - num_output))
    assert sampled.token_ids.tolist() == [[8] * num_held + [7] * (4 - num_held)]


def test_a_penalty_counts_the_drafts_before_a_row_and_not_the_newest_token_twice() -> None:
    request = make_request(1, [2], [5], temperature=0, frequency_penalty=1.0)
    logits = torch.zeros(1, 4, VOCAB_SIZE)
    logits[..., 5], logits[..., 6] = 2.5, 0.75  # after one 5 it leads by 0.75, after two it trails by 0.25
    sampled = make_sampler([request]).sample(logits.flatten(0, 1), *verify_pass([request], [[9, 5, 9]]))
    assert sampled.token_ids.tolist() == [[5, 5, 6, 6]]


def test_plain_requests_in_company_of_ruled_ones_draw_as_alone() -> None:
    rng = random.Random(0)
    plain = [make_request(row, [3, 3], [4], **law) for row, law in ((2, LAWS[0]), (4, LAWS[1]))]
    ruled = [draw_request(rng, row, RULES[index] | LAWS[0]) for row, index in ((1, 2), (3, 5))]
    company = [ruled[0], plain[0], ruled[1], plain[1]]
    logits, drafts = draw_logits(4, 4, seed=5), [[4, 5, 6]] * 4
    together = make_sampler(company).sample(logits.flatten(0, 1), *verify_pass(company, drafts))
    for index, request in ((1, plain[0]), (3, plain[1])):
        alone = make_sampler([request]).sample(logits[index], *verify_pass([request], drafts[:1]))
        assert torch.equal(together.token_ids[[index]], alone.token_ids)
    assert torch.equal(together.token_ids[1], logits[1].argmax(-1))


def test_a_draft_row_with_the_targets_logits_draws_the_targets_token() -> None:
    rng = random.Random(1)
    settings = [law | {"logit_bias": {4: 1.0}, "min_tokens": 6} for law in LAWS]
    requests = [draw_request(rng, row, one) for row, one in enumerate(settings, start=1)]
    sampler, logits = make_sampler(requests), draw_logits(4, 4, seed=2)
    forward, batch = verify_pass(requests, [[0, 0, 0]] * 4)
    positions = forward.positions.view(4, 4) + 1
    target = sampler.sample(logits.flatten(0, 1), forward, batch).token_ids
    for row in range(4):
        drafted = sampler.draw(logits[:, row], batch.works, positions[:, row])
        assert torch.equal(drafted, target[:, row])


def test_equal_logits_at_other_positions_or_with_another_seed_draw_other_tokens() -> None:
    requests = [make_request(row, [1], [2], temperature=1.0, seed=seed) for row, seed in ((1, 5), (2, 5), (3, 6))]
    works, positions = [verify_work(request, 1) for request in requests], torch.arange(200).repeat(3)
    tokens = make_sampler(requests).draw(torch.zeros(600, VOCAB_SIZE), works, positions, [200] * 3).view(3, 200)
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    assert len(set(tokens[0].tolist())) == VOCAB_SIZE


def test_logprobs_are_the_raw_ones_of_emitted_tokens_for_those_who_asked() -> None:
    settings: list[dict[str, Any]] = [
        {"logprobs": 3, "logit_bias": {6: 50.0}, "temperature": 0},
        {"temperature": 0},
        {"logprobs": 0, "temperature": 0.5, "seed": 3, "presence_penalty": 2.0},
        {"logprobs": 2, "temperature": 0},
    ]
    requests = [make_request(row, [1, 2], [3], **one) for row, one in zip((5, 2, 3, 1), settings, strict=True)]
    sampler, logits = make_sampler(requests), draw_logits(4, 4, seed=9)
    forward, batch = verify_pass(requests, [[6, 6, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    sampled = replace(sampler.sample(logits.flatten(0, 1), forward, batch), accept_lens=torch.tensor([3, 2, 4, 0]))
    logprobs_of_pass = sampler.logprobs(sampled, batch)
    assert logprobs_of_pass is not None
    results = logprobs_of_pass.read(sampled.accept_lens.tolist())
    assert [len(entries) for entries in results] == [3, 0, 4, 0]
    logprobs = logits.log_softmax(-1)
    for index, num_top in ((0, 3), (2, 0)):
        for t, entry in enumerate(results[index]):
            row = logprobs[index, t].tolist()
            best = sorted(range(VOCAB_SIZE), key=row.__getitem__, reverse=True)[:num_top]
            assert entry.logprob == pytest.approx(row[int(sampled.token_ids[index, t])], abs=1e-12)
            assert entry.top_ids == best and entry.top_logprobs == pytest.approx([row[i] for i in best], abs=1e-12)
    assert sampled.token_ids[0, 0] == 6 and results[0][0].top_ids[0] != 6, "the bias moves the draw, not the logprobs"


def check_scores(entries: list[TokenLogprobs], expected: list[list[float]], token_ids: list[int], num_top: int) -> None:
    """They are of these tokens, in rows of these log-probabilities."""
    for entry, row, token_id in zip(entries, expected, token_ids, strict=True):
        best = sorted(range(VOCAB_SIZE), key=lambda token: -row[token])[:num_top]
        assert entry.logprob == pytest.approx(row[token_id], abs=1e-6) and entry.logprob > -math.inf
        assert entry.top_ids == best and entry.top_logprobs == pytest.approx([row[i] for i in best], abs=1e-6)
        assert entry.rank == 1 + sum(value > row[token_id] for value in row)


@pytest.mark.parametrize("seed", range(20))
def test_processed_logprobs_are_of_the_law_that_is_drawn_from_beside_raw_ones(seed: int, version: str) -> None:
    """Of a verify pass with ragged windows and of a prefill; -inf for tokens that a filter leaves out."""
    rng = random.Random(seed)
    kinds = [{"logprobs": 6, "logprobs_mode": "processed_logprobs"}, {"logprobs": 4}, {}]
    kinds = kinds[:1] + [rng.choice(kinds) for _ in range(4)]
    rows = rng.sample(range(1, 6), 5)
    requests = [draw_request(rng, row, draw_settings(rng) | kind) for row, kind in zip(rows, kinds, strict=True)]
    sampler, widths = make_sampler(requests), sorted((rng.randint(1, 4) for _ in requests), reverse=True)
    drafts = [[rng.randrange(VOCAB_SIZE) for _ in range(width - 1)] for width in widths]
    logits = [draw_logits(1, width, seed + width)[0] for width in widths]
    for is_verify in (True, False):
        chunks = [request.num_known for request in requests]
        forward, batch = verify_pass(requests, drafts) if is_verify else prefill_pass(requests, chunks)
        given = logits if is_verify else [one[:1] for one in logits]
        sampled = sampler.sample(torch.cat(given), forward, batch)
        scores = sampler.logprobs(sampled, batch)
        assert scores is not None
        for index, (request, entries) in enumerate(zip(requests, scores.read_all(), strict=True)):
            params, drafted = request.sampling, drafts[index]
            if params.logprobs is None:
                assert entries == []
                continue
            values = [
                naive_logprobs(naive_ruled(row, request, request.num_known + t, drafted[:t]), params)
                if params.wants_processed
                else row.log_softmax(-1).tolist()
                for t, row in enumerate(given[index])
            ]
            token_ids = sampled.token_ids[index, : len(values)].tolist()
            check_scores(entries, values, token_ids, params.logprobs)


@pytest.mark.parametrize("seed", range(10))
def test_ragged_windows_draw_and_count_what_each_request_draws_alone(seed: int) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng, row, draw_settings(rng)) for row in rng.sample(range(1, 6), 5)]
    widths = sorted((rng.randint(1, 4) for _ in requests), reverse=True)
    drafts = [[rng.randrange(VOCAB_SIZE) for _ in range(width - 1)] for width in widths]
    logits = [draw_logits(1, width, seed + width)[0] for width in widths]
    together = make_sampler(requests).sample(torch.cat(logits), *verify_pass(requests, drafts))
    assert together.token_ids.shape == (5, widths[0])
    first = 0
    for index, (request, width) in enumerate(zip(requests, widths, strict=True)):
        alone = make_sampler([request]).sample(logits[index], *verify_pass([request], drafts[index : index + 1]))
        assert torch.equal(together.token_ids[index, :width], alone.token_ids[0])
        assert torch.equal(together.next_ids[first : first + width], alone.next_ids)
        assert together.accept_lens[index] == alone.accept_lens[0]
        first += width


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_request_with_a_number_that_is_none_is_told_from_the_others(bad: float) -> None:
    requests = [make_request(row, [1], [2], temperature=0) for row in (1, 2, 3)]
    logits = draw_logits(3, 4, seed=1)
    logits[1, 2, 5] = bad
    sampled = make_sampler(requests).sample(logits.flatten(0, 1), *verify_pass(requests, [[1, 2, 3]] * 3))
    assert sampled.is_finite.tolist() == [True, False, True]
