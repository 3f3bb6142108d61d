"""The sampling fields that both endpoints share, their ranges, and the defaults of the checkpoint.

Turns `Fields` into `SamplingParams`; everything out of range is an InvalidRequest. Knows neither prompts nor HTTP.
"""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from server.api.fields import INT64_MAX, INT64_MIN, Fields, known_fields, require_integer, require_number
from server.config import NEUTRAL, OF_THE_CHECKPOINT
from server.errors import CheckpointError, ConfigError, InvalidRequest
from server.messages import LOGPROBS_MODES, MAX_BIASES, MAX_STOP_TOKEN_IDS, SamplingParams

SHAPE_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAMPLING_FIELDS = (
    *SHAPE_FIELDS,
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
    "min_tokens",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "spaces_between_special_tokens",
    "n",
    "speculative",
)
MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
_MAX_BIAS = 100.0
# Float32 logits times or over a larger factor are infinite or all alike.
_MIN_REPETITION_PENALTY, _MAX_REPETITION_PENALTY = 0.01, 100.0
# Less than one token in a million can say: float32 sums of probabilities end there.
_MIN_TOP_P = 1e-6
_SPECULATIVE = known_fields("enabled", "max_draft")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request must fit into: sizes from the engine's Ready, defaults from the checkpoint. At most `max_logprobs`
    alternatives per token may be asked for."""

    max_model_len: int
    vocab_size: int
    mtp_step: int
    defaults: SamplingParams
    max_logprobs: int = 20


def read_generation_config(directory: str | Path) -> SamplingParams:
    """The defaults of a checkpoint's generation_config.json, which may be absent. Raises CheckpointError."""
    path = Path(directory) / "generation_config.json"
    if not path.exists():
        return SamplingParams()
    try:
        return _read_shape(Fields(known_fields(*SHAPE_FIELDS), path.read_bytes()), SamplingParams(), sys.maxsize)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except InvalidRequest as error:
        raise CheckpointError(f"{path}: {error.message}") from error


def read_defaults(directory: str | Path, source: str, overrides: Mapping[str, Any]) -> SamplingParams:
    """The defaults of a server: from `directory`, the checkpoint, unless `source` names another one or none, with
    `overrides` before them. Raises ConfigError."""
    defaults = SamplingParams()
    if source not in NEUTRAL:
        defaults = read_generation_config(directory if source == OF_THE_CHECKPOINT else source)
    unknown = sorted(set(overrides) - set(SHAPE_FIELDS))
    if unknown:
        known = ", ".join(SHAPE_FIELDS)
        raise ConfigError(f"--override-generation-config has {unknown[0]}, the fields that have defaults are {known}")
    try:
        fields = Fields(known_fields(*SHAPE_FIELDS), msgspec.json.encode(overrides))
        return _read_shape(fields, defaults, sys.maxsize)
    except InvalidRequest as error:
        raise ConfigError(f"--override-generation-config: {error.message}") from error


def read_sampling(fields: Fields, limits: Limits) -> SamplingParams:
    """All sampling fields but max_tokens and logprobs, whose rules differ between the endpoints."""
    shape = _read_shape(fields, limits.defaults, limits.vocab_size)
    fields.boolean("spaces_between_special_tokens", True)  # byte-level tokens bring their own spaces
    return replace(
        shape,
        seed=fields.integer("seed", None, INT64_MIN, INT64_MAX),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        logit_bias=_read_logit_bias(fields, limits.vocab_size),
        stop=read_stop(fields, "stop"),
        stop_token_ids=_read_stop_token_ids(fields, limits.vocab_size),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output", False),
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
        ignore_eos=fields.boolean("ignore_eos", False),
        min_tokens=fields.integer("min_tokens", 0, 0, limits.max_model_len) or 0,
        prompt_logprobs=read_num_logprobs(fields, "prompt_logprobs", limits),
        max_draft=_read_max_draft(fields, limits.mtp_step),
    )


def read_max_tokens(
    fields: Fields, names: tuple[str, ...], default: int | None, limits: Limits, least: int = 1
) -> int | None:
    """The first of the fields `names` that is given, else `default`; None is the rest of the context."""
    name = next((name for name in names if fields.has(name)), names[0])
    max_tokens = fields.integer(name, default, least, limits.max_model_len)
    min_tokens = fields.integer("min_tokens", 0) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, the limit is max_tokens, {max_tokens}", "min_tokens")
    return max_tokens


