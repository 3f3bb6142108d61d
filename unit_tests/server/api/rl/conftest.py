"""A serving whose engine takes the commands of trainers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.config import EngineConfig, ServerConfig
from server.control import Control, UpdateWeights
from server.tokenizer import Tokenizer
from unit_tests.server.api.conftest import Serving
from unit_tests.server.api.rl.trained_engine import TrainedEngine


class TrainedServing(Serving):
    """What trainers talk to."""

    engine: TrainedEngine

    def succeed(self, path: str, body: Any = None, **query: Any) -> Any:
        """The answer to a POST that must succeed."""
        answer = self.http.post(path, json=body, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refuse(self, path: str, body: Any = None, status: int = 400, **query: Any) -> dict[str, Any]:
        """The error of a POST that must be refused, told in both forms on SGLang's routes."""
        answer = self.http.post(path, json=body, params=query)
        assert answer.status_code == status, answer.text
        found = answer.json()
        assert found["error"]["code"] == status
        if "success" in found:
            assert (found["success"], found["message"]) == (False, found["error"]["message"])
        return found["error"]

    def last_command(self) -> Any:
        """What the engine was told last."""
        return self.engine.commands[-1]

    def commands(self) -> list[str]:
        """The names of what the engine was told."""
        return [type(command).__name__ for command in self.engine.commands]

    def last_update(self) -> UpdateWeights:
        """The last command, which must be an update whose parts have one id."""
        command: Control = self.last_command()
        assert isinstance(command, UpdateWeights)
        assert command.begin.control_id == command.commit.control_id == command.control_id
        return command


@pytest.fixture
def make_trained(tokenizer: Tokenizer) -> Callable[..., TrainedServing]:
    """Makes servings with settings of their own; they do not listen yet."""

    def make(engine_config: EngineConfig | None = None, **settings: Any) -> TrainedServing:
        engine_config = engine_config or EngineConfig(mtp_step=2)
        config = ServerConfig(enable_rl=True, **settings)
        return TrainedServing(TrainedEngine(engine_config), tokenizer, config=config, engine_config=engine_config)

    return make


@pytest.fixture
def trained(make_trained: Callable[..., TrainedServing]) -> Iterator[TrainedServing]:
    """One that listens."""
    serving = make_trained()
    with serving.listening():
        yield serving
