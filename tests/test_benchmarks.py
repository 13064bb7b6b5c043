"""The READMEs' numbers come from the committed results, those from runs, and the runner completes."""

import contextlib
import csv
import dataclasses
import gc
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, assert_same, needs_git, scalars
from tensorboard.backend.event_processing import event_accumulator
from torch.utils.tensorboard import SummaryWriter

import dqn_atari
import ppo_continuous as ppo
import ppo_discrete
import sac_continuous
from benchmarks import memory, plots, random_returns, results, run, speed, suites
from common import arguments
from common.checkpoint import load_checkpoint

README, DETAILS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
MORE = "pong_1m ppo_pong_2m ppo_breakout_1m dqn_pong_1m dqn_pong_2m dqn_breakout_1m".split()
MORE += ["dqn_pong_2m_all", "dqn_breakout_2m", "dqn_breakout_2m_one", "sac_halfcheetah_bf16"]
COMMITTED = [name for name in (*suites.SUITES, *MORE) if (results.FOLDER / name).is_dir()]
FLAGS = "--total-timesteps 2048 --num-steps 64 --num-minibatches 4 --update-epochs 1"
FLAGS += " --checkpoint-every 128 --eval-episodes 1 --no-compile"
TINY = suites.Suite(2, [("ppo_continuous", "Pendulum-v1", FLAGS)])
RUNNER = """
import subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks import run, suites
class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print("pid", self.pid, flush=True)
subprocess.Popen = Popen
suites.SUITES["tiny"] = suites.Suite(*{suite!r})
run.SCRIPTS = Path({scripts!r})
run.run("tiny", workers=2)
"""


@pytest.mark.parametrize("suite", COMMITTED)
def test_the_readmes_tables_and_commands_are_those_that_the_results_give(suite):
    tables = README if suite in suites.SUITES else DETAILS
    assert "\n\n" + "\n".join(results.rows(suite)) + "\n\n" in tables.read_text()  # no row more
    assert "\n".join(results.commands(suite)) in DETAILS.read_text()


def listed(words) -> str:
    """Return `a, b and c`."""
    *others, last = words
    return f"{', '.join(others)} and {last}"


def test_the_readmes_table_of_atari_is_what_the_results_give():
    told, script = [], ""
    for line in README.read_text().split("| script | game |")[1].split("\n\n")[0].splitlines()[2:]:
        new_script, *columns = (x.strip(" `") for x in line.strip("|").split("|"))
        script = new_script or script
        told.append((script, *columns))
    found = []
    for name in MORE:
        for env_id, (result, *more) in results.read_folder(results.FOLDER / name).items():
            words = result.config["command"].removeprefix("python ")
            neither = r" --(env-id|total-timesteps|num-threads|seed) \S+| --checkpoint-replay"
            row = re.sub(neither, "", words), env_id, f"{result.total:,}"
            mean = np.mean([x.last().mean() for x in (result, *more)])
            if more:
                seeds = listed(f"{x.last().mean():.1f}" for x in (result, *more))
                said = "one seed each, but three of `dqn_atari.py --bf16` on Pong, which return"
                assert (name, len(more)) == ("dqn_pong_2m", 2)
                assert f"{said} {seeds}:" in " ".join(README.read_text().split())
            if env_id.startswith("ALE/"):
                whole = {"args": result.config["args"] | {"total_timesteps": 10_000_000}}
                known = results.published(result.config | whole)
                levels = mean, random_returns.read()[env_id], known.mean
                found.append(row + tuple(f"{x:.0f}" if x >= 100 else f"{x:.1f}" for x in levels))
    assert sorted(told) == sorted(found)


def table_of_speeds():
    """Rows of the full table: script, peer, work, and the rest; a blank is what is above it."""
    table = DETAILS.read_text().split("ratio, pair by pair |\n")[1].split("\n\n")[0]
    script = work = ""
    for line in table.splitlines()[1:]:
        new_script, new_work, *rest = (x.strip(" `") for x in line.strip("|").split("|"))
        script, work = new_script or script, new_work or work
        beside = (x for x in ("TorchRL", "SBX", "CleanRL") if x in work)
        yield script, next(beside, "Stable-Baselines3"), work, *rest


def test_the_readmes_times_of_the_defaults_follow_from_the_measured_speeds():
    speeds = {}
    for script, _, work, *_, here, _, _ in table_of_speeds():
        if not re.search("tutorial|8 environments|ppo_discrete.*Breakout", f"{script} {work}"):
            speeds.setdefault(script, []).append(float(here.replace(",", "")))
    seconds = {"minute": 60, "minutes": 60, "hours": 3600}
    rows = re.findall(
        r"^\| `(\w+\.py)` .* ([\d.]+)(k|M) steps.* \| (.*) \|$", README.read_text(), re.M
    )
    assert {row[0] for row in rows} == set(speeds) and len(rows) == 4
    for script, count, unit, words in rows:
        steps = float(count) * {"k": 1e3, "M": 1e6}[unit]
        least, greatest = (steps / f(speeds[script]) for f in (max, min))
        low, _, high = words.rpartition(" to ")
        *_, last = high.split()
        first = low.split()[-1] if low.split()[-1] in seconds else last
        if low != "up":
            assert int(low.split()[0]) == pytest.approx(least / seconds[first], rel=0.2)
        amount = 1 if high.startswith("a ") else int(high.split()[0])
        assert amount == pytest.approx(greatest / seconds[last], rel=0.2)


def test_the_readmes_times_on_atari_follow_from_the_measured_speeds():
    readme = " ".join(README.read_text().split())
    times = re.search(
        r"million steps take (\d+) to (\d+) hours \(PPO\) or (\d+) to (\d+) \(DQN", readme
    )
    speeds = {"ppo_discrete.py": [], "dqn_atari.py": []}
    for script, _, work, *_, here, _, _ in table_of_speeds():
        if script in speeds and "CartPole" not in work:
            speeds[script].append(float(here.replace(",", "")))
    hours = [1e7 / f(x) / 3600 for x in speeds.values() for f in (max, min)]
    assert [float(x) for x in times.groups()] == pytest.approx(hours, rel=0.1)


def test_the_readmes_other_figures_are_those_of_the_committed_files():
    readme = " ".join((README.read_text() + DETAILS.read_text()).split())
    for name, words in (
        ("tutorial_50k", "After 50,000 steps, seeds 1 to 10:"),
        ("tutorial_50k_bf16", "with `--bf16`"),
        ("tutorial_150k", "After 150,000, seeds 1 to 3:"),
    ):
        (found,) = results.read_folder(results.FOLDER / name).values()
        evaluated = listed(f"{result.config['evaluation']['return']:,.0f}" for result in found)
        assert f"{words} {evaluated}" in readme
    (found,) = results.read_folder(results.FOLDER / "humanoid_v4").values()
    humanoid = np.mean([result.last().mean() for result in found])
    assert len(found) == 3 and f"Humanoid-v4 at {humanoid:.0f} (three seeds" in readme
    (found,) = results.read_folder(results.FOLDER / "humanoid_v4_cleanrl").values()
    a, b, c = means = [result.last().mean() for result in found]
    said = f"returns {a:.0f}, {b:.0f} and {c:.0f} on Humanoid-v4, {np.mean(means):.0f} in the mean"
    assert f"{said} (seeds 1 to 3," in readme
    ours, theirs = (
        found[0].last().mean()
        for name in ("ant_v4", "ant_v4_cleanrl")
        for found in results.read_folder(results.FOLDER / name).values()
    )
    said = f"{ours:,.0f}, and CleanRL's own, with these packages, {theirs:,.0f} (seed 1, `"
    assert said in readme
    with_bf16, without = (
        [result.last().mean() for result in results.read_folder(path)["HalfCheetah-v5"]]
        for path in (results.FOLDER / "sac_halfcheetah_bf16", results.FOLDER / "sac_continuous")
    )
    assert min(without) < with_bf16[0] < max(without) and len(without) == 3
    assert "SAC's one seed with it lies among the three without:" in readme
    pong = results.read_folder(results.FOLDER / "dqn_pong_2m")["ALE/Pong-v5"]
    late = [f"{x.returns[x.steps > 1_750_000].mean():.1f}" for x in pong]
    begin = [f"{x.steps[-100] / 1e6:.1f}M" for x in pong]
    evaluated = [f"{x.config['evaluation']['return']:.1f}" for x in pong]
    late, begin, evaluated = map(listed, (late, begin, evaluated))
    said = f"1.75M and 2M steps their games return {late} on average (the table's last 100 go back"
    assert f"{said} to {begin}), and ten evaluation games of their last policies {evaluated}." in (
        readme
    )
    words = (
        "first of these three runs return {} on average",
        "and 1M those of the last run return {}",
    )
    for name, after, said in zip(("2m", "1m"), (1_750_000, 750_000), words, strict=True):
        folder = results.FOLDER / f"dqn_breakout_{name}" / "ALE-Breakout-v5"
        game = results.read_csv(folder / "1.csv")
        assert said.format(f"{game.returns[game.steps > after].mean():.1f}") in readme
    eight, one = (
        results.read_csv(results.FOLDER / name / "ALE-Breakout-v5" / "1.csv")
        for name in ("dqn_breakout_2m", "dqn_breakout_2m_one")
    )

    def between(result, first, last):
        which = (result.steps > first) & (result.steps <= last)
        return f"{result.returns[which].mean():.1f}"

    early = [between(x, 900_000, 1_000_000) for x in (one, eight)]
    assert "games return {} on average with one game, {} with eight.".format(*early) in readme
    late = [between(x, 1_900_000, 2_000_000) for x in (one, eight)]
    said = f"falls to {between(one, 1_500_000, 1_600_000)} between 1.5M and 1.6M, and rises again"
    assert f"{said} to {late[0]} between 1.9M and 2M, where the other has {late[1]}." in readme
    evaluated = [f"{x.config['evaluation']['return']:.0f}" for x in (eight, one)]
    said = "games of the first run's last policy return {}, of the second's {}."
    assert said.format(*evaluated) in readme
    with results.PUBLISHED.open() as file:
        known = [x for x in csv.DictReader(file) if x["source"].startswith("Dopamine")]
    pong, breakout = "PongNoFrameskip-v0", "BreakoutNoFrameskip-v0"
    assert [row["env_id"] for row in known] == [pong, breakout, breakout]
    for row in known:
        seeds = [float(x) for x in row["what"].split(": ")[1].split(" (")[0].split()]
        assert len(seeds) == 5
        assert np.mean(seeds) == pytest.approx(float(row["mean"]), abs=0.01)
        assert np.std(seeds) == pytest.approx(float(row["std"]), abs=0.01)
        deviation = f"{np.mean(seeds):.1f} ± {np.std(seeds):.1f}"
        if row["env_id"] == breakout:
            later = row["steps"] == "2000000"
            words = "Dopamine's DQN, as above, {} (`breakout" if later else "and Dopamine's {}. But"
            assert words.format(deviation) in readme
        else:
            assert f"has there {deviation} (`baselines" in readme
            assert f"five seeds, from {min(seeds):.1f} to {max(seeds):.1f})" in readme
    found = results.read_folder(results.FOLDER / "ppo_discrete")["LunarLander-v3"]
    evaluated = listed(f"{result.config['evaluation']['return']:.0f}" for result in found)
    assert f"over ten episodes each, ours return {evaluated};" in readme
    hover = [np.mean(result.lengths[-100:] == 1000) > 0.5 for result in found]
    assert hover == [False, True, False, True, True] and "seeds 2, 4 and 5 hover" in readme
    words = re.search(r"ppo_discrete.py (--env-id LunarLander[^`]*)", readme)[1].replace("\\ ", "")
    args = tyro.cli(ppo_discrete.Args, args=words.split())
    run_ = {name: value for name, value in found[0].config["args"].items() if name != "run_dir"}
    assert {name: json.loads(json.dumps(getattr(args, name))) for name in run_} == run_ | {
        "num_threads": 0
    }
    solved, evaluated, later, least = [], [], [], []
    for seed in range(1, 6):
        run_ = results.read_csv(results.FOLDER / "ppo_discrete" / "CartPole-v1" / f"{seed}.csv")
        recent = np.convolve(run_.returns, np.ones(100) / 100, "valid")
        solved.append(run_.steps[np.argmax(recent >= 475) + 99])
        path = results.FOLDER / "cartpole_evaluated" / "CartPole-v1" / f"{seed}.json"
        evaluations = json.loads(path.read_text())["evaluations"]
        evaluated.append(next(f"{value:.0f}" for step, value in evaluations if step >= 150_000))
        later.append({round(value) for step, value in evaluations if step >= 250_000})
        least.append(min(value for _, value in evaluations))
    assert f"after {round(min(solved), -3):,.0f} to {round(max(solved), -3):,.0f} steps" in readme
    assert f"return {listed(evaluated)}" in readme
    assert later == [{500}] * 5 and f"between {min(least):.0f} and 500" in readme
    (better,) = results.read_folder(results.FOLDER / "dqn_pong_2m_all")["ALE/Pong-v5"]
    said = "games of the last policy return {:.1f} on average (one seed)"
    assert said.format(better.config["evaluation"]["return"]) in readme
    reached = np.convolve(better.returns, np.full(100, 0.01), "valid") >= 15
    first = better.steps[99 + reached.argmax()]
    assert f"the last 100 games first reach 15 after {first / 1e6:.2f}M steps" in readme
    measured = json.loads((results.FOLDER / "memory_dqn_atari.json").read_text())
    *_, full, later = measured["mib"].values()
    assert f"{full:,} MiB of memory, and {later:,} after" in readme
    assert f"saving it took {measured['save_seconds']:.0f} s" in readme
    measured = json.loads((results.FOLDER / "memory_sac_continuous.json").read_text())
    (mib,) = set(measured["mib"].values())  # from its first tenth to a tenth more than fills it
    assert f"takes {mib} MiB throughout, and saving it {measured['save_seconds']:.1f} s" in readme
    assert measured["save_seconds"] < 3


