"""How much of GSM8K does a served checkpoint solve, and how fast? `python -m benchmarks.gsm8k --data DIR`.

The field's protocol: completions of "Question: ..., Answer:" after solved examples, greedy, cut where the next question
would begin; the answer is the number after "####", else the last number of the text. (SGLang's and vLLM's scripts take
digits only: theirs are 5 where -5, and 5 where 2.5 is said.) `--chat` asks through the checkpoint's template instead:
each example is a user's and an assistant's turn, the question is the last one, nothing cuts but the end of the turn.
Questions come from the test split and examples from the train split, never the other way round.

Answers that `--max-tokens` cut off are reported, as a last number found in them may be right by chance. Acceptance of
drafts is the difference of the server's /metrics, so nobody else should use it meanwhile. `--compare URL2` asks a
second server the same and lists every output that differs. Prints a table, and as the last line one JSON object.

Failed questions and broken rows are counted and left out: shares are of what was answered. The exit code is 1, with
the reason on stderr, where a question failed or nothing can be done, 130 after Ctrl-C, which reports what there is.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.gsm8k.client import ask
from benchmarks.gsm8k.problems import Problem, choose_problems
from benchmarks.gsm8k.scores import Run, find_differences, print_results, score, write_outputs
from benchmarks.openai_server import RunFailed, Server, growth
from benchmarks.report import print_json

INTERRUPTED = 130


def run(server: Server, shots: Sequence[Problem], questions: Sequence[Problem], args: argparse.Namespace) -> Run:
    """Ask one server everything, `--parallel` questions at a time, or what there is until Ctrl-C."""
    before, start = server.read_counters(), time.perf_counter()
    pool, is_partial = ThreadPoolExecutor(args.parallel), False
    futures = {problem: pool.submit(ask, server, shots, problem, args) for problem in questions}
    try:
        for _ in tqdm(as_completed(futures.values()), desc=server.url, total=len(futures)):
            pass
    except KeyboardInterrupt:
        is_partial = True
    pool.shutdown(wait=not is_partial, cancel_futures=True)
    seconds, after = time.perf_counter() - start, server.read_counters()
    answers, failures = {}, []
    for problem, future in futures.items():
        if future.done() and not future.cancelled():
            try:
                answers[problem] = future.result()
            except RunFailed as failure:
                failures.append(str(failure))
    return Run(server.url, server.model, answers, seconds, growth(before, after), failures, is_partial)


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
    saved = args.save_outputs and Path(args.save_outputs)
    if saved and (saved.is_dir() or not saved.parent.is_dir()):
        raise RunFailed(f"--save-outputs {saved} is no file in a directory that exists; make that first")


def measure(args: argparse.Namespace) -> int:
    """Ask, score, compare, print; the exit code. Raises RunFailed."""
    check_args(args)
    shots, questions, num_broken = choose_problems(args)
    servers = [Server(url, args.timeout) for url in (args.base_url, args.compare) if url is not None]
    runs: list[Run] = []
    for server in servers:
        runs.append(run(server, shots, questions, args))
        if runs[-1].is_partial:
            break
    if any(done.answers for done in runs):
        _report(runs, num_broken, args)
    if runs[-1].is_partial:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    if failed := [f"{len(one.failures)} of {len(questions)}, first {one.failures[0]}" for one in runs if one.failures]:
        raise RunFailed(f"questions failed: {'; '.join(failed)}")
    return 0


def _report(runs: Sequence[Run], num_broken: int, args: argparse.Namespace) -> None:
    scores = [score(done) for done in runs if done.answers]
    results: dict[str, Any] = {"servers": scores, "skipped": num_broken, "is_partial": runs[-1].is_partial}
    num_compared = 0
    if len(runs) > 1:
        num_compared = len(runs[0].answers.keys() & runs[1].answers.keys())
        results["differences"] = find_differences(runs[0], runs[1])
    print_results(scores, results.get("differences", []), num_compared)
    if num_broken:
        print(f"{num_broken} rows of the data were broken and left out")
    print_json("gsm8k", vars(args), results)
    if args.save_outputs:
        write_outputs(args.save_outputs, runs)


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 with the reason on stderr, or that of an interruption."""
    try:
        return measure(parse_args(argv))
    except (RunFailed, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
