"""What does the API cost? `python -m benchmarks.api_cost`, on the bundled demo checkpoint.

1. Features: one server, always --concurrency requests at a time, answers of the same lengths. Nothing special asked
   for, against log-probabilities with penalties, against a JSON schema, and against all of it. Penalties and schemas
   change what is written, so with --mtp-step above 0 acceptance differs too: the default compares work alone.
2. HTTP: the same load as `LLM.generate` in this process, without HTTP.
3. Idle streams: one stream at a time is served, in a server with one row, while --idle others wait in the queue with
   their connections open, a comment each every 5 seconds; against the same without them.

Contestants take turns in rounds, and every ratio is of one round. Prints tables, and as the last line one JSON object.
Exit code 1 with one line on stderr where something cannot be done.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import resource
import shlex
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.openai_server import RunFailed, Server, one_line
from benchmarks.report import print_json, print_table, spread
from benchmarks.serving.launch import launched_servers
from benchmarks.word_problems import draw_problem
from server.config import ENGINE_ENVIRONMENT
from server.llm import LLM, SamplingParams

PATH = "/v1/completions"
TIMEOUT_SECONDS = 300.0
OFF, GENERATE = "nothing", "LLM.generate"
COSTLY = {"logprobs": 5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
_ORDER = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 999}},
    "required": ["name", "count"],
}
# Longer than any answer: all of them end by their length.
_ORDERS = {"type": "array", "minItems": 1000, "items": _ORDER}
SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "orders", "schema": _ORDERS}}}
FEATURES: dict[str, dict[str, Any]] = {
    OFF: {},
    "logprobs, penalties": COSTLY,
    "json_schema": SCHEMA,
    "all": {**COSTLY, **SCHEMA},
}
# The least speed over that of `OFF`; for OFF itself, over that of LLM.generate.
GOALS = {OFF: 0.9, "logprobs, penalties": 0.9, "json_schema": 0.75, "all": 0.75}
IDLE_GOAL = 0.95
_KEEP_ALIVE_SECONDS = 5
# Idle streams are opened in bursts that do not keep the active clients from asking; a few may get the row all the same.
_BURST, _LOSS = 25, 0.02
_NUM_CLIENTS, _LEAST_STREAMS = 4, 3
_POLL_SECONDS = 0.05

Body = dict[str, Any]
Speeds = dict[str, list[float]]


@dataclass(frozen=True)
class Load:
    """So many requests, `concurrency` at a time, of `max_tokens` on average: from half to one and a half times as many,
    since answers that all end in one step would leave the engine idle until the next requests come."""

    num_requests: int
    max_tokens: int
    concurrency: int

    def bodies(self, seed: str, fields: Body) -> list[Body]:
        """Requests for word problems that no other seed has, with these fields."""
        rng = random.Random(seed)
        shape = {"ignore_eos": True, "temperature": 1.0, **fields}
        lengths = [rng.randint((self.max_tokens + 1) // 2, 3 * self.max_tokens // 2) for _ in range(self.num_requests)]
        return [{"prompt": draw_problem(rng), "seed": i, "max_tokens": n, **shape} for i, n in enumerate(lengths)]


def connect(server: Server) -> http.client.HTTPConnection:
    """A connection that is kept for several requests."""
    address = urlsplit(server.url)
    return http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS)


def post(connection: http.client.HTTPConnection, body: Body) -> http.client.HTTPResponse:
    """The answer to a request. Raises RunFailed for an error."""
    connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    if response.status != http.client.OK:
        raise RunFailed(f"{PATH} answers {response.status}: {one_line(response.read().decode(errors='replace'))}")
    return response


def serve_all(server: Server, bodies: Sequence[Body], concurrency: int) -> float:
    """Output tokens per second of a closed loop of whole answers."""
    left = list(bodies)

    def ask(_: int) -> int:
        num_tokens = 0
        with contextlib.closing(connect(server)) as connection:
            while True:
                try:
                    body = left.pop()
                except IndexError:
                    return num_tokens
                num_tokens += json.loads(post(connection, body).read())["usage"]["completion_tokens"]

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        total = sum(pool.map(ask, range(concurrency)))
    return total / (time.perf_counter() - start)


def generate_all(llm: LLM, bodies: Sequence[Body]) -> float:
    """Output tokens per second of the same requests without HTTP; as many at a time as the engine has rows."""
    names = ("seed", "max_tokens", "ignore_eos", "temperature")
    params = [SamplingParams(**{name: body[name] for name in names}) for body in bodies]
    start = time.perf_counter()
    outputs = llm.generate([body["prompt"] for body in bodies], params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start)


def take_turns(contestants: dict[str, Callable[[str], float]], num_rounds: int) -> Speeds:
    """Speeds of so many rounds, and one before them that warms up; each begins with another contestant. Contestants
    are told a seed that no other turn has."""
    speeds: Speeds = {name: [] for name in contestants}
    for number in range(num_rounds + 1):
        first = number % len(contestants)
        for name in [*contestants][first:] + [*contestants][:first]:
            speed = contestants[name](f"{name} {number}")
            if number:
                speeds[name].append(speed)
    return speeds


def ratios_of(speeds: Speeds, name: str, base: str) -> dict[str, float]:
    """The median of the ratios of each round, with the least and the most."""
    return spread("ratio", (one / other for one, other in zip(speeds[name], speeds[base], strict=True)))


def measure_features(args: argparse.Namespace, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of what is served with each feature, and of what is generated without HTTP. Raises RunFailed."""
    load = Load(args.requests, args.max_tokens, args.concurrency)
    rows = ["--max-running-requests", str(args.concurrency)]
    settings = {"max_running_requests": args.concurrency, "mtp_step": args.mtp_step, "num_threads": args.num_threads}
    with launched_servers([shlex.join([*flags, *rows])], args.start_timeout) as (url,):
        server = Server(url, TIMEOUT_SECONDS)
        llm = LLM(model=args.model, **settings)
        contestants: dict[str, Callable[[str], float]] = {
            name: lambda seed, fields=fields: serve_all(server, load.bodies(seed, fields), load.concurrency)  # type: ignore[misc]
            for name, fields in FEATURES.items()
        }
        contestants[GENERATE] = lambda seed: generate_all(llm, load.bodies(seed, {}))
        speeds = take_turns(contestants, args.rounds)
    return [_row(speeds, name, GENERATE if name == OFF else OFF, GOALS.get(name)) for name in contestants]


