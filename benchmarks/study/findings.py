"""The papers' findings: the rows of each table, the papers' figures beside them, and what is claimed of them.

Papers: v1 arXiv:1412.7062, v2 arXiv:1606.00915, v3+ arXiv:1802.02611; PASCAL VOC 2012 val, mean IoU in percent.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = "plain"
MEAN_IOU = "mean IoU"


def trimap(width: int) -> str:
    """The metric "mean IoU within ``width`` pixels of a boundary"."""
    return f"trimap {width}"


NARROWING = "trimap 1 less trimap 40"
"""Rises where a change helps more near the boundaries than elsewhere."""


@dataclass(frozen=True)
class Row:
    """A network evaluated in one way. paper: the papers' figure for what the row stands for."""

    network: str
    variant: str = PLAIN
    paper: str = ""
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """``more`` has the larger ``metric`` than ``less`` or, with ``equal``, about the same. Both: (network, variant)."""

    text: str
    more: tuple[str, str]
    less: tuple[str, str]
    paper: str = ""
    metric: str = MEAN_IOU
    equal: bool = False


@dataclass(frozen=True)
class Finding:
    key: str
    title: str
    source: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    columns: tuple[str, ...] = (MEAN_IOU, trimap(1), trimap(3))
    note: str = ""


def _points(more: float, less: float) -> str:
    return f"{more - less:+.2f}"


_V2 = {"large_fov": (65.76, 69.84), "aspp_s": (66.98, 69.73), "aspp_l": (68.96, 71.57)}
_TABLE_5 = {
    "v3": {"plain": 79.17, "MS": 80.57, "MS + flip": 80.79, "OS 8": 79.64},
    "v3plus_dense": {"plain": 79.93, "MS": 81.38, "MS + flip": 81.44, "OS 8": 80.22},
    "v3plus": {"plain": 79.79, "MS + flip": 81.21, "OS 8": 80.02, "OS 8, MS + flip": 81.39},
}
_NAMES = {"v3": "no decoder", "v3plus_dense": "decoder", "v3plus": "decoder, SC"}


def _v2() -> Finding:
    rows = [
        Row(name, variant, f"{figure:.2f}")
        for i, variant in enumerate((PLAIN, "CRF"))
        for name, figure in ((name, figures[i]) for name, figures in _V2.items())
    ]
    titles = {"large_fov": "LargeFOV", "aspp_s": "ASPP-S", "aspp_l": "ASPP-L"}
    claims = [
        Claim(f"{titles[a]} > {titles[b]}", (a, PLAIN), (b, PLAIN), _points(_V2[a][0], _V2[b][0]))
        for a, b in (("aspp_s", "large_fov"), ("aspp_l", "aspp_s"), ("aspp_l", "large_fov"))
    ]
    claims += [
        Claim(f"the CRF helps {titles[name]}", (name, "CRF"), (name, PLAIN), _points(after, before))
        for name, (before, after) in _V2.items()
    ]
    claims += [
        Claim(
            "after the CRF: ASPP-L > LargeFOV", ("aspp_l", "CRF"), ("large_fov", "CRF"),
            _points(_V2["aspp_l"][1], _V2["large_fov"][1]),
        ),
        Claim(
            "after the CRF: ASPP-S = LargeFOV", ("aspp_s", "CRF"), ("large_fov", "CRF"),
            _points(_V2["aspp_s"][1], _V2["large_fov"][1]), equal=True,
        ),
    ]  # fmt: skip
    return Finding(
        "aspp", "LargeFOV, ASPP-S, ASPP-L, before and after the CRF", "v2, VGG-16", tuple(rows), tuple(claims)
    )


def _decoder() -> Finding:
    more, less = ("v3plus_dense", PLAIN), ("v3", PLAIN)
    return Finding(
        "decoder",
        "v3 without and with the decoder",
        "v3+, table 5 (Xception) and section 4.4",
        (Row("v3", paper="79.17"), Row("v3plus_dense", paper="79.93")),
        (
            Claim("the decoder helps", more, less, _points(79.93, 79.17)),
            Claim("within 1 pixel of a boundary it helps", more, less, "+5.4", trimap(1)),
            Claim("it helps more there than within 40 pixels", more, less, "yes", NARROWING),
        ),
        (MEAN_IOU, trimap(1), trimap(3), trimap(10), trimap(40)),
    )


