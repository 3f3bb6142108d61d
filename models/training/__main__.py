"""Trains the draft head of a checkpoint: `python -m models.training --model DIR --data FILE --out NEW_DIR`.

The target stands still unless `--joint` is given. NEW_DIR is the checkpoint with other `mtp.*` tensors and otherwise
the same bytes; NEW_DIR.training holds the log and the states from which `--resume` continues.

Drafts are accepted when the target agrees, not when a text does: `--loss ce` is for text as the target would write it,
`soft_ce` and `tv` imitate the target on any text. The log's `accept_greedy` and `accept_sampled` show the difference.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Tokenizer

from models.config import read_json
from models.errors import CheckpointError
from models.stop_ids import read_stop_ids
from models.training.demo_batches import Batch
from models.training.head_checkpoint import digest_checkpoint, load_models, save_checkpoint
from models.training.head_trainer import HeadTrainer, TrainerSettings
from models.training.mtp_settings import LossType, MTPSettings, Recompute, TrainingError, check_trainable
from models.training.text_batches import Encoded, TextSet, cut_batches, make_batch, plan_batches, read_texts

_DEMO = Path(__file__).resolve().parent.parent / "demo"


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says; the last line printed is one JSON object. Exits with 2 for a user's mistake."""
    options = build_parser().parse_args(arguments)
    try:
        print(json.dumps(run(options)))
    except (TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.training", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=_DEMO, help="Hugging Face directory of the checkpoint")
    add("--data", type=Path, required=True, help="JSON lines, or a directory with train.jsonl (GSM8K)")
    add("--out", type=Path, required=True, help="directory of the checkpoint to write")
    add("--resume", action="store_true", help="continue from the newest state in OUT.training")
    add("--mtp-init", choices=("checkpoint", "random"), default="checkpoint", help="where the head comes from")
    add("--joint", action="store_true", help="train the target, too")
    add("--steps", type=int, default=1000, help="length of the training")
    add("--stop-after", type=int, help="stop at this step of the plan; --resume makes the others")
    add("--batch-tokens", type=int, default=2048, help="tokens of a batch, padding included")
    add("--max-length", type=int, default=1024, help="longer texts are cut")
    add("--loss-on", choices=("completion", "all"), default="completion", help="which tokens count")
    add("--held-out", type=int, default=64, help="texts that are only measured on")
    add("--every", type=int, default=100, help="steps between measurements and saved states")
    add("--depth", type=int, default=1, help="tokens ahead that the head learns, by recursion")
    add("--loss", choices=get_args(LossType), default="ce", help="ce: the text; soft_ce, tv: the target's distribution")
    add("--mtp-loss-scaling-factor", type=float, default=0.1, help="weight of the head's loss")
    add("--no-detach", action="store_true", help="let the head's loss train the target (needs --joint)")
    add("--recompute", choices=get_args(Recompute), default="none", help="trade time for memory in the head")
    add("--rate", type=float, default=1e-3, help="peak learning rate of the head")
    add("--target-rate", type=float, default=1e-5, help="peak learning rate of the target with --joint")
    add("--warmup", type=float, default=0.05, help="share of the steps with a rising rate")
    add("--max-grad-norm", type=float, default=1.0, help="of head and target, each by itself")
    add("--seed", type=int, default=0, help="of the batches and of a new head")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the target; the head is float32")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, write the checkpoint, and give the last measurement. Raises TrainingError and CheckpointError."""
    states = _check(options)
    trainer, texts = prepare(options)
    if options.resume:
        trainer.resume(states)

    def batch(some: Sequence[Encoded], indices: list[int]) -> Batch:
        return make_batch([some[index] for index in indices], options.loss_on == "all")

    order = range(len(texts.held_out))
    held_out = [batch(texts.held_out, run) for run in cut_batches(order, _lens(texts.held_out), options.batch_tokens)]
    plan = islice(plan_batches(_lens(texts.train), options.batch_tokens, options.seed), trainer.step, None)
    batches = (batch(texts.train, indices) for indices in plan)
    found = trainer.train(batches, options.every, lambda: trainer.measure(held_out), states, options.stop_after)
    is_done = trainer.step == options.steps
    if is_done:
        save_checkpoint(options.model, options.out, list(trainer.modules.values()))
    return {"out": str(options.out) if is_done else None, "step": trainer.step, **found}


def prepare(options: argparse.Namespace) -> tuple[HeadTrainer, TextSet]:
    """The trainer with its models loaded, and the texts. Raises TrainingError and CheckpointError."""
    is_random = options.mtp_init == "random"
    fields = read_json(options.model / "config.json")
    config = check_trainable(fields, has_new_head=is_random)
    tokenizer = read_tokenizer(options.model)
    texts = read_texts(options.data, tokenizer, _end_id(fields, options.model), options.max_length, options.held_out)
    loss, settings = read_settings(options, texts)
    torch.manual_seed(options.seed)
    models = load_models(options.model, config, is_random, getattr(torch, options.dtype), options.device)
    return HeadTrainer(*models, loss, settings), texts


def read_settings(options: argparse.Namespace, texts: TextSet) -> tuple[MTPSettings, TrainerSettings]:
    """The settings of loss and trainer. Raises TrainingError and CheckpointError."""
    loss = MTPSettings(
        enabled=True,
        mtp_loss_type=options.loss,
        mtp_depth=options.depth,
        mtp_loss_scaling_factor=options.mtp_loss_scaling_factor,
        mtp_detach=not options.no_detach,
        recompute=options.recompute,
    )
    names = ("joint", "rate", "target_rate", "warmup", "max_grad_norm", "seed")
    data = f"{texts.digest} in batches of {options.batch_tokens}, loss on {options.loss_on}"
    model = f"{digest_checkpoint(options.model)} in {options.dtype}"
    given = {name: getattr(options, name) for name in names}
    return loss, TrainerSettings(options.steps, data=data, model=model, **given)


def read_tokenizer(directory: Path) -> Tokenizer:
    """The checkpoint's tokenizer. Raises TrainingError when it has none."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise TrainingError(f"{path} does not exist: texts cannot become token ids without it")
    return Tokenizer.from_file(str(path))


def _check(options: argparse.Namespace) -> Path:
    """The folder of states; refuses numbers out of range, settings that do not fit and places that are taken."""
    for name in ("steps", "batch_tokens", "max_length", "held_out", "every"):
        if (value := getattr(options, name)) < 1:
            raise TrainingError(f"--{name.replace('_', '-')} is {value}, at least 1 is needed")
    if options.no_detach and not options.joint:
        raise TrainingError("--no-detach needs --joint: a target that stands still takes no gradients")
    if options.joint and options.dtype != "float32":
        raise TrainingError(f"--joint with --dtype {options.dtype} would round small steps away: use float32")
    out, model = options.out.resolve(), options.model.resolve()
    if out == model or model in out.parents or out in model.parents:
        raise TrainingError(f"--out {options.out} is part of --model {options.model}: give a directory of its own")
    states = options.out.with_name(f"{options.out.name}.training")
    if not options.resume and (taken := [path for path in (options.out, states) if path.exists()]):
        raise TrainingError(f"{taken[0]} is there already: --resume continues, or delete it, or give another --out")
    return states


def _lens(texts: list[Encoded]) -> list[int]:
    return [len(prompt) + len(completion) for prompt, completion in texts]


def _end_id(fields: dict[str, Any], directory: Path) -> int | None:
    """The token that ends a text: config.json's, else any that the checkpoint names."""
    named = fields.get("text_config", fields).get("eos_token_id")
    return named if isinstance(named, int) else min(read_stop_ids(directory), default=None)


if __name__ == "__main__":
    main()
