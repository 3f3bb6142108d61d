"""The real server, engine and all, on a tiny checkpoint, spoken to by OpenAI's own client."""

import concurrent.futures
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from unit_tests.checkpoints import make_checkpoint

START_SECONDS = 120
PROMPTS = [f"prompt number {index} " + "word " * (index % 7) for index in range(24)]


class RunningServer:
    """`python -m server` as a child process; `log` is its stderr so far."""

    def __init__(self, checkpoint: Path, port: int, *flags: str):
        self.url = f"http://127.0.0.1:{port}"
        self._log_path = checkpoint / f"server-{port}.log"
        arguments = ["--model", str(checkpoint), "--port", str(port), "--num-threads", "1", *flags]
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "server", *arguments], stderr=log)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def wait_ready(self) -> "RunningServer":
        wait_until(self._is_healthy, START_SECONDS)
        return self

    def _is_healthy(self) -> bool:
        assert self.process.poll() is None, self._log_path.read_text()
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " ")))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_SECONDS)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} seconds"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("e2e"), num_layers=4, close_draft=True)


@pytest.fixture(scope="module")
def servers(checkpoint: Path) -> Iterator[tuple[RunningServer, RunningServer]]:
    """The same checkpoint without speculation and with three drafts, in float64."""
    flags = ("--dtype", "float64", "--max-model-len", "512", "--chunked-prefill-size", "64")
    ports = free_ports(2)
    plain = RunningServer(checkpoint, ports[0], *flags)
    drafting = RunningServer(checkpoint, ports[1], *flags, "--mtp-step", "3", "--speculation", "fixed")
    yield plain.wait_ready(), drafting.wait_ready()
    assert plain.stop() == 0 and drafting.stop() == 0


def complete_all(server: RunningServer, **settings: object) -> list[str]:
    def complete(prompt: str) -> str:
        answer = server.client.completions.create(model="", prompt=prompt, max_tokens=24, **settings)  # type: ignore
        return answer.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(complete, PROMPTS))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1, "seed": 5, "presence_penalty": 1.5}])
def test_concurrent_clients_get_the_same_text_with_and_without_drafts(
    servers: tuple[RunningServer, RunningServer], settings: dict[str, object]
) -> None:
    plain, drafting = servers
    assert complete_all(drafting, **settings) == complete_all(plain, **settings)
    assert drafting.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_a_streamed_chat_adds_up_to_the_whole_one_and_usage_counts_drafts(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    create = servers[1].client.chat.completions.create
    whole = create(model="", messages=messages, max_tokens=30, temperature=0)  # type: ignore[arg-type]
    chunks = list(
        create(
            model="",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None and usage.completion_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens is not None and details.rejected_prediction_tokens is not None
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0


def test_clients_that_leave_free_their_pages_and_the_next_one_is_served(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    server = servers[1]
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    for _ in range(5):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body | {"stream": False}, timeout=0.05)
    wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 10)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.client.completions.create(model="", prompt="y", max_tokens=2).choices[0].text is not None


def test_a_killed_engine_ends_the_server_with_an_error(checkpoint: Path) -> None:
    server = RunningServer(checkpoint, free_ports(1)[0], "--max-model-len", "512").wait_ready()
    children = psutil.Process(server.process.pid).children()
    (engine,) = (child for child in children if any("spawn_main" in word for word in child.cmdline()))
    body = {"prompt": "x", "max_tokens": 480, "ignore_eos": True}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, 20)
        engine.kill()
        assert answer.result().status_code == 503
    assert server.process.wait(30) == 1


def test_a_broken_checkpoint_gives_one_line_and_exit_code_1(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, num_layers=4)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = [sys.executable, "-m", "server", "--model", str(checkpoint), "--port", "0", "--log-level", "error"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "model.safetensors" in errors[0]