def test_the_readmes_speeds_are_those_of_the_committed_files():
    told, measured = [], []
    for script, peer, work, machine, *columns in table_of_speeds():
        count = re.search(r"(\d+) (environment|game)", work)
        told.append((script, peer, int(count[1]) if count else 1, machine, *columns))
    for path in results.FOLDER.glob("speed_*.json"):
        content = json.loads(path.read_text())
        (found,) = content["measurements"]
        ratios = found["ratios"]
        series = [x["steps_per_second"] for x in found.values() if isinstance(x, dict)]
        assert ratios == pytest.approx([a / b for a, b in zip(*series, strict=True)])
        rates = [np.median(x) for x in series]
        machine = re.search(r"(older_|slower_)?(amx|amd)$", path.stem)
        machine = (machine[1] or "").replace("_", " ") + machine[2].upper()
        peers = "TorchRL", "SBX", "CleanRL", "Stable-Baselines3"
        peer = next(x for x in peers if x in found)
        row = f"{content['script']}.py", peer, found["num_envs"]
        row += (machine + ", `--bf16" * ("--bf16" in found["command"]),)
        row += (str(content["num_threads"]), *(f"{rate:,.0f}" for rate in rates))
        row += (f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",)
        measured.append(row)
    assert sorted(told) == sorted(measured)


def test_the_readmes_summary_of_speeds_is_that_of_its_table():
    summary, ratios = README.read_text().split("## Speed\n")[1].split("| script |")[1], {}
    for script, peer, work, *_, ratio in table_of_speeds():
        game = next((f", {x}" for x in ("CartPole-v1", "ALE/Breakout-v5") if x in work), "")
        name = f"`{script}`{game}" if script == "ppo_discrete.py" else f"`{script}`"
        ratios.setdefault((name, peer), []).append(float(ratio.split()[0]))
    told = {}
    for line in summary.split("\n\n")[0].splitlines()[2:]:
        name, *cells = (x.strip() for x in line.strip("|").split("|"))
        for peer, cell in zip(("Stable-Baselines3", "CleanRL", "others"), cells, strict=True):
            said, _, ends = cell.rpartition(": ")
            peer = re.match(r"\w+", said)[0] if said else peer
            if cell != "-":
                told[name, peer] = [float(x) for x in ends.split(" to ")]
    assert told == {key: sorted({min(x), max(x)}) for key, x in ratios.items()}


def test_the_readmes_start_up_is_that_of_the_committed_files():
    paths = [*results.FOLDER.glob("speed_*.json"), *results.FOLDER.glob("growth_*.json")]
    contents = [json.loads(path.read_text()) for path in paths]
    startups = [
        seconds
        for content in contents
        for found in content["measurements"]
        for seconds in found[f"{content['script']}.py"]["startup_seconds"]
    ]
    said = re.search(r"Start-up took from (\d+) s .* to (\d+) s", README.read_text())
    assert [int(x) for x in said.groups()] == [round(min(startups)), round(max(startups))]


def test_the_readmes_growth_with_environments_is_that_of_the_committed_file():
    content = json.loads((results.FOLDER / "growth_ppo_continuous_slower_amd.json").read_text())
    readme = DETAILS.read_text()
    assert "\n\n" + "\n".join(speed.rows(content)) + "\n\n" in readme
    assert f"`{content['command'].removesuffix(' --repeats 3')}`" in readme  # 3 by default
    for found in content["measurements"]:
        series = [x["steps_per_second"] for x in found.values() if isinstance(x, dict)]
        assert found["ratios"] == pytest.approx([a / b for a, b in zip(*series, strict=True)])
        flags = found["command"].split()
        samples = found["num_envs"] * int(flags[flags.index("--num-steps") + 1])
        assert samples == 2048  # the update is the same


def test_the_readmes_pictures_are_drawn_from_the_committed_files():
    image = pytest.importorskip("PIL.Image")
    pictures = set(results.FOLDER.glob("*.png"))
    for readme in (README, DETAILS):
        shown = re.findall(r"!\[.*\]\((.*)\)", readme.read_text())
        assert shown and {readme.parent / path for path in shown} <= pictures
    for path in pictures:
        suite = re.sub(r"(_time|_aggregate)?\.png$", "", path.name)
        drawn_from = image.open(path).text.get("Description")
        assert drawn_from == plots.digest(results.read_folder(results.FOLDER / suite)), path


@pytest.mark.parametrize("readme", (README, DETAILS), ids=("project", "benchmarks"))
def test_the_readmes_links_lead_somewhere(readme):
    links = re.findall(r"\]\(([^()\s]+)\)", " ".join(readme.read_text().split()))
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = readme.parent / name if name else readme
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text() if anchor else "", re.M)
        slugs = [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings]
        assert not anchor or anchor in slugs, link


def test_committed_results_say_how_they_were_made():
    for path in (ROOT / "benchmarks" / "results").glob("*/*/*.csv"):
        config = json.loads(path.with_suffix(".json").read_text())
        assert config["args"]["seed"] == int(path.stem)
        assert config["args"]["env_id"].replace("/", "-") == path.parent.name
        assert len(config["commit"]) == 40 and config["versions"]["mujoco"]  # a clean checkout
        with path.open() as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(steps) and steps[-1] > 0.98 * config["args"]["total_timesteps"]
        if config["args"]["num_envs"] == 1:  # no episode is missing
            assert np.cumsum([int(row["length"]) for row in rows]).tolist() == steps


@pytest.mark.parametrize("suite", COMMITTED)
def test_no_seed_of_committed_results_is_left_out(suite):
    counts = {"ppo_continuous": 5, "ppo_discrete": 5, "sac_continuous": 3, "dqn_pong_2m": 3}
    for env_id, found in results.read_folder(results.FOLDER / suite).items():
        count = counts.get(suite, counts.get(env_id, 1))
        seeds = [result.config["args"]["seed"] for result in found]
        assert seeds == list(range(1, count + 1))


def test_every_environment_of_the_suites_has_a_random_return(monkeypatch):
    known = random_returns.read()
    env_ids = {env_id for suite in suites.SUITES.values() for _, env_id, _ in suite.runs}
    assert env_ids <= known.keys()
    monkeypatch.setattr(random_returns, "FILE", Path("random.csv"))
    with pytest.raises(SystemExit):  # what was measured before is kept
        random_returns.random(("CartPole-v1", "Nope-v0"))
    assert random_returns.read() == {"CartPole-v1": pytest.approx(known["CartPole-v1"], abs=5)}
    runs = [("x", env_id, "") for env_id in ("Nope-v0", "Pendulum-v1")]
    monkeypatch.setattr(random_returns, "SUITES", {"x": SimpleNamespace(runs=runs)})
    random_returns.random(episodes=1)  # what is not installed is left out
    assert random_returns.read().keys() == {"CartPole-v1", "Pendulum-v1"}


