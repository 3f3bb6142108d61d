"""One plan of all memory: how many rows, pages and checkpoints there are, and what everything costs in bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.cache import TORCH, Backends, GDNCache, GDNCheckpoints, History, KVCache
from models.config import ModelConfig
from models.registry import build
from server.config import MAX_BEHIND, EngineConfig, Limits, lookahead
from server.errors import ConfigError

if TYPE_CHECKING:
    from kernels.gpu.attention import SplitScratch

# If nothing else is asked for and memory allows: on a CPU, and where a decode step is one launch of a GPU.
DEFAULT_RUNNING_REQUESTS, DEFAULT_GPU_REQUESTS = 16, 128
# Prompt tokens of a step. A GPU reads its weights in the time of some hundred tokens' products.
DEFAULT_CHUNK, DEFAULT_GPU_CHUNK = 512, 2048
DEFAULT_MAX_MODEL_LEN = 32768
DEFAULT_MAX_TOTAL_TOKENS, DEFAULT_GPU_TOKENS = 65536, 524288
MIB = 2**20
# Checkpoints per row, if nothing else is asked for, as far as rows and pages leave memory for them.
CHECKPOINTS_PER_ROW = 4


@dataclass(frozen=True)
class Sizes:
    """Bytes of one of each: a page of all main or all draft layers, a row's states and rings, the hidden states
    kept for its draft head, what a decode step on a GPU needs per row, a checkpoint; and of all weights and one pass's
    activations."""

    weights: int
    draft_weights: int
    main_page: int
    mtp_page: int
    state: int
    rings: int
    history: int
    decode: int
    checkpoint: int
    workspace: int

    @property
    def page(self) -> int:
        return self.main_page + self.mtp_page

    @property
    def row(self) -> int:
        return self.state + self.rings + self.history + self.decode

    @property
    def fixed(self) -> int:
        return self.weights + self.draft_weights + self.workspace

    def total(self, num_rows: int, num_pages: int, num_checkpoints: int) -> int:
        """Bytes in all; of each kind there is one more, for padding."""
        cache = (num_rows + 1) * self.row + (num_pages + 1) * self.page
        return self.fixed + cache + (num_checkpoints + 1) * self.checkpoint


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes that fit each other and the memory: max_pages_per_request covers max_model_len plus what a decode step
    writes ahead. `free_bytes` is what is left of the budget; None without one."""

    limits: Limits
    max_model_len: int
    max_pages_per_request: int
    sizes: Sizes
    free_bytes: int | None

    @property
    def num_bytes(self) -> int:
        """Bytes of everything."""
        limits = self.limits
        return self.sizes.total(limits.max_running_requests, limits.num_pages, limits.num_checkpoints)


def measure_sizes(
    config: EngineConfig,
    model: ModelConfig,
    num_mtp_layers: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    backends: Backends = TORCH,
) -> Sizes:
    """What one of each thing takes, from tensors without memory. With attention on a GPU's kernels the draft head never
    falls behind, but every row has what a decode step there needs."""
    mtp, quantization = num_mtp_layers > 0, config.quantization
    target, draft = build(model, mtp, dtype=dtype, device="meta", quantization=quantization)
    kv = KVCache.allocate(model, num_mtp_layers, 1, config.page_size, dtype, "meta")
    gdn = GDNCache.allocate(model, config.mtp_step, 1, dtype, "meta")
    layer_page = kv.data[0].nbytes
    on_gpu = backends.attention != "torch"
    can_fall_behind = num_mtp_layers == 1 and not on_gpu
    return Sizes(
        weights=sum(weight.nbytes for weight in target.parameters()),
        draft_weights=sum(weight.nbytes for weight in draft.parameters()) if draft else 0,
        main_page=layer_page * model.num_full_layers,
        mtp_page=layer_page * num_mtp_layers,
        state=gdn.state_bytes_per_row,
        rings=gdn.ring_bytes_per_row,
        history=History.allocate(model, 1, dtype, "meta").bytes_per_row if can_fall_behind else 0,
        decode=_decode_bytes_per_row(config, model) if on_gpu else 0,
        checkpoint=GDNCheckpoints.allocate(gdn, 1).bytes_per_slot,
        workspace=_workspace(config, model, on_gpu),
    )


def allocate_scratch(
    config: EngineConfig, model: ModelConfig, num_rows: int, max_len: int, device: str
) -> "SplitScratch":
    """What Triton's attention needs for a verify step of num_rows requests of up to max_len tokens."""
    from kernels.gpu.attention import SplitScratch

    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    return SplitScratch.allocate(num_rows, *heads, max_len, config.mtp_step + 1, device)


