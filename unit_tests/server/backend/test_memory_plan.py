"""Rows and pages fit each other, what does not fit is refused with the mend, and the table says what it costs."""

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.cache import HISTORY_LEN, Backends
from models.config import parse_config
from server.backend.memory_plan import (
    MIB,
    MemoryPlan,
    Sizes,
    describe_memory,
    free_memory,
    measure_sizes,
    memory_parts,
    plan_memory,
)
from server.config import MAX_BEHIND, MAX_MTP_STEP, EngineConfig
from server.errors import ConfigError
from unit_tests.checkpoints import make_checkpoint, make_config
from unit_tests.server.engines import make_engine


def plan(max_positions: int = 4096, **settings: Any) -> MemoryPlan:
    model = parse_config(make_config() | {"max_position_embeddings": max_positions})
    config = EngineConfig(**settings)
    return plan_memory(config, model, measure_sizes(config, model))


MODEL = parse_config(make_config(num_layers=4) | {"max_position_embeddings": 4096})
# Easy to add up: bytes in whole MiB.
ROUND_SIZES = Sizes(*(size * MIB for size in (300, 40, 2, 1, 20, 3, 1, 0, 25, 60)))


def plan_within(free_bytes: int, **settings: Any) -> MemoryPlan:
    """A plan with the sizes of a real, small model."""
    config = EngineConfig(**settings)
    return plan_memory(config, MODEL, measure_sizes(config, MODEL, int(config.mtp_step > 0)), free_bytes)


def plan_round(free_mib: float, **settings: Any) -> MemoryPlan:
    return plan_memory(EngineConfig(**settings), MODEL, ROUND_SIZES, int(free_mib * MIB))


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
            "page_size": rng.choice([1, 4, 16, 128]),
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
    assert runner.draft is not None and runner.drafter is not None
    cache = runner.table.cache
    text = describe_memory(runner.plan)
    sizes = {name: float(size) for name, size in re.findall(r"^  (\S.*?) +([0-9.]+) MiB$", text, re.MULTILINE)}
    expected = {
        "weights": sum(weight.nbytes for weight in runner.target.parameters()),
        "draft weights": sum(weight.nbytes for weight in runner.draft.parameters()),
        "KV, main layers": cache.kv.data[:1].nbytes,
        "KV, MTP layers": cache.kv.data[1:].nbytes,
        "GDN states": cache.gdn.state.nbytes,
        "GDN and conv rings": sum(ring.nbytes for ring in (*cache.gdn.ring, cache.gdn.conv_ring)),
        "hidden states kept": runner.table.cache.history.hidden.nbytes + runner.table.cache.history.token_ids.nbytes,
        "GDN checkpoints": runner.mover.checkpoints.state.nbytes + runner.mover.checkpoints.conv_window.nbytes,
        "workspace": runner.plan.sizes.workspace,
        "free": runner.plan.free_bytes or 0,
    }
    assert sizes == {name: pytest.approx(size / 2**20, abs=0.051) for name, size in expected.items()}
    assert min(sizes.values()) > 0.05
    num_tokens = runner.plan.limits.num_pages * 16
    assert f"7 requests, {num_tokens} KV tokens" in text
    assert f"{cache.gdn.state_bytes_per_row / 2**20:.2f} MiB GDN state (the same for every mtp_step)" in text
    bytes_per_token = 2 * 2 * 2 * 32 * 8  # layers, keys and values, heads, head dimension, float64
    assert f"{bytes_per_token / 1024:.2f} KiB KV per token" in text


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_are_counted_as_they_are(tmp_path: Path, quantization: str) -> None:
    checkpoint = make_checkpoint(tmp_path, num_layers=4)
    plain = make_engine(checkpoint, mtp_step=1).runner.plan.sizes
    runner = make_engine(checkpoint, mtp_step=1, quantization=quantization).runner
    sizes = runner.plan.sizes
    assert runner.draft is not None
    assert sizes.weights == sum(weight.nbytes for weight in runner.target.parameters()) < plain.weights / 4
    assert sizes.draft_weights == sum(weight.nbytes for weight in runner.draft.parameters()) < plain.draft_weights / 4
    assert replace(sizes, weights=plain.weights, draft_weights=plain.draft_weights) == plain


