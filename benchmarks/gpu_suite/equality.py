"""Speculation, graphs and Triton change nothing: equal bits of the delta rule, equal tokens of whole models.

Tokens are compared over mtp_step 0, 1 and 3, with and without CUDA graphs, and with `transformers.generate`, in
float32. Matrix products of other shapes may round otherwise: where two results differ, the judge (the transformers
model) says whether the two tokens tie, which is reported apart; without a judge any difference is red.
"""

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu_suite.card import FAILURES
from benchmarks.gpu_suite.case import Setting
from benchmarks.gpu_suite.delta_cases import DeltaMemory, make_inputs, shape_of
from benchmarks.gpu_suite.dimensions import dimensions_of
from benchmarks.gpu_suite.log import Log
from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.word_problems import draw_problem
from benchmarks.workload import draw_tokens, serve
from kernels.gpu.gated_delta_rule import gated_delta_rule_verify
from server.config import DEMO_MODEL
from server.llm import LLM, SamplingParams

MODELS = ("tiny", "tiny-moe", "demo")
MTP_STEPS = (0, 1, 3)
_NUM_PROMPTS, _PROMPT_LEN, _NUM_TOKENS, _CHAIN_LEN = 6, 24, 32, 24
_TIE = 1e-3  # of two logits, in float32

Judge = Callable[[list[int], int, int], float]


@dataclass(frozen=True)
class Served:
    """What each prompt was answered with, and the share of proposed drafts that was right."""

    tokens: list[list[int]]
    acceptance: float


def check_chains(setting: Setting, log: Log) -> None:
    """Steps of T = 2..4 tokens with random acceptance against one token at a time: a row per T."""
    for num_tokens in (2, 3, 4):
        is_equal = equal_chains(setting, num_tokens)
        row = {"model": setting.model, "batch": setting.batch, "tokens": num_tokens, "ok": is_equal}
        log.add("equal bits of the delta rule", **row)


@torch.no_grad()
def equal_chains(setting: Setting, num_tokens: int) -> bool:
    """Outputs and states of both have the same bits."""
    inputs, _ = make_inputs(setting, setting.batch * _CHAIN_LEN)
    by_request = inputs._replace(
        conv=inputs.conv.unflatten(0, (setting.batch, -1)), gates=inputs.gates.unflatten(0, (setting.batch, -1))
    )
    shape, rows, device = shape_of(setting), setting.row_ids(), setting.device
    plain, wide = DeltaMemory(setting), DeltaMemory(setting)
    wide.state.copy_(plain.state)

    def run(memory: DeltaMemory, positions: torch.Tensor, accept_lens: torch.Tensor, count: int) -> torch.Tensor:
        at = positions[:, None] + torch.arange(count, device=device)
        requests = torch.arange(setting.batch, device=device)[:, None]
        window = inputs._replace(
            conv=by_request.conv[requests, at].flatten(0, 1), gates=by_request.gates[requests, at].flatten(0, 1)
        )
        out = gated_delta_rule_verify(window, shape, memory.state, memory.ring, rows, positions, accept_lens)
        return out.unflatten(0, (setting.batch, count))

    zeros = torch.zeros(setting.batch, dtype=torch.int64, device=device)
    steps = [run(plain, zeros + position, zeros + min(1, position), 1) for position in range(_CHAIN_LEN)]
    expected = torch.cat(steps, dim=1)
    positions, accept_lens, is_equal = zeros, zeros, True
    while int(positions.max()) + num_tokens <= _CHAIN_LEN:
        out = run(wide, positions, accept_lens, num_tokens)
        accept_lens = setting.integers(1, num_tokens + 1, setting.batch)
        for request, (start, count) in enumerate(zip(positions.tolist(), accept_lens.tolist(), strict=True)):
            is_equal &= bool(torch.equal(out[request, :count], expected[request, start : start + count]))
        positions = positions + accept_lens
    return is_equal


def check_model(name: str, log: Log, device: str = "cuda") -> None:
    """Rows of one model: every mtp_step and no graphs against mtp_step 0, and that against transformers."""
    torch.backends.cudnn.allow_tf32 = False
    with TemporaryDirectory(prefix="tandem-") as directory:
        path = DEMO_MODEL if name == "demo" else directory
        if name != "demo":
            write_close_checkpoint(Path(directory), name)
        prompts = make_prompts(path, name)
        plain = answer(path, prompts, 0, device)
        judge: Judge | None = None
        try:
            expected, judge = answer_by_transformers(path, prompts, device)
            _report(log, name, "transformers", plain.tokens, expected, judge, acceptance=0.0, prompts=prompts)
        except FAILURES as failure:
            why = f"{type(failure).__name__}: {failure}"[:300]
            log.add("skipped", what=f"equality of {name} with transformers", why=why)
        variants: list[tuple[str, int, dict[str, Any]]] = [(f"mtp {k}", k, {}) for k in MTP_STEPS[1:]]
        variants += [(f"mtp {k} eager", k, {"disable_cuda_graph": True}) for k in MTP_STEPS]
        for variant, mtp_step, settings in variants:
            if log.is_over():
                log.skip(f"equality of {name} from {variant} on")
                return
            other = answer(path, prompts, mtp_step, device, **settings)
            _report(log, name, variant, other.tokens, plain.tokens, judge, other.acceptance, prompts)


