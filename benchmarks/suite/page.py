"""report.html: everything of a folder of results in one file that loads nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deeplab_kernels._html import escape, page

from . import plots
from .compare import Change, changes, other_machine
from .rows import Results, Row

LISTED = 60  # cases left out that are named
_NUMBER = ' class="number"'  # of a cell
Changes = Mapping[tuple[str, ...], Change]


def render(now: Results, before: Results | None = None) -> str:
    """The whole document; with ``before``, times are compared with that run's."""
    found = changes(before, now) if before else {}
    subjects = list(dict.fromkeys(row.subject for row in now.rows))
    sections = [
        _header(now, subjects, found),
        *([_section("Against the stored run", _comparison(now, before, found))] if before else []),
        _plots(now),
        _section("Bars", _bars(now)),
        _section("Missed bars", _missed(now)),
        *(_section(name, _table(name, [r for r in now.rows if r.subject == name], found)) for name in subjects),
        *([_section("Not measured", _unavailable(now))] if now.unavailable or now.left_out else []),
        _section("How this was measured", _provenance(now)),
    ]
    return page("deeplab_kernels benchmarks", "\n".join(s for s in sections if s), style=_STYLE, script=_SCRIPT)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _header(now: Results, subjects: Sequence[str], found: Changes) -> str:
    tiles = []
    for name in subjects:
        ratios = [r.ratio for r in now.rows if r.subject == name and r.ours and r.ratio and r.full_precision]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            tiles.append((f"{mean:.1f}&times;", f"{name}; lowest {min(ratios):.2f}, highest {max(ratios):.1f}"))
    tiles.append((str(len(now.missed)), "bars missed"))
    if found:
        slower = sum(c.now.ours and c.verdict == "slower" for c in found.values())
        tiles.append((str(slower), f"of ours slower than in the stored run, of {len(found)} compared"))
    cards = "".join(f"<div class=tile><b>{value}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    facts = ", ".join(_fact(key, value) for key, value in now.machine.items())
    dates = ", ".join(dict.fromkeys(entry["date"] for entry in now.provenance if entry["date"]))
    return (
        f"<header><h1>Benchmarks of deeplab_kernels</h1><p>{escape(facts)}. Measured {escape(dates) or 'at no date'}."
        "</p><p>Large figures: the fastest alternative's time over ours in fp32, geometric mean over all cases. "
        "Every case is in the tables. A layer's case says channels and size of its input, s its stride and r its rate, "
        "&minus;&gt; the block's results, N the batch; A12 and its like: ASPP at rate 12, M middle flow, D decoder, "
        f"E entry flow, X exit flow.</p><div class=tiles>{cards}</div></header>"
    )


def _missed(now: Results) -> str:
    if not now.missed:
        return "<p>None of those that were measured.</p>"
    lines = [_line((m.case, m.what, m.source, m.subject)) for m in now.missed]
    return _filterable("missed bars", ["case", "bar", "asked by", "subject"], lines)


def _line(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _bars(now: Results) -> str:
    """Every demand and what became of it, those that were measured first."""
    tones = {"met": "faster", "missed": "slower", "not measured": "same"}
    lines = []
    for verdict in sorted(now.verdicts, key=lambda v: list(tones)[::-1].index(v.text) if v.measured else 3):
        demand = verdict.demand
        worst = "" if verdict.worst is None else f"{verdict.worst:.2f} at {verdict.where.removesuffix(', ')}"
        cells = [
            f"<td>{escape(demand.what)}</td>",
            f"<td{_NUMBER}>{'&ge;' if demand.at_least else '&le;'} {demand.limit:g}</td>",
            f'<td class=whole><b class="{tones[verdict.text]}">{verdict.text}</b></td>',
            f"<td{_NUMBER}>{f'{verdict.met} of {verdict.measured}' if verdict.measured else ''}</td>",
            f"<td>{escape(worst)}</td>",
            f"<td class=whole>{escape(demand.source)}</td>",
            f"<td>{demand.device}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["what", "bar", "verdict", "cases met", "furthest from it", "asked by", "on"]
    return _filterable("bars", heads, lines, numbers=("bar", "cases met"))


def _unavailable(now: Results) -> str:
    parts = []
    if now.unavailable:
        lines = [_line((u.case, u.mode, u.contender, u.reason, u.subject)) for u in now.unavailable]
        heads = ["case", "mode", "what", "reason", "subject"]
        parts.append(_filterable("what was not available", heads, lines))
    if now.left_out:
        cases = escape("; ".join(now.left_out[:LISTED]))
        more = f"; and {len(now.left_out) - LISTED} more" if len(now.left_out) > LISTED else ""
        parts.append(
            f"<p>Left out for want of time, the most important first ({len(now.left_out)} cases; "
            f"<code>--minutes</code> gives more):</p><p class=listing>{cases}{more}.</p>"
        )
    return "".join(parts)


def _comparison(now: Results, before: Results, found: Changes) -> str:
    different = other_machine(before, now)
    warning = (
        f"<p class=note>Not the same machine or setting ({escape('; '.join(different))}): the times cannot be "
        "compared as they are.</p>"
        if different
        else ""
    )
    alone = sum(row.key not in found for row in now.rows)
    text = (
        f"<p>Stored run: {escape(before.source.name)}. {len(found)} times are in both runs, {alone} only in this one. "
        "Slower or faster: the medians differ by more than the larger interquartile range of the two (by more than a "
        "tenth where only one sample is there).</p>"
    )
    beyond = sorted((c for c in found.values() if c.verdict), key=lambda c: (not c.now.ours, -c.ratio))
    rows = [
        [
            escape(c.now.subject),
            escape(f"{c.now.case}, {c.now.mode}"),
            escape(c.now.contender),
            _ms(c.before.median_ms),
            _ms(c.now.median_ms),
            f'<b class="{c.verdict}">{c.ratio:.2f}</b>',
        ]
        for c in beyond
    ]
    head = ["subject", "case", "contender", "before, ms", "now, ms", "now / before"]
    return warning + text + (_plain_table(head, rows) if rows else "<p>No time differs by more than the spread.</p>")


def _plots(now: Results) -> str:
    figures = plots.roofline(now.rows) + plots.latency(now.rows)
    return _section("Limits of the machine", f"<div class=plots>{figures}</div>") if figures else ""


# Tables that can be sorted and filtered.


@dataclass(frozen=True)
class Column:
    """text: of a cell, HTML; value: what it is sorted by, where that is a number."""

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None] | None = None


def _columns(found: Changes) -> list[Column]:
    def change(row: Row) -> str:
        c = found.get(row.key)
        return "" if c is None else f'<span class="{c.verdict or "same"}">{c.ratio:.2f}</span>'

    def changed(row: Row) -> float | None:
        return found[row.key].ratio if row.key in found else None

    return [
        Column("case", lambda r: escape(r.case)),
        Column("mode", lambda r: escape(r.mode)),
        Column("contender", lambda r: escape(r.contender)),
        Column("setting", lambda r: escape(r.setting)),
        Column("median, ms", lambda r: _ms(r.median_ms), lambda r: r.median_ms),
        Column("with launch gaps, ms", lambda r: _ms(r.with_gaps_ms), lambda r: r.with_gaps_ms),
        Column("spread", lambda r: _percent(r.spread), lambda r: r.spread),
        Column("best alternative, ms", lambda r: _ms(r.rival_ms), lambda r: r.rival_ms),
        Column("which", lambda r: escape(r.rival)),
        Column("ratio", _ratio, lambda r: r.ratio),
        Column("now / before", change, changed),
        Column("Multiply-Adds, M", lambda r: _mega(r.madds, 1), lambda r: r.madds),
        Column("bytes, MB", lambda r: _mega(r.bytes, 1), lambda r: r.bytes),
        Column("of copy bandwidth", lambda r: _percent(r.bandwidth_share), lambda r: r.bandwidth_share),
        Column("of matrix ceiling", lambda r: _percent(r.matrix_share), lambda r: r.matrix_share),
        Column("peak memory, MB", lambda r: _mega(r.peak_bytes, 0), lambda r: r.peak_bytes),
    ]


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    tone = "" if not row.ours else ' class="faster"' if row.ratio >= 1 else ' class="slower"'
    return f"<b{tone}>{row.ratio:.2f}</b>"


def _table(name: str, rows: Sequence[Row], found: Changes) -> str:
    several = len({row.setting for row in rows}) > 1
    columns = [c for c in _columns(found) if c.title != "setting" or several]
    columns = [c for c in columns if any(c.text(row) for row in rows)]
    lines = []
    for row in rows:
        cells = []
        for column in columns:
            value = column.value(row) if column.value else None
            number = _NUMBER if column.value else ""
            sorted_by = "" if value is None else f' data-v="{value:.6g}"'
            cells.append(f"<td{number}{sorted_by}>{column.text(row)}</td>")
        lines.append(f"<tr{'' if row.ours else ' data-other'}>{''.join(cells)}</tr>")
    numbers = {c.title for c in columns if c.value}
    return _filterable(
        name, [c.title for c in columns], lines, others=any(not row.ours for row in rows), numbers=numbers
    )


def _filterable(
    name: str, titles: Sequence[str], lines: Sequence[str], *, others: bool = False, numbers: Collection[str] = ()
) -> str:
    """A table with sorting by column and a field to filter by.

    numbers: the titles of columns that hold such; others: some ``lines`` show only when asked for.
    """
    label = escape(name)
    head = "".join(
        f'<th scope="col"{_NUMBER * (title in numbers)}><button type="button">{escape(title)}</button></th>'
        for title in titles
    )
    both = ' <label><input type="checkbox"> rows of the alternatives, too</label>' if others else ""
    return (
        f'<div class=filterable><p class=controls><input type="search" placeholder="filter: words, all of them" '
        f'aria-label="filter {label}">{both} <span class=count>{len(lines)} rows</span></p>'
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></div>"
    )


def _plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"


def _provenance(now: Results) -> str:
    keys = [key for key in now.provenance[0] if any(entry[key] for entry in now.provenance)] if now.provenance else []
    table = _plain_table(keys, [[escape(entry[key]) for key in keys] for entry in now.provenance])
    return (
        "<p>Alternatives take turns in one process, in a new order every round; times are medians over the rounds, "
        "spread is the interquartile range over the median. Ratio: the fastest alternative's time over this one's, so "
        "more is better. Bytes: inputs read once, results written once. Of copy bandwidth and of matrix ceiling: "
        "bytes and Multiply-Adds per second against what a large copy and the fastest matrix product (of the same "
        "dtype, where that was measured) reached. With launch gaps: of ordinary calls on a GPU, where the median is of "
        "CUDA-graph replays. Peak memory: growth of a process of its own by one call, on a GPU of the allocator. "
        "Which alternatives, checked how: the head of each "
        f"<code>benchmarks/bench_*.py</code>, and <code>benchmarks/NOTES.md</code>. Subjects in this report: "
        f"{escape(', '.join(dict.fromkeys(row.subject for row in now.rows)))}."
        f"</p>{table}"
    )


def _fact(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, int) and key.endswith("_bytes"):
        value = f"{value / 2**20:g} MiB"
    return _FACTS.get(key, key.replace("_", " ") + " {}").format(value)


_FACTS = {
    "cpu": "{}",
    "gpu": "{}",
    "cores": "{} cores",
    "threads": "{} threads",
    "last_level_cache_bytes": "last level cache of {}",
    "copy_gb_per_s": "copy bandwidth {} GB/s",
    "matrix_gflop_per_s": "matrix product {} GFLOP/s",
    "matrix_gflop_per_s_of": "matrix products by dtype {} GFLOP/s",
}


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mega(value: int | None, digits: int) -> str:
    return f"{value / 1e6:,.{digits}f}" if value else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


_STYLE = """
main { max-width: 1340px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); gap: 14px 36px; }
.plot { margin: 0; max-width: 760px; }
.plot figcaption { font-weight: 600; margin-bottom: 4px; }
.label { fill: var(--ink); stroke: var(--back); stroke-width: 5px; paint-order: stroke; }
.ceiling { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
.tone0 { --tone: #2f7fd6; }
.tone1 { --tone: #d98200; }
.tone2 { --tone: #2f9e62; }
.tone3 { --tone: #a55bc4; }
.tone4 { --tone: #c2453b; }
.tone5 { --tone: #6f7885; }
.same { color: var(--soft); font-weight: normal; }
.listing { max-width: none; font-size: .86rem; color: var(--soft); }
circle.solid { fill: var(--tone); }
circle.hollow { fill: var(--back); stroke: var(--tone); stroke-width: 1.5; }
polyline { fill: none; stroke: var(--tone); stroke-width: 1.5; }
polyline.hollow { stroke-dasharray: 3 3; }
.legend i { border-radius: 50%; border: 2px solid var(--tone); }
.legend i.solid { background: var(--tone); }
.legend i.rule { width: 1.6em; height: 0; border: 0; border-top: 2px dashed var(--ink); border-radius: 0;
  vertical-align: .25em; }
.controls { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin: .4rem 0; max-width: none; }
.controls input[type=search] { font: inherit; padding: 4px 8px; width: 17em; max-width: 100%; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.count { color: var(--soft); font-size: .86rem; }
.filterable .scroll { max-height: 70vh; overflow-y: auto; border: 1px solid var(--line); border-radius: 8px; }
.filterable table { margin: 0; width: 100%; }
.filterable th, .filterable td { padding: 5px 10px; }
.filterable thead th { position: sticky; top: 0; background: var(--card); z-index: 1; vertical-align: bottom; }
.filterable td:first-child { font-weight: 600; min-width: 9em; overflow-wrap: break-word; position: sticky; left: 0;
  background: var(--back); }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: inherit;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
@media (max-width: 600px) { .filterable td:first-child { min-width: 9em; max-width: 10em; } .plot circle { r: 7px; } }
tr[data-other] { color: var(--soft); }
"""

_SCRIPT = """
for (const part of document.querySelectorAll(".filterable")) {
  const body = part.querySelector("tbody"), rows = [...body.rows], heads = [...part.querySelectorAll("th")];
  const text = part.querySelector("[type=search]"), others = part.querySelector("[type=checkbox]");
  const show = () => {
    const words = text.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = (others && !others.checked && "other" in row.dataset) || !words.every(w => content.includes(w));
      shown += !row.hidden;
    }
    part.querySelector(".count").textContent = shown + " of " + rows.length + " rows";
  };
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const number = rows.some(r => r.cells[index].dataset.v);
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    const value = row => number ? row.cells[index].dataset.v : row.cells[index].textContent;
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
      return up * (number ? x - y : x.localeCompare(y, undefined, {numeric: true}));
    });
    body.append(...rows);
  }));
  text.addEventListener("input", show);
  if (others) others.addEventListener("change", show);
  show();
}
"""