def test_export_writes_what_tensorboard_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py"])
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    # of long runs, too, of which TensorBoard's reader would drop some
    monkeypatch.setitem(event_accumulator.DEFAULT_SIZE_GUIDANCE, "scalars", 3)
    args = ppo.Args(
        env_id="InvertedPendulum-v5",
        total_timesteps=1024,
        num_steps=64,
        eval_episodes=1,
        num_minibatches=4,
        update_epochs=1,
        compile=False,
        run_dir="r",
        seed=7,
    )
    results.export([ppo.train(args)])
    path = tmp_path / "results/ppo_continuous/InvertedPendulum-v5/7.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    expected = scalars(tmp_path / "r")["charts/episodic_return"]
    assert [(int(row["step"]), float(row["return"])) for row in rows] == expected
    last = np.mean([x for _, x in expected[-100:]])
    assert results.read_csv(path).last().mean() == pytest.approx(last)
    times = [float(row["seconds"]) for row in rows]
    assert times == sorted(times) and times[0] >= 0
    assert results.read_run(Path("r")).seconds.tolist() == times  # as coarse
    config = json.loads(path.with_suffix(".json").read_text())
    assert config["evaluation"]["step"] == 1024 and config["wall_seconds"] >= times[-1] - 0.1
    assert results.read_folder(Path("r"))["InvertedPendulum-v5"][0].steps.tolist() == [
        step for step, _ in expected
    ]
    written = path.read_bytes()
    with monkeypatch.context() as patch:  # killed while it writes
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            results.export([Path("r")])
    assert path.read_bytes() == written
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", "--squash"])
    with pytest.raises(SystemExit):  # what is there is of another command
        results.export([ppo.train(dataclasses.replace(args, run_dir="other", squash=True))])
    assert results.read_folder(path.parent)["InvertedPendulum-v5"][0].config == config
    assert "is of another command" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py"])
    with pytest.raises(SystemExit):  # of the same, but of code that has changed, say
        results.export([ppo.train(dataclasses.replace(args, run_dir="changed", gamma=0.9))])
    assert f"{path} has other episodes" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # nor is another seed of something else put beside it
        results.export([ppo.train(dataclasses.replace(args, run_dir="unlike", seed=8, gamma=0.9))])
    assert f"{path.parent} would have runs that differ in gamma: take" in capsys.readouterr().err
    assert path.read_bytes() == written and not path.with_name("8.csv").exists()
    args = dataclasses.replace(args, run_dir="unfinished")
    monkeypatch.setattr(ppo.runs.Run, "evaluate", lambda *_: None)
    with pytest.raises(SystemExit):
        results.export([ppo.train(args)], name="unfinished")
    assert (
        f"unfinished is not finished (of {args.total_timesteps:,} steps); --resume"
        in capsys.readouterr().err
    )
    shutil.copytree("unfinished", "folder/1")
    with pytest.raises(SystemExit):
        results.export([Path("folder")])
    assert "no finished run in folder" in capsys.readouterr().err
    shutil.copytree("r", "folder/2")
    results.export([Path("folder")], name="part")
    assert "not finished, so left out: folder/1\n" in capsys.readouterr().out
    part = tmp_path / "results/part/InvertedPendulum-v5/7.csv"
    assert part.read_bytes() == path.read_bytes()
    with monkeypatch.context() as patch:
        patch.chdir("r")
        results.export([Path(".")], name="here")
    here = tmp_path / "results/here/InvertedPendulum-v5/7.csv"
    assert here.read_bytes() == path.read_bytes()
    whole = results.read_run(Path("r"))
    with monkeypatch.context() as patch:  # killed between a return and its length
        scalars_of = results.EventAccumulator.Scalars
        torn = lambda self, tag: scalars_of(self, tag)[: -1 if "length" in tag else None]  # noqa: E731
        patch.setattr(results.EventAccumulator, "Scalars", torn)
        assert [len(x) for x in results.read_run(Path("r"))[1:]] == [len(whole.steps) - 1] * 4
    config = json.loads(Path("r/config.json").read_text())
    config["args"]["total_timesteps"] = 512  # as if it had been extended with --resume
    Path("r/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        results.export([Path("r")])
    assert "extended beyond the 512 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, evaluated, logged, finished",
    [
        ({}, 1000, 1000, True),
        ({}, 1000, 990, True),  # killed once it had saved, before the last was on disk
        ({}, 500, 500, False),  # stopped after an evaluation
        ({"num_steps": 128, "num_envs": 4}, 512, 512, True),  # one rollout is all that fits
        ({"num_steps": 128, "num_envs": 3}, 384, 384, False),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_evaluated(
    args, evaluated, logged, finished, capsys
):
    args = {"env_id": "A-v0", "seed": 1, "total_timesteps": 1000, "num_envs": 1} | args
    with SummaryWriter("r") as writer:
        writer.add_scalar("charts/episodic_return", 7.0, 100)
        writer.add_scalar("charts/episodic_length", 9.0, 100)
        writer.add_scalar("charts/SPS", 1.0, logged)
        writer.add_scalar("eval/episodic_return", 9.0, 200)  # the last counts, not the best
        writer.add_scalar("eval/episodic_return", 8.0, evaluated)
    config = {"script": "sac_continuous", "command": "python x", "args": args}
    Path("r/config.json").write_text(json.dumps(config))
    result = results.read_run(Path("r"))
    last = {"step": evaluated, "return": 8.0}
    assert result.config.get("evaluation") == (last if finished else None)
    every = [[200, 9.0], [evaluated, 8.0]]
    assert result.config.get("evaluations") == (every if finished else None)
    assert [x.tolist() for x in (result.steps, result.returns, result.lengths)] == [[100], [7], [9]]
    shutil.copytree("r", "runs/a")  # a folder that was set aside is nobody's run
    shutil.copytree("r", "runs/a" + results.UNUSABLE)
    assert len(results.read_folder(Path("runs"))["A-v0"]) == 1
    shutil.copytree("r", "runs/b")
    with pytest.raises(SystemExit):
        results.export([Path("runs/a"), Path("runs/b")], name="mine")
    told = "as another run" if finished else "runs/a is not finished"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, env_id, steps, label",
    [
        ("ppo_continuous", "Hopper-v5", 1_000_000, "CleanRL (v4)"),
        ("ppo_continuous", "Hopper-v4", 1_000_000, "CleanRL"),
        ("ppo_continuous", "A-v4", 1_000_000, None),
        ("ppo_discrete", "ALE/Pong-v5", 10_000_000, "CleanRL"),
    ],
)
def test_what_is_published_says_of_which_version_it_is(script, env_id, steps, label):
    known = results.published(
        {"script": script, "args": {"env_id": env_id, "total_timesteps": steps}}
    )
    assert (known and known.label) == label
    args = {"env_id": env_id, "total_timesteps": steps, "sticky_actions": 0.25}
    assert not results.published({"script": script, "args": args})


def test_the_command_is_kept_without_what_says_only_where():
    config = {"script": "ppo_continuous", "command": "python a/ppo_continuous.py"}
    config["command"] += " --seed 7 --run-dir r --squash"
    assert results.command(config) == "python ppo_continuous.py --seed 7 --squash"
    config["command"] = "python ppo_continuous.py --run_dir=r --checkpoint-every 5 --env-id A"
    assert results.command(config) == "python ppo_continuous.py --env-id A"
    config["command"] = "python search.py --run-dir r"  # which calls `train`
    assert results.command(config) == config["command"]


def test_wall_time_does_not_run_while_a_run_is_stopped(tmp_path, monkeypatch):
    sessions = {"events.out.tfevents.1": (100, 110), "events.out.tfevents.2": (1000, 1003)}
    quiet = results.SUSPENDED
    sessions |= {"events.out.tfevents.3": (2000, 2001, 2001 + quiet, 9000, 9004)}
    for name in sessions:
        (tmp_path / name).touch()

    def load(path):
        return SimpleNamespace(
            Load=lambda: [SimpleNamespace(wall_time=x) for x in sessions[Path(path).name]]
        )

    monkeypatch.setattr(results, "EventFileLoader", load)
    times = [101, 109, 1001, 1003, 2001, 2001 + quiet, 9000, 9004]
    seconds = results._seconds(tmp_path, times, quiet)
    assert seconds.tolist() == [1, 9, 11, 13, 14, 14 + quiet, 14 + quiet, 18 + quiet]


def test_wall_time_runs_between_logs_that_are_far_apart(monkeypatch):
    """As of a robot, which takes an hour for a rollout; a night's pause is one all the same."""
    hours = [0, 1, 2, 3, 4, 5, 13, 14]
    writer, tags = SummaryWriter("r"), ("charts/episodic_return", "charts/episodic_length")
    for hour in hours:
        for tag in (*tags, "charts/SPS"):
            writer.add_scalar(tag, 1.0, hour, walltime=1e9 + 3600 * hour)
    writer.close()
    args = {"env_id": "A", "seed": 1, "total_timesteps": 14, "num_envs": 1}
    config = {"script": "ppo_continuous", "command": "python ppo_continuous.py", "args": args}
    Path("r/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        results,
        "EventFileLoader",
        lambda path: SimpleNamespace(
            Load=lambda: [SimpleNamespace(wall_time=1e9 + 3600 * hour) for hour in hours]
        ),
    )
    assert results.read_run(Path("r")).seconds.tolist() == [
        3600 * hour for hour in (0, 1, 2, 3, 4, 5, 5, 6)
    ]


@pytest.mark.parametrize("seeds, share", [(3, 0.75), (5, 0.84), (50, 0.94)])
def test_interval_covers_the_mean_as_often_as_the_readme_says(seeds, share):
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 1.0, (400, seeds))
    hits = sum(low <= 3.0 <= high for low, high in map(results.interval, samples))
    assert abs(hits / 400 - share) < 0.04
    assert seeds == 50 or f"{100 * share:.0f}%" in README.read_text()


def make_result(env_id="Hopper-v5", seed=1, level=2000.0, total=1_000_000, episodes=300):
    """A run that climbs from 0 to `level`, and stays there for its last 100 episodes."""
    rng = np.random.default_rng(seed)
    args = {"env_id": env_id, "seed": seed, "total_timesteps": total, "num_envs": 1}
    config = {
        "script": "ppo_continuous",
        "args": args,
        "command": f"python ppo_continuous.py --env-id {env_id} --seed {seed}",
        "evaluation": {"step": total, "return": level},
    }
    steps = np.linspace(0, total, episodes + 1)[1:].round(-2)
    returns = np.minimum(level, np.linspace(0, 1.5 * level, episodes)) + rng.normal(0, 20, episodes)
    lengths = np.diff(steps, prepend=0)
    return results.Result(config, steps, steps / 1000, returns.round(2), lengths)


def write_result(result, folder):
    args = result.config["args"]
    results.write(result, folder / args["env_id"] / f"{args['seed']}.csv")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder of results with a suite of two environments and three seeds."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    for env_id, level in (("HalfCheetah-v5", 1442.64), ("Hopper-v5", 2000.0)):
        for seed in (1, 2, 3):
            folder = results.FOLDER / "ppo_continuous"
            write_result(make_result(env_id, seed, level + 100 * (seed - 2)), folder)
    return results.FOLDER / "ppo_continuous"


def test_a_result_is_read_as_it_was_written(suite):
    for result in results.read_folder(suite)["Hopper-v5"]:
        level = 2000.0 + 100 * (result.config["args"]["seed"] - 2)
        expected = make_result("Hopper-v5", result.config["args"]["seed"], level)
        assert result.config == expected.config
        assert all(np.array_equal(a, b) for a, b in zip(result[1:], expected[1:]))


def test_the_table_has_published_figures_and_commands(suite, capsys):
    results.table("ppo_continuous")
    out = capsys.readouterr().out
    assert out.count("\n| H") == 2 and "| 1,443 ± 46 |" in out and "| 2,383 ± 272 |" in out
    assert "python -m benchmarks run ppo_continuous --env-ids Hopper-v5 --seeds 3\n" in out
    assert f"benchmarks compare {os.path.relpath(suite)} runs/benchmarks/ppo_continuous\n" in out
    write_result(make_result("Pusher-v5", 1, -40.0), results.FOLDER / "mine")
    write_result(make_result("My-v0", 1, 3.0, total=500), results.FOLDER / "mine")
    results.table("mine")
    out = capsys.readouterr().out
    assert "| -40.4 ± 7.2 |" in out and re.search(r"My-v0 \| 500 .* - \|\n", out)
    for env_id in ("Pusher-v5", "My-v0"):
        assert f"python ppo_continuous.py --env-id {env_id} --seed 1\n" in out
    flagged = make_result("Hopper-v5", 3)  # which the suite's command would not make
    flagged.config["command"] += " --gamma 0.9"
    write_result(flagged, suite)
    results.table("ppo_continuous")
    out = capsys.readouterr().out
    assert "run ppo_continuous --env-ids HalfCheetah-v5 --seeds 3\n" in out
    assert "--env-id Hopper-v5 --seed 3 --gamma 0.9\n" in out and "--env-ids Hopper" not in out
    (results.FOLDER / "empty").mkdir()
    with pytest.raises(SystemExit):
        results.table("empty")


def assert_picture(path):
    image = pytest.importorskip("PIL.Image").open(path)
    assert image.size[0] > 400 and image.size[1] > 300 and 5_000 < path.stat().st_size < 2_000_000
    assert len(np.unique(np.asarray(image))) > 50


def test_plot_draws_curves_and_aggregates(suite, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rliable")
    plots.plot()
    for name in ("ppo_continuous", "ppo_continuous_time", "ppo_continuous_aggregate"):
        assert_picture(suite.parent / f"{name}.png")
    random = random_returns.read()
    scores, _ = plots.normalised(results.read_folder(suite))
    assert scores["HalfCheetah-v5"][1] == pytest.approx(1.0, abs=0.01)
    unfinished = make_result("Hopper-v5")
    del unfinished.config["evaluation"]
    assert plots.normalised({"Hopper-v5": [unfinished]}) == (
        {},
        ["Hopper-v5: 1 of 1 runs are not finished"],
    )
    level = (2100 - random["Hopper-v5"]) / (2382.86 - random["Hopper-v5"])
    assert scores["Hopper-v5"][2] == pytest.approx(level, abs=0.01)
    mean = np.mean(np.sort(np.concatenate(list(scores.values())))[1:-1])  # of 6, a quarter off
    out = capsys.readouterr().out  # seeds are drawn within an environment, which lie apart
    assert "3 seeds of 2 environments;" in out
    low, high = map(float, re.search(rf"mean {mean:.2f} \((.*) to (.*)\)", out).groups())
    assert low <= round(mean, 2) <= high < low + 0.15
    picture = suite.parent / "ppo_continuous_aggregate.png"
    drawn = picture.read_bytes()
    picture.unlink()
    plots.plot()
    assert picture.read_bytes() == drawn
    capsys.readouterr()
    write_result(make_result("Hopper-v5", 3, 2101.0), suite)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw_aggregate", lambda *_: None)
        plots.plot()
    assert capsys.readouterr().out.splitlines() == [
        f"{suite}.png",
        f"{suite}_time.png",
    ]
    write_result(make_result("Hopper-v5", 4, 2101.0), suite)
    plots.plot()
    assert "as many seeds are needed everywhere" in capsys.readouterr().out
    assert not picture.exists()  # of older results


def test_curves_are_the_mean_over_seeds_against_steps_or_minutes(suite, monkeypatch):
    pytest.importorskip("matplotlib")
    by_env, figures = results.read_folder(suite), []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: figures.append(figure))
    plots.draw_curves(by_env, Path())
    plots.draw_times(by_env, Path())
    expected = np.mean([plots.curve(x, 1_000_000, 30)[1] for x in by_env["Hopper-v5"]], axis=0)
    for figure, unit in zip(figures, (1 / 1000, 60), strict=True):  # 1,000 steps a second
        axis = figure.axes[1]
        (line,) = (x for x in axis.lines if x.get_label().startswith("mean of 3 seeds"))
        (published,) = (x for x in axis.lines if x.get_label().startswith("CleanRL"))
        assert published.get_ydata() == pytest.approx([2382.86] * 2)
        np.testing.assert_allclose(line.get_ydata(), expected)
        assert line.get_xdata()[-1] == pytest.approx(1000 / unit, rel=0.01)
    assert axis.get_xlabel() == "wall time in minutes"


