"""Checkpoints: written whole or not at all, and read without running anybody's code."""

import os
import zipfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch

from common import fail

FORMAT, VERSION = "single-file-rl checkpoint", 10


def save_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain Python, atomically: at any time the old file is there or the new.

    Where that fails, as on a full disk or with what load_checkpoint would refuse, the run ends with
    one line, and the old file stays.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError, RuntimeError):  # that it cannot be mapped says nothing of it
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        temporary.replace(path)
    except (OSError, RuntimeError, UnpicklingError) as error:
        with suppress(OSError):
            temporary.unlink()
        why = (str(error) or repr(error)).rpartition("Unpickler error: ")[2].splitlines()[0]
        fail(f"{path} could not be written: {why}", code=1)


def load_checkpoint(path: Path) -> dict:
    """Read what save_checkpoint wrote, to the CPU, or exit with a one-line error.

    Tensors are mapped, not read: a large replay takes no memory until it is copied, and only files
    below a gigabyte are held against their checksums.
    """
    try:
        if os.path.getsize(path) < 2**30:
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():
                    raise ValueError(f"the checksum of {part} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a dozen types: cut short, not a zip file, a refused class, ...
        why = repr(error).rpartition("error: ")[2]  # without the advice to load it all the same
        unread = isinstance(error, (OSError, MemoryError)) or "unable to mmap" in why
        what = "cannot be read" if unread else "is empty, damaged or not a checkpoint"
        fail(f"{path} {what} ({why:.80})")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        fail(f"{path} is a PyTorch file, but not a checkpoint of these scripts")
    if content["version"] != VERSION:
        fail(f"{path} has version {content['version']}; this code reads version {VERSION}")
    return content["state"]
