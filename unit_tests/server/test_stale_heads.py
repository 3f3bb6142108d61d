"""Speculation after updates that leave the draft head behind, and after those that bring it along."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.weights import export_tensors
from server.engine import Engine
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.commands import Client, inline, pause, resume, update_from
from unit_tests.server.engines import make_engine

K = 3
PARAMS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def fixed_costs(*_: Any) -> Any:
    """A draft costs a seventh of a step, whatever the machine."""
    verify = {(batch, width): 1.0 + 0.05 * width for batch in (1, 4) for width in (1, 2, K + 1)}
    extend = {(batch, width): 0.15 for batch in (1, 4) for width in (1, 2, K + 1)}
    return verify, {1: 0.15, 4: 0.15}, extend, {4: 1.2}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Of a model whose head guesses well, on a machine that is as fast as was measured."""
    monkeypatch.setattr("server.engine.measure_costs", fixed_costs)
    engine = make_engine(make_checkpoint(tmp_path, num_layers=4, close_draft=True), mtp_step=K, speculation="adaptive")
    planner = engine.scheduler.planner
    planner.record_step = lambda *_: None  # type: ignore[method-assign]
    planner.record_overhead = lambda _: None  # type: ignore[method-assign]
    return engine


def drafts_per_step(client: Client, name: str, num_steps: int) -> float:
    """Of a new request, over the steps after the first `num_steps`."""
    engine = client.engine
    client.add(name, list(range(30, 60)), PARAMS)
    client.step(num_steps)
    before = engine.stats()
    client.finish()
    after = engine.stats()
    return (after.num_proposed - before.num_proposed) / (after.num_verify_steps - before.num_verify_steps)


def test_a_stale_head_stops_drafting_and_a_fresh_one_starts_again(engine: Engine) -> None:
    client, runner = Client(engine), engine.runner
    tensors = export_tensors(runner.target, runner.draft)
    good = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    generator = torch.Generator().manual_seed(3)
    bad = {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in good.items()}
    assert drafts_per_step(client, "good head", 10) > 0.9
    client.do(update_from(Path(), "bad", source=inline(bad), is_partial=True))
    assert drafts_per_step(client, "bad head", 20) < 0.2
    assert drafts_per_step(client, "bad head, known", 10) < 0.2
    client.add("in flight", list(range(30, 60)), PARAMS)
    client.step(40)
    client.do(update_from(Path(), "good", source=inline(good), is_partial=True))
    before = engine.stats()
    client.step(10)
    assert engine.stats().num_accepted - before.num_accepted > 5  # at once
    client.finish()
    proposed, accepted = engine.stats().drafts_by_version["bad"]
    assert accepted[0] < 0.1 * proposed[0]
    proposed, accepted = engine.stats().drafts_by_version["good"]
    assert accepted[0] > 0.5 * proposed[0]


def test_a_request_that_was_given_up_gets_drafts_from_a_new_head(engine: Engine) -> None:
    client = Client(engine)
    client.add("a", list(range(30, 60)), PARAMS)
    client.step(5)
    client.do(pause("keep"))
    (request,) = engine.scheduler.running
    request.is_plain, request.num_refused = True, 64
    engine.scheduler.planner.server_acceptance = [0.0] * K  # others fared no better
    norm = engine.runner.store.export("mtp.norm.weight")
    client.do(update_from(Path(), source=inline({"mtp.norm.weight": norm}), is_partial=True))
    assert not request.is_plain and not request.num_refused
    client.do(resume())
    before = engine.stats().num_proposed
    client.step(3)
    assert engine.stats().num_proposed > before
    client.finish()
