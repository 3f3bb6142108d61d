"""The bundled demo checkpoint: `python -m models.training.demo --out models/demo` trains it, `--evaluate` measures it.

A small dense Qwen3.5 with an MTP head, trained from nothing on fresh arithmetic word problems, on one CPU core. The
checkpoint has the names and files of a Hugging Face text-only export.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from models.config import parse_config, read_json
from models.qwen3_5.model import Qwen35
from models.qwen3_5_mtp.model import Qwen35MTP
from models.registry import build
from models.training.conversations import draw_text
from models.training.demo_batches import Batch, draw_batches
from models.training.demo_evaluation import (
    ask_in_chat,
    ask_plainly,
    draw_held_out,
    draw_tool_questions,
    evaluate,
)
from models.training.demo_tokenizer import find_stop_ids, save_tokenizer, train_tokenizer
from models.training.demo_trainer import TrainingSettings, initialize, train
from models.weights import export_tensors, load_weights, save_weights

VOCAB_SIZE = 1024
TOKENIZER_TEXTS = 8000
MAX_LENGTH = 4096

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 160,
    "intermediate_size": 416,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "linear_conv_kernel_dim": 4,
    "mtp_num_hidden_layers": 1,
    "max_position_embeddings": MAX_LENGTH,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}


@dataclass(frozen=True)
class Demo:
    """A checkpoint in memory: config.json's fields, tokenizer and models."""

    config: dict[str, Any]
    tokenizer: Tokenizer
    target: Qwen35
    draft: Qwen35MTP


def main() -> None:
    """Train, evaluate or write problems, as the command line says."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.num_threads)
    if arguments.write_problems:
        write_problems(arguments.write_problems, arguments.num_problems, arguments.evaluation_seed)
    elif arguments.evaluate:
        report(arguments.evaluate, arguments.num_problems, arguments.evaluation_seed)
    else:
        settings = TrainingSettings(arguments.steps, arguments.minutes, arguments.rate)
        rng = random.Random(arguments.seed)
        demo = start_demo(arguments.resume, rng, arguments.seed)
        batches = draw_batches(rng, demo.tokenizer, arguments.batch_tokens)
        train_demo(arguments.out, demo, settings, batches, arguments.seed)
        report(arguments.out, arguments.num_problems, arguments.evaluation_seed)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="where to write the checkpoint")
    parser.add_argument("--steps", type=int, default=5200, help="length of the training")
    parser.add_argument("--minutes", type=float, default=math.inf, help="limit of its wall time; shortens the plan")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a batch, padding included")
    parser.add_argument("--resume", type=Path, default=None, help="start from the checkpoint in this directory")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the training texts")
    parser.add_argument("--evaluate", type=Path, default=None, help="only measure the checkpoint in this directory")
    parser.add_argument(
        "--write-problems", type=Path, default=None, help="only write held-out problems of two and three steps there"
    )
    parser.add_argument("--num-problems", type=int, default=500, help="held-out problems of the final evaluation")
    parser.add_argument("--evaluation-seed", type=int, default=1_000_003, help="of the held-out problems")
    parser.add_argument("--num-threads", type=int, default=1, help="torch threads")
    return parser.parse_args()


def start_demo(resume: Path | None, rng: random.Random, seed: int) -> Demo:
    """Give a new checkpoint, or the one in the directory `resume`."""
    torch.manual_seed(seed)
    return load_demo(resume) if resume else create_demo(rng)


def train_demo(out: Path, demo: Demo, settings: TrainingSettings, batches: Iterator[Batch], seed: int) -> None:
    """Train; the checkpoint in `out` is renewed at every evaluation and at the end."""
    questions = [ask_in_chat(problem) for problem in draw_held_out(seed, 60)]

    def save_and_evaluate() -> str:
        save_checkpoint(out, demo)
        return str(evaluate(demo.target, demo.draft, demo.tokenizer, questions))

    train(demo.target, demo.draft, batches, settings, save_and_evaluate)
    save_checkpoint(out, demo)


def create_demo(rng: random.Random) -> Demo:
    """Train a tokenizer and initialise the models."""
    texts = (text.prompt + text.completion for text in (draw_text(rng) for _ in range(TOKENIZER_TEXTS)))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    config = describe_config(tokenizer)
    target, draft = build(parse_config(config), mtp=True)
    assert draft is not None
    initialize(target)
    initialize(draft)
    return Demo(config, tokenizer, target, draft)


def load_demo(folder: Path) -> Demo:
    """Read a checkpoint, in float32. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    target, draft = build(parse_config(config), mtp=True)
    assert draft is not None
    load_weights(folder, target, draft, show_progress=False)
    return Demo(config, Tokenizer.from_file(str(folder / "tokenizer.json")), target, draft)


def report(folder: Path, num_problems: int, seed: int) -> None:
    """Measure the checkpoint in `folder`, as stored, in float32; the last line printed is one JSON object."""
    demo = load_demo(folder)
    result: dict[str, Any] = {"checkpoint": str(folder), "num_problems": num_problems, "seed": seed}
    problems = draw_held_out(seed, num_problems)
    kinds = {
        "chat": [ask_in_chat(problem) for problem in problems],
        "thinking": [ask_in_chat(problem, thinks=True) for problem in problems],
        "plain": [ask_plainly(problem) for problem in problems],
        "tools": draw_tool_questions(seed, num_problems),
    }
    for kind, questions in kinds.items():
        score = evaluate(demo.target, demo.draft, demo.tokenizer, questions)
        print(f"{kind}: {score}")
        result[f"{kind}_solved"] = round(score.solved, 4)
        result[f"{kind}_acceptance"] = round(score.acceptance, 4)
    print(json.dumps(result))


def write_problems(path: Path, num_problems: int, seed: int) -> None:
    """Write held-out problems of two and three steps as GSM8K's JSON lines, for `python -m benchmarks.gsm8k --data`."""
    rows = [{"question": p.question, "answer": p.answer} for p in draw_held_out(seed, num_problems, min_steps=2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def describe_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Give config.json of a text-only dense Qwen3.5 of `SIZES`."""
    _, end_of_text = find_stop_ids(tokenizer)
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **SIZES,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mamba_ssm_dtype": "float32",
        "mtp_use_dedicated_embeddings": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def save_checkpoint(folder: Path, demo: Demo) -> None:
    """Write the whole checkpoint: matrices in bfloat16, vectors (norms, A_log, dt_bias) in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = export_tensors(demo.target, demo.draft)
    tensors = {name: tensor.bfloat16() if tensor.dim() > 1 else tensor.float() for name, tensor in tensors.items()}
    save_weights(folder / "model.safetensors", tensors)
    end_of_turn, end_of_text = find_stop_ids(demo.tokenizer)
    generation = {"do_sample": False, "eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text}
    (folder / "config.json").write_text(json.dumps(demo.config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(demo.tokenizer, folder, MAX_LENGTH)


if __name__ == "__main__":
    main()
