"""Command line of the benchmarks: `python -m benchmarks speed --help`."""

import tyro

from benchmarks.speed import speed

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"speed": speed})
