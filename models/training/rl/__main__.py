"""An RL run with a rollout server: `python -m models.training.rl --recipe FILE --server URL [--out NEW_DIR]`.

Prints one JSON line per step and one for the run. Without `--server` it prints what the recipe asks of one, its model
and its engine section, as arguments: `python -m server --enable-rl $(python -m models.training.rl --recipe FILE)`.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.training.head_checkpoint import save_checkpoint
from models.training.mtp_settings import TrainingError
from models.training.publisher import Publisher
from models.training.rl.loop import RLLoop, iterate_fields, rise
from models.training.rl.recipe import Recipe, load_recipe
from models.training.rollout_server import RolloutServer


def main(arguments: list[str] | None = None) -> None:
    """Run as the command line says. Exits with 2 for a user's mistake, and where the server does not go along."""
    options = build_parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        print(json.dumps(run(recipe, options)) if options.server else shlex.join(recipe.server_arguments()))
    except (TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.training.rl", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=Path, required=True, help="YAML file; models/training/rl/recipes has two")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change the recipe: trainer_base.mtp.enabled=no",
    )
    add("--server", help="URL of the rollout server")
    add("--admin-key", default=os.environ.get("TANDEM_ADMIN_API_KEY", ""), help="its --admin-api-key")
    add("--host", default="127.0.0.1", help="address of this machine at which the server fetches weights")
    add("--out", type=Path, help="new directory for the trained checkpoint")
    return parser


def run(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and give what stands in the last line. Raises TrainingError and CheckpointError."""
    directory = recipe.experiment.directory
    if options.out is not None and (options.out.exists() or directory.resolve() in options.out.resolve().parents):
        raise TrainingError(f"--out {options.out} is there already, or part of the model: give a new directory")
    server = RolloutServer(options.server, options.admin_key)
    interval = recipe.dataflow.delta_full_sync_interval
    with Publisher(options.host, strategies=recipe.strategies, full_sync_interval=interval) as publisher:
        loop = RLLoop(recipe, server, publisher)
        reports = loop.run(lambda report: print(json.dumps(dict(iterate_fields(report))), flush=True))
        if options.out is not None:
            save_checkpoint(directory, options.out, [loop.policy.target, loop.policy.head])
        first, last = rise(reports)
        return {
            "experiment": recipe.experiment.experiment_name,
            "steps": len(reports),
            "reward_first": round(first, 4),
            "reward_last": round(last, 4),
            "transfers": publisher.modes,
            "trainer_sha256": publisher.version.result_sha256,
            "server_sha256": server.checksum(),
        }


if __name__ == "__main__":
    main()
