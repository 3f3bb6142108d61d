"""Seconds until a server has new weights, by the way they come: `python -m models.training.rl.commit_times --server URL
--model DIR`.

full and delta: pulled over TCP, all weights or those that changed (2 % of the numbers); shared memory, disk: files that
the server reads. Prints one JSON line per update: seconds to make the version ready here (a copy, its checksums, what
changed), to write its file, and until the server serves it; of these the server's steps waited for commit_seconds.
Begin and end of the update are by the clock of the machine.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from models.errors import CheckpointError
from models.training.mtp_settings import TrainingError
from models.training.publisher import Publisher
from models.training.rl.perturbation import perturb
from models.training.rl.policy import read_weights
from models.training.rollout_server import RolloutServer

WAYS = {"full": 1.0, "delta": 0.02, "shared memory": 1.0, "disk": 1.0}  # share of the numbers that change


class Server(Protocol):
    """What is needed of a rollout server."""

    def pull_weights(self, publisher_url: str, num_streams: int, in_flight: str) -> dict[str, Any]:
        """Fetch the newest version."""

    def update_from_disk(self, path: Path, version: str) -> dict[str, Any]:
        """Read safetensors."""


def measure(
    directory: Path, server: Server, publisher: Publisher, folder: Path, rounds: int, ways: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What every update took, in turns."""
    generator = torch.Generator().manual_seed(0)
    tensors = read_weights(directory)
    for number in range(rounds):
        for way in ways:
            tensors = perturb(tensors, WAYS[way], generator)
            start = time.perf_counter()
            version = publisher.publish(tensors)
            published = time.perf_counter()
            if way in ("full", "delta"):
                path = None
            else:
                path = publisher.share() if way == "shared memory" else publisher.save(folder)
            written, begin = time.perf_counter(), time.time()
            if path is None:
                answer = server.pull_weights(publisher.url, 4, "keep")
            else:
                answer = server.update_from_disk(path, version.name)
            yield {
                "way": way,
                "round": number,
                "mode": publisher.modes[-1] if path is None else "file",
                "num_bytes": version.num_bytes,
                "publish_seconds": published - start,
                "write_seconds": written - published,
                "update_seconds": time.perf_counter() - written,
                "commit_seconds": answer["commit_seconds"],
                "begin": begin,
                "end": time.time(),
            }


def main(arguments: list[str] | None = None) -> None:
    """Run as the command line says. Exits with 2 where the server does not go along."""
    parser = argparse.ArgumentParser(
        prog="python -m models.training.rl.commit_times",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, help="URL of a server with --enable-rl")
    add("--model", type=Path, required=True, help="checkpoint directory, the server's")
    add("--admin-key", default="", help="the server's --admin-api-key")
    add("--rounds", type=int, default=3, help="updates of each kind")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="how the weights come, in turn")
    options = parser.parse_args(arguments)
    try:
        with Publisher(full_sync_interval=0) as publisher, tempfile.TemporaryDirectory() as folder:
            server = RolloutServer(options.server, options.admin_key)
            for found in measure(options.model, server, publisher, Path(folder), options.rounds, options.ways):
                print(json.dumps(found), flush=True)
    except (TrainingError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
