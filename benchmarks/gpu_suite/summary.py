"""Rows -> tables for people, and the JSON object."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from benchmarks.report import print_json, print_table

Rows = Sequence[dict[str, Any]]

# Too many to print one by one: of these a line per operation, and the red ones.
_MANY = "kernel checks"


def is_red(rows: Rows) -> bool:
    """Some check is not ok, or nothing was measured at all."""
    return not rows or any(row.get("ok") is False for row in rows)


def print_results(rows: Rows, config: dict[str, Any]) -> str:
    """Print a table of every kind of rows and the JSON object; the object."""
    tables = group(rows)
    for name, table in tables.items():
        print(f"\n{name}")
        print_table(even(table))
    print("\nsome checks are RED" if is_red(rows) else "\nno check is red")
    packed = {name: pack(table) for name, table in tables.items()}
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print_json("gpu_suite", config, {"is_red": is_red(rows), **packed})
    print(text.getvalue(), end="")
    return text.getvalue()


def group(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Rows by table, without its name; the checks of kernels as one line per operation, and those that are red."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["table"], []).append({name: value for name, value in row.items() if name != "table"})
    if _MANY in tables:
        tables |= {"red kernel checks": [row for row in tables[_MANY] if not row["ok"]]}
        tables[_MANY] = summarise_checks(tables[_MANY])
    return {name: table for name, table in tables.items() if table}


def summarise_checks(rows: Rows) -> list[dict[str, Any]]:
    """Per operation and dtype: cases, how many are red, and the worst error in units of what is allowed."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["op"], row["dtype"]), {"op": row["op"], "dtype": row["dtype"], "cases": 0, "red": 0, "worst": 0.0}
        )
        line["cases"] += 1
        line["red"] += not row["ok"]
        line["worst"] = max(line["worst"], row["error"])
    return list(lines.values())


def even(rows: Rows) -> list[dict[str, Any]]:
    """Rows with the same columns: what one lacks is empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in names} for row in rows]


def pack(rows: Rows) -> dict[str, Any]:
    """Columns once, then values: a fraction of the length. Numbers with five digits."""
    table = even(rows)
    values = [[_short(value) for value in row.values()] for row in table]
    return {"columns": list(table[0]), "rows": values}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
