"""The report of a search, from the files that its stages left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jet_jax import metrics
from jet_jax.postnas import comparison_report, figures, final_evaluation, report
from jet_jax.postnas.search_config import COMPARED, TRAINED, SearchConfig

TITLES = {
    "blocks": "Comparison of blocks",
    "ablations": "Ablations of a block",
    "shapes": "Shapes at one cache size",
    "distill": "Final training, first run",
    "finetune": "Final training, second run",
}


def write_report(workdir: Path, config: SearchConfig) -> Path:
    """Writes WORKDIR/report.html.

    Args:
      workdir: of the search.
      config: its settings.

    Returns:
      The file.
    """
    sections = []
    found = {
        name: json.loads((workdir / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("align", "supernet", "placement", "hybrid", *COMPARED, *TRAINED, "evaluate")
        if (workdir / f"{name}.json").is_file()
    }
    if "evaluate" in found:
        sections.append(("What came out", _evaluation(found["evaluate"])))
    if "hybrid" in found:
        sections.append(("The hybrid", _hybrid(found["hybrid"])))
    if "placement" in found:
        sections.append(("Placement", _placement(workdir, found["placement"])))
    sections += [(TITLES[name], comparison_report.html(workdir / name)) for name in COMPARED
                 if name in found]  # fmt: skip
    if "shapes" in found:
        sections.append(("The chosen shape", [report.paragraph(_shape(found["shapes"]))]))
    sections += [(TITLES[name], _final(workdir / name, found[name])) for name in TRAINED
                 if name in found]  # fmt: skip
    stages = {
        name: metrics.read_records(workdir / name, "train")
        for name in ("align", "supernet")
        if found.get(name, {}).get("steps")
    }
    if stages:
        sections.append(("Training of the linear paths", _training(workdir, found, stages)))
    sections.append(("Settings", [report.details("all settings", config.to_dict())]))
    title = f"PostNAS: {Path(config.teacher).name} with {config.linear.kind}"
    return report.write(workdir / "report.html", title, sections)


def _shape(chosen: dict[str, Any]) -> str:
    alone = ", ".join(f"{name} {shape}" for name, shape in chosen["by_objective"].items())
    return f"{chosen['shape']}, by the rule: {chosen['rule']}. By one objective alone: {alone}."


def _final(folder: Path, trained: dict[str, Any]) -> list[str]:
    rows = [
        [when, trained[when]["loss"], trained[when].get("kl", "–")]
        for when in ("first", "last")
        if trained[when]
    ]
    head = ["", "validation loss, nats a token", "KL to the teacher"]
    records = {folder.name: metrics.read_records(folder, "train")}
    return [
        report.paragraph(f"{trained['steps']:,} steps, {trained['tokens']:,} tokens."),
        *([report.table(head, rows)] if rows else []),
        report.image(figures.losses(records, folder / "losses.png")),
    ]


def _evaluation(evaluation: dict[str, Any]) -> list[str]:
    table = report.table(*final_evaluation.rows(evaluation))
    return [table, report.paragraph(final_evaluation.caption(evaluation))]


def _hybrid(hybrid: dict[str, Any]) -> list[str]:
    mib = 2**20
    rows = [
        ["parameters", hybrid["parameters"], hybrid["teacher_parameters"]],
        [
            f"cache of {hybrid['context']:,} tokens, MiB",
            hybrid["cache_bytes"] / mib,
            hybrid["teacher_cache_bytes"] / mib,
        ],
    ]
    return [
        report.layers(hybrid["layer_types"]),
        report.table(["", "hybrid", "teacher"], rows),
        *(
            [report.paragraph(f"Chosen for the other layers: {hybrid['chosen']}.")]
            if hybrid["chosen"]
            else []
        ),
        report.paragraph(
            f"Saved in {hybrid['model']}, its new layers {hybrid['new_layers']}; train it on with "
            "train.py."
        ),
    ]


def _placement(workdir: Path, decision: dict[str, Any]) -> list[str]:
    head = ["", *(f"{name}: {figure}" for name, figure in decision["objectives"].items())]

    def row(title: str, described: dict[str, Any]) -> list[Any]:
        return [title, *(described[name]["value"] for name in decision["objectives"])]

    rows = [
        ["teacher", *decision["teacher"].values()],
        row("chosen", decision["result"]),
        row("all layers linear", decision["all_linear"]),
    ]
    full = decision["full"]
    parts = [
        report.table(head, rows),
        report.paragraph(
            f"Full attention in layers {full['layers']}, chosen by {full['objective']} with "
            f"{full['selector']}: rank {full['rank']} of {full['scored']} sets of that size that "
            f"were scored. {_ties(full)}"
        ),
    ]
    if decision["windows"]:
        windows = decision["windows"]
        parts.append(
            report.paragraph(
                f"Sliding windows in layers {windows['layers']}, chosen by {windows['objective']}."
            )
        )
    folder = workdir / "placement"
    parts += [
        report.image(f) for f in (folder / "heat_map.png", folder / "curve.png") if f.exists()
    ]
    return [*parts, report.details("the whole decision", decision)]


def _ties(choice: dict[str, Any]) -> str:
    tied = choice["within_one_standard_error"]
    if tied is None:
        return "Its standard error is not estimated."
    return f"{len(tied)} more lie within one standard error."


def _training(workdir: Path, found: dict[str, Any], stages: dict[str, Any]) -> list[str]:
    picture = figures.losses(stages, workdir / "losses.png")
    rows = [
        [
            name,
            found[name]["steps"],
            found[name]["tokens"],
            found[name]["first"]["loss"],
            found[name]["last"]["loss"],
            found[name]["last"]["tokens_per_second"],
        ]
        for name in stages
    ]
    head = ["stage", "steps", "tokens", "first loss", "last loss", "tokens/s at the end"]
    return [report.table(head, rows), report.image(picture)]
