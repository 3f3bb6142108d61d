"""The draft head's cache and its guesses equal what is computed from nothing but the true tokens.

Target and draft are causal, so one pass over a request's final tokens gives the hidden states and draft rows of every
prefix; what the engine held along the way is compared with it afterwards.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.forward_batch import ForwardBatch
from models.qwen3_5.model import Qwen35
from server.backend.runner import Runner
from server.config import MAX_BEHIND
from server.engine import Engine
from server.messages import Generate, SamplingParams
from server.request import Request
from server.router.planner import SpeculationState
from unit_tests.checkpoints import make_checkpoint
from unit_tests.models.cached_run import CachedRun
from unit_tests.server.engines import generate, make_engine, make_prompts
from unit_tests.server.test_lossless import assert_every_accept_length_occurs

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LEANING = replace(GREEDY, logit_bias={5: 5.0})  # even a poor draft is often right
SEEDED = SamplingParams(temperature=0.8, max_tokens=20, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("one"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("three"), num_layers=4, mtp_layers=3, close_draft=True)


@dataclass(frozen=True)
class Snapshot:
    """What the device held for a request after a step: rows [L_mtp, 2, length, HKV, D] of the draft layers' cache, and
    the drafts (None inside the prompt). `num_rejected` drafts of the request were wrong so far."""

    request: Request
    length: int
    rows: Tensor
    drafts: list[int] | None
    num_steps: int
    num_rejected: int


def take_snapshots(engine: Engine) -> list[Snapshot]:
    return [take_snapshot(engine.runner, request) for request in engine.scheduler.running if request.num_computed]


def take_snapshot(runner: Runner, request: Request) -> Snapshot:
    table, kv, length = runner.table, runner.table.cache.kv, request.num_computed
    pages = table.page_table[request.row, : -(-length // kv.page_size)]
    assert table.seq_len[request.row] == length
    newest, *drafts = table.next_ids[request.row].tolist()
    if request.is_decoding:
        assert length == request.num_known - 1 and newest == request.output_ids[-1]
    rows = kv.data[runner.target.config.num_full_layers :, :, pages].flatten(2, 3)[:, :, :length]
    num_rejected = request.num_proposed - request.num_accepted
    return Snapshot(
        request,
        length,
        rows.clone(),
        drafts[: request.num_drafts] if request.is_decoding else None,
        request.num_steps,
        num_rejected,
    )


def serve(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], seed: int) -> list[Snapshot]:
    """Serve prompts that arrive at random steps; some are aborted at random."""
    rng, snapshots, waiting = random.Random(seed), [], list(enumerate(prompts))
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.6:
            index, prompt = waiting.pop(0)
            engine.add(Generate(str(index), prompt, params[index % len(params)]))
        if engine.scheduler.running and rng.random() < 0.02:
            engine.abort(rng.choice(engine.scheduler.running).id)
        engine.step()
        snapshots += take_snapshots(engine)
    return snapshots


def serve_all_at_once(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Snapshot]:
    for index, prompt in enumerate(prompts):
        engine.add(Generate(str(index), prompt, params[index % len(params)]))
    snapshots = []
    while engine.has_work():
        engine.step()
        snapshots += take_snapshots(engine)
    return snapshots


def true_hidden(runner: Runner, snapshots: list[Snapshot]) -> dict[Request, tuple[Tensor, Tensor]]:
    """Every request's tokens [n], and the target's hidden states [n, H]: one pass over everything that was emitted."""
    found = {}
    for request in {snapshot.request for snapshot in snapshots}:
        ids = torch.tensor(request.known_ids(0, request.num_known))
        found[request] = ids, runner.target.forward_sequence(ids[None])[0]
    return found


def draft_rows(runner: Runner, ids: Tensor, hidden: Tensor, num_layers: int) -> Tensor:
    """Keys and values [L_mtp, 2, n - 1, HKV, D] of the draft layers, from one pass of each over an empty cache.

    The last i rows of layer i would need tokens that do not exist; what they hold means nothing.
    """
    assert runner.draft is not None
    run = CachedRun(runner.target, runner.draft, num_rows=2, max_len=len(ids))
    forward = run.batch([1], [ids[:-1].tolist()], is_verify=False)
    next_ids, states = ids[1:], hidden[:-1]
    for layer in range(num_layers):
        states = runner.draft(next_ids, states, forward, layer)
        next_ids = torch.roll(next_ids, -1)
    return run.cache.kv.data[runner.target.config.num_full_layers :].flatten(2, 3)[:, :, forward.kv_slots]


def independent_drafts(
    runner: Runner, ids: Tensor, hidden: Tensor, bias: dict[int, float], num_drafts: int, num_layers: int
) -> list[int]:
    """Greedy drafts after tokens ids [n + 1] with true hidden states [n, H], without any cache.

    Layer 0 pairs token p + 1 with hidden state p, layer i pairs token p + 1 + i with layer i - 1's output at p; past
    the last layer, that one continues on its own guesses and its own newest output.
    """
    draft, next_ids, states = runner.draft, ids[1:], hidden
    assert draft is not None
    drafts: list[int] = []
    for step in range(num_drafts):
        layer = min(step, num_layers - 1)
        y = draft.forward_sequence(next_ids[None], states[None], layer)[0]
        logits = runner.target.compute_logits(y[-1])
        logits[list(bias)] += torch.tensor(list(bias.values()), dtype=logits.dtype)
        drafts.append(int(logits.argmax()))
        next_ids = torch.cat([next_ids, torch.tensor(drafts[-1:])])
        if step + 1 < num_layers:
            next_ids, states = next_ids[1:], y
        else:
            states = torch.cat([states, y[-1:]])
    return drafts


@torch.inference_mode()
def check(runner: Runner, snapshots: list[Snapshot], num_drafts: int, num_layers: int = 1) -> None:
    """Every snapshot's cache rows are those of the true tokens and hidden states, and so are greedy drafts.

    The last i rows of layer i pair with guesses, so they are left out.
    """
    truth = true_hidden(runner, snapshots)
    rows = {request: draft_rows(runner, *pair, num_layers) for request, pair in truth.items()}
    for snapshot in snapshots:
        request, length = snapshot.request, snapshot.length
        for layer in range(num_layers):
            held, expected = (x[layer, :, : length - layer] for x in (snapshot.rows, rows[request]))
            torch.testing.assert_close(held, expected, rtol=0, atol=1e-9)
        if snapshot.drafts is not None and request.sampling.temperature == 0:
            ids, hidden = (values[: length + extra] for values, extra in zip(truth[request], (1, 0), strict=True))
            bias = request.sampling.logit_bias
            expected = independent_drafts(runner, ids, hidden, bias, num_drafts, num_layers)
            assert snapshot.drafts == expected[: len(snapshot.drafts)]


@pytest.mark.parametrize(("mtp_step", "chunk_size"), [(1, 5), (2, 16), (3, 7), (4, 3)])
def test_after_any_history_the_draft_cache_and_the_drafts_are_those_of_the_true_tokens(
    checkpoint: Path, mtp_step: int, chunk_size: int
) -> None:
    engine = make_engine(
        checkpoint,
        mtp_step=mtp_step,
        chunked_prefill_size=chunk_size,
        max_model_len=64,
        max_total_tokens=84,
        max_running_requests=4,
        page_size=4,
    )
    rng = random.Random(mtp_step)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (30, 1, 2, 36, 14, 5, 9, 17, 4)]
    snapshots = serve(engine, prompts, [GREEDY, SEEDED], seed=mtp_step)
    assert_every_accept_length_occurs(engine)
    assert engine.scheduler.counters.num_preemptions > 0
    assert any(snapshot.drafts is None for snapshot in snapshots)
    check(engine.runner, snapshots, mtp_step)


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_the_last_row_of_a_chunk_pairs_with_the_next_token_of_the_prompt(checkpoint: Path, chunk_size: int) -> None:
    engine = make_engine(checkpoint, mtp_step=3, chunked_prefill_size=chunk_size)
    engine.add(Generate("a", list(range(17, 0, -1)), GREEDY))
    snapshots = []
    while not snapshots or snapshots[-1].drafts is None:
        engine.step()
        snapshots += take_snapshots(engine)
    ends = [*range(chunk_size, 17, chunk_size), 17]
    assert [snapshot.length for snapshot in snapshots] == ends
    check(engine.runner, snapshots, 3)


@pytest.mark.parametrize(("mtp_step", "num_layers"), [(2, 2), (3, 3), (5, 3)])
@pytest.mark.parametrize(("chunk_size", "num_requests"), [(8, 1), (512, 5)])
def test_chained_layers_hold_and_draft_what_an_uncached_chain_does_while_no_draft_is_rejected(
    three_layers: Path, mtp_step: int, num_layers: int, chunk_size: int, num_requests: int
) -> None:
    engine = make_engine(
        three_layers,
        mtp_step=mtp_step,
        mtp_mode="vanilla",
        chunked_prefill_size=chunk_size,
        max_running_requests=num_requests,
    )
    # In chunks of 8 the last one has at least as many tokens as there are layers, so no row waits for a later token.
    prompts = [list(range(index, index + length)) for index, length in enumerate((3, 5, 11, 20, 12, 4, 14))]
    snapshots = [one for one in serve_all_at_once(engine, prompts, [GREEDY, LEANING]) if one.num_rejected == 0]
    drafting = [one for one in snapshots if one.drafts is not None]
    assert len({one.request for one in drafting}) == len(prompts)
    assert sum(one.num_steps > 0 for one in drafting) >= 3, "some drafts follow an accepted run"
    check(engine.runner, snapshots, mtp_step, num_layers)


def test_eagle_uses_the_first_layer_of_several_only(three_layers: Path) -> None:
    engine = make_engine(three_layers, mtp_step=3, mtp_mode="eagle", chunked_prefill_size=6)
    kv = engine.runner.table.cache.kv.data
    assert len(kv) == engine.runner.target.config.num_full_layers + 1
    assert engine.runner.draft is not None
    for layer in list(engine.runner.draft.layers)[1:]:
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    snapshots = serve_all_at_once(engine, make_prompts(4, 20, 256, seed=4), [GREEDY])
    check(engine.runner, snapshots, 3)


class OracleDraft:
    """A draft head that returns the target's own hidden state after the token it is handed."""

    def __init__(self, target: Qwen35):
        self.target = target
        self.tokens: dict[int, dict[int, int]] = defaultdict(dict)  # row -> position -> token

    def can_propose(self, forward: ForwardBatch) -> bool:
        return False

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.target.compute_logits(hidden)

    def __call__(
        self, next_ids: Tensor, hidden: Tensor, forward: ForwardBatch, layer: int = 0, last: Tensor | None = None
    ) -> Tensor:
        assert forward.view is not None
        rows = [row for row, count in zip(forward.view.rows, forward.query_lens, strict=True) for _ in range(count)]
        values = (forward.positions.tolist(), forward.token_ids.tolist(), next_ids.tolist())
        states = []
        for row, position, token, following in zip(rows, *values, strict=True):
            tokens = self.tokens[row]
            if position == 0:
                tokens[0] = token
            tokens[position + 1 + layer] = following
            ids = [tokens[p] for p in range(position + 2 + layer)]
            states.append(self.target.forward_sequence(torch.tensor([ids]))[0, -1])
        return torch.stack(states) if last is None else torch.stack(states)[last]