def _decode_bytes_per_row(config: EngineConfig, model: ModelConfig) -> int:
    """Attention's scratch, and how often the output has each token and whether the prompt does."""
    longest = config.max_model_len or min(model.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    max_len = longest + lookahead(config.mtp_step) + config.page_size
    scratch = sum(tensor.nbytes for tensor in allocate_scratch(config, model, 1, max_len, "meta"))
    return scratch + (torch.int32.itemsize + torch.bool.itemsize) * model.vocab_size


def _most_rows(config: EngineConfig, on_gpu: bool) -> int:
    return config.max_running_requests or (DEFAULT_GPU_REQUESTS if on_gpu else DEFAULT_RUNNING_REQUESTS)


def _chunk_size(config: EngineConfig, on_gpu: bool) -> int:
    return config.chunked_prefill_size or (DEFAULT_GPU_CHUNK if on_gpu else DEFAULT_CHUNK)


def _workspace(config: EngineConfig, model: ModelConfig, on_gpu: bool) -> int:
    """Bytes of what lives during one pass: float32 logits of the rows, before and after their rules, or a chunk's
    activations of one layer."""
    num_rows = _most_rows(config, on_gpu) * (config.mtp_step + 1)
    per_token = 4 * model.hidden_size + 3 * max(model.intermediate_size, model.conv_channels, 2 * model.hidden_size)
    return 4 * (2 * num_rows * model.vocab_size + _chunk_size(config, on_gpu) * per_token)


def plan_memory(config: EngineConfig, model: ModelConfig, sizes: Sizes, free_bytes: int | None = None) -> MemoryPlan:
    """Rows, pages and checkpoints within `mem_fraction_static` of free_bytes; what the user has not set shrinks with
    the memory, rows and pages together. Raises ConfigError when one request of the longest form does not fit, naming
    the smallest value that would."""
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, the checkpoint was made for at most "
            f"{model.max_position_embeddings} positions"
        )
    ahead = lookahead(config.mtp_step)
    longest = config.max_model_len or min(model.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if config.max_model_len is None and config.max_total_tokens is not None:
        longest = max(1, min(longest, config.max_total_tokens - ahead))
    needed = -(-(longest + ahead) // config.page_size)
    if config.max_total_tokens is not None and needed * config.page_size > _round_up(config):
        raise ConfigError(
            f"--max-total-tokens {config.max_total_tokens} is less than one request of --max-model-len {longest} needs "
            f"with --mtp-step {config.mtp_step}: {needed * config.page_size}"
        )
    if 0 < (config.checkpoint_bytes or sizes.checkpoint) < sizes.checkpoint:
        raise ConfigError(
            f"--checkpoint-bytes is {config.checkpoint_bytes}, one checkpoint of this model takes {sizes.checkpoint}: "
            "raise it, or set it to 0 for no prefix cache"
        )
    budget = None if free_bytes is None else int(free_bytes * config.mem_fraction_static)
    for num_rows, num_pages, num_checkpoints in _choices(config, longest + ahead, sizes):
        total = sizes.total(num_rows, num_pages, num_checkpoints)
        if budget is None or total <= budget:
            if config.prefix_cache == "on" and config.checkpoint_bytes is None:
                num_checkpoints = CHECKPOINTS_PER_ROW * num_rows
                if budget is not None:
                    num_checkpoints = min(num_checkpoints, (budget - total) // sizes.checkpoint)
                total += num_checkpoints * sizes.checkpoint
            limits = _limits(config, sizes, num_rows, num_pages, num_checkpoints)
            return MemoryPlan(limits, longest, needed, sizes, None if budget is None else budget - total)
    assert free_bytes is not None and budget is not None
    raise ConfigError(_describe_shortage(config, model, sizes, longest, total, free_bytes))


def _choices(config: EngineConfig, longest: int, sizes: Sizes) -> list[tuple[int, int, int]]:
    """(rows, pages, checkpoints that were asked for) that could be had, the best first. `longest` tokens are a whole
    request's."""
    rows = _most_rows(config, sizes.decode > 0)
    most_tokens = DEFAULT_GPU_TOKENS if sizes.decode else DEFAULT_MAX_TOTAL_TOKENS
    num_checkpoints = (config.checkpoint_bytes or 0) // sizes.checkpoint
    choices = []
    for count in [rows] if config.max_running_requests else range(rows, 0, -1):
        wanted = min(count * longest, most_tokens * count // rows)
        tokens = config.max_total_tokens or max(longest, wanted)
        choices.append((count, -(-tokens // config.page_size), num_checkpoints))
    return choices


def _limits(config: EngineConfig, sizes: Sizes, num_rows: int, num_pages: int, num_checkpoints: int) -> Limits:
    return Limits(
        max_running_requests=num_rows,
        chunked_prefill_size=_chunk_size(config, on_gpu=sizes.decode > 0),
        page_size=config.page_size,
        num_pages=num_pages,
        mtp_step=config.mtp_step,
        num_checkpoints=num_checkpoints,
        checkpoint_interval=config.checkpoint_interval,
        host_cache_bytes=config.host_cache_bytes,
        page_bytes=sizes.page,
        checkpoint_bytes=sizes.checkpoint,
        max_behind=MAX_BEHIND if sizes.history else 0,
        stream_slowdown=config.stream_slowdown,
    )


def _round_up(config: EngineConfig) -> int:
    assert config.max_total_tokens is not None
    return -(-config.max_total_tokens // config.page_size) * config.page_size


def _describe_shortage(
    config: EngineConfig, model: ModelConfig, sizes: Sizes, longest: int, needed: int, free_bytes: int
) -> str:
    """The smallest plan takes `needed` bytes: what to change so that it fits."""
    budget = int(free_bytes * config.mem_fraction_static)
    seen = (
        f"--mem-fraction-static {config.mem_fraction_static:g} of {free_bytes / MIB:.1f} MiB free memory is "
        f"{budget / MIB:.1f} MiB; weights, workspace and the smallest cache take {needed / MIB:.1f} MiB"
    )
    fraction = -(-1000 * needed // free_bytes) / 1000
    if fraction < 1:
        return f"{seen}: raise --mem-fraction-static to {fraction:g}"
    left = replace(config, max_running_requests=None, max_total_tokens=None, checkpoint_bytes=None)
    leave = "leave --max-running-requests, --max-total-tokens and --checkpoint-bytes to the server"
    smallest = replace(sizes, workspace=_workspace(left, model, sizes.decode > 0)) if left != config else sizes
    ahead = lookahead(config.mtp_step)
    if left != config and smallest.total(1, -(-(longest + ahead) // config.page_size), 0) <= budget:
        return f"{seen}: {leave}"
    room = (budget - smallest.total(1, 0, 0)) // sizes.page * config.page_size - ahead
    if room > 0:
        return f"{seen}: {leave + ' and ' if left != config else ''}lower --max-model-len to {room}"
    alone = replace(left, max_running_requests=1)
    smallest = replace(sizes, workspace=_workspace(alone, model, sizes.decode > 0))
    if smallest.total(1, -(-(longest + ahead) // config.page_size), 0) <= budget:
        others = " and leave --max-total-tokens and --checkpoint-bytes to the server"
        is_more = (config.max_total_tokens, config.checkpoint_bytes) != (None, None)
        return f"{seen}: set --max-running-requests 1{others if is_more else ''}"
    return f"{seen}, and no --max-model-len is small enough: use a machine with more memory"


def free_memory(device: str, root: Path = Path("/")) -> int:
    """Bytes that can be had now, on the GPU or on the machine, of which a container may limit its share."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return max(0, min([int(line.split()[1]) * 1024, *_rooms(root)]))
    raise ConfigError("/proc/meminfo has no MemAvailable: cannot tell how much memory is free")


def _rooms(root: Path) -> Iterator[int]:
    """What is left to each control group around this process that has a limit. A container may see its own as the
    hierarchy's root, whatever its path is called outside."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        if controllers:
            base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(base) and all((directory / name).exists() for name in names[:2]):
                yield from _room(directory, *names)


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    """The page cache that was not used lately counts as left: the kernel gives it back."""
    limit, stat = (group / limit_name).read_text().strip(), group / "memory.stat"
    if limit != "max":
        caches = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
        yield int(limit) - int((group / usage_name).read_text()) + int(caches.get(cache_name, 0))


def memory_parts(plan: MemoryPlan) -> dict[str, int]:
    """Bytes by what takes them; what is left of the budget is `free`."""
    sizes, limits = plan.sizes, plan.limits
    num_rows, num_pages = limits.max_running_requests + 1, limits.num_pages + 1
    parts = {
        "weights": sizes.weights,
        "draft weights": sizes.draft_weights,
        "KV, main layers": sizes.main_page * num_pages,
        "KV, MTP layers": sizes.mtp_page * num_pages,
        "GDN states": sizes.state * num_rows,
        "GDN and conv rings": sizes.rings * num_rows,
        "hidden states kept": sizes.history * num_rows,
        "GDN checkpoints": sizes.checkpoint * (limits.num_checkpoints + 1),
        "workspace": sizes.workspace,
    }
    if sizes.decode:
        parts["decode step"] = sizes.decode * num_rows
    if plan.free_bytes is not None:
        parts["free"] = plan.free_bytes
    if limits.host_cache_bytes:
        parts["host cache, at most"] = limits.host_cache_bytes
    return parts


def describe_memory(plan: MemoryPlan) -> str:
    """The plan as a table in MiB, and what one request costs."""
    sizes, limits = plan.sizes, plan.limits
    lines = [f"  {name:<20} {size / MIB:>10.1f} MiB" for name, size in memory_parts(plan).items()]
    lines.append(
        f"  {limits.max_running_requests} requests, {limits.num_pages * limits.page_size} KV tokens, "
        f"{limits.num_checkpoints} checkpoints; per request {sizes.state / MIB:.2f} MiB GDN state (the same for every "
        f"mtp_step), {sizes.rings / MIB:.3f} MiB rings, {sizes.page / limits.page_size / 1024:.2f} KiB KV per token"
    )
    return "\n".join(["Memory:", *lines])
