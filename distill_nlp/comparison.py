"""`distill-nlp compare`: two or more models on the same labeled rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from distill_nlp.candidates import Candidate, class_names, common_device, open_candidate
from distill_nlp.config import DataSection, ReportSection
from distill_nlp.config_training import task_metric
from distill_nlp.data import load_labeled
from distill_nlp.errors import UsageError
from distill_nlp.labels import label_order
from distill_nlp.report import machine
from distill_nlp.report.quality import quality
from distill_nlp.report.scores import agreement, compared, right_rows, scores
from distill_nlp.report.speed import measure_speed
from distill_nlp.report.statistics import interval, mcnemar

_TITLES = {
    "accuracy": "accuracy",
    "f1_macro": "macro-F1",
    "f1_micro": "micro-F1",
    "mcc": "Matthews correlation",
    "log_loss": "log-loss (nats)",
    "ece": "calibration error (ECE)",
}


def compare(
    models: Sequence[str],
    data: str,
    *,
    split: str | None = None,
    config_name: str | None = None,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    max_rows: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    settings: ReportSection | None = None,
) -> dict[str, Any]:
    """Runs the models over the rows and compares each with each; on a GPU, unless one of them is an export.

    Args:
        models: folders or Hub ids of classifiers of the same classes, in any order; the first one's order is taken.
        data: file, folder or Hub id of labeled rows.
        split: of a folder or Hub data set; "test" where not given.
        config_name: of a Hub data set.
        text_column, text_pair_column, label_column: of the data.
        max_rows: rows at most, drawn at random with a fixed seed.
        max_length: cut texts at so many tokens; what each model allows where not given.
        batch_size: rows of a pass, also of those timed for throughput.
        settings: how much to measure otherwise.

    Returns:
        A JSON-ready dict: `models` with scores, the `interval` of the one they are compared by (`metric`), sizes and
        speed; `pairs`, for each two models `a` and `b` the `difference` a - b, `agreement` and `mcnemar`.

    Raises:
        UsageError: fewer than two models, or models and rows that do not fit each other.

    Example:
        >>> found = compare(["runs/imdb/teacher", "runs/imdb/student/seed-42"], "reviews.csv")
        >>> found["pairs"][0]["difference"]
        {'value': 0.0125, 'interval': [0.004, 0.021]}
    """
    _check_names(models)
    settings = (settings or ReportSection()).model_copy(update={"throughput_batch_size": batch_size})
    device = common_device(models)
    opened = {name: open_candidate(name, max_length) for name in models}
    first = opened[models[0]]
    orders = {name: _order(name, candidate, models[0], first) for name, candidate in opened.items()}
    config = DataSection(
        dataset=data,
        config_name=config_name,
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
    )
    is_file = Path(data).expanduser().is_file()
    rows = load_labeled(config, split or ("train" if is_file else "test"), class_names(first), first.problem_type)
    if max_rows is not None and max_rows < len(rows):
        rows = rows.shuffle(seed=0).select(range(max_rows))
    labels, logits = np.array(rows["labels"]), {}
    for name, candidate in opened.items():
        candidate.read(rows)
        found = candidate.logits(batch_size, device)
        logits[name] = found if orders[name] is None else found[:, orders[name]]
    (own,), values = compared(logits, labels, [list(models)], settings.bootstrap_samples)
    speed = measure_speed({name: [candidate] for name, candidate in opened.items()}, settings, device)
    several = labels.ndim == 2
    return {
        "data": data,
        "rows": len(rows),
        "problem_type": first.problem_type,
        "metric": task_metric(first.problem_type),
        "label_names": class_names(first),
        "models": {
            name: {
                **scores(logits[name], labels),
                **quality(logits[name], labels),
                "interval": interval(values[:, i]),
                **opened[name].size(),
                **speed[name],
            }
            for i, name in enumerate(models)
        },
        "pairs": [
            {
                "a": models[i],
                "b": models[j],
                "difference": {"value": float(own[i] - own[j]), "interval": interval(values[:, i] - values[:, j])},
                "agreement": agreement(logits[models[i]], logits[models[j]], several),
                "mcnemar": mcnemar(*(right_rows(logits[models[k]], labels) for k in (i, j))),
            }
            for i, j in combinations(range(len(models)), 2)
        ],
        "machine": machine(device),
    }


def _check_names(models: Sequence[str]) -> None:
    if len(models) < 2:
        raise UsageError(f"two or more models are compared, got {len(models)}")
    if twice := [name for i, name in enumerate(models) if name in models[:i]]:
        raise UsageError(f"{twice[0]} is given twice")


def _order(name: str, candidate: Candidate, first_name: str, first: Candidate) -> list[int] | None:
    """Where the first model's classes stand in this one's logits; None where in the same places."""
    if candidate.problem_type != first.problem_type:
        raise UsageError(f"{name} is a {candidate.problem_type} model, {first_name} a {first.problem_type} one")
    try:
        return label_order(candidate.config, first.config)
    except ValueError:
        raise UsageError(
            f"{name} has the classes {class_names(candidate)}, {first_name} has {class_names(first)}; only models of "
            "the same classes can be compared"
        ) from None


def terminal_comparison(found: dict[str, Any]) -> Any:
    """A `rich` renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    short = short_names(list(found["models"]))
    table = Table(title=f"{found['rows']:,} rows of {found['data']}", title_justify="left")
    table.add_column("")
    for name in found["models"]:
        table.add_column(Text(short[name]), justify="right", overflow="fold")
    for title, *cells in _rows(found):
        table.add_row(Text(title), *map(Text, cells))
    return Group(table, *(Text(_line(pair, found, short)) for pair in found["pairs"]))


