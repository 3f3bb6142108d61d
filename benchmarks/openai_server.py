"""An OpenAI-compatible server as benchmarks over HTTP need it: JSON requests, its models, and what its counters say.

Knows nothing of prompts and answers. `Server` is for what is not timed, or takes long enough not to mind a thread.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Counters = dict[tuple[str, str], float]

# Tandem has both. Under its own name it counts verify steps without drafts too, which give a token as well.
_PREFIXES = ("tandem:", "vllm:")
_STEPS = "spec_decode_num_drafts_total"


class RunFailed(Exception):
    """The run cannot begin or go on: what was seen, the limit, the mend."""


def one_line(error: object) -> str:
    """What an error or a body says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


class Server:
    """An OpenAI-compatible server. `model` is the first it serves. Raises RunFailed where it does not answer."""

    def __init__(self, url: str, timeout: float, api_key: str = ""):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"content-type": "application/json"}
        if api_key:
            self.headers["authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # nothing between: it is timed
        models = self.send("/v1/models").get("data") or [{}]
        self.model = str(models[0].get("id", ""))

    def send(self, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that answers a GET, or a POST of `payload`."""
        try:
            answer = json.loads(self._fetch(path, payload))
        except ValueError as error:
            raise RunFailed(f"{self.url}{path} answers without JSON: {one_line(error)}") from error
        if not isinstance(answer, dict):
            raise RunFailed(f"{self.url}{path} answers without a JSON object; is it an OpenAI-compatible server?")
        return answer

    def read_counters(self) -> Counters:
        """Values of /metrics by name and draft position ("" where there is none); empty when there are no metrics."""
        counters: Counters = defaultdict(float)
        try:
            text = self._fetch("/metrics", None).decode()
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        except (RunFailed, ValueError):
            return counters
        for sample in samples:
            counters[sample.name, sample.labels.get("position", "")] += sample.value
        return counters

    def _fetch(self, path: str, payload: dict[str, Any] | None) -> bytes:
        body = None if payload is None else json.dumps(payload).encode()
        try:
            request = urllib.request.Request(self.url + path, body, self.headers)
            with self._opener.open(request, timeout=self._timeout) as response:
                content: bytes = response.read()
                return content
        except urllib.error.HTTPError as error:
            said = one_line(error.read().decode(errors="replace"))
            raise RunFailed(f"{self.url}{path} answers {error.code}: {said}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = one_line(getattr(error, "reason", error))
            raise RunFailed(f"cannot reach {self.url}{path}: {reason}; is the server running there?") from error


def growth(before: Counters, after: Counters) -> Counters:
    """By how much each counter grew."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def describe_speculation(counters: Counters) -> dict[str, Any]:
    """Per verify step of a request: drafts, and tokens (1 + accepted); accepted over proposed drafts, and by position.

    Few drafts per step mean that the server chose to draft little: acceptance is of those it drafted. A server that
    does not count what it proposed by position (vLLM) is taken to propose at every position in every step.
    """
    prefix = next((prefix for prefix in _PREFIXES if (prefix + _STEPS, "") in counters), _PREFIXES[0])
    steps = counters.get((prefix + _STEPS, ""), 0.0)
    proposed = counters.get((prefix + "spec_decode_num_draft_tokens_total", ""), 0.0)
    accepted = counters.get((prefix + "spec_decode_num_accepted_tokens_total", ""), 0.0)
    per_position = []
    name = prefix + "spec_decode_num_accepted_tokens_per_pos_total"
    for position in sorted((place for key, place in counters if key == name), key=int):
        tried = counters.get(("tandem:spec_decode_num_draft_tokens_per_pos_total", position), steps)
        if tried:
            per_position.append(counters[name, position] / tried)
    return {
        "drafts_per_step": proposed / steps if steps else None,
        "accept_length": 1 + accepted / steps if steps else None,
        "acceptance": accepted / proposed if proposed else None,
        "acceptance_per_position": per_position,
    }


def count_foreign_tokens(counters: Counters, num_own: int) -> int | None:
    """Output tokens that others were served besides `num_own` of ours; None where the server does not count."""
    served = counters.get(("vllm:generation_tokens_total", ""))
    return None if served is None else round(served) - num_own
