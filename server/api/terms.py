"""On which terms the engine serves a request, apart from what it draws: how soon, how long, and with whose prefixes.

Every mistake is an InvalidRequest. Knows neither prompts nor HTTP.
"""

import sys
from dataclasses import dataclass

from server.api.fields import Fields, require_number, shown
from server.errors import InvalidRequest

TERM_FIELDS = ("priority", "timeout", "cache_salt")
MAX_SALT_CHARS = 256
_MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True)
class Terms:
    """As in `Generate`, for all choices of a request: a lower `priority` is served first, `timeout` is in seconds."""

    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""


def read_terms(fields: Fields) -> Terms:
    """The terms that a request asks for. Raises InvalidRequest."""
    return Terms(
        priority=fields.integer("priority", 0, -_MAX_PRIORITY - 1, _MAX_PRIORITY) or 0,
        timeout=_read_timeout(fields),
        cache_salt=read_salt(fields, "cache_salt"),
    )


def _read_timeout(fields: Fields) -> float | None:
    value = fields.value("timeout")
    if value is None:
        return None
    seconds = require_number("timeout", value, -sys.float_info.max, sys.float_info.max)
    if seconds <= 0:
        raise InvalidRequest(f"timeout is {shown(value)}, it must be above 0 seconds", "timeout")
    return seconds


def read_salt(fields: Fields, name: str) -> str:
    """With whom prefixes are shared, from the field `name`; "" is everybody. A salt that is there but empty is a
    client's mistake: it believes that it shares nothing."""
    salt = fields.text(name, "")
    if fields.has(name) and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise InvalidRequest(
            f"{name} has {len(salt)} characters, the range is 1..{MAX_SALT_CHARS}; leave it out to share prefixes", name
        )
    return salt
