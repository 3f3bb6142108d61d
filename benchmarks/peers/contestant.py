"""A contestant's process as the benchmark sees it: asked in turns, so that only one computes at a time."""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from benchmarks.openai_server import RunFailed, one_line
from benchmarks.peers.checkpoints import Checkpoint
from benchmarks.peers.environments import Environment


class Contestant:
    """Runs `benchmarks.peers.MODULE` with an interpreter; it computes only while `ask` waits. Raises RunFailed with the
    last it said when it ends."""

    def __init__(self, name: str, python: Path, module: str, variables: dict[str, str], task: dict[str, Any]):
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115  (closed on leaving)
        self._process = subprocess.Popen(
            [str(python), "-P", "-m", f"benchmarks.peers.{module}"],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends them
        )
        self._task = task
        self.version = ""

    def __enter__(self) -> Self:
        """Wait until it has the model."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.__exit__)
            self.version = self.ask(self._task)["version"]
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._log.seek(0)
        said = self._log.read().strip().splitlines() or ["it said nothing"]
        raise RunFailed(f"{self.name} ended with status {self._process.wait()}: {one_line(said[-1])}")


def start(name: str, checkpoint: Checkpoint, root: Path, num_threads: int, task: dict[str, Any]) -> Contestant:
    """A process for a contestant's name: PEER, or PEER-FORMAT of the weights."""
    peer, _, weights = name.partition("-")
    task = task | {"num_threads": num_threads, "format": weights, "model": str(checkpoint.directory)}
    own = Environment(root, peer)
    variables = own.variables(num_threads)
    if peer == "tandem":
        return Contestant(name, Path(sys.executable), "tandem_child", variables, task)
    if peer == "transformers":
        return Contestant(name, own.python, "transformers_child", variables, task)
    task["model"] = str(checkpoint.gguf(own, weights))
    return Contestant(name, own.python, "llama_cpp_child", variables, task)
