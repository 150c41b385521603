"""The pilot's results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.pilot.ledger import Ledger
from benchmarks.pilot.speed import PLANNED
from jet_jax.evaluation.statistics import t_quantile
from jet_jax.postnas.report import markdown

SEED_COUNTS = (2, 3, 4, 6, 8)


def page(ledger: Ledger) -> str:
    """All tables for which there are results."""
    sections = (_speed, _gates, _positions, _inits, _rates, _path_rates, _seeds)
    parts = [part for section in sections for part in section(ledger)]
    devices = sorted({run["device"] for run in ledger.data["runs"]})
    seconds = sum(x.get("seconds", 0) for x in ledger.named("").values())
    head = f"Measured on {', '.join(devices)}; {seconds / 60:.1f} minutes in all.\n"
    return "\n".join([head, *parts])


def _speed(ledger: Ledger) -> Iterator[str]:
    rows = [
        [
            name,
            "x".join(map(str, x["shape"])),
            f"{x['tokens_s']:,.0f}",
            f"{PLANNED[name]:,.0f}",
            f"{x['tokens_s'] / PLANNED[name]:.2f}",
            f"{x['compile_s']:.0f}",
            f"{x.get('device_memory', x.get('host_memory', 0)) / 2**30:.1f}",
        ]
        for name, x in ledger.named("speed/").items()
    ]
    if rows:
        head = ["step", "rows x length", "tokens/s", "planned", "of that", "compile s", "peak GiB"]
        yield f"## Speed\n\n{markdown(head, rows)}"


def _gates(ledger: Ledger) -> Iterator[str]:
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name, x in ledger.named("gates/").items():
        for setting in x.get("settings", ()):
            options = ", ".join(f"{k}={v}" for k, v in setting["options"].items())
            cell = "-"
            if "accuracy" in setting:
                cell = f"{100 * setting['accuracy']:.0f} ± {100 * setting['error']:.0f}"
            found.setdefault((name.split("/")[0], options), {})[x["length"]] = cell
    lengths = sorted({length for cells in found.values() for length in cells})
    if found:
        rows = [[*key, *(cells.get(n, "") for n in lengths)] for key, cells in found.items()]
        table = markdown(["task", "settings", *map(str, lengths)], rows)
        yield f"## The teacher's accuracy in % by length (± standard error)\n\n{table}"


def _positions(ledger: Ledger) -> Iterator[str]:
    if "gates/by position" in ledger:
        buckets = ledger["gates/by position"]["buckets"]
        rows = [
            [name, f"{x['tokens']:,.0f}", f"{x['nll']:.3f}", f"{x['perplexity']:.2f}"]
            for name, x in buckets.items()
        ]
        table = markdown(["position", "tokens", "nats a token", "perplexity"], rows)
        yield f"## The teacher on held-out text\n\n{table}"


def _arms(ledger: Ledger) -> Iterator[tuple[str, str, str, str, Any]]:
    for name, x in ledger.named("align/").items():
        kind, init, lr, seed = name.split("/")
        yield kind, init, lr, seed, x


def _align_row(x: dict[str, Any]) -> list[str]:
    before, after = (_means(x[f"errors_{when}"]) for when in ("before", "after"))
    worst = max(range(len(x["errors_after"])), key=lambda i: x["errors_after"][i] or math.inf)
    linear = x.get("scores", {}).get("all linear")
    kl = f"{_number(linear['kl']['all'])}" if linear else ""
    return [
        before,
        after,
        f"{worst} ({_number(x['errors_after'][worst])})",
        _number(x["loss_last_tenth"]),
        kl,
        f"{x['tokens_s']:,.0f}",
    ]


ALIGN_HEAD = [
    "error before", "after", "worst layer", "training loss, last tenth", "KL, all linear",
    "tokens/s",
]  # fmt: skip


def _inits(ledger: Ledger) -> Iterator[str]:
    arms = [arm for arm in _arms(ledger) if arm[3] == "0"]
    kept = {(kind, lr) for kind, init, lr, _, _ in arms if init == "random"}
    chosen = [arm for arm in arms if (arm[0], arm[2]) in kept]
    rows = [[kind, init, *_align_row(x)] for kind, init, _, _, x in chosen]
    if rows:
        yield f"## Initialisation\n\n{markdown(['kind', 'init', *ALIGN_HEAD], rows)}"
        names = [f"{kind} {init}" for kind, init, *_ in chosen]
        columns = [x["errors_after"] for *_, x in chosen]
        by_layer = [
            [i, *(_number(column[i]) for column in columns)] for i in range(len(columns[0]))
        ]
        yield f"### Errors after alignment by layer\n\n{markdown(['layer', *names], by_layer)}"


def _rates(ledger: Ledger) -> Iterator[str]:
    arms = sorted(
        (arm for arm in _arms(ledger) if arm[3] == "0"), key=lambda a: (*a[:2], a[4]["lr"])
    )
    starts = [arm[:2] for arm in arms]
    rows = [
        [kind, init, lr, *_align_row(x)]
        for kind, init, lr, _, x in arms
        if starts.count((kind, init)) > 1
    ]
    if rows:
        table = markdown(["kind", "init", "peak", *ALIGN_HEAD], rows)
        yield f"## Learning rate of the alignment\n\n{table}"


def _path_rates(ledger: Ledger) -> Iterator[str]:
    arms = {name: x for name, x in ledger.named("paths/").items() if name.endswith("/0")}
    rows = [
        [f"{x['lr']:g}", place, *_score_row(score), f"{x['tokens_s']:,.0f}"]
        for x in arms.values()
        for place, score in x["scores"].items()
        if place != "teacher"
    ]
    if rows:
        head = ["peak", "full layers", *_score_head(next(iter(arms.values()))), "tokens/s"]
        yield f"## Learning rate on sampled paths\n\n{markdown(head, rows)}"


def _score_head(x: dict[str, Any]) -> list[str]:
    score = x["scores"]["all linear"]
    return [*(f"KL {name}" for name in score["kl"]), "perplexity ratio", *score["accuracy"]]


def _score_row(score: dict[str, Any]) -> list[str]:
    accuracies = (f"{100 * a:.1f} %" for a in score["accuracy"].values())
    kls = (_number(kl) for kl in score["kl"].values())
    return [*kls, _number(score["perplexity_ratio"]), *accuracies]


def _figures(score: dict[str, Any]) -> dict[str, float]:
    kls = {f"KL {name}": kl for name, kl in score["kl"].items()}
    return kls | {name: 100 * a for name, a in score["accuracy"].items()}


def _seeds(ledger: Ledger) -> Iterator[str]:
    found: dict[str, list[Any]] = {}
    for name, x in ledger.named("paths/").items():
        found.setdefault(name.split("/")[0], []).append(x["scores"])
    seeds = max(found.values(), key=len, default=[])
    if len(seeds) > 1:
        yield from _spread(seeds)
    if "literal/0" in ledger:
        x = ledger["literal/0"]
        rows = [[place, *_score_row(s)] for place, s in x["scores"].items() if place != "teacher"]
        yield (
            "## The paper's figure alone: random paths, own stream, squared error, attention "
            f"trains ({x['tokens']:,} tokens)\n\n{markdown(['full layers', *_score_head(x)], rows)}"
        )


def _spread(seeds: list[Any]) -> Iterator[str]:
    places = [place for place in seeds[0] if place != "teacher"]
    figures = list(_figures(seeds[0][places[0]]))
    values = {p: np.array([list(_figures(s[p]).values()) for s in seeds], float) for p in places}
    rows = [
        [place, *(f"{m:.4g} ± {sd:.2g}" for m, sd in zip(x.mean(0), x.std(0, ddof=1), strict=True))]
        for place, x in values.items()
    ]
    heading = f"## {len(seeds)} seeds: mean ± standard deviation (accuracies in %)"
    yield f"{heading}\n\n{markdown(['full layers', *figures], rows)}"
    rows = []
    for i, first in enumerate(places):
        for second in places[i + 1 :]:
            gap = values[first] - values[second]
            sd = gap.std(0, ddof=1)
            rows.append(
                [f"{first} - {second}", *(f"{m:.3g} ± {s:.2g}" for m, s in zip(gap.mean(0), sd,
                                                                             strict=True))]
            )  # fmt: skip
    half = ", ".join(
        f"{n} seeds {t_quantile(0.975, n - 1) / math.sqrt(n):.2f}" for n in SEED_COUNTS
    )
    yield (
        f"### Paired differences: mean ± standard deviation over seeds\n\n"
        f"{markdown(['difference', *figures], rows)}\n"
        f"Half a 95 % interval in units of that deviation: {half}.\n"
    )


def _means(errors: list[float | None]) -> str:
    return _number(None if None in errors else float(np.mean(np.array(errors, float))))


def _number(x: float | None) -> str:
    return "diverged" if x is None else f"{x:.4g}"
