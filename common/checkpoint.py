"""Checkpoints: written whole or not at all, and read without running anybody's code."""

import os
from pathlib import Path

import numpy as np
import torch

FORMAT, VERSION = "single-file-rl checkpoint", 1


class CheckpointError(Exception):
    """The file cannot be read as a checkpoint; the message says why in one line."""


def to_plain(value):
    """Turn `value` into tensors and plain Python, which is all that `weights_only=True` lets in.

    NumPy's arrays, scalars and generators become marked tuples; from_plain restores their types.
    Raises TypeError for anything else: reading it would need its class, that is, somebody's code.
    """
    if isinstance(value, np.ndarray):
        return "ndarray", torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return "scalar", torch.from_numpy(np.array(value))
    if isinstance(value, np.random.Generator):
        return "generator", to_plain(value.bit_generator.state)
    if type(value) in (tuple, list):
        return type(value).__name__, [to_plain(item) for item in value]
    if type(value) is dict or type(value).__name__ == "OrderedDict":
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor) or type(value) in (type(None), bool, int, float, str, bytes):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be stored in a checkpoint")


def from_plain(value):
    """Undo to_plain."""
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    if not isinstance(value, tuple):
        return value
    kind, content = value
    if kind in ("tuple", "list"):
        items = [from_plain(item) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "generator":
        state = from_plain(content)
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    return content.cpu().numpy() if kind == "ndarray" else content.cpu().numpy()[()]


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` atomically: whenever the process dies, the old file is there or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, "state": to_plain(state)}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict:
    """Read what save_checkpoint wrote, to the CPU. Raises CheckpointError."""
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a dozen types: cut short, not a zip file, a class that is refused, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a PyTorch file, but not a checkpoint of these scripts")
    if content["version"] != VERSION:
        raise CheckpointError(
            f"{path} has version {content['version']}; this code reads version {VERSION}"
        )
    return from_plain(content["state"])
