"""A rollout server as a trainer sees it: weights go there, tokens with their log-probabilities come back.

The verbs are SGLang's, over plain HTTP; `pull_weights` is for servers that fetch weights from a publisher. Knows token
ids, never text.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.training.mtp_settings import TrainingError

_SAID_CHARACTERS = 300


class ServerRefused(TrainingError):
    """The rollout server did not do what it was asked for; the message has its address and what it said."""


@dataclass(frozen=True)
class Rollout:
    """One sample: its tokens, the log-probability of each under the weights that drew it, and which these were, as
    spans (version, first token, token after the last)."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    versions: list[tuple[str, int, int]]
    finish_reason: str

    @property
    def oldest_version(self) -> str:
        """Of the weights that drew its first token; there is one unless it was aborted before."""
        return self.versions[0][0]


class RolloutServer:
    """A server at `url`. Every method raises ServerRefused."""

    def __init__(self, url: str, admin_key: str = "", timeout: float = 600.0):
        self.url, self._timeout = url.rstrip("/"), timeout
        self._headers = {"content-type": "application/json"}
        if admin_key:
            self._headers["authorization"] = f"Bearer {admin_key}"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read_info(self) -> dict[str, Any]:
        """What serves: `weight_version`, `mtp_weight_version`, `mtp_stale` and more."""
        return self._send("/model_info")

    def pause(self, mode: str = "abort") -> None:
        """Stop making tokens; `mode` (abort, retract, in_place) says what becomes of requests that run."""
        self._send("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Go on."""
        self._send("/continue_generation", {})

    def pull_weights(self, publisher_url: str, num_streams: int = 4, in_flight: str = "keep") -> dict[str, Any]:
        """Have it fetch the newest version of a publisher; `in_flight` is a mode of `pause`."""
        return self._send("/pull_weights", {"url": publisher_url, "num_streams": num_streams, "in_flight": in_flight})

    def update_from_disk(self, path: Path, version: str | None = None) -> dict[str, Any]:
        """Have it read the safetensors of a directory, which may lie in shared memory."""
        return self._send(
            "/update_weights_from_disk", _without_none({"model_path": str(path), "weight_version": version})
        )

    def join_group(self, address: str, port: int, world_size: int, group: str, backend: str = "gloo") -> None:
        """Have it join a process group of `world_size` with rank 1; rank 0's store is at address and port. Returns when
        all ranks have come."""
        place = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        self._send("/init_weights_update_group", {**place, "group_name": group, "backend": backend})

    def update_from_group(
        self, tensors: Mapping[str, Tensor], group: str, version: str | None = None
    ) -> dict[str, Any]:
        """Have it take part in broadcasts of these tensors, in this order. Returns when it has them all."""
        specs = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }
        named = _without_none({"group_name": group, "weight_version": version})
        return self._send("/update_weights_from_distributed", {**specs, **named})

    def leave_group(self, group: str) -> None:
        """Have it leave a process group."""
        self._send("/destroy_weights_update_group", {"group_name": group})

    def checksum(self) -> str:
        """The SHA-256 over all its weights (models/weight_update.py)."""
        return str(self._send("/weights_checker", {"action": "checksum"})["checksum"])

    def generate(
        self, prompt_ids: Sequence[int], sampling: Mapping[str, Any], n: int = 1, seed: int | None = None
    ) -> list[Rollout]:
        """n samples that go on with a prompt; `sampling` has the fields of /generate's sampling_params."""
        params = _without_none({**sampling, "n": n, "sampling_seed": seed})
        body = {"input_ids": list(prompt_ids), "sampling_params": params, "return_logprob": True}
        answer = self._send("/generate", body)
        outputs = answer if isinstance(answer, list) else [answer]
        try:
            return [_read_rollout(list(prompt_ids), output) for output in outputs]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerRefused(
                f"{self.url}/generate answers without {error}: is it started with --enable-rl?"
            ) from None

    def _send(self, path: str, payload: dict[str, Any] | None = None) -> Any:
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, body, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:_SAID_CHARACTERS]
            raise ServerRefused(f"{self.url}{path} answers {error.code}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerRefused(f"cannot reach {self.url}{path}: {reason}; is the server running there?") from None
        except ValueError as error:
            raise ServerRefused(f"{self.url}{path} answers without JSON: {error}") from None
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerRefused(f"{self.url}{path} refuses: {answer.get('message')}")
        return answer


def _read_rollout(prompt_ids: list[int], output: Mapping[str, Any]) -> Rollout:
    meta = output["meta_info"]
    return Rollout(
        prompt_ids,
        output["output_ids"],
        [score[0] for score in meta["output_token_logprobs"]],
        [(span["version"], span["start"], span["end"]) for span in meta["weight_versions"]],
        meta["finish_reason"]["type"],
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
