"""How many rows and pages, and what they cost in bytes. Written as a table at start."""

from dataclasses import dataclass

from models.cache import Cache
from models.config import ModelConfig
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from server.config import EngineConfig, Limits, lookahead
from server.errors import ConfigError

DEFAULT_MAX_MODEL_LEN = 32768
DEFAULT_MAX_TOTAL_TOKENS = 65536
MIB = 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes that fit each other: max_pages_per_request covers max_model_len plus what a decode step writes ahead."""

    limits: Limits
    max_model_len: int
    max_pages_per_request: int


def plan_memory(config: EngineConfig, model: ModelConfig) -> MemoryPlan:
    """Raises ConfigError when one request of the longest form does not fit, naming the smallest value that would."""
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, the checkpoint was made for at most "
            f"{model.max_position_embeddings} positions"
        )
    ahead = lookahead(config.mtp_step)
    longest = config.max_model_len or min(model.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if config.max_model_len is None and config.max_total_tokens is not None:
        longest = max(1, min(longest, config.max_total_tokens - ahead))
    capacity = config.max_total_tokens or max(
        longest + ahead, min(config.max_running_requests * (longest + ahead), DEFAULT_MAX_TOTAL_TOKENS)
    )
    limits = Limits(
        max_running_requests=config.max_running_requests,
        chunked_prefill_size=config.chunked_prefill_size,
        page_size=config.page_size,
        num_pages=-(-capacity // config.page_size),
        mtp_step=config.mtp_step,
    )
    needed = limits.pages_for(longest)
    if needed > limits.num_pages:
        raise ConfigError(
            f"--max-total-tokens {capacity} is less than one request of --max-model-len {longest} needs with "
            f"--mtp-step {config.mtp_step}: {needed * config.page_size}"
        )
    return MemoryPlan(limits, longest, needed)


def describe_memory(
    plan: MemoryPlan, cache: Cache, target: Qwen35, draft: Qwen35MTP | None, num_mtp_layers: int
) -> str:
    """The plan as a table in MiB, and what one request costs."""
    kv, gdn = cache.kv, cache.gdn
    kv_bytes_per_layer = kv.data[0].nbytes
    num_rows = gdn.state.shape[1]
    rows = {
        "weights": _weight_bytes(target),
        "draft weights": _weight_bytes(draft) if draft else 0,
        "KV, main layers": kv_bytes_per_layer * (len(kv.data) - num_mtp_layers),
        "KV, MTP layers": kv_bytes_per_layer * num_mtp_layers,
        "GDN states": gdn.state_bytes_per_row * num_rows,
        "GDN and conv rings": gdn.ring_bytes_per_row * num_rows,
    }
    lines = [f"  {name:<20} {size / MIB:>10.1f} MiB" for name, size in rows.items()]
    tokens = plan.limits.num_pages * plan.limits.page_size
    per_token = kv.data[:, :, 0].nbytes / kv.page_size
    lines.append(
        f"  {plan.limits.max_running_requests} requests, {tokens} KV tokens; per request "
        f"{gdn.state_bytes_per_row / MIB:.2f} MiB GDN state (the same for every mtp_step), "
        f"{gdn.ring_bytes_per_row / MIB:.3f} MiB rings, {per_token / 1024:.2f} KiB KV per token"
    )
    return "\n".join(["Memory:", *lines])


def _weight_bytes(model: Qwen35 | Qwen35MTP) -> int:
    return sum(param.nbytes for param in model.parameters())
