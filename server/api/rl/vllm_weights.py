"""Weight sessions by the names and fields that vLLM's trainers have: start, update as often as needed, finish.

What the engine refuses in the middle closes the session, and the weights that serve stay; a group that still owes it
tensors is left. The group of the trainer has no name here: it is the one that has none with SGLang's, either.
"""

from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.fields import Fields, known_fields, require_boolean
from server.api.openapi import Schema, nullable, operation
from server.api.rl.desk import Desk, Form, new_id
from server.api.rl.sglang_weights import DEFAULT_GROUP, GROUP_SCHEMAS, read_join
from server.api.rl.update_fields import (
    COMMIT_SCHEMAS,
    FILE_FORMATS,
    MTP_PREFIX,
    RESULT_SCHEMA,
    TENSOR_SCHEMAS,
    Update,
    read_choice,
    read_name,
    read_result,
    read_tensors,
    read_update,
    read_version,
    update_weights,
)
from server.control import (
    PAUSE_MODES,
    AddTensors,
    BeginUpdate,
    CommitUpdate,
    Control,
    JoinGroup,
    RollBackUpdate,
    TensorSpec,
    WeightSource,
)
from server.errors import InvalidRequest

_UNSERVED = {
    "packed": "packed buffers are not served; broadcast the tensors one by one",
    "num_updates_list": "sparse updates over a group are not served; /pull_weights takes deltas",
}
_INIT_FIELDS = known_fields(*GROUP_SCHEMAS, "backend", "packed")
_INFO_FIELDS = known_fields("names", "dtype_names", "shapes", *_UNSERVED)
_MESSAGE: Schema = {"type": "object", "required": ["message"], "properties": {"message": {"type": "string"}}}
_INIT = Form(
    ("init_info",),
    init_info={
        "type": "object",
        "required": list(GROUP_SCHEMAS),
        "properties": {**GROUP_SCHEMAS, "packed": nullable("boolean", enum=[False, None])},
    },
)
_START = Form(partial=nullable("boolean"), require_mtp=nullable("boolean"), **RESULT_SCHEMA)
_NOTHING = Form()
_TENSORS = {name.replace("dtypes", "dtype_names"): schema for name, schema in TENSOR_SCHEMAS.items()}
_UPDATE = Form(
    update_info=nullable("object", required=list(_TENSORS), properties=_TENSORS),
    weight_dir=nullable("string", minLength=1),
    **COMMIT_SCHEMAS,
)
_FINISH = Form(weight_version=COMMIT_SCHEMAS["weight_version"], in_flight=COMMIT_SCHEMAS["in_flight"])


class _Session:
    """Whether the open session is for the draft head alone."""

    is_draft = False


def add_vllm_weight_routes(app: FastAPI, desk: Desk) -> None:
    """The session, the group, and the size of the world."""
    session = _Session()
    _add_start_routes(app, desk, session)

    @app.post("/init_weight_transfer_engine", **_INIT.describe(True, False, _MESSAGE))
    async def init_weight_transfer_engine(request: Request) -> Response:
        """Join the process group of the trainer, as rank `rank_offset`; answered once all have joined."""

        async def act(command: JoinGroup) -> dict[str, str]:
            await desk.carry_out(command)
            return {"message": "Weight transfer initialized"}

        return await desk.answer(request, _INIT, lambda fields: _read_init(fields, desk), act)

    @app.post("/update_weights", **_UPDATE.describe(True, False, _MESSAGE))
    async def update(request: Request) -> Response:
        """Bring tensors to the open session, broadcast by rank 0 in the order of `names`; or change all weights to
        those of `weight_dir`, a directory of safetensors, at once."""

        async def act(asked: AddTensors | Update) -> dict[str, Any]:
            if isinstance(asked, Update):
                return await update_weights(desk, asked)
            if session.is_draft:
                await _check_draft(desk, asked.source.tensors)
            await desk.carry_out(asked)
            return {"message": f"{len(asked.source.tensors)} weights received"}

        return await desk.answer(request, _UPDATE, _read_update, act)

    @app.post("/finish_weight_update", **_FINISH.describe(True, False, _MESSAGE))
    async def finish_weight_update(request: Request) -> Response:
        """Serve with what the session has brought, from one step to the next."""

        async def act(command: CommitUpdate) -> dict[str, Any]:
            values = await desk.carry_out(command)
            version = desk.client.stats.weight_version
            return {"message": "Weight update finished", "weight_version": version, **values}

        return await desk.answer(request, _FINISH, _read_finish, act)

    @app.get("/get_world_size", **operation())
    async def get_world_size() -> dict[str, int]:
        """How many ranks of a trainer's group this server takes."""
        return {"world_size": 1}


