"""Every kernel against its law, and how fast it is: `run_checks` first, then `run_times` of what was not red."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu_suite.card import FAILURES, CardSpeed, Timer, speed_row
from benchmarks.gpu_suite.case import WORST, Case, Setting, check
from benchmarks.gpu_suite.delta_cases import delta_prefill_cases, delta_verify_cases
from benchmarks.gpu_suite.dimensions import dimensions_of
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.other_cases import attention_cases, feed_forward_cases, norm_cases, prefill_attention_case
from benchmarks.gpu_suite.token_cases import token_cases

MODELS = ("0.8B", "27B", "35B-A3B")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_BATCHES, _TOKENS = (1, 32, 128), (1, 2, 4)

Source = Callable[[Setting], Iterator[Case]]


def make_settings(model: str, dtype: str, is_ragged: bool, device: str = "cuda") -> Iterator[Setting]:
    """Of every batch size and every number of tokens."""
    for batch in _BATCHES:
        for num_tokens in _TOKENS:
            sizes = dimensions_of(model)
            yield Setting(model, sizes, batch, num_tokens, DTYPES[dtype], device, is_ragged=is_ragged)


def sources(setting: Setting) -> list[Source]:
    """Where the cases of a setting come from; prefill does not depend on T."""
    always: list[Source] = [delta_verify_cases, attention_cases, norm_cases, feed_forward_cases, token_cases]
    return [*always, _prefill_cases] if setting.num_tokens == 1 else always


def run_checks(settings: Iterator[Setting], log: Log) -> None:
    """A row per case: whether it is the law's, and how far off. A case that fails to run is red."""
    for setting in settings:
        for source in sources(setting):
            if log.is_over():
                log.skip(f"kernel checks from {setting.model} {setting.dtype} batch {setting.batch} on")
                return
            _check_source(source, setting, log)
            _free_memory(setting)


def run_times(settings: Sequence[Setting], red: set[tuple[Any, ...]], card: CardSpeed, timer: Timer, log: Log) -> None:
    """A row per case that is not `red`; then one per peer on such inputs, which may have to be compiled for minutes."""
    for are_peers in (False, True):
        for setting in settings:
            for source in sources(setting):
                if log.is_over():
                    what = "peers" if are_peers else "kernel times"
                    log.skip(f"{what} from {setting.model} batch {setting.batch} tokens {setting.num_tokens} on")
                    return
                _time_source(source, setting, red, card, timer, log, are_peers)
                _free_memory(setting)


def red_cases(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """The keys of all cases whose check is not ok, from the rows of `run_checks`."""
    names = ("op", "model", "batch", "tokens", "dtype")
    return {tuple(row[name] for name in names) for row in rows if row["table"] == "kernel checks" and not row["ok"]}


def _prefill_cases(setting: Setting) -> Iterator[Case]:
    yield from delta_prefill_cases(setting)
    yield prefill_attention_case(setting)


def _check_source(source: Source, setting: Setting, log: Log) -> None:
    op = source.__name__.strip("_")
    try:
        for case in source(setting):
            op = case.op
            log.add("kernel checks", **check(case), note="")
    except FAILURES as failure:
        log.add("kernel checks", **setting.key(op), ok=False, error=WORST, note=_describe(failure))
        _leave_if_lost(failure)


@torch.no_grad()
def _time_source(
    source: Source,
    setting: Setting,
    red: set[tuple[Any, ...]],
    card: CardSpeed,
    timer: Timer,
    log: Log,
    are_peers: bool,
) -> None:
    try:
        for case in source(setting):
            if tuple(case.key.values()) not in red:
                _time_case(case, case.peers if are_peers else {"triton": case.run}, card, timer, log)
    except FAILURES as failure:
        key = setting.key(source.__name__.strip("_"))
        log.add("kernel failures", **key, who="triton", note=_describe(failure))
        _leave_if_lost(failure)


def _time_case(case: Case, functions: dict[str, Callable[[], object]], card: CardSpeed, timer: Timer, log: Log) -> None:
    for name, function in functions.items():
        try:
            seconds = timer.seconds(function)
        except FAILURES as failure:
            log.add("kernel failures", **case.key, who=name, note=_describe(failure))
            _leave_if_lost(failure)
            continue
        speed = speed_row(case.moved.num_bytes, case.moved.num_flops, seconds, card)
        log.add("kernel times", **case.key, who=name, **speed)


def _describe(failure: BaseException) -> str:
    text = str(failure).strip()
    return f"{type(failure).__name__}: {text.splitlines()[0][:160] if text else ''}"


def _leave_if_lost(failure: BaseException) -> None:
    """After an error of the device itself nothing more runs in this process."""
    if "CUDA error" in str(failure):
        raise SystemExit(f"the device is lost to this process: {_describe(failure)}")


def _free_memory(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.empty_cache()
