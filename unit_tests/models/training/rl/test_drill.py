"""The drill: right servers pass, and each kind of wrong one is found."""

import json
import threading
from dataclasses import replace

import pytest

from models.training.mtp_settings import TrainingError
from models.training.publisher import Publisher, Version
from models.training.rl import drill as drill_module
from models.training.rl.drill import Drill, Sample, has_right_spans, main
from models.training.rl.policy import Policy
from models.training.rl.recipe import Actor, Mtp
from models.training.rollout_server import Rollout, ServerRefused
from unit_tests.models.training.mtp_checks import checkpoint
from unit_tests.models.training.rl.fake_server import FakeServer
from unit_tests.models.training.rl.recipes import tiny_recipe


class Patient(FakeServer):
    """Its samples end before an update begins."""

    def pull_weights(self, publisher_url, num_streams, in_flight):
        with self._lock:
            pass
        return super().pull_weights(publisher_url, num_streams)


def run(server_class, num_updates=3, modes=("retract",)):
    server = server_class(tiny_recipe())
    with Publisher() as publisher:
        policy = Policy(checkpoint("float32"), Actor(), Mtp())
        return Drill(policy, server, publisher, modes).run(num_updates, 3, 5)


def test_a_right_server_passes():
    found = run(Patient, num_updates=8)
    assert found["updates"] == 8
    assert found["transfers"] == {"full": 2, "delta": 7}  # the first, and the seventh, which changes everything
    assert found["in_flight"] == {"retract": 8}
    assert found["wrong_checksums"] == found["lost"] == []
    assert found["wrong_spans"] == 0
    assert found["compared_tokens"] == found["tokens"] == 5 * found["samples"] > 100
    assert found["finish_reasons"] == {"length": found["samples"]}
    assert found["logprob_gap"] < 1e-4


class Deaf(Patient):
    """Takes every update, and keeps the weights it has."""

    def pull_weights(self, publisher_url, num_streams, in_flight):
        self.version = str(0 if self.version is None else int(self.version) + 1)
        return {"success": True}


class Misnaming(Patient):
    """Gives every sample a version that never was."""

    def generate(self, *arguments):
        return [replace(one, versions=[("99", 0, 5)]) for one in super().generate(*arguments)]


class Losing(Patient):
    """Fails after some samples."""

    count = 0

    def generate(self, *arguments):
        self.count += 1
        if self.count > 6:
            raise ServerRefused("gone")
        return super().generate(*arguments)


def test_log_probabilities_of_other_weights_are_found():
    class Wrong(Patient):
        def generate(self, *arguments):
            samples = super().generate(*arguments)
            return [replace(one, logprobs=[value - 0.01 for value in one.logprobs]) for one in samples]

    assert run(Wrong)["logprob_gap"] == pytest.approx(0.01, rel=0.1)


def test_other_weights_than_were_sent_are_found():
    with Publisher() as publisher:
        drill = Drill(Policy(checkpoint("float32"), Actor(), Mtp()), Deaf(tiny_recipe()), publisher)
        assert drill.run(2, 2, 4)["wrong_checksums"] == ["0", "1", "2"]


def test_versions_without_a_checksum_are_not_compared(monkeypatch):
    monkeypatch.setattr(Version, "result_sha256", "")
    with Publisher() as publisher:
        drill = Drill(Policy(checkpoint("float32"), Actor(), Mtp()), Deaf(tiny_recipe()), publisher)
        assert drill.run(1, 2, 4)["wrong_checksums"] == []


def test_spans_of_other_versions_are_found():
    found = run(Misnaming)
    assert found["wrong_spans"] == found["samples"] > 0


def test_lost_requests_are_told():
    assert "gone" in run(Losing)["lost"]


def test_a_server_that_stands_still_is_an_error(monkeypatch):
    monkeypatch.setattr(drill_module, "WAIT_SECONDS", 0.05)
    release = threading.Event()

    class Standing(Patient):
        def generate(self, *arguments):
            if self.version == "1":
                release.wait(20.0)
            return super().generate(*arguments)

        def pull_weights(self, *arguments):
            if self.version == "1":
                release.set()
            return super().pull_weights(*arguments)

    timer = threading.Timer(0.5, release.set)
    timer.start()
    with pytest.raises(TrainingError, match="the server stands still"):
        run(Standing)
    timer.join()


SPANS = [
    ([("2", 0, 3)], True),
    ([("2", 0, 1), ("4", 1, 3)], True),
    ([("1", 0, 3)], False),  # older than what served when it was asked for
    ([("2", 0, 1), ("2", 1, 3)], False),
    ([("3", 0, 1), ("2", 1, 3)], False),
    ([("2", 0, 2)], False),
    ([("2", 1, 3)], False),
    ([("2", 0, 1), ("3", 2, 3)], False),
    ([("2", 0, 3), ("3", 3, 3)], False),
    ([("7", 0, 3)], False),
    ([("default", 0, 3)], False),
]


@pytest.mark.parametrize(("spans", "is_right"), SPANS)
def test_spans_must_cover_all_tokens_in_rising_versions(spans, is_right):
    rollout = Rollout([1], [5, 6, 7], [-1.0] * 3, spans, "length")
    assert has_right_spans(Sample(2, rollout), 6) is is_right


@pytest.mark.parametrize(("started", "comparable"), [(0, False), (1, True)])
def test_tokens_after_an_update_that_kept_the_cache_are_not_compared(started, comparable):
    """Version 1 came in keep mode, version 2 in retract mode."""
    with Publisher() as publisher:
        drill = Drill(Policy(checkpoint("float32"), Actor(), Mtp()), FakeServer(tiny_recipe()), publisher)
        drill.in_flight = ["abort", "keep", "retract"]
        rollout = Rollout([1], [5, 6], [-1.0] * 2, [("1", 0, 1), ("2", 1, 2)], "length")
        assert bool(drill._comparable_spans(Sample(started, rollout), 2)) is comparable


def test_the_command_line_prints_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(drill_module, "RolloutServer", lambda url, key: Patient(tiny_recipe()))
    main(["--server", "x", "--model", str(checkpoint("float32")), "--updates", "1", "--streams", "2"])
    assert json.loads(capsys.readouterr().out)["updates"] == 1


def test_a_server_that_is_not_there_ends_it_with_the_reason(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--server", "http://127.0.0.1:1", "--model", str(checkpoint("float32"))])
    assert caught.value.code == 2
    assert "cannot reach" in capsys.readouterr().err
