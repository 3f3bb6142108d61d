"""The delta-net layer's launches together against the law, interpreted: verify steps and prefills in turns."""

import torch

from kernels.gated_delta_net import Stand
from kernels.gpu.gated_delta_net import gated_delta_net_prefill, gated_delta_net_verify
from unit_tests.kernels import test_gated_delta_net as law
from unit_tests.kernels.test_gated_delta_net import ROW, SHAPES, draw_inputs, make_memory, make_weights


def test_prefill_and_verify_with_random_accept_lengths_equal_the_whole_sequence_in_one_go() -> None:
    shape = SHAPES["grouped"]
    weights = make_weights(shape)
    inputs = draw_inputs(shape, 24, seed=9)
    expected = law.run_whole(inputs, shape, weights).float()
    weights = weights._replace(
        **{name: getattr(weights, name).float() for name in ("conv", "a_log", "dt_bias", "norm")}
    )
    memory, inputs = make_memory(shape), inputs.float()
    memory = memory._replace(
        conv_ring=memory.conv_ring.float(),
        state=memory.state.float(),
        ring=type(memory.ring)(*(part.float() for part in memory.ring)),
    )
    position, accepted = 0, 0
    for kind, width, counts in (
        *(("prefill", 7, 7), ("verify", 4, 2), ("verify", 4, 4), ("verify", 1, 1), ("prefill", 5, 5)),
        *(("verify", 3, 1), ("verify", 4, 3)),
    ):
        stand = Stand(*(torch.tensor([value]) for value in (ROW, position, accepted)))
        window = inputs[position : position + width]
        if kind == "verify":
            out = gated_delta_net_verify(window, shape, weights, memory, stand)
        else:
            starts = torch.tensor([0, width])
            out = gated_delta_net_prefill(window, shape, weights, memory, stand, starts, width)
        torch.testing.assert_close(out[:counts], expected[position : position + counts], rtol=1e-3, atol=1e-4)
        position, accepted = position + counts, counts if kind == "verify" else 0
    assert position == 23
