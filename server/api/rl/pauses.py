"""Pausing and going on, by SGLang's names and vLLM's, and forgetting prefixes.

While the engine is paused requests that come wait, and lose nothing but time.
"""

from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.fields import Fields
from server.api.openapi import Schema, nullable, operation
from server.api.rl.desk import SUCCESS, Desk, Form, new_id, success
from server.api.rl.update_fields import read_choice
from server.control import PAUSE_MODES, Control, FlushCache, Pause, Resume

# SGLang calls it in place.
_MODES = {**{mode: mode for mode in PAUSE_MODES}, "in_place": "keep"}
_MAX_FLUSH_SECONDS = 3600.0
MODE: Schema = {"type": ["string", "null"], "enum": [*_MODES, None]}
_NOTHING = Form()
_PAUSE_GENERATION = Form(mode=MODE)
_PAUSE = Form(mode=MODE, clear_cache=nullable("boolean"))
_FLUSH = Form(timeout=nullable("number", minimum=0, maximum=_MAX_FLUSH_SECONDS))
_RESET = Form(reset_running_requests=nullable("boolean"))
_STATUS: Schema = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
_IS_PAUSED: Schema = {"type": "object", "required": ["is_paused"], "properties": {"is_paused": {"type": "boolean"}}}


def add_pause_routes(app: FastAPI, desk: Desk) -> None:
    """POST /pause_generation, /continue_generation, /pause, /resume, /flush_cache and /reset_prefix_cache, and GET
    /is_paused."""
    _add_sglang_routes(app, desk)
    _add_vllm_routes(app, desk)
    _add_cache_routes(app, desk)


def read_mode(fields: Fields) -> str:
    """What becomes of requests that run, by any of its names; they are aborted unless the request says. Raises
    InvalidRequest."""
    return _MODES[read_choice(fields, "mode", tuple(_MODES))]


def _add_sglang_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/pause_generation", **_PAUSE_GENERATION.describe(True, True, SUCCESS))
    async def pause_generation(request: Request) -> Response:
        """Make no more tokens. By `mode` requests that run end with what they have (abort), go back to the queue and
        are computed anew (retract), stay where they are (in_place), or end by themselves first (wait)."""

        async def act(command: Control) -> dict[str, Any]:
            return success("Generation paused successfully.", status="ok", **await desk.carry_out(command))

        return await desk.answer_plainly(
            request, _PAUSE_GENERATION, lambda fields: Pause(new_id(), read_mode(fields)), act
        )

    @app.post("/continue_generation", **_NOTHING.describe(True, True, SUCCESS))
    async def continue_generation(request: Request) -> Response:
        """Go on."""

        async def act(command: Control) -> dict[str, Any]:
            await desk.carry_out(command)
            return success("Generation continued successfully.", status="ok")

        return await desk.answer_plainly(request, _NOTHING, lambda _: Resume(new_id()), act)


def _add_vllm_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/pause", **_PAUSE.describe(True, False, _STATUS))
    async def pause(request: Request) -> Response:
        """Make no more tokens. By `mode` requests that run end with what they have (abort), end by themselves first
        (wait), stay where they are (keep), or are computed anew (retract). Prefixes are forgotten unless `clear_cache`
        is false, or requests that stay need them."""

        async def act(asked: tuple[Pause, bool]) -> dict[str, str]:
            command, clears = asked
            await desk.carry_out(command)
            if clears:
                await desk.carry_out(FlushCache(new_id()))
            return {"status": "paused"}

        return await desk.answer(request, _PAUSE, _read_pause, act)

    @app.post("/resume", **_NOTHING.describe(True, False, _STATUS))
    async def resume(request: Request) -> Response:
        """Go on."""

        async def act(command: Control) -> dict[str, str]:
            await desk.carry_out(command)
            return {"status": "resumed"}

        return await desk.answer(request, _NOTHING, lambda _: Resume(new_id()), act)

    @app.get("/is_paused", **operation(answer=_IS_PAUSED))
    async def is_paused() -> dict[str, bool]:
        """Whether the engine is paused."""
        return {"is_paused": desk.client.stats.is_paused}


def _add_cache_routes(app: FastAPI, desk: Desk) -> None:
    @app.post("/flush_cache", **_FLUSH.describe(True, True, SUCCESS))
    @app.get("/flush_cache", **_FLUSH.describe(False, True, SUCCESS))
    async def flush_cache(request: Request) -> Response:
        """Forget every computed prefix. Fails while requests run, after `timeout` seconds of waiting for them."""

        async def act(command: Control) -> dict[str, Any]:
            await desk.carry_out(command)
            return success("Cache flushed.")

        return await desk.answer_plainly(
            request,
            _FLUSH,
            lambda fields: FlushCache(new_id(), fields.number("timeout", 0.0, 0.0, _MAX_FLUSH_SECONDS)),
            act,
        )

    @app.post("/reset_prefix_cache", **_RESET.describe(True, False, SUCCESS))
    async def reset_prefix_cache(request: Request) -> Response:
        """Forget every computed prefix. Fails while requests run, unless with `reset_running_requests` they are to be
        computed anew."""

        async def act(resets_running: bool) -> dict[str, Any]:
            retracts = resets_running and not desk.client.stats.is_paused
            if resets_running:
                await desk.carry_out(Pause(new_id(), "retract"))
            try:
                await desk.carry_out(FlushCache(new_id()))
            finally:
                if retracts:
                    await desk.carry_out(Resume(new_id()))
            return success("Cache flushed.")

        return await desk.answer(request, _RESET, lambda fields: fields.boolean("reset_running_requests", False), act)


def _read_pause(fields: Fields) -> tuple[Pause, bool]:
    mode = read_mode(fields)
    return Pause(new_id(), mode), fields.boolean("clear_cache", True) and mode != "keep"
