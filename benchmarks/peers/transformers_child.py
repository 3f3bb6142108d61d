"""transformers' contestant: `generate`, greedy, with its cache. Runs in transformers' environment."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.child import Tokens, run_child


class _Stream(BaseStreamer):
    """Hands tokens on; the first that come are the prompts."""

    def __init__(self, take: Callable[[Tokens], None]):
        self._take = take
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """The tokens of a step."""
        if not self._is_prompt:
            self._take(value.tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is left to hand on."""


class TransformersDecoder:
    """The text model in the checkpoint's precision."""

    version = transformers.__version__

    def __init__(self, task: dict[str, Any]):
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(task["num_threads"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto").eval()
        self._model.generation_config.eos_token_id = None

    def decode(self, prompts: list[Tokens], num_steps: int, take: Callable[[Tokens], None]) -> None:
        """Give the tokens of every prompt, step by step."""
        self._model.generate(
            torch.tensor(prompts),
            max_new_tokens=num_steps + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=_Stream(take),
        )


if __name__ == "__main__":
    run_child(TransformersDecoder)
