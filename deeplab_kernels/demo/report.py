"""The demo's report: one HTML file with everything inside, for light and dark screens."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence

from .._html import escape, page
from .charts import loss_curve, trimap_curve
from .crf import WIDTHS, Comparison
from .results import Figure, Results, mean
from .speed import SpeedRow


def render(results: Results) -> str:
    """The whole HTML document."""
    body = "\n".join(
        [
            _header(results),
            _section("Unseen scenes", _scenes(results)),
            _section("Photographs", _photographs(results)),
            *([_section("Refined by a CRF", _crf(results, results.crf))] if results.crf else []),
            _section("Training", _training(results)),
            _section("Multiply-Adds", _madds(results)),
            *([_section("Ways of upsampling", _upsampling(results.upsampling))] if results.upsampling else []),
            _section("Speed against PyTorch", _speed(results)),
            _section("How this was made", _provenance(results)),
        ]
    )
    return page("deeplab_kernels demo", body, style=_STYLE)


def _header(r: Results) -> str:
    short = (
        f" Training was cut from {r.planned_steps} steps to fit the time." if len(r.losses) < r.planned_steps else ""
    )
    quick = (
        '<p class="note">Made with --quick: a check that everything runs; its figures mean little.</p>'
        if r.quick
        else ""
    )
    tiles = [
        (_percent(r.mean_iou), "mean IoU on unseen scenes"),
        (f"{r.seconds.get('training', 0):.0f} s", f"training, {len(r.losses)} steps"),
        *_speed_tiles(r.speed),
    ]
    cards = "".join(f"<div class=tile><b>{value}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    return (
        "<header><h1>DeepLab v3+ on fused atrous separable convolutions</h1>"
        f"<p>A small DeepLab v3+ ({r.parameters / 1e6:.2f} M parameters) was trained here from random weights on "
        "scenes that the package draws itself, and then segmented scenes it had not seen and real photographs."
        f"{short}</p>{quick}<div class=tiles>{cards}</div></header>"
    )


def _speed_tiles(rows: Sequence[SpeedRow]) -> list[tuple[str, str]]:
    tiles = []
    for task, label in (("inference", "inference, depthwise layers"), ("training", "training step, depthwise layers")):
        ratios = [row.ratio for row in rows if row.task == task]
        if ratios:
            tiles.append((f"{_geometric_mean(ratios):.1f}&times;", f"PyTorch's speed: {label} (geometric mean)"))
    return tiles


def _scenes(r: Results) -> str:
    legend = "".join(
        f'<li><i style="background:rgb({",".join(str(int(v)) for v in colour)})"></i>{escape(name)}</li>'
        for name, colour in zip(r.class_names, r.palette, strict=True)
    )
    rows = [
        [
            escape(name),
            _percent(value),
            f'<span class=bar><i style="width:{0 if math.isnan(value) else 100 * value:.1f}%"></i></span>',
        ]
        for name, value in zip(r.class_names, r.iou, strict=True)
    ]
    rows.append(["<b>mean</b>", f"<b>{_percent(r.mean_iou)}</b>", ""])
    return (
        f"<p>{r.test_scenes} scenes of {r.scene_size} &times; {r.scene_size} pixels, drawn from another seed than "
        f"the training scenes. Pixel accuracy {_percent(r.pixel_accuracy)}. Calling every pixel background would "
        f"give a mean IoU of {_percent(r.background_only)}. The pictures are the first scenes, not the best ones.</p>"
        f"<ul class=legend>{legend}</ul>"
        '<div class="columns"><span>input</span><span>labels</span><span>prediction</span><span>mistakes</span></div>'
        f"{_figures(r.scenes)}"
        f"{_table(['class', 'IoU', ''], rows)}"
    )


def _photographs(r: Results) -> str:
    if not r.photographs:
        return "<p>None: scikit-image, whose bundled photographs are used, is not installed.</p>"
    return (
        "<p>Photograph, prediction, overlay. The classes are those of the generated scenes, so no prediction here "
        "can be right in the usual sense, and no score is given: the pictures show what such a network makes of the "
        f"real world.</p>{_figures(r.photographs)}"
    )


def _crf(r: Results, comparison: Comparison) -> str:
    """Coarse annotations, then the network's scores with and without a CRF."""
    columns = '<div class="columns {0}">{1}</div>'
    annotations = (
        "<p>The fully connected CRF of DeepLab v1 and v2 draws labels to the edges of the photograph: pixels that are "
        "near and of like colour should have like labels. Here it is given a coarse annotation instead of a network. "
        "Nothing is learned. The parameters and the strokes were set by hand for these two photographs.</p>"
        f"{columns.format('', _spans('photograph', 'annotation', 'refined', 'overlay'))}{_figures(r.annotations)}"
        if r.annotations
        else "<p>No annotated photographs: scikit-image, whose bundled photographs are used, is not installed.</p>"
    )
    rows = []
    for row in comparison.rows:
        p = row.parameters
        kernels = [] if p is None else [f"w {p.smoothness_weight:g}, &sigma; {p.smoothness_sigma:g}"]
        if p is not None and p.appearance_weight:
            near = f"w {p.appearance_weight:g}, &sigma; {p.appearance_sigma:g}, colour {p.color_sigma:g}"
            kernels.insert(0, near)
        chosen = f"best of {row.tried}" if row.tried > 1 else "given" if p else ""
        iou = ["&ndash;" if math.isnan(v) else f"{100 * v:.1f}" for v in (row.mean_iou, *row.trimap)]
        note = "<br>".join([*kernels, chosen] if chosen else kernels)
        rows.append([escape(row.name), f"<b>{iou[0]}</b>", *iou[1:], f"<small>{note}</small>"])
    head = ["", "mean IoU, %", *(f"b\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{width}" for width in WIDTHS), "kernels"]
    scenes = columns.format("five", _spans("input", "labels", "network", "short-range", "fully connected"))
    photographs = (
        f"<h3>A photograph</h3>{_figures(r.refined_photographs)}<p>Pixels that are near and of like colour outvote "
        "stray labels; an object that the network has wrong as a whole stays wrong.</p>"
        if r.refined_photographs
        else ""
    )
    window = 2 * next((row.parameters.window for row in comparison.rows if row.parameters), 0) + 1
    return (
        f"<h3>Coarse annotations of photographs</h3>{annotations}"
        "<h3>The network's scores, with and without a CRF</h3>"
        "<p>A network's score map is smooth: it is computed on a coarse grid and enlarged. DeepLab v1 argues that a "
        "short-range CRF, made to remove noise, can only smooth it further and may do harm, where a fully connected "
        f"one recovers detail. Short-range here: the same energy and the same mean field, cut off outside {window} "
        f"&times; {window} pixels. The kernels' parameters are those of the best mean IoU on "
        f"{comparison.validation_scenes} other scenes, drawn from a seed of their own; the figures are of the "
        f"{r.test_scenes} unseen scenes. b: mean IoU of the pixels within b of a boundary between true labels "
        "(trimap).</p>"
        f"{_verdict(comparison)}{_table(head, rows)}{trimap_curve(comparison)}"
        "<p>The first scenes, not the best ones. Once the labels, and once the probability of not being background."
        f"</p>{scenes}{_figures(r.refined_scenes)}{photographs}"
    )