def test_each_seed_has_its_own_clock_and_the_mean_ends_with_the_fastest(monkeypatch):
    pytest.importorskip("matplotlib")
    found, figures = [make_result("Hopper-v5", seed, total=900_000) for seed in (1, 2)], []
    for result, steps_per_second in zip(found, (5000, 2500)):
        result.returns[:] = result.steps
        result.seconds[:] = result.steps / steps_per_second
    monkeypatch.setattr(plots, "_save", lambda figure, *_: figures.append(figure))
    plots.draw_curves({"Hopper-v5": found}, Path(), unit=1)
    fast, slow, mean = figures[0].axes[0].lines[:3]
    assert [x.get_xdata()[-1] for x in (fast, slow, mean)] == pytest.approx([180, 360, 180])
    # of ten episodes of 3,000 steps, the mean is 13,500 steps before the window's end
    assert mean.get_ydata()[-1] == pytest.approx((886_500 + 436_500) / 2)
    times, returns = mean.get_data()  # none before the slow seed's first window has ended
    early = times < slow.get_xdata()[0] - 1e-9
    assert early.any() and np.isnan(returns[early]).all() and not np.isnan(returns[~early]).any()


def test_a_seed_that_is_not_finished_is_drawn_but_not_in_the_mean(monkeypatch):
    pytest.importorskip("matplotlib")
    found, figures = [make_result(seed=seed) for seed in (1, 2, 3)], []
    young = results.Result(found[2].config, *(column[:3] for column in found[2][1:]))
    del young.config["evaluation"]
    monkeypatch.setattr(plots, "_save", lambda figure, *_: figures.append(figure))
    for unit in (0, 60):
        plots.draw_curves({"Hopper-v5": [*found[:2], young]}, Path(), unit=unit)
        plots.draw_curves({"Hopper-v5": found[:2]}, Path(), unit=unit)
        lines = (figure.axes[0].lines for figure in figures[-2:])
        (*seeds, mean, _published), (*others, expected, _published) = lines
        assert len(seeds) - len(others) == 1
        np.testing.assert_array_equal(mean.get_xydata(), expected.get_xydata())
        assert mean.get_label() == "mean and range of 2 seeds (1 not finished)"
    for result in found:
        result.config.pop("evaluation", None)
    plots.draw_curves({"Hopper-v5": found}, Path())
    *_, mean, _published = figures[-1].axes[0].lines
    assert mean.get_label() == "mean of 3 seeds, 95% bootstrap interval (3 not finished)"


def test_plot_does_without_rliable_and_without_published_values(suite, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "rliable", None)
    plots.plot(("ppo_continuous",))
    assert capsys.readouterr().out.count("pip install") == 1
    assert_picture(suite.parent / "ppo_continuous.png")
    assert not (suite.parent / "ppo_continuous_aggregate.png").exists()
    write_result(make_result("My-v0", 1, 3.0, total=500, episodes=3), Path("runs/benchmarks/mine"))
    write_result(make_result("My-v1", 1, 3.0, episodes=0), Path("runs/benchmarks/mine"))
    plots.plot(("mine",))
    assert_picture(Path("runs/benchmarks/mine.png"))
    for seed, gamma in ((1, 0.9), (2, 0.99)):
        result = make_result("My-v0", seed)
        result.config["args"]["gamma"] = gamma
        write_result(result, Path("runs/benchmarks/mixed"))
    capsys.readouterr()
    plots.plot()  # all, but for what cannot be drawn
    said = capsys.readouterr()
    assert "mine.png" in said.out
    assert "error: runs/benchmarks/mixed has runs of My-v0 that differ" in said.err


def test_a_curve_has_the_mean_of_each_window():
    config = {"args": {"total_timesteps": 100}}
    steps, returns = np.array([15.0, 20, 21, 80]), np.array([1.0, 3, 10, 4])
    result = results.Result(config, steps, np.array([1.0, 2, 2, 8]), returns, steps)
    ends, means = plots.curve(result, 100, windows=5)
    assert ends.tolist() == [20, 40, 60, 80, 100]
    assert means.tolist()[:4] == [2, 10, 7, 4] and np.isnan(means[4])
    assert plots.seconds_at(np.array([15, 21, 50.5, 80]), result).tolist() == [1, 2, 5, 8]


def test_compare_says_whether_a_change_helped(suite, capsys):
    pytest.importorskip("matplotlib")
    for seed, level in ((1, 1300.0), (2, 1400.0), (3, 1500.0)):
        write_result(make_result("Hopper-v5", seed, level), Path("b"))
    plots.compare(suite, Path("b"))
    out = capsys.readouterr().out
    assert "Hopper-v5: the same arguments\n" in out and "side only: HalfCheetah-v5\n" in out
    sides = [[make_result("Hopper-v5", seed, level) for seed in (1, 2)] for level in (9.0, 99.0)]
    for result in sum(sides, []):  # PPO ends with a rollout
        result.config["args"]["total_timesteps"] = 1_200_000
    assert "(the last 33%)" in plots.judge(*sides)[0][1]
    for result in sum(sides, []):  # as CleanRL's own are
        result.config["evaluation"] = None
    assert "(the last 44%)" in plots.judge(*sides)[0][1]
    low, high = map(float, re.search(r"97.5% interval (\S+\d) to (\S+\d)", out).groups())
    assert low < -600 < high < 0 and "in the end (the last 33%): return 1,998" in out
    worse = "b is worse in the end on Hopper-v5; worse over the run on Hopper-v5, than"
    assert f"{worse} {suite}.\n" in out
    assert_picture(Path("runs/compare.png"))
    plots.compare(Path("ppo_continuous"), Path("b"))  # by its name, and told where that was found
    assert f"over the run on Hopper-v5, than {suite}.\n" in capsys.readouterr().out
    plots.compare(suite / "Hopper-v5" / "2.csv", suite)
    assert "repeats" in capsys.readouterr().out
    write_result(make_result("Hopper-v5", 4, 2001.0), Path("c"))
    plots.compare(suite, Path("c"), Path("c.svg"))
    out = capsys.readouterr().out
    assert f"c cannot be told from {suite}" in out and Path("c.svg").exists()
    write_result(make_result("Hopper-v5", 4, 1000.0), Path("d"))
    plots.compare(suite, Path("d"))
    assert "d is worse in the end on Hopper-v5" in capsys.readouterr().out
    plots.compare(Path("c"), Path("d"))
    out = capsys.readouterr().out
    assert "how far seeds lie apart that says nothing" in out and "d cannot be told from c" in out
    for seed in (1, 2):
        result = make_result("Hopper-v5", seed)
        result.returns[:] = 500.0  # as CartPole's
        write_result(result, Path("flat"))
    plots.compare(Path("flat"), Path("d"))
    assert "d cannot be told from flat" in capsys.readouterr().out
    plots.compare(Path("flat"), Path("flat"))  # any two would agree, as on MountainCar
    assert "flat cannot be told from flat" in capsys.readouterr().out
    for env_id, level in (("HalfCheetah-v5", 1442.64), ("Hopper-v5", 1000.0)):
        for seed in (4, 5, 6):
            write_result(make_result(env_id, seed, level + 100 * (seed - 5)), Path("e"))
    plots.compare(suite, Path("e"))
    out = capsys.readouterr().out
    assert out.count("98.75% interval") == 4 and "e is worse in the end on Hopper-v5; " in out
    judged = {"better in the end": ["X"], "the same": ["Y"]}
    assert plots.verdict("a", "b", judged) == "b is better in the end on X, than a."
    judged = {"not compared": ["X"], "the same": ["Y"]}
    assert plots.verdict("a", "b", judged) == "b repeats a, in what was compared."
    with pytest.raises(SystemExit):
        plots.compare(suite / "HalfCheetah-v5", Path("b"))
    Path("file").touch()
    with pytest.raises(SystemExit):
        plots.compare(suite, Path("e"), Path("file/x.png"))
    said = capsys.readouterr()
    assert "is worse in the end on" in said.out and "file/x.png cannot be written" in said.err


def test_compare_tells_a_faster_learner_where_both_reach_the_most(capsys):
    """As CartPole's 500; and what is not compared is not called alike."""
    for seed in (1, 2, 3):
        slow = make_result("CartPole-v1", seed, 500.0, total=500_000)
        slow.returns[:] = np.minimum(500, 10 * np.arange(300) / 4 + seed)
        write_result(slow, Path("slow"))
        slow.returns[:] = np.minimum(500, 10 * np.arange(300) + seed)
        slow.config["args"]["learning_rate"] = 0.1
        write_result(slow, Path("fast"))
    for side, rate in (("slow", 0.001), ("fast", 0.1)):
        for path in Path(side).rglob("*.json"):
            config = json.loads(path.read_text())
            config["args"]["learning_rate"] = rate
            path.write_text(json.dumps(config))
    grows = make_result()._replace(returns=np.array([1.0, 5.0]), lengths=np.array([10.0, 30.0]))
    assert plots.MEASURES["over the run"](grows) == 4  # of steps, not of episodes
    assert plots.unlike([make_result()], [make_result(seed=2)]) == "the same arguments"
    sides = [make_result(), make_result()]
    for result, rollout in zip(sides, ((8, 4), (8, 2))):
        result.config["args"] |= dict(zip(("num_steps", "num_minibatches"), rollout))
    sides[1].config["args"]["new_flag"] = 1
    sides[1].config["args"] |= {"bf16": False, "target": None}  # off where the other has none
    assert plots.unlike(*([x] for x in sides)) == "minibatch 2 and 4; new_flag - and 1"
    del sides[1].config["args"]["num_minibatches"]  # as SAC's
    assert plots.unlike(*([x] for x in sides)).startswith("minibatch 2 and -; ")
    sides[1].config["args"]["num_minibatches"] = 2
    for result, commit, version in zip(sides, "ab", ("3.3.0", "3.15.0")):
        result.config.update(commit=commit * 40 + "-dirty", versions={"mujoco": version})
        result.config["args"] = sides[0].config["args"]
    told = "the same arguments (commit aaaaaaa-dirty and bbbbbbb-dirty, mujoco 3.3.0 and 3.15.0)"
    assert plots.unlike(*([x] for x in sides)) == told
    plots.compare(Path("slow"), Path("fast"))
    out = capsys.readouterr().out
    assert "CartPole-v1: learning_rate 0.001 and 0.1\n" in out
    assert "return 500.0 and 500.0" in out and "difference +0.0" in out
    assert "fast is better over the run on CartPole-v1, than slow.\n" in out
    # of equal episodes it is the area between the curves: (60 - 51) and (60 - 50) / 2 of 300
    means = [np.mean(np.minimum(500, rate * np.arange(300) + 2)) for rate in (2.5, 10)]
    assert f"over the run: return {means[0]:,.1f} and {means[1]:,.1f}" in out
    write_result(make_result("CartPole-v1", 1, 500.0, total=100_000), Path("short"))
    plots.compare(Path("slow"), Path("short"))
    assert "Nothing of short was compared with slow.\n" in capsys.readouterr().out


