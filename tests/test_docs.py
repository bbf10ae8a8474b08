"""README and the guides say what the code does: commands parse, targets and files exist, imports resolve."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from deeplab_kernels import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("NOTES*.md"))]
SOURCES = [*PAGES, *sorted((ROOT / "examples").iterdir())]
CONTINUED = re.compile(r"\\\n\s*")


def pages(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", paths, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path, start: str) -> list[str]:
    """What follows ``start`` at the beginning of a line, or of code within a line, without a comment behind it."""
    text = CONTINUED.sub(" ", page.read_text())
    lines = re.findall(rf"^(?:#   )?{start}(.*)", text, re.MULTILINE)
    within = re.findall(rf"`{start}([^`\n]*)`", text)
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in [*lines, *within]]


def parses(words: list[str]) -> bool:
    try:
        cli.build_parser().parse_args(words)
    except SystemExit as end:
        return end.code == 0  # --help
    return True


@pages(SOURCES)
def test_commands_parse(page: Path) -> None:
    for command in commands(page, r"(?:torchrun --nproc-per-node 4|python) -m deeplab_kernels\b"):
        words = [word for word in shlex.split(command.translate({ord(c): None for c in "[]"})) if word != "..."]
        if words[:1] in ([], ["COMMAND"]):
            continue
        named_only = words[0] in cli.command_names() and len(words) == 1  # in a sentence
        assert named_only or parses(words), f"{page.name}: {command}"


@pages(SOURCES)
def test_scripts_and_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page, "python (?!-)"):
        script = command.split()[0]
        assert (ROOT / script).is_file(), f"{page.name}: python {command}"
    for command in commands(page, "make "):
        target = command.split()[0]
        if target.isidentifier() or target == "bench-pytest":
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {command}"


@pages(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pages(PAGES)
def test_examples_are_python_and_import_what_there_is(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        tree = ast.parse(textwrap.dedent(block), page.name)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deeplab_kernels")
            if ours or any(name.startswith("deeplab_kernels") for name in names):
                exec(compile(ast.Module([node], []), page.name, "exec"), {})
