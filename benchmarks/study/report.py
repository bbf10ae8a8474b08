"""The report: every finding's table beside the papers' figures, and a verdict for each claim by the stated rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import tables

from . import curves, verdicts
from .experiments import NETWORKS
from .findings import FINDINGS, MEAN_IOU, NARROWING, Claim, Finding, Row, trimap
from .verdicts import Summary

Content = Mapping[str, Any]
CURVES = "study-trimap.png"


def write(content: Content, folder: Path) -> None:
    """study.json, study.md and the trimap curves; without matplotlib the curves are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    measure.save(folder / "study.json", {**content, "findings": summary(content)["findings"]})
    curves.draw(content, folder / CURVES)
    (folder / "study.md").write_text(markdown(content, (folder / CURVES).exists()))


# Figures


def values(content: Content, network: str, variant: str, metric: str) -> dict[int, float]:
    """Of each seed that has them; between 0 and 1."""
    found = {}
    for record in content["records"]:
        if record["network"] == network and variant in record["results"]:
            found[record["seed"]] = _value(record["results"][variant], metric)
    return found


def _value(result: Mapping[str, Any], metric: str) -> float:
    if metric == MEAN_IOU:
        value = result["mean_iou"]
    elif metric == NARROWING:
        value = result["trimap"][0] - result["trimap"][-1]
    else:
        value = result["trimap"][int(metric.removeprefix(trimap(0)[:-1])) - 1]
    return float(value)


def judge(content: Content, claim: Claim) -> tuple[Summary, str]:
    """The difference more - less over the seeds, and the verdict."""
    more, less = (values(content, *point, claim.metric) for point in (claim.more, claim.less))
    difference = verdicts.paired(more, less)
    return difference, (verdicts.same if claim.equal else verdicts.greater)(difference)


def summary(content: Content) -> dict[str, Any]:
    """All findings as plain values."""
    return {
        "settings": content["settings"],
        "rule": verdicts.RULE,
        "findings": [_finding(content, finding) for finding in FINDINGS],
        "cost": {"networks": content["cost"], "claims": cost_claims(content)},
    }


def _finding(content: Content, finding: Finding) -> dict[str, Any]:
    rows = []
    for row in finding.rows:
        figures = {
            c: verdicts.summarise(list(values(content, row.network, row.variant, c).values())) for c in finding.columns
        }
        rows.append(
            {
                "network": row.network,
                "variant": row.variant,
                "paper": row.paper,
                "figures": {
                    c: {"mean": _plain(s.mean), "deviation": _plain(s.deviation), "seeds": s.count}
                    for c, s in figures.items()
                },
            }
        )
    claims = []
    for claim in finding.claims:
        difference, verdict = judge(content, claim)
        claims.append(
            {
                "claim": claim.text,
                "metric": claim.metric,
                "paper": claim.paper,
                "difference": _plain(difference.mean),
                "standard_error": _plain(difference.error),
                "seeds": difference.count,
                "verdict": verdict,
            }
        )
    return {"key": finding.key, "title": finding.title, "source": finding.source, "rows": rows, "claims": claims}