def test_games_have_one_name_in_results(capsys):
    pytest.importorskip("matplotlib")
    for i, name in enumerate(("PongNoFrameskip-v4", "ALE/Pong-v5", "PongDeterministic-v4")):
        result = make_result(name, seed=i, level=10.0 + i, total=10_000_000)
        result.config["script"] = "ppo_discrete"
        write_result(result, Path("either" if i < 2 else "other"))
    assert [len(x) for x in results.read_folder(Path("either")).values()] == [2]
    plots.compare(Path("either"), Path("other"), Path("pong"))
    assert "ALE/Pong-v5: the same arguments\n" in capsys.readouterr().out
    assert_picture(Path("pong.png"))  # Matplotlib's ending
    scores, missing = plots.normalised(results.read_folder(Path("other")))
    score = (result.last().mean() + 20.3) / (20.36 + 20.3)
    assert scores["ALE/Pong-v5"] == pytest.approx(score, abs=0.01)
    assert not missing and results.published(result.config).label == "CleanRL"


def test_runs_that_are_unlike_are_not_compared(suite, capsys):
    half = make_result("Hopper-v5", 2)
    del half.config["evaluation"]
    whole = make_result("Hopper-v5")
    unfinished = [("not compared", "1 of 2 runs are not finished")]
    changed = make_result("Hopper-v5"), make_result("Hopper-v5")
    for result, code in zip(changed, ("0a1b2c", "3d4e5f")):  # nobody knows what is in "-dirty"
        result.config.update(commit="1234567890-dirty", code=code)
    told = plots.unlike(*([result] for result in changed))
    assert told == "the same arguments (commit 1234567-dirty 0a1b2c and 1234567-dirty 3d4e5f)"
    for result in changed:  # nor what was run where there is no git
        result.config.update(commit=None, versions={})
    changed[1].config["versions"] = {"ale-py": "0.12"}
    told = plots.unlike(*([result] for result in changed))
    assert told == "the same arguments (commit None 0a1b2c and None 3d4e5f, ale-py None and 0.12)"
    assert plots.judge([whole], [half]) == unfinished
    empty = [("not compared", "1 of 2 runs had no episode")]
    assert plots.judge([make_result("Hopper-v5", episodes=0)], [whole]) == empty
    ((word, why),) = plots.judge([whole], [make_result("Hopper-v5", total=50_000)])
    assert word == "not compared" and "1,000,000 steps cannot be compared with 50,000" in why
    other = make_result("Hopper-v5", 4)
    other.config["script"] = "sac_continuous"
    odd = {"script": other, "total_timesteps": make_result("Hopper-v5", 4, total=50_000)}
    for name, result in odd.items():
        write_result(result, suite)
        with pytest.raises(SystemExit):
            results.read_folder(suite)
        assert f"differ in more than their seed: {name}\n" in capsys.readouterr().err
    write_result(make_result("Hopper-v5", 4), suite)
    assert len(results.read_folder(suite)["Hopper-v5"]) == 4
    (suite / "again").mkdir()
    for suffix in (".csv", ".json"):
        shutil.copy(suite / "Hopper-v5" / f"4{suffix}", suite / "again" / f"4{suffix}")
    with pytest.raises(SystemExit):
        results.read_folder(suite)
    assert "has several runs of Hopper-v5 of one seed" in capsys.readouterr().err
    Path("foreign.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        results.read_folder(Path("foreign.csv"))
    assert "foreign.csv is not a result of these benchmarks" in capsys.readouterr().err
    Path("foreign.csv").write_text(",".join(results.COLUMNS) + "\n1,2\n")  # cut short
    with pytest.raises(SystemExit):
        results.read_folder(Path("foreign.csv"))
    assert "foreign.csv is not a result of these benchmarks" in capsys.readouterr().err
    Path("foreign.csv").write_text(",".join(results.COLUMNS) + "\n1,2,3,4\n")
    for content in ("{", "[]", "{}", '{"args": {}}'):
        Path("foreign.json").write_text(content)
        with pytest.raises(SystemExit):
            results.read_folder(Path("foreign.csv"))
        assert "foreign.json is not of a run of these scripts" in capsys.readouterr().err


def test_a_run_was_made_with_all_that_it_was_resumed_with():
    result = make_result()
    begun = plots.made_with([result])
    other = {"step": 5, "commit": "b" * 40, "versions": {"torch": "99"}, "code": "x"}
    result.config["resumed"] = [other]
    made = plots.made_with([result])
    assert "bbbbbbb" in made["commit"].split(", ") and begun["commit"] in made["commit"]
    assert "99" in made["torch"].split(", ")


def test_seeds_of_one_thing_have_the_same_flags(tmp_path, capsys):
    first, second = (make_result(seed=seed) for seed in (1, 2))
    first.config["args"] |= {"learning_rate": 0.1, "num_threads": 1}
    second.config["args"] |= {"learning_rate": 0.1, "num_threads": 2, "newer": False}
    for result in (first, second):
        write_result(result, tmp_path)
    assert len(results.read_folder(tmp_path)["Hopper-v5"]) == 2
    first.config["args"] |= {"num_steps": 64, "num_minibatches": 2, "minibatch_size": 32}
    second.config["args"] |= {"num_steps": 64, "num_minibatches": 2, "minibatch_size": None}
    first.config["args"]["eval_e"], second.config["args"]["eval_e"] = 0.01, 0.05
    for result in (first, second):  # the same, by another argument
        write_result(result, tmp_path)
    assert len(results.read_folder(tmp_path)["Hopper-v5"]) == 2
    for changed in ({"learning_rate": 0.2}, {"minibatch_size": 16}, {"newer": True}):
        third = make_result(seed=3)
        third.config["args"] = second.config["args"] | {"seed": 3} | changed
        write_result(third, tmp_path)
        with pytest.raises(SystemExit):
            results.read_folder(tmp_path)
        assert f"in more than their seed: {', '.join(changed)}\n" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [(5, 5), (3, 3), (3, 5), (1, 5), (4, 1)])
