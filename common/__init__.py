"""What the four scripts share: environments, seeding, checkpoints and the run folder."""

import os
import sys
from contextlib import contextmanager, suppress
from threading import RLock
from typing import NoReturn, TextIO

from tqdm import tqdm

# its own is for several processes, and from Python 3.14 on is said to leak if one ends at once
tqdm.set_lock(RLock())


def fail(message: str, code: int = 2) -> NoReturn:
    """Exit with one line on standard error: code 2 for bad input, 1 for a run gone wrong."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def say(line: str, file: TextIO | None = None) -> bool:
    """Print a line, above a progress bar; return False once nobody can read it any more.

    That is when Ctrl-C has also ended `| tee`, the terminal is gone or a log's disk is full.
    """
    file = file or sys.stdout
    try:
        tqdm.write(line, file=file)
        file.flush()
    except BlockingIOError:  # a reader that is slow
        return True
    except OSError:
        with suppress(OSError):  # if it has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        return False
    return True


@contextmanager
def failing(message: str, *errors: type[BaseException], code: int = 2):
    """Exit with one line, `message` and the reason, if one of these errors is raised."""
    try:
        yield
    except errors as error:
        fail(f"{message}: {str(error) or type(error).__name__:.300}", code)
