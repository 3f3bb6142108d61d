"""Cache shapes and sizes: what grows with the number of drafts, what must not, and what a reset forgets."""

import pytest
import torch

from models.cache import GDNCache, KVCache
from models.config import parse_config
from unit_tests.checkpoints import make_config

CONFIG = parse_config(make_config(num_layers=8))


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
