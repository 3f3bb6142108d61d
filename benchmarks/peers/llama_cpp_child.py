"""llama.cpp's contestant: its C API through llama-cpp-python, greedy. Runs in llama.cpp's environment."""

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.child import Tokens, run_child


class LlamaCppDecoder:
    """Sequences of one context, each with its own part of the cache."""

    version = llama_cpp.__version__

    def __init__(self, task: dict[str, Any]):
        batch, max_len = task["max_batch"], task["max_len"]
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            task["model"].encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = batch * -(-max_len // 256) * 256  # parts of a cache are multiples of 256
        params.n_batch = batch * max_len
        params.n_threads = params.n_threads_batch = task["num_threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def decode(self, prompts: list[Tokens], num_steps: int, take: Callable[[Tokens], None]) -> None:
        """Give the tokens of every prompt, step by step."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        tokens, start = self._run(prompts, 0), len(prompts[0])
        take(tokens)
        for step in range(num_steps):
            tokens = self._run([[token] for token in tokens], start + step)
            take(tokens)

    def _run(self, rows: list[Tokens], start: int) -> Tokens:
        """The likeliest token behind each row, whose first one has that position."""
        batch, places = self._batch, []
        batch.n_tokens = 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                place = batch.n_tokens
                batch.token[place], batch.pos[place] = token, start + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = offset == len(row) - 1
                batch.n_tokens += 1
            places.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode gives {status}"
        return [int(np.argmax(self._logits(place))) for place in places]

    def _logits(self, place: int) -> np.ndarray[Any, Any]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))


if __name__ == "__main__":
    run_child(LlamaCppDecoder)
