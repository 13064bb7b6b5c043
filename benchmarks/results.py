"""Results: from TensorBoard's events to small CSV files, and from those to the README's tables."""

import csv
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tyro.conf import Positional

from benchmarks.suites import SUITES
from common import fail

FOLDER = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published_returns.csv"
COLUMNS = ("step", "seconds", "return", "length")
WHERE = ("--run-dir", "--checkpoint-every")  # flags that decide nothing of a result


class Result(NamedTuple):
    """A run: what it was, and all its training episodes; arrays are [episodes]."""

    config: dict
    steps: np.ndarray  # at the end of the episode
    seconds: np.ndarray  # of work until then
    returns: np.ndarray
    lengths: np.ndarray

    @property
    def total(self) -> int:
        """Environment steps that were asked for."""
        return self.config["args"]["total_timesteps"]

    def last(self, episodes: int = 100) -> np.ndarray:
        """Return the returns of the last episodes."""
        return self.returns[-episodes:]


class Published(NamedTuple):
    """A published training return."""

    mean: float
    std: float
    label: str


def read_run(run_dir: Path) -> Result:
    """Read a run folder; of a finished run `config` also tells its evaluation and its time."""
    reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    config = json.loads((run_dir / "config.json").read_text())
    tags = ("charts/episodic_return", "charts/episodic_length", "charts/SPS")
    tags += ("eval/episodic_return",)
    known = reader.Tags()["scalars"]
    returns, lengths, progress, evaluations = (
        reader.Scalars(tag) if tag in known else [] for tag in tags
    )
    args, seconds = config["args"], _seconds(run_dir, [x.wall_time for x in returns + progress])
    end = progress[-1].step if progress else 0
    unit = args["num_envs"] * args.get("num_steps", 1)
    if evaluations and evaluations[-1].step == end > args["total_timesteps"] - unit:
        config["evaluation"] = {"step": end, "return": evaluations[-1].value}
        config["wall_seconds"] = round(seconds[-1], 1)
    steps, values, sizes = (
        [x.step for x in returns],
        [x.value for x in returns],
        [x.value for x in lengths],
    )
    config["command"] = _command(config)
    args.pop("run_dir", None)
    arrays = (np.array(x, dtype=float) for x in (steps, seconds[: len(steps)], values, sizes))
    return Result(config, *arrays)


def _seconds(run_dir: Path, wall_times: list[float]) -> np.ndarray:
    """Seconds from the first event to each, without the pauses of a run that was resumed."""
    sessions = []
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        if times := [event.wall_time for event in EventFileLoader(str(path)).Load()]:
            sessions.append((min(times), max(times)))
    wall_times = np.array(wall_times)
    seconds = wall_times - sessions[0][0]
    for (_, stopped), (resumed, _) in pairwise(sessions):
        seconds[wall_times >= resumed] -= resumed - stopped
    return seconds


def read_csv(path: Path) -> Result:
    """Read what `write` wrote."""
    with path.open() as file:
        data = [[float(row[name]) for name in COLUMNS] for row in csv.DictReader(file)]
    config = json.loads(path.with_suffix(".json").read_text())
    return Result(config, *np.array(data).reshape(-1, len(COLUMNS)).T)


def read_folder(path: Path) -> dict[str, list[Result]]:
    """Return the results below a folder by environment, ordered by seed.

    The folder may be one of results (SUITE or SUITE/ENV, here or where `run` writes), a run folder
    or a folder of run folders; `path` may also be a single CSV file.
    """
    files = [path] if path.suffix == ".csv" else sorted(path.rglob("*.csv"))
    found = [read_csv(file) for file in files]
    found = found or [read_run(file.parent) for file in sorted(path.rglob("config.json"))]
    found.sort(key=lambda result: (result.config["args"]["env_id"], result.config["args"]["seed"]))
    by_env: dict[str, list[Result]] = {}
    for result in found:
        by_env.setdefault(result.config["args"]["env_id"], []).append(result)
    return by_env


def write(run_dir: Path, path: Path) -> None:
    """Write a finished run as a CSV file, a row for every training episode, with a JSON beside it.

    The JSON is the run's config.json with its evaluation and wall time, and with what `run` has
    noted of its memory.
    """
    result = read_run(run_dir)
    if "evaluation" not in result.config:
        fail(f"{run_dir} is not finished; --resume {run_dir} continues it")
    usage = run_dir.with_name(f"{run_dir.name}.usage.json")
    usage = json.loads(usage.read_text()) if usage.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result.config | usage, indent=2) + "\n")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for step, seconds, value, length in zip(*result[1:], strict=True):
            writer.writerow((int(step), f"{seconds:.1f}", f"{value:.6g}", int(length)))


def export(
    run_dirs: Positional[tuple[Path, ...]] = (),
    name: str = "",
    suite: str = "",
    root: Path = Path("runs/benchmarks"),
) -> None:
    """Write results/NAME/ENV/SEED.csv and .json for finished runs, to be committed.

    The CSV has a row for every training episode: step at its end, seconds of work since the first
    event, return and length. The JSON is the run's config.json, with its evaluation, wall time and,
    if `run` made it, peak memory.

    Args:
        run_dirs: run folders.
        name: folder under results/; by default the suite, or the run's --exp-name.
        suite: export all finished runs of a suite.
        root: where `run` put the suite.
    """
    if not run_dirs and not suite:
        fail("name run folders, or --suite NAME")
    done = [path.with_suffix("") for path in sorted((root / suite).glob("*/*.csv"))] * bool(suite)
    if suite and not done:
        fail(f"no finished run in {root / suite}: python -m benchmarks run {suite}")
    for run_dir in (*run_dirs, *done):
        if run_dir in done:  # `run` has exported it there
            config = json.loads(run_dir.with_suffix(".json").read_text())
        else:
            config = json.loads((run_dir / "config.json").read_text())
        args = config["args"]
        target = FOLDER / (name or suite or args["exp_name"]) / args["env_id"].replace("/", "-")
        path = target / f"{args['seed']}.csv"
        if run_dir in done:
            target.mkdir(parents=True, exist_ok=True)
            for suffix in (".csv", ".json"):
                shutil.copyfile(run_dir.with_suffix(suffix), path.with_suffix(suffix))
        else:
            write(run_dir, path)
        changed = "  (from a checkout with uncommitted changes)"
        print(path, changed * str(config["commit"]).endswith("-dirty"), sep="")
