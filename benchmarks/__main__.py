"""Command line of the benchmarks: `python -m benchmarks --help`."""

import signal

import tyro

from benchmarks.memory import memory
from benchmarks.plots import compare, plot
from benchmarks.random_returns import random
from benchmarks.results import export, table
from benchmarks.run import run
from benchmarks.speed import speed

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    commands = (run, export, plot, table, compare, speed, memory, random)
    named = {command.__name__: command for command in commands}
    try:
        tyro.extras.subcommand_cli_from_dict(named, prog="python -m benchmarks")
    except KeyboardInterrupt:  # which `run` heeds itself
        raise SystemExit(130) from None
