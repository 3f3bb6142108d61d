"""One row per request: what `admit` resets, what `commit` advances, and what penalties count."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.forward_batch import ForwardBatch
from server.backend.request_table import RequestTable, has_penalty
from server.messages import Generate, SamplingParams
from server.request import Request
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.backend.tables import VOCAB_SIZE, admit, make_request, make_table, prefill_work
from unit_tests.server.engines import generate, make_engine, make_prompts

PENALTIES: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 1.2},
    {"frequency_penalty": 0.3},
    {"presence_penalty": -0.5},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("table"), num_layers=4, close_draft=True)


def run_pass(table: RequestTable, rows: list[int], counts: list[int], is_verify: bool) -> ForwardBatch:
    """A pass of counts[i] tokens of rows[i]; the tokens do not matter here."""
    ids = torch.zeros(sum(counts), dtype=torch.int64)
    return ForwardBatch(ids, ids, tuple(counts), table.view(rows, is_verify, 2))


def test_admit_makes_one_row_that_of_an_empty_sequence_with_the_requests_settings() -> None:
    table = make_table()
    settings = {"temperature": 0.5, "top_p": 0.75, "min_p": 0.25, "top_k": 7, "min_tokens": 3, "seed": -(2**63)}
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.125, "presence_penalty": -2.0}
    request = make_request(2, [4, 5, 6, 4], max_tokens=20, stop_token_ids=(8, 3), **settings, **penalties)
    admit(table, request)
    assert table.longest_len[2] == 24 and table.stop_ids[2].tolist() == [3, 8, *[-1] * 14]
    assert table.page_table[2].tolist() == [0] * 5 and table.seq_len[2] == table.accept_len[2] == 0
    assert (table.prompt_len[2], table.min_tokens[2], table.top_k[2], table.seed[2]) == (4, 3, 7, -(2**63))
    assert (table.temperature[2], table.top_p[2], table.min_p[2]) == (0.5, 0.75, 0.25)
    assert (table.repetition[2], table.frequency[2], table.presence[2]) == (1.5, 0.125, -2.0)
    gdn = table.cache.gdn
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        assert (tensor[:, 2] == 0).all() and tensor[:, [0, 1, 3, 4, 5]].isnan().all()
    for column in (table.page_table, table.seq_len, table.accept_len, table.temperature, table.presence, table.seed):
        assert (column[[0, 1, 3, 4, 5]] == 9).all()


def test_a_verify_step_advances_every_row_by_what_it_accepted() -> None:
    table = make_table(mtp_step=2)
    table.seq_len[:] = torch.arange(6) * 10
    forward = run_pass(table, [4, 1, 2], [3, 3, 3], is_verify=True)
    table.commit(forward, torch.tensor([7, 8, 6]), torch.tensor([[1, 2], [3, 4], [5, 0]]), torch.tensor([3, 1, 2]))
    assert table.seq_len.tolist() == [0, 11, 22, 30, 43, 50]
    assert table.accept_len.tolist() == [9, 1, 2, 9, 3, 9]
    assert table.next_ids[[4, 1, 2]].tolist() == [[7, 1, 2], [8, 3, 4], [6, 5, 0]]
    assert (table.next_ids[[0, 3, 5]] == 9).all()


def test_a_prefill_advances_by_the_tokens_it_ran_and_leaves_nothing_to_fold() -> None:
    table = make_table(mtp_step=1)
    table.seq_len[:] = 5
    forward = run_pass(table, [3, 1], [7, 2], is_verify=False)
    table.commit(forward, torch.tensor([4, 6]), torch.tensor([[1], [2]]), torch.tensor([0, 1]))
    assert table.seq_len.tolist() == [5, 7, 5, 12, 5, 5]
    assert table.accept_len[[1, 3]].tolist() == [0, 0]
    assert table.next_ids[[3, 1]].tolist() == [[4, 1], [6, 2]]


def test_without_drafts_only_the_newest_token_waits() -> None:
    table = make_table(mtp_step=0)
    forward = run_pass(table, [2], [1], is_verify=True)
    table.commit(forward, torch.tensor([4]), torch.zeros((1, 0), dtype=torch.int64), torch.tensor([1]))
    assert table.next_ids.shape == (6, 1) and table.next_ids[2].tolist() == [4]


def test_of_too_many_stop_ids_the_end_of_a_sequence_is_known() -> None:
    table = make_table()
    message = Generate("many", [1, 2], SamplingParams(stop_token_ids=tuple(range(100, 130))))
    request = Request.create(message, (200,), max_model_len=50)
    request.row = 1
    admit(table, request)
    assert table.stop_ids[1].tolist() == [200, *range(100, 115)]


def test_pages_are_added_as_a_request_gets_them_and_forgotten_with_its_row() -> None:
    table = make_table()
    request = make_request(1, [1])
    admit(table, request)
    table.write_pages([replace(prefill_work(request, 1), first_page=0, pages=(5, 9))])
    assert table.page_table[1].tolist() == [5, 9, 0, 0, 0]
    other = make_request(2, [1])
    works = [
        replace(prefill_work(request, 1), first_page=2, pages=(2,)),
        prefill_work(other, 1),
        prefill_work(other, 1),
    ]
    table.write_pages([*works[:2], replace(works[2], pages=(7,))])
    assert table.page_table[2].tolist() == [7, 9, 9, 9, 9]
    assert table.page_table[1].tolist() == [5, 9, 2, 0, 0]
    admit(table, make_request(1, [2]))
    table.write_pages([replace(prefill_work(request, 1), pages=(3, 4))])
    assert table.page_table[1].tolist() == [3, 4, 0, 0, 0]


def test_a_row_that_begins_behind_a_reused_prefix_keeps_the_state_that_was_restored() -> None:
    table = make_table()
    table.cache.gdn.state[:, 2] = 7
    request = make_request(2, [4, 5, 6, 4])
    request.num_computed = 3
    table.admit(prefill_work(request, 1, is_new=True))
    assert table.seq_len[2] == 3 and table.accept_len[2] == 0 and (table.cache.gdn.state[:, 2] == 7).all()


def test_it_knows_what_ends_each_request() -> None:
    """The stop ids, and the tokens that fit behind those that are known."""
    table = make_table()
    admit(table, make_request(3, [1, 2], max_tokens=10, stop_token_ids=(8, 4)))
    admit(table, make_request(5, [1, 2, 3], max_tokens=4))
    stop_ids, room = table.read_ends(torch.tensor([5, 3, 3]), torch.tensor([3, 5, 11]))
    assert [sorted({*ids} - {-1}) for ids in stop_ids.tolist()] == [[], [4, 8], [4, 8]]
    assert room.tolist() == [3, 6, 0]


def test_a_view_tells_how_far_the_states_stand_behind() -> None:
    table = make_table()
    table.accept_len[torch.tensor([4, 2])] = torch.tensor([0, 3])
    table.seq_len[2] = 31
    view = table.view([4, 2], is_verify=True, num_pages=2)
    assert view.rows == (4, 2) and view.row_ids.tolist() == [4, 2] and view.is_verify
    assert view.start_lens.tolist() == [9, 31] and view.accept_lens.tolist() == [0, 3]


@pytest.mark.parametrize("seed", range(3))
def test_penalty_counts_equal_the_emitted_tokens_after_any_history(seed: int) -> None:
    rng = random.Random(seed)
    table = make_table()
    requests: dict[int, Request] = {}
    for _ in range(60):
        row = rng.randrange(1, 6)
        if row not in requests or rng.random() < 0.2:  # a new request, or one that comes back with its output
            prompt, output = ([rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 9))] for _ in range(2))
            requests[row] = make_request(row, prompt, output[: rng.randrange(9)], **rng.choice(PENALTIES))
            admit(table, requests[row])
        rows = rng.sample(sorted(requests), rng.randint(1, len(requests)))
        tokens = [[rng.randrange(4) for _ in range(4)] for _ in rows]
        accept_lens = [rng.randint(0, 4) for _ in rows]
        forward = run_pass(table, rows, [4] * len(rows), is_verify=True)
        table.count_outputs(forward, torch.tensor(tokens), torch.tensor(accept_lens))
        for row, ids, count in zip(rows, tokens, accept_lens, strict=True):
            requests[row].output_ids += ids[:count]
        for request in requests.values():
            check_counts(table, request)


def check_counts(table: RequestTable, request: Request) -> None:
    assert table.output_counts is not None and table.in_prompt is not None
    expected = [request.output_ids.count(token) for token in range(table.vocab_size)]
    assert table.output_counts[request.row].tolist() == expected
    assert set(table.in_prompt[request.row].nonzero().flatten().tolist()) == set(request.prompt_ids)


@pytest.mark.parametrize("mtp_step", [0, 3])
def test_the_engine_keeps_penalty_counts_level_with_the_output_through_preemption(
    checkpoint: Path, mtp_step: int
) -> None:
    engine = make_engine(
        checkpoint, mtp_step=mtp_step, max_model_len=64, max_total_tokens=100, page_size=4, chunked_prefill_size=7
    )
    for index, prompt in enumerate(make_prompts(8, 30, 256, seed=3)):
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, **(*PENALTIES, {})[index % 4])
        engine.add(Generate(str(index), prompt, params))
    num_checked = 0
    while engine.has_work():
        engine.step()
        for request in engine.scheduler.running:
            if has_penalty(request.sampling) and request.num_computed:
                check_counts(engine.runner.table, request)
                num_checked += 1
    assert num_checked > 40 and engine.scheduler.counters.num_preemptions > 0


def test_a_request_does_not_inherit_what_the_last_one_left_on_its_row(checkpoint: Path) -> None:
    loud = SamplingParams(
        temperature=1.5, top_k=3, top_p=0.5, min_p=0.1, seed=4, min_tokens=9, frequency_penalty=2, max_tokens=12
    )
    successors = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=1, seed=5, max_tokens=12),
        SamplingParams(temperature=0, presence_penalty=1.9, max_tokens=12),
    ]
    engine = make_engine(checkpoint, mtp_step=2, max_running_requests=1)
    for params in successors:
        expected = generate(make_engine(checkpoint, mtp_step=2, max_running_requests=1), [[3, 1, 4]], params)
        generate(engine, [list(range(90, 120))], loud)
        assert generate(engine, [[3, 1, 4]], params) == expected


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, False), ({"temperature": 0.3}, False), *((one, True) for one in PENALTIES)]
)
def test_a_penalty_is_what_differs_from_neutral(settings: dict[str, Any], expected: bool) -> None:
    assert has_penalty(SamplingParams(**settings)) is expected
