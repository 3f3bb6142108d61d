"""Sampled output follows the same law with drafts as without, for every sampling parameter (chi-square, p > 0.01)."""

import random
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2_contingency

from server.engine import Engine
from server.messages import SamplingParams
from unit_tests.checkpoints import make_checkpoint
from unit_tests.server.engines import generate, make_engine

VOCAB_SIZE = 12
PROMPT = [3, 1, 4]
MAX_TOKENS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "top_k": {"temperature": 1.2, "top_k": 4},
    "min_p": {"temperature": 1.5, "min_p": 0.15},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.0},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "logit_bias": {"logit_bias": {2: 1.5, 5: -100.0}},
    "min_tokens": {"min_tokens": 3, "stop_token_ids": (1, 2, 3)},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("law"), vocab_size=VOCAB_SIZE, num_layers=4, close_draft=True)


def sample(
    checkpoint: Path, mtp_step: int, count: int, settings: dict[str, Any]
) -> tuple[list[tuple[int, ...]], Engine]:
    """`count` unseeded outputs of one prompt."""
    engine = make_engine(checkpoint, dtype="float32", mtp_step=mtp_step, max_running_requests=250, max_model_len=32)
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **settings)
    return [tuple(tokens) for tokens in generate(engine, [PROMPT] * count, params)], engine


def compare_counts(first: Counter, second: Counter) -> float:
    """p of the hypothesis that both are samples of one law; cells expected to be rare are pooled."""
    total = first + second
    share = min(first.total(), second.total()) / total.total()
    common = [cell for cell, count in total.items() if count * share >= 10]
    table = [[counts[cell] for cell in common] for counts in (first, second)]
    for row, counts in zip(table, (first, second), strict=True):
        row.append(counts.total() - sum(row))
    columns = [column for column in zip(*table, strict=True) if sum(column)]
    return float(chi2_contingency(list(zip(*columns, strict=True))).pvalue)


@pytest.fixture(autouse=True)
def repeatable_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unseeded request draws from the operating system comes from one generator here."""
    monkeypatch.setattr(secrets, "randbits", random.Random(1).getrandbits)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_drafts_do_not_change_the_law_of_whole_outputs(checkpoint: Path, name: str) -> None:
    """One in a hundred equal laws looks different at p = 0.01: what does is drawn afresh once and must not again."""
    if measure_likeness(checkpoint, SETTINGS[name]) <= 0.01:
        assert measure_likeness(checkpoint, SETTINGS[name]) > 0.01


def measure_likeness(checkpoint: Path, settings: dict[str, Any]) -> float:
    """The smaller p of two comparisons of 20,000 outputs each: their first three tokens, and their last three, which
    came out of verify steps."""
    plain, _ = sample(checkpoint, 0, 20_000, settings)
    drafted, engine = sample(checkpoint, 3, 20_000, settings)
    assert engine.scheduler.counters.num_accepted > 1000
    parts = (slice(0, 3), slice(2, 5))
    return min(compare_counts(*(Counter(out[part] for out in one) for one in (plain, drafted))) for part in parts)


def test_the_comparison_can_tell_two_laws_apart(checkpoint: Path) -> None:
    outputs = [sample(checkpoint, 1, 1500, {"temperature": t})[0] for t in (1.0, 0.8)]
    assert compare_counts(*(Counter(out[:2] for out in one) for one in outputs)) < 1e-4


def test_unseeded_requests_differ_and_seeded_ones_repeat(checkpoint: Path) -> None:
    outputs, _ = sample(checkpoint, 1, 40, {})
    assert len(set(outputs)) > 20
    outputs, _ = sample(checkpoint, 1, 40, {"seed": 9})
    assert len(set(outputs)) == 1
