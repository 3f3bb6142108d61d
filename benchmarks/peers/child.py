"""The process of a contestant: reads questions, one JSON line each, and answers them with its engine. No torch.

The first line is {"model", "num_threads", "max_batch", "max_len", "format"}, the answer to it {"version"}. Then each
line is {"prompts": lists of token ids, "num_steps"}: the answer has the seconds until every prompt had its first token,
the seconds of all steps after it, and all tokens.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

Tokens = list[int]


class Decoder(Protocol):
    """An engine with a checkpoint. `version` is that of the software."""

    version: str

    def decode(self, prompts: list[Tokens], num_steps: int, take: Callable[[Tokens], None]) -> None:
        """Call `take` with the first greedy token of every prompt, then with those of each of num_steps steps."""


def run_child(start: Callable[[dict[str, Any]], Decoder]) -> None:
    """Answer until there is nothing more to read. What libraries print goes to stderr: stdout is for answers."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # or an error's last line is not the last
    decoder = start(json.loads(sys.stdin.readline()))
    print(json.dumps({"version": decoder.version}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_measure(decoder, **json.loads(line))), file=answers, flush=True)


def _measure(decoder: Decoder, prompts: list[Tokens], num_steps: int) -> dict[str, Any]:
    times: list[float] = []
    columns: list[Tokens] = []

    def take(tokens: Tokens) -> None:
        times.append(time.perf_counter())
        columns.append(tokens)

    start = time.perf_counter()
    decoder.decode(prompts, num_steps, take)
    assert len(columns) == num_steps + 1
    return {
        "prefill_seconds": times[0] - start,
        "decode_seconds": times[-1] - times[0],
        "tokens": [list(row) for row in zip(*columns, strict=True)],
    }
