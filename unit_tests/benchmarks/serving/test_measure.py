"""Servers take turns, are asked the same, and nothing is asked twice; in virtual time every figure is exact."""

import asyncio
import itertools
from typing import Any

import pytest

from benchmarks.openai_server import Counters
from benchmarks.serving.command_line import read_command_line
from benchmarks.serving.datasets import make_dataset
from benchmarks.serving.measure import Measured, contestants_for, measure
from benchmarks.serving.summary import summarize
from unit_tests.benchmarks.serving.fake_server import FakeModel, VirtualNetwork
from unit_tests.benchmarks.serving.virtual_time import run_virtually

MODEL: dict[str, Any] = {"num_tokens": 7, "per_event": 3, "first_seconds": 0.5, "step_seconds": 0.25}


class Counting:
    """A server whose counter of tokens grows by 100 from one reading to the next."""

    def __init__(self, url: str):
        self.url, self.model, self.headers = url, "fake", dict[str, str]()
        self._readings = itertools.count(0, 100)

    def read_counters(self) -> Counters:
        return {("vllm:generation_tokens_total", ""): next(self._readings)}


def measured(*flags: str, stop_after: float | None = None, **models: FakeModel) -> Measured:
    args = read_command_line(list(flags), None)
    servers: Any = [(name, Counting(f"http://{name}")) for name in models]

    async def running() -> Measured:
        stop = asyncio.Event()
        if stop_after is not None:
            asyncio.get_running_loop().call_later(stop_after, stop.set)
        async with contestants_for(servers, args, VirtualNetwork(**models)) as contestants:
            return await measure(contestants, make_dataset(args, False), args, stop)

    return run_virtually(running())


def prompts(model: FakeModel) -> list[Any]:
    """All but those of the probe."""
    asked = [body["prompt"] for body in model.requests]
    return [prompt for prompt in asked if prompt not in ("How many are three and four?", [1, 2, 3])]


def test_one_server_in_virtual_time_gives_exact_figures() -> None:
    result = measured("--concurrency", "2", "4", "--num-prompts", "8", a=FakeModel(**MODEL))
    for (load, seconds), done in zip([(2, 4.0), (4, 2.0)], result.results, strict=True):
        assert done.load.value == load
        summary = summarize(done.rounds[0], {"ttft": 500})
        assert (summary["requests"], summary["seconds"], summary["output_tok_s"]) == (8, seconds, 56 / seconds)
        assert summary["ttft_ms"]["p99"] == summary["ttft_ms"]["mean"] == 500.0 and summary["e2e_ms"]["p50"] == 1000.0
        assert summary["itl_event_ms"]["mean"] == 250.0 and summary["tpot_ms"]["mean"] == pytest.approx(500 / 6)
        assert summary["itl_token_ms"]["p50"] == pytest.approx(250 / 3) and summary["itl_token_ms"]["p99"] == 250.0
        assert summary["goodput_requests_s"] == 8 / seconds and summary["tokens_of_others"] == 100 - 56


def test_servers_take_turns_and_are_asked_the_same_and_nothing_twice() -> None:
    a, b = FakeModel(**MODEL), FakeModel(**MODEL)
    order: list[str] = []
    for name, model in (("a", a), ("b", b)):
        model.fail = lambda number, name=name: order.append(name)  # type: ignore[misc]
    flags = ["--compare", "http://b", "--rounds", "3", "--num-prompts", "2", "--num-warmups", "1"]
    result = measured(*flags, "--concurrency", "1", "2", a=a, b=b)
    assert prompts(a) == prompts(b) and len(set(map(repr, prompts(a)))) == len(prompts(a)) == 2 * (1 + 3 * 2)
    probes, one_load = "ab" + "ab", "ab" + "aabb" + "bbaa" + "aabb"
    assert "".join(order) == probes + 2 * one_load
    assert [[len(rounds) for rounds in done.rounds] for done in result.results] == [[3, 3], [3, 3]]
    assert result.num_asked == len(prompts(a)) and not result.is_partial


def test_no_turn_waits_for_a_collection_of_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr("benchmarks.serving.measure.gc", FakeCollector(order))
    model = FakeModel(**MODEL)
    model.fail = lambda number: order.append("asked")  # type: ignore[misc]
    measured("--rounds", "2", "--num-prompts", "1", "--num-warmups", "0", "--concurrency", "1", a=model)
    assert order[-6:] == ["collect", "freeze", "asked"] * 2


class FakeCollector:
    """Notes when it is asked to collect and to freeze."""

    def __init__(self, order: list[str]):
        self.collect, self.freeze = (lambda: order.append("collect")), (lambda: order.append("freeze"))


def test_nobody_comes_behind_the_same_server_in_every_round() -> None:
    models, order = {name: FakeModel(**MODEL) for name in "abc"}, list[str]()
    for name, model in models.items():
        model.fail = lambda number, name=name: order.append(name)  # type: ignore[misc]
    flags = ["--compare", "http://b", "http://c", "--rounds", "4", "--num-prompts", "1", "--num-warmups", "0"]
    measured(*flags, "--concurrency", "1", **models)
    assert "".join(order[-12:]) == "abc" + "bac" + "cab" + "acb"


def test_prompts_are_ids_only_if_every_server_takes_them() -> None:
    flags = ["--input-len", "3", "--num-prompts", "1", "--compare", "http://b", "--rounds", "1"]
    willing, unwilling = FakeModel(), FakeModel(refuses=("ids",))
    assert measured(*flags, a=willing, b=FakeModel()).prompt_unit == "tokens"
    assert all(isinstance(prompt, list) for prompt in prompts(willing))
    willing = FakeModel()
    assert measured(*flags, a=willing, b=unwilling).prompt_unit == "words"
    assert all(isinstance(prompt, str) for prompt in prompts(willing) + prompts(unwilling))


@pytest.mark.parametrize(
    ("flags", "warmups", "prompts_per_round"),
    [
        (["--concurrency", "2"], 4, 32),
        (["--concurrency", "8"], 8, 64),
        (["--request-rate", "16"], 4, 128),
        (["--request-rate", "inf"], 4, 32),
        (["--concurrency", "8", "--num-warmups", "0", "--num-prompts", "3"], 0, 3),
        (["--concurrency", "2", "--duration", "2.5"], 4, 6),
    ],
)
def test_warm_ups_and_prompts_are_as_many_as_the_load_calls_for(
    flags: list[str], warmups: int, prompts_per_round: int
) -> None:
    model = FakeModel(**MODEL)
    (done,) = measured("--dataset", "word-problems", *flags, a=model).results
    assert len(done.rounds[0][0].answers) == prompts_per_round
    assert len(prompts(model)) == warmups + prompts_per_round


def test_a_stop_keeps_what_there_is() -> None:
    flags = ["--dataset", "word-problems", "--num-warmups", "0", "--num-prompts", "4", "--concurrency", "1", "2"]
    models = {"a": FakeModel(**MODEL), "b": FakeModel(**MODEL)}
    # Two probes of a second each, and rounds of four: the second server is in its third request.
    result = measured(*flags, "--compare", "http://b", "--rounds", "2", stop_after=2 + 4 + 2.5, **models)
    assert result.is_partial
    ((one,), (other,)), *rest = (done.rounds for done in result.results)
    assert (len(one.answers), one.num_cut, len(other.answers), other.num_cut) == (4, 0, 2, 1)
    assert other.seconds == 2.5 and not any(any(rounds) for rounds in rest)
