"""What the decoder refuses and promises by itself; its results are compared in unit_tests/models/layers."""

import pytest
import torch

from kernels.cpu.decoder import Decoder, DecoderSizes, serves
from kernels.cpu.library import load_library

needs_compiler = pytest.mark.skipif(load_library() is None, reason="this machine has no C++ compiler")


@needs_compiler
def test_it_serves_cpu_weights_without_gradients_only() -> None:
    with torch.no_grad():
        assert all(serves(torch.ones(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64))
        assert not serves(torch.ones(1, dtype=torch.float16)) and not serves(torch.ones(1, device="meta"))
    with torch.enable_grad():
        assert not serves(torch.ones(1))


def test_without_a_library_it_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.cpu.decoder.load_library", lambda: None)
    with torch.no_grad():
        assert not serves(torch.ones(1))


def test_weights_with_gaps_and_unknown_names_are_our_own_mistakes() -> None:
    sizes = DecoderSizes(hidden=4, head_dim=2, rotary_dim=2)
    weight, norm = torch.ones(4, 8), torch.ones(4)
    for layer in ({"in_proj": weight[:, ::2]}, {"no_such_weight": norm}):
        with pytest.raises(AssertionError):
            Decoder(sizes, {"embedding": torch.ones(4, 4)}, [(layer, 0)], norm, norm, 1e-6)
