"""Cache shapes and sizes, what a reset forgets, and checkpoints: at any position what a prefill of it gives."""

import random

import pytest
import torch

from kernels.gated_delta_rule import DeltaRing
from models.cache import GDNCache, GDNCheckpoints, KVCache
from models.config import parse_config
from unit_tests.checkpoints import make_checkpoint, make_config
from unit_tests.models.cached_run import CachedRun
from unit_tests.models.loading import draw_ids, load_ours

CONFIG = parse_config(make_config(num_layers=8))


@pytest.fixture(scope="module")
def model64(tmp_path_factory):
    """Four layers in float64, where rounding hides nothing."""
    directory = make_checkpoint(tmp_path_factory.mktemp("four_layers"), num_layers=4)
    return load_ours(directory, torch.float64, mtp=False)[0]


def allocate(mtp_step, dtype=torch.float32):
    return GDNCache.allocate(CONFIG, mtp_step, num_rows=3, dtype=dtype, device="cpu")


def test_the_draft_layers_are_the_last_of_the_kv_cache():
    kv = KVCache.allocate(CONFIG, num_mtp_layers=1, num_pages=7, page_size=4, dtype=torch.bfloat16, device="cpu")
    assert kv.data.shape == (2 + 1, 2, 7, 4, 2, 32)
    assert kv.data.dtype == torch.bfloat16
    assert kv.page_size == 4


def test_the_state_is_one_per_request_whatever_the_number_of_drafts():
    assert {allocate(mtp_step).state_bytes_per_row for mtp_step in range(9)} == {6 * 6 * 16 * 24 * 4}


@pytest.mark.parametrize("mtp_step", range(9))
def test_rings_are_powers_of_two_that_hold_two_steps_and_the_convolution(mtp_step):
    gdn, width = allocate(mtp_step), mtp_step + 1
    ring_len, conv_ring_len = gdn.ring.k.shape[2], gdn.conv_ring.shape[2]
    assert ring_len & (ring_len - 1) == 0
    assert 2 * width <= ring_len < 4 * width
    assert conv_ring_len & (conv_ring_len - 1) == 0
    assert width + 3 <= conv_ring_len < 2 * (width + 3)


def test_states_and_rings_stay_wide():
    gdn = allocate(1, torch.bfloat16)
    assert {tensor.dtype for tensor in (gdn.state, *gdn.ring, gdn.conv_ring)} == {torch.float32}
    assert allocate(1, torch.float64).state.dtype == torch.float64


def test_bytes_per_row_are_those_of_the_tensors():
    gdn = allocate(3)
    total = sum(tensor.nbytes for tensor in (gdn.state, *gdn.ring, gdn.conv_ring))
    assert 3 * (gdn.state_bytes_per_row + gdn.ring_bytes_per_row) == total


def test_a_reset_row_holds_nothing_of_its_last_request_and_the_others_stay():
    gdn = allocate(2)
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        tensor.fill_(torch.nan)
    gdn.reset(1)
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        assert (tensor[:, 1] == 0).all()
        assert tensor[:, [0, 2]].isnan().all()


def test_a_layer_ring_is_a_view_of_the_whole():
    gdn = allocate(1)
    gdn.layer_ring(2).u[1, 0] = 5
    assert (gdn.ring.u[2, 1, 0] == 5).all()


STEPS = [(width, accepted) for width in range(1, 5) for accepted in range(1, width + 1)]
NUM_VERIFIED = sum(accepted for _, accepted in STEPS)


def verify_steps(run, row, ids, rng):
    """Prefill all but NUM_VERIFIED tokens, then verify with every window and acceptance in random order, rejected rows
    being wrong tokens. After every pass, the tokens committed and how many of them the state has not folded."""
    prompt_len = len(ids) - NUM_VERIFIED
    run.prefill([row], [ids[:prompt_len]])
    yield prompt_len, 0
    for width, accepted in rng.sample(STEPS, len(STEPS)):
        start = run.seq_lens[row]
        wrong = [rng.randrange(320) for _ in range(width - accepted)]
        run.verify([row], [ids[start : start + accepted] + wrong])
        run.accept([row], [accepted])
        yield run.seq_lens[row], accepted


def poisoned(gdn, row, stand, position):
    """The cache with NaN in every ring slot of the row that the state of `position` does not depend on."""
    ring, conv_ring = DeltaRing(*(part.clone() for part in gdn.ring)), gdn.conv_ring.clone()
    for tensor, first in ((ring.k, stand), (ring.u, stand), (ring.alpha, stand), (conv_ring, position - 3)):
        needed = {one % tensor.shape[2] for one in range(first, position)}
        tensor[:, row, [slot for slot in range(tensor.shape[2]) if slot not in needed]] = torch.nan
    return GDNCache(gdn.state, ring, conv_ring, gdn.conv_width)


def prefilled_state(model, ids):
    """State, and the newest three convolution inputs (zeros before the sequence), of a prefill of exactly `ids`."""
    run, position = CachedRun(model, num_rows=2), len(ids)
    run.prefill([1], [ids])
    gdn = run.cache.gdn
    window = gdn.conv_ring.new_zeros(gdn.conv_ring.shape[0], 3, gdn.conv_ring.shape[-1])
    for index, one in enumerate(range(position - 3, position)):
        if one >= 0:
            window[:, index] = gdn.conv_ring[:, 1, one % gdn.conv_ring.shape[2]]
    return gdn.state[:, 1], window


