"""What can go wrong, by name, with its HTTP status.

Every message says what was seen, what the limit is and how to mend it. Knows neither HTTP libraries nor torch.
"""


class TandemError(Exception):
    """The parent of every error a user can cause or see.

    `status` is the HTTP status, `type` the OpenAI error type, `param` the request field at fault, if any.
    """

    status = 500
    type = "InternalServerError"

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(TandemError):
    """A field of the request is missing, of the wrong type or out of range."""

    status = 400
    type = "BadRequestError"


class GrammarUnavailable(InvalidRequest):
    """The time, the memory or the tokenizer for a grammar is at fault, not its text: another time it may be served."""


class Unauthorized(TandemError):
    """The request brings none of the keys of `--api-key`."""

    status = 401
    type = "AuthenticationError"


class NotFound(TandemError):
    """The model or route does not exist."""

    status = 404
    type = "NotFoundError"


class Conflict(TandemError):
    """The state of the server does not allow it now: another weight session is open, or none is."""

    status = 409
    type = "ConflictError"


class QueueFull(TandemError):
    """More requests are waiting than `--max-queue` admits."""

    status = 429
    type = "RateLimitError"


class RequestTimeout(TandemError):
    """The request's time (`timeout`, or `--request-timeout`) was over before its first token, or it took the client
    longer than `--client-timeout` to send it."""

    status = 408
    type = "TimeoutError"


class ModelFailure(TandemError):
    """The model gave logits that are not finite for this request, twice: its output cannot be trusted."""


class EngineDead(TandemError):
    """The engine process has gone or the server is draining; requests cannot be served."""

    status = 503
    type = "ServiceUnavailableError"


class ConfigError(TandemError):
    """A start-up setting does not fit the machine, the checkpoint or another setting."""


class CheckpointError(ConfigError):
    """The checkpoint cannot be served: the message names the file or tensor and the mend."""