def _separable() -> Finding:
    return Finding(
        "separable",
        "Separable convolutions in ASPP and decoder (SC)",
        "v3+, table 5",
        (Row("v3plus_dense", paper="79.93"), Row("v3plus", paper="79.79")),
        (Claim("SC costs nothing", ("v3plus", PLAIN), ("v3plus_dense", PLAIN), _points(79.79, 79.93), equal=True),),
        note="Multiply-Adds and latency are in a table of their own.",
    )


def _inference(key: str, title: str, variants: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> Finding:
    rows = tuple(
        Row(name, variant, f"{figures[variant]:.2f}")
        for name, figures in _TABLE_5.items() for variant in variants if variant in figures
    )  # fmt: skip
    claims = tuple(
        Claim(f"{_NAMES[name]}: {more} > {less}", (name, more), (name, less), _points(figures[more], figures[less]))
        for name, figures in _TABLE_5.items() for more, less in pairs if more in figures and less in figures
    )  # fmt: skip
    return Finding(key, title, "v3+, table 5", rows, claims)


def _channels() -> Finding:
    return Finding(
        "channels",
        "Channels of the low-level feature: 48, 32, 64 of 256 (here 12, 8, 16 of 64)",
        "v3+, table 1 (ResNet-101, one 3x3 convolution)",
        (Row("channels_32", paper="78.16"), Row("v3plus", paper="78.21"), Row("channels_64", paper="77.94")),
        (
            Claim("48 = 32", ("v3plus", PLAIN), ("channels_32", PLAIN), _points(78.21, 78.16), equal=True),
            Claim("48 > 64", ("v3plus", PLAIN), ("channels_64", PLAIN), _points(78.21, 77.94)),
            Claim("32 > 64", ("channels_32", PLAIN), ("channels_64", PLAIN), _points(78.16, 77.94)),
        ),
    )


def _convolutions() -> Finding:
    return Finding(
        "convolutions",
        "One, two, three 3x3 convolutions in the decoder",
        "v3+, table 2 (ResNet-101)",
        (Row("convs_1", paper="78.21"), Row("v3plus", paper="78.85"), Row("convs_3", paper="78.02")),
        (
            Claim("two > one", ("v3plus", PLAIN), ("convs_1", PLAIN), _points(78.85, 78.21)),
            Claim("two > three", ("v3plus", PLAIN), ("convs_3", PLAIN), _points(78.85, 78.02)),
        ),
    )


def _ranges() -> Finding:
    full, short, blind = "CRF", "short-range CRF", "short-range CRF without colours"
    rows = tuple(Row(name, variant) for name in ("large_fov", "v3plus") for variant in (PLAIN, short, blind, full))
    claims = [
        Claim("coarse map: the fully connected CRF helps", ("large_fov", full), ("large_fov", PLAIN), "+4.08"),
        *(
            Claim(f"coarse map: fully connected > short-range, {metric}", ("large_fov", full), ("large_fov", short),
                  "yes", metric)
            for metric in (MEAN_IOU, trimap(1))
        ),
    ]  # fmt: skip
    for name, what in (("large_fov", "coarse map"), ("v3plus", "sharp map")):
        claims += [
            Claim(f"{what}: the {kind} hurts, {metric}", (name, PLAIN), (name, kind), "yes", metric)
            for kind in (short, blind)
            for metric in (MEAN_IOU, trimap(1))
        ]
    return Finding(
        "ranges",
        "Fully connected against short-range CRF",
        "v1, section 4.2: no figures for the short-range CRF; +4.08 is v2's LargeFOV",
        rows,
        tuple(claims),
        note="The coarse map is LargeFOV's, bilinear from stride 8, which is the smooth map the v1 paper "
        "speaks of; the sharp one is that of v3+, which follows boundaries by itself. The short-range "
        "CRF is the same energy cut off outside 5 x 5 pixels, with and without colours. Every kind's "
        "parameters are those of the best mean IoU among its candidates on validation scenes.",
    )


FINDINGS: tuple[Finding, ...] = (
    _v2(),
    _decoder(),
    _separable(),
    _inference("output_stride", "Output stride 16 and 8 at evaluation", (PLAIN, "OS 8"), (("OS 8", PLAIN),)),
    _inference(
        "multi_scale",
        "Multi-scale and flip at evaluation",
        (PLAIN, "MS", "MS + flip", "OS 8", "OS 8, MS + flip"),
        (("MS", PLAIN), ("MS + flip", "MS"), ("MS + flip", PLAIN), ("OS 8, MS + flip", "OS 8")),
    ),
    _channels(),
    _convolutions(),
    _ranges(),
)
