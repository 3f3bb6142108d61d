"""The three-row table, and when the benchmark's claims do not hold."""

import copy

import pytest

from benchmarks.rl_rollouts import Row, check_claims, parse_args, take_turns

RUN = {
    "reward_first": 0.05,
    "reward_last": 0.3,
    "rewards": [0.1, 0.2],
    "transfers": ["full", "delta"],
    "server_sha256": "a",
    "trainer_sha256": "a",
}
NAMES = ("full", "delta", "drift, synced head", "drift, frozen head")
ROWS = [
    {"row": "no speculation", "acceptance": 0.0, "same_tokens": True},
    {"row": "frozen head", "acceptance": 0.1, "same_tokens": True},
    {"row": "synced head", "acceptance": 0.6, "same_tokens": True},
]


class FakeServer:
    """Answers with tokens that follow from the seed, and as many accepted drafts as it is told."""

    def __init__(self, accepted, offset=0):
        self.accepted, self.offset, self.asked = accepted, offset, []

    def send(self, path, payload):
        params = payload["sampling_params"]
        self.asked.append((path, payload["input_ids"], params))
        meta = {"spec_draft_token_num": 10 if self.accepted else 0, "spec_accept_token_num": self.accepted}
        return {"output_ids": [params["sampling_seed"] + self.offset] * params["max_new_tokens"], "meta_info": meta}


def test_rows_answer_the_same_prompts_and_are_compared():
    plain, frozen, synced = servers = [FakeServer(0), FakeServer(1), FakeServer(8)]
    rows = [Row(name, one) for name, one in zip(("no speculation", "frozen", "synced"), servers, strict=True)]
    args = parse_args(["--prompts", "3", "--rounds", "2", "--max-tokens", "4"])
    found = {row["row"]: row for row in take_turns(rows, args, 50)}
    assert [row["acceptance"] for row in found.values()] == [0.0, 0.1, 0.8]
    assert all(row["same_tokens"] for row in found.values())
    assert found["no speculation"]["over_plain"] == 1.0
    assert len(frozen.asked) == 3 * 3  # a round of warm-up and two that count
    assert plain.asked == frozen.asked == synced.asked


def test_other_tokens_are_told():
    rows = [Row("no speculation", FakeServer(0)), Row("frozen head", FakeServer(0, offset=1))]
    args = parse_args(["--prompts", "2", "--rounds", "1"])
    assert [row["same_tokens"] for row in take_turns(rows, args, 50)] == [True, False]


def results_with(run=None, row=None):
    """Right results but for one field: run is (name, field, value), row (index, field, value)."""
    results = {"runs": {name: dict(RUN) for name in NAMES}, "rows": copy.deepcopy(ROWS)}
    if run is not None:
        results["runs"][run[0]][run[1]] = run[2]
    if row is not None:
        results["rows"][row[0]][row[1]] = row[2]
    return results


def test_all_claims_hold_for_right_results():
    assert all(check_claims(results_with()).values())


@pytest.mark.parametrize(
    "change",
    [
        {"run": ("full", "reward_last", 0.1)},
        {"run": ("delta", "reward_last", 0.1)},
        {"run": ("delta", "transfers", ["full"])},
        {"run": ("full", "server_sha256", "b")},
        {"run": ("delta", "trainer_sha256", "b")},
        {"run": ("drift, frozen head", "rewards", [0.1, 0.3])},
        {"row": (2, "same_tokens", False)},
        {"row": (2, "acceptance", 0.19)},
    ],
)
def test_one_wrong_result_is_one_claim_that_does_not_hold(change):
    assert list(check_claims(results_with(**change)).values()).count(False) == 1
