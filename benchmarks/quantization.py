"""What do weights of few bits change in what a model says? `python -m benchmarks.quantization [--model DIR]`.

Texts that the model was not trained on, read under every precision: the perplexity of their answers and of all their
tokens; and greedy answers to their questions, against those in float32. Texts are JSON lines with question and answer;
the default are held-out problems of the demo. Prints a table, and as the last line one JSON object.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.openai_server import RunFailed, one_line
from benchmarks.report import print_json, print_table
from server.llm import LLM, SamplingParams, TandemError

# (dtype, quantization), the reference first.
PRECISIONS = (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "int4"))
PERPLEXITIES = ("perplexity", "of all")
READ = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)

Texts = list[tuple[str, str]]


def read_texts(file: Path, num_texts: int) -> Texts:
    """(prompt, answer) of the first lines, at least one. Raises RunFailed."""
    texts = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(itertools.islice(lines, num_texts), 1):
                texts.append(_read_text(line, f"{file}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunFailed(f"cannot read {file}: {one_line(error)}") from error
    if not texts:
        raise RunFailed(f"{file} is empty; it must have a JSON object with question and answer in each line")
    return texts


def _read_text(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        return f"Question: {row['question']}\nAnswer:", f" {row['answer']}"
    except (ValueError, TypeError, KeyError) as error:
        raise RunFailed(f"{where} is no JSON object with question and answer: {one_line(error)}") from error


def draw_texts(num_texts: int) -> Texts:
    """Held-out problems of the demo."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "problems.jsonl"
        options = ["--write-problems", str(file), "--num-problems", str(num_texts)]
        subprocess.run([sys.executable, "-m", "models.training.demo", *options], check=True)
        return read_texts(file, num_texts)


def score(llm: LLM, texts: Texts) -> tuple[float, float]:
    """Perplexity of the answers, and of all tokens but the first."""
    encode = llm.tokenizer.encode
    starts = [len(encode(prompt)) - 1 for prompt, _ in texts]
    outputs = llm.generate([prompt + answer for prompt, answer in texts], READ)
    logprobs = [[entry.logprob for entry in output.prompt_logprobs] for output in outputs]
    answers = [value for start, values in zip(starts, logprobs, strict=True) for value in values[start:]]
    return _perplexity(answers), _perplexity([value for values in logprobs for value in values])


def _perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def measure(args: argparse.Namespace, texts: Texts) -> Iterator[dict[str, Any]]:
    """One row per precision."""
    expected: list[list[int]] = []
    greedy = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    model = {"model": args.model} if args.model else {}
    for dtype, quantization in PRECISIONS:
        llm = LLM(dtype=dtype, quantization=quantization, mtp_step=0, num_threads=args.num_threads, **model)
        of_answers, of_all = score(llm, texts)
        said = [output.token_ids for output in llm.generate([prompt for prompt, _ in texts], greedy)]
        expected = expected or said
        yield {
            "dtype": dtype,
            "weights": quantization,
            "MiB": llm.engine.ready.memory_bytes["weights"] / 2**20,
            "perplexity": of_answers,
            "of all": of_all,
            "same greedy %": 100 * sum(ours == theirs for ours, theirs in zip(said, expected, strict=True)) / len(said),
        }


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", help="checkpoint directory; the bundled demo when not given")
    parser.add_argument("--texts", type=Path, help="JSON lines with question and answer, as GSM8K has them")
    parser.add_argument("--num-texts", type=int, default=200, help="texts to read, at most")
    parser.add_argument("--max-tokens", type=int, default=120, help="tokens of a greedy answer, at most")
    parser.add_argument("--num-threads", type=int, default=None, help="CPU threads; default: the cores there are")
    args = parser.parse_args(argv)
    if args.num_texts < 1:
        parser.error(f"--num-texts is {args.num_texts}, the least is 1")
    return args


def main(argv: list[str]) -> int:
    """Measure and print; the exit code is 2, with the reason on stderr, where something or all of it cannot be."""
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []
    status = 0
    try:
        texts = read_texts(args.texts, args.num_texts) if args.texts else draw_texts(args.num_texts)
        for row in measure(args, texts):
            rows.append(row)
    except (RunFailed, TandemError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        status = 2
    if rows:
        _report(rows, len(texts), args)
    return status


def _report(rows: list[dict[str, Any]], num_texts: int, args: argparse.Namespace) -> None:
    print_table(
        [{name: f"{value:.4f}" if name in PERPLEXITIES else value for name, value in row.items()} for row in rows]
    )
    config = {"model": args.model or "demo", "texts": str(args.texts or "held-out problems"), "num_texts": num_texts}
    print_json("quantization", config, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
