"""The routes of trainers, which `--enable-rl` mounts and `--admin-api-key` guards."""

from fastapi import FastAPI

from server.api.rl.desk import Desk
from server.api.rl.memory import add_memory_routes
from server.api.rl.pauses import add_pause_routes
from server.api.rl.sglang_weights import add_sglang_weight_routes
from server.api.rl.vllm_weights import add_vllm_weight_routes
from server.api.rl.weight_checks import add_weight_check_routes
from server.api.services import Services

RL_PATHS = frozenset(
    {
        *("/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights_from_tensor"),
        *("/init_weights_update_group", "/destroy_weights_update_group", "/pull_weights", "/rollback_weight_update"),
        *("/init_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update", "/update_weights"),
        *("/finish_weight_update", "/get_world_size"),
        *("/pause_generation", "/continue_generation", "/pause", "/resume", "/is_paused"),
        *("/flush_cache", "/reset_prefix_cache"),
        *("/get_weights_by_name", "/weights_checker", "/weight_checker", "/update_weight_version", "/weight_info"),
        *("/release_memory_occupation", "/resume_memory_occupation", "/sleep", "/wake_up", "/is_sleeping"),
    }
)


def add_rl_routes(app: FastAPI, services: Services) -> None:
    """Everything at RL_PATHS."""
    desk = Desk(services)
    add_pause_routes(app, desk)
    add_sglang_weight_routes(app, desk)
    add_vllm_weight_routes(app, desk)
    add_weight_check_routes(app, desk)
    add_memory_routes(app, desk)
