"""The server as real processes, with a fake engine in the engine process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import ServerConfig
from server.launch import check_kernels_package, warn_of_open_doors
from unit_tests.server.fake_engine import EXIT_ID, FOREVER_ID, LONG_ID, RAISE_ID

ROOT = Path(__file__).resolve().parents[2]
START = (
    "import sys; from server.launch import main; "
    "sys.exit(main(sys.argv[1:], engine='unit_tests.server.fake_engine:FakeEngine'))"
)
DEADLINE_SECONDS = 90


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {DEADLINE_SECONDS} s"
        time.sleep(0.01)


class Server:
    """A running server and a client for it."""

    def __init__(self, checkpoint: Path, flags: Sequence[str], program: str = START, **environment: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # What a killed server leaves behind goes away with the test's own directory.
        environment = {**os.environ, "TMPDIR": str(checkpoint.parent), **environment}
        arguments = ["--model", str(checkpoint), "--port", str(self.port), "--log-level", "warning", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=DEADLINE_SECONDS)

    def probe(self, path: str) -> int:
        """The status that the path answers; 0 for no answer."""
        try:
            return self.http.get(path).status_code
        except httpx.TransportError:
            return 0

    def is_healthy(self) -> bool:
        """Whether /health says 200."""
        return self.probe("/health") == 200

    def engine_pid(self) -> int:
        """The process id of the engine: the child that leads a session of its own."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(pid for pid in map(int, children) if os.getsid(pid) == pid)

    def num_running(self) -> float:
        """The gauge of running requests."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("vllm:num_requests_running{")).split()[-1])

    def stream(self, prompt: list[int], **fields: object) -> "httpx._client.Generator":
        """A streaming completion of token ids."""
        return self.http.stream("POST", "/v1/completions", json={"prompt": prompt, "stream": True, **fields})

    def stop(self) -> None:
        """End the process, whatever it does, and close the client."""
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with flags and waits until they are healthy; ends them after the test."""
    servers: list[Server] = []

    def start_one(*flags: str, **environment: str) -> Server:
        servers.append(Server(checkpoint, flags, **environment))
        wait_for(servers[-1].is_healthy, "readiness")
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def test_a_request_is_answered_and_sigterm_ends_the_server_with_0(start: Callable[..., Server]) -> None:
    server = start("--mtp-step", "2")
    answer = server.http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 7}).json()
    assert answer["usage"]["completion_tokens"] == 7
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(DEADLINE_SECONDS) == 0
    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()


SLOW_ENGINE = """\
import os, time
from unit_tests.server.fake_engine import FakeEngine
class SlowEngine(FakeEngine):
    def __init__(self, config):
        while not os.path.exists(os.environ["GATE"]):
            time.sleep(0.01)
        super().__init__(config)
"""