@pytest.mark.parametrize(("mode", "mtp_step"), [("eagle", 3), ("vanilla", 4)])
def test_a_draft_that_knows_the_targets_logits_is_always_accepted_under_any_sampling(
    three_layers: Path, mode: str, mtp_step: int
) -> None:
    engine = make_engine(three_layers, mtp_step=mtp_step, mtp_mode=mode, chunked_prefill_size=8)
    assert engine.runner.drafter is not None
    engine.runner.drafter.draft = OracleDraft(engine.runner.target)  # type: ignore[assignment]
    settings = [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 1},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.02, "seed": 2},
        {"logit_bias": {5: 3.0, 7: -100.0}, "min_tokens": 8, "stop_token_ids": (5,)},
    ]
    for index, one in enumerate(settings):
        params = SamplingParams(max_tokens=9, ignore_eos=True, **one)  # type: ignore[arg-type]
        engine.add(Generate(str(index), [3, 1, 4], params))
    while engine.has_work():
        engine.step()
    counters = engine.scheduler.counters
    assert counters.num_accepted == counters.num_proposed > 10


@dataclass(frozen=True)
class Behind:
    """A snapshot whose newest `num_behind` rows the head has yet to catch up on; rows `missed` it never will."""

    snapshot: Snapshot
    num_behind: int
    missed: frozenset[int]


