"""What every benchmark over HTTP reads of a server: its counters under either name, with a key where it wants one."""

import pytest

from benchmarks.openai_server import Counters, Server, describe_speculation, growth
from unit_tests.benchmarks.serving.fake_server import FakeModel, metrics_text, serving


@pytest.mark.parametrize("prefix", ["vllm:", "tandem:"])
def test_acceptance_is_read_under_either_name(prefix: str) -> None:
    texts = iter([metrics_text(100, [50, 50], [7, 0], 10, prefix), metrics_text(140, [90, 80], [37, 5], 20, prefix)])
    with serving(FakeModel(metrics=lambda: next(texts))) as url:
        server = Server(url, timeout=10.0)
        grown = growth(server.read_counters(), server.read_counters())
    assert describe_speculation(grown) == {
        "drafts_per_step": 70 / 40,
        "accept_length": 1 + 35 / 40,
        "acceptance": 35 / 70,
        "acceptance_per_position": [30 / 40, 5 / 40],
    }


def test_the_accept_length_is_of_all_steps_where_those_without_drafts_are_counted() -> None:
    counts = {"num_draft_tokens": 20.0, "num_accepted_tokens": 10.0}
    prefixes = ("vllm:", "tandem:")
    both = {(f"{prefix}spec_decode_{name}_total", ""): counts[name] for prefix in prefixes for name in counts}
    both |= {("vllm:spec_decode_num_drafts_total", ""): 20.0, ("tandem:spec_decode_num_drafts_total", ""): 40.0}
    found = describe_speculation(both)
    assert (found["accept_length"], found["drafts_per_step"], found["acceptance"]) == (1.25, 0.5, 0.5)
    plain = dict.fromkeys(both, 0.0) | {("tandem:spec_decode_num_drafts_total", ""): 40.0}
    assert describe_speculation(plain)["accept_length"] == 1.0


def test_a_counter_that_was_not_there_before_grew_from_nothing() -> None:
    before: Counters = {("a", ""): 2.0}
    assert growth(before, {("a", ""): 5.0, ("b", "1"): 1.0}) == {("a", ""): 3.0, ("b", "1"): 1.0}


@pytest.mark.parametrize(("key", "header"), [("secret", "Bearer secret"), ("", None)])
def test_a_key_is_sent_as_a_bearer_token(key: str, header: str | None) -> None:
    model = FakeModel()
    with serving(model) as url:
        assert Server(url + "/v1/", 10.0, key).model == "fake"
    assert [headers.get("authorization") for headers in model.headers] == [header]
