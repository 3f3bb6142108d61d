"""Every benchmark's rows become the plots that they are meant for."""

from typing import Any

import pytest

from benchmarks.report_page.results import Result
from benchmarks.report_page.sections import (
    GAIN,
    GPU,
    GROWTH,
    OTHERS,
    PEERS,
    ROOFLINE,
    SPEED,
    TRAINING,
    WEIGHTS,
    Plot,
    make_plots,
)


def plots_of(benchmark: str, results: Any) -> list[Plot]:
    return make_plots(Result("x.json", benchmark, {"results": results}))


def decode_row(batch: int, mtp_step: int, acceptance: str, accept_len: float, gain: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "context": 128,
        "mtp_step": mtp_step,
        "acceptance": acceptance,
        "accept_len": accept_len,
        "gain": gain,
        "tok_s": 100 * gain,
        "bandwidth_share": 0.5,
    }


def test_static_throughput_has_speed_roofline_gain_and_peers() -> None:
    rows = [decode_row(1, 0, "-", 1.0, 1.0), decode_row(1, 1, "0.5", 1.5, 1.2), decode_row(1, 1, "1", 2.0, 1.6)]
    prefill = [{"prompt": 128, "chunk": 512, "reuse": "none", "prompt_tok_s": 1000.0}]
    peers = [{"batch": 1, "tandem_tok_s": 10.0, "transformers_tok_s": 5.0}]
    result = {"preset": "tiny", "rows": rows, "prefill": prefill, "transformers": peers, "overlap": [], "baseline": []}
    plots = plots_of("static_throughput", [result])
    assert [plot.heading for plot in plots] == [SPEED, ROOFLINE, GAIN, SPEED, PEERS]
    speed, roofline, gain = (plot.chart for plot in plots[:3])
    assert speed is not None and roofline is not None and gain is not None
    assert [series.name for series in speed.series] == [
        "mtp_step 0",
        "mtp_step 1, acceptance 0.5",
        "mtp_step 1, acceptance 1",
    ]
    assert roofline.mark == 1.0 and [series.points for series in gain.series] == [[(0.5, 1.2), (1.0, 1.6)]]


def test_older_results_without_speeds_have_what_they_have() -> None:
    result = {"preset": "tiny", "rows": [{"batch": 1, "verify_ms": 1.0}], "transformers": [], "overlap": [{"a": 1}]}
    (plot,) = plots_of("static_throughput", [result])
    assert plot.heading == OTHERS and plot.rows == [{"a": 1}]


def test_scaling_has_a_line_per_preset_and_the_fits() -> None:
    points = [
        {"preset": preset, "axis": axis, "x": x, "step_ms": 2.0 * x, "kv_bytes": 2**20 * x, "state_bytes": 2**20}
        for preset in ("tiny", "0.8B")
        for axis in ("context", "batch")
        for x in (1, 2)
    ]
    plots = plots_of("scaling", {"points": points, "fits": [{"exponent": 1.0}], "skipped": []})
    assert [plot.heading for plot in plots] == [GROWTH] * 4
    assert [len(plot.chart.series) for plot in plots if plot.chart] == [2, 4, 2] and plots[-1].rows


def test_serving_has_speed_and_known_latencies_of_each_server() -> None:
    servers = [
        {"server": name, "output_tok_s": 5.0, "ttft_ms": {"p50": 1.0, "p99": 2.0}, "itl_event_ms": None}
        for name in "ab"
    ]
    plots = plots_of("serving", {"loads": [{"kind": "request_rate", "value": "inf", "servers": servers}]})
    assert [plot.title for plot in plots] == [
        "Served, by request rate",
        "TTFT p50, by request rate",
        "TTFT p99, by request rate",
    ]


