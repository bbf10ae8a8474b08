"""Examines the HTML reports."""

from __future__ import annotations

import html.parser
import re

VOID = ("meta", "img", "line", "polyline", "br", "input")


class Page(html.parser.HTMLParser):
    """Collects headings, text, tables (rows of cells) and what a page refers to; checks that its elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str | None] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []  # every element
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        self.text.append(data)


def check_self_contained(text: str) -> Page:
    """The page, of which it is checked that it loads nothing but pictures inside it, and has a dark theme."""
    page = Page(text)
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert all((reference or "").startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    return page
