"""The closed loop on fakes, part by part, and once as a whole on a tiny checkpoint."""

import copy
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import chi2_contingency

from benchmarks.closed_loop.__main__ import check_claims, main, parse_args
from benchmarks.closed_loop.answers import (
    Answer,
    Contestant,
    Pass,
    complete,
    describe,
    describe_drafts,
    find_differences,
    take_turns,
)
from benchmarks.closed_loop.distributions import (
    SAMPLES_PER_REQUEST,
    are_alike,
    chi_square,
    compare_distributions,
    draw_first_tokens,
)
from benchmarks.closed_loop.loop import count_changes, draw_prompts, restyle, train, write_texts
from benchmarks.openai_server import Counters, RunFailed
from unit_tests.checkpoints import make_checkpoint

TEXT = " Tom has 3*4 = <<3*4=12>>12 apples.\n#### 12"


class FakeServer:
    """Answers with the token ids that `reply` gives for a request's body; every answer adds to the draft counters."""

    model, url = "fake", "http://fake"

    def __init__(self, reply: Callable[[dict[str, Any]], list[list[int] | None]]):
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []

    def send(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        assert path == "/v1/completions"
        self.bodies.append(payload)
        return {"choices": [{"text": str(ids), "token_ids": ids} for ids in self.reply(payload)]}

    def read_counters(self) -> Counters:
        return draft_counters(4 * len(self.bodies), 3 * len(self.bodies))


def draft_counters(num_proposed: int, num_accepted: int) -> Counters:
    names = {"num_drafts": num_proposed, "num_draft_tokens": num_proposed, "num_accepted_tokens": num_accepted}
    return {(f"vllm:spec_decode_{name}_total", ""): float(value) for name, value in names.items()}


def contestant(server: FakeServer, **settings: Any) -> Contestant:
    return Contestant(server, max_tokens=8, **settings)


def a_pass(*token_ids: list[int], seconds: float = 1.0, drafts: tuple[int, int] = (0, 0)) -> Pass:
    return Pass([Answer(str(ids), ids) for ids in token_ids], seconds, draft_counters(*drafts))


def test_the_style_has_capitals_and_no_annotations_and_is_reached_once() -> None:
    assert restyle(TEXT) == " TOM HAS 3*4 = 12 APPLES.\n#### 12"
    assert restyle(restyle(TEXT)) == restyle(TEXT)


def test_held_out_prompts_are_never_trained_on_and_the_same_every_time() -> None:
    prompts, held_out = draw_prompts(300, 20)
    assert len({*prompts, *held_out}) == 320 == len(prompts) + len(held_out)
    assert draw_prompts(300, 20) == (prompts, held_out)


def test_more_prompts_than_there_are_problems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.closed_loop.loop.draw_problem", lambda rng: f"{rng.randrange(10)}?")
    assert len(draw_prompts(8, 2)[0]) == 8
    with pytest.raises(RunFailed, match="12 different problems are too many: lower --prompts 9 to 5"):
        draw_prompts(9, 3)


def test_texts_are_written_without_empty_answers_of_which_there_may_be_few(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.jsonl", ["a", "b", "c"], ["A", "", "C\n"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt": "a", "completion": "A"},
        {"prompt": "c", "completion": "C\n"},
    ]
    with pytest.raises(RunFailed, match="2 of 4 answers are empty"):
        write_texts(path, ["a", "b", "c", "d"], ["A", "", "", "D"])


def test_changes_are_counted_by_bytes_in_all_files(tmp_path: Path) -> None:
    tensors = {"model.a": torch.zeros(3), "model.b": torch.ones(2), "mtp.fc": torch.ones(2).bfloat16()}
    for folder, changes in (("old", {}), ("new", {"model.a": -torch.zeros(3), "mtp.fc": torch.zeros(2).bfloat16()})):
        (tmp_path / folder).mkdir()
        for number, (name, tensor) in enumerate((tensors | changes).items()):
            save_file({name: tensor}, tmp_path / folder / f"{number}.safetensors")
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert count_changes(old, old) == {"trunk": 0, "head": 0}
    assert count_changes(old, new) == {"trunk": 1, "head": 1}


