"""Giving memory back to a trainer on the same machine and taking it again, by SGLang's names and vLLM's.

Requests that come meanwhile wait until everything is back. An engine that was paused before stays so.
"""

from typing import Any

from fastapi import FastAPI, Request, Response

from server.api.fields import Fields, shown
from server.api.openapi import Schema, nullable, operation
from server.api.rl.desk import SUCCESS, Desk, Form, new_id, success
from server.api.rl.pauses import MODE, read_mode
from server.control import MEMORY_TAGS, Pause, ReleaseMemory, RestoreMemory, Resume
from server.errors import InvalidRequest, TandemError

_TAGS: Schema = {
    "type": ["array", "null"],
    "items": {"type": "string", "enum": list(MEMORY_TAGS)},
    "maxItems": len(MEMORY_TAGS),
}
# vLLM's clients know of no other tags to wake up, one after the other; graphs go and come with these.
_SLEPT, _GRAPHS = ("weights", "kv_cache"), "cuda_graph"
_RELEASE = Form(tags=_TAGS)
_SLEEP = Form(level=nullable("integer", minimum=0, maximum=2), mode=MODE)
_WAKE = Form(tags=_TAGS)
_IS_SLEEPING: Schema = {
    "type": "object",
    "required": ["is_sleeping"],
    "properties": {"is_sleeping": {"type": "boolean"}},
}


class Rest:
    """Whether memory is given back, and whether the engine was paused for that."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._num_resumes: int | None = None  # when it paused the engine

    @property
    def _has_paused(self) -> bool:
        """The engine is paused for this, and nobody has resumed it since."""
        return self._num_resumes == self._desk.num_resumes

    @property
    def is_deep(self) -> bool:
        """Some memory is given back, or the engine rests without that."""
        return bool(self._desk.client.stats.released_tags) or self._has_paused

    async def release(self, tags: tuple[str, ...], discards_weights: bool = False) -> None:
        """Give the memory of `tags` back. Raises TandemError."""
        await self._desk.carry_out(ReleaseMemory(new_id(), tags, discards_weights))

    async def pause(self, mode: str, level: int) -> None:
        """Pause the engine, and give all memory back from `level` 1 on, at level 2 for good. Raises TandemError; then
        the engine goes on."""
        desk, was_paused = self._desk, self._desk.client.stats.is_paused
        await desk.carry_out(Pause(new_id(), mode))
        if not was_paused:
            self._num_resumes = desk.num_resumes
        try:
            if level:
                await self.release(_SLEPT, discards_weights=level == 2)
        except TandemError:
            if not was_paused:
                await desk.carry_out(Resume(new_id()))
            raise

    async def restore(self, tags: tuple[str, ...]) -> None:
        """Take the memory of `tags` again, as far as it is released; with the last of it the engine goes on, if it was
        paused for this. What fails can be asked for again."""
        # No client asks for graphs that could not be made when the rest had come back.
        await self._desk.carry_out(RestoreMemory(new_id(), tuple(dict.fromkeys((*tags, _GRAPHS)))))
        if self._has_paused and not self._desk.client.stats.released_tags:
            await self._desk.carry_out(Resume(new_id()))


def add_memory_routes(app: FastAPI, desk: Desk) -> None:
    """POST /release_memory_occupation, /resume_memory_occupation, /sleep and /wake_up, and GET /is_sleeping."""
    rest = Rest(desk)

    @app.post("/release_memory_occupation", **_RELEASE.describe(True, True, SUCCESS))
    async def release_memory_occupation(request: Request) -> Response:
        """Give the memory of `tags` back, of all of them by default. Fails while requests run."""

        async def act(tags: tuple[str, ...]) -> dict[str, Any]:
            await rest.release(tags)
            return success(f"The memory of {', '.join(tags)} is released.")

        return await desk.answer_plainly(request, _RELEASE, _read_tags, act)

    @app.post("/resume_memory_occupation", **_RELEASE.describe(True, True, SUCCESS))
    async def resume_memory_occupation(request: Request) -> Response:
        """Take the memory of `tags` again, of all of them by default."""

        async def act(tags: tuple[str, ...]) -> dict[str, Any]:
            await rest.restore(tags)
            return success(f"The memory of {', '.join(tags)} is back.")

        return await desk.answer_plainly(request, _RELEASE, _read_tags, act)

    _add_sleep_routes(app, desk, rest)


def _add_sleep_routes(app: FastAPI, desk: Desk, rest: Rest) -> None:
    @app.post("/sleep", **_SLEEP.describe(True, False, SUCCESS))
    async def sleep(request: Request) -> Response:
        """Pause by `mode`, and give all memory back from `level` 1 on, keeping the weights in host memory; at level 2
        they are forgotten, the draft head's too, and must be sent anew after waking up."""

        async def act(asked: tuple[int, str]) -> dict[str, Any]:
            level, mode = asked
            await rest.pause(mode, level)
            return success(f"The engine sleeps at level {level}.")

        return await desk.answer(request, _SLEEP, _read_sleep, act)

    @app.post("/wake_up", **_WAKE.describe(True, False, SUCCESS))
    async def wake_up(request: Request) -> Response:
        """Take the memory of `tags` again, of all of them by default, and go on once all of it is back."""

        async def act(tags: tuple[str, ...]) -> dict[str, Any]:
            await rest.restore(tags)
            return success("The engine sleeps on." if rest.is_deep else "The engine is awake.")

        return await desk.answer(request, _WAKE, _read_tags, act)

    @app.get("/is_sleeping", **operation(answer=_IS_SLEEPING))
    async def is_sleeping() -> dict[str, bool]:
        """Whether the engine sleeps."""
        return {"is_sleeping": rest.is_deep}


def _read_tags(fields: Fields) -> tuple[str, ...]:
    """The kinds of memory a request names, each once; all of them if it names none."""
    tags = fields.items("tags", len(MEMORY_TAGS)) or list(MEMORY_TAGS)
    for tag in tags:
        if tag not in MEMORY_TAGS:
            raise InvalidRequest(f"tags has {shown(tag)}, there are {', '.join(MEMORY_TAGS)}", "tags")
    return tuple(dict.fromkeys(tags))


def _read_sleep(fields: Fields) -> tuple[int, str]:
    level = fields.integer("level", 1, 0, 2)
    assert level is not None
    return level, read_mode(fields)
