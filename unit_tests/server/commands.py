"""Commands for the tests, and a client that notes which version of the weights made each of its tokens."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from server.control import (
    BeginUpdate,
    CheckWeights,
    CommitUpdate,
    Control,
    Done,
    Pause,
    Resume,
    UpdateWeights,
    WeightSource,
)
from server.engine import Engine
from server.messages import Generate, SamplingParams, TokenOutput
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import assert_nothing_left, generate, make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=11, max_tokens=24, ignore_eos=True, logprobs=2)
WAIT_SECONDS = 30
PROMPTS = [list(range(20, 60)), list(range(100, 103)), [7] * 70]

_names = map(str, itertools.count())


def make_pair(root: Path) -> list[Path]:
    """Two checkpoints of one shape."""
    return [make_checkpoint(root / str(seed), num_layers=4, close_draft=True, seed=seed) for seed in (0, 1)]


@contextmanager
def serving(checkpoint: Path, mtp_step: int) -> "Iterator[Client]":
    """The client of an engine that nothing is left in afterwards."""
    settings = {"mtp_step": mtp_step, "prefix_cache": "on", "checkpoint_interval": 32, "page_size": 8}
    engine = make_engine(checkpoint, **settings)
    yield Client(engine)
    assert_nothing_left(engine)


def update_from(
    path: Path, version: str | None = None, in_flight: str = "keep", source: WeightSource | None = None, **begin: Any
) -> UpdateWeights:
    """Serve a checkpoint, or what another source has."""
    name = next(_names)
    commit = CommitUpdate(name, version, in_flight)
    return UpdateWeights(name, source or WeightSource("disk", path=str(path)), BeginUpdate(name, **begin), commit)


def pause(mode: str) -> Pause:
    """A pause with an id of its own."""
    return Pause(next(_names), mode)


def resume() -> Resume:
    """Its end."""
    return Resume(next(_names))


class Client:
    """Everything that an engine said of its requests: `tokens`, the `versions` that made them, the last `outputs` and,
    of those that ended, the `ends`; and the commands that are `done`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.versions: dict[str, list[str]] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.ends: dict[str, str] = {}
        self.done: list[Done] = []

    def add(self, name: str, prompt: list[int], params: SamplingParams = GREEDY, **fields: Any) -> None:
        """A new request."""
        self.tokens[name], self.versions[name], self.outputs[name] = [], [], []
        self.engine.add(Generate(name, prompt, params, **fields))

    def step(self, count: int = 1) -> None:
        """So many steps, if there is work."""
        for _ in range(count):
            if self.engine.has_work():
                outputs = self.engine.step()
                self._note(outputs, self.engine.stats().weight_version)
                self.done += self.engine.take_done()

    def finish(self) -> None:
        """Until there is no work."""
        while self.engine.has_work():
            self.step()

    def send(self, command: Control) -> None:
        """Hand a command over."""
        self.engine.control(command)

    def await_done(self, control_id: str = "") -> Done:
        """What became of a command, of the next one if none is named. No steps run while it works."""
        while not (done := [each for each in self.done if control_id in ("", each.control_id)]):
            if not self.engine.controls.has_work():
                self.await_job()
            assert self.engine.has_work(), "the command waits for nothing"
            self.step()
        self.done.remove(done[0])
        return done[0]

    def await_job(self) -> None:
        """Until what runs beside the engine's steps, if anything does, is done."""
        job = self.engine.controls._worker._job
        if job is not None:
            job.exception(WAIT_SECONDS)

    def do(self, command: Control) -> dict[str, Any]:
        """Have a command carried out."""
        self.send(command)
        done = self.await_done(command.control_id)
        assert not done.error, done.error
        return done.values

    def refusal(self, command: Control) -> tuple[str, str]:
        """Have a command refused: (kind, error)."""
        self.send(command)
        done = self.await_done(command.control_id)
        assert done.error and not done.values
        return done.kind, done.error

    def fingerprint(self) -> tuple[str, str]:
        """Of the weights that serve: version and checksum."""
        return self.engine.stats().weight_version, self.do(CheckWeights("check"))["checksum"]

    def _note(self, outputs: Iterable[Any], version: str) -> None:
        for output in outputs:
            assert isinstance(output, TokenOutput), output
            name = output.request_id
            assert name not in self.ends, "an output after the end"
            self.tokens[name] += output.token_ids
            self.versions[name] += [version] * len(output.token_ids)
            self.outputs[name].append(output)
            if output.finish_reason is not None:
                self.ends[name] = output.finish_reason


def cold_tokens(checkpoint: Path, prompts: list[list[int]], params: Any) -> list[list[int]]:
    """What an engine gives that has always had these weights."""
    return generate(make_engine(checkpoint), prompts, params)


def start(client: Client, params: SamplingParams = GREEDY, num_steps: int = 4) -> None:
    """Three requests in the middle of their outputs."""
    for index, prompt in enumerate(PROMPTS):
        client.add(str(index), prompt, params)
    client.step(num_steps)
    assert client.engine.stats().num_running == len(PROMPTS) and all(client.tokens.values())


def inline(tensors: dict[str, Tensor]) -> WeightSource:
    """A source with these tensors."""
    return WeightSource("inline", data=(save(tensors),))


def client_norm(client: Client) -> Tensor:
    """Some tensor that serves."""
    return client.engine.runner.store.export("model.norm.weight")