def test_the_interval_of_a_difference_covers_it(seeds):
    """As often as it says, of few seeds too, which may lie farther apart on one side."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        spread = rng.uniform(1, 3) if min(seeds) > 1 else 1.0
        a, b = (rng.normal(m, s, n).tolist() for m, s, n in zip((3, 4), (1, spread), seeds))
        low, high = plots.difference(a, b, 0.95)
        hits += low <= 1.0 <= high
    assert 0.915 < hits / 400 < 0.985
    assert plots.difference([2.0, 2.0], [2.0, 2.0], 0.95) == (0.0, 0.0)
    # by hand, with t of Student's table: 3.182 of 3 degrees; 2.776 of 4, where Welch's are 4 too
    spread = 3.182 * math.sqrt(5 / 3 * (1 + 1 / 4))
    expected = pytest.approx((2.5 - spread, 2.5 + spread), abs=2e-3)
    assert plots.difference([0.0], [1.0, 2.0, 3.0, 4.0], 0.95) == expected
    spread = 2.776 * math.sqrt(1 / 3 + 1 / 3)
    expected = pytest.approx((1 - spread, 1 + spread), abs=2e-3)
    assert plots.difference([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], 0.95) == expected
    # and of unequal spreads: (1 / 3 + 100 / 3)**2 / (1 / 18 + 10000 / 18) = 2.04 degrees
    low, high = plots.difference([1.0, 2.0, 3.0], [10.0, 20.0, 30.0], 0.95)
    assert (high - low) / 2 == pytest.approx(4.24 * math.sqrt(101 / 3), rel=0.01)
    # where one side does not vary, as CartPole's: of 2 degrees, and without a warning
    expected = pytest.approx((-1 - 4.303 / math.sqrt(3), -1 + 4.303 / math.sqrt(3)), abs=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.difference([500.0] * 3, [499.0, 500.0, 498.0], 0.95) == expected


@pytest.mark.parametrize(
    "words, why",
    [
        ("run smoke --workers -1", "--workers -1: must be at least 0"),
        ("run smoke --seeds -1", "--seeds -1"),
        ("run smoke --first-seed -1", "--first-seed -1: must be at least 0"),
        ("run smoke --threads 0", "--threads 0: must be at least 1"),
        ("run smoke --env-ids Hoper-v5", "not in smoke, which has Pendulum-v1, CartPole-v1"),
        ("run smoke --flags=--no-compile", "--flags --no-compile: smoke has runs of several"),
        ("run ppo_discrete --flags='", "--flags ': No closing quotation"),
        ("run ppo_discrete --flags=--seed=7", "--flags --seed=7: --seed is for this command"),
        ("run ppo_discrete --flags=--num_threads=2", "--num-threads is for this command"),
        ("run somke", "there are ppo_continuous"),
        ("run smoke --run-dir file/runs", "--run-dir file/runs: "),
        ("run smoke --script ppo_discrete", "smoke has runs of several scripts"),
        ("run smoke --first-seed 3", "--first-seed 3: beyond the smoke suite's last"),
        ("export nowhere", "nowhere: neither a run folder nor a folder of them"),
        ("export", "name run folders"),
        ("export file --suite smoke", "--suite smoke: name run folders or a suite"),
        ("plot file", "file is not a folder"),
        ("plot empty", "no results in empty: "),
        ("speed --repeats 0", "--repeats 0"),
        ("speed sac_continuous --num-steps 64", "--num-steps 64: goes with PPO"),
        ("speed --num-envs 0", "--num-envs 0"),
        ("speed --threads 0", "--threads 0"),
        ("speed --flags=--num_envs=8", "--flags --num_envs=8: --num-envs is for this command"),
        ("speed --flags='", "--flags ': No closing quotation"),
        ("random --episodes 0", "--episodes 0"),
        ("random --seed -1", "--seed -1: must be at least 0"),
        ("speed --peer torchrl --num-envs 8", "one environment"),
        ("speed sac_continuous --peer torchrl", "goes with ppo_continuous"),
        ("speed --peer cleanrl", "a checkout of it, go together"),
        ("speed --cleanrl c", "a checkout of it, go together"),
        ("speed --peer cleanrl --cleanrl c", "has no .venv/bin/python"),
        ("random --env-ids Nope-v0", "--env-ids Nope-v0: "),
        ("compare nowhere file", "there is no nowhere"),
        ("table nothing", "no results of nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, why, monkeypatch, capsys):
    Path("file").touch()
    Path("empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # what it does to pipes is for it alone
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks", run_name="__main__")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and why in line


def test_what_cannot_be_written_leaves_what_was_there(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    results.write(make_result(), Path("a/1.csv"))
    before = [Path(name).read_text() for name in ("a/1.csv", "a/1.json")]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        for act in (
            lambda: results.write(make_result(level=1.0), Path("a/1.csv")),
            lambda: results.write_json({}, Path("a/1.json")),
        ):
            with pytest.raises(SystemExit, match="1"):
                act()
            assert "a/1.json could not be written: [Errno 28]" in capsys.readouterr().err
    assert [Path(name).read_text() for name in ("a/1.csv", "a/1.json")] == before


def test_results_without_a_finished_episode_have_no_figures(monkeypatch, recwarn):
    monkeypatch.setattr(results, "FOLDER", Path("results"))
    for seed in (1, 2):
        result = make_result(env_id="Hopper-v5", seed=seed, episodes=0)
        results.write(result, Path(f"results/a/Hopper-v5/{seed}.csv"))
    assert results.rows("a")[-1] == "| Hopper-v5 | 1,000,000 | - | - | - | - |"
    scores, missing = plots.normalised(results.read_folder(Path("results/a")))
    assert not scores and missing == ["Hopper-v5: a run has no finished episode"]
    assert not [x for x in recwarn.list if issubclass(x.category, RuntimeWarning)]


def test_the_folder_where_one_is_may_be_drawn(monkeypatch, tmp_path):
    results.write(make_result(), Path("a/Hopper-v5/1.csv"))
    monkeypatch.chdir("a")
    plots.plot((".",))
    assert {path.name for path in tmp_path.glob("**/*.png")} == {"a.png", "a_time.png"}


def test_ctrl_c_ends_a_measurement_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "clock_script", interrupted)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "speed"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks", run_name="__main__")
    assert stopped.value.code == 130 and not capsys.readouterr().err


def test_speed_is_measured_in_the_steady_state():
    times = [(step, 10 + 5 + step / 100) for step in range(0, 5001, 500)]
    rate, startup = speed.steady(times, 10.0, {"num_steps": 500, "num_envs": 2})
    assert rate == pytest.approx(100) and startup == pytest.approx(5)
    fast = [(step, when - 9.0 * (step >= 1000)) for step, when in times]  # 1,000 steps in 1 s
    rate, startup = speed.steady(fast, 10.0, speed.OFF_POLICY)
    assert rate == pytest.approx(100) and startup == pytest.approx(6)
    # what pauses while it warms up is start-up
    paused = [(step, when + 20 * (step >= 1500)) for step, when in times]
    rate, startup = speed.steady(paused, 10.0, {"learning_starts": 1000})
    assert rate == pytest.approx(100) and startup == pytest.approx(35)
    paused = [(step, when + 20 * (step >= 2000)) for step, when in times]
    rate, startup = speed.steady(paused, 10.0, {"num_steps": 1000, "num_envs": 1})
    assert rate == pytest.approx(100) and startup == pytest.approx(25)
    with pytest.raises(SystemExit):
        speed.steady(times, 10.0, {"num_steps": 5000, "num_envs": 1, "total_timesteps": 5000})
    ours = {"steps_per_second": [900, 1000, 1100], "startup_seconds": [1, 2, 3]}
    theirs = {"steps_per_second": [300, 250, 200], "startup_seconds": [1, 1, 1]}
    a = {
        "env_id": "A",
        "num_envs": 1,
        "s.py": ours,
        "Stable-Baselines3": theirs,
        "ratios": [3.0, 4.0, 5.5],
    }
    b = {"env_id": "A", "num_envs": 4, "s.py": {"steps_per_second": [2500], "startup_seconds": [2]}}
    rows = speed.rows({"script": "s", "measurements": [a, b | {"ratios": []}]})
    first = "| A, 1 environment | 1,000 | 250 | 4.00 (3.00 to 5.50) | 2.0 s / 1.0 s | 1.00 |"
    assert rows[2:] == [first, "| A, 4 environments | 2,500 | - | - | 2.0 s | 2.50 |"]


def fail_at_8(clock):
    def wrapped(setting, *rest):
        if setting["num_envs"] == 8:
            raise OSError
        return clock(setting, *rest)

    return wrapped


def test_speed_gives_both_the_same_work_and_divides_ours_by_the_peers(monkeypatch):
    """With a script and a peer that only log, the script twice as fast."""
    ran = []

    def run_python(words):
        ran.append(words)
        if "peer" in Path(words[0]).name:
            return "".join(f"{step} {1000 + step / 100}\n" for step in range(0, 65_537, 2048))
        folder = Path(words[words.index("--run-dir") + 1])
        with SummaryWriter(folder) as writer:
            for step in range(2048, 65_537, 2048):
                writer.add_scalar("charts/SPS", 1.0, step, walltime=1000 + step / 200)
        config = {name: {} for name in speed.ABOUT} | {"machine": {"device": "cpu"}}
        config |= {"script": "ppo_continuous", "command": "python x"}
        (folder / "config.json").write_text(json.dumps(config))
        return ""

    monkeypatch.setattr(speed, "_run", run_python)
    monkeypatch.setattr(speed, "version", lambda _: "1")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda _: True)
    speed.speed(threads=3, repeats=2, flags="--bf16", output=Path("speed.json"))
    (found,) = json.loads(Path("speed.json").read_text())["measurements"]
    assert found["ratios"] == pytest.approx([2, 2])
    assert [len(words) > 2 for words in ran] == [True, False] * 2  # in turn
    ours, theirs = " ".join(ran[0]), json.loads(ran[1][1])
    assert theirs["threads"] == 3 and theirs["device"] == "cpu" and not theirs["atari"]
    for name in ("env_id", "num_envs", "num_steps", "total_timesteps"):
        assert f"{arguments.flag(name)} {theirs[name]} " in ours
    assert "--num-threads 3 " in ours and " --bf16 " in ours and "--checkpoint-every 0" in ours
    ran.clear()
    with pytest.raises(OSError):  # what was measured before is kept
        with monkeypatch.context() as patch:
            patch.setattr(speed, "clock_script", fail_at_8(speed.clock_script))
            speed.speed(num_envs=(3, 8), repeats=1, output=Path("speed.json"))
    assert json.loads(ran[1][1])["num_steps"] == 672  # 32 minibatches divide 3 * 672
    (found,) = json.loads(Path("speed.json").read_text())["measurements"]
    assert found["num_envs"] == 3
    ran.clear()
    speed.speed(num_envs=(16,), num_steps=1024, repeats=1, output=Path("speed.json"))
    assert json.loads(ran[1][1])["total_timesteps"] == 6 * 16 * 1024  # two warm up
    ran.clear()
    speed.speed(peer="torchrl", repeats=1, output=Path("speed.json"))
    assert json.loads(ran[1][1])["num_steps"] == 1000


def test_what_was_measured_keeps_its_command_without_the_place(monkeypatch):
    for output in (["--output", "x.json"], ["--output=x.json"]):
        monkeypatch.setattr(sys, "argv", ["m", "speed", *output, "--threads", "2"])
        assert results.own_command() == "python -m benchmarks speed --threads 2"


def test_speed_measures_frames_of_other_games_without_a_peer(monkeypatch, capsys):
    """Stable-Baselines3's MlpPolicy would take them, flattened."""
    config = {name: {} for name in speed.ABOUT} | {"machine": {"device": "cpu"}}
    config |= {"script": "dqn_atari", "command": "python x"}
    monkeypatch.setattr(speed, "clock_script", lambda *_: ((200.0, 1.0), config))
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda _: True)
    for script in ("dqn_atari", "ppo_discrete"):
        path = Path(f"{script}.json")
        speed.speed(script, "pixel_envs:Catch-v0", repeats=1, output=path)
        (found,) = json.loads(path.read_text())["measurements"]
        assert not found["ratios"] and "for frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    "script, env_id, num_envs",
    [
        *((ppo, "Pendulum-v1", 8), (sac_continuous, "Pendulum-v1", 3)),
        *((ppo_discrete, "CartPole-v1", 4), (ppo_discrete, "ALE/Pong-v5", 8)),
        *((dqn_atari, "ALE/Pong-v5", n) for n in (1, 2, 3, 8)),
    ],
)
def test_the_peer_has_a_scripts_settings(script, env_id, num_envs, monkeypatch):
    pytest.importorskip("stable_baselines3")
    fake = SimpleNamespace(PPO=dict, SAC=dict, DQN=dict)
    atari = env_id.startswith("ALE/")
    setting = {"script": script.SCRIPT, "env_id": env_id, "num_envs": num_envs, "peer": "fake"}
    setting |= {"threads": torch.get_num_threads(), "num_steps": 64, "atari": atari}
    setting |= {"device": "cpu"}
    monkeypatch.setitem(sys.modules, "fake", fake)
    monkeypatch.setattr(sys, "argv", ["peer", json.dumps(setting | speed.OFF_POLICY)])
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(sys, "path", sys.path[:])
    peer = runpy.run_module("benchmarks.peer")
    assert os.environ["JAX_PLATFORMS"] == "cpu" and sys.path[-1] == os.getcwd()  # a user's module
    model = peer["make_model"](script.SCRIPT, env_id, num_envs, atari, "cpu")
    defaults = ppo_discrete.ATARI if atari and script is ppo_discrete else {}
    args, samples = script.Args(**defaults), 64 * num_envs
    if "n_epochs" in model:
        expected = {"n_steps": 64, "batch_size": samples // args.num_minibatches}
        expected |= {"n_epochs": args.update_epochs, "ent_coef": args.ent_coef}
        expected |= {"clip_range": args.clip_coef, "clip_range_vf": args.clip_coef}
        assert model["learning_rate"](0.5) == args.learning_rate / 2
        if not atari:
            assert model["policy_kwargs"]["net_arch"] == {"pi": [64, 64], "vf": [64, 64]}
        assert hasattr(model["env"], "norm_reward") == (script is ppo)
    else:
        expected = dict(speed.OFF_POLICY)
        if atari:
            expected |= {"exploration_final_eps": args.end_e}
            expected |= {"target_update_interval": args.target_network_frequency}
        frequency = getattr(args, "train_frequency", 1)
        assert model["gradient_steps"] * frequency == model["train_freq"] * num_envs
    assert {name: model[name] for name in expected} == expected
    assert model["env"].num_envs == num_envs


def test_torchrl_is_beside_ppo_continuous_with_the_readmes_settings_of_its_tutorial():
    readme = DETAILS.read_text()
    command = re.search(r"python ppo_continuous.py --env-id InvertedDouble[^`]*", readme)[0]
    words = command.replace("\\", " ").split()[2:]
    whole, part = (vars(tyro.cli(ppo.Args, args=x)) for x in (words, speed.TUTORIAL.split()))
    assert {x for x in whole if whole[x] != part[x]} == {"env_id", "num_steps", "total_timesteps"}
    source = (ROOT / "benchmarks" / "peer_torchrl.py").read_text()
    numbers = re.search(
        "^MINIBATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_GRAD_NORM = (.*)", source, re.M
    )
    names = "minibatch_size", "update_epochs", "learning_rate", "max_grad_norm"
    assert [float(x) for x in numbers[1].split(", ")] == [part[name] for name in names]
    assert f"GAE(gamma={part['gamma']}, lmbda={part['gae_lambda']}," in source


def test_a_measurement_that_is_told_to_end_leaves_no_process(monkeypatch):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    children, start = [], subprocess.Popen.__init__

    def popen(process, *args, **kwargs):
        children.append(process)
        start(process, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", popen)
    monkeypatch.setattr(speed, "clock_script", lambda *_: speed._run(["-c", code]))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            speed.speed(repeats=1)
        assert [child.poll() for child in children] == [-signal.SIGKILL]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_torchrl_on_the_cpu_is_not_compared_with_a_gpu(monkeypatch, capsys):
    config = {"machine": {"device": "NVIDIA H100"}}
    monkeypatch.setattr(speed, "clock_script", lambda *_: ((200.0, 1.0), config))
    with pytest.raises(SystemExit, match="2"):
        speed.speed(peer="torchrl", repeats=1)
    assert "--peer torchrl: computes on the CPU here" in capsys.readouterr().err


@needs_git
@pytest.mark.parametrize(
    "script, env_id, name, theirs, num_envs",
    [
        ("ppo_continuous", "HalfCheetah-v5", "ppo_continuous_action", "HalfCheetah-v4", 3),
        ("ppo_discrete", "CartPole-v1", "ppo", "CartPole-v1", 3),
        ("ppo_discrete", "ALE/Pong-v5", "ppo_atari", "ale_py:PongNoFrameskip-v4", 3),
        ("dqn_atari", "PongDeterministic-v4", "dqn_atari", "ale_py:PongNoFrameskip-v4", 1),
        ("sac_continuous", "my:Env-v5", "sac_continuous_action", "my:Env-v5", 1),
        ("sac_continuous", "Hopper-v5", "sac_continuous_action", "Hopper-v4", 1),
    ],
)
def test_cleanrl_does_the_same_work_with_its_own_python(
    script, env_id, name, theirs, num_envs, monkeypatch
):
    ran, extra = [], "num_steps" if "ppo" in script else "buffer_size"
    python = Path("c/.venv/bin/python")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho torch 1.0\necho other 2.0\n")
    python.chmod(0o755)

    def run_python(words, python, cwd, env):
        ran.append((words, python, env))
        with SummaryWriter(Path(cwd, "runs", "a", "b")) as writer:  # as an id may have a slash
            for step in range(0, 9001, 1000):
                writer.add_scalar("charts/SPS", 1.0, step, walltime=1000 + step / 100)

    def clock(setting, threads, flags):
        config = {name: {} for name in speed.ABOUT} | {"machine": {"device": "cpu"}}
        return (200.0, 1.0), config | {"script": script, "command": "python x"}

    monkeypatch.setattr(speed, "_run", run_python)
    monkeypatch.setattr(speed, "clock_script", clock)
    options = {"peer": "cleanrl", "cleanrl": Path("c"), "num_envs": (3,), "threads": 2}
    speed.speed(script, env_id, repeats=1, output=Path("x.json"), **options)
    content = json.loads(Path("x.json").read_text())
    (found,) = content["measurements"]
    assert found["ratios"] == pytest.approx([2]) and found["num_envs"] == 3
    assert found["CleanRL"]["setting"]["num_envs"] == num_envs
    assert content["versions"]["cleanrl"] == {"commit": "", "torch": "1.0"}
    ((words, used, env),) = ran
    assert words[0] == str(Path("c/cleanrl").absolute() / f"{name}.py")
    assert used == str(python.absolute()) and env["OMP_NUM_THREADS"] == "2"
    assert env["PYTHONPATH"].split(":") == [str(Path("c").absolute()), os.getcwd()]
    line = " ".join(words)
    assert f"--no-cuda --env-id {theirs} --num-envs {num_envs} " in line
    assert f"{arguments.flag(extra)} " in line


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only the peak is known")
def test_memory_fills_a_replay_and_then_takes_no_more(capsys, tmp_path):
    gc.collect()  # of other tests, which would be freed meanwhile
    memory.memory("dqn_atari", "pixel_envs:Catch-v0", 8000, tmp_path / "memory.json")
    *lines, _, saved, written = [line.split() for line in capsys.readouterr().out.splitlines()]
    content = json.loads(Path(*written).read_text())
    assert [f"{x:,}" for x in content["mib"].values()] == [line[2] for line in lines]
    assert [line[0] for line in lines] == ["800", "4,000", "8,000", "8,800"]
    assert 0 < content["save_seconds"] == float(saved[2])
    full, later = (float(line[2]) for line in lines[2:])
    frames = 8000 * 84 * 84 / 2**20  # each kept once
    assert frames < full < 1.5 * frames and later - full < 0.1 * frames


def test_memory_of_sacs_replay_is_measured_by_its_command(monkeypatch):
    words = "memory sac_continuous --env-id Pendulum-v1 --buffer-size 6000 --output m.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    runpy.run_module("benchmarks", run_name="__main__")
    assert list(json.loads(Path("m.json").read_text())["mib"]) == ["600", "3000", "6000", "6600"]


def test_progress_is_read_from_the_log():
    log = "1,000 of 4,000 steps (25%) | 313 steps/s | 00:09 left | return 0.0 (last 6)\n"
    assert run.read_progress(log) == (1000, 4000, 313, "00:09", 0.0)
    log += "2,000 of 4,000 steps (50%) | 1,313 steps/s | 1:00:09 left | \nTraceback\n"
    assert run.read_progress(log) == (2000, 4000, 1313, "1:00:09", None)
    log += "4,000 of 4,000 steps (100%) | 9 steps/s | 00:00 left | return -1,234.5 (last 100)\n"
    assert run.read_progress(log).recent_return == -1234.5
    assert run.read_progress("error: no such thing\n") is None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A tiny suite that ran through."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "tiny", TINY)
        run.run("tiny", workers=2, run_dir=folder)
    return folder / "tiny" / "Pendulum-v1"


def start_runner(scripts=ROOT) -> tuple[subprocess.Popen, list[int]]:
    """Start a runner of the tiny suite, and return it with the process ids of its two runs."""
    code = RUNNER.format(root=str(ROOT), scripts=str(scripts), suite=tuple(TINY))
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code], **options)
    lines = (line for line in process.stdout if line.startswith("pid"))
    return process, [int(next(lines).split()[1]) for _ in range(2)]


