"""What is drawn of each benchmark: its results -> plots under the headings of the page."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report_page.charts import Chart, Series
from benchmarks.report_page.results import Result

SPEED, GAIN, ROOFLINE, MEMORY = "Throughput", "Gain of MTP", "Roofline", "Memory per request"
PEERS, GROWTH, CACHE, TRAINING, OTHERS = "Peers", "Growth", "Prefix cache", "Training", "Others"
GPU, WEIGHTS = "On a GPU", "Weight updates"
HEADINGS = (SPEED, GAIN, ROOFLINE, MEMORY, PEERS, GROWTH, CACHE, GPU, WEIGHTS, TRAINING, OTHERS)

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A chart, or rows for a table, under one of the headings."""

    heading: str
    title: str
    chart: Chart | None = None
    rows: Rows = ()


def make_plots(result: Result) -> list[Plot]:
    """All plots of a result, tables for a benchmark that none are known of. Raises LookupError, TypeError or ValueError
    for results of another form."""
    return list(SECTIONS.get(result.benchmark, plot_tables)(result.results))


def plot_static(results: Rows) -> Iterator[Plot]:
    """Of static_throughput. Results of before a column existed have no plot of it."""
    for result in results:
        name = result["preset"]
        for context, rows in _group(_with(result["rows"], "tok_s", "context"), "context"):
            where = f"{name}, context {context}"
            yield _bars(SPEED, f"Decode, {where}", "batch", "tokens per second", rows, _label, "tok_s")
            share = "share of memory bandwidth"
            yield _bars(ROOFLINE, f"Step, {where}", "batch", share, rows, _label, "bandwidth_share", 1.0)
            yield from _plot_gain(where, rows)
        for context, rows in _group(result.get("prefill", ()), "prompt"):
            title = f"Prefill of {context} tokens, {name}"
            yield _bars(SPEED, title, "chunk", "prompt tokens per second", rows, "reuse", "prompt_tok_s")
        peers = result["transformers"]
        if peers:
            columns = (("Tandem", "tandem_tok_s"), ("transformers", "transformers_tok_s"))
            series = [Series(label, [(str(row["batch"]), row[column]) for row in peers]) for label, column in columns]
            yield Plot(PEERS, f"Decode without drafts, {name}", Chart("bars", "batch", "tokens per second", series))
        tables = ((key, result.get(key)) for key in ("overlap", "baseline"))
        yield from (Plot(OTHERS, f"{key}, {name}", rows=rows) for key, rows in tables if rows)


def _plot_gain(where: str, rows: Rows) -> Iterator[Plot]:
    for batch, group in _group([row for row in rows if row["mtp_step"]], "batch"):
        series = [
            Series(f"mtp_step {k}", [((row["accept_len"] - 1) / k, row["gain"]) for row in of_k])
            for k, of_k in _group(group, "mtp_step")
        ]
        chart = Chart("lines", "accepted share of the drafts", "speed over mtp_step 0", series, mark=1.0)
        yield Plot(GAIN, f"{where}, batch {batch}", chart)


def _label(row: dict[str, Any]) -> str:
    return f"mtp_step {row['mtp_step']}" + (f", acceptance {row['acceptance']}" if row["mtp_step"] else "")


def plot_scaling(results: dict[str, Any]) -> Iterator[Plot]:
    """Of scaling: one chart per axis with a line per preset, and the fits."""
    for axis, rows in _group(results["points"], "axis"):
        series = [Series(name, [(row["x"], row["step_ms"]) for row in own]) for name, own in _group(rows, "preset")]
        yield Plot(GROWTH, f"Step against {axis}", Chart("lines", axis, "ms per step", series, is_log=True))
        if axis == "context":
            kinds = (("keys and values", "kv_bytes"), ("GDN state and rings", "state_bytes"))
            series = [
                Series(f"{name}, {label}", [(row["x"], row[column] / 2**20) for row in own])
                for name, own in _group(rows, "preset")
                for label, column in kinds
            ]
            yield Plot(GROWTH, "Memory against context", Chart("lines", axis, "MiB per request", series, is_log=True))
    yield Plot(GROWTH, "Fits", rows=results["fits"])