def test_peers_have_times_ratios_to_their_rivals_and_loads() -> None:
    decode = [
        {"contestant": name, "batch": 1, "step_ms": 2.0, "ratio": ratio, "ratio_to": "a"}
        for name, ratio in (("a", 1.0), ("b", 2.0))
    ]
    servers = [{"server": "a", "output_tok_s": 5.0, "ttft_ms": None, "itl_event_ms": {"p50": 1.0, "p99": 2.0}}]
    serving = {"loads": [{"kind": "concurrency", "value": 4, "servers": servers}]}
    plots = plots_of("peers", {"decode": decode, "prefill": [], "serving": serving, "versions": {}, "missing": {}})
    assert [plot.heading for plot in plots] == [PEERS, PEERS, PEERS, PEERS, OTHERS]
    charts = [plot.chart for plot in plots if plot.chart]
    names = [[series.name for series in chart.series] for chart in charts]
    assert names == [["a", "b"], ["b over a"], ["a"], ["a"]] and charts[1].mark == 1.0


def test_closed_loop_shows_heads_that_drafted() -> None:
    servers = [{"server": "plain", "acceptance": None}, {"server": "trained", "acceptance": 0.9}]
    (plot,) = plots_of("closed_loop", {"greedy": {"servers": servers}, "claims": {}})
    assert plot.heading == TRAINING and plot.chart is not None and plot.chart.series[0].points == [("trained", 0.9)]


def test_benchmarks_without_plots_of_their_own_are_tables() -> None:
    plots = plots_of("overload", {"itl": [{"itl": "p50"}], "memory": {"a": 1}, "empty": []})
    assert [(plot.heading, plot.title, plot.rows) for plot in plots] == [(OTHERS, "itl", [{"itl": "p50"}])]
    assert plots_of("unheard", 5) == []


def test_results_of_another_form_raise() -> None:
    with pytest.raises(KeyError):
        plots_of("adaptive", {})


def test_a_gpu_has_steps_and_prompts_by_model_and_what_was_checked() -> None:
    def pack(**columns: list[Any]) -> dict[str, Any]:
        return {"columns": list(columns), "rows": [list(row) for row in zip(*columns.values(), strict=True)]}

    decode = pack(
        model=["a", "a", "b"], batch=[1, 1, 1], mtp=[0, 3, 0], tok_s=[5.0, 9.0, 2.0], share_of_floor=[0.9, 0.7, 0.8]
    )
    prefill = pack(model=["a"], requests=[1], tokens=[128], share_of_floor=[0.5])
    tables = {"decode": decode, "prefill": prefill, "rollback": pack(ratio=[1.5]), "trace": pack(file=["x"])}
    plots = plots_of("gpu_suite", {"is_red": False, **tables})
    assert {plot.heading for plot in plots} == {GPU}
    assert [plot.title for plot in plots] == ["Decode, a", "Step, a", "Decode, b", "Step, b", "Prompts", "Rollback"]
    assert plots[0].chart is not None and [series.name for series in plots[0].chart.series] == [
        "mtp_step 0",
        "mtp_step 3",
    ]
    assert plots[-1].rows == [{"ratio": 1.5}]


def test_weight_updates_have_times_of_each_way_and_the_load() -> None:
    times = {"update_seconds": 2.0, "publish_seconds": 1.0, "commit_ms": 100.0, "longest_gap_ms": 150.0}
    plots = plots_of("weight_updates", {"load": {"lost": []}, "times": [{"way": "disk", **times}]})
    assert [(plot.heading, plot.title) for plot in plots] == [
        (WEIGHTS, "An update"),
        (WEIGHTS, "Of these, without tokens"),
        (WEIGHTS, "Under load"),
    ]
    assert plots[1].chart is not None and plots[1].chart.series[0].points == [("disk", 100.0)]
    assert len(plots_of("weight_updates", {"times": [{"way": "disk", **times}], "claims": {}})) == 2
    assert [plot.title for plot in plots_of("weight_updates", {"load": {"lost": []}, "claims": {}})] == ["Under load"]
