"""The HTTP routes. Each handler is a few lines; what they do is in the module named after the endpoint."""

import importlib.metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.chat import answer_chat
from server.api.completions import answer_completion
from server.api.error_bodies import error_response, install_error_handlers
from server.api.fields import shown
from server.api.services import Services
from server.errors import NotFound

# What a checkout says that nobody has installed.
_NO_VERSION = "0+checkout"


def build_app(services: Services) -> FastAPI:
    """The application that serves `services`."""
    app = FastAPI(title="Tandem", version=_read_version())
    install_error_handlers(app)
    _add_generation_routes(app, services)
    _add_model_routes(app, services)
    _add_status_routes(app, services)
    return app


def _add_generation_routes(app: FastAPI, services: Services) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """A chat message, whole or streamed."""
        return await answer_chat(request, services)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continuations of prompts, whole or streamed."""
        return await answer_completion(request, services)


def _add_model_routes(app: FastAPI, services: Services) -> None:
    card = _model_card(services)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model of this server."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_id:path}")
    async def show_model(model_id: str) -> dict[str, Any]:
        """The model by name."""
        if model_id != services.model_name:
            raise NotFound(f"The model {shown(model_id)} does not exist; this server has {services.model_name!r}")
        return card


def _add_status_routes(app: FastAPI, services: Services) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while requests are admitted, 503 once the engine has gone or the server drains."""
        failure = services.client.failure
        return Response() if failure is None else error_response(failure)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of the server."""
        return {"version": app.version}


def _read_version() -> str:
    try:
        return importlib.metadata.version("tandem")
    except importlib.metadata.PackageNotFoundError:
        return _NO_VERSION


def _model_card(services: Services) -> dict[str, Any]:
    return {
        "id": services.model_name,
        "object": "model",
        "created": services.created,
        "owned_by": "tandem",
        "root": services.model_name,
        "parent": None,
        "max_model_len": services.limits.max_model_len,
        "permission": [],
    }