def _add_start_routes(app: FastAPI, desk: Desk, session: _Session) -> None:
    async def start(command: BeginUpdate, is_draft: bool) -> dict[str, str]:
        await desk.carry_out(command)
        session.is_draft = is_draft
        return {"message": "Weight update started"}

    @app.post("/start_weight_update", **_START.describe(True, False, _MESSAGE))
    async def start_weight_update(request: Request) -> Response:
        """Open a session, which must bring all weights of the target unless it is `partial`, and may bring the draft
        head's."""
        return await desk.answer(request, _START, _read_start, lambda command: start(command, False))

    @app.post("/start_draft_weight_update", **_NOTHING.describe(True, False, _MESSAGE))
    async def start_draft_weight_update(request: Request) -> Response:
        """Open a session for weights of the draft head alone."""
        return await desk.answer(
            request, _NOTHING, lambda _: BeginUpdate(new_id(), is_partial=True), lambda command: start(command, True)
        )


async def _check_draft(desk: Desk, tensors: tuple[TensorSpec, ...]) -> None:
    """Raise InvalidRequest if one of the tensors is none of the draft head's; that ends the session."""
    other = next((tensor.name for tensor in tensors if not tensor.name.startswith(MTP_PREFIX)), None)
    if other is not None:
        rollback: Control = RollBackUpdate(new_id())
        await desk.carry_out(rollback)
        raise InvalidRequest(
            f"names has {other}, which is not of the draft head ({MTP_PREFIX}*): the session is closed; begin one with "
            "/start_weight_update",
            "update_info.names",
        )


def _read_init(fields: Fields, desk: Desk) -> JoinGroup:
    info = Fields(_INIT_FIELDS, fields.raw("init_info") or b"{}", "init_info")
    _refuse_unserved(info, ("packed",))
    return read_join(info, desk, DEFAULT_GROUP)


def _read_start(fields: Fields) -> BeginUpdate:
    partial, needs_mtp = fields.boolean("partial", False), fields.boolean("require_mtp", False)
    return BeginUpdate(new_id(), is_partial=partial, needs_mtp=needs_mtp, result_sha256=read_result(fields))


def _read_update(fields: Fields) -> AddTensors | Update:
    if fields.has("weight_dir") == fields.has("update_info"):
        raise InvalidRequest(
            "update_info and weight_dir are both given or both missing; give one of them", "update_info"
        )
    if fields.has("weight_dir"):
        return read_update(fields, WeightSource("disk", path=read_name(fields, "weight_dir")), FILE_FORMATS)
    info = Fields(_INFO_FIELDS, fields.raw("update_info"), "update_info")
    _refuse_unserved(info, _UNSERVED)
    return AddTensors(new_id(), WeightSource("group", group=DEFAULT_GROUP, tensors=read_tensors(info, "dtype_names")))


def _refuse_unserved(info: Fields, names: Any) -> None:
    for name in names:
        value = info.value(name)
        if value is None or (name == "packed" and not require_boolean(info.name(name), value)):
            continue
        raise InvalidRequest(f"{info.name(name)} is given: {_UNSERVED[name]}", info.name(name))


def _read_finish(fields: Fields) -> CommitUpdate:
    in_flight = read_choice(fields, "in_flight", PAUSE_MODES, "keep")
    return CommitUpdate(new_id(), read_version(fields, "weight_version"), in_flight)
