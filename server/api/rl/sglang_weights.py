"""Weight updates and what belongs to them, by the names and fields that SGLang's trainers have.

Every update is a session of its own: checked whole before the first weight changes, and forgotten if anything is wrong
with it. One from disk or from a stream brings all weights unless it says `partial`. Requests that run go on with the
new weights unless the engine is paused, or `abort_all_requests` or `in_flight` say otherwise.
"""

from fastapi import FastAPI, Request, Response

from server.api.fields import Fields, shown
from server.api.openapi import Schema, nullable
from server.api.rl.desk import SUCCESS, Desk, Form, new_id, success
from server.api.rl.inline_tensors import read_inline_source
from server.api.rl.update_fields import (
    COMMIT_SCHEMAS,
    FILE_FORMATS,
    TENSOR_SCHEMAS,
    Update,
    read_choice,
    read_name,
    read_tensors,
    read_update,
    update_weights,
)
from server.control import Control, JoinGroup, LeaveGroup, RollBackUpdate, WeightSource
from server.errors import InvalidRequest

DEFAULT_GROUP = "weight_update_group"
BACKENDS = ("nccl", "gloo")
_STRATEGIES = ("full", "delta")
_MAX_STREAMS = 64
_TEXT: Schema = {"type": "string", "minLength": 1}
GROUP_SCHEMAS: dict[str, Schema] = {
    "master_address": _TEXT,
    "master_port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "rank_offset": {"type": "integer", "minimum": 1},
    "world_size": {"type": "integer", "minimum": 2},
}
_REQUIRED = tuple(GROUP_SCHEMAS)
_DISK = Form(("model_path",), model_path=_TEXT, **COMMIT_SCHEMAS)
_GROUP_NAME = {"group_name": nullable("string", minLength=1)}
_JOIN = Form(_REQUIRED, **GROUP_SCHEMAS, **_GROUP_NAME, backend={"enum": [*BACKENDS, None]})
_LEAVE = Form(**_GROUP_NAME)
_DISTRIBUTED = Form(tuple(TENSOR_SCHEMAS), **TENSOR_SCHEMAS, **_GROUP_NAME, **COMMIT_SCHEMAS)
_INLINE = Form(
    ("serialized_named_tensors",),
    serialized_named_tensors={"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
    **COMMIT_SCHEMAS,
)
_PULL = Form(
    ("url",),
    url={"type": "string", "pattern": "^https?://"},
    num_streams=nullable("integer", minimum=1, maximum=_MAX_STREAMS),
    strategies=nullable("array", items={"enum": list(_STRATEGIES)}, minItems=1, maxItems=len(_STRATEGIES)),
    **COMMIT_SCHEMAS,
)
_NOTHING = Form()


def add_sglang_weight_routes(app: FastAPI, desk: Desk) -> None:
    """Updates from disk, a group, the request and a stream, and the group itself."""
    _add_update_routes(app, desk)
    _add_group_routes(app, desk)

    @app.post("/rollback_weight_update", **_NOTHING.describe(True, True, SUCCESS))
    async def rollback_weight_update(request: Request) -> Response:
        """Forget what the open weight session has brought; the weights that serve stay."""

        async def act(command: Control) -> dict[str, object]:
            await desk.carry_out(command)
            return success("The weight update is rolled back.")

        return await desk.answer_plainly(request, _NOTHING, lambda _: RollBackUpdate(new_id()), act)


def _add_update_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/update_weights_from_disk", **_DISK.describe(True, True, SUCCESS))
    async def update_weights_from_disk(request: Request) -> Response:
        """Change the weights to those of a directory or file of safetensors that the server can read. `flush_cache` is
        accepted, and the prefix cache is flushed whatever it says: it would be wrong."""
        return await desk.answer_plainly(request, _DISK, _read_disk, lambda update: update_weights(desk, update))

    @app.post("/update_weights_from_distributed", **_DISTRIBUTED.describe(True, True, SUCCESS))
    async def update_weights_from_distributed(request: Request) -> Response:
        """Change the weights that rank 0 of a group broadcasts, one after the other; the others stay."""
        return await desk.answer_plainly(
            request, _DISTRIBUTED, _read_distributed, lambda update: update_weights(desk, update)
        )

    @app.post("/update_weights_from_tensor", **_INLINE.describe(True, True, SUCCESS))
    async def update_weights_from_tensor(request: Request) -> Response:
        """Change the weights, target's and draft head's, that the request brings as base64 of a safetensors file; the
        others stay."""
        return await desk.answer_plainly(
            request, _INLINE, _read_inline, lambda update: update_weights(desk, update), has_tensors=True
        )

    @app.post("/pull_weights", **_PULL.describe(True, True, SUCCESS))
    async def pull_weights(request: Request) -> Response:
        """Change the weights to those that a publisher has, all of them or what differs from the version that serves,
        over several connections."""
        return await desk.answer_plainly(request, _PULL, _read_pull, lambda update: update_weights(desk, update))


def _add_group_routes(app: FastAPI, desk: Desk) -> None:
    async def act(command: Control) -> dict[str, object]:
        await desk.carry_out(command)
        did = "joined" if isinstance(command, JoinGroup) else "left"
        return success(f"The weight update group is {did}.")

    @app.post("/init_weights_update_group", **_JOIN.describe(True, True, SUCCESS))
    async def init_weights_update_group(request: Request) -> Response:
        """Join a process group of trainers, as rank `rank_offset`; answered once all have joined."""
        return await desk.answer_plainly(request, _JOIN, lambda fields: read_join(fields, desk), act)

    @app.post("/destroy_weights_update_group", **_LEAVE.describe(True, True, SUCCESS))
    async def destroy_weights_update_group(request: Request) -> Response:
        """Leave a process group."""
        return await desk.answer_plainly(
            request, _LEAVE, lambda fields: LeaveGroup(new_id(), _read_group_name(fields)), act
        )


def read_join(fields: Fields, desk: Desk, group: str | None = None) -> JoinGroup:
    """The group that a request describes; it has a name unless all are called `group`. Raises InvalidRequest."""
    for name in _REQUIRED:
        if not fields.has(name):
            raise InvalidRequest(f"{fields.name(name)} is missing; a group needs {', '.join(_REQUIRED)}", name)
    rank, world_size = fields.integer("rank_offset", 1, 1, 65535), fields.integer("world_size", 2, 2, 65536)
    assert rank is not None and world_size is not None
    if rank >= world_size:
        raise InvalidRequest(
            f"{fields.name('rank_offset')} is {rank}, ranks of a world of {world_size} end with {world_size - 1}",
            fields.name("rank_offset"),
        )
    usual = "nccl" if desk.client.ready.device.startswith("cuda") else "gloo"
    return JoinGroup(
        new_id(),
        group=_read_group_name(fields) if group is None else group,
        address=read_name(fields, "master_address"),
        port=fields.integer("master_port", None, 1, 65535) or 0,
        rank=rank,
        world_size=world_size,
        backend=read_choice(fields, "backend", BACKENDS, usual),
    )


def _read_group_name(fields: Fields) -> str:
    return read_name(fields, "group_name") if fields.has("group_name") else DEFAULT_GROUP


def _read_disk(fields: Fields) -> Update:
    return read_update(fields, WeightSource("disk", path=read_name(fields, "model_path")), FILE_FORMATS)


def _read_distributed(fields: Fields) -> Update:
    source = WeightSource("group", group=_read_group_name(fields), tensors=read_tensors(fields))
    return read_update(fields, source, ("auto",), is_partial=True)


def _read_inline(fields: Fields) -> Update:
    return read_update(fields, read_inline_source(fields), (*FILE_FORMATS, "direct"), is_partial=True)


def _read_pull(fields: Fields) -> Update:
    url = read_name(fields, "url")
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"url is {url[:60]!r}, it must begin with http:// or https://", "url")
    strategies = fields.items("strategies", len(_STRATEGIES)) or list(_STRATEGIES)
    for strategy in strategies:
        if strategy not in _STRATEGIES:
            raise InvalidRequest(f"strategies has {shown(strategy)}, there are {', '.join(_STRATEGIES)}", "strategies")
    source = WeightSource(
        "stream",
        url=url.rstrip("/"),
        num_streams=fields.integer("num_streams", 4, 1, _MAX_STREAMS) or 4,
        strategies=tuple(strategies),
    )
    return read_update(fields, source, ("auto",))
