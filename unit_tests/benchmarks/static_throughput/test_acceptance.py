"""Accept lengths are drawn, replayed and forced as their files and rates say."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.static_throughput.acceptance import (
    REAL,
    Acceptance,
    ForcedAcceptance,
    choose_acceptances,
    read_trace,
)


def lengths(acceptance: Acceptance, *counts: int) -> list[list[int]]:
    drawn = acceptance.draw(*counts)
    assert drawn is not None
    return [lens.tolist() for lens in drawn]


def test_a_rate_gives_its_geometric_mean_and_the_same_lengths_again() -> None:
    rate = Acceptance("0.8", rate=0.8)
    drawn = lengths(rate, 4000, 2, 3)
    assert drawn == lengths(rate, 4000, 2, 3) and drawn[7:9] == lengths(rate, 2, 2, 3, 7)
    mean = sum(map(sum, drawn)) / 8000
    assert mean == pytest.approx(1 + 0.8 + 0.64 + 0.512, rel=0.03)
    assert [one for one, _ in drawn] != [other for _, other in drawn]
    assert lengths(Acceptance("1", rate=1.0), 1, 1, 3) == [[4]] and lengths(Acceptance("0", rate=0.0), 1, 1, 3) == [[1]]


def test_requests_replay_a_trace_from_different_places_and_cut_it_at_what_a_step_emits() -> None:
    trace = Acceptance("trace", trace=(1, 2, 3, 4))
    assert lengths(trace, 5, 2, 3) == [[1, 3], [2, 4], [3, 1], [4, 2], [1, 3]]
    assert lengths(trace, 2, 2, 3, 3) == [[4, 2], [1, 3]]
    assert lengths(trace, 4, 1, 1) == [[1], [2], [2], [2]]


def test_without_drafts_and_where_they_decide_nothing_is_forced() -> None:
    assert REAL.draw(3, 2, 3) is None and Acceptance("1", rate=1.0).draw(3, 2, 0) is None


@pytest.mark.parametrize("text", ["1\n4\n\n2\n", "[1, 4, 2]", " [1,4,2]\n"])
def test_a_trace_is_a_list_or_lines(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    assert read_trace(path) == (1, 4, 2)
    assert choose_acceptances([0.5], path) == [Acceptance("0.5", 0.5), Acceptance("trace", trace=(1, 4, 2))]
    assert choose_acceptances([], None) == [REAL]


@pytest.mark.parametrize("text", ["", "1\nx\n", "0\n", "[1.5]", "[1, ", "[]"])
def test_what_is_no_trace_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(SystemExit, match="--acceptance-trace") as error:
        read_trace(path)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="cannot be read"):
        read_trace(tmp_path / "missing")


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(SystemExit, match=r"0\.\.1"):
        choose_acceptances([rate], None)


@dataclass(frozen=True)
class Sampled:
    token_ids: list[int]
    accept_lens: torch.Tensor
    match_lens: torch.Tensor


class FakeSampler:
    """Accepts one token of every request."""

    def sample(self, logits: torch.Tensor, forward: Any, batch: Any) -> Sampled:
        ones = torch.ones(2, dtype=torch.int64)
        return Sampled([7, 8], ones, ones)


def test_forced_lengths_replace_those_of_verify_steps_alone_and_repeat() -> None:
    sampler = FakeSampler()
    forced = ForcedAcceptance(sampler)
    verify, prefill, nothing = SimpleNamespace(is_verify=True), SimpleNamespace(is_verify=False), torch.zeros(0)
    assert sampler.sample(nothing, None, verify).accept_lens.tolist() == [1, 1]
    forced.force([torch.tensor([3, 1]), torch.tensor([2, 4])])
    assert sampler.sample(nothing, None, prefill).accept_lens.tolist() == [1, 1]
    steps = [sampler.sample(nothing, None, verify) for _ in range(3)]
    assert [step.accept_lens.tolist() for step in steps] == [[3, 1], [2, 4], [3, 1]]
    assert steps[0].match_lens.tolist() == [3, 1] and steps[0].token_ids == [7, 8] and forced.num_steps == 3
    forced.force(None)
    assert sampler.sample(nothing, None, verify).accept_lens.tolist() == [1, 1]