def wait_for(words: str, *logs: Path) -> None:
    for _ in range(30_000):
        if all(log.exists() and words in log.read_text() for log in logs):
            return
        time.sleep(0.01)
    raise AssertionError([log.read_text() for log in logs])


def assert_same_results(folder: Path, expected: Path) -> None:
    for seed in (1, 2):
        a, b = (results.read_csv(x / f"{seed}.csv") for x in (folder, expected))
        for name in ("steps", "returns", "lengths"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
        a, b = (load_checkpoint(x / str(seed) / "checkpoint.pt") for x in (folder, expected))
        del a["args"], b["args"]  # of which --run-dir and --resume differ
        assert_same(a, b)


def test_a_run_is_the_command_that_a_user_would_type(undisturbed, tmp_path, monkeypatch, capsys):
    log = (undisturbed / "1.log").read_text()
    flags = f"--env-id Pendulum-v1 --seed 1 {FLAGS} --num-threads 1"
    begin, python, script, *rest = shlex.split(log.splitlines()[0])
    assert [begin, python, Path(script).name] == ["$", "python", "ppo_continuous.py"]
    assert rest == [*flags.split(), "--run-dir", f"{undisturbed}/1"]
    now = run.read_progress(log)
    assert now.step == now.total == 2048 and now.recent_return < 0
    config = json.loads((undisturbed / "1.json").read_text())
    flags = flags.replace(" --checkpoint-every 128", "")
    assert config["command"] == f"python ppo_continuous.py {flags}"
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.export(suite="tiny", run_dir=undisturbed.parent.parent)
    for name in ("1.csv", "2.csv", "1.json"):
        exported = tmp_path / "tiny" / "Pendulum-v1" / name
        assert exported.read_text() == (undisturbed / name).read_text()
    assert config["evaluation"]["step"] == 2048
    results.export([undisturbed], name="of a folder")
    assert len(list((tmp_path / "of a folder").rglob("*.csv"))) == 2
    folder = tmp_path / "runs" / "tiny" / "Pendulum-v1"
    shutil.copytree(undisturbed, folder)
    (folder / "2.csv").unlink()  # as of a runner that was killed: it is read from its events
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    shutil.rmtree(folder / "1")  # its results remain: it is not run again
    monkeypatch.setattr(run.subprocess, "Popen", None)
    run.run("tiny", run_dir=folder.parent.parent, seeds=1)
    assert "1 of 1 finished" in capsys.readouterr().out
    results.export(suite="tiny", name="both", run_dir=folder.parent.parent)
    for name in ("1.csv", "2.csv", "1.json"):
        exported = tmp_path / "both" / "Pendulum-v1" / name
        assert exported.read_text() == (undisturbed / name).read_text()


def test_a_killed_suite_completes_as_if_undisturbed(monkeypatch, capsys, undisturbed):
    """The runner and its runs are killed; the second call ends with the same results."""
    folder = Path("runs/benchmarks/tiny/Pendulum-v1")
    logs = [folder / "1.log", folder / "2.log"]
    process, pids = start_runner()
    wait_for(" steps/s ", logs[0])
    for _ in range(6000):
        if load_checkpoint(folder / "1" / "checkpoint.pt")["global_step"]:
            break
        time.sleep(0.002)
    for number in (signal.SIGSTOP, signal.SIGKILL):  # first stopped, or they might end meanwhile
        for pid in (*pids, process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    process.wait()
    assert "done: " not in logs[0].read_text()
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    run.run("tiny", workers=2, flags="--checkpoint_every=512")  # which decides nothing
    assert "--resume" in logs[0].read_text() and "2 of 2 finished" in capsys.readouterr().out
    assert_same_results(folder, undisturbed)
    saved = load_checkpoint(folder / "1" / "checkpoint.pt")
    assert saved["args"]["checkpoint_every"] == 512
    before = [log.read_text() for log in logs]
    monkeypatch.setattr(run.subprocess, "Popen", None)  # what is finished is not repeated
    run.run("tiny", workers=2)
    run.run("tiny", first_seed=2, threads=2)
    out = capsys.readouterr().out
    assert "1 of 1 finished" in out.split("2 of 2 finished")[-1] and "other code" not in out
    assert [log.read_text() for log in logs] == before
    monkeypatch.setattr(run, "code", lambda script: f"another {script}")
    run.run("tiny")
    told = "begun with other code: Pendulum-v1/1, Pendulum-v1/2; to run what has changed: --run-dir"
    assert told in capsys.readouterr().out


def test_what_is_finished_counts_from_the_start_and_a_run_keeps_its_threads(
    monkeypatch, capsys, undisturbed
):
    folder = Path("runs/benchmarks/tiny/Pendulum-v1")
    shutil.copytree(undisturbed, folder)
    (folder / "1.csv").unlink()
    (folder / "1.log").unlink()
    all_jobs, said = [], []

    def work(jobs, *rest, work=run.work):
        all_jobs.extend(jobs)
        return work(jobs, *rest)

    def start(job, threads):
        said.extend(run.describe(all_jobs))
        job.state = "failed"
        monkeypatch.setattr(run, "code", lambda script: "edited meanwhile")

    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setattr(run, "work", work)
    monkeypatch.setattr(run.Job, "start", start)
    with pytest.raises(SystemExit):
        run.run("tiny", threads=3)
    assert said == ["tiny: 1 of 2 finished", "waiting 1: Pendulum-v1/1"]
    out = capsys.readouterr().out
    assert out.startswith("with as many threads as before: Pendulum-v1/1\n")
    assert out.count("begun with other code: Pendulum-v1/1, Pendulum-v1/2; ") == 1


def test_a_run_whose_environment_ends_no_line_is_finished(undisturbed):
    job = run.Job(*TINY.runs[0], 1, Path("runs/benchmarks/tiny"))
    job.run_dir.parent.mkdir(parents=True)
    job.path(".log").write_text(f"$ python x\n...done: {job.run_dir}")
    assert job.finished()
    job.path(".log").write_text(f"$ python x\n...done: {job.run_dir}0\n{job.run_dir} is there")
    assert not job.finished()


def test_a_program_that_outlives_its_run_does_not_keep_it_locked(tmp_path, monkeypatch):
    """As a game's server would that an environment has started."""
    code = "import subprocess\nsubprocess.Popen(['sleep', '600'])\nraise SystemExit(3)\n"
    (tmp_path / "ppo_continuous.py").write_text(code)
    monkeypatch.setattr(run, "SCRIPTS", tmp_path)
    groups = []
    try:
        for _ in range(2):
            job = run.Job(*TINY.runs[0], 1, Path("runs/benchmarks/tiny"))
            job.start(1)
            assert job.state == "running"
            groups.append(job.process.pid)
            job.process.wait(300)
            job.poll()
            assert job.state == "failed"
    finally:
        for group in groups:
            os.killpg(group, signal.SIGKILL)


def test_a_run_without_a_usable_checkpoint_is_started_anew_and_one_that_fails_is_reported(
    monkeypatch, capsys, undisturbed
):
    folder = Path("runs/benchmarks/tiny/Pendulum-v1")
    shutil.copytree(undisturbed, folder)
    (folder / "1.log").unlink()
    (folder / "1.csv").unlink()
    (folder / "1" / "checkpoint.pt").write_bytes(b"half of a checkpoi")
    suite = suites.Suite(1, [*TINY.runs, ("ppo_continuous", "Nowhere-v0", "")])
    monkeypatch.setitem(suites.SUITES, "tiny", suite)
    with pytest.raises(SystemExit) as ended:
        run.run("tiny", workers=2)
    out = capsys.readouterr().out
    assert ended.value.code == 1 and "1 of 2 finished" in out
    assert "failed: Nowhere-v0/1 exit 2: error: --env-id Nowhere-v0: " in out
    assert (folder / "1.1.unusable").is_dir()
    assert f"begun anew: Pendulum-v1/1, as it cannot be resumed; what it was: {folder}" in out
    assert_same_results(folder, undisturbed)
    runs = [(script, env_id, flags + " --squash") for script, env_id, flags in TINY.runs]
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite(2, runs))
    shutil.rmtree(folder / "1")
    for name in ("1.csv", "1.json"):
        (folder / name).unlink()
    with pytest.raises(SystemExit):  # nothing is begun beside what was made by another command
        run.run("tiny")
    assert f"{folder / '2'} was made by another command: python" in capsys.readouterr().err
    assert not (folder / "1").exists()
    job = run.Job(*suites.SUITES["tiny"].runs[0], 2, folder.parent)
    job.start(1)  # also where another runner made it while this one ran
    assert job.state == "failed" and "was made by another command" in job.error
    (folder / "2").rename(folder / "2.2.unusable")  # the first free number is taken
    shutil.copytree(undisturbed / "2", folder / "2")
    job = run.Job(*TINY.runs[0], 2, folder.parent)
    job.set_aside()
    assert (folder / "2.1.unusable").is_dir() and not (folder / "2.csv").exists()


def test_a_run_that_was_killed_is_said_to_be():
    job = run.Job(*TINY.runs[0], 1, Path("runs/tiny"))
    job.process = subprocess.Popen(["sh", "-c", "kill -9 $$"])
    job.process.wait()
    job.poll()
    assert (job.state, job.error) == ("failed", "SIGKILL: ")


def test_a_suite_under_nohup_outlives_its_terminal(monkeypatch):
    def start(job, _):
        signal.raise_signal(signal.SIGHUP)
        job.state = "finished"

    monkeypatch.setattr(run.Job, "start", start)
    jobs = [run.Job(*TINY.runs[0], seed, Path("runs/tiny")) for seed in (1, 2)]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run.work(jobs, 1, 1, run.Screen()) == []
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [job.state for job in jobs] == ["finished"] * 2


def test_what_is_said_beside_the_table_stays(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "9")
    monkeypatch.setenv("LINES", "3")
    screen = run.Screen()
    screen.live = True
    screen.show(["a" * 20, "b", "c"])
    screen.say("failed")
    screen.show(["d"])
    screen.show(["e"])
    told = "aaaaaaaaa\nb\n\x1b[2F\x1b[Jfailed\nd\n\x1b[1F\x1b[Je\n"
    assert capsys.readouterr().out == told


def test_a_suite_is_what_was_asked_for_and_no_more_at_a_time(monkeypatch, capsys):
    started, alive, most, flags = [], [], 0, None
    memory_there_is = run.available_memory

    def start(job, threads):
        nonlocal most, flags
        flags = job.flags
        job.state, job.process = "running", iter(range(3))
        started.append((job.env_id, job.seed))
        alive.append(job)
        most = max(most, len(alive))

    def poll(job):
        if next(job.process, None) is None:
            job.state, job.process = "finished", None
            alive.remove(job)

    monkeypatch.setattr(run.Job, "start", start)
    monkeypatch.setattr(run.Job, "poll", poll)
    monkeypatch.setattr(run.time, "sleep", lambda _: None)
    run.run("ppo_discrete", ("Acrobot-v1",), seeds=3, first_seed=4, workers=2)
    assert started == [("Acrobot-v1", seed) for seed in (4, 5, 6)] and most == 2
    assert capsys.readouterr().out.count(" of 3 finished") == 2  # a line a minute, and the last
    started.clear()
    run.run("ppo_discrete", ("Mine-v0",), seeds=1, flags="--gamma 0.9")
    assert started == [("Mine-v0", 1)] and flags == ["--gamma", "0.9"]
    (job,) = run.select("dqn_atari", ("ALE/Pong-v5",), 1, 1, "", "--checkpoint-every 5", Path("r"))
    assert job.flags == [*suites.EXACT.split(), "--checkpoint-every", "5"]  # the last one counts
    started.clear()
    run.run("ppo_discrete", ("Acrobot-v1",), first_seed=4, workers=2)
    assert started == [("Acrobot-v1", seed) for seed in (4, 5)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        broken = lambda job: setattr(job, "process", None) or open("gone")  # noqa: E731
        patch.setattr(run.Job, "poll", broken)
        run.run("ppo_discrete", ("Acrobot-v1",), seeds=2, workers=1)
    assert capsys.readouterr().out.count("No such file or directory: 'gone'") == 2
    alive.clear()
    most = 0
    monkeypatch.setattr(run, "available_memory", lambda: 20e9)
    with monkeypatch.context() as patch:
        patch.setattr(run, "available_cores", lambda: 8)
        run.run("dqn_atari")
        assert most == 2  # of 9 GB
        most = 0
        run.run("dqn_atari", threads=8)
        assert most == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: "250000 100000\n")  # of a container
    assert run.available_cores() == 2
    monkeypatch.setattr(Path, "read_text", lambda _: "1000000000\n")
    assert memory_there_is() == 10**9


def test_suites_are_commands_that_can_be_run_and_gone_on_with_exactly():
    for suite in suites.SUITES.values():
        for script, env_id, flags in suite.runs:
            words = ["--env-id", env_id, *flags.split()]
            args = tyro.cli(sys.modules[script].Args, args=words)
            arguments.check_ranges(args)
            assert getattr(args, "checkpoint_replay", True)
    seeds = {name: suite.seeds for name, suite in suites.SUITES.items() if name != "smoke"}
    expected = {"ppo_continuous": 5, "ppo_discrete": 5}
    assert seeds == expected | dict.fromkeys(("ppo_atari", "dqn_atari", "sac_continuous"), 3)


def test_what_died_before_its_first_checkpoint_is_begun_anew(monkeypatch):
    job, started = run.Job(*TINY.runs[0], 1, Path("runs/tiny")), {}
    job.run_dir.mkdir(parents=True)
    job.path(".log").write_text("old\n")
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda words, **options: started.update(options, words=words)
    )
    job.start(3)
    assert job.path(f".1{results.UNUSABLE}").is_dir() and not job.run_dir.exists()
    assert job.log().startswith("$ python ") and started["env"]["OMP_NUM_THREADS"] == "3"
    assert "--num-threads 3 " in " ".join(started["words"]) + " "