def _rows(found: dict[str, Any]) -> list[list[str]]:
    models, metric = list(found["models"].values()), found["metric"]
    # The score that they are compared by stands first, with its interval.
    keys = [metric, *(key for key in _TITLES if key in models[0] and key != metric)]
    titles = _TITLES if metric == "accuracy" else _TITLES | {"accuracy": "exact match"}
    rows = [[titles[key], *(f"{model[key]:.4f}" for model in models)] for key in keys]
    ends = [model["interval"] for model in models]
    rows.insert(1, ["  95% interval", *("" if end is None else f"{end[0]:.4f} … {end[1]:.4f}" for end in ends)])
    return [
        *rows,
        ["parameters", *(f"{model['parameters'] / 1e6:.2f}M" for model in models)],
        ["size on disk", *(f"{model['size_mb']:.1f} MB" for model in models)],
        [
            "latency p50 / p95 / p99, batch 1",
            *("{p50:.1f} / {p95:.1f} / {p99:.1f} ms".format(**model["latency_ms"]) for model in models),
        ],
        ["throughput", *(f"{model['throughput']:.0f}/s" for model in models)],
    ]


def _line(pair: dict[str, Any], found: dict[str, Any], short: dict[str, str]) -> str:
    a, b, test, ends = short[pair["a"]], short[pair["b"]], pair["mcnemar"], pair["difference"]["interval"]
    unit = _TITLES[found["metric"]]
    within = "" if ends is None else f", 95% interval {ends[0] * 100:+.2f} … {ends[1] * 100:+.2f}"
    return (
        f"{a} - {b}: {pair['difference']['value'] * 100:+.2f} points of {unit}{within}; only {a} right on "
        f"{test['a_only']}, only {b} on {test['b_only']}, p = {test['p_value']:.2g} (McNemar); they agree on "
        f"{pair['agreement'] * 100:.1f}%"
    )


def short_names(names: list[str]) -> dict[str, str]:
    """Names without the folders that they have in common."""
    parts = [name.rstrip("/").split("/") for name in names]
    common = 0
    while all(len(own) > common + 1 for own in parts) and len({own[common] for own in parts}) == 1:
        common += 1
    return {name: "/".join(own[common:]) for name, own in zip(names, parts, strict=True)}
