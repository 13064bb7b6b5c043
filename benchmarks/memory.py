"""What a replay takes of the machine's memory, and how long it takes to save."""

import importlib
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tyro.conf import Positional

from benchmarks import results
from common import envs, provenance
from common.checkpoint import save_checkpoint


def memory(
    script: Positional[Literal["dqn_atari", "sac_continuous"]] = "dqn_atari",
    env_id: str = "",
    buffer_size: int = 1_000_000,
    output: Path | None = None,
) -> None:
    """Print what memory a replay takes as random play fills it, and how long it takes to save.

    Play goes on for a tenth more than fills it.

    Args:
        script: the script.
        env_id: environment, if not the script's own.
        buffer_size: transitions that the replay keeps.
        output: JSON file for the result; by default runs/memory_SCRIPT.json.
    """
    module = importlib.import_module(script)
    args = module.Args(buffer_size=buffer_size)
    args.env_id = env_id or args.env_id
    obs_space, action_space = module.check_args(args)
    torch.set_num_threads(1)
    content = {"script": script, "env_id": args.env_id, "buffer_size": buffer_size}
    content |= provenance.record(torch.device("cpu")) | {"command": results.own_command()}
    environments = envs.Environments(args)
    sizes = (np.prod(action_space.shape, dtype=int),) if script == "sac_continuous" else ()
    before, start, content["mib"] = resident(), 0, {}
    replay = module.Replay(args, obs_space.shape, *sizes, torch.device("cpu"))
    replay.start(environments.obs)
    environments.vector_env.action_space.seed(args.seed)
    for share in (0.1, 0.5, 1.0, 1.1):
        for _ in range(start, end := int(share * buffer_size) // args.num_envs):
            action = environments.vector_env.action_space.sample()
            obs, *outcome, infos = environments.step(action)
            replay.add(action, *outcome, obs, infos)
            environments.finished_episodes()
        start = end
        taken = resident() - before
        content["mib"][end * args.num_envs] = round(taken)
        print(f"{end * args.num_envs:,} transitions: {taken:,.0f} MiB", flush=True)
    environments.close()
    path = output or Path(f"runs/memory_{script}.json")
    results.write_json(content, path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        begin = time.perf_counter()
        save_checkpoint(Path(folder, "replay.pt"), replay.state_dict())
        content["save_seconds"] = round(time.perf_counter() - begin, 2)
    print(f"saved in {content['save_seconds']} s")
    results.write_json(content, path)


def resident() -> float:
    """Return this process's resident memory in MiB; its peak where there is no /proc.

    Not that of files, as libraries are: the kernel takes it back when it likes.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) / 2**10
    except (OSError, TypeError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
