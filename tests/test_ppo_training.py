"""PPO as a user runs it: learning, time limits, resume, evaluation, signals."""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, command, run_script, scalars

import ppo_continuous as ppo
from common import envs, runs
from common.checkpoint import load_checkpoint

SCRIPT = "ppo_continuous.py"
SHORT = {
    "num_steps": 64,
    "num_minibatches": 4,
    "update_epochs": 2,
    "eval_episodes": 2,
    "compile": False,
}


def flags(**kwargs) -> list[str]:
    """Spell arguments as on a command line."""
    words = []
    for name, value in kwargs.items():
        if isinstance(value, bool):
            words.append(runs.flag(name if value else "no_" + name))
        else:
            words += [runs.flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return words


def test_learns_to_balance_a_pendulum(tmp_path):
    """The published CleanRL mean of InvertedPendulum is 963 at 1M steps; a random policy gets 6."""
    run_script(
        SCRIPT,
        *flags(env_id="InvertedPendulum-v5", total_timesteps=40_960, run_dir="r"),
        cwd=tmp_path,
    )
    returns = [value for _, value in scalars(tmp_path / "r")["charts/episodic_return"]]
    assert np.mean(returns[:50]) < 30
    assert np.mean(returns[-20:]) > 150


@pytest.mark.parametrize(
    "end, expected",
    [
        ("truncated", [10.0] * 5),
        ("terminated", [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]),
        ("both", [(1 - 0.9 ** (5 - t)) / 0.1 for t in range(5)]),
    ],
)
def test_value_at_time_limits(end, expected):
    """Reward 1 for five steps: cut off, worth 10 at every step; ended, what is left of it."""
    args = ppo.Args(
        env_id=f"toy_envs:Counter-{end}-v0",
        num_envs=4,
        num_steps=32,
        num_minibatches=2,
        total_timesteps=51_200,
        gamma=0.9,
        learning_rate=5e-3,
        hidden_sizes=(32,),
        anneal_lr=False,
        norm_reward=False,
        norm_obs=False,
        clip_vloss=False,
        run_dir="r",
    )
    agent = ppo.load_agent(ppo.train(args))
    with torch.no_grad():
        values = agent.value(agent.normalize(torch.arange(5.0)[:, None]))
    np.testing.assert_allclose(values, expected, atol=0.25)
    lengths = [value for _, value in scalars(runs.Path("r"))["charts/episodic_length"]]
    assert set(lengths) == {5.0} and len(lengths) == 51_200 // 5 - 4 * (51_200 // 4 % 5 > 0)


def record_updates(monkeypatch) -> list:
    """Have train() leave (arguments, metrics) of every update."""
    seen = []

    def wrap(function, args):
        def update(parameters, batch, indices, lr):
            metrics = function(parameters, batch, indices, lr)
            seen.append(([x.clone() for x in batch], dict(zip(ppo.METRICS, metrics.tolist()))))
            return metrics

        return update

    monkeypatch.setattr(runs, "compile_function", wrap)
    return seen


@pytest.mark.parametrize("squash", [False, True])
def test_ratio_is_one_at_the_first_minibatch_of_every_rollout(monkeypatch, squash):
    """Acting, old and new log-probabilities see the same statistics, which then change."""
    seen = record_updates(monkeypatch)
    ppo.train(
        ppo.Args(
            env_id="Pendulum-v1",
            total_timesteps=640,
            num_envs=2,
            squash=squash,
            run_dir="r",
            **SHORT | {"num_steps": 32},
        )
    )
    assert len(seen) == 10 * 2 * 4
    for _, metrics in seen[::8]:
        assert abs(metrics["old_approx_kl"]) < 1e-6 and metrics["clipfrac"] == 0
        assert metrics["policy_loss"] == pytest.approx(
            0, abs=1e-5
        )  # normalised advantages have mean 0
    assert max(metrics["approx_kl"] for _, metrics in seen) > 1e-5


def test_all_environments_share_statistics_and_stored_observations_are_copies(monkeypatch):
    """With four environments: one mean and variance over all, and no aliased buffers."""
    stored = []
    monkeypatch.setattr(
        ppo,
        "estimate",
        lambda agent, rollout, args, original=ppo.estimate: (
            stored.append((rollout.obs.clone(), agent.obs_statistics.count.item())),
            original(agent, rollout, args),
        )[1],
    )
    args = ppo.Args(env_id="Pendulum-v1", total_timesteps=1280, num_envs=4, run_dir="r", **SHORT)
    agent = ppo.load_agent(ppo.train(args))
    assert agent.obs_statistics.count == 1280 and [count for _, count in stored] == [
        0,
        256,
        512,
        768,
        1024,
    ]
    obs = stored[0][0]
    assert len(torch.unique(obs.flatten(0, 1), dim=0)) == 65 * 4  # no observation is seen twice
    assert torch.equal(stored[1][0][0], obs[-1])  # the pending observation opens the next rollout


@pytest.mark.parametrize(
    "env_id, num_envs, compiled",
    [
        ("Hopper-v5", 4, True),
        ("HalfCheetah-v5", 1, False),
        ("Pendulum-v1", 4, False),
        ("MountainCarContinuous-v0", 1, True),
        ("toy_envs:Pair-v0", 4, False),
    ],
)
def test_killed_and_resumed_ends_as_if_never_stopped(tmp_path, env_id, num_envs, compiled):
    """SIGKILL at random moments; the same weights to the last bit, the same scalars."""
    arguments = SHORT | {
        "env_id": env_id,
        "num_envs": num_envs,
        "compile": compiled,
        "total_timesteps": 64 * num_envs * 60,
        "checkpoint_every": 64 * num_envs * 3,
        "eval_every": 64 * num_envs * 20,
        "seed": 3,
    }
    run_script(SCRIPT, *flags(**arguments, run_dir="whole"), cwd=tmp_path)
    checkpoint, kills = tmp_path / "killed" / "checkpoint.pt", 0
    words = flags(**arguments, run_dir="killed")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    while kills < 3:
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            command(ROOT / SCRIPT, *words), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not (
            checkpoint.exists() and checkpoint.stat().st_mtime_ns > stamp
        ):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        words = ["--resume", "killed"]
    assert kills > 0
    run_script(SCRIPT, "--resume", "killed", cwd=tmp_path)
    whole, killed = (
        load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")
    )
    ignored = {"args", "envs"}  # MuJoCo leaves some of its arrays uninitialised
    assert whole["global_step"] == 64 * num_envs * 60
    assert_same(
        {k: v for k, v in whole.items() if k not in ignored},
        {k: v for k, v in killed.items() if k not in ignored},
    )
    assert_same(scalars(tmp_path / "whole"), scalars(tmp_path / "killed"))
    assert_same(
        *(load_checkpoint(tmp_path / name / "best.pt")["agent"] for name in ("whole", "killed"))
    )


def test_killed_while_writing_a_checkpoint(tmp_path):
    """The process dies with half a checkpoint written; the one before it is whole."""
    arguments = flags(env_id="Pendulum-v1", total_timesteps=64 * 12, checkpoint_every=64, **SHORT)
    run_script(SCRIPT, *arguments, "--run-dir", "whole", cwd=tmp_path)
    saboteur = tmp_path / "saboteur.py"
    saboteur.write_text(f"""
import io, os, runpy, sys, torch
sys.path.insert(0, {str(ROOT)!r})
original, calls = torch.save, []
def save(content, file):
    calls.append(1)
    if len(calls) == 6:
        whole = io.BytesIO()
        original(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), 9)
    original(content, file)
torch.save = save
sys.argv = ["ppo_continuous.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / SCRIPT)!r}, run_name="__main__")
""")
    died = subprocess.run(
        command(saboteur, *arguments, "--run-dir", "killed"), cwd=tmp_path, capture_output=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["global_step"] == 64 * 4
    run_script(SCRIPT, "--resume", "killed", cwd=tmp_path)
    whole, killed = (
        load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")
    )
    assert_same(whole["agent"], killed["agent"])
    assert_same(scalars(tmp_path / "whole"), scalars(tmp_path / "killed"))


def test_saving_does_not_change_training():
    agents = []
    for every in (0, 64):
        args = ppo.Args(
            env_id="Hopper-v5",
            total_timesteps=640,
            checkpoint_every=every,
            eval_every=every * 2,
            run_dir=f"r{every}",
            **SHORT,
        )
        agents.append(ppo.load_agent(ppo.train(args)).state_dict())
    assert_same(dict(agents[0]), dict(agents[1]))


def test_same_seed_same_weights_and_another_seed_others():
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        args = ppo.Args(
            env_id="Pendulum-v1", seed=seed, total_timesteps=256, run_dir=f"r{i}", **SHORT
        )
        weights.append(ppo.load_agent(ppo.train(args)).state_dict()["actor.0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_asynchronous_environments_train_the_same():
    weights = []
    for vectorization in ("sync", "async"):
        args = ppo.Args(
            env_id="Pendulum-v1",
            num_envs=2,
            vectorization=vectorization,
            total_timesteps=1280,
            run_dir=vectorization,
            **SHORT,
        )
        weights.append(dict(ppo.load_agent(ppo.train(args)).state_dict()))
    assert_same(*weights)


def test_evaluation_from_the_checkpoint_equals_the_one_in_training(tmp_path):
    arguments = flags(
        env_id="Hopper-v5", total_timesteps=2048, run_dir="r", **SHORT | {"eval_episodes": 5}
    )
    trained = run_script(SCRIPT, *arguments, cwd=tmp_path).stdout
    line = next(
        line for line in trained.splitlines() if line.startswith("evaluation of 5 episodes")
    )
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    assert run_script(SCRIPT, "--evaluate", "r", cwd=tmp_path).stdout.strip() == line
    agent, args = ppo.load_agent(tmp_path / "r"), ppo.Args(env_id="Hopper-v5", eval_episodes=5)
    returns, lengths = envs.play(agent.act, args, tmp_path)
    logged = scalars(tmp_path / "r")
    assert logged["eval/episodic_return"] == [(2048, pytest.approx(np.mean(returns), rel=1e-6))]
    assert logged["eval/episodic_length"] == [(2048, np.float32(np.mean(lengths)))]
    assert len(set(returns)) == 5  # episodes differ
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(tmp_path, number):
    arguments = flags(
        env_id="Pendulum-v1", total_timesteps=10**9, anneal_lr=False, run_dir="r", **SHORT
    )
    process = subprocess.Popen(
        command(ROOT / SCRIPT, *arguments),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "steps/s" in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert "--resume r" in out
    step = load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"]
    assert step > 0 and f"stopped at step {step:,}" in out
    more = run_script(SCRIPT, "--resume", "r", "--total-timesteps", step + 128, cwd=tmp_path).stdout
    assert load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"] == step + 128, more
    finished = run_script(SCRIPT, "--resume", "r", cwd=tmp_path)
    assert "finished" in finished.stdout and (tmp_path / "r" / "checkpoint.pt").is_file()


@pytest.mark.parametrize("where", ["reward", "observation"])
def test_nan_from_an_environment_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, where):
    arguments = flags(
        env_id=f"toy_envs:Broken-{where}-v0",
        total_timesteps=6400,
        checkpoint_every=64,
        run_dir="r",
        **SHORT,
    )
    done = run_script(SCRIPT, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()
    assert (
        len(message) == 1
        and "NaN or infinite reward or observation" in message[0]
        and "r/checkpoint.pt" in message[0]
    )
    checkpoint = load_checkpoint(tmp_path / "r" / "checkpoint.pt")
    assert checkpoint["global_step"] == 640
    assert all(
        x.isfinite().all() for name, x in checkpoint["agent"].items() if name not in ("low", "high")
    )


def test_nan_loss_stops_the_run():
    args = ppo.Args(
        env_id="Pendulum-v1", total_timesteps=640, learning_rate=1e30, run_dir="r", **SHORT
    )
    with pytest.raises(SystemExit) as stopped:
        ppo.train(args)
    assert stopped.value.code == 1
    assert all(x.isfinite().all() for x in ppo.load_agent("r").parameters())


def test_a_users_environment_trains_and_is_loaded_in_three_lines(tmp_path):
    """In a user's own module, where they stand: float64, two axes, unequal bounds."""
    (tmp_path / "my_module.py").write_text((ROOT / "tests" / "toy_envs.py").read_text())
    done = subprocess.run(
        command(
            ROOT / SCRIPT,
            *flags(env_id="my_module:Shaped-v0", total_timesteps=640, run_dir="r", **SHORT),
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    agent = ppo.load_agent(tmp_path / "r")
    action = agent.act(np.ones((2, 3)))
    assert agent.obs_statistics.mean.shape == (2, 3)
    assert (
        action.shape == (2, 1)
        and (np.array([[-2], [0]]) <= action).all()
        and (action <= [[1], [0.5]]).all()
    )


@pytest.mark.parametrize(
    "options",
    [
        {
            "squash": True,
            "ent_coef": 1e-4,
            "lr_schedule": "cosine",
            "vf_loss": "huber",
            "recompute_advantages": True,
            "hidden_sizes": (32, 32, 32),
            "minibatch_size": 50,
        },
        {
            "target_kl": 1e-9,
            "norm_obs": False,
            "norm_reward": False,
            "norm_adv": False,
            "clip_vloss": False,
            "anneal_lr": False,
        },
    ],
)
def test_every_option_trains(monkeypatch, options):
    seen = record_updates(monkeypatch)
    args = ppo.Args(env_id="Pendulum-v1", total_timesteps=640, run_dir="r", **SHORT | options)
    ppo.train(args)
    if "target_kl" in options:
        assert len(seen) == 10 * 4  # one epoch each
    else:
        assert len(seen) == 10 * 2 and len(seen[0][0][0]) == 64  # one minibatch of 50, 14 dropped
        first, second = seen[0][0], seen[1][0]  # recomputed advantages, same log-probabilities
        assert not torch.equal(first[3], second[3]) and torch.equal(first[2], second[2])


def test_an_environment_that_cannot_be_saved_begins_new_episodes(tmp_path):
    arguments = flags(
        env_id="toy_envs:Opaque-v0",
        num_envs=2,
        total_timesteps=1280,
        anneal_lr=False,
        run_dir="r",
        **SHORT,
    )
    run_script(SCRIPT, *arguments, cwd=tmp_path)
    out = run_script(SCRIPT, "--resume", "r", "--total-timesteps", 2560, cwd=tmp_path).stdout
    assert out.count("new episodes begin") == 1
    assert load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"] == 2560


def test_the_run_folder_holds_what_it_should(tmp_path):
    arguments = flags(env_id="Pendulum-v1", total_timesteps=640, num_envs=2, **SHORT)
    run_script(SCRIPT, *arguments, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("Pendulum-v1__ppo_continuous__1__")
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {
        "best",
        "checkpoint",
        "config",
        "events",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["args"]["num_envs"] == 2
        and config["versions"]["mujoco"]
        and config["num_threads"] == 1
    )
    assert "--num-envs 2" in config["command"] and config["script"] == "ppo_continuous"
    tags = scalars(folder)
    assert set(tags) == {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/learning_rate",
        "losses/loss",
        "losses/value_loss",
        "losses/policy_loss",
        "losses/entropy",
        "losses/old_approx_kl",
        "losses/approx_kl",
        "losses/clipfrac",
        "losses/explained_variance",
        "eval/episodic_return",
        "eval/episodic_length",
    }
    assert [step for step, _ in tags["charts/episodic_return"]] == [
        400,
        400,
    ]  # 200 steps of two environments
    rates = [value for _, value in tags["charts/learning_rate"]]
    assert rates == pytest.approx([3e-4 * (1 - i / 5) for i in range(5)])


def test_logged_returns_are_those_of_the_episodes():
    """Against gymnasium's own statistics of the same episodes, terminated and truncated alike."""
    args = ppo.Args(env_id="InvertedPendulum-v5", total_timesteps=640, run_dir="r", **SHORT)
    ppo.train(args)
    logged = scalars(runs.Path("r"))["charts/episodic_length"]
    steps, lengths = [step for step, _ in logged], [length for _, length in logged]
    assert (
        np.cumsum(lengths).tolist() == steps
    )  # one environment: every step belongs to one episode
    returns = [value for _, value in scalars(runs.Path("r"))["charts/episodic_return"]]
    assert returns == [length - 1 for length in lengths]  # 1 a step, 0 for the step that fails (v5)


def test_every_evaluation_is_filmed(tmp_path):
    """The first episode of each, under a name of its own; classic control renders without a display."""
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    arguments = flags(env_id="Pendulum-v1", total_timesteps=256, eval_every=128, capture_video=True)
    run_script(SCRIPT, *arguments, *flags(run_dir="r", **SHORT), cwd=tmp_path)
    run_script(SCRIPT, "--evaluate", "r", "--capture-video", cwd=tmp_path)
    assert sum(path.stat().st_size > 1000 for path in (tmp_path / "r/videos").glob("*.mp4")) == 3
