"""A rollout server inside the test: it pulls weights over real sockets and samples from a model that has them."""

import threading
from typing import Any

import torch
from torch import Tensor

from models.config import load_config
from models.training.head_checkpoint import load_models, read_tensors
from models.training.rl.recipe import Recipe
from models.training.rollout_server import Rollout
from models.weight_transfer.receiver import fetch, receive
from models.weight_update import combine_checksums, hash_tensor


class FakeServer:
    """Samples token by token with numbers that depend on the seed alone; takes no drafts."""

    def __init__(self, recipe: Recipe):
        directory = recipe.experiment.directory
        self.target, self.head = load_models(directory, load_config(directory))
        self.tensors: dict[str, Tensor] = dict.fromkeys(read_tensors(directory), torch.empty(0))
        self.version: str | None = None
        self.modes: list[str] = []
        self._lock = threading.Lock()

    def pull_weights(self, publisher_url: str, num_streams: int = 4) -> dict[str, Any]:
        """Take the newest version, whole or as a delta."""
        transfer = fetch(publisher_url, self.version, num_streams, 20.0)
        receive(transfer, publisher_url, 20.0, self)  # type: ignore[arg-type]
        assert self.checksum() == transfer.result_sha256
        with self._lock:
            for slot in (*self.target.weight_slots(), *self.head.weight_slots()):
                slot.load(self.tensors[slot.name])
            self.version = transfer.version
        self.modes.append(transfer.mode)
        return {"success": True}

    def skips(self, name: str) -> bool:
        """None."""
        return False

    def add(self, name: str, tensor: Tensor) -> None:
        """A whole tensor has come."""
        self.tensors[name] = tensor.clone()

    def add_delta(self, name: str, indices: Tensor, values: Tensor) -> None:
        """Part of one has."""
        self.tensors[name].view(-1)[indices.long()] = values

    def checksum(self) -> str:
        """Of all tensors that ever came."""
        return combine_checksums({name: hash_tensor(one) for name, one in self.tensors.items() if one.numel()})

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], sampling: dict[str, Any], n: int, seed: int) -> list[Rollout]:
        """n samples of max_new_tokens."""
        generator = torch.Generator().manual_seed(seed)
        ids, logprobs = torch.tensor([prompt_ids] * n), []
        with self._lock:
            for _ in range(sampling["max_new_tokens"]):
                logits = self.target.compute_logits(self.target.forward_sequence(ids)[:, -1])
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                logprobs.append(logits.log_softmax(-1).gather(1, drawn))
                ids = torch.cat([ids, drawn], 1)
            spans = [(str(self.version), 0, len(logprobs))]
        rows = torch.cat(logprobs, 1).tolist()
        samples = ids[:, len(prompt_ids) :].tolist()
        return [
            Rollout(list(prompt_ids), tokens, row, spans, "length") for tokens, row in zip(samples, rows, strict=True)
        ]
