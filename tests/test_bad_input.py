"""Bad input: one line on standard error, exit code 2, within seconds, and no folder left behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from typing import Literal

import pytest
from conftest import ROOT, each_script, read_args, run_script

import ppo_continuous
from common import arguments, compute, envs, provenance
from common.checkpoint import load_checkpoint, save_checkpoint

CASES = {
    "--env-id Nope-v3": "Nope",
    "--env-id nowhere:Thing-v0": "nowhere",
    "--env-id CartPole-v1": "discrete actions; use ppo_discrete.py",
    "--env-id ALE/Breakout-v5": "discrete actions; use ppo_discrete.py",
    "--env-id toy_envs:Flags-v0": "multibinary actions; no script takes them",
    "--env-id toy_envs:Steps-v0": "actions of int64, not of floating point",
    "--env-id toy_envs:Words-v0": "Dict observations",
    "--env-id toy_envs:Unbounded-v0 --squash": "actions without bounds",
    "--env-id toy_envs:Scalar-v0": "has scalar observations",
    "--render": "--render goes with --evaluate",
    "--num-envs 0": "at least 1",
    "--num-steps -5": "at least 1",
    "--num-steps 100000000000000 --total-timesteps 100000000000000": "--num-steps 1000",
    "--total-timesteps 0": "at least 1",
    "--total-timesteps 2047": "at least 2048",
    "--num-minibatches 3": "--num-minibatches 3: must divide a rollout's 2048 samples",
    "--num-minibatches 2048": "divide a rollout's 2048 samples, 2 or more in each",
    "--minibatch-size 1": "from 2 to 2048",
    "--minibatch-size 4096": "from 2 to 2048",
    "--minibatch-size 64 --num-minibatches 4": "--num-minibatches 4: must not go with",
    "--update-epochs 0": "at least 1",
    "--learning-rate 0": "above 0",
    "--learning-rate nan": "--learning-rate",
    "--lr-schedule cosine --no-anneal-lr": "--lr-schedule cosine: must go with --anneal-lr",
    "--learning-rate inf": "--learning-rate",
    "--gamma 1.5": "from 0 to 1",
    "--gae-lambda -0.1": "from 0 to 1",
    "--clip-coef -1": "at least 0",
    "--target-kl 0": "--target-kl",
    "--hidden-sizes 64 0": "--hidden-sizes",
    "--seed -1": "--seed",
    "--eval-episodes 0": "--eval-episodes",
    "--num-threads -1": "--num-threads",
    "--num-threads 10000000000": "from 0 to 1024",
    "--hidden-sizes 64 10000000000": "from 1 to 100000",
    "--checkpoint-every -1": "--checkpoint-every",
    "--resume nowhere": "not a run folder",
    "--evaluate nowhere": "not a run folder",
    "--evaluate nowhere/best.pt": "nowhere/best.pt is not a run folder, or not evaluated yet",
    "--resume a --evaluate b": "exclude each other",
    "--resume nowhere --gamma 0.5": "--gamma",
    "--run-dir taken": "exists already; there is no run to resume in it",
    "--run-dir hidden/wandb/__init__.py/run": "Not a directory",
    "--evaluate " + 300 * "x": "is not a run folder",
    "--track": "pip install wandb",
    "--wandb-project-name p": "--wandb-project-name p: must go with --track",
    "--wandb-entity me": "--wandb-entity me: must go with --track",
    "--capture-video": "pip install",
    "--device cuda": "no CUDA device",
}
# what is different in ppo_discrete.py
DISCRETE_CASES = {
    "--env-id Pendulum-v1": "continuous actions; use ppo_continuous.py",
    "--env-id toy_envs:Flags-v0": "multibinary actions; no script takes them",
    "--env-id toy_envs:Words-discrete-v0": "Dict observations",
    "--env-id FrozenLake-v1": "has Discrete observations; wrap it in",
    "--env-id toy_envs:Pictures-v0": "images must be of bytes",
    "--env-id pixel_envs:ColoursLast-v0": "not uint8 [84, 84, 3]; move channels to the front",
    "--env-id pixel_envs:Low-v0": "at least 36 pixels each way",
    "--env-id pixel_envs:Colours-v0 --norm-obs": "--norm-obs: images are divided by 255",
    "--env-id ALE/Nope-v5": "Nope",
    "--total-timesteps 511": "at least 512",
    "--num-minibatches 3": "--num-minibatches 3: must divide a rollout's 512 samples",
    "--num-minibatches 3 --env-id ALE/Pong-v5": "--num-minibatches 3: must divide a rollout's 1024",
    "--sticky-actions 1.5": "from 0 to 1",
    "--sticky-actions 0.25": "CartPole-v1 is not an ale-py game",
}
ALL = [("ppo_continuous.py", *case) for case in CASES.items()]
ALL += [("ppo_discrete.py", *case) for case in DISCRETE_CASES.items()]


@pytest.mark.parametrize("script, words, why", ALL, ids=[" ".join(x[:2]) for x in ALL])
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, script, words, why):
    (tmp_path / "taken").mkdir()
    for package in ("wandb", "moviepy"):  # as if not installed
        (tmp_path / "hidden" / package).mkdir(parents=True)
        (tmp_path / "hidden" / package / "__init__.py").write_text("raise ImportError")
    start = time.perf_counter()
    done = run(script, *words.split(), cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and why in lines[0], done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "hidden"}
    assert time.perf_counter() - start < 30  # a hang, not a speed


@each_script
def test_bad_input_is_refused_before_anything_that_takes_long(script, options, monkeypatch):
    for module, name in ((envs, "Environments"), (compute, "setup_torch"), (compute, "to_numpy")):
        monkeypatch.setattr(module, name, pytest.fail)
    with pytest.raises(SystemExit) as stopped:
        script.train(script.Args(**options | {"gamma": 2.0}))
    assert stopped.value.code == 2


@each_script
def test_choices_are_checked_where_train_is_called_too(script, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.train(script.Args(**options | {"vectorization": "Sync"}))
    assert "--vectorization Sync: must be one of sync, async\n" in capsys.readouterr().err


def test_choices_of_a_changed_script_need_not_be_words(capsys):
    @dataclasses.dataclass
    class Args(ppo_continuous.Args):
        layers: Literal[1, 2] = 1

    arguments.check_ranges(Args(layers=2))
    with pytest.raises(SystemExit, match="2"):
        arguments.check_ranges(Args(layers=3))
    assert capsys.readouterr().err == "error: --layers 3: must be one of 1, 2\n"


def test_unknown_flags_are_refused(run, tmp_path, ppo):
    done = run(f"{ppo.SCRIPT}.py", "--lerning-rate", "1", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--learning-rate" in done.stderr
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_run_folders_are_refused(run, tmp_path):
    folder = tmp_path / "r"
    words = "--env-id Pendulum-v1 --total-timesteps 128 --num-steps 32 --num-minibatches 2 "
    words += "--update-epochs 1 --eval-episodes 1 --no-compile --run-dir r"
    run("ppo_continuous.py", *words.split(), cwd=tmp_path)
    whole = (folder / "checkpoint.pt").read_bytes()
    (tmp_path / "hidden" / "wandb").mkdir(parents=True)
    (tmp_path / "hidden" / "wandb" / "__init__.py").write_text("raise ImportError")

    def edit(*without, **changed) -> bytes:
        state = load_checkpoint(folder / "checkpoint.pt") | {"global_step": 64}
        state["args"] |= changed
        for name in without:
            del (state if name in state else state["agent"])[name]
        save_checkpoint(tmp_path / "edited.pt", state)
        return (tmp_path / "edited.pt").read_bytes()

    edited = edit(hidden_sizes=(32,))  # as if the network had been edited
    bare, free = edit("optimizer"), edit("low")  # of a script that had neither
    elsewhere, tracked = edit(env_id="MountainCarContinuous-v0"), edit(track=True)
    refused = (
        (whole[:1000], "--resume r", "damaged"),
        (b"", "--evaluate r", "empty"),
        (whole, "--resume r --total-timesteps 999", "--anneal-lr depends on it"),
        (whole, "--resume r --learning-rate 1", "takes --learning-rate from the run"),
        (whole, "--evaluate r --eval-every 5", "takes --eval-every from the run"),
        (whole, "--run-dir r", "exists already; --resume r continues it"),
        (whole, "--evaluate r --no-compile", "takes --compile from the run"),
        (edited, "--resume r", "does not fit the script"),
        (bare, "--resume r", "does not fit the script"),
        (free, "--evaluate r", "does not fit the script"),
        (edited, "--evaluate r", "size mismatch for actor.0.weight"),
        (elsewhere, "--evaluate r", "does not fit the script or environment as it is now"),
        (whole, "--evaluate r --render --capture-video", "exclude each other"),
        (tracked, "--resume r", "pip install wandb"),
    )
    for content, words, why in refused:
        (folder / "checkpoint.pt").write_bytes(content)
        done = run("ppo_continuous.py", *words.split(), cwd=tmp_path, check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert why in done.stderr
        assert (folder / "checkpoint.pt").read_bytes() == content
    (folder / "checkpoint.pt").write_bytes(tracked)
    run("ppo_continuous.py", "--evaluate", "r", cwd=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"code": "another", "versions": {}, "machine": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoint.pt").write_bytes(edit(track=False))
    done = run("ppo_continuous.py", "--resume", "r", cwd=tmp_path)
    assert "changed since the run began: code, versions, machine; resuming" in done.stdout
    kept = json.loads((folder / "config.json").read_text())
    (resumed,) = kept["resumed"]
    assert kept | {"resumed": None} == config | {"resumed": None}
    assert resumed["step"] < 640 and resumed["code"] == provenance.code("ppo_continuous")
    assert set(resumed) == {"step", "commit", "code", "versions", "machine"}
    done = run("ppo_discrete.py", "--resume", "r", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: r was made by ppo_continuous.py, not by ppo_discrete.py\n"


@pytest.mark.parametrize("script", [path.name for path in sorted(ROOT.glob("*_*.py"))])
def test_help_says_what_every_flag_does(run, tmp_path, script):
    text = " ".join(run(script, "--help", cwd=tmp_path).stdout.split())
    for name, (_, about) in read_args(script).items():
        assert f"--{name.replace('_', '-')}" in text and " ".join(about.split()) in text


def test_help_that_is_not_read_to_its_end_ends_without_a_word():
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, ROOT / "dqn_atari.py", "--help"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == -signal.SIGPIPE and done.stderr == ""


def test_without_a_compiler_it_says_which_package_to_install_and_runs_eagerly(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # evaluations are said with a ±
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    words = "--env-id Pendulum-v1 --total-timesteps 2048 --eval-episodes 1 --run-dir r"
    done = run_script("ppo_continuous.py", *words.split(), cwd=tmp_path)
    (said,) = [line for line in done.stdout.splitlines() if "apt install g++" in line]
    assert said.startswith("running eagerly (no compiler?") and "thread(s), eager" in done.stdout
    assert "done: r" in done.stdout
    assert (tmp_path / "r" / "checkpoint.pt").exists()
