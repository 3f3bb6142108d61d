"""Everything on the device that serves one checkpoint, put together once at start."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from tqdm import tqdm

from kernels.cpu.library import load_library
from kernels.gated_delta_net import DeltaNetShape
from models import errors as model_errors
from models.cache import Backends, Cache, GDNCache, History, KVCache
from models.config import ModelConfig, load_config
from models.forward_batch import ForwardBatch
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.registry import build
from models.stop_ids import read_added_ids, read_stop_ids, read_turn_ids
from models.weight_store import WeightStore
from models.weights import fill_randomly
from server.backend.cache_mover import CacheMover
from server.backend.device import check_quantization, choose_backends, choose_device, within_memory
from server.backend.drafter import Drafter, choose_vocabulary
from server.backend.memory_plan import (
    MemoryPlan,
    allocate_scratch,
    describe_memory,
    free_memory,
    measure_sizes,
    plan_memory,
)
from server.backend.memory_release import ReleasedMemory
from server.backend.request_table import RequestTable
from server.backend.sampler import Sampled, Sampler
from server.config import EngineConfig
from server.errors import CheckpointError, ConfigError
from server.request import Batch

if TYPE_CHECKING:
    from kernels.gpu.flashinfer import AttentionPlanner

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64, "float16": torch.float32}
# Shorter prompts need what one of 2 ** this tokens does.
_LEAST_WARM_UP = 4
STATE_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1}


class Decode(Protocol):
    """Runs a decode step of requests whose rows and pages are in the table, and commits it."""

    def run(self, batch: Batch) -> Sampled: ...

    def release(self) -> int: ...

    def restore(self) -> int: ...


@dataclass(frozen=True)
class Runner:
    """Target and draft with their `store`, table, sampler, cache mover, with mtp_step > 0 the drafter; `decode` runs
    whole decode steps where there are kernels for that. `eos_ids` end a request, `turn_ids` begin a turn of a chat.
    `overlaps`: steps run beside the host's work.
    A state may be off by `state_tolerance` of its size because prefill and decode round differently. `released` says
    what of the memory is given back."""

    target: Qwen35
    draft: Qwen35MTP | None
    table: RequestTable
    sampler: Sampler
    mover: CacheMover
    drafter: Drafter | None
    decode: Decode | None
    plan: MemoryPlan
    eos_ids: tuple[int, ...]
    turn_ids: frozenset[int]
    overlaps: bool
    state_tolerance: float
    store: WeightStore
    released: ReleasedMemory = field(default_factory=ReleasedMemory)


def build_runner(config: EngineConfig) -> Runner:
    """Load the checkpoint and allocate the caches. Raises ConfigError in one line for whatever cannot be served."""
    device = choose_device(config.device)
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    if device == "cpu":
        load_library()  # a first build takes seconds, which no request should wait for
    try:
        model_config, dtype, num_mtp_layers, backends = read_needs(config, device)
        planner = _prepare_flashinfer(config, model_config, dtype, device, backends)
        sizes = measure_sizes(config, model_config, num_mtp_layers, dtype, backends)
        plan = plan_memory(config, model_config, sizes, free_memory(device))
        num_bytes = sizes.weights + sizes.draft_weights
        with within_memory("weights", num_bytes, "serve a smaller checkpoint, or free the GPU of other processes"):
            mtp, quantization = config.mtp_step > 0, config.quantization
            target, draft = build(model_config, mtp, dtype=dtype, device=device, quantization=quantization)
            store = WeightStore(target, draft, quantization != "none")
            if config.load_format == "dummy":
                fill_randomly(target, draft)
            else:
                store.load(Path(config.model))
        eos_ids = tuple(stop_id for stop_id in read_stop_ids(config.model) if stop_id < model_config.vocab_size)
        turn_ids = read_turn_ids(config.model)
        if draft is not None:
            added_ids = read_added_ids(config.model)
            draft.vocabulary = choose_vocabulary(config.draft_vocab_size, model_config.vocab_size, added_ids)
    except model_errors.CheckpointError as error:
        raise CheckpointError(str(error)) from error
    for model in (target, draft):
        if model is not None:
            model.requires_grad_(False)
    with within_memory("caches", plan.num_bytes - num_bytes, "lower --mem-fraction-static or --max-running-requests"):
        cache = _allocate_cache(config, model_config, plan, num_mtp_layers, dtype, device, backends, planner)
        num_rows, max_pages = plan.limits.max_running_requests + 1, plan.max_pages_per_request
        table = RequestTable(cache, num_rows, max_pages, config.mtp_step, model_config.vocab_size, device)
        mover = CacheMover(table, plan.limits.num_checkpoints)
        if backends.have_decode_step:
            table.keep_rules(eos_ids)
    with torch.no_grad():
        plan = replace(plan, limits=replace(plan.limits, max_joint_tokens=target.max_joint_tokens))
    sampler = Sampler(table, eos_ids)
    drafter = None if draft is None else Drafter(draft, sampler, config.mtp_step, num_mtp_layers)
    decode = _build_decode(config, target, draft, table, num_mtp_layers) if backends.have_decode_step else None
    if device == "cuda":
        with within_memory("a prompt", sizes.workspace, "lower --mem-fraction-static or --chunked-prefill-size"):
            warm_up_prefill(target, draft, table, sampler, plan.limits.chunked_prefill_size)
    logger.info("%s", describe_memory(plan))
    if config.prefix_cache == "on" and not plan.limits.num_checkpoints:
        logger.warning("no prefix will be reused: there is no memory for GDN checkpoints (--checkpoint-bytes)")
    overlaps = config.overlap == "on" or (config.overlap == "auto" and device == "cuda")
    return Runner(
        *(target, draft, table, sampler, mover, drafter, decode, plan, eos_ids, turn_ids, overlaps),
        STATE_TOLERANCES[dtype],
        store,
    )


def read_needs(config: EngineConfig, device: str) -> tuple[ModelConfig, torch.dtype, int, Backends]:
    """What the checkpoint is, in which dtype it is served, how many MTP layers draft, and whose kernels run it."""
    check_quantization(config, device)
    model_config = load_config(config.model)
    dtype = _choose_dtype(config.dtype, model_config)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    backends = choose_backends(config, model_config, device, dtype, capability)
    return model_config, dtype, _count_chained_layers(config, model_config), backends


def _prepare_flashinfer(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: str, backends: Backends
) -> "AttentionPlanner | None":
    """Where FlashInfer is to run, have it compile its kernels: the first time takes minutes, which no request should
    wait for. Gives what plans its attention."""
    if "flashinfer" not in (backends.attention, backends.gdn):
        return None
    from kernels.gpu.flashinfer import AttentionPlanner, compile_delta_rule  # needs Triton

    logger.info("compiling FlashInfer's kernels: minutes, if it has not compiled them before")
    try:
        if backends.gdn == "flashinfer":
            heads, dims = (model.delta_key_heads, model.delta_value_heads), (model.delta_key_dim, model.delta_value_dim)
            compile_delta_rule(DeltaNetShape(*heads, *dims), dtype, device)
        if backends.attention == "flashinfer":
            heads = (model.num_heads, model.num_kv_heads)
            return AttentionPlanner(*heads, model.head_dim, config.page_size, dtype, device)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"FlashInfer's kernels cannot be compiled here ({reason}): use the triton backends"
        ) from error
    return None


def _build_decode(
    config: EngineConfig,
    target: Qwen35,
    draft: Qwen35MTP | None,
    table: RequestTable,
    num_mtp_layers: int,
) -> Decode:
    from server.backend.decode_graphs import DecodeGraphs, graph_depths  # need Triton
    from server.backend.decode_step import DecodeStep

    step = DecodeStep(target, draft, table, min(num_mtp_layers, config.mtp_step))
    if table.device != "cuda" or config.disable_cuda_graph:
        return step
    most = len(table.seq_len) - 1
    depths = graph_depths(config.mtp_step, config.speculation == "adaptive")
    graphs = DecodeGraphs(step, min(most, config.cuda_graph_max_bs or most), depths)
    graphs.capture()
    return graphs


@torch.inference_mode()
def warm_up_prefill(
    target: Qwen35, draft: Qwen35MTP | None, table: RequestTable, sampler: Sampler, most_tokens: int
) -> None:
    """Run prompts of up to most_tokens tokens on row 1 and the padding page, and draw behind them, so that no request
    waits for the kernels of a prefill to be compiled, or is the one that finds no memory; leave the row as a new one
    is. What must be compiled depends on the next power of two of a prompt's length."""
    longest = min(most_tokens, table.page_table.shape[1] * table.cache.kv.page_size)
    lens = {longest, *(2**power for power in range(_LEAST_WARM_UP, longest.bit_length()))}
    for count in tqdm(sorted(lens), desc="Warming up prompts", unit="prompt"):
        positions = torch.arange(count, device=table.device)
        token_ids = positions % table.vocab_size
        view = table.view([1], is_verify=False, num_pages=table.page_table.shape[1])
        forward = ForwardBatch(token_ids, positions, (count,), replace(view, host_starts=(0,)))
        last, hidden = positions[-1:], target(forward)
        if table.rules is not None:  # else torch draws
            sampler.draw_by_table(target.compute_logits(hidden[-1:]), torch.ones_like(last), last + 1)
        if draft is not None:
            for layer in range(draft.num_layers):
                draft(token_ids, hidden, forward, layer, last)
        table.cache.gdn.reset(1)


