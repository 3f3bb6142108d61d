"""The checkpoint that all contestants run: the demo, random weights of a preset, or any directory; and GGUFs of it."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.openai_server import RunFailed, one_line
from benchmarks.peers.environments import HERE, Environment
from benchmarks.random_checkpoint import OTHER_PRESETS, PRESETS, count_weights, make_config, write_random_checkpoint
from benchmarks.static_throughput.machine import free_memory

DEMO = HERE / "models" / "demo"
# What a contestant takes above its weights: libraries, activations, caches. vLLM is three processes.
_OWN_BYTES, _VLLM_BYTES = 2**30, 5 * 2**30
_BYTES_PER_VALUE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Checkpoint:
    """A directory in Hugging Face's layout; `root` is where what is made of it lies."""

    directory: Path
    root: Path

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))

    @property
    def config(self) -> dict[str, Any]:
        """The text model's fields."""
        outer: dict[str, Any] = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return outer | outer.get("text_config", {})

    def gguf(self, llama_cpp: Environment, kind: str) -> Path:
        """The GGUF in the checkpoint's precision ("") or quantised, made where it is missing. Raises RunFailed."""
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.directory.iterdir()]
        digest = hashlib.sha256(repr((str(self.directory), sorted(stamps))).encode()).hexdigest()[:8]
        target = self.root / "gguf" / f"{self.directory.name}-{digest}{kind and '-' + kind}.gguf"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        source = [self.gguf(llama_cpp, ""), target, kind] if kind else [self.directory, target]
        command = [llama_cpp.python, "-P", "-m", "benchmarks.peers.gguf_converter", *source]
        done = subprocess.run(command, env=llama_cpp.variables(1), capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise RunFailed(f"no GGUF of {self.directory}: {one_line(said[-1])}")
        return target


def find_checkpoint(name: str, root: Path, contestants: Sequence[str]) -> Checkpoint:
    """`demo`, a preset (written once), or a directory. Raises RunFailed for what is none of them, or does not fit in
    memory once for each contestant."""
    if name in PRESETS or name in OTHER_PRESETS:
        config = make_config(name)
        check_memory(name, count_weights(config) * _BYTES_PER_VALUE[config["dtype"]], contestants)
        return Checkpoint(_write_preset(name, root), root)
    directory = DEMO if name == "demo" else Path(name).resolve()
    if not (directory / "config.json").exists():
        presets = ", ".join((*PRESETS, *OTHER_PRESETS))
        raise RunFailed(f"--checkpoint {name} is no directory with a config.json; it may be demo, or one of {presets}")
    found = Checkpoint(directory, root)
    check_memory(name, found.num_bytes, contestants)
    return found


def check_memory(name: str, num_bytes: int, contestants: Sequence[str]) -> None:
    """Raise RunFailed where all of them side by side need more than is free."""
    own = sum(_VLLM_BYTES if one.startswith("vllm") else _OWN_BYTES for one in contestants)
    needed, free = len(contestants) * num_bytes + own, free_memory("cpu")
    if needed > free:
        raise RunFailed(
            f"{name} has {num_bytes:,} bytes of weights; {len(contestants)} contestants with it take about {needed:,}, "
            f"{free:,} are free: name fewer --contestants, or a smaller --checkpoint"
        )


def _write_preset(name: str, root: Path) -> Path:
    """Once for as long as its config stays what it is."""
    config = make_config(name)
    digest = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
    directory = root / "checkpoints" / f"{name}-{digest}"
    if not (directory / "tokenizer.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(directory, name)
        _write_tokenizer(directory, config["vocab_size"])
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The demo's, with a word of its own for every further id, so that servers have a text for each token."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab |= {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    vocab |= {f"Ġt{number}": number for number in range(len(vocab), vocab_size)}
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (directory / file).write_bytes((DEMO / file).read_bytes())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
