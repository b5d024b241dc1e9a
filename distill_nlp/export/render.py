"""An export's figures as a table for the terminal."""

from __future__ import annotations

from typing import Any

_TITLES = {"teacher": "teacher, PyTorch", "original": "original, PyTorch"}


def terminal_table(record: dict[str, Any]) -> Any:
    """What `export.json` says, as a `rich` table: teacher where one was given, original and export."""
    from rich.table import Table

    parity, speed = record["parity"], record["speed"]
    columns = [name for name in ("teacher", "original", "exported") if name in record["size_mb"]]
    table = Table(title=f"{parity['rows']} rows ({parity['source']})", title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(_TITLES.get(name, f"export, ONNX {record['numbers']}"), justify="right")
    for label, cells in _rows(record, columns, parity, speed):
        table.add_row(label, *cells)
    return table


def _rows(
    record: dict[str, Any], columns: list[str], parity: dict[str, Any], speed: dict[str, Any] | None
) -> list[tuple[str, list[str]]]:
    rows = []
    if "metric" in parity:
        title = {"accuracy": "accuracy", "f1_macro": "macro-F1"}[parity["metric"]]
        rows.append((title, [f"{parity[name]:.4f}" for name in columns]))
    rows.append(("rows with another label", _last(columns, str(parity["flips"]))))
    rows.append(("largest difference of a logit", _last(columns, f"{parity['max_difference']:.2g}")))
    rows.append(("size of the weights", [f"{record['size_mb'][name]:.1f} MB" for name in columns]))
    if speed is not None:
        latency = [f"{speed[name]['latency_ms']['p50']:.1f} ms" for name in columns]
        rows.append(("latency p50, batch 1", latency))
        through = [f"{speed[name]['throughput']:.0f}/s ({speed[name]['speed_up']:.1f}×)" for name in columns]
        rows.append((f"throughput, batch {speed['batch_size']}", through))
    return rows


def _last(columns: list[str], text: str) -> list[str]:
    return [""] * (len(columns) - 1) + [text]
