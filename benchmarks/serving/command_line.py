"""The command line: flags, what they may be, and which loads and servers they name."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.openai_server import RunFailed, one_line
from benchmarks.serving.datasets import CHAT, COMPLETIONS, DATASETS, FROM_FILES
from benchmarks.serving.load import Load
from benchmarks.serving.summary import GOALS

DEFAULT_URL = "http://localhost:8000"
DEFAULT_ROUNDS = 5
_LEAST = {
    "burstiness": 1e-3,
    "num_prompts": 1,
    "duration": 1e-3,
    "num_warmups": 0,
    "rounds": 1,
    "input_len": 1,
    "output_len": 1,
    "range_ratio": 0,
    "prefix_len": 1,
    "num_groups": 1,
    "num_turns": 1,
    "shots": 0,
    "vocab_size": 1,
    "temperature": 0,
    "timeout": 1e-3,
    "start_timeout": 1e-3,
}


def read_command_line(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags, with `loads`, and with defaults that depend on other flags filled in. Raises RunFailed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_servers(parser)
    _add_load(parser)
    _add_dataset(parser)
    _add_request(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    args.extra_body = _read_object(args.extra_body)
    args.goodput = _read_goals(args.goodput)
    args.names = args.names.split(",") if args.names else []
    args.endpoint = args.endpoint or (CHAT if args.dataset in ("multi-turn", "sharegpt") else COMPLETIONS)
    if args.base_url is None and not args.launch:
        args.base_url = DEFAULT_URL
    args.rounds = args.rounds or (DEFAULT_ROUNDS if len(contestant_names(args)) > 1 else 1)
    _check(args)
    kind = "request_rate" if args.request_rate else "concurrency"
    args.loads = [Load(kind, value, args.burstiness) for value in args.request_rate or args.concurrency]
    return args


def urls(args: argparse.Namespace) -> list[str]:
    """Servers that run already."""
    return [*([args.base_url] if args.base_url else []), *args.compare]


def contestant_names(args: argparse.Namespace) -> list[str]:
    """What the servers are called: those that are launched first."""
    return args.names or [*args.launch, *(url.partition("://")[2] or url for url in urls(args))]


def shown_config(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as the JSON object has them: without the key, and without numbers that JSON does not have."""
    config = {name: value for name, value in vars(args).items() if name not in ("api_key", "loads")}
    config["request_rate"] = [f"{rate:g}" for rate in args.request_rate]
    return {name: str(value) if isinstance(value, Path) else value for name, value in config.items()}


def _add_servers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("servers")
    group.add_argument("--base-url", metavar="URL", help=f"a server; default: {DEFAULT_URL}, or none with --launch")
    group.add_argument("--compare", nargs="+", default=[], metavar="URL", help="more servers, which take turns with it")
    group.add_argument(
        "--launch",
        action="append",
        default=[],
        metavar="ARGS",
        help='start `python -m server ARGS` on a free port, and end it afterwards; repeatable: --launch "--mtp-step 1"',
    )
    group.add_argument("--names", metavar="A,B", help="names of the servers: launched ones, --base-url, --compare")
    group.add_argument("--rounds", type=int, help=f"turns of every server; default: {DEFAULT_ROUNDS}, 1 for one server")
    group.add_argument("--start-timeout", type=float, default=600.0, help="seconds for a launched server to be ready")


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--concurrency", nargs="+", type=int, default=[1], help="conversations at a time, one run each")
    kind.add_argument(
        "--request-rate",
        nargs="+",
        type=float,
        default=[],
        help="conversations that begin per second; inf: all at once",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gaps between requests: 1 is Poisson, less is burstier",
    )
    group.add_argument(
        "--num-prompts",
        type=int,
        help="conversations per server and round; default: 8 for each client, or those of 8 seconds, at least 32",
    )
    group.add_argument("--duration", type=float, help="seconds of a round after which no conversation begins")
    group.add_argument("--num-warmups", type=int, help="before the first round; default: one per client, at least 4")


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset", choices=DATASETS, default="random", help="what is asked")
    group.add_argument("--data", help="sharegpt: a JSON or JSON lines file; gsm8k: a test file or a directory")
    group.add_argument(
        "--input-len", type=int, default=256, help="tokens of a prompt, behind a shared prefix, of a turn"
    )
    group.add_argument(
        "--output-len", type=int, help="longest answer in tokens; default: 128, gsm8k 512, sharegpt its own"
    )
    group.add_argument(
        "--range-ratio", type=float, default=0.0, help="lengths are drawn from 1 - ratio to 1 + ratio times"
    )
    group.add_argument("--prefix-len", type=int, default=256, help="shared-prefix: tokens that a group has in common")
    group.add_argument("--num-groups", type=int, default=4, help="shared-prefix: how many prefixes there are")
    group.add_argument("--num-turns", type=int, default=4, help="multi-turn: questions of a conversation")
    group.add_argument("--shots", type=int, default=5, help="gsm8k: solved examples before each question")
    group.add_argument("--vocab-size", type=int, default=1000, help="random token ids are below it")


def _add_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--endpoint", choices=[COMPLETIONS, CHAT], help="default: chat for multi-turn and sharegpt, else completions"
    )
    group.add_argument("--model", help="name of the model; default: the first of /v1/models")
    group.add_argument("--api-key", default="", help="sent as a bearer token")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--seed", type=int, default=0, help="of prompts, gaps and, above temperature 0, requests")
    group.add_argument("--ignore-eos", action="store_true", help="every answer is as long as it may be")
    group.add_argument("--extra-body", default="{}", metavar="JSON", help="fields for every request")
    group.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help=f"count requests whose {', '.join(GOALS)} are not above so many milliseconds: ttft:200 tpot:50",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there as well")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw speed and latency there; needs matplotlib")


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunFailed(f"--extra-body {text} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict) or "stream" in value:
        raise RunFailed(
            f"--extra-body is {text}, it must be a JSON object without `stream`: answers are always streamed"
        )
    return value


def _read_goals(words: list[str]) -> dict[str, float]:
    goals = {}
    for word in words:
        name, _, limit = word.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError as error:
            raise RunFailed(f"--goodput {word} is not NAME:MILLISECONDS, as in ttft:200") from error
        if name not in GOALS:
            raise RunFailed(f"--goodput names {name}, it must be one of {', '.join(GOALS)}")
    return goals


def _check(args: argparse.Namespace) -> None:
    for name, limit in _LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= limit:
            raise RunFailed(f"--{name.replace('_', '-')} is {value:g}, the least is {limit:g}")
    for name in ("concurrency", "request_rate"):
        for value in getattr(args, name):
            if not value > 0:
                raise RunFailed(f"--{name.replace('_', '-')} has {value:g}, it must be above 0")
    if args.range_ratio > 1:
        raise RunFailed(f"--range-ratio is {args.range_ratio:g}, the most is 1")
    if args.dataset in FROM_FILES and args.data is None:
        raise RunFailed(f"--dataset {args.dataset} needs --data")
    num_servers = len(args.launch) + len(urls(args))
    if args.names and len(args.names) != num_servers:
        raise RunFailed(f"--names has {len(args.names)} names, there are {num_servers} servers")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise RunFailed(f"--{name} {path} lies in no directory that exists; make it first")
