"""A line in the log every few seconds while requests run: how fast, how full, how well drafts and prefixes do."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from server.logs import log_fields
from server.messages import EngineStats

log = logging.getLogger("tandem.throughput")


async def log_throughput(read_stats: Callable[[], EngineStats], interval: float) -> None:
    """Write a line every `interval` seconds in which something was computed; never returns."""
    stats, moment = read_stats(), time.perf_counter()
    while True:
        await asyncio.sleep(interval)
        before, since = stats, moment
        stats, moment = read_stats(), time.perf_counter()
        if stats.num_steps > before.num_steps:
            log_fields(log, logging.INFO, "throughput", describe_interval(before, stats, moment - since))


def describe_interval(before: EngineStats, after: EngineStats, seconds: float) -> dict[str, Any]:
    """The figures of what happened between two words of the engine; None for shares of nothing."""
    num_prompt = after.num_prompt_tokens - before.num_prompt_tokens
    num_cached = after.num_cached_tokens - before.num_cached_tokens
    num_verified = after.num_verify_steps - before.num_verify_steps
    num_proposed, num_accepted = after.num_proposed - before.num_proposed, after.num_accepted - before.num_accepted
    num_pages = after.num_pages
    return {
        "prompt_tokens_per_s": round(max(0, num_prompt - num_cached) / seconds, 1),
        "output_tokens_per_s": round((after.num_output_tokens - before.num_output_tokens) / seconds, 1),
        "running": after.num_running,
        "waiting": after.num_waiting,
        "kv_usage": round(1 - after.num_free_pages / num_pages, 3) if num_pages else None,
        "prefix_hit_rate": round(num_cached / num_prompt, 3) if num_prompt else None,
        "accept_length": round(1 + num_accepted / num_verified, 2) if num_verified else None,
        "acceptance_rate": round(num_accepted / num_proposed, 3) if num_proposed else None,
    }