@pytest.fixture
def loading(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that answers, and whose engine is loaded once there is a file `gate` in `tmp_path`."""
    (tmp_path / "slow_engine.py").write_text(SLOW_ENGINE)
    program = START.replace("unit_tests.server.fake_engine:FakeEngine", "slow_engine:SlowEngine")
    server = Server(checkpoint, [], program, PYTHONPATH=str(tmp_path), GATE=str(tmp_path / "gate"))
    wait_for(lambda: server.probe("/health") == 503, "the first answer")
    yield server
    server.stop()


def test_while_the_model_is_loaded_every_answer_is_503(loading: Server, tmp_path: Path) -> None:
    answers = [loading.http.request(method, "/ready") for method in ("GET", "HEAD")]
    answers += [loading.http.get(path) for path in ("/health", "/ping", "/v1/models", "/")]
    answers.append(loading.http.post("/v1/completions", json={"prompt": [5]}))
    assert [answer.status_code for answer in answers] == [503] * len(answers)
    error = answers[-1].json()["error"]
    assert "is being loaded" in error["message"] and error["type"] == "ServiceUnavailableError"
    (tmp_path / "gate").touch()
    wait_for(lambda: loading.probe("/ready") == 200, "readiness")
    assert loading.http.get("/health").status_code == 200
    assert loading.http.post("/v1/completions", json={"prompt": [5]}).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded_ends_the_server_with_0(loading: Server, number: signal.Signals) -> None:
    loading.process.send_signal(number)
    assert loading.process.wait(DEADLINE_SECONDS) == 0


def test_sigterm_lets_a_stream_finish_and_refuses_new_requests(start: Callable[..., Server]) -> None:
    server = start("--drain-timeout", "15")
    with server.stream([LONG_ID, 5]) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=server.http.base_url) as other:
            wait_for(lambda: other.get("/health").status_code == 503, "draining")
            assert other.get("/ready").status_code == 503
            refused = other.post("/v1/completions", json={"prompt": [5]})
            assert refused.status_code == 503
            assert "shutting down" in refused.json()["error"]["message"]
        last = [line for line in lines if line][-2:]
    assert json.loads(last[0].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert last[1] == "data: [DONE]"
    assert server.process.wait(DEADLINE_SECONDS) == 0


def test_what_does_not_finish_within_the_drain_timeout_ends_with_an_error_event(start: Callable[..., Server]) -> None:
    server = start("--drain-timeout", "0.2")
    with server.stream([FOREVER_ID, 5]) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        last = [line for line in lines if line][-2:]
    assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == 503
    assert last[1] == "data: [DONE]"
    assert server.process.wait(DEADLINE_SECONDS) == 0


def test_a_killed_engine_fails_every_request_and_the_server_exits_with_1(start: Callable[..., Server]) -> None:
    server = start()
    with server.stream([FOREVER_ID, 5]) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.engine_pid(), signal.SIGKILL)
        last = [line for line in lines if line][-2:]
    assert "SIGKILL" in json.loads(last[0].removeprefix("data: "))["error"]["message"]
    assert last[1] == "data: [DONE]"
    assert server.process.wait(DEADLINE_SECONDS) == 1


@pytest.mark.parametrize("prompt", [[RAISE_ID], [EXIT_ID, 5]], ids=["bug", "exit"])
def test_an_engine_that_fails_in_a_step_answers_503_and_the_server_exits_with_1(
    start: Callable[..., Server], prompt: list[int]
) -> None:
    server = start()
    answer = server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 9})
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert server.process.wait(DEADLINE_SECONDS) == 1


def test_the_engine_ends_when_the_server_is_killed(start: Callable[..., Server]) -> None:
    server = start()
    engine_pid = server.engine_pid()
    server.process.kill()
    wait_for(lambda: not Path(f"/proc/{engine_pid}/cmdline").exists() or _is_zombie(engine_pid), "the engine's end")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_request(start: Callable[..., Server], stream: bool) -> None:
    server = start()
    body = json.dumps({"prompt": [FOREVER_ID, 5], "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + body)
        wait_for(lambda: server.num_running() == 1, "the request's start")
    wait_for(lambda: server.num_running() == 0, "the abort")


def test_a_chat_template_of_the_command_line_goes_before_the_checkpoints(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    body = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 64}
    for given in (str(tmp_path / "own.jinja"), (tmp_path / "own.jinja").read_text()):
        answer = start("--chat-template", given).http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"].startswith("<the fox>")  # the fake engine repeats the prompt


def test_trainers_pause_and_go_on_and_no_tokenizer_is_needed(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start("--enable-rl", "--skip-tokenizer-init", "--model", str(tmp_path), TANDEM_ADMIN_API_KEY="admins")
    key = {"x-api-key": "admins"}
    assert server.http.post("/pause").status_code == 401
    assert server.http.post("/pause", headers=key).json() == {"status": "paused"}
    assert server.http.post("/continue_generation", headers=key).json()["success"] is True
    body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 3}}
    answer = server.http.post("/generate", json=body).json()
    assert (answer["text"], answer["output_ids"]) == (None, [5, 6, 5])


@pytest.mark.parametrize(("is_resumed", "reason"), [(True, "length"), (False, "abort")])
def test_a_paused_server_that_drains_can_go_on_and_else_ends_requests_with_what_they_have(
    start: Callable[..., Server], is_resumed: bool, reason: str
) -> None:
    program = START.replace("fake_engine:FakeEngine", "api.rl.trained_engine:TrainedEngine")
    server = start("--enable-rl", "--drain-timeout", "60" if is_resumed else "0.2", program=program)
    with server.stream([LONG_ID, 5]) as response:
        lines = response.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.http.base_url, timeout=DEADLINE_SECONDS) as other:
            assert other.post("/pause", params={"mode": "keep"}).status_code == 200
            server.process.send_signal(signal.SIGTERM)
            if is_resumed:
                wait_for(lambda: other.get("/health").status_code == 503, "draining")
                assert other.post("/pause").status_code == 503
                assert other.post("/resume").status_code == 200
        last = [line for line in lines if line][-2:]
    assert json.loads(last[0].removeprefix("data: "))["choices"][0]["finish_reason"] == reason
    assert last[1] == "data: [DONE]"
    assert server.process.wait(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({}, False),
        ({"enable_rl": True}, True),
        ({"enable_rl": True, "host": "127.0.0.1"}, False),
        ({"enable_rl": True, "uds": "/x"}, False),
        ({"enable_rl": True, "api_key": ("k",)}, False),
        ({"enable_rl": True, "admin_api_key": "k"}, False),
    ],
)
def test_a_door_that_is_open_to_all_is_told(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], warns: bool
) -> None:
    warn_of_open_doors(ServerConfig(**{"host": "0.0.0.0", **settings}))
    assert ("--admin-api-key" in caplog.text) is warns


def test_the_log_of_both_processes_is_json_where_asked_for(start: Callable[..., Server]) -> None:
    server = start("--log-format", "json", "--log-level", "info", "--log-interval", "0.05")
    with server.stream([LONG_ID, 5], request_id="r") as response:
        response.read()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(DEADLINE_SECONDS) == 0
    assert server.process.stderr is not None
    entries = [json.loads(line) for line in server.process.stderr.read().splitlines()]
    by_message = {entry["message"].partition(" ")[0]: entry for entry in entries}
    assert by_message["Tandem"]["context"] > 0
    assert f"http://127.0.0.1:{server.port}" in by_message["ready:"]["message"]
    assert by_message["finished"]["output_tokens"] == 1500
    assert by_message["throughput"]["running"] in (0, 1)


def test_a_settings_file_and_the_environment_say_how_to_serve(start: Callable[..., Server], tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("mtp-step: 2\nserved-model-name: [first, second]\nmax-queue: 7\n")
    server = start("--config", str(settings), "--max-queue", "8", TANDEM_API_KEY="sesame")
    assert server.http.get("/v1/models").status_code == 401
    key = {"authorization": "Bearer sesame"}
    names = [card["id"] for card in server.http.get("/v1/models", headers=key).json()["data"]]
    assert names == ["first", "second"]
    info = server.http.get("/server_info", headers=key).json()
    assert (info["mtp_step"], info["settings"]["max_queue"]) == (2, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--mtp-step", "1", "--max-model-len", "99999999"], 1)])
def test_a_check_serves_nothing_and_its_exit_code_says_whether_it_would(flags: list[str], code: int) -> None:
    command = [sys.executable, "-m", "server", "--check", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == code
    assert ("KV tokens" in done.stdout) == (code == 0)
    assert ("tandem: error: --max-model-len is 99999999" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chunked-prefill-size", "13"], "truncated"),
        (["--chunked-prefill-size", "14"], "a bug at start"),
        (["--model", "/nowhere"], "/nowhere is not a directory"),
        (["--model", str(ROOT / "server")], "tokenizer.json does not exist"),
        (["--mtp-step", "99"], "--mtp-step is 99"),
        (["--chat-template", "/nowhere/own.jinja"], "--chat-template /nowhere/own.jinja cannot be read"),
        (["--chat-template", "{% if %}"], "the chat template is broken at line 1"),
    ],
)
def test_a_start_that_fails_is_one_line_and_exit_code_1(checkpoint: Path, flags: list[str], message: str) -> None:
    server = Server(checkpoint, flags)
    _, errors = server.process.communicate(timeout=DEADLINE_SECONDS)
    server.stop()
    assert server.process.returncode == 1
    last_line = errors.splitlines()[-1]
    assert last_line.startswith("tandem: error: ")
    assert message in last_line
    assert "Traceback" not in errors or "a bug" in message


def test_a_port_that_is_taken_is_named(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(checkpoint, ["--port", str(port)])
        _, errors = server.process.communicate(timeout=DEADLINE_SECONDS)
        server.stop()
    assert server.process.returncode == 1
    assert f"--port {port}" in errors


def test_two_servers_started_together_on_one_port_are_one_that_serves_and_one_that_says_why_not(
    checkpoint: Path,
) -> None:
    first = Server(checkpoint, [])
    second = Server(checkpoint, ["--port", str(first.port)])
    servers = (first, second)
    try:
        wait_for(lambda: any(server.process.poll() is not None for server in servers), "the end of one")
        loser, _ = sorted(servers, key=lambda server: server.process.poll() is None)
        assert loser.process.returncode == 1
        assert loser.process.stderr is not None
        (line,) = loser.process.stderr.read().splitlines()
        assert line.startswith("tandem: error: cannot listen on")
        wait_for(first.is_healthy, "readiness")  # both were given its port, whichever won
    finally:
        for server in servers:
            server.stop()


def test_an_http_server_that_fails_at_start_is_one_line_and_exit_code_1(checkpoint: Path) -> None:
    broken = f"""\
import server.launch, uvicorn
async def fail(self, sockets=None):
    raise OSError("no more files")
uvicorn.Server.startup = fail
{START}"""
    server = Server(checkpoint, [], broken)
    _, errors = server.process.communicate(timeout=DEADLINE_SECONDS)
    server.stop()
    assert server.process.returncode == 1
    assert errors == "tandem: error: the HTTP server failed: no more files\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_ends_the_server_with_0(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "uvicorn.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    with subprocess.Popen(
        [sys.executable, "-m", "server"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert process.wait(DEADLINE_SECONDS) == 0
        assert process.stderr.read() == ""


def test_the_http_process_does_not_import_torch() -> None:
    code = "import sys, server.launch, server.api.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_foreign_kernels_package_is_named_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {START}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip uninstall kernels" in done.stderr
    check_kernels_package()
