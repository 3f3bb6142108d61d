"""Weight updates while requests run: all is as under the new weights alone, or, whatever breaks, under the old ones."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.weight_update import Exchange, WeightUpdate
from server.control import (
    PAUSE_MODES,
    AddTensors,
    BeginUpdate,
    CommitUpdate,
    RollBackUpdate,
    WeightSource,
)
from server.engine import Engine
from server.engine_process import take_turn
from server.messages import Constraint, Generate, SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.commands import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    WAIT_SECONDS,
    Client,
    cold_tokens,
    inline,
    make_pair,
    pause,
    resume,
    serving,
    start,
    update_from,
)
from unit_tests.server.engines import assert_nothing_left, make_engine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape."""
    return make_pair(tmp_path_factory.mktemp("weights"))


@pytest.fixture(params=[0, 3], ids=["plain", "speculative"])
def client(checkpoints: list[Path], request: pytest.FixtureRequest) -> Iterator[Client]:
    """Of an engine that serves the first checkpoint."""
    with serving(checkpoints[0], request.param) as client:
        yield client


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("is_paused", [False, True])
def test_retracted_requests_go_on_as_new_ones_would(
    client: Client, checkpoints: list[Path], params: SamplingParams, is_paused: bool
) -> None:
    start(client, params)
    if is_paused:
        client.do(pause("retract"))
    client.do(update_from(checkpoints[1], in_flight="keep" if is_paused else "retract"))
    if is_paused:
        client.do(resume())
    client.finish()
    for name, prompt in zip("012", PROMPTS, strict=True):
        num_old = client.versions[name].count("default")
        old, new = client.tokens[name][:num_old], client.tokens[name][num_old:]
        assert 0 < num_old < 24 and client.versions[name] == ["default"] * num_old + ["1"] * len(new)
        rest = SamplingParams(temperature=params.temperature, seed=11, max_tokens=24 - num_old, ignore_eos=True)
        assert [new] == cold_tokens(checkpoints[1], [prompt + old], rest)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("mtp_step", [0, 3])
def test_after_an_update_all_is_as_after_a_cold_start(tmp_path: Path, moe: bool, mtp_step: int) -> None:
    paths = [
        make_checkpoint(tmp_path / str(seed), num_layers=4, close_draft=True, seed=seed, moe=moe) for seed in (0, 1)
    ]
    expected = [cold_tokens(path, PROMPTS, GREEDY) for path in paths]
    engine = make_engine(paths[0], mtp_step=mtp_step, prefix_cache="on", checkpoint_interval=32, page_size=8)
    client, which = Client(engine), 0
    assert expected[0] != expected[1]
    for mode in PAUSE_MODES:
        for pauses in (False, True):
            which = 1 - which
            start(client, num_steps=3)
            if pauses:
                client.do(pause(mode))
                client.do(update_from(paths[which]))
                client.do(resume())
            else:
                client.do(update_from(paths[which], in_flight=mode))
            for index, prompt in enumerate(PROMPTS):
                client.add(f"new {index}", prompt)
            client.finish()
            assert [client.tokens[f"new {index}"] for index in range(3)] == expected[which]
            assert {client.ends[name] for name in "012"} == {"abort" if mode == "abort" else "length"}
            assert all(len(client.tokens[name]) == 24 for name in "012") or mode == "abort"
            client.ends.clear()
            assert_nothing_left(engine)
    assert engine.stats().weight_version == "8"
    assert (engine.stats().num_proposed > 0) == (mtp_step > 0)


def test_those_that_are_kept_go_on_without_their_drafts(checkpoints: list[Path]) -> None:
    engine = make_engine(checkpoints[0], mtp_step=3)
    client, widths = Client(engine), list[set[int]]()
    run_pass = engine._run_pass

    def spy(batches: Any) -> Any:
        for batch in filter(lambda batch: batch.is_verify, batches):
            widths.append({work.num_tokens for work in batch.works})
            ids = engine.runner.table.next_ids[[work.row for work in batch.works]]
            assert int(ids.min()) >= 0 and int(ids.max()) < engine.ready.vocab_size
        return run_pass(batches)

    engine._run_pass = spy  # type: ignore[method-assign]
    start(client)
    assert widths[-1] == {4}
    num_before = len(widths)
    client.do(pause("keep"))
    client.do(update_from(checkpoints[1]))
    client.do(resume())
    client.step(2)
    assert widths[num_before:] == [{1}, {4}, {4}]
    client.finish()
    assert set(client.ends.values()) == {"length"}


def test_what_was_computed_before_an_update_is_never_reused(client: Client, checkpoints: list[Path]) -> None:
    engine = client.engine
    start(client)
    client.do(update_from(checkpoints[1]))
    client.add("same prompt", PROMPTS[0])  # while another that has computed it runs
    client.finish()
    assert engine.stats().num_cached_tokens == 0
    longer = [*PROMPTS[0], *client.tokens["same prompt"], 5]
    client.add("again", longer)
    client.finish()
    assert engine.stats().num_cached_tokens > 0
    assert [client.tokens["same prompt"]] == cold_tokens(checkpoints[1], PROMPTS[:1], GREEDY)
    assert [client.tokens["again"]] == cold_tokens(checkpoints[1], [longer], GREEDY)


