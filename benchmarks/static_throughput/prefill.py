"""Prompts of several lengths in chunks of several sizes, with and without a prefix that was computed before."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.report import percentile
from benchmarks.static_throughput.presets import Preset
from benchmarks.workload import draw_tokens, serve
from server.llm import LLM, SamplingParams

NEW_TOKENS = 64  # behind what a chat has computed already
_ONE_TOKEN = SamplingParams(temperature=0, ignore_eos=True, max_tokens=1)


def measure_prefill(
    preset: Preset, contexts: Sequence[int], chunks: Sequence[int], num_rounds: int, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for every prompt length, chunk size and reuse: time to the first token, and prompt tokens per second, all
    of them and those computed. Chunk sizes take turns, on one engine without a draft head. Prompts are random tokens,
    of which all but the last 64 are the turn before where a row says so."""
    longest = max(contexts)
    llm = LLM(
        model=str(preset.directory),
        overlap="off",
        chunked_prefill_size=max(chunks),
        max_running_requests=1,
        max_model_len=longest + 2,
        max_total_tokens=2 * (longest + NEW_TOKENS),  # a turn, and what it is continued to
        **settings,
    )
    rows = []
    for context in contexts:
        samples: dict[tuple[int, str], list[tuple[float, int]]] = {}
        for number in range(num_rounds + 1):
            for chunk in chunks:
                for reuse in ("none", "last turn") if context > 2 * NEW_TOKENS else ("none",):
                    sample = _measure(llm, context, chunk, reuse == "last turn", random.Random(f"{number} {chunk}"))
                    samples.setdefault((chunk, reuse), []).extend([sample] if number else [])
        rows += [_describe(context, *key, of_key) for key, of_key in samples.items()]
    return rows


def _measure(llm: LLM, context: int, chunk: int, has_turn: bool, rng: random.Random) -> tuple[float, int]:
    """Seconds until the first token, and prompt tokens that were reused."""
    engine, vocab_size = llm.engine, llm.engine.ready.vocab_size
    engine.flush_cache()
    engine.scheduler.limits = replace(engine.scheduler.limits, chunked_prefill_size=chunk)
    prompt: list[int] = []
    if has_turn:
        prompt = draw_tokens(rng, context - NEW_TOKENS - 1, vocab_size)
        prompt += serve(llm, [(prompt, _ONE_TOKEN)])[0].token_ids
    prompt += draw_tokens(rng, context - len(prompt), vocab_size)
    (served,) = serve(llm, [(prompt, _ONE_TOKEN)])
    return served.first_seconds, served.num_cached


def _describe(context: int, chunk: int, reuse: str, samples: Sequence[tuple[float, int]]) -> dict[str, Any]:
    seconds = [one for one, _ in samples]
    first, cached = statistics.median(seconds), statistics.median(cached for _, cached in samples)
    return {
        "prompt": context,
        "chunk": chunk,
        "reuse": reuse,
        "cached": cached,
        "ttft_ms": 1e3 * first,
        "ttft_ms_p10": 1e3 * percentile(seconds, 10),
        "ttft_ms_p90": 1e3 * percentile(seconds, 90),
        "prompt_tok_s": context / first,
        "computed_tok_s": (context - cached) / first,
    }
