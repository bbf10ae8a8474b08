"""The command line: discovery, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from _processes import run_python

from deeplab_kernels import __version__, cli
from deeplab_kernels.errors import UserError


def run_module(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deeplab_kernels", *arguments], capture_output=True, text=True, timeout=120, **kwargs
    )


@pytest.fixture
def command(monkeypatch):
    """Makes "trial" the only command; its run() raises or returns what the test puts into ``outcome``."""
    outcome: dict[str, object] = {"value": 0}

    def run(args: argparse.Namespace) -> int:
        if isinstance(outcome["value"], BaseException):
            raise outcome["value"]
        return outcome["value"]

    module = SimpleNamespace(HELP="a trial", add_arguments=lambda parser: parser.add_argument("--n", type=int), run=run)
    monkeypatch.setattr(cli, "command_names", lambda: ["trial"])
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    return outcome


def test_help_lists_every_command_and_imports_no_torch():
    code = (
        "import sys; from deeplab_kernels import cli; parser = cli.build_parser(); print(parser.format_help());"
        "heavy = [m for m in ('torch', 'numpy', 'PIL', 'skimage', 'deeplab_kernels.ops') if m in sys.modules];"
        "assert not heavy, f'--help imports {heavy}'"
    )
    shown = run_python(code)
    assert "info" in cli.command_names()
    for name in cli.command_names():
        assert f"\n    {name} " in shown


@pytest.mark.parametrize("name", cli.command_names())
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: deeplab_kernels {name}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"deeplab_kernels {__version__}"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["info", "--no-such-option"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("deeplab_kernels: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("photo.xyz is no image"), "photo.xyz is no image"),
        (ValueError("size must be at least 1,\n got 0"), "size must be at least 1, got 0"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "a.png: No such file or directory"),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (ImportError("no compiled library"), "no compiled library"),
        (ValueError(), "ValueError"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(command, capsys, error, line):
    command["value"] = error
    assert cli.main(["trial"]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"deeplab_kernels trial: error: {line}\n"
    assert captured.out == ""


def test_traceback_on_request_and_for_defects(command):
    command["value"] = ValueError("asked for")
    with pytest.raises(ValueError, match="asked for"):
        cli.main(["--traceback", "trial"])
    command["value"] = KeyError("a defect, not the user's doing")
    with pytest.raises(KeyError):
        cli.main(["trial"])


@pytest.mark.parametrize(("value", "code"), [(0, 0), (None, 0), (1, 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(command, value, code):
    command["value"] = value
    assert cli.main(["trial", "--n", "3"]) == code


def test_module_and_broken_pipe():
    result = run_module("--version")
    assert (result.returncode, result.stdout.strip()) == (0, f"deeplab_kernels {__version__}")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        process = subprocess.run(
            [sys.executable, "-m", "deeplab_kernels", "info"], stdout=closed, stderr=subprocess.PIPE, timeout=120
        )
    assert process.stderr == b""
    assert process.returncode == cli.EXIT_BROKEN_PIPE
