"""The routes that tell how the server is, to people, probes, load balancers and Prometheus."""

import dataclasses
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.api.error_bodies import error_response
from server.api.openapi import operation
from server.api.services import Services
from server.errors import EngineDead, QueueFull
from server.messages import EngineStats
from server.versions import read_versions

_GENERATES_WITHIN = 5.0


def add_status_routes(app: FastAPI, services: Services) -> None:
    """GET /health, /health_generate, /ping, /ready, /load, /metrics, /version, /server_info, /model_info and
    /get_weight_version."""
    _add_probes(app, services)
    _add_figures(app, services)
    _add_descriptions(app, services)


def _add_probes(app: FastAPI, services: Services) -> None:
    client = services.client

    @app.head("/ping", include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.get("/ping", **operation(content_type=None, errors=[EngineDead]))
    @app.get("/health", **operation(content_type=None, errors=[EngineDead]))
    async def health(request: Request) -> Response:
        """200 while the engine serves, 503 before the model is loaded and once the engine has gone or the server
        drains."""
        return Response() if client.failure is None else error_response(client.failure, request.scope)

    @app.get("/health_generate", **operation(content_type=None, errors=[EngineDead]))
    async def health_generate() -> Response:
        """200 once the engine has generated a token, 503 if it does not within a few seconds."""
        await client.check_generates(_GENERATES_WITHIN)
        return Response()

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", **operation(content_type=None, errors=[EngineDead, QueueFull]))
    async def ready() -> Response:
        """200 while one more request is admitted."""
        client.check_room(1)
        return Response()


def _add_figures(app: FastAPI, services: Services) -> None:
    @app.get("/load", **operation())
    async def load() -> dict[str, int]:
        """Requests in the server: all, and those that run and wait in the engine."""
        stats = services.client.stats
        return {
            "server_load": services.client.num_in_flight,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
        }

    @app.get("/metrics", **operation(content_type=CONTENT_TYPE_LATEST))
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", **operation())
    async def version() -> dict[str, str]:
        """The version of the server."""
        return {"version": app.version}


def _add_descriptions(app: FastAPI, services: Services) -> None:
    """What is served, also under SGLang's older names."""

    @app.get("/get_server_info", **operation())
    @app.get("/server_info", **operation())
    async def server_info() -> Response:
        """What is served, with which settings, in how much memory, by which versions."""
        return Response(msgspec.json.encode(describe_server(services)), media_type="application/json")

    @app.get("/get_model_info", **operation())
    @app.get("/model_info", **operation())
    async def model_info() -> dict[str, Any]:
        """Where the model and its tokenizer come from, that it generates, and which weights serve."""
        directory = services.engine_config.model
        return {
            "model_path": directory,
            "tokenizer_path": directory,
            "is_generation": True,
            **describe_weights(services.client.stats),
        }

    @app.get("/get_weight_version", **operation())
    async def get_weight_version() -> dict[str, str]:
        """What the weights that serve are called."""
        return {"weight_version": services.client.stats.weight_version}


def describe_weights(stats: EngineStats) -> dict[str, Any]:
    """The versions that serve, and drafts proposed and accepted per position under each of the newest."""
    return {
        "weight_version": stats.weight_version,
        "mtp_weight_version": stats.mtp_weight_version,
        "mtp_stale": stats.mtp_stale,
        "drafts_by_version": {
            version: {"proposed": proposed, "accepted": accepted}
            for version, (proposed, accepted) in stats.drafts_by_version.items()
        },
    }


def describe_server(services: Services) -> dict[str, Any]:
    """What a report about this server should have; no secrets."""
    ready = dataclasses.asdict(services.client.ready)
    return {
        "model_names": list(services.model_names),
        "created": services.created,
        **ready,
        **describe_weights(services.client.stats),
        "settings": {**_settings(services.engine_config), **_settings(services.config)},
        "versions": read_versions(),
    }


def _settings(config: Any) -> dict[str, Any]:
    return {
        setting.name: getattr(config, setting.name)
        for setting in dataclasses.fields(config)
        if not setting.metadata["is_secret"]
    }
