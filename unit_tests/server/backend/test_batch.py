"""Batches on the host become token ids, positions and views on the device."""

import torch

from server.backend.batch import build_forward_batch, following_ids, last_indices
from server.request import Batch, Request
from unit_tests.server.backend.tables import make_request, make_table


def place(request: Request, num_computed: int, pages: list[int]) -> Request:
    request.num_computed, request.pages = num_computed, pages
    return request


def test_a_prefill_brings_each_requests_known_tokens_from_where_it_stands() -> None:
    table = make_table()
    first = place(make_request(4, [10, 11, 12]), 0, [7, 8])
    resumed = place(make_request(2, [1, 2, 3], [5, 6, 7]), 2, [3, 9, 1])
    table.admit(resumed)
    table.seq_len[2] = 2
    forward = build_forward_batch(Batch([first, resumed], [2, 3], is_verify=False), table)
    assert forward.token_ids.tolist() == [10, 11, 3, 5, 6]
    assert forward.positions.tolist() == [0, 1, 2, 3, 4]
    assert forward.query_lens == (2, 3)
    view = forward.view
    assert view is not None and not view.is_verify
    assert view.rows == (4, 2)
    assert view.start_lens.tolist() == [0, 2] and view.accept_lens.tolist() == [0, 0]
    assert view.page_table.tolist() == [[7, 8, 0, 0, 0], [3, 9, 1, 0, 0]]


def test_the_first_chunk_admits_the_request_and_later_ones_keep_its_state() -> None:
    table = make_table()
    request = place(make_request(3, [1, 2, 3, 4], temperature=0.5), 0, [6])
    build_forward_batch(Batch([request], [2], is_verify=False), table)
    assert table.temperature[3] == 0.5 and (table.cache.gdn.state[:, 3] == 0).all()
    table.cache.gdn.state[:, 3] = 5
    table.seq_len[3] = 2
    place(request, 2, [6, 2])
    view = build_forward_batch(Batch([request], [2], is_verify=False), table).view
    assert (table.cache.gdn.state[:, 3] == 5).all()
    assert view is not None and view.start_lens.tolist() == [2] and view.page_table.tolist() == [[6, 2, 0, 0, 0]]


def test_a_verify_batch_takes_tokens_and_lengths_from_the_table() -> None:
    table = make_table(mtp_step=2)
    requests = [place(make_request(row, [1, 2], [5]), 2, [row, row + 10]) for row in (5, 1)]
    for request in requests:
        table.admit(request)
    table.seq_len[torch.tensor([5, 1])] = torch.tensor([12, 6])
    table.accept_len[torch.tensor([5, 1])] = torch.tensor([3, 1])
    table.next_ids[torch.tensor([5, 1])] = torch.tensor([[14, 15, 16], [17, 18, 19]])
    forward = build_forward_batch(Batch(requests, [3, 3], is_verify=True), table)
    assert forward.token_ids.tolist() == [14, 15, 16, 17, 18, 19]
    assert forward.positions.tolist() == [12, 13, 14, 6, 7, 8]
    assert forward.query_lens == (3, 3)
    view = forward.view
    assert view is not None and view.is_verify and view.rows == (5, 1)
    assert view.start_lens.tolist() == [12, 6] and view.accept_lens.tolist() == [3, 1]
    assert view.page_table.tolist() == [[5, 15, 0, 0, 0], [1, 11, 0, 0, 0]]


def test_the_last_token_of_each_request_is_found() -> None:
    table = make_table()
    requests = [place(make_request(row, [1, 2, 3, 4]), 0, [row]) for row in (1, 2, 3)]
    forward = build_forward_batch(Batch(requests, [4, 1, 3], is_verify=False), table)
    assert last_indices(forward).tolist() == [3, 4, 7]


def test_the_tokens_after_a_chunk_are_the_prompts_own_up_to_its_end() -> None:
    inside = place(make_request(1, [10, 11, 12, 13, 14, 15]), 1, [1])
    near_end = place(make_request(2, [1, 2, 3]), 0, [2])
    ended = place(make_request(3, [4, 5]), 0, [3])
    resumed = place(make_request(4, [6, 7], [8, 9]), 1, [4])
    batch = Batch([inside, near_end, ended, resumed], [2, 2, 2, 1], is_verify=False)
    assert following_ids(batch, 3) == [[13, 14, 15], [3, -1, -1], [-1, -1, -1], [8, 9, -1]]
    assert following_ids(batch, 1) == [[13], [3], [-1], [8]]
