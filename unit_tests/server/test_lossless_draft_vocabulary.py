"""A draft head that guesses few tokens: less is accepted, nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest

from kernels.cpu.decoder import DraftVocabulary
from server.messages import Constraint, SamplingParams
from unit_tests.checkpoints import IM_END, make_checkpoint
from unit_tests.server.engines import generate, make_engine, make_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SETTINGS = {
    "greedy": GREEDY,
    "seeded": replace(GREEDY, temperature=1, seed=5),
    "filtered": replace(GREEDY, temperature=1, seed=5, top_k=9),
    "grammar": SamplingParams(temperature=1, seed=5, max_tokens=20, constraint=Constraint("regex", "[a-f]{3,9}[0-9]*")),
}
PROMPTS = make_prompts(8, 60, 256, seed=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("vocabulary"), num_layers=4, close_draft=True)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_tokens_do_not_depend_on_what_may_be_guessed(checkpoint: Path, name: str, quantization: str) -> None:
    plain = make_engine(checkpoint, quantization=quantization)
    few = make_engine(checkpoint, quantization=quantization, mtp_step=3, draft_vocab_size=120)
    assert few.runner.draft is not None and few.runner.draft.vocabulary == DraftVocabulary(120, 256)
    assert generate(few, PROMPTS, SETTINGS[name]) == generate(plain, PROMPTS, SETTINGS[name])


@pytest.mark.parametrize("name", ["greedy", "seeded", "filtered"])
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_tokens_that_are_not_guessed_are_never_accepted_and_the_others_as_before(
    checkpoint: Path, name: str, quantization: str
) -> None:
    """At the first position, where a guess depends on no other: only those of the vocabulary are guessed right."""
    counts = []
    for size in (0, 120):
        engine = make_engine(checkpoint, quantization=quantization, mtp_step=1, draft_vocab_size=size)
        texts = generate(engine, PROMPTS, SETTINGS[name])
        share = sum(token < 120 or token >= 256 for tokens in texts for token in tokens) / sum(map(len, texts))
        counters = engine.scheduler.counters
        counts.append(counters.accepted_per_position[0] / counters.proposed_per_position[0])
    assert 0.1 < share < 0.9
    assert 0 < counts[1] < counts[0]
    assert counts[1] == pytest.approx(counts[0] * share, abs=0.12)


def test_without_a_compiler_the_same_is_guessed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted() -> list[int]:
        engine = make_engine(checkpoint, mtp_step=3, draft_vocab_size=120)
        generate(engine, PROMPTS, SETTINGS["seeded"])
        return list(engine.scheduler.counters.accepted_per_position)

    first = accepted()
    monkeypatch.setattr("models.layers.cpu_decoder.serves", lambda weight: False)
    assert accepted() == first and first[2] > 0


def test_the_end_of_a_turn_is_guessed_too(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, mtp_step=1, draft_vocab_size=40)
    draft = engine.runner.draft
    assert draft is not None
    logits = draft.compute_logits(draft.norm.scale.new_ones(2, draft.target.config.hidden_size))
    assert logits[:, :40].isfinite().all() and logits[:, IM_END].isfinite().all()
    assert (logits[:, 40 : draft.vocabulary.tail] == -float("inf")).all()
