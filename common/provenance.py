"""Provenance: what a result depends on beyond its arguments."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def processor() -> str:
    """Return the processor's name."""
    about = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", about.read_text() if about.exists() else "", re.M)
    return names[0] if names else platform.processor()


def commit() -> str:
    """Return git's commit, with -dirty where a Python file is changed or new; "" without git."""
    options = {"cwd": Path(__file__).parent.parent, "capture_output": True, "text": True}
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "*.py"], **options).stdout
    except OSError:  # no git
        return ""
    return head + "-dirty" * bool(changed)


def code(script: str) -> str:
    """Return a fingerprint of what a run of `script` executes: its file, and common/."""
    root = Path(__file__).parent.parent
    files = [root / f"{script}.py", *sorted(root.glob("common/*.py"))]
    content = b"".join(path.read_bytes() for path in files if path.exists())
    return hashlib.sha256(content).hexdigest()[:12]


def record(device: torch.device) -> dict:
    """Return what a result depends on beyond its arguments: command line, commit, versions, ..."""
    versions = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "ale-py", "numpy")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit() or None,
        "versions": {"python": platform.python_version()} | versions,
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "num_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