def _row(speeds: Speeds, name: str, base: str, goal: float | None) -> dict[str, Any]:
    ratios = ratios_of(speeds, name, base)
    row = {"asked for": name, "tok/s": statistics.median(speeds[name]), "over": base, **ratios}
    return {**row, "goal": goal or "-", "holds": "-" if goal is None else "yes" if ratios["ratio"] >= goal else "NO"}


class IdleStreams:
    """Streams that wait in the queue behind all others, whose clients read nothing."""

    def __init__(self, server: Server, count: int):
        self._server, self._count = server, count

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """With all of them in the queue; they have left it afterwards. Raises RunFailed."""
        with contextlib.ExitStack() as stack:
            for first in range(0, self._count, _BURST):
                opened = min(first + _BURST, self._count)
                for _ in range(first, opened):
                    stack.enter_context(self._open())
                self._wait(lambda waiting, opened=opened: waiting >= opened - _LOSS * self._count)  # type: ignore[misc]
            yield
        self._wait(lambda waiting: waiting < self._count / 2)

    def _open(self) -> socket.socket:
        address = urlsplit(self._server.url)
        body = json.dumps({"prompt": "Hello", "stream": True, "priority": 1}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
        connection = socket.create_connection((address.hostname, address.port), TIMEOUT_SECONDS)
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def _wait(self, is_reached: Callable[[float], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not is_reached(waiting := self._server.read_counters().get(("vllm:num_requests_waiting", ""), 0.0)):
            if time.monotonic() > deadline:
                raise RunFailed(f"{waiting:g} of {self._count} idle streams wait after {TIMEOUT_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)


class ActiveStreams:
    """Clients that stream one answer after another: enough of them that one always waits to take the row."""

    def __init__(self, server: Server, max_tokens: int):
        self._server, self._load = server, Load(1, max_tokens, 1)
        self._stop = threading.Event()
        self._ends: list[tuple[float, int]] = []

    def measure(self, seconds: float, seed: str, beside: contextlib.AbstractContextManager[None]) -> float:
        """Output tokens per second within `seconds` beside what else goes on, from the end of a stream to that of
        another. Raises RunFailed."""
        self._stop.clear()
        with ThreadPoolExecutor(_NUM_CLIENTS) as pool:
            clients = [pool.submit(self._ask, f"{seed} {number}") for number in range(_NUM_CLIENTS)]
            try:
                with beside:
                    num_before = len(self._ends)
                    time.sleep(seconds)
                    ends = sorted(self._ends[num_before:])
            finally:
                self._stop.set()
            for client in clients:
                client.result()
        if len(ends) < _LEAST_STREAMS:
            raise RunFailed(f"{len(ends)} streams of {self._load.max_tokens} tokens ended in {seconds:g} s (--seconds)")
        return sum(num_tokens for _, num_tokens in ends[1:]) / (ends[-1][0] - ends[0][0])

    def _ask(self, seed: str) -> None:
        fields = {"stream": True, "stream_options": {"include_usage": True}}
        with contextlib.closing(connect(self._server)) as connection:
            for number in itertools.takewhile(lambda _: not self._stop.is_set(), itertools.count()):
                (body,) = self._load.bodies(f"{seed} {number}", fields)
                events = [line for line in post(connection, body) if line.startswith(b"data: {")]
                usage = json.loads(events[-1].removeprefix(b"data: "))["usage"]
                self._ends.append((time.perf_counter(), usage["completion_tokens"]))


def measure_idle(args: argparse.Namespace, flags: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one active stream alone and beside idle ones. Raises RunFailed."""
    queue = ["--max-queue", str(args.idle + 2 * _NUM_CLIENTS), "--keep-alive-interval", str(_KEEP_ALIVE_SECONDS)]
    with launched_servers([shlex.join([*flags, "--max-running-requests", "1", *queue])], args.start_timeout) as (url,):
        server = Server(url, TIMEOUT_SECONDS)
        active, idle = ActiveStreams(server, args.max_tokens), IdleStreams(server, args.idle)
        alone, beside = "a stream alone", f"beside {args.idle} idle ones"
        contestants: dict[str, Callable[[str], float]] = {
            alone: lambda seed: active.measure(args.seconds, seed, contextlib.nullcontext()),
            beside: lambda seed: active.measure(args.seconds, seed, idle.waiting()),
        }
        speeds = take_turns(contestants, args.rounds)
    return [_row(speeds, name, alone, IDLE_GOAL if name == beside else None) for name in contestants]


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.api_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(Path(__file__).resolve().parent.parent / "models" / "demo"), help="checkpoint directory")
    add("--mtp-step", type=int, default=0, help="draft tokens per step")
    add("--num-threads", type=int, help="CPU threads of every engine; default: the engine's own")
    add("--rounds", type=int, default=7, help="turns of every contestant")
    add("--requests", type=int, default=96, help="requests of a turn")
    add("--max-tokens", type=int, default=128, help="tokens of an answer, on average")
    add("--concurrency", type=int, default=16, help="requests at a time")
    add("--idle", type=int, default=1000, help="idle streams")
    add("--seconds", type=float, default=6.0, help="length of a turn of the active stream")
    add("--start-timeout", type=float, default=300.0, help="seconds until a server must be ready")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int | float) and value <= 0 and name != "mtp_step":
            parser.error(f"--{name.replace('_', '-')} is {value}, it must be above 0")
    return args


def measure(args: argparse.Namespace) -> None:
    """Measure and print all. Raises RunFailed."""
    flags = ["--model", args.model, "--mtp-step", str(args.mtp_step)]
    flags += [] if args.num_threads is None else ["--num-threads", str(args.num_threads)]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    features = measure_features(args, flags)
    print_table(features)
    idle = measure_idle(args, flags)
    print_table(idle)
    print_json("api_cost", vars(args), {"features": features, "idle": idle})


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 with the reason on stderr."""
    try:
        measure(parse_args(argv))
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def _enter_environment() -> None:
    """Begin again with what a server sets for its engine, before torch is loaded: the engine in this process is to have
    the same."""
    if not os.environ.keys() >= ENGINE_ENVIRONMENT.keys():
        os.execve(sys.executable, sys.orig_argv, ENGINE_ENVIRONMENT | os.environ)


if __name__ == "__main__":
    _enter_environment()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # launched servers end with this process
    sys.exit(main(sys.argv[1:]))
