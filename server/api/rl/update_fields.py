"""The fields of weight updates that trainers have in common, and what they make of an update.

Unknown fields are ignored as everywhere. Some known ones change nothing here, and are read so that a wrong value is
told: `flush_cache`, since the prefix cache is always flushed, it would be wrong under other weights; `is_async`,
`torch_empty_cache` and `recapture_cuda_graph`, since weights change in place between two steps; `token_step`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from server.api.fields import Fields, decode_json
from server.api.openapi import Schema, nullable
from server.api.rl.desk import Desk, new_id, success
from server.control import (
    PAUSE_MODES,
    BeginUpdate,
    CommitUpdate,
    Pause,
    Resume,
    TensorSpec,
    UpdateWeights,
    WeightSource,
)
from server.errors import InvalidRequest, TandemError

MTP_PREFIX = "mtp."
MAX_TEXT_CHARS = 4096
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
FILE_FORMATS = ("auto", "safetensors")
_HARMLESS_FLAGS = ("flush_cache", "is_async", "torch_empty_cache", "recapture_cuda_graph")
_FLAGS = ("abort_all_requests", "keep_pause", "partial", "require_mtp", "disable_draft_model", *_HARMLESS_FLAGS)
RESULT_SCHEMA = {
    "result_sha256": nullable(
        "string",
        pattern=f"^{_SHA256.pattern}$",
        description="What the checksum of all weights must be after the update, as /weights_checker tells it; but a "
        "tensor that is served in fewer bits than it comes in, or quantized, counts as it came.",
    )
}
COMMIT_SCHEMAS: dict[str, Schema] = {
    **RESULT_SCHEMA,
    "weight_version": nullable(
        "string",
        minLength=1,
        maxLength=256,
        description="What the weights are called. Updates that bring a version in parts all give its name, other than "
        "default and latest: so the draft head counts as stale only where it belongs to another version.",
    ),
    "in_flight": {"enum": [*PAUSE_MODES, None]},
    "load_format": {"type": ["string", "null"]},
    "token_step": nullable("integer"),
    **{name: nullable("boolean") for name in _FLAGS},
}
TENSOR_SCHEMAS: dict[str, Schema] = {
    "names": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    "dtypes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    "shapes": {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "minItems": 1},
}
_TEXTS, _SHAPES = list[str], list[list[Annotated[int, msgspec.Meta(ge=0, le=2**40)]]]


@dataclass(frozen=True)
class Update:
    """A weight session in one command, after which the engine stays paused if it `keeps_pause`."""

    command: UpdateWeights
    keeps_pause: bool = False


def read_update(fields: Fields, source: WeightSource, formats: Sequence[str], is_partial: bool = False) -> Update:
    """The update from `source` by the common fields. It may leave tensors out where the request says so, or, if it
    says nothing, where such updates usually come in parts. Raises InvalidRequest."""
    flags = {name: fields.boolean(name, False) for name in _FLAGS if name != "partial"}
    fields.integer("token_step", 0)
    read_choice(fields, "load_format", formats)
    if flags["disable_draft_model"]:
        check_target_only(source.tensors)
    control_id = new_id()
    in_flight = read_choice(fields, "in_flight", PAUSE_MODES, "abort" if flags["abort_all_requests"] else "keep")
    begin = BeginUpdate(
        control_id,
        tensors=source.tensors,
        is_partial=fields.boolean("partial", is_partial),
        needs_mtp=flags["require_mtp"],
        result_sha256=read_result(fields),
    )
    commit = CommitUpdate(control_id, read_version(fields, "weight_version"), in_flight)
    return Update(UpdateWeights(control_id, source, begin, commit), flags["keep_pause"])


async def update_weights(desk: Desk, update: Update) -> dict[str, Any]:
    """Have it carried out: SGLang's answer. An engine that was not paused goes on if it fails."""
    command, stats = update.command, desk.client.stats
    num_paused = desk.client.num_in_flight if stats.is_paused else 0
    pauses = update.keeps_pause and not stats.is_paused
    if pauses:
        await desk.carry_out(Pause(new_id(), command.commit.in_flight))
        command = replace(command, commit=replace(command.commit, in_flight="keep"))
    try:
        values = await desk.carry_out(command)
    except TandemError:
        if pauses:
            await desk.carry_out(Resume(new_id()))
        raise
    version = desk.client.stats.weight_version
    message = f"Succeeded to update model weights. Weight version updated to {version}."
    return success(message, **{**values, "num_paused_requests": num_paused, "weight_version": version})


def read_tensors(fields: Fields, dtypes_name: str = "dtypes") -> tuple[TensorSpec, ...]:
    """The tensors that `names`, `shapes` and the field `dtypes_name` list, one by one. Raises InvalidRequest."""
    names = _read_list(fields, "names", _TEXTS, "a list of texts")
    dtypes = _read_list(fields, dtypes_name, _TEXTS, "a list of texts")
    shapes = _read_list(fields, "shapes", _SHAPES, "a list of lists of sizes")
    if not len(names) == len(dtypes) == len(shapes):
        raise InvalidRequest(
            f"names has {len(names)} entries, {dtypes_name} {len(dtypes)} and shapes {len(shapes)}; each tensor needs "
            "one of each",
            fields.name("names"),
        )
    return tuple(
        TensorSpec(name, dtype.removeprefix("torch."), tuple(shape))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    )


def check_target_only(tensors: Sequence[TensorSpec]) -> None:
    """Raise InvalidRequest if one of the tensors is the draft head's, or if none are listed, so that it may be."""
    if not tensors:
        raise InvalidRequest(
            "disable_draft_model is true, which only an update that lists its tensors can keep; leave it out",
            "disable_draft_model",
        )
    found = next((tensor.name for tensor in tensors if tensor.name.startswith(MTP_PREFIX)), None)
    if found is not None:
        raise InvalidRequest(
            f"disable_draft_model is true, and the update brings {found}; leave one of them out", "disable_draft_model"
        )


def read_choice(fields: Fields, name: str, choices: Sequence[str], default: str | None = None) -> str:
    """One of a few texts; the first is the default unless another is named. Raises InvalidRequest."""
    value = fields.text(name, choices[0] if default is None else default)
    if value not in choices:
        raise InvalidRequest(
            f"{fields.name(name)} is {value[:60]!r}, it must be one of {', '.join(choices)}", fields.name(name)
        )
    return value


def read_result(fields: Fields) -> str:
    """The checksum that all weights must have after an update; empty if none is asked for. Raises InvalidRequest."""
    text = fields.text("result_sha256", "")
    if text and not _SHA256.fullmatch(text):
        raise InvalidRequest(f"result_sha256 is {text[:80]!r}, it must be 64 hexadecimal digits", "result_sha256")
    return text


def read_version(fields: Fields, name: str) -> str | None:
    """What the weights are to be called; None leaves it to the engine."""
    return read_name(fields, name, 256) if fields.has(name) else None


def read_name(fields: Fields, name: str, max_chars: int = MAX_TEXT_CHARS) -> str:
    """A text that must be there. Raises InvalidRequest."""
    text = fields.text(name, "")
    if not 1 <= len(text) <= max_chars:
        raise InvalidRequest(
            f"{fields.name(name)} has {len(text)} characters, the range is 1..{max_chars}", fields.name(name)
        )
    return text


def _read_list(fields: Fields, name: str, kind: Any, rule: str) -> Any:
    if not fields.has(name):
        raise InvalidRequest(f"{fields.name(name)} is missing, it must be {rule}", fields.name(name))
    return decode_json(fields.name(name), fields.raw(name), kind, rule)
