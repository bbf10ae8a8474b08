"""The subcommands of ``python -m deeplab_kernels``: every module here is one.

Each defines ``HELP: str`` (one line), ``add_arguments(parser: argparse.ArgumentParser) -> None`` and
``run(args: argparse.Namespace) -> int`` (the exit code). Import torch and the rest of the package inside ``run``, so
that ``--help`` stays quick and ``info`` works where the native library does not. Raise ``errors.UserError`` (or
ValueError, OSError, ImportError) for what the user can mend: it becomes one line and exit code 2.
"""
