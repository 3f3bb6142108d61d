"""Prints each kernel that requests would be the first to launch, after all that a GPU's start warms up.

`python -m unit_tests.server.backend.warm_up_check PRESET MTP_STEP`, without TRITON_INTERPRET: launches are recorded on
the meta device, where nothing runs.
"""

import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.random_checkpoint import make_config
from kernels.gpu.dispatch import triton_takes
from models.cache import Backends, Cache, GDNCache, KVCache
from models.config import parse_config
from models.forward_batch import ForwardBatch
from models.registry import build
from server.backend.decode_graphs import DecodeGraphs, graph_depths
from server.backend.decode_step import DecodeStep
from server.backend.memory_plan import DEFAULT_GPU_CHUNK, allocate_scratch
from server.backend.request_table import RequestTable
from server.backend.runner import warm_up_prefill
from server.backend.sampler import Sampled, Sampler
from server.config import EngineConfig
from unit_tests.kernels.gpu.compile_check import record_launches

NUM_ROWS, PAGE_SIZE, MAX_LEN, MAX_BATCH = 9, 16, 4096, 8
PROMPTS = [[1], [3], [15], [16], [17], [48], [100, 60], [5, 9, 101], [200], [500], [1000], [1001], [1025], [2047]]


class Server:
    """The parts of a GPU's server that launch kernels, on the meta device."""

    def __init__(self, preset: str, mtp_step: int):
        self.mtp_step, config = mtp_step, parse_config(make_config(preset))
        self.target, self.draft = build(config, mtp=mtp_step > 0, dtype=torch.bfloat16, device="meta")
        scratch = allocate_scratch(EngineConfig(mtp_step=mtp_step), config, NUM_ROWS, MAX_LEN, "meta")
        kv = KVCache.allocate(config, min(1, mtp_step), 64, PAGE_SIZE, torch.bfloat16, "meta")
        gdn = GDNCache.allocate(config, mtp_step, NUM_ROWS, torch.bfloat16, "meta")
        cache = Cache(kv, gdn, None, Backends("triton", "triton"), scratch)
        self.table = RequestTable(cache, NUM_ROWS, MAX_LEN // PAGE_SIZE, mtp_step, config.vocab_size, "meta")
        self.table.keep_rules((1,))
        self.sampler = Sampler(self.table, (1,))
        self.step = DecodeStep(self.target, self.draft, self.table, min(1, mtp_step))

    def start(self) -> None:
        """What is run before the first request."""
        warm_up_prefill(self.target, self.draft, self.table, self.sampler, DEFAULT_GPU_CHUNK)

        def capture(function: Callable[[], Sampled]) -> tuple[Callable[[], None], Sampled]:
            return lambda: None, function()

        DecodeGraphs(self.step, MAX_BATCH, graph_depths(self.mtp_step, is_adaptive=True), capture).capture()

    @torch.inference_mode()
    def prefill(self, lens: Sequence[int]) -> None:
        """The prompts of one pass, tokens drawn behind them."""
        rows, tokens = (torch.zeros(count, dtype=torch.int64, device="meta") for count in (len(lens), sum(lens)))
        forward = ForwardBatch(tokens, tokens, tuple(lens), self.table.view_rows(rows, is_verify=False))
        hidden = self.target(forward)
        self.sampler.draw_by_table(self.target.compute_logits(hidden[: len(lens)]), rows, rows)
        if self.draft is not None:
            state = self.draft(tokens, hidden, forward, 0, rows)
            self.sampler.draw_by_table(self.draft.compute_logits(state), rows, rows)

    @torch.inference_mode()
    def verify(self, width: int) -> None:
        """A step of one request without a graph."""
        rows, tokens = (torch.zeros(count, dtype=torch.int64, device="meta") for count in (1, width))
        self.target(ForwardBatch(tokens, tokens, (width,), self.table.view_rows(rows, is_verify=True)))


def main(preset: str, mtp_step: int) -> None:
    with triton_takes("meta"):
        server = Server(preset, mtp_step)
        with record_launches() as known:
            server.start()
        works = [lambda lens=lens: server.prefill(lens) for lens in PROMPTS]
        works += [lambda width=width: server.verify(width) for width in range(1, mtp_step + 2)]
        for work in works:
            with record_launches() as launches:
                work()
            for key in launches.keys() - known.keys():
                print(key)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