def _spans(*texts: str) -> str:
    return "".join(f"<span>{escape(text)}</span>" for text in texts)


def _verdict(comparison: Comparison) -> str:
    """What the figures say, whatever they are: each row against the network alone."""
    base, items = comparison.rows[0], []
    for row in comparison.rows[1:]:
        gain, near = row.mean_iou - base.mean_iou, row.trimap[0] - base.trimap[0]
        effect = "helps" if gain > 0.005 else "harms" if gain < -0.005 else "changes next to nothing"
        items.append(
            f"<li>{escape(row.name)}: <b>{effect}</b>, {_points(gain)} of mean IoU, {_points(near)} within {WIDTHS[0]} "
            "pixel of a boundary</li>"
        )
    return f"<p>Against the network alone:</p><ul>{''.join(items)}</ul>"


def _points(difference: float) -> str:
    return "no value" if math.isnan(difference) else f"{100 * difference:+.1f} points"


def _training(r: Results) -> str:
    steps = f"{len(r.losses)} steps" + (f" of {r.planned_steps} planned" if len(r.losses) < r.planned_steps else "")
    return (
        f"<p>{escape(r.model)}, {steps} of {r.batch_size} crops of {r.crop} &times; {r.crop} pixels from "
        f"{r.train_scenes} scenes, mirrored half of the time; SGD with momentum 0.9 and the poly learning rate; "
        f"cross entropy.</p>{loss_curve(r.losses)}"
    )


