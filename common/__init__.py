"""What the four scripts share: environments, seeding, checkpoints and the run folder."""

import sys
from contextlib import contextmanager
from typing import NoReturn


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on standard error: code 2 for bad input, 1 for a run gone wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def failing(message: str, *errors: type[Exception]):
    """End with one line, `message` and why, where one of these errors is raised."""
    try:
        yield
    except errors as error:
        fail(f"{message}: {str(error) or type(error).__name__:.300}")
