"""Operations run in their order, the host tier gives back the same bits or says that it cannot, and states are saved as
of the position that was asked for."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.cache import Cache, GDNCache, KVCache
from models.config import parse_config
from models.qwen3_5.model import Qwen35
from server.backend.cache_mover import CacheMover
from server.backend.request_table import RequestTable
from server.cache_ops import (
    CacheOp,
    ClearPage,
    CopyPage,
    DropHost,
    LoadPage,
    LoadState,
    RestoreState,
    SaveState,
    StorePage,
    StoreState,
)
from server.engine import Engine
from server.messages import Generate, SamplingParams
from unit_tests.checkpoints import make_checkpoint, make_config
from unit_tests.models.cached_run import CachedRun
from unit_tests.server.engines import make_engine

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
NUM_PAGES, NUM_ROWS, NUM_SLOTS = 6, 4, 3


def fill_with_any_bits(tensor: Tensor, seed: int) -> None:
    """Every bit pattern, also those that are not numbers."""
    source = torch.Generator().manual_seed(seed)
    tensor.view(torch.uint8).random_(0, 256, generator=source)


def make_mover(dtype: torch.dtype = torch.float64) -> CacheMover:
    """A mover over random pages and random rows; row r stands at 5 + r tokens, its conv ring has slots to wrap."""
    config = parse_config(make_config(vocab_size=20, num_layers=4))
    kv = KVCache.allocate(config, 1, NUM_PAGES, 4, dtype, "cpu")
    gdn = GDNCache.allocate(config, 3, NUM_ROWS, dtype, "cpu")
    table = RequestTable(Cache(kv, gdn), NUM_ROWS, 5, 3, 20, "cpu")
    fill_with_any_bits(kv.data, 0)
    for seed, tensor in enumerate((gdn.state, *gdn.ring, gdn.conv_ring)):
        tensor.normal_(generator=torch.Generator().manual_seed(seed))
    table.seq_len[:] = 5 + torch.arange(NUM_ROWS)
    return CacheMover(table, NUM_SLOTS)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def page_bits(mover: CacheMover, page: int) -> bytes:
    return bits(mover.table.cache.kv.data[:, :, page])


def slot_bits(mover: CacheMover, slot: int) -> bytes:
    return bits(mover.checkpoints.state[:, slot]) + bits(mover.checkpoints.conv_window[:, slot])


def row_bits(mover: CacheMover, row: int, position: int) -> bytes:
    """State and the newest three convolution inputs of a row with nothing left to fold."""
    gdn = mover.table.cache.gdn
    window = torch.stack([gdn.conv_ring[:, row, p % 8] for p in range(position - 3, position)], dim=1)
    return bits(gdn.state[:, row]) + bits(window)


def draw_ops(rng: random.Random, count: int) -> Iterator[CacheOp]:
    """Operations as the router may give them: a new handle for every store, no load of one that was dropped."""
    pages, states = [], []
    for handle in range(count):
        page, other = rng.sample(range(1, NUM_PAGES), 2)
        row, slot = rng.randrange(1, NUM_ROWS), rng.randrange(1, NUM_SLOTS + 1)
        kind = rng.randrange(9)
        if kind == 0:
            yield CopyPage(page, other)
        elif kind == 1 and rng.random() < 0.3:
            yield ClearPage(page)
        elif kind == 2:
            yield SaveState(row, slot, 5 + row)
        elif kind == 3:
            yield RestoreState(slot, row, 5 + row)
        elif kind == 4:
            pages.append(handle)
            yield StorePage(page, handle)
        elif kind == 5 and pages:
            yield LoadPage(rng.choice(pages), page)
        elif kind == 6:
            states.append(handle)
            yield StoreState(slot, handle)
        elif kind == 7 and states:
            yield LoadState(rng.choice(states), slot)
        elif kind == 8 and (held := rng.choice([pages, states])):
            yield DropHost(held.pop(rng.randrange(len(held))))


def imitate(op: CacheOp, memory: dict[tuple[str, int], bytes]) -> None:
    """What an operation means, on names of places alone."""
    match op:
        case CopyPage(source, target):
            memory["page", target] = memory["page", source]
        case ClearPage(page):
            memory["page", page] = bytes(len(memory["page", page]))
        case SaveState(row, slot, _):
            memory["slot", slot] = memory["row", row]
        case RestoreState(slot, row, _):
            memory["row", row] = memory["slot", slot]
        case StorePage(page, handle):
            memory["host", handle] = memory["page", page]
        case LoadPage(handle, page):
            memory["page", page] = memory["host", handle]
        case StoreState(slot, handle):
            memory["host", handle] = memory["slot", slot]
        case LoadState(handle, slot):
            memory["slot", slot] = memory["host", handle]
        case DropHost(handle):
            del memory["host", handle]


def read_memory(mover: CacheMover) -> dict[tuple[str, int], bytes]:
    memory = {("page", page): page_bits(mover, page) for page in range(NUM_PAGES)}
    memory |= {("slot", slot): slot_bits(mover, slot) for slot in range(NUM_SLOTS + 1)}
    memory |= {("row", row): row_bits(mover, row, 5 + row) for row in range(NUM_ROWS)}
    return memory | {("host", handle): bits(entry.data) for handle, entry in mover.entries.items()}


@DTYPES
@pytest.mark.parametrize("seed", range(4))
def test_operations_run_strictly_in_their_order_and_touch_nothing_else(seed: int, dtype: torch.dtype) -> None:
    rng, mover = random.Random(seed), make_mover(dtype)
    expected, seen = read_memory(mover), set()
    for _ in range(20):
        ops = list(draw_ops(rng, 12))
        # Handles start anew in every draw: drop what is left, as the router does before it forgets one.
        ops += [DropHost(handle) for handle in range(12)]
        for op in ops[:-12]:
            imitate(op, expected)
            seen.add(type(op))
        mover.run(ops[:-12])
        assert read_memory(mover) == expected
        assert all(mover.is_intact(handle) for handle in mover.entries)
        mover.run(ops[-12:])
        assert not mover.entries
        expected = {key: value for key, value in expected.items() if key[0] != "host"}
    assert len(seen) == 9, "every kind of operation has run"


@DTYPES
def test_pages_and_states_come_back_from_the_host_bit_by_bit(dtype: torch.dtype) -> None:
    mover = make_mover(dtype)
    fill_with_any_bits(mover.checkpoints.state, 1)
    fill_with_any_bits(mover.checkpoints.conv_window, 2)
    page, state = page_bits(mover, 2), slot_bits(mover, 3)
    mover.run([StorePage(2, handle=7), StoreState(3, handle=8), ClearPage(2)])
    mover.checkpoints.state.zero_()
    mover.checkpoints.conv_window.zero_()
    assert page_bits(mover, 2) == bytes(len(page)) and slot_bits(mover, 3) == bytes(len(state))
    mover.run([LoadPage(7, page=5), LoadState(8, slot=1)])
    assert page_bits(mover, 5) == page and slot_bits(mover, 1) == state
    assert mover.entries[7].data.nbytes == len(page) and mover.entries[8].data.nbytes == len(state)


def test_an_entry_keeps_what_was_stored_whatever_happens_to_the_page() -> None:
    mover = make_mover()
    page = page_bits(mover, 2)
    mover.run([StorePage(2, handle=1), CopyPage(3, 2), LoadPage(1, 4)])
    assert page_bits(mover, 4) == page != page_bits(mover, 2) == page_bits(mover, 3)
    assert mover.is_intact(1)


@pytest.mark.parametrize("where", [0, 1, 1000, -1])
@pytest.mark.parametrize("op", [StorePage(2, handle=4), StoreState(1, handle=4)])
def test_one_flipped_bit_of_an_entry_is_found(op: CacheOp, where: int) -> None:
    mover = make_mover(torch.bfloat16)
    mover.run([op, StorePage(3, handle=5)])
    data = mover.entries[4].data
    for bit in (1, 128):
        data[where] ^= bit
        assert not mover.is_intact(4) and mover.is_intact(5)
        data[where] ^= bit
        assert mover.is_intact(4)


def test_entries_of_other_weights_are_refused_and_new_ones_are_not() -> None:
    mover = make_mover()
    mover.run([StorePage(2, handle=4), StoreState(1, handle=5)])
    assert mover.is_intact(4) and mover.is_intact(5)
    mover.start_generation()
    mover.run([StorePage(2, handle=6)])
    assert [mover.is_intact(handle) for handle in (4, 5, 6)] == [False, False, True]


def test_an_entry_that_is_not_there_yet_counts_as_intact_and_dropping_it_is_no_error() -> None:
    mover = make_mover()
    assert mover.is_intact(99)
    mover.run([DropHost(99), StorePage(2, handle=4), DropHost(4)])
    assert not mover.entries and mover.is_intact(4)


def test_without_checkpoints_pages_still_move() -> None:
    mover = CacheMover(make_mover().table, 0)
    mover.run([CopyPage(1, 2), StorePage(2, handle=1), LoadPage(1, 3)])
    assert page_bits(mover, 1) == page_bits(mover, 2) == page_bits(mover, 3)


def prefilled_state(target: Qwen35, ids: list[int]) -> tuple[Tensor, Tensor]:
    """State, and the newest three convolution inputs (zeros before the sequence), of a prefill of exactly `ids`."""
    run = CachedRun(target, num_rows=2)
    run.prefill([1], [ids])
    gdn = run.cache.gdn
    window = [
        gdn.conv_ring[:, 1, p % 8] if p >= 0 else 0 * gdn.conv_ring[:, 1, 0] for p in range(len(ids) - 3, len(ids))
    ]
    return gdn.state[:, 1], torch.stack(window, dim=1)


def reachable_states(engine: Engine) -> Iterator[tuple[int, list[int], int]]:
    """(row, tokens of a position that its state can be folded to, accept_len) of the running requests."""
    table = engine.runner.table
    for request in engine.scheduler.running:
        if request.row is not None and request.num_computed:
            length, accept_len = int(table.seq_len[request.row]), int(table.accept_len[request.row])
            assert length == request.num_computed
            for position in range(max(1, length - accept_len), length + 1):
                yield request.row, request.known_ids(0, position), accept_len


def test_a_running_requests_state_is_saved_as_of_every_position_that_it_can_be_folded_to(tmp_path: Path) -> None:
    """Prompts shorter than the convolution among them; every result is compared with a prefill of its tokens alone."""
    engine = make_engine(make_checkpoint(tmp_path, num_layers=4, close_draft=True), mtp_step=3, chunked_prefill_size=9)
    mover, seen = CacheMover(engine.runner.table, 1), []
    leaning = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, logit_bias={5: 5.0})
    seeded = SamplingParams(temperature=0.8, max_tokens=14, ignore_eos=True, seed=1)
    for name, prompt, params in (("a", [7], leaning), ("b", [1, 2], seeded), ("c", list(range(20)), seeded)):
        engine.add(Generate(name, prompt, params))
    while engine.has_work():
        engine.step()
        for row, ids, accept_len in reachable_states(engine):
            mover.run([SaveState(row, 1, len(ids))])
            state, window = prefilled_state(engine.runner.target, ids)
            torch.testing.assert_close(mover.checkpoints.state[:, 1], state, rtol=0, atol=1e-9)
            torch.testing.assert_close(mover.checkpoints.conv_window[:, 1], window, rtol=0, atol=1e-9)
            seen.append((accept_len, len(ids)))
    assert {accept_len for accept_len, _ in seen} == {0, 1, 2, 3, 4}
    assert {position for _, position in seen} >= {1, 2, 3, 4, 6, 15, 20}, "also between the chunks of a prompt"
