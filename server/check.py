"""`python -m server --check`: would these settings serve this checkpoint on this machine? Nothing is loaded."""

from pathlib import Path

from models import errors as model_errors
from models.config import ModelConfig
from models.registry import build
from models.stop_ids import read_stop_ids, read_turn_ids
from models.weights import check_weights
from server.api.sampling import read_defaults
from server.api.tracing import Tracing
from server.backend.device import choose_device
from server.backend.memory_plan import describe_memory, free_memory, measure_sizes, plan_memory
from server.backend.runner import read_needs
from server.config import EngineConfig, ServerConfig
from server.errors import CheckpointError, InvalidRequest
from server.http_server import check_certificate
from server.tokenizer import Tokenizer, read_template


def check(engine_config: EngineConfig, config: ServerConfig) -> str:
    """What would be served, and in how much memory, for people to read. Raises ConfigError for the first thing that
    would keep the server from starting."""
    try:
        return _check(engine_config, config)
    except model_errors.CheckpointError as error:
        raise CheckpointError(str(error)) from error


def _check(engine_config: EngineConfig, config: ServerConfig) -> str:
    check_certificate(config)
    if config.otlp_traces_endpoint is not None:
        Tracing(config.otlp_traces_endpoint, "").close()
    directory = engine_config.model
    device = choose_device(engine_config.device)
    model, dtype, num_mtp_layers, backends = read_needs(engine_config, device)
    template = None if config.chat_template is None else read_template(config.chat_template)
    tokenizer = None if config.skip_tokenizer_init else Tokenizer(directory, template)
    if tokenizer is not None:
        _check_vocabulary(tokenizer, model)
    read_defaults(directory, config.generation_config, config.override_generation_config or {})
    read_stop_ids(directory)
    read_turn_ids(directory)
    mtp, quantization = engine_config.mtp_step > 0, engine_config.quantization
    target, draft = build(model, mtp, dtype=dtype, device="meta", quantization=quantization)
    num_tensors = check_weights(directory, target, draft) if engine_config.load_format == "auto" else 0
    sizes = measure_sizes(engine_config, model, num_mtp_layers, dtype, backends)
    plan = plan_memory(engine_config, model, sizes, free_memory(device))
    num_layers = model.num_full_layers + model.num_delta_layers
    kernels = f"attention by {backends.attention}, delta nets by {backends.gdn}"
    lines = [
        f"checkpoint: {Path(directory).resolve()}, {num_layers} layers, {num_tensors} tensors as config.json asks",
        f"device:     {device}, {str(dtype).removeprefix('torch.')}, {_describe_quantization(quantization)}{kernels}",
        f"tokenizer:  {_describe_tokenizer(tokenizer)}",
        f"drafts:     mtp_step {engine_config.mtp_step}, the checkpoint has {model.num_mtp_layers} MTP layers",
        describe_memory(plan),
    ]
    return "\n".join(lines)


def _describe_quantization(quantization: str) -> str:
    return "" if quantization == "none" else f"weights {quantization}, "


def _check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"tokenizer.json has {tokenizer.vocab_size} tokens, config.json has a vocab_size of {model.vocab_size}: "
            "they are of different checkpoints"
        )


def _describe_tokenizer(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none (--skip-tokenizer-init)"
    return f"{tokenizer.vocab_size} tokens, {_describe_template(tokenizer)}"


def _describe_template(tokenizer: Tokenizer) -> str:
    """Whether a chat can be rendered; one that cannot is the client's error later on, so it is told, not refused."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    except InvalidRequest as error:
        return f"no chat: {error.message}"
    return "a chat template that renders"
