"""Command line of the benchmarks: `python -m benchmarks --help`."""

import tyro

from benchmarks.results import export, plot, table
from benchmarks.speed import speed

if __name__ == "__main__":
    commands = {"speed": speed, "export": export, "table": table, "plot": plot}
    tyro.extras.subcommand_cli_from_dict(commands)