def _plain(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return None if math.isnan(value) else value


# Text


def markdown(content: Content, with_curves: bool = False) -> str:
    parts = [_head(content), _overview(content)]
    for finding in FINDINGS:
        parts.append(_section(content, finding))
        if finding.key == "decoder" and with_curves:
            parts.append(f"![mean IoU within b pixels of a boundary]({CURVES})")
        if finding.key == "separable":
            parts.append(_cost(content))
    parts.append(_trainings(content))
    return "\n\n".join(parts) + "\n"


def _head(content: Content) -> str:
    s, machine = content["settings"], content["machine"]
    clutter = ", ".join(f"{c:g}" for c in s["clutter"])
    missing = "".join(f"\n\n{name} failed: {error}" for name, error in content["failures"].items())
    if content["missing"]:
        missing += f"\n\n{content['missing']} trainings are missing."
    return (
        "# The papers' findings in miniature\n\n"
        f"Networks of about half a million parameters, trained from random weights for {s['steps']} steps of "
        f"{s['batch_size']} crops of {s['crop']} x {s['crop']} pixels of {s['train_scenes']} drawn scenes (7 "
        f"classes, clutter {clutter}), each with {content['seeds']} seeds, and measured on "
        f"{s['test_scenes']} other scenes of {s['scene_size']} x {s['scene_size']}. Figures are percent, mean "
        "± standard deviation over the seeds. The papers' figures, of PASCAL VOC 2012 and pretrained networks"
        " of a hundred times the size, are theirs; only signs and orders can be compared.\n\n"
        f"{verdicts.RULE}\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; {content['processes']} "
        f"processes of one thread; {content['date']}, commit {content['commit']}; scale "
        f"{content['scale']:g}.{missing}"
    )


def _overview(content: Content) -> str:
    lines = ["## Verdicts", ""]
    table = []
    for finding in FINDINGS:
        reached = [judge(content, claim)[1] for claim in finding.claims]
        if finding.key == "separable":
            reached += [claim["verdict"] for claim in cost_claims(content)]
        counts = Counter(reached)
        words = ", ".join(
            f"{counts[v]} {v}"
            for v in (verdicts.REPRODUCED, verdicts.WITHIN, verdicts.NOT_HERE, verdicts.NO_VERDICT)
            if counts[v]
        )
        table.append([finding.title, str(len(reached)), words])
    return "\n".join(lines) + "\n" + tables.markdown(["finding", "claims", "verdicts"], table)


def _section(content: Content, finding: Finding) -> str:
    rows = [_row(content, finding, row) for row in finding.rows]
    header = ["network", "evaluated", *finding.columns, "the papers' mean IoU"]
    if not any(row.paper for row in finding.rows):
        header.pop()
        rows = [row[:-1] for row in rows]
    claims = []
    for claim in finding.claims:
        difference, verdict = judge(content, claim)
        metric = claim.metric if claim.metric not in claim.text else ""
        name = f"{claim.text} ({metric})" if metric and metric != MEAN_IOU else claim.text
        claims.append([name, _points(difference), claim.paper, f"**{verdict}**"])
    note = f"\n\n{finding.note}" if finding.note else ""
    return (
        f"## {finding.title}\n\nThe papers': {finding.source}.{note}\n\n{tables.markdown(header, rows)}\n\n"
        + tables.markdown(["claim", "difference ± standard error", "the papers'", "verdict"], claims)
    )


def _row(content: Content, finding: Finding, row: Row) -> list[str]:
    figures = [
        _percent(verdicts.summarise(list(values(content, row.network, row.variant, c).values())))
        for c in finding.columns
    ]
    return [NETWORKS[row.network].title, row.variant, *figures, row.paper]


def _cost(content: Content) -> str:
    rows = [
        [
            record["title"],
            f"{record['madds'] / 1e6:.0f} M",
            f"{record['latency']['median_ms']:.2f} ± {record['latency']['iqr_ms']:.2f}",
            f"{record['full_size_madds'] / 1e9:.2f} B",
            f"{record['paper_madds'] / 1e9:.2f} B",
        ]
        for record in content["cost"]
    ]
    size, threads = content["settings"]["scene_size"], content["cost"][0]["threads"]
    latency = f"latency, ms, {size} x {size}, {threads} threads"
    header = ["network", "Multiply-Adds", latency, "Xception-65, 513 x 513", "the paper's"]
    text = "Latency: median ± interquartile range, measured in turn after the trainings; a difference counts above "
    text += "both ranges."
    return f"{tables.markdown(header, rows)}\n\n{text}\n\n" + tables.markdown(
        ["claim", "ratio", "the paper's", "verdict"],
        [
            [claim["claim"], f"{claim['ratio']:.2f}", claim["paper"], f"**{claim['verdict']}**"]
            for claim in cost_claims(content)
        ],
    )


def cost_claims(content: Content) -> list[dict[str, Any]]:
    """What separable convolutions save: ratios with / without, and verdicts."""
    records = {record["network"]: record for record in content["cost"]}
    if not records.keys() >= {"v3plus", "v3plus_dense"}:
        return []
    less, more = records["v3plus"], records["v3plus_dense"]
    fewer = verdicts.REPRODUCED if less["madds"] < more["madds"] else verdicts.NOT_HERE
    new, old = less["latency"], more["latency"]
    return [
        {
            "claim": "SC takes fewer Multiply-Adds",
            "ratio": less["madds"] / more["madds"],
            "paper": f"{less['paper_madds'] / more['paper_madds']:.2f}",
            "verdict": fewer,
        },
        {
            "claim": "SC has the lower latency",
            "ratio": new["median_ms"] / old["median_ms"],
            "paper": "yes",
            "verdict": verdicts.lower(new["median_ms"], old["median_ms"], max(new["iqr_ms"], old["iqr_ms"])),
        },
    ]


def _trainings(content: Content) -> str:
    rows = []
    for name, network in NETWORKS.items():
        records = [r for r in content["records"] if r["network"] == name]
        if records:
            seconds = sum(r["cpu_seconds"] for r in records) / len(records)
            loss = sum(r["final_loss"] for r in records) / len(records)
            iou = _percent(verdicts.summarise(list(values(content, name, "plain", MEAN_IOU).values())))
            rows.append(
                [
                    network.title,
                    f"{records[0]['parameters'] / 1e6:.2f} M",
                    str(len(records)),
                    f"{seconds:.0f} s",
                    f"{loss:.3f}",
                    iou,
                ]
            )
    head = ["network", "parameters", "seeds", "CPU time of a training", "loss at the end", MEAN_IOU]
    seconds = sum(record["cpu_seconds"] + record["evaluation_cpu_seconds"] for record in content["records"])
    total = f"All trainings and evaluations took {seconds / 60:.0f} minutes of CPU time."
    return f"## Trainings\n\n{tables.markdown(head, rows)}\n\n{total}"


def _percent(value: Summary) -> str:
    if value.count == 0 or math.isnan(value.mean):
        return "-"
    spread = "" if math.isnan(value.deviation) else f" ± {100 * value.deviation:.2f}"
    return f"{100 * value.mean:.2f}{spread}"


def _points(value: Summary) -> str:
    if value.count == 0 or math.isnan(value.mean):
        return "-"
    error = "" if math.isnan(value.error) else f" ± {100 * value.error:.2f}"
    return f"{100 * value.mean:+.2f}{error}"
