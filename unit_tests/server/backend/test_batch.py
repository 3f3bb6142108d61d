"""Batches on the host become token ids, positions and views on the device."""

from dataclasses import replace

import torch

from models.forward_batch import ForwardBatch
from server.backend.batch import build_forward_batch, following_ids, last_indices, update_table
from server.backend.request_table import RequestTable
from server.request import Batch, Request
from unit_tests.server.backend.tables import admit, make_request, make_table, prefill_work, verify_work


def run_build(batch: Batch, table: RequestTable) -> ForwardBatch:
    """As the engine does."""
    update_table(batch, table)
    return build_forward_batch(batch, table)


def place(request: Request, num_computed: int) -> Request:
    request.num_computed = num_computed
    return request


def test_a_prefill_brings_each_requests_known_tokens_from_where_it_stands() -> None:
    table = make_table()
    first, resumed = make_request(4, [10, 11, 12]), place(make_request(2, [1, 2, 3], [5, 6, 7]), 2)
    admit(table, resumed)
    table.seq_len[2] = 2
    works = [prefill_work(first, 2, (7, 8), is_new=True), prefill_work(resumed, 3, (3, 9, 1))]
    forward = run_build(Batch(works, is_verify=False), table)
    assert forward.token_ids.tolist() == [10, 11, 3, 5, 6]
    assert forward.positions.tolist() == [0, 1, 2, 3, 4]
    assert forward.query_lens == (2, 3)
    view = forward.view
    assert view is not None and not view.is_verify
    assert view.rows == (4, 2)
    assert view.start_lens.tolist() == [0, 2] and view.accept_lens.tolist() == [0, 0]
    assert view.host_starts == (0, 2)
    assert view.page_table.tolist() == [[7, 8, 0, 0], [3, 9, 1, 0]]


def test_the_first_chunk_admits_the_request_and_later_ones_keep_its_state() -> None:
    table = make_table()
    request = make_request(3, [1, 2, 3, 4], temperature=0.5)
    run_build(Batch([prefill_work(request, 2, (6,), is_new=True)], is_verify=False), table)
    assert table.temperature[3] == 0.5 and (table.cache.gdn.state[:, 3] == 0).all()
    table.cache.gdn.state[:, 3] = 5
    table.seq_len[3] = 2
    work = replace(prefill_work(place(request, 2), 2, (2,)), first_page=1)
    view = run_build(Batch([work], is_verify=False), table).view
    assert (table.cache.gdn.state[:, 3] == 5).all()
    assert view is not None and view.start_lens.tolist() == [2] and view.page_table.tolist() == [[6, 2, 0]]


def test_a_verify_batch_takes_tokens_and_lengths_from_the_table() -> None:
    table = make_table(mtp_step=2)
    requests = [place(make_request(row, [1, 2], [5]), 2) for row in (5, 1)]
    for request in requests:
        admit(table, request)
    table.seq_len[torch.tensor([5, 1])] = torch.tensor([12, 6])
    table.accept_len[torch.tensor([5, 1])] = torch.tensor([3, 1])
    table.next_ids[torch.tensor([5, 1])] = torch.tensor([[14, 15, 16], [17, 18, 19]])
    forward = run_build(
        Batch([verify_work(one, 3, pages=(one.row or 0, 9 + one.row)) for one in requests], is_verify=True), table
    )
    assert forward.token_ids.tolist() == [14, 15, 16, 17, 18, 19]
    assert forward.positions.tolist() == [12, 13, 14, 6, 7, 8]
    assert forward.query_lens == (3, 3)
    view = forward.view
    assert view is not None and view.is_verify and view.rows == (5, 1) and view.host_starts is None
    assert view.start_lens.tolist() == [12, 6] and view.accept_lens.tolist() == [3, 1]
    assert view.page_table.tolist() == [[5, 14, 0], [1, 10, 0]]


def test_windows_of_different_widths_take_their_first_drafts() -> None:
    table = make_table(mtp_step=2)
    requests = [place(make_request(row, [1, 2], [5]), 2) for row in (5, 1, 3)]
    for request in requests:
        admit(table, request)
    table.seq_len[torch.tensor([5, 1, 3])] = torch.tensor([12, 6, 2])
    table.next_ids[torch.tensor([5, 1, 3])] = torch.tensor([[14, 15, 16], [17, 18, 19], [7, 8, 9]])
    works = [verify_work(request, count) for request, count in zip(requests, (3, 3, 1), strict=True)]
    forward = run_build(Batch(works, is_verify=True), table)
    assert forward.token_ids.tolist() == [14, 15, 16, 17, 18, 19, 7]
    assert forward.positions.tolist() == [12, 13, 14, 6, 7, 8, 2]
    assert forward.query_lens == (3, 3, 1)


def test_the_last_token_of_each_request_is_found() -> None:
    table = make_table()
    works = [
        prefill_work(make_request(row, [1, 2, 3, 4]), count, is_new=True) for row, count in ((1, 4), (2, 1), (3, 3))
    ]
    forward = run_build(Batch(works, is_verify=False), table)
    assert last_indices(forward).tolist() == [3, 4, 7]


def test_the_tokens_after_a_chunk_are_the_prompts_own_up_to_its_end() -> None:
    inside = prefill_work(place(make_request(1, [10, 11, 12, 13, 14, 15]), 1), 2)
    near_end = prefill_work(make_request(2, [1, 2, 3]), 2)
    ended = prefill_work(make_request(3, [4, 5]), 2)
    resumed = prefill_work(place(make_request(4, [6, 7], [8, 9]), 1), 1)
    batch = Batch([inside, near_end, ended, resumed], is_verify=False)
    assert following_ids(batch, 3) == [[13, 14, 15], [3, -1, -1], [-1, -1, -1], [8, 9, -1]]
    assert following_ids(batch, 1) == [[13], [3], [-1], [8]]