def plan_at_random(engine: Engine, seed: int) -> None:
    """Depths 0..max_draft, with runs of zeros that end before, at and long after what the head can catch up on."""
    rng, pauses = random.Random(seed), defaultdict[SpeculationState, int](int)

    def plan(requests: Sequence[SpeculationState]) -> list[int]:
        depths = []
        for request in requests:
            if pauses[request] == 0 and rng.random() < 0.2:
                pauses[request] = rng.choice([1, 2, 5, MAX_BEHIND - 1, MAX_BEHIND, MAX_BEHIND + 1, 2 * MAX_BEHIND + 3])
            depths.append(0 if pauses[request] else rng.randint(0, request.max_draft))
            pauses[request] = max(0, pauses[request] - 1)
        return depths

    engine.scheduler.planner.plan = plan  # type: ignore[method-assign]


def serve_ragged(engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Behind]:
    """Serve prompts that arrive every third step. A position falls out of what was kept when the request idles on
    with MAX_BEHIND of them; on another row everything is computed anew."""
    found: list[Behind] = []
    missed, before = defaultdict[tuple[Request, int], set[int]](set), dict[tuple[Request, int], int]()
    waiting, num_steps = list(enumerate(prompts)), 0
    while waiting or engine.has_work():
        if waiting and num_steps % 3 == 0:
            index, prompt = waiting.pop(0)
            engine.add(Generate(str(index), prompt, params[index % len(params)]))
        engine.step()
        num_steps += 1
        for request in engine.scheduler.running:
            if not request.num_computed:
                continue
            life = request, request.epoch
            if before.get(life) == request.num_behind == MAX_BEHIND:
                missed[life].add(request.num_computed - MAX_BEHIND - 1)
            before[life] = request.num_behind
            found.append(Behind(take_snapshot(engine.runner, request), request.num_behind, frozenset(missed[life])))
    return found


