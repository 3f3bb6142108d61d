"""How fast does a server answer over HTTP? `python -m benchmarks.serving`, for every OpenAI-compatible one.

Load is closed (--concurrency: so many conversations at a time) or open (--request-rate: so many begin per second);
several values are run one after another. Answers are streamed: TTFT, TPOT, ITL per token and per event, E2E, tokens and
requests per second, goodput, and, where /metrics has them, accept length and acceptance by position.

--compare URL2 and --launch ARGS add servers. They take turns in short rounds and are asked the same, so that a machine
that is slower for a while is so for all; ratios are of one round. Nobody else should use the servers meanwhile.
This gives a table of Tandem with and without drafts:

  python -m benchmarks.serving --launch "--mtp-step 0" --launch "--mtp-step 1" --dataset word-problems --concurrency 1 4

Ctrl-C reports what there is. Prints tables, and as the last line one JSON object. Exit code 1 with one line on stderr
where something cannot be done or no request was answered, 130 after Ctrl-C.
"""

import argparse
import asyncio
import importlib.util
import signal
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.openai_server import RunFailed, Server

if importlib.util.find_spec("httpx") is None:
    sys.exit("the load generator needs httpx, which is not installed: pip install httpx")

from benchmarks.report import print_json
from benchmarks.serving.command_line import contestant_names, read_command_line, shown_config, urls
from benchmarks.serving.datasets import Dataset, make_dataset
from benchmarks.serving.launch import launched_servers
from benchmarks.serving.measure import Measured, contestants_for, measure
from benchmarks.serving.plot import plot
from benchmarks.serving.results import describe
from benchmarks.serving.tables import print_results

INTERRUPTED = 130
# For what is not timed: models and metrics.
_CONTROL_SECONDS = 30.0


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit code. Raises RunFailed."""
    dataset = make_dataset(args, takes_ids=False)
    with launched_servers(args.launch, args.start_timeout) as launched:
        servers = [Server(url, _CONTROL_SECONDS, args.api_key) for url in (*launched, *urls(args))]
        contestants = list(zip(contestant_names(args), servers, strict=True))
        measured = asyncio.run(_measure_until_told(contestants, dataset, args))
        return _report(describe(measured, contestants, args), args)


async def _measure_until_told(
    servers: Sequence[tuple[str, Server]], dataset: Dataset, args: argparse.Namespace
) -> Measured:
    """Until all is measured, or a signal comes. Before the first answer there is nothing to keep: it ends the run."""
    async with contestants_for(servers, args) as contestants:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await measure(contestants, dataset, args, stop)


def _report(results: dict[str, Any], args: argparse.Namespace) -> int:
    """Print and write it all; the exit code. Raises RunFailed where a server answered nothing."""
    loads = results["loads"]
    print_results(results)
    if args.plot:
        print(plot(loads, args.plot))
    line = print_json("serving", shown_config(args), results)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    if results["is_partial"]:
        return INTERRUPTED
    silent = [row["server"] for load in loads for row in load["servers"] if not row["requests"]]
    if silent:
        raise RunFailed(f"no request was answered by {', '.join(dict.fromkeys(silent))}; the reasons stand above")
    return 0


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 with the reason on stderr, or that of an interruption."""
    try:
        return run(read_command_line(argv, __doc__))
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # launched servers end with this process
    sys.exit(main(sys.argv[1:]))
