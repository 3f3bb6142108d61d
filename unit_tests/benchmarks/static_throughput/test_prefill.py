"""Prompts are cut into the chunks that a row names, and last turns are reused."""

import pytest

from benchmarks.static_throughput.prefill import NEW_TOKENS, measure_prefill
from benchmarks.static_throughput.presets import Preset


def test_rows_have_the_chunk_and_what_was_reused(nano: Preset) -> None:
    rows = measure_prefill(nano, [200, 40], [32, 200], 1, {"num_threads": 1})
    names = [(row["prompt"], row["chunk"], row["reuse"]) for row in rows]
    both = [(200, chunk, reuse) for chunk in (32, 200) for reuse in ("none", "last turn")]
    assert names == [*both, (40, 32, "none"), (40, 200, "none")]
    for row in rows:
        expected = 200 - NEW_TOKENS - 1 if row["reuse"] == "last turn" else 0
        assert expected <= row["cached"] <= expected + 1
        assert row["prompt_tok_s"] == pytest.approx(1e3 * row["prompt"] / row["ttft_ms"])
        assert row["computed_tok_s"] == pytest.approx(1e3 * (row["prompt"] - row["cached"]) / row["ttft_ms"])