def _madds(r: Results) -> str:
    rows = []
    for row in r.madds:
        mine, paper = row["madds_paper_convention"], row["paper"]
        cells = [
            str(row["eval_output_stride"]),
            "yes" if row["decoder"] else "&ndash;",
            "yes" if row["separable"] else "&ndash;",
            _billions(paper),
            _billions(mine),
            f"{100 * (mine / paper - 1):+.2f} %" if paper else "&ndash;",
            _billions(row["madds_true"]),
        ]
        flip, flip_paper = row.get("multi_scale_flip_madds_paper_convention"), row.get("multi_scale_flip_paper")
        if flip is not None:
            cells += [_billions(flip_paper), _billions(flip)]
        rows.append(cells)
    head = ["output stride", "decoder", "SC", "paper", "ours, paper's rules", "difference", "true count"]
    if rows and len(rows[0]) > len(head):
        head += ["paper, 6 scales + flip", "ours"]
    small = (
        f" The small network of this demo takes {r.model_madds / 1e6:.0f} M on a crop of {r.crop} &times; {r.crop}."
        if r.model_madds
        else ""
    )
    return (
        "<p>DeepLab v3+ with Xception-65 at 513 &times; 513, 21 classes, in billions, counted on the built models "
        "beside table 5 of the paper (arXiv:1802.02611). The paper's counter rounds the output grid of an atrous "
        f"convolution up to a multiple of its rate; the true count does not. SC: atrous separable "
        f"convolutions in the ASPP and the decoder.{small}</p>{_table(head, rows)}"
    )


def _upsampling(figure: Figure) -> str:
    return (
        "<p>A smooth map enlarged four times by two layers with random weights. A transposed convolution of stride 2 "
        "and kernel 3 covers every second pixel twice as often as its neighbours, on each axis: a checkerboard. Where "
        "the stride divides the kernel the cover is even, and what is left comes from the random weights. Resizing "
        f"before an ordinary convolution leaves none.</p>{_figures([figure])}"
    )


def _speed(r: Results) -> str:
    rows = [
        [
            escape(row.layer.name),
            f"<span class=whole>{row.layer.channels} &times; {row.layer.size} &times; {row.layer.size}</span>",
            row.layout,
            row.task,
            _milliseconds(row.ours_ms),
            _milliseconds(row.torch_ms),
            f'<b class="{"faster" if row.ratio >= 1 else "slower"}">{row.ratio:.1f}&times;</b>',
        ]
        for row in r.speed
    ]
    head = ["layer", "input", "layout", "task", "ours, ms", "PyTorch, ms", "ratio"]
    worst = max((row.error for row in r.speed), default=0.0)
    return (
        "<p>3 &times; 3 depthwise convolution + batch normalisation + ReLU, float32, one image. Inference: PyTorch "
        "eager with the normalisation folded into the convolution. Training: forward with batch statistics, and "
        "backward. Both were timed in turn in this process; medians. Both allocate from memory that the process "
        f"keeps (glibc's thresholds raised). Results agree to {worst:.0e} (relative). <code>make bench</code> "
        f"measures all layers, and torch.compile too.</p>{_table(head, rows)}"
    )


def _provenance(r: Results) -> str:
    facts = {"command": f"<code>{escape(r.command)}</code>", "seed": str(r.seed)}
    facts |= {key: escape(value) for key, value in r.machine.items()}
    seconds = {name: f"{value:.1f}" for name, value in r.seconds.items()}
    seconds["all"] = f"{sum(r.seconds.values()):.1f}"
    return (
        _table(["", ""], [[escape(key), value] for key, value in facts.items()])
        + "<h3>Seconds</h3>"
        + _table(["part", "seconds"], [[escape(key), value] for key, value in seconds.items()])
    )


# Pieces of HTML and text.


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _figures(figures: Iterable[Figure]) -> str:
    return "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(f.png).decode()}" alt="{escape(f.alt)}">'
        f"<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    return f"<div class=scroll><table>{top}<tbody>{lines}</tbody></table></div>"


def _percent(value: float) -> str:
    return "&ndash;" if math.isnan(value) else f"{100 * value:.1f}&nbsp;%"


def _billions(value: int | None) -> str:
    return "&ndash;" if value is None else f"{value / 1e9:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(mean([math.log(value) for value in values]))


_STYLE = """
figcaption, .columns { color: var(--soft); font-size: .86rem; }
figure { margin: 0 0 14px; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 4px; }
.columns { display: grid; grid-template-columns: repeat(4, 1fr); margin-bottom: 4px; }
.columns.five { grid-template-columns: repeat(5, 1fr); }
.line { fill: none; stroke-width: 2; stroke: var(--tone); }
.line0 { --tone: var(--soft); }
.line1 { --tone: #d99000; }
.line2 { --tone: #b3381f; }
.line3 { --tone: var(--mark); }
.line4 { --tone: #3aa06a; }
.legend .key { height: .25em; border: 0; vertical-align: .2em; background: var(--tone); }
td small { white-space: nowrap; color: var(--soft); }
.bar { display: block; width: min(220px, 36vw); height: 10px; margin-top: 8px; border-radius: 5px;
  background: var(--line); }
.bar i { display: block; height: 100%; background: var(--mark); border-radius: 5px; }
.faint, .strong { fill: none; stroke: var(--mark); }
.faint { opacity: .3; }
.strong { stroke-width: 2; }
"""
