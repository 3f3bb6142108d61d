"""Results as they stand in the JSON object -> tables for people, and what must be said beside them."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.report import print_table
from benchmarks.serving.answer import EVENTS
from benchmarks.serving.summary import LATENCIES

# More of a core than this, and a server on the same cores is slower for it.
MUCH_CPU = 0.5
_SPREAD = ("median", "min", "max")
_UNITS = {"output_tok_s": "output tokens per second", "ttft_ms": "TTFT p50, ms", "tpot_ms": "TPOT p50, ms"}


def print_results(results: dict[str, Any]) -> None:
    """All tables and notes."""
    loads = results["loads"]
    for table in (_speeds(loads), _latencies(loads), _ratios(loads)):
        print_table(table)
        print()
    for line in (*_overview(loads), *_notes(results)):
        print(line)


def _rows(loads: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The column of the load, and the results, of every load and server."""
    for load in loads:
        for row in load["servers"]:
            yield {load["kind"]: load["value"]}, row


def _speeds(loads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    speeds = ("requests", "failed", "output_tok_s", "total_tok_s", "requests_s", "goodput_requests_s")
    shown = (*speeds, "drafts_per_step", "accept_length", "acceptance")
    table = []
    for load, row in _rows(loads):
        shares = " ".join(f"{share:.3f}" for share in row["acceptance_per_position"])
        cells = {name: _or_dash(row[name]) for name in shown}
        table.append(load | cells | {"acceptance_per_position": shares or "-", "server": row["server"]})
    return table


def _latencies(loads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    unknown = dict.fromkeys(("mean", "p50", "p90", "p99"), "-")
    return [
        load | {"latency": f"{name:>12}"} | (row[name] or unknown) | {"server": row["server"]}
        for load, row in _rows(loads)
        for name in LATENCIES
    ]


def _ratios(loads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the rounds, and their ratios to the first server."""
    table = []
    for load, row in _rows(loads):
        for entry in row.get("comparison", ()):
            cells = {name: _or_dash(entry[name]) for name in (*_SPREAD, *(f"ratio_{name}" for name in _SPREAD))}
            ratios = " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in entry["ratios"])
            table.append(
                load
                | {"metric": f"{entry['metric']:>12}"}
                | cells
                | {"ratios of the rounds": ratios, "server": row["server"]}
            )
    return table


def _overview(loads: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Medians of the rounds in Markdown, a line per server and a column per load."""
    compared = [load for load in loads if all("comparison" in row for row in load["servers"])]
    if not compared:
        return
    names = [row["server"] for row in compared[0]["servers"]]
    for place, title in enumerate(_UNITS.values()):
        heads = " | ".join(f"{load['kind'].replace('_', ' ')} {load['value']}" for load in compared)
        yield f"| {title} | {heads} |"
        yield "|---|" + "--:|" * len(compared)
        for number, name in enumerate(names):
            cells = [_cell(load["servers"][number]["comparison"][place], number) for load in compared]
            yield f"| `{name}` | {' | '.join(cells)} |"
        yield ""


def _cell(entry: dict[str, Any], number: int) -> str:
    if entry["median"] is None:
        return "-"
    digits = 0 if entry["median"] >= 100 else 1
    value = f"{entry['median']:.{digits}f}"
    return value if number == 0 or entry["ratio_median"] is None else f"{value} ({entry['ratio_median']:.2f}x)"


def _notes(results: dict[str, Any]) -> Iterator[str]:
    rows = list(_rows(results["loads"]))
    yield from sorted({_counting(row) for _, row in rows if row["requests"]})
    dataset = results["dataset"]
    if dataset["skipped"]:
        yield f"{dataset['skipped']} entries of the data set were broken and left out"
    if dataset["size"] and dataset["asked"] > dataset["size"]:
        yield f"{dataset['asked']} conversations were asked for, the data set has {dataset['size']}: some came again"
    for load, row in rows:
        yield from (f"{_where(load, row)}: {note}" for note in _row_notes(row))
    if results["is_partial"]:
        yield "PARTIAL: the run was broken off"


def _counting(row: dict[str, Any]) -> str:
    note = f"{row['server']}: tokens are counted by {row['tokens_counted_by']}, "
    note += f"those of one event by {row['event_tokens_counted_by']}"
    if EVENTS in row["event_tokens_counted_by"]:
        note += "; ITL per token needs continuous_usage_stats, or logprobs in --extra-body"
    return note


def _row_notes(row: dict[str, Any]) -> Iterator[str]:
    for reason, failure in row["failures"].items():
        yield f"{failure['count']} requests failed, {reason}: {failure['example']}"
    if row["cut"]:
        yield f"{row['cut']} requests were in flight when the run was broken off"
    if (row["tokens_of_others"] or 0) > 0:
        yield f"the server counts {row['tokens_of_others']} more tokens than came here: acceptance is not ours alone"
    if row["client_cpu"] > MUCH_CPU:
        yield f"this client took {100 * row['client_cpu']:.0f} % of a core"
    differences = row.get("differences")
    if differences:
        yield f"{differences['different']} of {differences['compared']} greedy answers differ from the first server's"
        if differences["example"]:
            found = differences["example"]
            one, other = found["answers"]
            yield f"conversation {found['conversation']} from character {found['character']}: {one!r} | {other!r}"


def _where(load: dict[str, Any], row: dict[str, Any]) -> str:
    ((kind, value),) = load.items()
    return f"{kind.replace('_', ' ')} {value}, {row['server']}"


def _or_dash(value: float | None) -> float | str:
    return "-" if value is None else value