def read_num_logprobs(fields: Fields, name: str, limits: Limits) -> int | None:
    """How many alternatives the field `name` asks for, at most the vocabulary, and -1 is the whole of it; None when
    absent."""
    vocab_size, most = limits.vocab_size, limits.max_logprobs
    if fields.value(name) != -1:
        num_top = fields.integer(name, None, 0, most, "--max-logprobs")
        return None if num_top is None else min(num_top, vocab_size)
    if vocab_size > most:
        raise InvalidRequest(f"{name} is -1, all {vocab_size} tokens; the limit is {most} (--max-logprobs)", name)
    return vocab_size


def read_logprobs_mode(fields: Fields, default: str) -> str:
    """What log-probabilities are asked of: of the model's own law, or of the one that tokens are drawn from."""
    mode = fields.text("logprobs_mode", default)
    if mode not in LOGPROBS_MODES:
        name = fields.name("logprobs_mode")
        raise InvalidRequest(f"{name} is {mode[:60]!r}, it must be one of {', '.join(LOGPROBS_MODES)}", name)
    return mode


def choice_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """The settings of choice `index` of n: choice 0 keeps the seed, the others get one hashed from (seed, index).

    A sum would make choice 1 of seed s the same as choice 0 of seed s + 1.
    """
    if sampling.seed is None or index == 0:
        return sampling
    digest = hashlib.blake2b(f"{sampling.seed}/{index}".encode(), digest_size=8).digest()
    return replace(sampling, seed=int.from_bytes(digest, "little") & INT64_MAX)


def _read_shape(fields: Fields, defaults: SamplingParams, vocab_size: int) -> SamplingParams:
    top_k = fields.integer("top_k", defaults.top_k, -1)
    assert top_k is not None
    return replace(
        defaults,
        temperature=fields.number("temperature", defaults.temperature, 0.0, 2.0),
        top_p=fields.number("top_p", defaults.top_p, _MIN_TOP_P, 1.0),
        top_k=top_k if 0 < top_k < vocab_size else 0,
        min_p=fields.number("min_p", defaults.min_p, 0.0, 1.0),
        repetition_penalty=fields.number(
            "repetition_penalty", defaults.repetition_penalty, _MIN_REPETITION_PENALTY, _MAX_REPETITION_PENALTY
        ),
    )


def _read_max_draft(fields: Fields, mtp_step: int) -> int | None:
    """The most drafts per step that `speculative` asks for; None leaves it to the server."""
    if not fields.has("speculative"):
        return None
    speculative = Fields(_SPECULATIVE, fields.raw("speculative"), fields.name("speculative"))
    max_draft = speculative.integer("max_draft", None, 0, mtp_step, "--mtp-step")
    return max_draft if speculative.boolean("enabled", True) else 0


def read_stop(fields: Fields, name: str) -> tuple[str, ...]:
    """The stop strings of the field `name`: one, or a list of a few."""
    value = fields.value(name)
    stop = [value] if isinstance(value, str) else fields.items(name, MAX_STOP_STRINGS)
    for string in stop:
        if not isinstance(string, str):
            raise InvalidRequest(f"{name} has an entry that is not a string", name)
        if not 1 <= len(string) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"{name} has a string of {len(string)} characters, the range is 1..{MAX_STOP_CHARS}", name
            )
    return tuple(stop)


def _read_stop_token_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids = fields.items("stop_token_ids", MAX_STOP_TOKEN_IDS)
    return tuple(require_integer(f"stop_token_ids[{i}]", value, 0, vocab_size - 1) for i, value in enumerate(ids))


def _read_logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    """Token id -> bias; values beyond -100..100 are clamped."""
    entries: dict[str, Any] = fields.mapping("logit_bias")
    if len(entries) > MAX_BIASES:
        raise InvalidRequest(f"logit_bias has {len(entries)} entries, the limit is {MAX_BIASES}", "logit_bias")
    biases = {}
    for key, value in entries.items():
        number = require_number(f"logit_bias[{key[:20]}]", value, -sys.float_info.max, sys.float_info.max)
        biases[_read_token_key(key, vocab_size)] = max(-_MAX_BIAS, min(_MAX_BIAS, number))
    return biases


def _read_token_key(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size):
        raise InvalidRequest(
            f"logit_bias has the key {key[:20]!r}, it must be a token id in 0..{vocab_size - 1}", "logit_bias"
        )
    return int(key)
