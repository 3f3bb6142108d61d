"""Times of updates: every way brings the weights, and its line says what it was."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.training.publisher import Publisher
from models.training.rl import commit_times
from models.training.rl.commit_times import WAYS, main, measure
from models.weight_update import combine_checksums, hash_tensor
from unit_tests.models.training.mtp_checks import checkpoint
from unit_tests.models.training.rl.fake_server import FakeServer
from unit_tests.models.training.rl.recipes import tiny_recipe


class Reading(FakeServer):
    """Reads files, too."""

    def pull_weights(self, publisher_url, num_streams=4, in_flight="keep"):
        return {**super().pull_weights(publisher_url, num_streams), "commit_seconds": 0.25}

    def update_from_disk(self, path, version):
        self.tensors, self.version = load_file(path / "model.safetensors"), version
        return {"success": True, "commit_seconds": 0.25}


def test_all_ways_bring_the_newest_weights(tmp_path):
    server = Reading(tiny_recipe("bfloat16"))
    found = []
    with Publisher(full_sync_interval=0) as publisher:
        for line in measure(checkpoint("bfloat16"), server, publisher, tmp_path, 2, list(WAYS)):
            checksums = {name: hash_tensor(tensor) for name, tensor in server.tensors.items() if tensor.numel()}
            assert combine_checksums(checksums) == publisher.version.result_sha256
            assert line["end"] >= line["begin"]
            assert line["commit_seconds"] == 0.25
            assert line["num_bytes"] == sum(tensor.nbytes for tensor in publisher.version.tensors.values())
            found.append((line["way"], line["mode"], line["round"]))
    modes = {"full": "full", "delta": "delta", "shared memory": "file", "disk": "file"}
    assert found == [(way, modes[way], number) for number in range(2) for way in WAYS]
    assert {tensor.dtype for tensor in server.tensors.values()} == {torch.bfloat16}


def test_the_command_line_prints_a_line_per_update(monkeypatch, capsys):
    monkeypatch.setattr(commit_times, "RolloutServer", lambda url, key: Reading(tiny_recipe("bfloat16")))
    main(["--server", "x", "--model", str(checkpoint("bfloat16")), "--rounds", "1", "--ways", "full", "delta"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["way"] for line in lines] == ["full", "delta"]


def test_a_server_that_is_not_there_ends_it_with_the_reason(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--server", "http://127.0.0.1:1", "--model", str(checkpoint("bfloat16"))])
    assert caught.value.code == 2
    assert "cannot reach" in capsys.readouterr().err
