"""The command-line options of the benchmarks that time in rounds of all contenders."""

from __future__ import annotations

import argparse

import measure
import torch


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, file: str | None, seconds: float
) -> argparse.Namespace:
    """The parsed arguments, with those that say how to time, and whether to write to ``file`` if there is one."""
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=seconds, help="for each contender at most")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread; needs --threads 1; writes nothing")
    if file is not None:
        parser.add_argument("--no-write", action="store_true", help=f"print only; do not write {file} and its table")
    args = parser.parse_args(arguments)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    args.no_write = file is None or args.no_write or args.cpu_time
    return args


def apply(args: argparse.Namespace) -> None:
    """The allocator of timings, and the threads asked for; starts the command again if need be."""
    measure.use_tuned_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
