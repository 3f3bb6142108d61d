"""The watchdog finds a state that is off, and nothing where all is well."""

import logging
from pathlib import Path

import pytest
import torch

from server.cache_ops import CompareState, SaveState
from server.messages import Generate, SamplingParams
from server.request import Request
from server.router.watchdog import Watchdog
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("watchdog"), num_layers=4, close_draft=True)


def decoding_request(row: int) -> Request:
    request = Request.create(Generate("a", [1, 2, 3], SamplingParams()), (), 50)
    request.row, request.is_decoding, request.output_ids, request.num_computed = row, True, [4, 5], 4
    return request


def test_one_check_at_a_time_every_so_many_steps() -> None:
    errors = [0.5]
    watchdog, ops = Watchdog(3, 0, 0.1, lambda: errors[0]), []
    request = decoding_request(2)
    shadows = [watchdog.begin([request], ops) for _ in range(6)]
    (shadow,) = [one for one in shadows if one is not None]
    assert shadows[2] is shadow and ops == [SaveState(2, 0, 4)]
    assert shadow.prompt_ids == [1, 2, 3, 4] and shadow.is_isolated and shadow.max_output == 1
    shadow.row = 3
    watchdog.compare(request, ops)
    watchdog.compare(shadow, ops)
    assert ops[1:] == [CompareState(3, 0)]
    assert watchdog.finish() == (request, 0.5) and not watchdog.is_shadow(shadow)
    errors[0] = 0.05
    assert any(watchdog.begin([request], ops) for _ in range(3))
    assert watchdog.finish() is None and watchdog.num_checks == 2


def test_a_check_that_is_given_up_gives_no_verdict_and_the_next_one_begins() -> None:
    watchdog, ops = Watchdog(1, 0, 0.1, lambda: 0.5), []
    assert watchdog.cancel() is None
    shadow = watchdog.begin([decoding_request(2)], ops)
    assert shadow is not None and watchdog.begin([decoding_request(2)], ops) is None
    assert watchdog.cancel() is shadow
    assert not watchdog.is_shadow(shadow) and watchdog.num_checks == 0
    assert watchdog.begin([decoding_request(2)], ops) is not None


def test_nobody_is_checked_before_there_is_something_to_check() -> None:
    waiting = decoding_request(1)
    waiting.is_decoding = False
    assert Watchdog(1, 0, 0.1, lambda: 0.0).begin([waiting], []) is None
    assert Watchdog(0, 0, 0.1, lambda: 0.0).begin([decoding_request(1)], []) is None


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_a_healthy_engine_is_checked_often_without_a_finding_and_without_other_tokens(
    checkpoint: Path, overlap: str
) -> None:
    prompts = make_prompts(12, 100, 256, seed=8)
    expected = generate(make_engine(checkpoint), prompts, LONG)
    engine = make_engine(checkpoint, mtp_step=3, watchdog=2, overlap=overlap, prefix_cache="on")
    num_probes = engine.scheduler.watchdog.num_checks
    assert num_probes > 0, "the probe at start"
    assert generate(engine, prompts, LONG) == expected
    assert engine.scheduler.watchdog.num_checks > num_probes + 3
    assert engine.scheduler.watchdog.worst_error < 1e-9
    assert not any(engine.scheduler.counters.faults.values())


def test_a_state_that_was_damaged_is_reported_and_its_request_goes_on_without_drafts(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(checkpoint, mtp_step=2, watchdog=4)
    engine.add(Generate("damaged", list(range(30)), LONG))
    with caplog.at_level(logging.WARNING):
        for number in range(30):
            engine.step()
            if number == 3:
                with torch.inference_mode():
                    engine.runner.table.cache.gdn.state[:, engine.scheduler.running[0].row] *= 1.1
    assert engine.scheduler.counters.faults["divergence"] >= 1
    assert engine.scheduler.running[0].is_plain
    assert "request damaged has a state that is off by" in caplog.text


def test_logits_that_are_not_finite_are_caught_and_the_request_is_computed_anew(checkpoint: Path) -> None:
    prompts = make_prompts(6, 60, 256, seed=2)
    expected = generate(make_engine(checkpoint), prompts, LONG)
    engine = make_engine(checkpoint, mtp_step=2, overlap="on", prefix_cache="on")
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(Generate(str(index), prompt, LONG))
    for number in range(400):
        if number == 8:
            row = engine.scheduler.running[2].row
            engine.lane.submit(engine.runner.table.cache.gdn.state[:, row].fill_, float("nan")).result()
        for output in engine.step():
            tokens[output.request_id] += output.token_ids  # type: ignore[union-attr]
    assert not engine.has_work()
    assert list(tokens.values()) == expected
    assert engine.scheduler.counters.faults["non_finite"] == 1