def answer(path: str, prompts: Sequence[list[int]], mtp_step: int, device: str, **settings: Any) -> Served:
    """Greedy tokens of all prompts together."""
    llm = LLM(
        model=path,
        device=device,
        dtype="float32",
        mtp_step=mtp_step,
        speculation="fixed",
        prefix_cache="off",
        max_running_requests=len(prompts),
        max_model_len=_PROMPT_LEN * 8 + _NUM_TOKENS,
        mem_fraction_static=0.2 if device == "cuda" else 0.85,
        **settings,
    )
    params = SamplingParams(temperature=0, max_tokens=_NUM_TOKENS, ignore_eos=True)
    tokens = [served.token_ids for served in serve(llm, [(prompt, params) for prompt in prompts])]
    stats = llm.engine.stats()
    del llm
    gc.collect()
    return Served(tokens, stats.num_accepted / max(1, stats.num_proposed))


def make_prompts(path: str, name: str) -> list[list[int]]:
    """Word problems for the demo checkpoint, random tokens for others."""
    rng = random.Random(0)
    if name != "demo":
        return [draw_tokens(rng, _PROMPT_LEN, dimensions_of(name).vocab) for _ in range(_NUM_PROMPTS)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    return [tokenizer.encode(draw_problem(rng)).ids[: 8 * _PROMPT_LEN] for _ in range(_NUM_PROMPTS)]


def answer_by_transformers(path: str, prompts: Sequence[list[int]], device: str) -> tuple[list[list[int]], Judge]:
    """Greedy tokens, prompt by prompt, and a judge: by how much the logits of two tokens behind a text differ."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = loaded.to(device).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products need bfloat16 on a GPU
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def judge(text: list[int], one: int, other: int) -> float:
        logits = model(torch.tensor([text], device=device)).logits[0, -1]
        return abs(float(logits[one] - logits[other]))

    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=_NUM_TOKENS, do_sample=False, pad_token_id=0)
        outputs.append(whole[0, len(prompt) :].tolist())
    return outputs, judge


def count_differences(
    results: Sequence[list[int]], expected: Sequence[list[int]], prompts: Sequence[list[int]], judge: Judge | None
) -> tuple[int, int]:
    """Answers that differ, and how many of these do so first at two tokens that tie."""
    num_different = num_ties = 0
    for result, wanted, prompt in zip(results, expected, prompts, strict=True):
        if result == wanted:
            continue
        num_different += 1
        where = next((i for i, pair in enumerate(zip(result, wanted, strict=False)) if pair[0] != pair[1]), None)
        if where is not None and judge is not None:
            num_ties += judge(prompt + wanted[:where], result[where], wanted[where]) < _TIE
    return num_different, num_ties


def write_close_checkpoint(directory: Path, preset: str) -> None:
    """A random checkpoint whose draft head is often right: target and draft are mostly the embedding of the newest
    token, and norms of both signs keep a tied head from repeating its input."""
    write_random_checkpoint(directory, preset)
    path = directory / "model.safetensors"
    tensors, source = load_file(path), torch.Generator().manual_seed(1)
    tensors["model.embed_tokens.weight"].mul_(6)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")):
            tensor.mul_(0.1)
        elif tensor.dim() == 1 and not name.endswith(("model.norm.weight", "mtp.norm.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=source) - 0.5)
    hidden = tensors["model.norm.weight"]
    hidden.copy_(2 * torch.rand(hidden.shape, generator=source) - 2)
    tensors["mtp.norm.weight"].copy_(hidden)
    tensors["mtp.pre_fc_norm_embedding.weight"].zero_()
    mix = tensors["mtp.fc.weight"].mul_(0.1)
    mix[:, : len(mix)] += torch.eye(len(mix))
    save_file(tensors, path, metadata={"format": "pt"})


def _report(
    log: Log,
    name: str,
    variant: str,
    results: Sequence[list[int]],
    expected: Sequence[list[int]],
    judge: Judge | None,
    acceptance: float,
    prompts: Sequence[list[int]],
) -> None:
    num_different, num_ties = count_differences(results, expected, prompts, judge)
    row = {"model": name, "variant": variant, "answers": len(results), "different": num_different, "ties": num_ties}
    log.add("equal tokens", **row, acceptance=acceptance, ok=num_different == num_ties)
