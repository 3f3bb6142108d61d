"""A request table over a tiny cache, and requests to fill it with."""

from typing import Any

import torch

from models.cache import Cache, GDNCache, KVCache
from models.config import parse_config
from server.backend.request_table import RequestTable
from server.messages import Generate, SamplingParams
from server.request import Request, Work
from unit_tests.checkpoints import make_config

VOCAB_SIZE = 20
PAGE_SIZE = 4


def make_table(mtp_step: int = 3, num_rows: int = 6, max_pages: int = 5) -> RequestTable:
    """A table whose every tensor holds what an earlier request may have left; rows must be admitted before use."""
    config = parse_config(make_config(vocab_size=VOCAB_SIZE, num_layers=4))
    kv = KVCache.allocate(config, 1, 1 + num_rows * max_pages, PAGE_SIZE, torch.float64, "cpu")
    gdn = GDNCache.allocate(config, mtp_step, num_rows, torch.float64, "cpu")
    table = RequestTable(Cache(kv, gdn), num_rows, max_pages, mtp_step, VOCAB_SIZE, "cpu")
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        tensor.fill_(torch.nan)
    columns = (table.page_table, table.seq_len, table.accept_len, table.next_ids, table._counts, table._scales)
    for column in (*columns, table.stop_ids):
        column.fill_(9)
    return table


def make_request(row: int, prompt_ids: list[int], output_ids: list[int] | None = None, **sampling: Any) -> Request:
    """A request on a row, with some output already."""
    request = Request.create(Generate(str(row), prompt_ids, SamplingParams(**sampling)), (), max_model_len=200)
    request.row, request.output_ids = row, list(output_ids or ())
    return request


def prefill_work(request: Request, num_tokens: int, pages: tuple[int, ...] = (), is_new: bool = False) -> Work:
    """The next num_tokens known tokens of a request, from where it stands."""
    assert request.row is not None
    start = request.num_computed
    end = start + num_tokens
    return Work(
        request=request,
        row=request.row,
        num_tokens=num_tokens,
        start=start,
        token_ids=tuple(request.known_ids(start, end)),
        following_ids=tuple(request.known_ids(end, end + 8)),
        ends_prompt=end == request.num_known,
        pages=pages,
        output_ids=tuple(request.output_ids) if is_new else None,
    )


def verify_work(request: Request, num_tokens: int, num_drafts: int = 3, pages: tuple[int, ...] = ()) -> Work:
    """The newest token and num_tokens - 1 drafts of a request."""
    assert request.row is not None
    return Work(request=request, row=request.row, num_tokens=num_tokens, num_drafts=num_drafts, pages=pages)


def admit(table: RequestTable, request: Request) -> None:
    """Put a request on its row, with the output it has."""
    table.admit(prefill_work(request, 1, is_new=True))
