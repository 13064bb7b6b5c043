"""What random actions return in the environments of the suites: the zero of normalised scores."""

import csv
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np

from benchmarks import results
from benchmarks.suites import SUITES
from common import fail

FILE = Path(__file__).parent / "random_returns.csv"
COLUMNS = ("env_id", "episodes", "seed", "mean", "std", "gymnasium", "mujoco", "ale-py")


def read() -> dict[str, float]:
    """Return the mean return of random actions, by environment."""
    with FILE.open() as file:
        return {row["env_id"]: float(row["mean"]) for row in csv.DictReader(file)}


def random(env_ids: tuple[str, ...] = (), episodes: int = 100, seed: int = 1) -> None:
    """Measure what random actions return, and write it to benchmarks/random_returns.csv.

    Episodes are those of an evaluation: whole games in Atari, unclipped.

    Args:
        env_ids: environments; by default those of all suites that are installed.
        episodes: episodes of each.
        seed: episode i and its actions are seeded from (seed, i).
    """
    from importlib.metadata import version

    from common.envs import play

    if episodes < 1:
        fail(f"--episodes {episodes}: must be at least 1")
    if seed < 0:
        fail(f"--seed {seed}: must be at least 0")
    every = {env_id for suite in SUITES.values() for _, env_id, _ in suite.runs}
    rows = {}
    if FILE.exists():
        with FILE.open() as file:
            rows = {row["env_id"]: row for row in csv.DictReader(file)}
    for env_id in env_ids or sorted(every):
        args = SimpleNamespace(env_id=env_id, seed=seed, eval_episodes=episodes, eval_e=1.0)
        args.render, args.capture_video, args.sticky_actions = False, False, 0.0
        try:
            returns, _ = play(None, args, Path())
        except (gym.error.Error, ImportError) as error:
            if env_ids:
                fail(f"--env-ids {env_id}: {error}")
            print(f"{env_id} is left out: {error}")
            continue
        figures = env_id, episodes, seed, f"{np.mean(returns):.6g}", f"{np.std(returns):.6g}"
        rows[env_id] = dict(zip(COLUMNS, (*figures, *map(version, COLUMNS[5:]))))
        print(f"{env_id}: {np.mean(returns):,.2f} ± {np.std(returns):,.2f}", flush=True)
        lines = [COLUMNS, *(rows[name].values() for name in sorted(rows))]
        results.write_text("".join(",".join(map(str, line)) + "\n" for line in lines), FILE)
