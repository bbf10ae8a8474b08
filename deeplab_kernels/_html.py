"""What the HTML reports share: one file with everything inside, for light and dark screens."""

from __future__ import annotations

import html


def escape(text: object) -> str:
    return html.escape(str(text))


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole document. ``body``, ``style`` and ``script`` are taken as they are; ``title`` is escaped."""
    code = f"<script>{script}</script>\n" if script else ""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_THEME}{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"{code}</body>\n</html>\n"
    )


_THEME = """
:root { color-scheme: light dark; --ink: #1b1f27; --soft: #5b6472; --line: #d9dde4; --back: #fafbfc; --card: #fff;
  --mark: #2f6fde; --good: #1d7f3f; --bad: #b3381f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b2; --line: #333a46; --back: #14171c;
  --card: #1c2027; --mark: #7aa7ff; --good: #63c684; --bad: #f08a6c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 72ch; }
.note { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 1.2rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; }
.tile span { color: var(--soft); font-size: .86rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 0; font-size: .9rem; }
.legend i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; border-radius: 3px;
  vertical-align: -.1em; border: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; }
.faster { color: var(--good); }
.slower { color: var(--bad); }
svg { width: 100%; height: auto; margin-top: .6rem; font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); }
.whole { white-space: nowrap; }
@media (max-width: 600px) { svg { font-size: 20px; } }
"""
