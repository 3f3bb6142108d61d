"""The suite's own logic on a CPU: formulas against tables and interpreted kernels, jobs, and steps with fake events."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import random_checkpoint
from benchmarks.gpu_suite import __main__ as command
from benchmarks.gpu_suite import card, decode, equality, forced_acceptance, prefill, rollback, static_decode, timeline
from benchmarks.gpu_suite.bytes import step_bytes
from benchmarks.gpu_suite.card import CardSpeed
from benchmarks.gpu_suite.case import Case, Setting, compare
from benchmarks.gpu_suite.checks import red_cases, run_checks, run_times, sources
from benchmarks.gpu_suite.dimensions import Dimensions, dimensions_of
from benchmarks.gpu_suite.jobs import PARTS, Stage, plan
from benchmarks.gpu_suite.log import Log, read_rows
from benchmarks.gpu_suite.processes import run_stages
from benchmarks.gpu_suite.roofline import Card, Workload, floor_bytes, floor_seconds, prefill_floor_seconds, step_pieces
from benchmarks.gpu_suite.summary import even, is_red, pack, print_results
from kernels.gpu.dispatch import triton_takes
from unit_tests.benchmarks.byte_counter import count_bytes

H200 = Card(4.3e12, 790e12)
SPEED = CardSpeed(bandwidth=1e9, matmul_rate=1e12, empty_seconds=1e-6)
# Milliseconds of a step at mtp_step 0, 1 and 3 on an H200, context 2048: the project's kernel notes.
FLOORS = {
    ("0.8B", 1): (0.37, 0.50, 0.75),
    ("0.8B", 32): (0.86, 1.03, 1.39),
    ("0.8B", 128): (2.38, 2.84, 3.98),
    ("0.8B", 256): (4.54, 5.62, 7.77),
    ("4B", 1): (2.00, 2.35, 3.06),
    ("4B", 32): (3.27, 3.70, 4.58),
    ("4B", 128): (7.20, 8.67, 12.78),
    ("9B", 32): (5.00, 5.67, 7.02),
    ("9B", 256): (15.64, 22.44, 36.03),
    ("27B", 1): (12.02, 12.82, 14.40),
    ("27B", 32): (15.31, 16.20, 17.97),
    ("27B", 128): (25.49, 31.37, 50.50),
    ("27B", 256): (43.76, 62.53, 100.05),
    ("35B-A3B", 1): (1.41, 2.14, 3.57),
    ("35B-A3B", 32): (11.79, 15.88, 18.73),
    ("35B-A3B", 128): (20.93, 22.04, 23.73),
    ("35B-A3B", 256): (26.48, 27.57, 29.71),
}
SMALL = Dimensions(
    hidden=40,
    num_delta_layers=3,
    num_full_layers=1,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    key_heads=1,
    value_heads=2,
    key_dim=24,
    value_dim=20,
    taps=4,
    vocab=3000,
    experts=8,
    chosen=2,
    expert_size=24,
    shared_size=32,
)
NANO = {
    **random_checkpoint.PRESETS["tiny"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "vocab_size": 300,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
ON_CPU = {"device": "cpu", "mem_fraction_static": 0.5, "num_threads": 1}


class FakeEvent:
    """The host's clock."""

    def __init__(self, enable_timing: bool):
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1e3 * (other.time - self.time)


class FakeTimer:
    """Runs what it is to time, once."""

    def seconds(self, function: Callable[[], object]) -> float:
        function()
        return 1e-3