@pytest.mark.parametrize(("prompt_len", "seed"), [(1, 0), (1, 1), (2, 2), (3, 3), (17, 4)])
def test_a_checkpoint_of_any_reachable_position_equals_a_prefill_of_exactly_these_tokens(prompt_len, seed, model64):
    ids = draw_ids(1, prompt_len + NUM_VERIFIED, seed=seed)[0].tolist()
    run, num_saved = CachedRun(model64), 0
    expected = {length: prefilled_state(model64, ids[:length]) for length in range(1, len(ids) + 1)}
    for length, accept_len in verify_steps(run, 3, ids, random.Random(seed)):
        for position in range(length - accept_len, length + 1):
            gdn = poisoned(run.cache.gdn, 3, length - accept_len, position)
            checkpoints = GDNCheckpoints.allocate(gdn, 3)
            checkpoints.save(2, gdn, 3, position, torch.tensor(length - accept_len))
            state, window = expected[position]
            torch.testing.assert_close(checkpoints.state[:, 2], state, rtol=0, atol=1e-9)
            torch.testing.assert_close(checkpoints.conv_window[:, 2], window, rtol=0, atol=1e-9)
            assert (checkpoints.state[:, :2] == 0).all() and (checkpoints.conv_window[:, :2] == 0).all()
            num_saved += 1
    assert num_saved == 1 + NUM_VERIFIED + len(STEPS)


def test_saving_leaves_the_row_as_it_is(model64):
    run, ids = CachedRun(model64), draw_ids(1, 5 + NUM_VERIFIED)[0].tolist()
    list(verify_steps(run, 1, ids, random.Random(5)))
    gdn = run.cache.gdn
    before = [tensor.clone() for tensor in (gdn.state, *gdn.ring, gdn.conv_ring)]
    checkpoints = GDNCheckpoints.allocate(gdn, 2)
    checkpoints.save(1, gdn, 1, len(ids), torch.tensor(len(ids) - run.accept_lens[1]))
    after = (gdn.state, *gdn.ring, gdn.conv_ring)
    assert all(x[:, 1:].equal(y[:, 1:]) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("position", [1, 2, 3, 4, 5, 18, 33])
@pytest.mark.parametrize("back", [0, 1])
def test_a_restored_row_goes_on_as_if_it_had_computed_everything(position, back, model64):
    """`back`: the checkpoint is made when one token more was accepted. Row 4 holds another request's end, not
    numbers."""
    ids = draw_ids(1, 40, seed=position)[0].tolist()
    run, checkpoints = CachedRun(model64), GDNCheckpoints.allocate(CachedRun(model64).cache.gdn, 4)
    gdn = run.cache.gdn
    run.prefill([2], [ids[:position]])
    if back:
        run.verify([2], [[ids[position], 7, 9]])
        run.accept([2], [1])
    checkpoints.save(3, gdn, 2, position, torch.tensor(position))
    for tensor in (gdn.state, *gdn.ring, gdn.conv_ring):
        tensor[:, 4] = torch.nan
    others = [tensor[:, 1:4].clone() for tensor in (gdn.state, *gdn.ring, gdn.conv_ring)]
    checkpoints.restore(3, gdn, 4, position)
    for tensor, before in zip((gdn.state, *gdn.ring, gdn.conv_ring), others, strict=True):
        assert tensor[:, 1:4].equal(before)
    assert all((part[:, 4] == 0).all() for part in gdn.ring), "a fold beside others reads slots that nobody has written"
    assert gdn.conv_ring[:, 4].isfinite().all()
    run.page_tables[4] = run.page_tables[2]
    run.seq_lens[4], run.accept_lens[4] = position, 0
    whole = model64.forward_sequence(torch.tensor([ids]))[0]
    end = position + 3
    _, hidden = run.verify([4], [[*ids[position:end], 11]])
    torch.testing.assert_close(hidden[:3], whole[position:end], rtol=0, atol=1e-9)
    run.accept([4], [3])
    _, hidden = run.prefill([4], [ids[end:]])
    torch.testing.assert_close(hidden, whole[end:], rtol=0, atol=1e-9)


def test_a_checkpoint_may_be_restored_many_times_and_to_other_rows(model64):
    run, ids = CachedRun(model64), draw_ids(1, 9)[0].tolist()
    gdn = run.cache.gdn
    run.prefill([1], [ids])
    checkpoints = GDNCheckpoints.allocate(gdn, 2)
    checkpoints.save(1, gdn, 1, 9, torch.tensor(9))
    kept = checkpoints.state.clone(), checkpoints.conv_window.clone()
    for row in (3, 2, 3):
        checkpoints.restore(1, gdn, row, 9)
        assert gdn.state[:, row].equal(gdn.state[:, 1])
        run.seq_lens[row], run.page_tables[row] = 9, run.page_tables[1]
        run.prefill([row], [[5, 6, 7]])
    assert checkpoints.state.equal(kept[0]) and checkpoints.conv_window.equal(kept[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_checkpoints_are_as_wide_as_what_they_keep_and_know_their_size(dtype):
    gdn = allocate(2, dtype)
    checkpoints = GDNCheckpoints.allocate(gdn, 5)
    assert checkpoints.state.shape == (6, 5, 6, 16, 24) and checkpoints.conv_window.shape == (6, 5, 3, 208)
    assert checkpoints.state.dtype == checkpoints.conv_window.dtype == gdn.state.dtype
    assert 5 * checkpoints.bytes_per_slot == checkpoints.state.nbytes + checkpoints.conv_window.nbytes
