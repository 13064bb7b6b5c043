"""Command line of the benchmarks."""

import tyro

from benchmarks.speed import speed


def help_me() -> None:
    """List the commands."""
    print(
        "python -m benchmarks speed    steps per second, beside Stable-Baselines3 (--help for options)"
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"speed": speed, "list": help_me})
