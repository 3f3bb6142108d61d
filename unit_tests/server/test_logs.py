"""A line of the log has its figures, in both forms."""

import json
import logging
import sys

import pytest

from server.logs import JsonFormatter, TextFormatter, log_fields, set_up_log


class Lines(logging.Handler):
    """Keeps what is logged, formatted."""

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(self.format(record))


@pytest.fixture
def log(request: pytest.FixtureRequest) -> logging.Logger:
    """A logger of the test's own that reaches no other handler."""
    return logging.Logger(request.node.name)


def test_figures_follow_the_message_and_absent_ones_are_left_out(log: logging.Logger) -> None:
    handler = Lines(TextFormatter("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log_fields(log, logging.INFO, "finished", {"id": "a", "status": 200, "ttft": None})
    log.info("plain %d", 5)
    assert handler.lines == ["INFO finished id=a status=200", "INFO plain 5"]


def test_a_json_line_is_one_object_with_the_figures_beside_the_message(log: logging.Logger) -> None:
    handler = Lines(JsonFormatter())
    log.addHandler(handler)
    log_fields(log, logging.WARNING, "two\nlines", {"seconds": 0.25, "id": "ä"})
    (line,) = handler.lines
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["seconds"], entry["id"], entry["level"]) == ("two\nlines", 0.25, "ä", "warning")
    assert entry["time"].endswith("+00:00")


def test_a_traceback_is_part_of_its_json_line(log: logging.Logger) -> None:
    handler = Lines(JsonFormatter())
    log.addHandler(handler)
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        log.exception("failed")
    (line,) = handler.lines
    assert "ZeroDivisionError" in json.loads(line)["exception"]


@pytest.mark.parametrize(("form", "kind"), [("text", TextFormatter), ("json", JsonFormatter)])
def test_the_root_logger_writes_the_form_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, form: str, kind: type[logging.Formatter]
) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    set_up_log("error", form)
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    assert type(handler.formatter) is kind
    assert root.level == logging.ERROR
