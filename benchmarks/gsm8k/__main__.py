"""How much of GSM8K does a served checkpoint solve, and how fast? `python -m benchmarks.gsm8k --data DIR`.

The field's protocol: completions of "Question: ..., Answer:" after solved examples, greedy, cut where the next question
would begin; the answer is the number after "####", else the last number of the text. (SGLang's and vLLM's scripts take
digits only: theirs are 5 where -5, and 5 where 2.5 is said.) `--chat` asks through the checkpoint's template instead:
each example is a user's and an assistant's turn, the question is the last one, nothing cuts but the end of the turn.
Questions come from the test split and examples from the train split, never the other way round.

Answers that `--max-tokens` cut off are reported, as a last number found in them may be right by chance. Acceptance of
drafts is the difference of the server's /metrics, so nobody else should use it meanwhile. `--compare URL2` asks a
second server the same and lists every output that differs. Prints a table, and as the last line one JSON object.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from benchmarks.gsm8k.client import ask
from benchmarks.gsm8k.problems import Problem, choose_problems
from benchmarks.gsm8k.scores import Run, find_differences, print_results, score, write_outputs
from benchmarks.openai_server import RunFailed, Server, growth
from benchmarks.report import print_json


def run(server: Server, shots: Sequence[Problem], questions: Sequence[Problem], args: argparse.Namespace) -> Run:
    """Ask one server everything, `--parallel` questions at a time. Raises RunFailed at the first that fails."""
    before, start = server.read_counters(), time.perf_counter()
    pool = ThreadPoolExecutor(args.parallel)
    futures = [pool.submit(ask, server, shots, problem, args) for problem in questions]
    try:
        for future in tqdm(as_completed(futures), desc=server.url, total=len(futures)):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    seconds, after = time.perf_counter() - start, server.read_counters()
    return Run(server.url, server.model, [future.result() for future in futures], seconds, growth(before, after))


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gsm8k", description=__doc__)
    parser.add_argument("--base-url", default="http://localhost:8000", help="the server")
    parser.add_argument("--compare", metavar="URL2", help="a second server, asked the same after the first")
    parser.add_argument("--data", required=True, help="test file, dataset directory, or name on the Hugging Face Hub")
    parser.add_argument("--subset", default="main", help="configuration of the dataset, where it has several")
    parser.add_argument("--shots", type=int, default=5, help="solved examples before each question")
    parser.add_argument("--num-questions", type=int, help="the first so many; default: all")
    parser.add_argument("--parallel", type=int, default=16, help="requests at a time")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer, thoughts included")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0 the number of a question is its seed")
    parser.add_argument("--chat", action="store_true", help="ask through the checkpoint's chat template")
    parser.add_argument("--thinking", choices=["on", "off"], default="off", help="with --chat: think first")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument("--save-outputs", metavar="FILE", help="write every output there, as JSON lines")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises RunFailed for numbers out of range, --thinking where nothing can think, and nowhere to save outputs."""
    lowest = {"shots": 0, "num_questions": 1, "parallel": 1, "max_tokens": 1, "temperature": 0, "timeout": 0.001}
    for name, limit in lowest.items():
        value = getattr(args, name)
        if value is not None and not value >= limit:
            raise RunFailed(f"--{name.replace('_', '-')} is {value}, the least is {limit}")
    if args.thinking == "on" and not args.chat:
        raise RunFailed("--thinking on is a switch of the chat template; add --chat")
    if args.save_outputs and not Path(args.save_outputs).parent.is_dir():
        raise RunFailed(f"--save-outputs {args.save_outputs} lies in no directory that exists; make it first")


def measure(args: argparse.Namespace) -> None:
    """Ask, score, compare, print. Raises RunFailed."""
    check_args(args)
    shots, questions = choose_problems(args)
    servers = [Server(url, args.timeout) for url in (args.base_url, args.compare) if url is not None]
    runs = [run(server, shots, questions, args) for server in servers]
    if args.save_outputs:
        write_outputs(args.save_outputs, runs, questions)
    scores = [score(done, questions) for done in runs]
    differences = find_differences(runs[0], runs[1], questions) if args.compare else []
    print_results(scores, differences)
    results = {"servers": scores}
    print_json("gsm8k", vars(args), results | {"differences": differences} if args.compare else results)


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 with the reason on stderr."""
    try:
        measure(parse_args(argv))
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
