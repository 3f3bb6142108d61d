"""transformers' contestant has the model that the checkpoint names."""

from pathlib import Path

import pytest

from benchmarks import random_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "name"), [("tiny-moe", "Qwen3_5MoeForCausalLM"), ("tiny", "Qwen3_5ForCausalLM")])
def test_the_class_is_that_of_the_checkpoint(tmp_path: Path, preset: str, name: str) -> None:
    from benchmarks.peers.transformers_child import TransformersDecoder

    random_checkpoint.write_random_checkpoint(tmp_path, preset)
    decoder = TransformersDecoder({"model": str(tmp_path), "num_threads": 1})
    assert type(decoder._model).__name__ == name
    tokens: list[list[int]] = []
    decoder.decode([[1, 2, 3], [4, 5, 6]], 2, tokens.append)
    assert [len(step) for step in tokens] == [2, 2, 2]
