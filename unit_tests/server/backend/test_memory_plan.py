"""Rows and pages fit each other, what does not fit is refused with the mend, and the table says what it costs."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from models.config import parse_config
from server.backend.memory_plan import MemoryPlan, describe_memory, plan_memory
from server.config import EngineConfig
from server.errors import ConfigError
from unit_tests.checkpoints import make_checkpoint, make_config
from unit_tests.server.engines import make_engine


def plan(max_positions: int = 4096, **settings: Any) -> MemoryPlan:
    model = parse_config(make_config() | {"max_position_embeddings": max_positions})
    return plan_memory(EngineConfig(**settings), model)


def test_by_default_every_running_request_can_be_of_the_longest_form() -> None:
    memory = plan(max_positions=1000, mtp_step=2, max_running_requests=4, page_size=8)
    assert memory.max_model_len == 1000
    assert memory.max_pages_per_request == 126  # 1000 tokens and 5 that a decode step may write ahead
    assert memory.limits.num_pages == 503  # ceil(4 * 1005 / 8)
    limits = memory.limits
    assert (limits.max_running_requests, limits.page_size, limits.mtp_step) == (4, 8, 2)
    assert limits.chunked_prefill_size == 512


def test_default_sizes_stop_at_32768_positions_and_65536_tokens() -> None:
    memory = plan(max_positions=262144)
    assert memory.max_model_len == 32768
    assert memory.limits.num_pages * 16 == 65536


def test_one_longest_request_fits_even_beyond_the_default_of_65536_tokens() -> None:
    memory = plan(max_positions=262144, max_model_len=100_000, mtp_step=3)
    assert memory.max_model_len == 100_000
    assert memory.max_pages_per_request == memory.limits.num_pages == -(-100_007 // 16)


def test_a_small_cache_alone_shortens_the_longest_request_to_what_it_holds() -> None:
    memory = plan(max_total_tokens=640, mtp_step=3)
    assert memory.max_model_len == 633 and memory.limits.num_pages == memory.max_pages_per_request == 40


def test_a_cache_of_odd_size_is_rounded_up_to_whole_pages() -> None:
    assert plan(max_total_tokens=641, max_model_len=64).limits.num_pages == 41


def test_more_positions_than_the_checkpoint_was_made_for_are_refused() -> None:
    assert plan(max_positions=100, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError) as caught:
        plan(max_positions=100, max_model_len=101)
    assert caught.value.message == "--max-model-len is 101, the checkpoint was made for at most 100 positions"


def test_a_cache_too_small_for_one_longest_request_is_refused_with_what_is_needed() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(max_model_len=300, max_total_tokens=64, mtp_step=2)
    assert caught.value.message == (
        "--max-total-tokens 64 is less than one request of --max-model-len 300 needs with --mtp-step 2: 320"
    )
    with pytest.raises(ConfigError, match="of --max-model-len 1 needs with --mtp-step 8: 18"):
        plan(max_total_tokens=3, mtp_step=8, page_size=1)


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_holds_one_longest_request_and_an_error_names_a_size_that_does(seed: int) -> None:
    rng = random.Random(seed)
    num_refused = 0
    for _ in range(100):
        settings: dict[str, Any] = {
            "mtp_step": rng.randint(0, 8),
            "page_size": rng.choice([1, 4, 16, 100]),
            "max_running_requests": rng.randint(1, 20),
            "max_model_len": rng.choice([None, rng.randint(1, 4096)]),
            "max_total_tokens": rng.choice([None, rng.randint(1, 5000)]),
        }
        try:
            memory = plan(**settings)
        except ConfigError as error:
            num_refused += 1
            needed = int(error.message.rpartition(" ")[2])
            longest = int(re.findall(r"--max-model-len (\d+)", error.message)[0])
            fixed = {"max_model_len": longest, "max_total_tokens": needed}
            memory = plan(**settings | fixed)
            with pytest.raises(ConfigError):
                plan(**settings | fixed | {"max_total_tokens": max(1, needed - settings["page_size"])})
        held = memory.max_pages_per_request * settings["page_size"]
        assert held >= memory.max_model_len + 2 * settings["mtp_step"] + 1 > held - settings["page_size"]
        assert memory.max_pages_per_request <= memory.limits.num_pages
    assert 0 < num_refused < 90


def test_the_table_lists_every_part_in_mib_and_the_cost_of_one_request(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, num_layers=4)
    runner = make_engine(checkpoint, mtp_step=3, max_running_requests=7, max_model_len=2000).runner
    assert runner.draft is not None
    cache = runner.table.cache
    text = describe_memory(runner.plan, cache, runner.target, runner.draft, num_mtp_layers=1)
    sizes = {name: float(size) for name, size in re.findall(r"^  (\S.*?) +([0-9.]+) MiB$", text, re.MULTILINE)}
    expected = {
        "weights": sum(weight.nbytes for weight in runner.target.parameters()),
        "draft weights": sum(weight.nbytes for weight in runner.draft.parameters()),
        "KV, main layers": cache.kv.data[:1].nbytes,
        "KV, MTP layers": cache.kv.data[1:].nbytes,
        "GDN states": cache.gdn.state.nbytes,
        "GDN and conv rings": sum(ring.nbytes for ring in (*cache.gdn.ring, cache.gdn.conv_ring)),
    }
    assert sizes == {name: pytest.approx(size / 2**20, abs=0.051) for name, size in expected.items()}
    assert min(sizes.values()) > 0.1
    num_tokens = runner.plan.limits.num_pages * 16
    assert f"7 requests, {num_tokens} KV tokens" in text
    assert f"{cache.gdn.state_bytes_per_row / 2**20:.2f} MiB GDN state (the same for every mtp_step)" in text
    bytes_per_token = 2 * 2 * 2 * 32 * 8  # layers, keys and values, heads, head dimension, float64
    assert f"{bytes_per_token / 1024:.2f} KiB KV per token" in text


def test_without_a_draft_the_table_says_zero(tmp_path: Path) -> None:
    runner = make_engine(make_checkpoint(tmp_path, num_layers=4)).runner
    text = describe_memory(runner.plan, runner.table.cache, runner.target, None, num_mtp_layers=0)
    assert re.search(r"draft weights +0\.0 MiB", text) and re.search(r"KV, MTP layers +0\.0 MiB", text)