@torch.inference_mode()
def check_ragged(runner: Runner, found: list[Behind]) -> None:
    """Rows that the head has caught up on are the true ones; drafts too, where it has missed nothing."""
    truth = true_hidden(runner, [one.snapshot for one in found])
    rows = {request: draft_rows(runner, *pair, 1) for request, pair in truth.items()}
    num_drafted = 0
    for one in found:
        request, length = one.snapshot.request, one.snapshot.length
        known = [position for position in range(length - one.num_behind) if position not in one.missed]
        torch.testing.assert_close(one.snapshot.rows[:, :, known], rows[request][:, :, known], rtol=0, atol=1e-9)
        drafts, is_greedy = one.snapshot.drafts, request.sampling.temperature == 0
        if drafts and is_greedy and not one.missed:
            ids, hidden = (values[: length + extra] for values, extra in zip(truth[request], (1, 0), strict=True))
            assert drafts == independent_drafts(runner, ids, hidden, request.sampling.logit_bias, len(drafts), 1)
            num_drafted += 1
    assert num_drafted > 10


@pytest.mark.parametrize(("mtp_step", "num_tokens", "seed"), [(1, 400, 2), (3, 400, 1), (3, 170, 2), (5, 400, 2)])
def test_a_head_that_fell_behind_catches_up_on_what_was_kept(
    checkpoint: Path, mtp_step: int, num_tokens: int, seed: int
) -> None:
    settings = {"max_model_len": 100, "max_total_tokens": num_tokens, "max_running_requests": 4, "page_size": 4}
    engine = make_engine(checkpoint, mtp_step=mtp_step, chunked_prefill_size=16, **settings)
    plan_at_random(engine, seed)
    params = [replace(each, max_tokens=55) for each in (GREEDY, SEEDED, LEANING)]
    prompts = [[(7 * index + step) % 256 for step in range(length)] for index, length in enumerate((20, 1, 2, 9, 5))]
    found = serve_ragged(engine, prompts, params)
    behind = {one.num_behind for one in found}
    assert behind == set(range(MAX_BEHIND + 1)) and any(one.missed for one in found)
    assert any(one.missed and one.num_behind == 0 for one in found), "some catch up although they have missed rows"
    assert (engine.scheduler.counters.num_preemptions > 0) == (num_tokens < 400)
    check_ragged(engine.runner, found)
    outputs = {int(one.snapshot.request.id): one.snapshot.request.output_ids for one in found}
    plain = make_engine(checkpoint)
    expected = [generate(plain, [prompt], params[index % 3])[0] for index, prompt in enumerate(prompts)]
    assert [outputs[index] for index in range(len(prompts))] == expected