def _choose_dtype(name: str, model_config: ModelConfig) -> torch.dtype:
    name = model_config.dtype if name == "auto" else name
    if name not in DTYPES:
        served = ", ".join(other for other in DTYPES if other != "float16")
        raise ConfigError(f"config.json: dtype {name!r} is not served, choose one with --dtype: {served}")
    return DTYPES[name]


def _count_chained_layers(config: EngineConfig, model: ModelConfig) -> int:
    """MTP layers that draft: eagle recurses on the first one, vanilla chains them all."""
    if config.mtp_step == 0:
        return 0
    return 1 if config.mtp_mode == "eagle" else min(max(1, model.num_mtp_layers), config.mtp_step)


def _allocate_cache(
    config: EngineConfig,
    model: ModelConfig,
    plan: MemoryPlan,
    num_mtp_layers: int,
    dtype: torch.dtype,
    device: str,
    backends: Backends,
    planner: "AttentionPlanner | None",
) -> Cache:
    num_pages = plan.limits.num_pages + 1
    kv = KVCache.allocate(model, num_mtp_layers, num_pages, config.page_size, dtype, device)
    gdn = GDNCache.allocate(model, config.mtp_step, plan.limits.max_running_requests + 1, dtype, device)
    num_rows = plan.limits.max_running_requests + 1
    history = History.allocate(model, num_rows, dtype, device) if plan.limits.max_behind else None
    scratch = None
    if backends.attention != "torch":
        max_len = plan.max_pages_per_request * config.page_size
        scratch = allocate_scratch(config, model, num_rows - 1, max_len, device)
    return Cache(kv, gdn, history, backends, scratch, planner)