@pytest.mark.parametrize("num_rows", [3, 8])  # with 3 a check waits until some request has ended
def test_the_watchdog_compares_no_states_of_different_weights(checkpoints: list[Path], num_rows: int) -> None:
    engine = make_engine(checkpoints[0], mtp_step=2, watchdog=2, prefix_cache="on", max_running_requests=num_rows)
    client, watchdog = Client(engine), engine.scheduler.watchdog
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for turn in range(4):
        for index, prompt in enumerate(PROMPTS):
            client.add(f"{turn} {index}", prompt, params)
        client.step(3 + turn)
        client.do(update_from(checkpoints[1 - turn % 2]))
        client.step(10)
        client.do(pause("retract" if turn % 2 else "keep"))
        client.do(resume())
        client.finish()
    assert watchdog.num_checks >= (4 if num_rows == 3 else 9) and engine.stats().faults["divergence"] == 0
    assert_nothing_left(engine)


def test_an_update_while_an_output_is_constrained(client: Client, checkpoints: list[Path]) -> None:
    digits = SamplingParams(temperature=1, seed=3, max_tokens=30, constraint=Constraint("regex", "[0-9]{60}"))
    banned = SamplingParams(temperature=1, seed=3, max_tokens=30, ignore_eos=True, bad_words=((250,), (60,)))
    for mode in ("keep", "retract"):
        client.add(f"digits {mode}", PROMPTS[0], digits)
        client.add(f"banned {mode}", PROMPTS[0], banned)
        while not client.tokens[f"digits {mode}"]:
            client.step()
        client.step(3)
        client.do(update_from(checkpoints[mode == "keep"], in_flight=mode))
        client.finish()
        tokens = client.tokens[f"digits {mode}"]
        assert len(tokens) == 30 and bytes(tokens).isdigit()
        assert len(set(client.versions[f"digits {mode}"])) == 2
        tokens = client.tokens[f"banned {mode}"]
        assert len(tokens) == 30 and not {250, 60} & set(tokens)


def test_an_update_of_the_target_alone_makes_the_head_stale(client: Client, checkpoints: list[Path]) -> None:
    has_head = client.engine.runner.draft is not None
    norm = client.engine.runner.store.export("model.norm.weight")
    source = inline({"model.norm.weight": norm * 2})
    client.do(update_from(Path(), "two", source=source, is_partial=True))
    stats = client.engine.stats()
    assert (stats.weight_version, stats.mtp_weight_version, stats.mtp_stale) == ("two", "default", has_head)
    client.do(update_from(checkpoints[1]))
    stats = client.engine.stats()
    assert (stats.weight_version, stats.mtp_stale, stats.num_weight_updates) == ("2", False, 2)
    assert stats.mtp_weight_version == ("2" if has_head else "default")
    assert list(stats.drafts_by_version) == ["default", "two", "2"]


def test_an_update_that_waits_can_be_rolled_back(client: Client, checkpoints: list[Path]) -> None:
    start(client)
    before = client.engine.controls.versions.weight_version
    client.send(update_from(checkpoints[1], in_flight="wait"))
    client.step()
    client.await_job()
    client.step()
    client.add("late", PROMPTS[0])
    assert client.engine.stats().num_waiting == 1
    client.do(RollBackUpdate("back"))
    client.finish()
    assert [done.kind for done in client.done] == ["Conflict"]
    assert list(client.tokens.values()) == cold_tokens(checkpoints[0], [*PROMPTS, PROMPTS[0]], GREEDY)
    assert client.engine.stats().weight_version == before


def test_an_update_and_a_pause_may_wait_for_the_same_requests(client: Client, checkpoints: list[Path]) -> None:
    masked = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, bad_words=((3,),))
    start(client, replace(GREEDY, max_tokens=60))
    client.send(pause("wait"))
    client.step()
    client.add("late", PROMPTS[0])
    client.add("masked", PROMPTS[1], masked)
    command = update_from(checkpoints[1], in_flight="wait")
    client.send(command)
    client.step()
    client.await_job()
    client.step()
    client.do(resume())
    done = client.await_done(command.control_id)
    assert not done.error and [client.versions[name][-1] for name in "012"] == ["default"] * 3
    client.finish()
    assert set(client.versions["late"]) == set(client.versions["masked"]) == {"1"}
    assert [client.tokens["late"]] == cold_tokens(checkpoints[1], PROMPTS[:1], GREEDY)
    assert [done.kind for done in client.done] == ["Conflict"]  # the pause, which the resume has called off


# What goes wrong.


def failing_at(calls: int, original: Any, error: Exception) -> Any:
    """The same function, but its call number `calls` raises."""
    count = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise error
        return original(*args, **kwargs)

    return call