def test_rows_that_were_missed_for_too_long_stay_as_they_were(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=3, max_running_requests=3, max_model_len=100)
    plan_at_random(engine, 5)
    found = serve_ragged(engine, [[1, 2, 3], [4], [5, 6]], [replace(GREEDY, max_tokens=70)])
    first: dict[tuple[Request, int], Tensor] = {}
    truth = true_hidden(engine.runner, [one.snapshot for one in found])
    rows = {request: draft_rows(engine.runner, *pair, 1) for request, pair in truth.items()}
    for one in found:
        for position in one.missed:
            row = one.snapshot.rows[:, :, position]
            assert torch.equal(first.setdefault((one.snapshot.request, position), row), row)
    assert len(first) > 10
    different = [not torch.allclose(row, rows[request][:, :, position]) for (request, position), row in first.items()]
    assert all(different), "nothing was computed for them"


@pytest.mark.parametrize("num_idle", [1, 4, MAX_BEHIND, MAX_BEHIND + 5])
def test_idling_costs_no_pass_of_the_head_and_catching_up_one_over_the_rows_kept(
    checkpoint: Path, num_idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint, mtp_step=2)
    depths = iter([0] * (1 + num_idle) + [2] * 100)  # the first is planned with the prefill
    engine.scheduler.planner.plan = lambda requests: [min(next(depths), requests[0].max_draft)]  # type: ignore[assignment]
    passes: list[list[int]] = []
    assert engine.runner.draft is not None
    engine.runner.draft.register_forward_hook(lambda module, args, out: passes[-1].append(len(args[0])))
    monkeypatch.setattr(engine.runner.draft, "can_propose", lambda forward: False)  # one call would hide its passes
    engine.add(Generate("a", [3, 1, 4, 1, 5], replace(GREEDY, max_tokens=40)))
    for _ in range(num_idle + 3):
        passes.append([])
        engine.step()
    assert passes[0] == [5], "the prompt's rows, without a draft"
    assert passes[1 : 1 + num_idle] == [[]] * num_idle
    assert passes[1 + num_idle :] == [[min(num_idle, MAX_BEHIND) + 1, 1], [3, 1]]


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("mode", ["eagle", "vanilla"])
def test_random_depths_give_the_tokens_of_plain_decoding(three_layers: Path, mode: str, overlap: str) -> None:
    engine = make_engine(three_layers, mtp_step=4, mtp_mode=mode, overlap=overlap, chunked_prefill_size=7)
    plan_at_random(engine, 9)
    prompts = make_prompts(6, 30, 256, seed=6)
    params = [replace(each, max_tokens=30) for each in (GREEDY, LEANING, SEEDED)] * 2
    ragged = generate(engine, prompts, params)
    assert 0 < engine.scheduler.counters.num_accepted < engine.scheduler.counters.num_proposed
    assert ragged == generate(make_engine(three_layers), prompts, params)
