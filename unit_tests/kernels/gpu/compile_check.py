"""Compiles every kernel that a model's passes launch, for a GPU that need not be there.

`python -m unit_tests.kernels.gpu.compile_check PRESET ARCH` (as 27B 90) prints one JSON object per kernel.

A decode step and a prefill run on meta tensors of the true sizes, with the launches recorded instead of made; so what
is compiled is what would run. Must not be interpreted: a process of its own, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.random_checkpoint import make_config
from kernels.gated_delta_net import DeltaNetShape
from kernels.gpu.dispatch import triton_takes
from kernels.gpu.gated_delta_rule import fold_states
from models.cache import Backends, Cache, GDNCache, KVCache
from models.config import parse_config
from models.forward_batch import ForwardBatch
from models.registry import build
from server.backend.decode_step import DecodeStep
from server.backend.memory_plan import allocate_scratch
from server.backend.request_table import RequestTable
from server.config import EngineConfig

NUM_ROWS, PAGE_SIZE, MAX_LEN, MTP_STEP = 129, 16, 32768, 3
BATCHES, WIDTHS, PREFILL_LENS = (1, 32, 128), (1, 2, 4), (5, 512)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}

Launch = tuple[JITFunction, dict[str, str], dict[str, Any], dict[tuple[int], Any], dict[str, int]]


@contextmanager
def record_launches() -> Iterator[dict[str, Launch]]:
    """Inside, kernels are not launched; what they would be compiled for is collected."""
    launches: dict[str, Launch] = {}

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid), f"{kernel.__name__}: grid {grid}"
        assert all(size < 2**16 for size in grid[1:]), f"{kernel.__name__}: grid {grid}"
        options = {name: kwargs.pop(name) for name in [*kwargs] if name not in kernel.arg_names}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        assert set(values) == set(kernel.arg_names), f"{kernel.__name__}: {set(kernel.arg_names) ^ set(values)}"
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value, is_number = values[parameter.name], isinstance(values[parameter.name], int | float)
            is_special = not is_number or not (parameter.do_not_specialize or isinstance(value, float))
            if parameter.is_constexpr or value is None or (is_number and is_special and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            signature[parameter.name] = _type_of(value)
            if is_special and (not is_number or value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = repr((kernel.__name__, signature, constants, attributes, options))
        launches[key] = (kernel, signature, constants, attributes, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield launches


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@torch.inference_mode()
def run_model(preset: str) -> None:
    """A decode step of every width and batch, a prefill, and what another one's needs, on the meta device."""
    config = parse_config(make_config(preset))
    target, draft = build(config, mtp=True, dtype=torch.bfloat16, device="meta")
    scratch = allocate_scratch(EngineConfig(mtp_step=MTP_STEP), config, NUM_ROWS, MAX_LEN, "meta")
    kv = KVCache.allocate(config, 1, 64, PAGE_SIZE, torch.bfloat16, "meta")
    gdn = GDNCache.allocate(config, MTP_STEP, NUM_ROWS, torch.bfloat16, "meta")
    cache = Cache(kv, gdn, None, Backends("triton", "triton"), scratch)
    table = RequestTable(cache, NUM_ROWS, MAX_LEN // PAGE_SIZE, MTP_STEP, config.vocab_size, "meta")
    table.keep_rules((1,))
    step = DecodeStep(target, draft, table, 1)
    for batch in BATCHES:
        rows = torch.zeros(batch, dtype=torch.int64, device="meta")
        for width in WIDTHS:
            step(rows, rows, width, MTP_STEP)
    view = table.view_rows(torch.zeros(len(PREFILL_LENS), dtype=torch.int64, device="meta"), is_verify=False)
    tokens = torch.zeros(sum(PREFILL_LENS), dtype=torch.int64, device="meta")
    forward = ForwardBatch(tokens, tokens, PREFILL_LENS, view)
    assert draft is not None
    draft(tokens, target(forward), forward)
    heads, dims = (config.delta_key_heads, config.delta_value_heads), (config.delta_key_dim, config.delta_value_dim)
    fold_states(DeltaNetShape(*heads, *dims), gdn.state[0], gdn.layer_ring(0), *view.stand)


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a kernel."""
    kernel, signature, constants, attributes, options = launch
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        suffix = "a" if arch == 90 else ""
        command = [
            get_ptxas(arch).path,
            "-v",
            f"-arch=sm_{arch}{suffix}",
            str(ptx),
            "-o",
            str(ptx.with_suffix(".cubin")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", report))
    (registers,) = re.findall(r"Used (\d+) registers", report)
    sizes = {name: value for name, value in constants.items() if name.isupper()}
    return {
        "kernel": kernel.__name__,
        "sizes": sizes,
        "registers": int(registers),
        "spills": spills,
        "shared": compiled.metadata.shared,
    }


def main(preset: str, arch: str) -> None:
    with triton_takes("meta"), record_launches() as launches:
        run_model(preset)
    for launch in launches.values():
        print(json.dumps(compile_launch(launch, int(arch))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
