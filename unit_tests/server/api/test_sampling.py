"""The checkpoint's own defaults."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.api.fields import Fields, known_fields
from server.api.sampling import (
    Limits,
    choice_sampling,
    read_defaults,
    read_generation_config,
    read_max_tokens,
    read_num_logprobs,
)
from server.errors import CheckpointError, ConfigError, InvalidRequest
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


@pytest.mark.parametrize(("max_logprobs", "expected"), [(12, 12), (50, 12), (11, None)])
def test_minus_one_is_the_whole_vocabulary_where_so_many_may_be_asked_for(
    max_logprobs: int, expected: int | None
) -> None:
    limits = Limits(max_model_len=9, vocab_size=12, mtp_step=0, defaults=SamplingParams(), max_logprobs=max_logprobs)
    fields = Fields(known_fields("logprobs"), b'{"logprobs": -1}')
    if expected is not None:
        assert read_num_logprobs(fields, "logprobs", limits) == expected
        return
    with pytest.raises(InvalidRequest, match=r"logprobs is -1, all 12 tokens; the limit is 11 \(--max-logprobs\)"):
        read_num_logprobs(fields, "logprobs", limits)


def test_no_token_may_be_asked_for_where_the_caller_says_so() -> None:
    limits = Limits(max_model_len=9, vocab_size=12, mtp_step=0, defaults=SamplingParams())
    fields = Fields(known_fields("max_tokens", "min_tokens"), b'{"max_tokens": 0}')
    assert read_max_tokens(fields, ("max_tokens",), 5, limits, least=0) == 0
    with pytest.raises(InvalidRequest, match=r"1\.\.9"):
        read_max_tokens(fields, ("max_tokens",), 5, limits)


def test_choices_of_different_seeds_do_not_collide() -> None:
    seeds = [choice_sampling(SamplingParams(seed=seed), i).seed for seed in range(-20, 20) for i in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds if seed is not None)


def test_without_a_seed_every_choice_draws_its_own() -> None:
    assert choice_sampling(SamplingParams(), 3).seed is None


@pytest.mark.parametrize(
    ("source", "overrides", "expected"),
    [
        ("auto", {}, SamplingParams(temperature=0.6)),
        ("none", {}, SamplingParams()),
        ("vllm", {"top_k": 5}, SamplingParams(top_k=5)),
        ("auto", {"temperature": 0.1, "min_p": 0.2}, SamplingParams(temperature=0.1, min_p=0.2)),
        ("auto", {"temperature": None}, SamplingParams(temperature=0.6)),
        ("other", {}, SamplingParams(top_p=0.5)),
    ],
)
def test_defaults_come_from_where_the_settings_say(
    tmp_path: Path, source: str, overrides: dict[str, Any], expected: SamplingParams
) -> None:
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    for directory, content in ((checkpoint, '{"temperature": 0.6}'), (other, '{"top_p": 0.5}')):
        directory.mkdir()
        (directory / "generation_config.json").write_text(content)
    assert read_defaults(checkpoint, str(other) if source == "other" else source, overrides) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"temperature": 3}, "--override-generation-config: temperature is 3, it must be in [0, 2]"),
        ({"top_p": "x"}, "--override-generation-config: top_p is 'x', it must be a number"),
        (
            {"temprature": 1},
            "--override-generation-config has temprature, the fields that have defaults are temperature",
        ),
    ],
)
def test_an_override_that_is_no_default_is_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_defaults(tmp_path, "auto", overrides)
    assert message in caught.value.message
