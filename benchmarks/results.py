"""Results: from TensorBoard's events to small CSV files, and from those to the READMEs' tables."""

import csv
import json
import logging
import os
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tyro.conf import Positional

from benchmarks.suites import SUITES
from common import atari, fail, failing

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a run was resumed is no warning
FOLDER = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published_returns.csv"
COLUMNS = ("step", "seconds", "return", "length")
UNREADABLE = OSError, KeyError, TypeError, ValueError
SUSPENDED = 600  # seconds without an event: most runs log more often, but for long evaluations
UNUSABLE = ".unusable"  # ending of a run folder that was set aside
WHERE = ("--run-dir", "--checkpoint-every")  # flags that decide nothing of a result
FREE = (*WHERE, "--num-threads")  # and in which runs may differ that are called the same
# arguments in which runs may differ that are called seeds of one thing
LIKE = {"seed", "exp_name", "run_dir", "num_threads", "device", "compile", "checkpoint_every"}
LIKE |= {"eval_every", "eval_episodes", "eval_e", "capture_video", "resume", "evaluate", "render"}
LIKE |= {"track", "wandb_project_name", "wandb_entity", "minibatch_size", "num_minibatches"}
LIKE |= {"env_id"}  # they are compared by environment, and a game has several names


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
    """Read a run folder; if the run is finished, `config` has its evaluation and wall time."""
    config = read_config(run_dir / "config.json")
    reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    args, known = config["args"], reader.Tags()["scalars"]
    tags = ("charts/episodic_return", "charts/episodic_length", "charts/SPS")
    tags += ("eval/episodic_return",)
    scalars = [reader.Scalars(tag) if tag in known else [] for tag in tags]
    returns, lengths, progress, evaluations = scalars
    usual = np.diff([event.wall_time for event in progress])  # between two logs
    pause = max(SUSPENDED, 5 * np.percentile(usual, 25) if len(usual) > 3 else 0)
    seconds = _seconds(run_dir, [event.wall_time for event in returns + progress], pause)
    seconds = seconds.round(1)  # as in a CSV: what is logged together has one
    total = args["total_timesteps"]
    if any(events[-1].step > total for events in (progress, evaluations) if events):
        fail(f"{run_dir} was extended beyond the {total:,} steps of its command: run it anew")
    boundary = total - args["num_envs"] * args.get("num_steps", 1)
    if evaluations and evaluations[-1].step > boundary:
        config["evaluation"] = {"step": evaluations[-1].step, "return": evaluations[-1].value}
        known = {event.step: event.value for event in evaluations}  # a kill may repeat the last
        config["evaluations"] = [list(pair) for pair in known.items()]
        config["wall_seconds"] = round(max(seconds, default=0.0), 1)
    config["command"] = command(config)
    args.pop("run_dir", None)
    columns = [x.step for x in returns], seconds, [x.value for x in returns]
    columns += ([x.value for x in lengths],)
    whole = min(len(returns), len(lengths))  # a kill may leave a return without its length
    return Result(config, *(np.array(column[:whole], float) for column in columns))


def _seconds(run_dir: Path, wall_times: list[float], pause: float) -> np.ndarray:
    """Seconds from the first event to each, without what is longer than a `pause`.

    A run that was resumed has another file; one that was suspended logs nothing for long.
    """
    sessions = []
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        times = np.sort([event.wall_time for event in EventFileLoader(str(path)).Load()])
        parts = np.split(times, np.flatnonzero(np.diff(times) > pause) + 1)
        sessions += [(part[0], part[-1]) for part in parts if len(part)]
    times = np.array(wall_times)
    seconds = times - sessions[0][0] if sessions else times
    for (_, stopped), (resumed, _) in pairwise(sessions):
        seconds[times >= resumed] -= resumed - stopped
    return seconds


def read_config(path: Path) -> dict:
    """Read what a run's folder, or `write`, says of what made it."""
    with failing(f"{path} is not of a run of these scripts", *UNREADABLE):
        config = json.loads(path.read_text())
        _ = config["script"], config["command"], config["args"]["env_id"], config["args"]["seed"]
    return config