def test_without_a_draft_the_table_says_zero(tmp_path: Path) -> None:
    runner = make_engine(make_checkpoint(tmp_path, num_layers=4)).runner
    text = describe_memory(runner.plan)
    assert re.search(r"draft weights +0\.0 MiB", text) and re.search(r"KV, MTP layers +0\.0 MiB", text)


def round_total(rows: int, pages: int, checkpoints: int) -> int:
    """MiB of ROUND_SIZES; one more of each is padding."""
    return 300 + 40 + 60 + (rows + 1) * (20 + 3 + 1) + (pages + 1) * (2 + 1) + (checkpoints + 1) * 25


def test_with_less_memory_checkpoints_go_first_and_then_rows_and_pages_together() -> None:
    """Whatever is chosen fits, and what would be better does not."""
    is_full, rows_seen = set(), []
    for free_mib in range(8000, 800, -9):
        memory = plan_round(free_mib, max_model_len=500, page_size=16, mem_fraction_static=0.5)
        limits = memory.limits
        rows, pages, checkpoints = limits.max_running_requests, limits.num_pages, limits.num_checkpoints
        assert pages == -(-rows * 501 // 16), "every request can be of the longest form"
        assert 0 <= checkpoints <= 4 * rows
        budget, total = free_mib / 2, round_total(rows, pages, checkpoints)
        assert total <= budget and memory.free_bytes == int(budget * MIB) - total * MIB
        if checkpoints < 4 * rows:
            assert round_total(rows, pages, checkpoints + 1) > budget
        if rows < 16:
            assert round_total(rows + 1, -(-(rows + 1) * 501 // 16), 0) > budget
        is_full.add((checkpoints == 4 * rows, checkpoints == 0))
        rows_seen.append(rows)
        if (rows, checkpoints) == (1, 0):
            break
    assert is_full == {(True, False), (False, False), (False, True)} and rows_seen == sorted(rows_seen, reverse=True)
    assert set(rows_seen) >= {16, 8, 2, 1}


def test_rows_take_their_share_of_65536_tokens_with_them_down_to_one_longest_request() -> None:
    model = parse_config(make_config() | {"max_position_embeddings": 262144})
    config, rows_seen = EngineConfig(max_model_len=20_000, prefix_cache="off", mem_fraction_static=0.5), set()
    for free_mib in range(28_000, 8_460, -300):
        limits = plan_memory(config, model, ROUND_SIZES, free_mib * MIB).limits
        rows = limits.max_running_requests
        assert limits.num_pages == max(-(-20_001 // 16), 4096 * rows // 16)
        rows_seen.add(rows)
    assert {16, 1} < rows_seen


def test_a_little_memory_less_than_the_smallest_plan_is_too_little() -> None:
    smallest = round_total(1, -(-501 // 16), 0)
    plan_round(2 * smallest, max_model_len=500, mem_fraction_static=0.5)
    with pytest.raises(ConfigError):
        plan_round(2 * smallest - 1 / 512, max_model_len=500, mem_fraction_static=0.5)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"max_running_requests": 7}, {"max_running_requests": 7}),
        ({"max_total_tokens": 3200}, {"num_pages": 200}),
        ({"checkpoint_bytes": 251 * MIB}, {"num_checkpoints": 10}),
        ({"checkpoint_bytes": 0}, {"num_checkpoints": 0}),
        ({"prefix_cache": "off"}, {"num_checkpoints": 0}),
        ({"max_running_requests": 20, "max_total_tokens": 800}, {"max_running_requests": 20, "num_pages": 50}),
    ],
)
def test_what_the_user_has_set_never_shrinks(settings: dict[str, Any], chosen: dict[str, int]) -> None:
    others, num_refused = set(), 0
    for free_mib in range(4000, 500, -40):
        try:
            memory = plan_round(free_mib, max_model_len=500, mem_fraction_static=0.6, **settings)
        except ConfigError:
            num_refused += 1
            continue
        assert not num_refused, "more memory was refused"
        limits = memory.limits
        assert {name: getattr(limits, name) for name in chosen} == chosen
        assert memory.max_model_len == 500 and memory.free_bytes is not None and memory.free_bytes >= 0
        others.add((limits.max_running_requests, limits.num_pages, limits.num_checkpoints))
    assert num_refused and len(others) > 1


def test_without_a_budget_everything_is_had_and_nothing_is_said_to_be_free() -> None:
    config = EngineConfig(max_model_len=500)
    memory = plan_memory(config, MODEL, ROUND_SIZES)
    assert (memory.limits.max_running_requests, memory.limits.num_checkpoints) == (16, 64)
    assert memory.free_bytes is None and " free" not in describe_memory(memory)


@pytest.mark.parametrize("free_mib", [1000, 1500, 2500, 6000])
@pytest.mark.parametrize("host_mib", [0, 123])
def test_the_parts_of_the_table_add_up_to_the_budget(free_mib: int, host_mib: int) -> None:
    memory = plan_round(free_mib, max_model_len=500, mem_fraction_static=0.75, host_cache_bytes=host_mib * MIB)
    text = describe_memory(memory)
    sizes = {name: float(size) for name, size in re.findall(r"^  (\S.*?) +([0-9.]+) MiB$", text, re.MULTILINE)}
    assert sizes.pop("host cache, at most", 0) == host_mib, "host memory is not of the budget"
    assert sum(sizes.values()) == 0.75 * free_mib and sizes.pop("free") >= 0
    limits = memory.limits
    counts = (limits.max_running_requests, limits.num_pages, limits.num_checkpoints)
    assert sum(sizes.values()) == round_total(*counts) <= 0.75 * free_mib
    assert f"{counts[0]} requests, {16 * counts[1]} KV tokens, {counts[2]} checkpoints" in text


def mended(message: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that a shortage error asks for, and slightly less than that."""
    if found := re.search(r": raise --mem-fraction-static to ([0-9.]+)$", message):
        share = float(found[1])
        return settings | {"mem_fraction_static": share}, settings | {"mem_fraction_static": share - 0.001}
    explicit = {"max_running_requests", "max_total_tokens", "checkpoint_bytes"}
    left = {name: value for name, value in settings.items() if name not in explicit}
    leave = ": leave --max-running-requests, --max-total-tokens and --checkpoint-bytes to the server"
    if message.endswith(leave):
        return left, settings
    if ": set --max-running-requests 1" in message:
        return left | {"max_running_requests": 1}, settings
    found = re.search(r"lower --max-model-len to (\d+)$", message)
    assert found is not None, message
    longest, kept = int(found[1]), left if leave in message else settings
    return kept | {"max_model_len": longest}, kept | {"max_model_len": longest + 1}


def draw_shortage(rng: random.Random, **settings: Any) -> tuple[int, dict[str, Any], str]:
    """Settings for which memory is short, the free memory, and the error."""
    while True:
        drawn: dict[str, Any] = {
            "mtp_step": rng.choice([0, 1, 3]),
            "page_size": rng.choice([1, 4, 16]),
            "mem_fraction_static": rng.choice([0.2, 0.5, 0.85]),
            "max_model_len": rng.choice([None, 1000, 4000]),
            "chunked_prefill_size": 64,
        } | {name: rng.choice(values) for name, values in settings.items()}
        config = EngineConfig(**drawn)
        smallest = measure_sizes(config, MODEL, int(config.mtp_step > 0)).total(1, 1, 0)
        free_bytes = int(smallest * rng.choice([1.02, 1.3, 2, 4]) / rng.uniform(config.mem_fraction_static, 1))
        try:
            plan_within(free_bytes, **drawn)
        except ConfigError as error:
            if "free memory" in error.message:
                return free_bytes, drawn, error.message


@pytest.mark.parametrize("seed", range(2))
def test_a_shortage_names_a_setting_that_works_and_slightly_less_of_it_does_not(seed: int) -> None:
    rng, mends = random.Random(seed), set()
    for _ in range(20):
        free_bytes, settings, message = draw_shortage(rng)
        if message.endswith("no --max-model-len is small enough: use a machine with more memory"):
            with pytest.raises(ConfigError):
                plan_within(free_bytes, **settings | {"max_model_len": 1})
            continue
        mends.add(message.rpartition(": ")[2].split()[1])
        enough, too_little = mended(message, settings)
        plan_within(free_bytes, **enough)
        with pytest.raises(ConfigError):
            plan_within(free_bytes, **too_little)
    assert {"--mem-fraction-static", "--max-model-len"} <= mends


def test_settings_that_alone_are_too_much_are_left_to_the_server() -> None:
    num_left, rng = 0, random.Random(3)
    while num_left < 10:
        free_bytes, settings, message = draw_shortage(rng, checkpoint_bytes=[10**7, 10**8], max_model_len=[64])
        if message.endswith("to the server"):
            num_left += 1
            plan_within(free_bytes, **mended(message, settings)[0])
    assert num_left == 10


@pytest.mark.parametrize(
    "settings", [{"max_running_requests": 200}, {"max_total_tokens": 4500}, {"checkpoint_bytes": 10**9}]
)
def test_a_shorter_request_is_asked_for_only_where_it_is_enough(settings: dict[str, Any]) -> None:
    settings |= {"max_model_len": 4000, "chunked_prefill_size": 64, "mem_fraction_static": 0.9}
    config = EngineConfig(**settings)
    free_bytes = int(measure_sizes(config, MODEL).total(1, 100, 0) / 0.9)
    with pytest.raises(ConfigError) as caught:
        plan_within(free_bytes, **settings)
    plan_within(free_bytes, **mended(caught.value.message, settings)[0])


def test_leaving_the_number_of_requests_to_the_server_is_asked_for_only_where_it_is_enough() -> None:
    settings: dict[str, Any] = {"max_running_requests": 2, "checkpoint_bytes": 10**9, "max_model_len": 64}
    settings |= {"chunked_prefill_size": 64, "mem_fraction_static": 0.9}
    sizes = measure_sizes(EngineConfig(**settings), MODEL)
    free_bytes = int(sizes.total(1, 6, 0) / 0.9)
    with pytest.raises(ConfigError) as caught:
        plan_within(free_bytes, **settings)
    plan_within(free_bytes, **mended(caught.value.message, settings)[0])


@pytest.mark.parametrize(("mtp_step", "num_layers", "max_behind"), [(0, 0, 0), (3, 1, MAX_BEHIND), (3, 3, 0)])
def test_only_a_single_draft_layer_may_fall_behind_and_pays_for_it(
    mtp_step: int, num_layers: int, max_behind: int
) -> None:
    config = EngineConfig(mtp_step=mtp_step, max_model_len=100)
    sizes = measure_sizes(config, MODEL, num_layers)
    assert sizes.history == (HISTORY_LEN * (MODEL.hidden_size * 2 + 8) if max_behind else 0)  # bfloat16, int64
    assert max_behind + MAX_MTP_STEP + 1 <= HISTORY_LEN
    assert sizes.mtp_page == num_layers * sizes.main_page  # one full-attention layer
    assert plan_memory(config, MODEL, sizes).limits.max_behind == max_behind
    assert sizes.row == sizes.state + sizes.rings + sizes.history


def test_limits_tell_the_router_what_one_of_each_costs() -> None:
    limits = plan_round(6000, max_model_len=500, checkpoint_interval=64, host_cache_bytes=7, stream_slowdown=3).limits
    assert (limits.page_bytes, limits.checkpoint_bytes) == (3 * MIB, 25 * MIB)
    assert (limits.checkpoint_interval, limits.host_cache_bytes, limits.stream_slowdown) == (64, 7, 3)


def test_a_budget_for_less_than_one_checkpoint_is_refused() -> None:
    config = EngineConfig(checkpoint_bytes=1000, max_model_len=500)
    sizes = measure_sizes(config, MODEL)
    with pytest.raises(ConfigError, match=f"one checkpoint of this model takes {sizes.checkpoint}: raise it, or set"):
        plan_memory(config, MODEL, sizes)
    enough = EngineConfig(checkpoint_bytes=sizes.checkpoint, max_model_len=500)
    assert plan_memory(enough, MODEL, sizes).limits.num_checkpoints == 1


def test_a_decode_step_on_a_gpu_costs_memory_per_row_and_lets_no_draft_head_fall_behind() -> None:
    config = EngineConfig(mtp_step=2, max_model_len=512)
    plain, with_step = (
        measure_sizes(config, MODEL, 1, torch.bfloat16, Backends(name, name)) for name in ("torch", "triton")
    )
    assert plain.decode == 0 and plain.history > 0 and with_step.history == 0
    assert with_step.decode > 5 * MODEL.vocab_size, "counts of every token, and attention's scratch"
    assert plan_memory(config, MODEL, with_step).limits.max_behind == 0
    limits = plan_memory(EngineConfig(mtp_step=2, max_model_len=512), MODEL, with_step).limits
    assert limits.max_running_requests == 128 and limits.num_pages * 16 >= 128 * 512
    assert limits.chunked_prefill_size == 2048 and plan_memory(config, MODEL, plain).limits.chunked_prefill_size == 512
    asked = EngineConfig(mtp_step=2, max_model_len=512, chunked_prefill_size=100)
    assert plan_memory(asked, MODEL, with_step).limits.chunked_prefill_size == 100
    assert "decode step" in describe_memory(plan_memory(config, MODEL, with_step))


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def write_group(root: Path, group: str, limit: str, usage: int, cache: int | None) -> None:
    """A control group of memory, and what /proc tells of the machine."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = names if group.startswith(V1) else ("memory.max", "memory.current", "inactive_file")
    directory = root / group
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    if cache is not None:
        (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, 10240),
        ({V2: ("max", 9000, 0)}, 10240),
        ({V2: ("8000", 3000, 1000)}, 6000),
        ({V2: ("99999", 3000, 1000)}, 10240),
        ({V2: ("1000", 3000, 0)}, 0),
        ({V2: ("8000", 3000, None)}, 5000),
        ({f"{V2}/a/b": ("max", 0, 0), f"{V2}/a": ("7000", 1000, 500), V2: ("9000", 1000, 0)}, 6500),
        ({f"{V2}/elsewhere": ("1000", 0, 0)}, 10240),
        ({V1: ("8000", 3000, 1000)}, 6000),
        ({f"{V1}/c": ("4000", 1000, 0), V1: (str(2**63 - 4096), 5000, 0)}, 3000),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, groups: dict[str, tuple[str, int, int | None]], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 20 kB\nMemAvailable:      10 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/c\n4:memory:/c\n0::/a/b\n")
    for group, values in groups.items():
        write_group(tmp_path, group, *values)
    assert free_memory("cpu", tmp_path) == expected
    (tmp_path / "proc/self/cgroup").unlink()
    assert free_memory("cpu", tmp_path) == 10240


def test_the_parts_are_the_whole_plan_and_what_is_free() -> None:
    plan = plan_round(6000, max_model_len=500)
    parts = memory_parts(plan)
    assert sum(parts.values()) - parts["free"] == plan.num_bytes
    assert parts["free"] == plan.free_bytes
    assert all(name in describe_memory(plan) for name in parts)