POINTS = [
    (WeightUpdate, "__init__", 1),
    (WeightUpdate, "add", 1),
    (WeightUpdate, "add", 17),
    (WeightUpdate, "prepare", 1),
    (WeightUpdate, "commit", 1),
    (Exchange, "run", 1),
    (Exchange, "run", 20),
    (WeightUpdate, "_new_dtypes", 1),
]


@pytest.mark.parametrize(("owner", "method", "calls"), POINTS, ids=[f"{name} {count}" for _, name, count in POINTS])
@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError("no space")], ids=["bug", "system"])
def test_whatever_breaks_in_a_session_leaves_the_old_weights_serving(
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch, owner: type, method: str, calls: int, error: Exception
) -> None:
    client = Client(make_engine(checkpoints[0], mtp_step=3, prefix_cache="on"))
    before = client.fingerprint()
    start(client)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, failing_at(calls, getattr(owner, method), error))
        kind, message = client.refusal(update_from(checkpoints[1]))
    assert str(error) in message and kind in ("TandemError", "InvalidRequest")
    assert client.fingerprint() == before and client.engine.stats().num_weight_updates == 0
    client.finish()
    assert list(client.tokens.values()) == cold_tokens(checkpoints[0], PROMPTS, GREEDY)
    client.do(update_from(checkpoints[1], "next"))
    client.add("new", PROMPTS[0])
    client.finish()
    assert [client.tokens["new"]] == cold_tokens(checkpoints[1], PROMPTS[:1], GREEDY)


def test_serving_goes_on_while_a_source_hangs_and_a_roll_back_ends_it(
    client: Client, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_go_on, add = threading.Event(), threading.Event(), WeightUpdate.add

    def hang(update: WeightUpdate, name: str, tensor: Any) -> None:
        has_begun.set()
        may_go_on.wait(2 * WAIT_SECONDS)
        add(update, name, tensor)

    before = client.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(WeightUpdate, "add", hang)
        client.send(update_from(checkpoints[1]))
        client.step()
        assert has_begun.wait(WAIT_SECONDS)
    start(client)
    client.finish()
    assert list(client.tokens.values()) == cold_tokens(checkpoints[0], PROMPTS, GREEDY)
    others = (BeginUpdate("second"), AddTensors("add", WeightSource("disk", path="x")), CommitUpdate("commit"))
    assert [client.refusal(command)[0] for command in others] == ["Conflict"] * 3
    assert not client.engine.has_work() and client.engine.patience < 0.01
    client.send(RollBackUpdate("stop"))
    client.step(2)
    kinds = {done.control_id: done.kind for done in client.done}
    assert kinds.pop("stop") == "" and list(kinds.values()) == ["Conflict"]
    assert client.fingerprint() == before
    client.do(update_from(checkpoints[1]))  # while the first still hangs
    after = client.fingerprint()
    may_go_on.set()
    assert after != before and client.fingerprint() == after


def test_threads_of_the_device_do_not_change_what_comes(checkpoints: list[Path]) -> None:
    engine: Engine = make_engine(checkpoints[0], mtp_step=3, overlap="on", prefix_cache="on")
    client = Client(engine)
    start(client)
    client.do(update_from(checkpoints[1], in_flight="retract"))
    client.finish()
    for name, prompt in zip("012", PROMPTS, strict=True):
        num_old = client.versions[name].count("default")
        old = client.tokens[name][:num_old]
        rest = SamplingParams(temperature=0, max_tokens=24 - num_old, ignore_eos=True)
        assert [client.tokens[name][num_old:]] == cold_tokens(checkpoints[1], [prompt + old], rest)
    engine.lane.close()


def test_reports_tell_what_old_weights_made_before_the_new_ones_serve(checkpoints: list[Path]) -> None:
    engine = make_engine(checkpoints[0], mtp_step=3)
    whole = [Generate(str(index), prompt, GREEDY, told_whole=True) for index, prompt in enumerate(PROMPTS)]
    reports = [take_turn(engine, requests) for requests in (whole, [], [])]
    assert not any(report.outputs for report in reports if report is not None)
    command = update_from(checkpoints[1], in_flight="retract")
    reports.append(take_turn(engine, [command]))
    Client(engine).await_job()
    while engine.has_work():
        reports.append(take_turn(engine, []))
    said = [report for report in reports if report is not None]
    (changed,) = [index for index, report in enumerate(said) if report.done]
    versions = ["default"] * changed + ["1"] * (len(said) - changed)
    assert [report.stats.weight_version for report in said] == versions
    for index, prompt in enumerate(PROMPTS):
        told = [[one for one in report.outputs if one.request_id == str(index)] for report in said]
        old = [token for outputs in told[:changed] for output in outputs for token in output.token_ids]
        new = [token for outputs in told[changed:] for output in outputs for token in output.token_ids]
        assert [old] == cold_tokens(checkpoints[0], [prompt], replace(GREEDY, max_tokens=len(old)))
        assert [new] == cold_tokens(checkpoints[1], [prompt + old], replace(GREEDY, max_tokens=24 - len(old)))