def read_csv(path: Path) -> Result:
    """Read what `write` wrote."""
    with failing(f"{path} is not a result of these benchmarks", *UNREADABLE), path.open() as file:
        rows = [[float(row[name]) for name in COLUMNS] for row in csv.DictReader(file)]
    columns = np.array(rows).reshape(-1, len(COLUMNS)).T
    return Result(read_config(path.with_suffix(".json")), *columns)


def _find(path: Path) -> dict[Path, Result]:
    """Return the results below `path`, or `path` itself, by their CSV files or run folders.

    A run with a CSV file beside its folder is read from that; what was set aside does not count.
    """
    path = path if path.name else path.absolute()  # "." has no name
    files = [path] if path.suffix == ".csv" else sorted(path.rglob("*.csv"))
    files = [x for x in files if x == path or x.with_suffix(".json").exists()]  # others' are not
    found = {file: read_csv(file) for file in files}
    for run_dir in (file.parent for file in sorted(path.rglob("config.json"))):
        if run_dir.suffix != UNUSABLE and run_dir.with_name(f"{run_dir.name}.csv") not in found:
            found[run_dir] = read_run(run_dir)
    return found


def read_folder(path: Path) -> dict[str, list[Result]]:
    """Return the results below `path` by environment (games as `ALE/Pong-v5`), ordered by seed.

    It may be a folder of results (SUITE, SUITE/ENV), where `run` put a suite, a single CSV file, a
    run folder, or a folder of run folders, where unfinished ones count too. Runs of an environment
    are to be seeds of one thing.
    """
    found = sorted(_find(path).values(), key=lambda result: result.config["args"]["seed"])
    named = [(_environment(result.config["args"]["env_id"]), result) for result in found]
    by_env = {x: [r for name, r in named if name == x] for x in sorted({x for x, _ in named})}
    for env_id, same in by_env.items():
        if why := unlike(same):
            fail(f"{path} has runs of {env_id} that differ in more than their seed: {why}")
        if len({x.config["args"]["seed"] for x in same}) < len(same):
            fail(f"{path} has several runs of {env_id} of one seed: name fewer")
    return by_env


def unlike(found: list[Result]) -> str:
    """Name the arguments because of which runs are not seeds of one thing; "" if they are."""
    args = [x.config["args"] | {"script": x.config["script"]} for x in found]
    for x in args:  # an argument that is newer than a run is off in it
        x |= {name: None for name, value in x.items() if value is False}
        x |= {"minibatch_size": minibatch_size(x)}
    names = {name for x in args for name in x} - LIKE | {"minibatch_size"}
    return ", ".join(x for x in sorted(names) if any(y.get(x) != args[0].get(x) for y in args))


def _environment(env_id: str) -> str:
    game = atari.find_game(env_id)  # by any of its names
    return f"ALE/{game.title().replace('_', '')}-v5" if game else env_id


def minibatch_size(args: dict) -> int | None:
    """Return PPO's samples in a minibatch, by whichever argument they were given."""
    if "num_minibatches" not in args:
        return None
    samples = args["num_envs"] * args["num_steps"]
    return args.get("minibatch_size") or samples // args["num_minibatches"]


