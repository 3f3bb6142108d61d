"""The HTTP routes. Each handler is a few lines; what they do is in the module named after the endpoint."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from server.api.aborts import add_abort_routes
from server.api.access import KeyGuard
from server.api.anthropic_messages import add_anthropic_routes
from server.api.chat import answer_chat
from server.api.completions import answer_completion
from server.api.error_bodies import ANSWER_ID_HEADERS, install_error_handlers
from server.api.exchange import Exchange, ExchangeRecorder, log_exchange
from server.api.fields import shown
from server.api.generate import add_generate_routes
from server.api.generate_tokens import add_token_routes
from server.api.invocations import answer_invocation
from server.api.openapi import GENERATION_ERRORS, operation, path_parameter
from server.api.playground_page import add_playground_routes
from server.api.responses import add_response_routes
from server.api.rl.routes import RL_PATHS, add_rl_routes
from server.api.schemas import (
    ANY_ANSWER,
    ANY_REQUEST,
    CHAT_COMPLETION,
    CHAT_REQUEST,
    COMPLETION,
    COMPLETION_REQUEST,
    MODEL,
    MODEL_LIST,
)
from server.api.services import Services
from server.api.status import add_status_routes
from server.api.tokenization import add_tokenizer_routes
from server.errors import NotFound
from server.versions import read_version


def build_app(services: Services, observers: Sequence[Callable[[Exchange], None]] = ()) -> FastAPI:
    """The application that serves `services`. `observers` are told of every exchange, like the log and the metrics."""
    app = FastAPI(title="Tandem", version=read_version(), redirect_slashes=False)
    app.root_path = services.config.root_path
    install_error_handlers(app)
    _add_middleware(app, services, observers)
    _add_generation_routes(app, services)
    _add_other_routes(app, services)
    _add_model_routes(app, services)
    add_status_routes(app, services)
    if services.config.enable_rl:
        add_rl_routes(app, services)
    add_playground_routes(app)
    return app


def _add_middleware(app: FastAPI, services: Services, observers: Sequence[Callable[[Exchange], None]]) -> None:
    """The last that is added sees a request first. Refusals too must be readable for pages of other origins, and
    recorded."""
    config = services.config
    if config.api_key or config.admin_api_key:
        app.add_middleware(KeyGuard, keys=config.api_key, admin_key=config.admin_api_key, admin_paths=RL_PATHS)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=ANSWER_ID_HEADERS,
        )
    log = () if config.disable_log_requests else (log_exchange,)
    count = partial(_count_exchange, services)
    app.add_middleware(ExchangeRecorder, observers=(count, *log, *observers))


def _count_exchange(services: Services, exchange: Exchange) -> None:
    services.metrics.observe_http(exchange.method, exchange.route, exchange.status, exchange.seconds)


def _add_generation_routes(app: FastAPI, services: Services) -> None:
    @app.post(
        "/v1/chat/completions",
        **operation(request=CHAT_REQUEST, answer=CHAT_COMPLETION, streams=True, errors=GENERATION_ERRORS),
    )
    async def chat_completions(request: Request) -> Response:
        """A chat message, whole or streamed."""
        return await answer_chat(request, services)

    @app.post(
        "/v1/completions",
        **operation(request=COMPLETION_REQUEST, answer=COMPLETION, streams=True, errors=GENERATION_ERRORS),
    )
    async def completions(request: Request) -> Response:
        """Continuations of prompts, whole or streamed."""
        return await answer_completion(request, services)

    @app.post(
        "/invocations",
        **operation(request=ANY_REQUEST, answer=ANY_ANSWER, streams=True, errors=GENERATION_ERRORS),
    )
    async def invocations(request: Request) -> Response:
        """A chat message, or continuations of prompts."""
        return await answer_invocation(request, services)


def _add_other_routes(app: FastAPI, services: Services) -> None:
    """The APIs of others, and what goes with generating."""
    add_response_routes(app, services)
    add_anthropic_routes(app, services)
    add_generate_routes(app, services)
    add_token_routes(app, services)
    add_abort_routes(app, services)
    add_tokenizer_routes(app, services)


def _add_model_routes(app: FastAPI, services: Services) -> None:
    cards = {name: _model_card(services, name) for name in services.model_names}

    @app.get("/v1/models", **operation(answer=MODEL_LIST))
    async def list_models() -> dict[str, Any]:
        """The one model of this server, under each of its names."""
        ends = {"first_id": services.model_names[0], "last_id": services.model_names[-1]}
        return {"object": "list", "data": list(cards.values()), "has_more": False, **ends}

    @app.get(
        "/v1/models/{model_id:path}",
        **operation(answer=MODEL, errors=[NotFound], parameters=[path_parameter("model_id")]),
    )
    async def show_model(request: Request) -> dict[str, Any]:
        """The model by name."""
        name = request.path_params["model_id"]
        if name not in cards:
            raise NotFound(f"The model {shown(name)} does not exist; this server has {services.model_name!r}")
        return cards[name]


def _model_card(services: Services, name: str) -> dict[str, Any]:
    """In OpenAI's form and Anthropic's, whose clients ask at the same place."""
    return {
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(services.created, UTC).isoformat(),
        "id": name,
        "object": "model",
        "created": services.created,
        "owned_by": "tandem",
        "root": services.model_name,
        "parent": None,
        "max_model_len": services.limits.max_model_len,
        "permission": [],
    }
