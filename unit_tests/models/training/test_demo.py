"""The demo checkpoint: what is saved is what a server reads, in names, sizes and stop tokens."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from models.config import parse_config
from models.registry import build
from models.stop_ids import read_stop_ids
from models.training.conversations import draw_text
from models.training.demo import Demo, describe_config, load_demo, save_checkpoint, write_problems
from models.training.demo_evaluation import (
    ask_in_chat,
    ask_plainly,
    draw_held_out,
    draw_tool_questions,
    evaluate,
)
from models.training.demo_tokenizer import CHAT_TEMPLATE, train_tokenizer
from models.training.demo_trainer import initialize

BUNDLED = Path(__file__).resolve().parents[3] / "models" / "demo"
MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An untrained checkpoint and the models it was saved from."""
    folder = tmp_path_factory.mktemp("demo")
    rng = random.Random(0)
    tokenizer = train_tokenizer((text.prompt for text in (draw_text(rng) for _ in range(50))), 512)
    config = describe_config(tokenizer)
    models = build(parse_config(config), mtp=True)
    for model in models:
        initialize(model)
    save_checkpoint(folder, Demo(config, tokenizer, *models))
    return folder, models


def test_a_saved_checkpoint_loads_to_the_same_weights_within_bfloat16(saved):
    folder, models = saved
    demo = load_demo(folder)
    for model, loaded in zip(models, (demo.target, demo.draft), strict=True):
        for (name, expected), found in zip(model.named_parameters(), loaded.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3, msg=name)


def test_matrices_are_bfloat16_vectors_float32_and_the_head_has_15_tensors(saved):
    tensors = load_file(saved[0] / "model.safetensors")
    assert sum(name.startswith("mtp.") for name in tensors) == 15
    assert all(tensor.dtype == (torch.bfloat16 if tensor.dim() > 1 else torch.float32) for tensor in tensors.values())


def test_both_stop_tokens_are_read_from_a_saved_checkpoint(saved):
    folder = saved[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stops = {tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(read_stop_ids(folder)) == stops


def test_the_bundled_checkpoint_is_small_and_complete():
    files = [path for path in BUNDLED.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert (BUNDLED / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= json.loads((BUNDLED / "config.json").read_text())["vocab_size"]


def test_the_bundled_checkpoint_solves_problems_and_drafts_well():
    demo = load_demo(BUNDLED)
    problems = draw_held_out(11, 20, min_steps=2)
    asked = {
        "chat": ([ask_in_chat(p) for p in problems], 0.95),
        "thinking": ([ask_in_chat(p, thinks=True) for p in problems], 0.9),
        "plain": ([ask_plainly(p) for p in problems], 0.95),
        "tools": (draw_tool_questions(12, 20), 0.8),
    }
    for kind, (questions, least) in asked.items():
        score = evaluate(demo.target, demo.draft, demo.tokenizer, questions)
        assert score.solved >= least, kind
        assert score.acceptance >= 0.9, kind


def test_written_problems_are_gsm8k_lines_of_two_and_three_steps(tmp_path):
    write_problems(tmp_path / "test.jsonl", 20, 3)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert all(row.keys() == {"question", "answer"} for row in rows)
    assert {row["answer"].count("<<") for row in rows} == {2, 3}


@pytest.mark.slow
def test_transformers_gives_the_same_logits_for_the_bundled_checkpoint():
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen3_5ForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    target = load_demo(BUNDLED).target
    token_ids = torch.randint(0, 1000, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(token_ids).logits
        found = target.compute_logits(target.forward_sequence(token_ids))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
