"""Log lines, as text for people or as JSON for machines. A record's `fields` are its figures, by name. No torch."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_TEXT = "%(asctime)s %(levelname)s %(message)s"


def set_up_log(level: str, form: str) -> None:
    """Write everything of `level` and above to stderr. `form` is text or json."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def log_fields(log: logging.Logger, level: int, message: str, fields: Mapping[str, Any]) -> None:
    """One line of `message` and figures. Figures that are None are left out."""
    log.log(level, message, extra={"fields": {name: value for name, value in fields.items() if value is not None}})


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO message name=value ...`"""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line without a traceback."""
        fields = getattr(record, "fields", {})
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in fields.items())


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, the figures, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