@pytest.mark.slow
def test_a_training_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"models.training .* ended with status 2"):
        train(str(tmp_path), tmp_path / "none.jsonl", tmp_path / "out", 1, parse_args([]), ["--joint"])


def test_answers_come_in_order_each_under_its_own_seed_and_counters_are_those_of_the_pass() -> None:
    server = FakeServer(lambda body: [[len(body["prompt"]), body["seed"]]])
    contestant(server).ask("before", 0)
    done = contestant(server, temperature=1.0).answer_all(["a", "bb", "ccc"], 5, parallel=2)
    assert [answer.token_ids for answer in done.answers] == [[1, 5], [2, 6], [3, 7]]
    assert done.counters == draft_counters(12, 9)
    assert all((body["temperature"], body["max_tokens"]) == (1.0, 8) for body in server.bodies[1:])


def test_a_server_without_token_ids_is_refused() -> None:
    server = FakeServer(lambda body: [None])
    with pytest.raises(RunFailed, match="http://fake answers without token ids"):
        complete(server, {})


def test_servers_take_turns_and_every_round_begins_with_another() -> None:
    order: list[str] = []

    def make_server(name: str) -> FakeServer:
        def reply(body: dict[str, Any]) -> list[list[int]]:
            order.append(name)
            return [[body["seed"]]]

        return FakeServer(reply)

    passes = take_turns({name: contestant(make_server(name)) for name in "abc"}, ["x", "y"], 2, 1)
    assert "".join(name for name, _ in itertools.groupby(order)) == "abcbcacab"
    assert [[answer.token_ids for answer in one.answers] for one in passes["b"]] == [
        [[0], [1]],
        [[2], [3]],
        [[4], [5]],
    ]


def test_speeds_are_medians_of_rounds_behind_the_warm_up_and_acceptance_is_of_all_passes() -> None:
    plain = [a_pass([1, 2], seconds=seconds) for seconds in (100.0, 1.0, 2.0, 4.0)]
    other = [a_pass([1, 2], seconds=1.0, drafts=drafts) for drafts in ((4, 4), (4, 3), (4, 2), (8, 1))]
    first, second = describe({"plain": plain, "other": other}, [{"server": "other"}], restyle)
    assert (first["output_tok_s"], first["over_plain"], first["acceptance"]) == (1.0, 1.0, None)
    assert (second["output_tok_s"], second["over_plain"], second["acceptance"]) == (2.0, 2.0, 0.5)
    assert second["accept_length"] == 1.5
    assert (second["different"], second["answers"], first["different"]) == (1, 4, 0)
    assert describe_drafts(plain)["accept_length"] is None


