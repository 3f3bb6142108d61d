"""Tandem's contestant: its engine without HTTP, no drafts, nothing cached."""

from collections.abc import Callable
from typing import Any

from benchmarks.peers.child import Tokens, run_child
from server.llm import LLM, Generate, SamplingParams
from server.messages import TokenOutput

ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


class TandemDecoder:
    """Prompts are one step, so that nobody decodes while others are in theirs."""

    version = "this checkout"

    def __init__(self, task: dict[str, Any]):
        batch, max_len = task["max_batch"], task["max_len"]
        quantization = {"quantization": task["format"]} if task["format"] else {}
        self._engine = LLM(
            model=task["model"],
            num_threads=task["num_threads"],
            prefix_cache="off",
            max_running_requests=batch,
            max_model_len=max_len,
            max_total_tokens=batch * (max_len + 32),
            chunked_prefill_size=batch * max_len,
            **quantization,
        ).engine

    def decode(self, prompts: list[Tokens], num_steps: int, take: Callable[[Tokens], None]) -> None:
        """Give the tokens of every prompt, step by step."""
        names = [str(index) for index in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add(Generate(name, prompt, ENDLESS))
        for _ in range(num_steps + 1):
            take(self._step(names))
        for name in names:
            self._engine.abort(name)
        while self._engine.has_work():
            self._engine.step()

    def _step(self, names: list[str]) -> Tokens:
        """The next token of each; with overlap the first pass gives none."""
        tokens: dict[str, int] = {}
        while len(tokens) < len(names):
            for output in self._engine.step():
                assert isinstance(output, TokenOutput), output
                (tokens[output.request_id],) = output.token_ids
        return [tokens[name] for name in names]


if __name__ == "__main__":
    run_child(TandemDecoder)
