"""What the four scripts share: environments, seeding, checkpoints and the run folder."""

import sys
from typing import NoReturn


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on standard error: code 2 for bad input, 1 for a run gone wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)