def plot_memory(results: Rows) -> Iterator[Plot]:
    """Of memory_per_request: requests in the same memory, and what one takes."""
    for (preset, k), rows in _group(results, "preset", "mtp_step"):
        counts = {"replay": "replay_requests", "a state per draft": "snapshot_requests"}
        series = [Series(label, [(f"{row['context']:,}", row[name]) for row in rows]) for label, name in counts.items()]
        yield Plot(MEMORY, f"{preset}, mtp_step {k}", Chart("bars", "context", "requests that fit", series))
        parts = {"keys and values": "kv_and_history_mib", "replay": "replay_mib", "a state per draft": "snapshots_mib"}
        series = [Series(label, [(f"{row['context']:,}", row[name]) for row in rows]) for label, name in parts.items()]
        yield Plot(MEMORY, f"Bytes, {preset}, mtp_step {k}", Chart("bars", "context", "MiB", series))


def plot_serving(results: dict[str, Any], heading: str = SPEED) -> Iterator[Plot]:
    """Of serving: speed and latency under each load."""
    for kind, group in _group(results["loads"], "kind"):
        rows = [server | {"load": load["value"]} for load in group for server in load["servers"]]
        about = kind.replace("_", " ")
        speed = "output tokens per second"
        yield _bars(heading, f"Served, by {about}", about, speed, rows, "server", "output_tok_s", x="load")
        for latency, share in (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("itl_event_ms", "p99")):
            known = [row | {"value": row[latency][share]} for row in rows if row[latency]]
            if known:
                title = f"{latency.split('_')[0].upper()} {share}, by {about}"
                yield _bars(heading, title, about, "ms", known, "server", "value", x="load")


def plot_peers(results: dict[str, Any]) -> Iterator[Plot]:
    """Of peers: times of every contestant, their ratios to the rival that each is set against, and servers under load;
    all rows as tables, too."""
    for kind, x, value in (("decode", "batch", "step_ms"), ("prefill", "prompt", "prefill_ms")):
        rows = results.get(kind, ())
        if rows:
            yield _bars(PEERS, f"{kind.capitalize()}, all contestants", x, value, rows, "contestant", value)
        others = [row for row in rows if row["contestant"] != row["ratio_to"]]
        if others:
            yield _bars(
                PEERS, f"{kind.capitalize()}, ratios", x, "time over the rival's", others, _rivals, "ratio", 1.0
            )
    if "serving" in results:
        yield from plot_serving(results["serving"], PEERS)
    yield from plot_tables(results)


def _rivals(row: dict[str, Any]) -> str:
    return f"{row['contestant']} over {row['ratio_to']}"


def plot_adaptive(results: dict[str, Any]) -> Iterator[Plot]:
    """Of adaptive: speeds of the ways to plan."""
    yield _bars(GAIN, "Adaptive depth, demo", "batch", "tokens per second", results["contenders"], "contender", "tok_s")


def plot_multi_turn(results: dict[str, Any]) -> Iterator[Plot]:
    """Of multi_turn: the first token of each turn."""
    for model, rows in _group(results["turns"], "model"):
        columns = (("without the cache", "ttft_off_ms"), ("with it", "ttft_on_ms"))
        series = [Series(label, [(row["turn"], row[column]) for row in rows]) for label, column in columns]
        yield Plot(CACHE, f"Turns of a chat, {model}", Chart("lines", "turn", "ms to the first token", series))


def plot_training(results: Rows) -> Iterator[Plot]:
    """Of training_speed."""
    for shape, rows in _group(results, "shape"):
        named = [row | {"size": f"{row['batch']} x {row['length']}"} for row in rows]
        speed = "speed over transformers"
        yield _bars(TRAINING, f"Speed, {shape}", "batch x length", speed, named, "task", "ratio", 1.0, x="size")


def plot_closed_loop(results: dict[str, Any]) -> Iterator[Plot]:
    """Of closed_loop: acceptance of each head."""
    for kind in ("greedy", "sampled"):
        rows = [row for row in results.get(kind, {}).get("servers", ()) if row["acceptance"] is not None]
        if rows:
            series = [Series("acceptance", [(row["server"], row["acceptance"]) for row in rows])]
            chart = Chart("bars", "head", "accepted share", series)
            yield Plot(TRAINING, f"A head that follows its policy, {kind}", chart)


