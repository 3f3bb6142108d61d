"""What the benchmark makes of gaps between tokens, and when its claims do not hold."""

import pytest

from benchmarks.weight_updates import Streams, check_claims, describe, parse_args

LOAD = {
    "updates": 30,
    "transfers": {"full": 4, "delta": 27},
    "wrong_checksums": [],
    "lost": [],
    "finish_reasons": {"length": 90, "abort": 3},
    "samples": 93,
    "wrong_spans": 0,
    "compared_tokens": 1000,
    "logprob_gap": 5e-5,
}


def make_streams(gaps):
    streams = Streams("http://127.0.0.1:1", 10, 4)
    streams.gaps = gaps
    return streams


def make_update(begin, end, way="full", mode="full"):
    seconds = {"update_seconds": end - begin, "publish_seconds": 1.0, "write_seconds": 0.0, "commit_seconds": 0.1}
    return {"way": way, "mode": mode, "begin": begin, "end": end, **seconds}


def test_gaps_count_where_any_of_them_is_within():
    streams = make_streams([(0.0, 1.0), (1.0, 3.0), (3.0, 3.5), (9.0, 9.1)])
    assert streams.within(2.0, 3.2) == [2.0, 0.5]
    assert streams.outside([(2.0, 3.2)]) == pytest.approx([1.0, 0.1])
    assert streams.outside([(2.0, 3.2), (8.0, 10.0)]) == [1.0]


def test_a_row_has_the_longest_gap_beside_the_usual_ones():
    """Steps of 10 ms, of 20 ms while weights come in, and one of 150 ms, 100 of which are the exchange."""
    gaps = [(0.0, 0.01), (0.01, 0.02), (1.0, 1.02), (1.02, 1.04), (1.04, 1.19), (1.19, 1.21), (3.0, 3.01)]
    row = describe("full", [make_update(1.0, 1.2), make_update(3.2, 3.3, "disk", "file")], make_streams(gaps))
    assert row["mode"] == "full"
    assert row["quiet_gap_ms"] == pytest.approx(10)
    assert row["gap_ms"] == pytest.approx(20)
    assert row["commit_ms"] == pytest.approx(100)
    assert row["longest_gap_ms"] == pytest.approx(150)
    assert row["stall_steps"] == pytest.approx(2.5)
    assert row["update_seconds"] == pytest.approx(0.2)


def test_all_claims_hold_for_a_right_server():
    results = {"load": LOAD, "times": [{"way": "delta", "mode": "delta"}]}
    assert all(check_claims(results, parse_args([])).values())


@pytest.mark.parametrize(
    "change",
    [
        {"updates": 29},
        {"transfers": {"full": 31}},
        {"wrong_checksums": ["7"]},
        {"lost": ["gone"]},
        {"finish_reasons": {"length": 3, "stop": 1}},
        {"wrong_spans": 1},
        {"samples": 0},
        {"compared_tokens": 0},
        {"logprob_gap": 2e-4},
    ],
)
def test_one_wrong_number_is_one_claim_that_does_not_hold(change):
    claims = check_claims({"load": LOAD | change}, parse_args([]))
    assert list(claims.values()).count(False) == 1


def test_a_delta_that_came_whole_is_told():
    results = {"times": [{"way": "delta", "mode": "full"}]}
    assert check_claims(results, parse_args([])) == {"deltas came as deltas": False}
