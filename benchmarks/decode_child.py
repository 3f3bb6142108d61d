"""Decodes on command with the Tandem that PYTHONPATH names: a contestant of `benchmarks.static_throughput --baseline`.

Run as `python -P decode_child.py` in another checkout, so that `server` is that one's. Reads JSON lines: first
{"settings": of LLM, "batch", "prompt_len"}, then numbers of steps. Answers each with a line: {"root": where `server`
lies} when all requests decode, then {"seconds", "tokens"}. Uses nothing that older versions do not know.
"""

import json
import random
import sys
import time
from pathlib import Path

import server.llm
from server.llm import LLM, Generate, SamplingParams
from server.messages import TokenOutput


def start(llm: LLM, batch: int, prompt_len: int) -> None:
    """Requests that do not end by themselves, past their prompts."""
    rng, engine = random.Random(0), llm.engine
    for index in range(batch):
        prompt = [rng.randrange(1, engine.ready.vocab_size) for _ in range(prompt_len)]
        engine.add(Generate(str(index), prompt, SamplingParams(temperature=0, ignore_eos=True)))
    while engine.scheduler.waiting or not all(request.is_decoding for request in engine.scheduler.running):
        engine.step()


def decode(llm: LLM, num_steps: int) -> dict[str, float]:
    """Seconds and tokens of that many steps."""
    begin, num_tokens = time.perf_counter(), 0
    for _ in range(num_steps):
        num_tokens += sum(len(output.token_ids) for output in llm.engine.step() if isinstance(output, TokenOutput))
    return {"seconds": time.perf_counter() - begin, "tokens": num_tokens}


def say(answer: object) -> None:
    """One line to whoever asked."""
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Serve commands until the input ends."""
    task = json.loads(sys.stdin.readline())
    llm = LLM(**task["settings"])
    start(llm, task["batch"], task["prompt_len"])
    say({"root": str(Path(server.llm.__file__).resolve().parent.parent)})
    for line in sys.stdin:
        say(decode(llm, json.loads(line)))


if __name__ == "__main__":
    main()