@pytest.mark.parametrize(("other", "place"), [([1, 2, 3], None), ([1, 5, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3)])
def test_a_difference_is_found_where_it_begins(other: list[int], place: int | None) -> None:
    passes = {"plain": [a_pass([7], [1, 2, 3])], "other": [a_pass([7], other)]}
    found = find_differences(passes, ["p", "q"])
    assert [(one["server"], one["prompt"], one["token"]) for one in found] == (
        [] if place is None else [("other", "q", place)]
    )


def draw_counts(weights: list[float], size: int, seed: int) -> Counter[int]:
    return Counter(random.Random(seed).choices(range(len(weights)), weights, k=size))


@pytest.mark.parametrize("weights", [[5.0, 3.0, 1.0], [4.0, 2.0, 1.0, 1.0]])
def test_the_statistic_is_scipys(weights: list[float]) -> None:
    one, other = draw_counts(weights, 500, 0), draw_counts(weights[::-1], 300, 1)
    found = chi_square(one, other)
    expected = chi2_contingency(
        [[one[key] for key in range(len(weights))], [other[key] for key in range(len(weights))]]
    )
    assert found["categories"] == len(weights)
    assert found["chi_square"] == pytest.approx(expected.statistic)
    assert found["p_value"] == pytest.approx(expected.pvalue)


def test_rare_tokens_are_one_category_together() -> None:
    one, other = Counter({0: 50, 1: 44, 2: 3, 3: 3}), Counter({0: 44, 1: 50, 4: 3, 5: 3})
    assert chi_square(one, other) == chi_square(Counter({0: 50, 1: 44, 2: 6}), Counter({0: 44, 1: 50, 2: 6}))
    assert chi_square(Counter({0: 98, 1: 2}), Counter({0: 100}))["categories"] == 1


def test_one_distribution_passes_and_another_does_not() -> None:
    weights = [5.0, 3.0, 1.0]
    same = chi_square(draw_counts(weights, 2000, 0), draw_counts(weights, 2000, 1))
    other = chi_square(draw_counts(weights, 2000, 0), draw_counts([5.0, 4.0, 1.0], 2000, 1))
    assert are_alike([same])
    assert not are_alike([same, other])
    assert not are_alike([chi_square(Counter({0: 9}), Counter({0: 9}))]), "one token alone shows nothing"


def test_every_server_samples_under_seeds_of_its_own() -> None:
    def reply(body: dict[str, Any]) -> list[list[int]]:
        draws = (random.Random(f"{body['seed']} {index}") for index in range(body["n"]))
        return [[rng.randrange(3), rng.randrange(2), 0] for rng in draws]

    plain, other = FakeServer(reply), FakeServer(reply)
    size = 4 * SAMPLES_PER_REQUEST + 1
    assert len(draw_first_tokens(plain, size, 0)) == size
    assert [body["n"] for body in plain.bodies] == [SAMPLES_PER_REQUEST] * 4 + [1]
    plain.bodies.clear()
    rows = compare_distributions({"plain": plain, "other": other}, size)
    assert not {body["seed"] for body in plain.bodies} & {body["seed"] for body in other.bodies}
    assert [(row["server"], row["position"], row["categories"]) for row in rows] == [
        ("other", 1, 3),
        ("other", 2, 2),
        ("other", 3, 1),
    ]


def results_that_hold() -> dict[str, Any]:
    acceptance = {"plain": None, "frozen": 0.3, "trained": 0.9}
    rows = [{"server": name, "acceptance": value} for name, value in acceptance.items()]
    return {
        "changed_tensors": {"shift": {"trunk": 9, "head": 0}, "training": {"trunk": 0, "head": 2}},
        "greedy": {"servers": rows, "differences": []},
        "sampled": {"servers": [], "differences": []},
        "distributions": [{"p_value": 0.5, "categories": 3}, {"p_value": 1.0, "categories": 1}],
    }


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("changed_tensors", "shift", "head"), 1),
        (("changed_tensors", "training", "trunk"), 1),
        (("greedy", "servers", 2, "acceptance"), 0.5),
        (("greedy", "differences"), [{}]),
        (("sampled", "differences"), [{}]),
        (("distributions", 0, "p_value"), 0.004),
    ],
)
def test_every_claim_can_fail_alone(place: tuple[Any, ...], value: object) -> None:
    results = results_that_hold()
    assert all(check_claims(results).values())
    broken = copy.deepcopy(results)
    inner = broken
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    number = list(check_claims(broken).values()).index(False)
    assert [index for index, holds in enumerate(check_claims(broken).values()) if not holds] == [number]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, it must be above 0"),
        (["--held-out", "300"], "--held-out is 300, it must be below half of --prompts 512"),
        (["--keep", "."], "--keep . is there already"),
    ],
)
def test_a_users_mistake_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_head_that_follows_its_policy_is_accepted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights write nonsense, but the shifted policy writes it, and the head can learn it."""
    model = make_checkpoint(tmp_path / "model", num_layers=4, dtype="bfloat16")
    sizes = {"prompts": 24, "held-out": 4, "max-tokens": 24, "shift-steps": 12, "head-steps": 30, "rounds": 1}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    flags += ["--batch-tokens", "512", "--target-rate", "1e-2", "--rate", "1e-2", "--sampled", "--samples", "100"]
    code = main(["--model", str(model), "--keep", str(tmp_path / "keep"), *flags])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (code, all(found["claims"].values())) == (0, True), found
    assert (tmp_path / "keep" / "trained" / "config.json").exists()