def capture(function: Any) -> tuple[Any, Any, int]:
    """What a CUDA graph would be: runs it again."""
    results = function()
    return function, results, 0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Events, and steps that repeat; interpreted kernels take tensors on the CPU."""
    monkeypatch.setitem(random_checkpoint.OTHER_PRESETS, "nano", NANO)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(static_decode, "capture_graph", capture)
    monkeypatch.setattr(static_decode, "ROUNDS", 2)
    with triton_takes("cpu"):
        yield


def make_setting(num_tokens: int, context: int = 300, is_ragged: bool = False) -> Setting:
    torch.manual_seed(num_tokens)
    sizes = (2, num_tokens, torch.float32, "cpu", context)
    return Setting("small", SMALL, *sizes, is_ragged=is_ragged, prefill_tokens=20)


def all_cases(setting: Setting) -> Iterator[Case]:
    for source in sources(setting):
        yield from source(setting)


@pytest.mark.parametrize("model_and_batch", FLOORS)
def test_the_floor_is_that_of_the_notes(model_and_batch: tuple[str, int]) -> None:
    model, batch = model_and_batch
    for mtp_step, expected in zip((0, 1, 3), FLOORS[model_and_batch], strict=True):
        seconds = floor_seconds(dimensions_of(model), Workload(batch, mtp_step), H200)
        assert 1e3 * seconds == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("batch", "mtp_step"), [(32, 0), (32, 1), (32, 3), (128, 0), (128, 1)])
def test_kernels_of_a_step_move_little_more_than_the_floor(batch: int, mtp_step: int) -> None:
    """At batch 128 with three drafts a step is bound by products, and activations are a sixth of the bytes."""
    sizes, work = dimensions_of("27B"), Workload(batch, mtp_step)
    assert 1.0 < step_bytes(sizes, work) / floor_bytes(sizes, work) < 1.1


def test_the_first_draft_pass_runs_its_layer_for_the_newest_rows_alone() -> None:
    first, later = step_pieces(dimensions_of("35B-A3B"), Workload(8, 3))["draft"][:4:3]
    assert first.num_bytes == later.num_bytes and later.num_flops < first.num_flops < 2 * later.num_flops


@pytest.mark.parametrize(("num_tokens", "context"), [(1, 300), (3, 300), (2, 4100)])
def test_interpreted_kernels_touch_as_many_bytes_as_counted(num_tokens: int, context: int) -> None:
    setting = make_setting(num_tokens, context)
    if context > 2048:  # a tree of more than one level, for attention alone
        cases = [case for case in sources(setting)[1](replace(setting, batch=1)) if case.op == "verify_attention"]
    else:
        cases = [case for case in all_cases(setting) if case.op not in ("draw filtered", "gated_delta_rule_prefill")]
    for case in cases:
        with torch.no_grad(), count_bytes() as counter:
            case.run()
        assert counter.total == pytest.approx(case.moved.num_bytes, rel=0.01), case.op


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_every_case_equals_its_law(num_tokens: int, tmp_path: Path) -> None:
    setting = make_setting(num_tokens, is_ragged=True)
    log = Log(tmp_path / "rows", 60)
    run_checks(iter([setting]), log)
    rows = read_rows(tmp_path / "rows")
    assert [row for row in rows if not row["ok"]] == []
    ops = {"draw", "draw filtered", "accept_and_commit", "run_experts", "verify_attention", "gated_delta_net_verify"}
    assert ops < {row["op"] for row in rows}


def test_a_wrong_kernel_is_red_and_one_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of something\nmore")

    from benchmarks.gpu_suite import other_cases

    monkeypatch.setattr(other_cases.norm_kernels, "rms_norm", lambda x, scale, eps: x * 1.01 * scale)
    monkeypatch.setattr(other_cases.attention_kernels, "verify_attention", fail)
    setting = make_setting(2)
    run_checks(iter([setting]), Log(tmp_path / "rows", 60))
    rows = read_rows(tmp_path / "rows")
    red = {row["op"]: row["note"] for row in rows if not row["ok"]}
    assert red == {"rms_norm": "", "verify_attention": "RuntimeError: out of something"}
    assert ("rms_norm", "small", 2, 2, "float32") in red_cases(rows)


def test_errors_are_measured_against_the_size_of_the_values() -> None:
    expected = torch.tensor([1.0, -2.0, 3.0])
    assert compare(expected, expected, 1e-3) == 0
    assert 0.1 < compare(expected + 1e-3, expected, 1e-3) < 1
    assert compare(expected * torch.nan, expected, 1e-3) == float("inf")
    assert compare(expected[:2], expected, 1e-3) == float("inf")
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 3]), 1e-3) == float("inf")
    assert compare(torch.tensor([1, 2]), torch.tensor([1, 3]), 1e-3, slack=0.5) == 1


def test_acceptance_follows_its_trace() -> None:
    trace = forced_acceptance.make_trace(400, 50, 3, 0.85, "cpu")
    assert trace.double().mean() == pytest.approx(0.85 + 0.85**2 + 0.85**3, rel=0.02)
    assert (trace[:, 0] == forced_acceptance.make_trace(400, 50, 3, 0.85, "cpu")[:, 0]).all()


def test_static_steps_emit_what_the_trace_says(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with static_decode.config_directory("nano") as directory:
        llm, batch = static_decode.load_largest(directory, [1, 2], 1, 24, **ON_CPU)
    bench = static_decode.StaticDecode(llm, 24)
    module = sys.modules[type(bench.step).__module__]
    original = module.accept_and_commit  # type: ignore[attr-defined]
    expected = 1 + forced_acceptance.make_trace(64, batch, 1, static_decode.ACCEPTANCE, "cpu")[:4].double().mean()
    assert bench.measure(batch, 1).tokens_per_step == pytest.approx(float(expected))
    assert bench.measure(batch, 0).tokens_per_step == 1
    assert module.accept_and_commit is original  # type: ignore[attr-defined]
    monkeypatch.setattr(decode, "_PROMPT_LEN", 6)
    loop = decode.measure_loop(llm, "nano", 1, num_steps=2)
    assert loop["wall_ms"] > 0
    assert 0 <= loop["idle_share"] < 1


def test_prompts_and_transformers_stand_beside_a_floor(
    fake_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PEER_BATCHES", (1,))
    monkeypatch.setattr(decode, "_PROMPT_LEN", 6)
    monkeypatch.setattr(decode, "_PEER_TOKENS", 2)
    monkeypatch.setattr(prefill, "_ROUNDS", 1)
    with static_decode.config_directory("nano") as directory:
        llm, _ = static_decode.load_largest(directory, [2], 0, 24, **ON_CPU)
    row = prefill.measure_prefill(llm, "nano", 2, 5, SPEED, lambda: None)
    assert row["tok_s"] == pytest.approx(10 / (row["ms"] / 1e3)) and 0 < row["share_of_floor"] < 1
    decode.compare_transformers("nano", llm, static_decode.StaticDecode(llm, 24), SPEED, Log(tmp_path / "rows", 60))
    rows = {row["table"]: row for row in read_rows(tmp_path / "rows")}
    assert set(rows) == {"transformers", "transformers prefill"}
    assert rows["transformers prefill"]["tokens"] == 24 and rows["transformers prefill"]["transformers_ms"] > 0


def test_the_floor_of_prompts_is_their_products_or_the_weights() -> None:
    sizes = dimensions_of("27B")
    assert prefill_floor_seconds(sizes, [1], H200) == pytest.approx(48.7e9 / H200.bandwidth, rel=0.03)
    weights = prefill_floor_seconds(sizes, [4000], H200), 2 * prefill_floor_seconds(sizes, [2000], H200)
    assert 1.0 < weights[0] / weights[1] < 1.05, "only attention grows faster than the prompt"


def test_a_model_that_fits_nowhere_is_skipped_and_says_why(fake_cuda: None, tmp_path: Path) -> None:
    decode.run_decode("nano", SPEED, Log(tmp_path / "rows", 60), [1, 2], 24, **{**ON_CPU, "max_total_tokens": 1})
    (row,) = read_rows(tmp_path / "rows")
    assert (row["table"], row["what"]) == ("skipped", "decode nano") and "batch 1: " in row["why"]


def test_speed_is_described_by_floor_and_bytes() -> None:
    measured = static_decode.Measured(0.040, 2.5, 2**20)
    row = decode.describe(measured, dimensions_of("27B"), Workload(32, 3), CardSpeed(4.3e12, 790e12, 1e-6))
    assert row["tok_s"] == pytest.approx(32 * (1 + 0.85 + 0.85**2 + 0.85**3) / 0.040)
    assert row["share_of_floor"] == pytest.approx(18.0 / 40, rel=0.02)
    assert row["share_of_bytes"] > row["share_of_floor"]


def test_snapshots_and_replay_give_the_same_bits() -> None:
    assert rollback.equal_bits(make_setting(3))


def test_chains_of_wider_steps_have_the_bits_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "_CHAIN_LEN", 6)
    assert equality.equal_chains(make_setting(1), 3)


def test_a_model_answers_the_same_with_any_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(random_checkpoint.OTHER_PRESETS, "nano", NANO)
    monkeypatch.setattr(equality, "_NUM_PROMPTS", 2)
    monkeypatch.setattr(equality, "_NUM_TOKENS", 6)
    equality.check_model("nano", Log(tmp_path / "rows", 60), "cpu")
    rows = read_rows(tmp_path / "rows")
    assert all(row["ok"] for row in rows if row["table"] == "equal tokens")
    assert {row["variant"] for row in rows} >= {"transformers", "mtp 1", "mtp 3", "mtp 0 eager"}


def test_differences_are_red_unless_the_two_tokens_tie() -> None:
    results, expected, prompts = [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 5], [7, 6]], [[9]] * 3
    asked = []

    def judge(text: list[int], one: int, other: int) -> float:
        asked.append((text, one, other))
        return 0.0 if one == 4 else 1.0

    assert equality.count_differences(results, expected, prompts, judge) == (2, 1)
    assert asked == [([9, 3], 4, 5), ([9], 5, 7)]
    assert equality.count_differences(results, expected, prompts, None) == (2, 0)


def test_jobs_run_in_stages_and_neither_a_crash_nor_a_slow_one_stops_the_rest(tmp_path: Path) -> None:
    code = """