def test_a_copy_is_run_in_place_of_a_script_and_what_another_version_made_is_kept(
    monkeypatch, capsys, undisturbed
):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    Path("mine.py").write_text("""import sys
if "--resume" in sys.argv:
    print("what is said before the error comes before it in the log")
    print("error: checkpoint.pt has version 6; this code reads version 7", file=sys.stderr)
    raise SystemExit(2)
print("done: True\\ndone:", sys.argv[-1] if sys.argv[-1][-1] == "1" else "it")
""")
    monkeypatch.setattr(run, "SCRIPTS", Path.cwd())
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    for path in ("sub/mine", "../mine.py", "yours"):
        with pytest.raises(SystemExit):
            run.run("tiny", script=path)
        assert f"there is no {path.removesuffix('.py')}.py" in capsys.readouterr().err
    read_run, unfinished = results.read_run, make_result()
    del unfinished.config["evaluation"]
    monkeypatch.setattr(results, "read_run", lambda _: unfinished)
    with pytest.raises(SystemExit):
        run.run("tiny", script="mine", run_dir=Path("half"), seeds=1)
    reason = (
        "failed: Pendulum-v1/1 its episodes cannot be kept: error: half/mine/Pendulum-v1/1 is not"
    )
    assert reason in capsys.readouterr().out
    monkeypatch.setattr(results, "read_run", lambda _: make_result())
    monkeypatch.setattr(results, "write", lambda result, path: path.touch())
    with pytest.raises(SystemExit):
        run.run("tiny", script="mine.py", run_dir=Path("runs"))
    out = capsys.readouterr().out
    assert "mine: 1 of 2 finished" in out and "failed: Pendulum-v1/2 exit 0: done: it" in out
    monkeypatch.setattr(results, "read_run", read_run)
    log = Path("runs/mine/Pendulum-v1/2.log").read_text()
    assert log.startswith("$ python mine.py --env-id Pendulum-v1 --seed 2 ")
    shutil.copytree(undisturbed / "1", "runs/mine/Pendulum-v1/1")
    for name in ("1.log", "1.csv"):
        Path("runs/mine/Pendulum-v1", name).unlink()
    config = json.loads(Path("runs/mine/Pendulum-v1/1/config.json").read_text())
    config["script"] = "mine"
    config["command"] = config["command"].replace("ppo_continuous.py", "mine.py")
    Path("runs/mine/Pendulum-v1/1/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        run.run("tiny", script="mine", run_dir=Path("runs"), seeds=1)
    assert "failed: Pendulum-v1/1 exit 2: error: checkpoint.pt has version 6" in (
        capsys.readouterr().out
    )
    assert Path("runs/mine/Pendulum-v1/1/checkpoint.pt").exists()


def test_one_run_that_cannot_be_started_does_not_end_the_others(monkeypatch, capsys):
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setattr(results, "read_run", lambda _: make_result())
    started = []

    def start(job, _):
        started.append(job.seed)
        if job.seed == 1:
            raise OSError(28, "No space left on device")
        job.state = "finished"

    monkeypatch.setattr(run.Job, "start", start)
    with pytest.raises(SystemExit) as stopped:
        run.run("tiny")
    assert stopped.value.code == 1 and started == [1, 2]
    out = capsys.readouterr().out
    assert "failed: Pendulum-v1/1 [Errno 28] No space left on device" in out
    assert "1 of 2 finished" in out


def test_runs_are_started_where_a_file_system_has_no_locks(monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run.fcntl, "flock", flock)
    monkeypatch.setattr(run.subprocess, "Popen", lambda words, **rest: words)
    job = run.Job(*TINY.runs[0], 1, Path("runs/benchmarks/tiny"))
    job.start(1)
    assert job.state == "running" and job.process[-1] == str(job.run_dir)


def test_a_runner_whose_output_nobody_reads_goes_on(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        screen = run.Screen()
        for _ in range(2):
            screen.say("lost")
        print("lost, too", flush=True)
        before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as the command line sets it
        run.work([], 1, 1, screen)
        assert signal.signal(signal.SIGPIPE, before) == signal.SIG_IGN


def test_ctrl_c_lets_runs_save_and_a_run_is_not_started_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "ppo_continuous.py").write_text("""
import json, os, pathlib, shlex, signal, sys, time
if "--resume" in sys.argv:
    print("done:", sys.argv[sys.argv.index("--resume") + 1])
    raise SystemExit
signals = []
def stop(number, _):  # as a script's, but without its clock: a scheduler's SIGTERM comes twice
    if signals and number == signal.SIGINT:
        os._exit(1)
    signals.append(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
folder = pathlib.Path(sys.argv[-1])
folder.mkdir()
config = {"script": "ppo_continuous", "command": shlex.join(["python", *sys.argv])}
(folder / "config.json").write_text(json.dumps(config))
(folder / "checkpoint.pt").touch()
print("ready", flush=True)
for _ in range(6000):
    if not signals:
        time.sleep(0.01)
time.sleep(float(os.environ["SAVING"]))
print("stopped at step 5")
raise SystemExit(130)
""")
    folder = Path("runs/benchmarks/tiny/Pendulum-v1")
    logs = [folder / "1.log", folder / "2.log"]
    for kill, number, times in (
        (os.killpg, signal.SIGINT, 1),  # as a terminal, to all of a group
        (os.kill, signal.SIGHUP, 1),  # as one that is closed
        ("all", signal.SIGTERM, 1),  # as a scheduler
        (os.kill, signal.SIGINT, 2),
    ):
        monkeypatch.setenv("SAVING", "2" if times == 1 else "60")
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup
        process, pids = start_runner(tmp_path)
        signal.signal(signal.SIGHUP, before)
        wait_for("ready", *logs)
        for again in range(times):
            time.sleep(0.8 * again)
            for pid in [process.pid] if kill != "all" else [*pids, process.pid]:
                (os.kill if kill == "all" else kill)(pid, number)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 128 + number and "go on: python -m benchmarks" in out
        saved = [log.read_text().endswith("stopped at step 5\n") for log in logs]
        assert saved == [times == 1] * 2  # who asks twice does not wait
        shutil.rmtree("runs")

    monkeypatch.setenv("SAVING", "2")
    process, pids = start_runner(tmp_path)
    wait_for("ready", *logs)
    process.kill()  # alone: its runs live on
    process.wait()
    monkeypatch.setattr(run, "SCRIPTS", tmp_path)
    monkeypatch.setitem(suites.SUITES, "tiny", TINY)
    monkeypatch.setattr(results, "read_run", lambda _: make_result())
    monkeypatch.setattr(results, "write", lambda result, path: path.touch())
    job = run.Job(*TINY.runs[0], 1, Path("runs/benchmarks/tiny"))
    job.start(1)
    assert job.state == "elsewhere" and job.process is None
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    run.run("tiny")
    assert "2 of 2 finished" in capsys.readouterr().out
    assert [log.read_text().count(f"\ndone: {folder}/") for log in logs] == [1, 1]