def plot_gpu_suite(results: dict[str, Any]) -> Iterator[Plot]:
    """Of gpu_suite: whole steps by batch size, prompts, and what both schemes of rollback take."""
    tables = {name: _unpack(table) for name, table in results.items() if isinstance(table, dict)}
    for model, rows in _group(tables.get("decode", ()), "model"):
        speed, share = "tokens per second", "share of the floor"
        yield _bars(GPU, f"Decode, {model}", "batch", speed, rows, _drafts, "tok_s")
        yield _bars(GPU, f"Step, {model}", "batch", share, rows, _drafts, "share_of_floor", 1.0)
    prompts = [row | {"size": f"{row['requests']} x {row['tokens']}"} for row in tables.get("prefill", ())]
    if prompts:
        share = "share of the floor"
        yield _bars(GPU, "Prompts", "requests x tokens", share, prompts, "model", "share_of_floor", 1.0, x="size")
    for name in ("kernel checks", "equal tokens", "rollback", "engine loop", "transformers"):
        if name in tables:
            yield Plot(GPU, name.capitalize(), rows=tables[name])


def _drafts(row: dict[str, Any]) -> str:
    return f"mtp_step {row['mtp']}"


def _unpack(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def plot_weight_updates(results: dict[str, Any]) -> Iterator[Plot]:
    """Of weight_updates: how long each way takes, and how long streams stand still; the parts that were run."""
    rows = results.get("times", ())
    for title, columns in (
        ("An update", {"until it serves": "update_seconds", "the publisher's part": "publish_seconds"}),
        ("Of these, without tokens", {"commit": "commit_ms", "longest gap of a stream": "longest_gap_ms"}),
    ):
        if not rows:
            break
        series = [Series(label, [(row["way"], row[column]) for row in rows]) for label, column in columns.items()]
        unit = "seconds" if title == "An update" else "ms"
        yield Plot(WEIGHTS, title, Chart("bars", "way", unit, series))
    if "load" in results:
        yield Plot(WEIGHTS, "Under load", rows=[results["load"]])


def plot_tables(results: Any) -> Iterator[Plot]:
    """Whatever rows there are."""
    tables = results if isinstance(results, dict) else {"": results}
    for name, rows in tables.items():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            yield Plot(OTHERS, name.replace("_", " "), rows=rows)


SECTIONS: dict[str, Callable[[Any], Iterable[Plot]]] = {
    "static_throughput": plot_static,
    "scaling": plot_scaling,
    "memory_per_request": plot_memory,
    "serving": plot_serving,
    "peers": plot_peers,
    "adaptive": plot_adaptive,
    "multi_turn": plot_multi_turn,
    "training_speed": plot_training,
    "closed_loop": plot_closed_loop,
    "gpu_suite": plot_gpu_suite,
    "weight_updates": plot_weight_updates,
}


def _bars(
    heading: str,
    title: str,
    x_label: str,
    y_label: str,
    rows: Rows,
    label: str | Callable[[dict[str, Any]], str],
    value: str,
    mark: float | None = None,
    x: str = "",
) -> Plot:
    """A group of bars for each value of the column x (x_label, if not given), a colour for each label."""
    series: dict[str, list[tuple[float | str, float]]] = {}
    for row in rows:
        name = row[label] if isinstance(label, str) else label(row)
        series.setdefault(name, []).append((str(row[x or x_label]), row[value]))
    chart = Chart("bars", x_label, y_label, [Series(name, points) for name, points in series.items()], mark=mark)
    return Plot(heading, title, chart)


def _group(rows: Rows, *names: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Rows by the values of these columns, in the order in which they come first."""
    keys = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    for key in keys:
        own = [row for row in rows if tuple(row[name] for name in names) == key]
        yield (key[0] if len(names) == 1 else key), own


def _with(rows: Rows, *names: str) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) is not None for name in names)]