def write(result: Result, path: Path) -> None:
    """Write a finished run to a CSV file, and what made it to a JSON file beside it.

    The CSV has a row for every training episode: step at its end, seconds of work until then,
    return and length.
    """
    lines = [",".join(COLUMNS)]
    for step, seconds, value, length in zip(*result[1:], strict=True):
        lines.append(f"{int(step)},{seconds:.1f},{value:.6g},{int(length)}")
    write_text(json.dumps(result.config, indent=2) + "\n", path.with_suffix(".json"))
    write_text("\n".join(lines) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file whole, or exit with one line and leave what was there."""
    with failing(f"{path} could not be written", OSError, code=1):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}.writing")
        try:
            whole.write_text(text)
            whole.replace(path)
        finally:
            whole.unlink(missing_ok=True)


def export(
    run_dirs: Positional[tuple[Path, ...]] = (),
    suite: str = "",
    name: str = "",
    run_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Write finished runs to results/NAME/ENV/SEED.csv and .json, to be committed.

    Args:
        run_dirs: run folders, or folders of them.
        suite: all finished runs of this suite.
        name: folder under results/; by default the suite, or the run's --exp-name.
        run_dir: folder of the suites' runs.
    """
    if suite and run_dirs:
        fail(f"--suite {suite}: name run folders or a suite; under which name is for --name")
    run_dirs = (run_dir / suite,) if suite else run_dirs
    if not run_dirs:
        fail("name run folders, or --suite NAME")
    by_folder = {folder: _find(folder) for folder in run_dirs}
    if none := [str(folder) for folder, found in by_folder.items() if not found]:
        fail(f"{', '.join(none)}: neither a run folder nor a folder of them: no config.json")
    found = {path: result for some in by_folder.values() for path, result in some.items()}
    left = [path for path, result in found.items() if "evaluation" not in result.config]
    if named := [path for path in left if path in run_dirs]:
        steps = found[named[0]].config["args"]["total_timesteps"]
        what = f"--resume {named[0]} continues it, unless it was shortened by --total-timesteps"
        fail(f"{named[0]} is not finished (of {steps:,} steps); {what}")
    if left:
        print(f"not finished, so left out: {', '.join(map(str, left))}")
    if len(left) == len(found):
        fail(f"no finished run in {', '.join(map(str, run_dirs))}")
    files = {}
    for path in (path for path in found if path not in left):
        config = found[path].config
        args, made_by = config["args"], command(config, FREE)
        folder = FOLDER / (name or suite or args["exp_name"]) / args["env_id"].replace("/", "-")
        file = folder / f"{args['seed']}.csv"
        if file in files:
            fail(f"{path} would be {file}, as another run: export them under two names")
        files[file] = found[path]
        if file.exists() and (other := command(read_csv(file).config, FREE)) != made_by:
            fail(f"{file} is of another command, `{other}`: remove it, or take another --name")
        if file.exists() and not repeats(read_csv(file), found[path]):
            fail(f"{file} has other episodes: remove it, or take another --name")
    for folder in {file.parent for file in files}:
        seeds = {file: read_csv(file) for file in folder.glob("*.csv")} | files
        if why := unlike([seeds[file] for file in seeds if file.parent == folder]):
            fail(f"{folder} would have runs that differ in {why}: take another --name")
    for file, result in files.items():
        write(result, file)
        changed = str(result.config["commit"]).endswith("-dirty")
        print(file, "(of a checkout with changes)" * changed)


def command(config: dict, without: tuple[str, ...] = WHERE) -> str:
    """Return a run's command without what only said where and how often to save.

    Of a run trained from Python it is that program's, without what it passed on.
    """
    _, script, *rest = shlex.split(config["command"])
    if Path(script).stem != config["script"]:
        return config["command"]
    words, kept = iter(rest), []
    for word in words:
        if word.split("=")[0].replace("_", "-") not in without:
            kept.append(word)
        elif "=" not in word:
            next(words)
    return shlex.join(["python", f"{config['script']}.py", *kept])


def suite_command(script: str, env_id: str, seed: int, flags: str) -> str:
    """Return `command` of a suite's run, but for what is FREE."""
    words = ["python", script, "--env-id", env_id, "--seed", str(seed), *shlex.split(flags)]
    return command({"script": script, "command": shlex.join(words)}, FREE)


def own_command() -> str:
    """Return the command that runs, without --output, which only says where."""
    words = [x for x in sys.argv[1:] if not x.startswith("--output=")]
    words = ["python", "-m", "benchmarks", *words]
    if "--output" in words:
        i = words.index("--output")
        words = words[:i] + words[i + 2 :]
    return shlex.join(words)


def write_json(content: dict, path: Path) -> None:
    """Write what was measured, and say where it is."""
    write_text(json.dumps(content, indent=2) + "\n", path)
    print(path)


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean, which is narrow where values are few."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(draws.mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def repeats(a: Result, b: Result) -> bool:
    """Tell if two runs had the same episodes."""
    same = np.array_equal(a.steps, b.steps)
    return bool(same and np.allclose(a.returns, b.returns, rtol=1e-5, atol=1e-5))


def published(config: dict) -> Published | None:
    """Return CleanRL's figure for a run's script, steps and environment, whatever its version."""
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            same = row["script"] == config["script"]
            same &= int(row["steps"]) == config["args"]["total_timesteps"]
            same &= _name(row["env_id"]) == _name(config["args"]["env_id"])
            same &= not config["args"].get("sticky_actions")  # which CleanRL's games have not
            if same and row["source"].startswith("CleanRL"):
                version = row["env_id"].rsplit("-", 1)[1]
                alike = "NoFrameskip" in row["env_id"]  # one protocol, by either name
                alike |= config["args"]["env_id"].endswith(version)
                label = "CleanRL" if alike else f"CleanRL ({version})"
                return Published(float(row["mean"]), float(row["std"]), label)
    return None


def _name(env_id: str) -> str:
    """Return `Breakout` of both `ALE/Breakout-v5` and `BreakoutNoFrameskip-v4`."""
    return re.sub(r"-v\d+$", "", _environment(env_id).removeprefix("ALE/"))


def table(suite: Positional[str] = "ppo_continuous") -> None:
    """Print the table of a suite's committed results, and the command behind each row.

    Args:
        suite: a folder under results/.
    """
    if not any((FOLDER / suite).rglob("*.csv")):
        fail(
            f"no results of {suite}: python -m benchmarks export RUN_DIR --name {suite} makes them"
        )
    print("\n".join(rows(suite)))
    print("\n```bash", *commands(suite), sep="\n")
    if suite in SUITES:
        folder = os.path.relpath(FOLDER / suite)
        print(f"python -m benchmarks compare {folder} runs/benchmarks/{suite}")
    print("```")


def rows(suite: str) -> list[str]:
    """Return the lines of the table: last 100 training episodes, mean over seeds, 95% interval."""
    lines, by_env = [], read_folder(FOLDER / suite)
    knowns = filter(None, (published(found[0].config) for found in by_env.values()))
    labels = {known.label for known in knowns}
    label = labels.pop() if len(labels) == 1 else "CleanRL"
    for env_id, found in by_env.items():
        if not all(len(result.returns) for result in found):
            lines.append(f"| {env_id} | {found[0].total:,} | - | - | - | - |")
            continue
        values = [float(result.last().mean()) for result in found]
        form = ",.0f" if abs(np.mean(values)) >= 100 else ",.1f"
        low, high = (format(value, form) for value in interval(values))
        known = published(found[0].config)
        spread = f"{low} to {high}" if len(values) > 2 else "-"  # of two it would cover half
        columns = env_id, f"{found[0].total:,}", format(np.mean(values), form), spread
        columns += (", ".join(format(value, form) for value in values),)
        columns += (f"{known.mean:{form}} ± {known.std:{form}}" if known else "-",)
        if known and known.label != label:
            columns = *columns[:-1], columns[-1] + known.label.removeprefix("CleanRL")
        lines.append(f"| {' | '.join(columns)} |")
    head = f"| environment | steps | return | 95% interval | each seed | {label} |"
    return [head, "|---" * 6 + "|", *lines]


def commands(suite: str) -> list[str]:
    """Return for each row of the table the command that makes all its runs."""
    lines, runs = [], SUITES[suite].runs if suite in SUITES else ()
    for env_id, found in read_folder(FOLDER / suite).items():
        seeds = [result.config["args"]["seed"] for result in found]
        threads = {result.config.get("num_threads", 1) for result in found}
        own = {suite_command(x, y, seed, flags) for x, y, flags in runs for seed in seeds}
        as_suite = {command(result.config, FREE) for result in found} <= own
        if as_suite and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
            words = f"--seeds {len(seeds)}" + f" --first-seed {seeds[0]}" * (seeds[0] != 1)
            words += f" --threads {max(threads)}" * (len(threads) == 1 and threads != {1})
            lines.append(f"python -m benchmarks run {suite} --env-ids {env_id} {words}")
        else:
            lines += dict.fromkeys(result.config["command"] for result in found)
    return lines