import json, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print(json.dumps({"table": "rows", "job": flags["--job"]}), file=open(flags["--rows"], "w"), flush=True)
if flags["--job"] == "crash": sys.exit("no such luck")
assert flags["--job"] != "last" or len(json.load(open(flags["--known"]))) == 3
"""
    command = [sys.executable, "-c", code]
    rows = run_stages(command, [Stage(("one", "crash"), 1.0), Stage(("last",), 1.0)], tmp_path, 120)
    assert [row["job"] for row in rows if row["table"] == "rows"] in (
        ["one", "crash", "last"],
        ["crash", "one", "last"],
    )
    assert [row["note"] for row in rows if row["table"] == "crashes"] == ["no such luck"]
    assert is_red(rows)
    late = run_stages(command, [Stage(("one",), 1.0)], tmp_path, 20)
    assert late == [{"table": "skipped", "what": "one", "why": "time ran out"}]


def test_the_plan_holds_what_was_asked_for() -> None:
    jobs = [job for stage in plan(PARTS, ("27B",)) for job in stage.jobs]
    assert [job for job in jobs if "27B" in job] == [
        *("checks/27B/bfloat16", "checks/27B/float32", "decode/27B", "times/27B")
    ]
    assert {"card", "equality/tiny-moe", "rollback", "trace"} < set(jobs)
    assert [stage.jobs for stage in plan(("trace",), ("27B",))] == [("card",), ("trace",)]


def test_results_are_tables_and_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    key = {"table": "kernel checks", "op": "draw", "dtype": "float32"}
    rows = [
        {**key, "ok": True, "error": 0.5},
        {**key, "ok": False, "error": 7.0},
        {"table": "decode", "ms": 1.23456789},
    ]
    text = print_results(rows, {"parts": []})
    printed = capsys.readouterr().out
    assert printed.endswith(text)
    results = json.loads(printed.splitlines()[-1])["results"]
    assert results["is_red"] is True
    assert results["kernel checks"]["rows"] == [["draw", "float32", 2, 1, 7.0]]
    assert results["red kernel checks"]["rows"] == [["draw", "float32", False, 7.0]]
    assert results["decode"] == {"columns": ["ms"], "rows": [[1.2346]]}
    assert pack(even([{"a": 1}, {"b": 2}])) == {"columns": ["a", "b"], "rows": [[1, ""], ["", 2]]}
    assert is_red([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().out


def test_times_come_with_peers_and_without_red_cases(tmp_path: Path) -> None:
    red = {("rms_norm", "small", 2, 1, "float32")}
    run_times([make_setting(1)], red, SPEED, FakeTimer(), Log(tmp_path / "rows", 60))  # type: ignore[arg-type]
    rows = read_rows(tmp_path / "rows")
    timed = {(row["op"], row["who"]): row for row in rows if row["table"] == "kernel times"}
    assert {("verify_attention", "triton"), ("verify_attention", "torch sdpa"), ("silu_and_mul", "torch")} < set(timed)
    assert ("rms_norm", "triton") not in timed
    row = timed["silu_and_mul", "triton"]
    assert row["gb_s"] == pytest.approx(3 * 2 * 32 * 4 / 1e-3 / 1e9)
    assert row["share"] == pytest.approx(row["gb_s"])  # of 1 GB/s
    failed = {(row["op"], row["who"]): row["note"] for row in rows if row["table"] == "kernel failures"}
    assert all(who != "triton" for _, who in failed)


def test_rollback_adds_what_snapshots_take_to_a_measured_step() -> None:
    times = iter([2e-6, 6e-6, 5e-6])
    timer = SimpleNamespace(seconds=lambda function: (function(), next(times))[1])
    row = rollback.compare_schemes(make_setting(2), SPEED, timer, step_ms=1.0)  # type: ignore[arg-type]
    assert row["ok"]
    assert row["ratio"] == pytest.approx(2.5)
    assert row["step_with_snapshots_ms"] == pytest.approx(1.0 + 3 * 3e-3)
    assert row["step_ratio"] == pytest.approx(1.009)


def test_graphs_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[str] = []

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1024))
    monkeypatch.setattr(card, "_COPY_BYTES", 4096)
    monkeypatch.setattr(card, "_MATMUL_SIZE", 16)
    assert card.Timer("cpu").seconds(lambda: None, rounds=3) >= 0
    assert len(replays) == 5
    speed = card.measure_card("cpu")
    assert speed.bandwidth > 0
    assert speed.matmul_rate > 0


def test_a_trace_shows_what_a_step_consists_of(
    fake_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "NUM_STEPS", 1)
    traces = [(("nano",), 1, 1), (("nano",), 1, 0)]
    timeline.run_timeline(tmp_path / "x.trace.json", Log(tmp_path / "rows", 60), traces, context=8, **ON_CPU)
    assert json.loads((tmp_path / "x.trace.json").read_text())["traceEvents"]
    assert read_rows(tmp_path / "rows")[0]["table"] == "trace"
    events = [SimpleNamespace(key=f"kernel {i}", count=2, self_device_time_total=float(i)) for i in range(20)]
    rows = timeline.summarise(events)
    assert [row["kernel"] for row in rows] == [f"kernel {i}" for i in range(19, 4, -1)]
    assert rows[0]["share"] == pytest.approx(19 / 190)


def test_the_command_gathers_rows_and_says_whether_they_are_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row: dict[str, Any] = {"table": "equal tokens", "ok": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(command, "run_stages", lambda *_: [row])
    out = tmp_path / "out.json"
    assert command.main(["--out", str(out), "--part", "equality"]) == 0
    assert json.loads(out.read_text())["device"] == "a card"
    row["ok"] = False
    assert command.main(["--out", str(out), "--part", "equality"]) == 1


def test_a_process_of_the_suite_does_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_suite import jobs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(jobs, "measure_card", lambda: SPEED)
    (tmp_path / "known").write_text("[]")
    flags = ["--job", "card", "--rows", str(tmp_path / "rows"), "--known", str(tmp_path / "known")]
    assert command.main([*flags, "--deadline", str(time.time() + 9)]) == 0
    (row,) = read_rows(tmp_path / "rows")
    assert row["tflop_s"] == 1
    assert jobs.card_speed([row]) == SPEED
