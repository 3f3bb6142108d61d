"""An OpenAI-compatible server that says what a test wants."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], tuple[str, str, int]]


class FakeServer(ThreadingHTTPServer):
    """Answers both endpoints with the (text, finish reason, output tokens) that `reply` gives for a request's body."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Reply, metrics: Callable[[], str | None] = lambda: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.metrics = reply, metrics
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, json.dumps({"data": [{"id": "fake"}]}))
        else:
            text = self.server.metrics() if self.path == "/metrics" else None
            self._send(404 if text is None else 200, text or "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, body))
        text, finish_reason, num_tokens = self.server.reply(body)
        if finish_reason == "refuse":
            return self._send(400, json.dumps({"error": {"message": text}}))
        said = {"message": {"content": text}} if "messages" in body else {"text": text}
        usage = {"completion_tokens": num_tokens}
        return self._send(200, json.dumps({"choices": [{**said, "finish_reason": finish_reason}], "usage": usage}))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def asked_number(body: dict[str, Any]) -> int:
    """The n of "What is n times 1000?", the last question of a request."""
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return int(text.rpartition("What is ")[2].split()[0])


def right_answer(body: dict[str, Any]) -> tuple[str, str, int]:
    return f" That is {asked_number(body)},000.\n#### {asked_number(body)}000", "stop", 10
