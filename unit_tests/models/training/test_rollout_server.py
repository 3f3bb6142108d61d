"""The client of a rollout server, against an HTTP server that remembers what it was asked."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from models.training.rollout_server import RolloutServer, ServerRefused

SAMPLE = {
    "text": "",
    "output_ids": [5, 6, 7],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 3},
        "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None], [-2.5, 7, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
    },
}


class FakeServer(HTTPServer):
    """Answers every path with what `answers` has for it, and keeps what came."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict = {}
        self.asked: list = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body):
        self.server.asked.append((self.path, body, self.headers.get("authorization")))
        status, answer = self.server.answers.get(self.path, (200, {"success": True, "message": "done"}))
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fake():
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_samples_have_tokens_logprobs_and_spans(fake):
    fake.answers["/generate"] = 200, [SAMPLE, SAMPLE]
    samples = RolloutServer(fake.url + "/").generate([1, 2], {"temperature": 1.0}, 2, 9)
    path, body, key = fake.asked[0]
    params = {"temperature": 1.0, "n": 2, "sampling_seed": 9}
    assert (path, key) == ("/generate", None)
    assert body == {"input_ids": [1, 2], "sampling_params": params, "return_logprob": True}
    assert len(samples) == 2
    assert samples[0].prompt_ids == [1, 2]
    assert samples[0].output_ids == [5, 6, 7]
    assert samples[0].logprobs == [-0.5, -1.5, -2.5]
    assert samples[0].versions == [("3", 0, 2), ("4", 2, 3)]
    assert samples[0].oldest_version == "3"
    assert samples[0].finish_reason == "length"


def test_one_sample_comes_without_a_list(fake):
    fake.answers["/generate"] = 200, SAMPLE
    assert len(RolloutServer(fake.url).generate([1], {})) == 1
    assert fake.asked[0][1]["sampling_params"] == {"n": 1}


def test_a_server_without_versions_is_told_how_to_start(fake):
    meta = {name: value for name, value in SAMPLE["meta_info"].items() if name != "weight_versions"}
    fake.answers["/generate"] = 200, {**SAMPLE, "meta_info": meta}
    with pytest.raises(ServerRefused, match=r"'weight_versions'.*--enable-rl"):
        RolloutServer(fake.url).generate([1], {})


def test_every_verb_is_asked_for_by_its_name_and_fields(fake):
    fake.answers["/weights_checker"] = 200, {"success": True, "message": "", "checksum": "abc"}
    fake.answers["/model_info"] = 200, {"weight_version": "7"}
    server = RolloutServer(fake.url, "secret")
    server.pause("retract")
    server.resume()
    server.pull_weights("http://trainer:1", 2, "wait")
    server.update_from_disk(Path("/dir"), "5")
    server.join_group("host", 29, 2, "g")
    server.update_from_group({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, "g", "6")
    server.leave_group("g")
    assert server.checksum() == "abc"
    assert server.read_info()["weight_version"] == "7"
    place = {"master_address": "host", "master_port": 29, "rank_offset": 1, "world_size": 2}
    tensors = {"names": ["w"], "dtypes": ["bfloat16"], "shapes": [[2, 3]]}
    assert [(path, body) for path, body, _ in fake.asked] == [
        ("/pause_generation", {"mode": "retract"}),
        ("/continue_generation", {}),
        ("/pull_weights", {"url": "http://trainer:1", "num_streams": 2, "in_flight": "wait"}),
        ("/update_weights_from_disk", {"model_path": "/dir", "weight_version": "5"}),
        ("/init_weights_update_group", {**place, "group_name": "g", "backend": "gloo"}),
        ("/update_weights_from_distributed", {**tensors, "group_name": "g", "weight_version": "6"}),
        ("/destroy_weights_update_group", {"group_name": "g"}),
        ("/weights_checker", {"action": "checksum"}),
        ("/model_info", None),
    ]
    assert {key for _, _, key in fake.asked} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"success": False, "message": "wrong base"}), "answers 400: .*wrong base"),
        ((200, {"success": False, "message": "wrong base"}), "refuses: wrong base"),
        ((404, b"nothing"), "answers 404: nothing"),
        ((200, b"<html>"), "answers without JSON"),
    ],
)
def test_a_refusal_is_an_error_with_what_was_said(fake, answer, message):
    fake.answers["/pull_weights"] = answer
    with pytest.raises(ServerRefused, match=message):
        RolloutServer(fake.url).pull_weights("http://trainer:1")


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ServerRefused, match=r"cannot reach http://127\.0\.0\.1:1/model_info: .*is the server running"):
        RolloutServer("http://127.0.0.1:1").read_info()
