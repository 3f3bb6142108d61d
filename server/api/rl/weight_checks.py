"""Looking at the weights that serve: values, checksums, versions; by the names of SGLang and vLLM."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.fields import Fields, shown
from server.api.openapi import Schema, nullable, operation
from server.api.rl.desk import SUCCESS, Desk, Form, new_id, success
from server.api.rl.update_fields import COMMIT_SCHEMAS, read_choice, read_name, read_version
from server.api.status import describe_weights
from server.control import CheckWeights, ReadWeights, SetVersion
from server.errors import InvalidRequest

_ACTIONS = ("checksum", "snapshot", "compare", "reset")
# SGLang says reset_tensors.
_ACTION_NAMES = {**{action: action for action in _ACTIONS}, "reset_tensors": "reset"}
_MAX_VALUES = 2**20
_MAX_NAMED = 5
_VERSION = COMMIT_SCHEMAS["weight_version"]
_ACTION: Schema = {"enum": [*_ACTION_NAMES, None]}
_READ = Form(
    ("name",),
    name={"type": "string", "minLength": 1},
    truncate_size=nullable("integer", minimum=1, maximum=_MAX_VALUES),
)
_CHECK = Form(action=_ACTION)
_COMPARE = Form(action=_ACTION, baseline={"type": ["object", "string", "null"]})
_RENAME = Form(new_version=_VERSION, weight_version=_VERSION, abort_all_requests=nullable("boolean"))
_MATCH: Schema = {"type": "object", "required": ["action"], "properties": {"action": {"type": "string"}}}


def add_weight_check_routes(app: FastAPI, desk: Desk) -> None:
    """/get_weights_by_name, /weights_checker, /weight_checker, /update_weight_version and /weight_info."""
    _add_version_routes(app, desk)

    @app.post("/get_weights_by_name", **_READ.describe(True, True, {"type": "array"}))
    @app.get("/get_weights_by_name", **_READ.describe(False, True, {"type": "array"}))
    async def get_weights_by_name(request: Request) -> Response:
        """The first values of a weight by its name in the checkpoint, row by row."""

        async def act(command: ReadWeights) -> Any:
            return (await desk.carry_out(command))["values"]

        return await desk.answer_plainly(request, _READ, _read_name, act)

    @app.post("/weights_checker", **_CHECK.describe(True, True, SUCCESS))
    async def weights_checker(request: Request) -> Response:
        """By `action`: SHA-256 of all weights (checksum), remember these (snapshot), fail if they have changed
        (compare), or overwrite all weights with random numbers (reset_tensors)."""

        async def act(command: CheckWeights) -> dict[str, Any]:
            values = await desk.carry_out(command)
            different = values.get("different", [])
            if different:
                raise InvalidRequest(_describe(different))
            return success(f"The weights passed: {command.action}.", **values)

        return await desk.answer_plainly(request, _CHECK, _read_check, act)

    @app.post("/weight_checker", **_COMPARE.describe(True, False, _MATCH))
    async def weight_checker(request: Request) -> Response:
        """By `action`: SHA-256 of all weights (checksum, snapshot), whether they are those of `baseline`, an answer's
        checksums or the checksum of them all, or else of the snapshot (compare), or random numbers (reset)."""

        async def act(asked: tuple[CheckWeights, Any]) -> dict[str, Any]:
            command, baseline = asked
            if command.action != "compare":
                return {"action": command.action, **await desk.carry_out(command)}
            if baseline is None:
                different = (await desk.carry_out(command))["different"]
            else:
                different = _find_different(baseline, await desk.carry_out(CheckWeights(new_id())))
            return {"action": command.action, "match": not different, "different": different}

        return await desk.answer(request, _COMPARE, _read_compare, act)


def _add_version_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/update_weight_version", **_RENAME.describe(True, True, SUCCESS))
    async def update_weight_version(request: Request) -> Response:
        """Name the weights that serve: `new_version`, and requests that run are aborted unless `abort_all_requests` is
        false; or `weight_version`, and they go on unless it is true."""

        async def act(asked: tuple[SetVersion, bool]) -> dict[str, Any]:
            command, aborts = asked
            if aborts:
                desk.client.end(desk.client.find(lambda _: True))
            await desk.carry_out(command)
            return success(f"Weight version updated to {command.weight_version}.", new_version=command.weight_version)

        return await desk.answer_plainly(request, _RENAME, _read_rename, act)

    @app.get("/weight_info", **operation())
    async def weight_info() -> dict[str, Any]:
        """Which weights serve, and how drafts fared under the last versions."""
        stats = desk.client.stats
        return {**describe_weights(stats), "num_weight_updates": stats.num_weight_updates}


def _read_name(fields: Fields) -> ReadWeights:
    num_values = fields.integer("truncate_size", 100, 1, _MAX_VALUES)
    assert num_values is not None
    return ReadWeights(new_id(), read_name(fields, "name"), num_values)


def _read_check(fields: Fields) -> CheckWeights:
    return CheckWeights(new_id(), _ACTION_NAMES[read_choice(fields, "action", tuple(_ACTION_NAMES))])


def _read_compare(fields: Fields) -> tuple[CheckWeights, Any]:
    baseline = fields.value("baseline")
    if not isinstance(baseline, dict | str | None):
        raise InvalidRequest(
            f"baseline is {shown(baseline)}, it must be checksums by name, or the checksum of them all", "baseline"
        )
    return _read_check(fields), baseline


def _read_rename(fields: Fields) -> tuple[SetVersion, bool]:
    name = "new_version" if fields.has("new_version") else "weight_version"
    version = read_version(fields, name)
    if version is None:
        raise InvalidRequest("new_version is missing, it must be what the weights are to be called", "new_version")
    return SetVersion(new_id(), version), fields.boolean("abort_all_requests", name == "new_version")


def _find_different(baseline: dict[str, Any] | str, found: dict[str, Any]) -> list[str]:
    """What is not as the baseline says, by name; * is all."""
    if isinstance(baseline, str):
        return [] if baseline == found["checksum"] else ["*"]
    ours = found["checksums"]
    return [name for name in sorted({*baseline, *ours}) if baseline.get(name) != ours.get(name)]


def _describe(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    count = "1 weight differs" if len(names) == 1 else f"{len(names)} weights differ"
    return f"{count} from the snapshot: {', '.join(names[:_MAX_NAMED])}{more}"
