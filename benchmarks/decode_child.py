"""Runs steps on command with the Tandem that PYTHONPATH names: one of two versions that `benchmarks.versions` compares.

Run as `python -P decode_child.py` in another checkout, so that `server` is that one's. Says {"root": where `server`
lies}, then reads JSON lines. {"settings": of LLM, "batch", "prompt_len", "texts"} makes another engine whose requests
all decode, random tokens where there are no texts; answered with {}. A number of steps is answered with {"seconds",
"tokens"}; with batch 0 it is a number of prompts instead, one after the other, and their tokens. Uses nothing that
older versions do not know.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import server.llm
from server.llm import LLM, Generate, SamplingParams
from server.messages import TokenOutput


class Contestant:
    """An engine, and requests that do not end by themselves, past their prompts."""

    def __init__(self, task: dict[str, Any]):
        self.llm, self.prompt_len, self.rng = LLM(**task["settings"]), task["prompt_len"], random.Random(0)
        self.batch, self.num_prompts = task["batch"], 0
        for index in range(self.batch):
            prompt = self.llm.tokenizer.encode(task["texts"][index]) if task["texts"] else self.draw()
            self.llm.engine.add(Generate(str(index), prompt, SamplingParams(temperature=0, ignore_eos=True)))
        scheduler = self.llm.engine.scheduler
        while scheduler.waiting or not all(request.is_decoding for request in scheduler.running):
            self.llm.engine.step()

    def draw(self) -> list[int]:
        """A prompt that nobody has seen before."""
        return [self.rng.randrange(1, self.llm.engine.ready.vocab_size) for _ in range(self.prompt_len)]

    def run(self, count: int) -> dict[str, float]:
        """Seconds and tokens of that many steps, or prompts."""
        if self.batch == 0:
            return self.prefill(count)
        begin, num_tokens = time.perf_counter(), 0
        for _ in range(count):
            outputs = self.llm.engine.step()
            num_tokens += sum(len(output.token_ids) for output in outputs if isinstance(output, TokenOutput))
        return {"seconds": time.perf_counter() - begin, "tokens": num_tokens}

    def prefill(self, count: int) -> dict[str, float]:
        """Seconds and prompt tokens of that many prompts, each until its first token."""
        prompts = [self.draw() for _ in range(count)]
        begin = time.perf_counter()
        for prompt in prompts:
            self.num_prompts += 1
            self.llm.engine.add(Generate(f"prompt {self.num_prompts}", prompt, SamplingParams(max_tokens=1)))
            while self.llm.engine.has_work():
                self.llm.engine.step()
        return {"seconds": time.perf_counter() - begin, "tokens": count * self.prompt_len}


def say(answer: object) -> None:
    """One line to whoever asked."""
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Serve commands until the input ends."""
    say({"root": str(Path(server.llm.__file__).resolve().parent.parent)})
    contestant: Contestant | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if isinstance(command, dict):
            contestant = None  # its memory goes before the next one's comes
            contestant = Contestant(command)
            say({})
        else:
            assert contestant is not None
            say(contestant.run(command))


if __name__ == "__main__":
    main()
