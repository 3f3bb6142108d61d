"""The checkpoint's own defaults."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.api.fields import Fields, known_fields
from server.api.sampling import Limits, choice_sampling, read_generation_config, read_num_logprobs
from server.errors import CheckpointError
from server.messages import SamplingParams


def _write(directory: Path, content: Any) -> Path:
    (directory / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_a_checkpoint_without_a_generation_config_has_plain_defaults(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == SamplingParams()


def test_the_sampling_fields_of_a_generation_config_are_defaults_and_the_others_are_ignored(tmp_path: Path) -> None:
    content = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2], "do_sample": True, "min_p": None}
    assert read_generation_config(_write(tmp_path, content)) == SamplingParams(temperature=0.6, top_p=0.95, top_k=20)


@pytest.mark.parametrize("content", [{"temperature": "hot"}, {"top_p": 7}, "{", "[]"])
def test_a_broken_generation_config_is_a_checkpoint_error_that_names_the_file(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_generation_config(_write(tmp_path, content))


def test_no_more_alternatives_are_asked_for_than_the_vocabulary_has() -> None:
    limits = Limits(max_model_len=9, vocab_size=12, mtp_step=0, defaults=SamplingParams())
    for body, expected in ((b'{"logprobs": 20}', 12), (b'{"logprobs": 3}', 3), (b"{}", None)):
        assert read_num_logprobs(Fields(known_fields("logprobs"), body), "logprobs", limits) == expected


def test_choices_of_different_seeds_do_not_collide() -> None:
    seeds = [choice_sampling(SamplingParams(seed=seed), i).seed for seed in range(-20, 20) for i in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds if seed is not None)


def test_without_a_seed_every_choice_draws_its_own() -> None:
    assert choice_sampling(SamplingParams(), 3).seed is None
