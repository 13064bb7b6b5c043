"""PPO as a user runs it: learning, time limits, evaluation, what is logged. Both scripts."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same, command, flags, needs_compiler, scalars

import ppo_continuous
import ppo_discrete
from common import compute, envs, runs
from common.checkpoint import load_checkpoint

SHORT = {"num_envs": 1, "num_steps": 64, "num_minibatches": 4, "update_epochs": 2}
SHORT |= {"eval_episodes": 2, "compile": False, "run_dir": "r"}


def pick(ppo, continuous, discrete):
    """What is the one script's, or the other's."""
    return {ppo_continuous: continuous, ppo_discrete: discrete}[ppo]


def simple(ppo) -> str:
    return pick(ppo, "Pendulum-v1", "MountainCar-v0")  # both 200 steps long


@pytest.mark.parametrize(
    "ppo, env_id, steps",
    [(ppo_continuous, "InvertedPendulum-v5", 40_960), (ppo_discrete, "CartPole-v1", 51_200)],
)
def test_learns_to_balance_a_pole(run, tmp_path, ppo, env_id, steps):
    """With the defaults, which publish 963 (a random policy: 6) and 500 (22) after ten times as many."""
    words = flags(env_id=env_id, total_timesteps=steps, run_dir="r")
    run(f"{ppo.SCRIPT}.py", *words, cwd=tmp_path)
    returns = [value for _, value in scalars(tmp_path / "r")["charts/episodic_return"]]
    assert np.mean(returns[:50]) < 30
    assert np.mean(returns[-20:]) > 100


@pytest.mark.parametrize(
    "end, expected",
    [
        ("truncated", [8.1, 9.0, 10.0, 10.0, 10.0]),  # not what follows the reset
        ("terminated", [0.81 * 2.71, 0.9 * 2.71, 2.71, 1.9, 1.0]),
        ("both", [0.81 * 2.71, 0.9 * 2.71, 2.71, 1.9, 1.0]),
    ],
)
def test_value_at_time_limits(ppo, end, expected):
    """Rewards 0, 0, 1, 1, 1: cut off, with the future of where it was; ended, with none."""
    args = ppo.Args(
        env_id=f"toy_envs:Counter-{end}{pick(ppo, '', '-discrete')}-v0",
        num_envs=4,
        num_steps=32,
        num_minibatches=1,
        update_epochs=10,
        total_timesteps=12_800,
        gamma=0.9,
        learning_rate=0.02,
        max_grad_norm=100.0,
        norm_reward=False,
        norm_obs=False,
        clip_vloss=False,
        eval_episodes=1,
        compile=False,
        run_dir="r",
    )
    agent = ppo.load_agent(ppo.train(args))
    with torch.no_grad():
        _, values = agent(torch.arange(5.0)[:, None])
    np.testing.assert_allclose(values, expected, atol=0.1)
    logged = scalars(Path("r"))
    for tag, value in (("charts/episodic_length", 5.0), ("charts/episodic_return", 3.0)):
        assert [x for _, x in logged[tag]] == [value] * (12_800 // 5)


def record_updates(monkeypatch, ppo) -> list:
    """Have train() leave ([*batch, indices, lr], metrics) of every gradient step."""
    seen = []

    def wrap(function, *_):
        def update(parameters, batch, indices, lr):
            metrics = function(parameters, batch, indices, lr)
            inputs = [x.clone() for x in (*batch, indices, lr)]
            seen.append((inputs, dict(zip(ppo.METRICS, metrics.tolist()))))
            return metrics

        return update

    monkeypatch.setattr(compute, "compile_function", wrap)
    return seen


@pytest.mark.parametrize(
    "ppo, options",
    [
        (ppo_continuous, {}),
        (ppo_continuous, {"squash": True}),
        (ppo_continuous, {"bf16": True, "hidden_sizes": (256, 256)}),
        (ppo_discrete, {"norm_obs": True}),
    ],
)
def test_ratio_is_one_at_the_first_minibatch_of_every_rollout(monkeypatch, ppo, options):
    """Acting, old and new log-probabilities see the same statistics, which then change.

    Every epoch sees every sample once, in an order of its own, and the learning rate falls.
    """
    seen = record_updates(monkeypatch, ppo)
    options = options | SHORT | {"num_envs": 2, "num_steps": 32}
    agent = ppo.load_agent(
        ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=640, ent_coef=0.0, **options))
    )
    assert len(seen) == 10 * 2 * 4 and agent.obs_statistics.count == 640
    for _, metrics in seen[::8]:
        # bfloat16 may be summed in an order that depends on the number of rows
        assert abs(metrics["old_approx_kl"]) < (1e-4 if options.get("bf16") else 1e-6)
        assert metrics["clipfrac"] == 0
        least = 1e-3 if options.get("bf16") else 1e-5
        assert metrics["policy_loss"] == pytest.approx(0, abs=least)  # advantages have mean 0
    assert max(metrics["approx_kl"] for _, metrics in seen) > 1e-5
    indices, rates = zip(*(inputs[-2:] for inputs, _ in seen))
    orders = [tuple(torch.cat(indices[i : i + 4]).tolist()) for i in range(0, 80, 4)]
    assert all(sorted(order) == list(range(64)) for order in orders) and len(set(orders)) == 20
    falling = [ppo.Args.learning_rate * (1 - i / 10) for i in range(10) for _ in range(8)]
    assert torch.stack(rates).tolist() == pytest.approx(falling)
    logged = scalars(Path("r"))
    for name in ppo.METRICS:
        steps, means = zip(*logged[f"losses/{name}"])
        expected = [np.mean([x[name] for _, x in seen[i : i + 8]]) for i in range(0, 80, 8)]
        assert list(steps) == [64 * i for i in range(1, 11)]
        assert means == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_all_environments_share_statistics_and_stored_observations_are_copies(monkeypatch, ppo):
    """With four environments: one mean and variance over all, and no aliased buffers."""
    stored, estimate = [], ppo.estimate

    def spy(agent, rollout, values, args):
        stored.append((rollout.obs.clone(), agent.obs_statistics.count.item()))
        return estimate(agent, rollout, values, args)

    monkeypatch.setattr(ppo, "estimate", spy)
    options = SHORT | {"num_envs": 4, "norm_obs": True}
    agent = ppo.load_agent(ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=1280, **options)))
    assert [count for _, count in stored] == [0, 256, 512, 768, 1024]
    obs = torch.cat([obs[:-1].flatten(0, 1) for obs, _ in stored]).double()
    assert agent.obs_statistics.count == 1280 == len(torch.unique(obs, dim=0))  # none is seen twice
    torch.testing.assert_close(agent.obs_statistics.mean, obs.mean(0))
    torch.testing.assert_close(agent.obs_statistics.var, obs.var(0, correction=0))
    assert torch.equal(stored[1][0][0], stored[0][0][-1])  # the pending one opens the next rollout


def test_a_rollout_holds_what_was_done_and_seen(monkeypatch, ppo):
    """Actions as they were sampled, however the environment's are clipped, and real last
    observations; rewards in units of the discounted returns' deviation; against NumPy.
    """
    seen, finals, epsilons, at_the_edge = [], [], [], 0
    estimate, recv, adam = ppo.estimate, envs.Environments.recv, ppo.tensors.FlatAdam

    def received(self):
        outcome = recv(self)
        finals.extend(outcome[4]["final_obs"][n].copy() for n in np.flatnonzero(outcome[3]))
        return outcome

    def spy(agent, rollout, values, args):
        nonlocal at_the_edge
        at_the_edge += rollout.truncations[-1].sum()
        result = estimate(agent, rollout, values, args)
        sampled, _ = agent.sample(rollout.obs[:-1].flatten(0, 1), rollout.noise.flatten(0, 1))
        actions = np.concatenate(rollout.actions)
        np.testing.assert_allclose(actions, sampled, rtol=1e-4, atol=1e-5)
        assert list(rollout.final_obs) == list(zip(*np.nonzero(rollout.truncations)))
        following = rollout.obs[1:].clone()
        for n, obs in rollout.final_obs.items():
            following[n] = obs
        following = agent(following.flatten(0, 1))[1].numpy() * ~rollout.terminations.ravel()
        var = agent.return_statistics.var.item()
        scaled = np.clip(rollout.rewards.ravel() / np.sqrt(var + 1e-8), -10, 10)
        expected = scaled + 0.9 * following
        np.testing.assert_allclose(result[1], expected, rtol=1e-4, atol=1e-4)
        explained = 1 - np.var(result[1].numpy() - values.numpy()) / np.var(result[1].numpy())
        ends = rollout.terminations | rollout.truncations
        final_obs = [obs.numpy() for obs in rollout.final_obs.values()]
        seen.append((actions, rollout.noise.clone(), final_obs, rollout.rewards.copy(), ends, var))
        seen[-1] += (explained,)
        return result

    def optimizer(parameters, eps):
        epsilons.append(eps)
        return adam(parameters, eps)

    monkeypatch.setattr(ppo, "estimate", spy)
    monkeypatch.setattr(envs.Environments, "recv", received)
    monkeypatch.setattr(ppo.tensors, "FlatAdam", optimizer)
    options = SHORT | {"num_envs": 4, "norm_obs": False, "norm_reward": True, "update_epochs": 1}
    options |= {"gamma": 0.9, "gae_lambda": 0.0, "total_timesteps": 1280, "num_steps": 16}
    args = ppo.Args(env_id=f"toy_envs:{pick(ppo, 'Shaped', 'Buttons')}-v0", **options)
    agent = ppo.load_agent(ppo.train(args))
    actions, noise, final_obs, rewards, ends, variances, explained = zip(*seen)
    assert not torch.equal(noise[0], noise[1])
    assert epsilons == [1e-5] and len(finals) > 20 and at_the_edge > 0
    np.testing.assert_allclose(np.concatenate(final_obs), finals, rtol=1e-6)
    returns, carry = [], np.zeros(4)
    for reward, end in zip(np.concatenate(rewards), np.concatenate(ends)):
        carry = 0.9 * carry + reward
        returns.append(carry)
        carry = np.where(end, 0, carry)
    expected = [1.0, *(np.var(returns[:t]) for t in range(16, 320, 16))]
    np.testing.assert_allclose(variances, expected, rtol=1e-9)
    np.testing.assert_allclose(agent.return_statistics.var, np.var(returns), rtol=1e-9)
    np.testing.assert_allclose(agent.return_statistics.carry, carry, rtol=1e-9)
    logged = [value for _, value in scalars(Path("r"))["losses/explained_variance"]]
    np.testing.assert_allclose(logged, explained, rtol=1e-3, atol=1e-3)
    if ppo is ppo_continuous:
        assert np.concatenate(actions)[:, 1].min() < 0  # the environment's lower bound
        x = torch.stack(noise).double()
        bound = 4 / np.sqrt(x.numel())
        assert abs(x.mean()) < bound and abs(x.var() - 1) < bound * np.sqrt(2)


def test_arguments_can_be_used_again(ppo):
    args = ppo.Args(env_id=simple(ppo), total_timesteps=256, **SHORT)
    ppo.train(args)
    assert args.minibatch_size is None
    args = dataclasses.replace(args, num_steps=128, run_dir="r2")
    ppo.check_args(args)


def test_environments_in_processes_of_their_own_draw_different_numbers(ppo):
    """Also those that draw from the process's generators."""
    drawn = []
    for seed in (1, 2):  # neighbours, which share nothing
        options = {"num_envs": 3, "vectorization": "async", "seed": seed}
        environments = envs.Environments(ppo.Args(env_id="toy_envs:Dice-v0", **options))
        drawn += environments.obs.copy().flatten().tolist()
        workers = environments.vector_env.processes
        assert len(workers) == 3
        for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal's or a scheduler's to all
            for worker in workers:
                os.kill(worker.pid, number)
        environments.step(environments.vector_env.action_space.sample())
        environments.close()
    assert len(set(drawn)) == 18


def test_asynchronous_environments_train_the_same(ppo):
    weights = []
    for vectorization in ("sync", "async"):
        options = SHORT | {"num_envs": 2, "vectorization": vectorization, "run_dir": vectorization}
        run_dir = ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=1280, **options))
        weights.append(dict(ppo.load_agent(run_dir).state_dict()))
    assert_same(*weights)


def test_evaluation_from_the_checkpoint_equals_the_one_in_training(run, tmp_path, ppo):
    env_id, script = pick(ppo, "Hopper-v5", "toy_envs:Buttons-v0"), f"{ppo.SCRIPT}.py"
    arguments = flags(env_id=env_id, total_timesteps=2048, **SHORT | {"eval_episodes": 5})
    trained = run(script, *arguments, cwd=tmp_path).stdout
    line = next(x for x in trained.splitlines() if x.startswith("evaluation of 5 episodes"))
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    assert run(script, "--evaluate", "r", cwd=tmp_path).stdout.strip() == line
    agent, args = ppo.load_agent(tmp_path / "r"), ppo.Args(env_id=env_id, eval_episodes=5)
    returns, lengths = envs.play(agent.act, args, tmp_path)
    logged = scalars(tmp_path / "r")
    assert logged["eval/episodic_return"] == [(2048, pytest.approx(np.mean(returns), rel=1e-6))]
    assert logged["eval/episodic_length"] == [(2048, np.float32(np.mean(lengths)))]
    assert len(set(returns)) == 5  # episodes differ
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("where", ["reward", "observation", "last"])
def test_nan_from_an_environment_stops_the_run_and_leaves_the_last_good_checkpoint(
    run, tmp_path, ppo, where
):
    env_id = f"toy_envs:Broken-{where}{pick(ppo, '', '-discrete')}-v0"
    arguments = flags(env_id=env_id, total_timesteps=6400, checkpoint_every=64, **SHORT)
    done = run(f"{ppo.SCRIPT}.py", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "reward or observation became NaN or infinite" in line and "r/checkpoint.pt" in line
    checkpoint = load_checkpoint(tmp_path / "r" / "checkpoint.pt")
    assert checkpoint["global_step"] == 640
    weights = {name: x for name, x in checkpoint["agent"].items() if name not in ("low", "high")}
    assert all(x.isfinite().all() for x in weights.values())


def test_a_run_says_little_and_how_many_steps_it_makes(ppo, capsys):
    env_id = f"toy_envs:Counter-truncated{pick(ppo, '', '-discrete')}-v0"  # 128 episodes
    ppo.train(ppo.Args(env_id=env_id, total_timesteps=700, **SHORT))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 10 and "640 steps, seed 1" in lines[0]
    assert any(line.endswith("return 3.0 (last 100)") for line in lines)


def test_on_a_terminal_a_bar_shows_speed_time_left_and_recent_returns(tmp_path):
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    words = flags(env_id="Pendulum-v1", total_timesteps=1280, **SHORT)
    script = command(ROOT / "ppo_continuous.py", *words)
    done = subprocess.run(script, cwd=tmp_path, stderr=its, stdout=subprocess.PIPE, text=True)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while chunk := os.read(ours, 4096):
            shown += chunk
    assert done.returncode == 0 and "steps/s" not in done.stdout  # no lines beside the bar
    whole = r"Pendulum-v1: 100%.* 1.28k/1.28k \[\d\d:\d\d<00:00, .*step/s, return -.* \(last 6\)"
    assert re.search(whole, shown.decode())


def test_best_pt_is_the_first_of_the_best(ppo, monkeypatch):
    means = iter([1.0, 3.0, 2.0, 3.0, -1.0])
    monkeypatch.setattr(envs, "play", lambda *_: ([next(means)] * 2, [5, 5]))
    options = SHORT | {"eval_every": 128}
    ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=640, **options))
    best = load_checkpoint(Path("r/best.pt"))
    assert best["global_step"] == 256
    assert_same(dict(ppo.load_agent("r", "best.pt").state_dict()), dict(best["agent"]))
    last = load_checkpoint(Path("r/checkpoint.pt"))["agent"]
    assert not torch.equal(best["agent"]["actor.0.weight"], last["actor.0.weight"])
    assert best["best_return"] == 3.0
    logged = [value for _, value in scalars(Path("r"))["eval/episodic_return"]]
    assert logged == [1.0, 3.0, 2.0, 3.0, -1.0]


def test_best_pt_is_evaluated_on_episodes_that_did_not_choose_it(ppo, monkeypatch):
    seen, stream_seed = set(), envs.stream_seed
    monkeypatch.setattr(envs, "stream_seed", lambda *x: (seen.add(x), stream_seed(*x))[1])
    args = ppo.Args(env_id=simple(ppo), total_timesteps=128, **SHORT)
    ppo.train(args)
    played = [{x for x in seen if x[1] == "eval"}]
    shutil.copy("r/checkpoint.pt", "r/step_128.pt")
    assert_same(*(dict(ppo.load_agent("r", *x).state_dict()) for x in ((), ("step_128.pt",))))
    for path in ("r", "r/checkpoint.pt", "r/best.pt", "r/step_128.pt"):
        seen.clear()
        again = dataclasses.replace(args, evaluate=path)
        runs.evaluate(ppo.load_agent, again, ppo.check_args(again))
        played.append(seen.copy())
    assert [len(x) for x in played] == [6] * 5  # of two episodes: resets, actions, epsilon
    assert played[0] == played[1] == played[2] and played[0].isdisjoint(played[3] | played[4])


@needs_compiler
def test_stacked_frames_train_alike_compiled_and_eagerly(monkeypatch):
    """And of all updates one graph is compiled."""
    runs_of, graphs, progress = {}, [], runs.Run.progress

    def count(self, step):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        progress(self, step)

    monkeypatch.setattr(runs.Run, "progress", count)
    torch._dynamo.utils.counters.clear()
    for compiled in (True, False):
        options = SHORT | {"compile": compiled, "run_dir": f"r{compiled}", "num_threads": 1}
        options |= {"env_id": "pixel_envs:SmallCatch-v0", "num_envs": 2, "total_timesteps": 256}
        args = ppo_discrete.Args(**options)
        runs_of[compiled] = scalars(ppo_discrete.train(args))
        assert args.compile is compiled  # no compiler would leave nothing to compare
    assert graphs == [graphs[0]] * 4 and graphs[0] in (1, 2)  # one is the compiler's trial
    compiled, eager = runs_of[True], runs_of[False]
    assert compiled.keys() == eager.keys() and len(eager["losses/loss"]) == 2
    for tag, values in eager.items():
        np.testing.assert_allclose(compiled[tag], values, rtol=1e-3, atol=1e-5, err_msg=tag)


def test_a_small_board_of_bytes_is_an_observation_like_any_other(ppo):
    if ppo is ppo_continuous:
        pytest.skip("its actions are continuous")
    args = ppo.Args(env_id="pixel_envs:Tiny-v0")
    obs_space, action_space = ppo.check_args(args)
    assert obs_space.shape == (35, 84)
    assert ppo.Agent(obs_space.shape, action_space, args).act(obs_space.sample()) in (0, 1)


def test_nan_loss_stops_the_run(ppo, capsys):
    options = SHORT | {"learning_rate": 1e30}
    with pytest.raises(SystemExit) as stopped:
        ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=640, **options))
    assert stopped.value.code == 1 and "a weight or loss became NaN" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in ppo.load_agent("r").parameters())


def test_weights_gone_wrong_after_finite_losses_stop_the_run(ppo, capsys, monkeypatch):
    def wrap(function, *_):
        def update(parameters, *rest):
            metrics = torch.zeros_like(function(parameters, *rest))
            parameters.fill_(math.nan)
            return metrics

        return update

    monkeypatch.setattr(compute, "compile_function", wrap)
    options = SHORT | {"update_epochs": 1, "num_minibatches": 1, "checkpoint_every": 64}
    with pytest.raises(SystemExit) as stopped:
        ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=128, **options))
    assert stopped.value.code == 1 and "a weight or loss became NaN" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in ppo.load_agent("r").parameters())


def test_an_infinite_reward_is_noticed_though_signs_are_learned_from(ppo, capsys, monkeypatch):
    monkeypatch.setattr(envs, "_number", lambda _: np.inf)
    with pytest.raises(SystemExit) as stopped:
        ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=640, clip_reward=True, **SHORT))
    assert stopped.value.code == 1 and "reward or observation became" in capsys.readouterr().err


def test_signs_of_rewards_are_learned_from_if_asked(ppo, monkeypatch):
    rewards, estimate, seen = itertools.cycle([-0.3, 0.0, 2.5, -7.0]), ppo.estimate, []
    monkeypatch.setattr(envs, "_number", lambda _: next(rewards))

    def spy(agent, rollout, *rest):
        seen.append(rollout.rewards.ravel().tolist())
        return estimate(agent, rollout, *rest)

    monkeypatch.setattr(ppo, "estimate", spy)
    for clip in (True, False):
        options = SHORT | {"clip_reward": clip, "run_dir": f"r{clip}", "eval_episodes": 4}
        ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=64, **options))
    assert seen == [[-1, 0, 1, -1] * 16, [-0.3, 0, 2.5, -7.0] * 16]


def test_infinite_loss_stops_the_run(ppo, capsys, monkeypatch):
    """Weights stay finite, as the gradient is scaled down to nothing."""
    monkeypatch.setattr(envs, "_number", lambda reward: 1e25 * float(reward))
    options = SHORT | {"norm_reward": False, "clip_vloss": False}
    with pytest.raises(SystemExit) as stopped:
        ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=640, **options))
    assert stopped.value.code == 1 and "or loss became NaN or inf" in capsys.readouterr().err


def test_a_users_environment_trains_and_is_loaded_in_three_lines(run, tmp_path, ppo):
    """In a user's own module, where they stand: float64, two axes, bounds or numbers of its own."""
    (tmp_path / "my_module.py").write_text((ROOT / "tests" / "toy_envs.py").read_text())
    env_id = f"my_module:{pick(ppo, 'Shaped', 'Buttons')}-v0"
    words = flags(env_id=env_id, total_timesteps=640, **SHORT | {"norm_obs": True})
    run(f"{ppo.SCRIPT}.py", *words, cwd=tmp_path)
    agent = ppo.load_agent(tmp_path / "r")
    action = agent.act(np.ones((2, 3)))
    assert agent.obs_statistics.mean.shape == (2, 3)
    if ppo is ppo_continuous:
        assert action.shape == (2, 1)
        assert ([[-2], [0]] <= action).all() and (action <= [[1], [0.5]]).all()
    else:
        assert {-1: True, 0: True, 1: True}[action]


@pytest.mark.parametrize(
    "options",
    [
        {
            "ent_coef": 1e-4,
            "lr_schedule": "cosine",
            "vf_loss": "huber",
            "recompute_advantages": True,
            "hidden_sizes": (32, 32, 32),
            "minibatch_size": 50,
            "norm_obs": True,
            "norm_reward": True,
        },
        {"target_kl": 1e9, "hidden_sizes": ()},
        {
            "target_kl": 1e-9,
            "norm_obs": False,
            "norm_reward": False,
            "clip_reward": True,
            "norm_adv": False,
            "clip_vloss": False,
            "anneal_lr": False,
        },
    ],
)
def test_every_option_trains(monkeypatch, ppo, options):
    seen = record_updates(monkeypatch, ppo)
    if ppo is ppo_continuous and "ent_coef" in options:
        options = options | {"squash": True}
    if "minibatch_size" in options:  # in place of the number
        options = options | {"num_minibatches": ppo.Args.num_minibatches}
    ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=640, **SHORT | options))
    if "target_kl" in options:
        assert len(seen) == 10 * 4 * (1 if options["target_kl"] < 1 else 2)  # epochs
    else:
        assert len(seen) == 10 * 2 and len(seen[0][0][0]) == 64  # one minibatch of 50, 14 dropped
        first, second = seen[0][0], seen[1][0]  # new advantages and values, same log-probabilities
        same = [torch.equal(x, y) for x, y in zip(first[:6], second[:6])]
        assert same == [True, True, True, False, False, False]
        for (*_, advantages, values, targets, indices, _), metrics in seen:  # by weights of then
            torch.testing.assert_close(advantages, targets - values, rtol=1e-4, atol=1e-5)
            error = F.huber_loss(values[indices], targets[indices]).item()
            assert metrics["value_loss"] == pytest.approx(error, rel=1e-4)
        logged = [value for _, value in scalars(Path("r"))["losses/explained_variance"]]
        before = [1 - ((x[5] - x[4]).var() / x[5].var()).item() for x, _ in seen[::2]]
        assert logged == pytest.approx(before, rel=1e-3, abs=1e-4)  # of the values before learning


def test_target_kl_is_of_the_last_minibatch_of_an_epoch(monkeypatch, ppo):
    kls, seen = [9.0, 9.0, 9.0, 0.1, 0.0, 0.0, 0.0, 0.6], []  # goes on, then stops

    def wrap(function, *_):
        def update(*inputs):
            metrics = torch.full_like(function(*inputs), 9.0)
            metrics[ppo.METRICS.index("approx_kl")] = kls[len(seen) % 8]
            seen.append(1)
            return metrics

        return update

    monkeypatch.setattr(compute, "compile_function", wrap)
    options = SHORT | {"update_epochs": 3, "target_kl": 0.5}
    ppo.train(ppo.Args(env_id=simple(ppo), total_timesteps=128, **options))
    assert len(seen) == 2 * 8


def test_without_normalised_advantages_a_minibatch_may_be_of_one(ppo):
    options = {"num_envs": 1, "num_steps": 8, "norm_adv": False}
    ppo.check_args(ppo.Args(env_id=simple(ppo), minibatch_size=1, **options))
    ppo.check_args(ppo.Args(env_id=simple(ppo), num_minibatches=8, **options))


def test_a_minibatch_may_be_a_whole_rollout(ppo):
    args = ppo.Args(env_id=simple(ppo), num_envs=2, num_steps=8, minibatch_size=16)
    ppo.check_args(args)
    with pytest.raises(SystemExit):
        ppo.check_args(dataclasses.replace(args, minibatch_size=17))


def test_hidden_sizes_may_be_a_list(ppo):
    ppo.check_args(ppo.Args(env_id=simple(ppo), hidden_sizes=[8, 8]))


def test_the_run_folder_holds_what_it_should(run, tmp_path, ppo):
    options = SHORT | {"num_envs": 2}
    del options["run_dir"]
    arguments = flags(env_id=simple(ppo), total_timesteps=640, **options)
    said = run(f"{ppo.SCRIPT}.py", *arguments, cwd=tmp_path).stdout
    assert "640 steps, seed 1, cpu (no CUDA here), 1 thread(s), eager" in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{simple(ppo)}__{ppo.SCRIPT}__1__")
    names = {path.name.split(".")[0] for path in folder.iterdir() if path.name != ".lock"}
    assert names == {"best", "checkpoint", "config", "events"}
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["num_envs"] == 2 and config["num_threads"] == 1
    assert config["float32_matmul_precision"] == "highest"
    assert config["versions"]["mujoco"] and config["versions"]["ale-py"]
    assert "--num-envs 2" in config["command"] and config["script"] == ppo.SCRIPT
    tags = scalars(folder)
    expected = "charts/episodic_return charts/episodic_length charts/learning_rate "
    expected += "eval/episodic_return eval/episodic_length losses/explained_variance"
    assert set(tags) == {*expected.split(), *(f"losses/{name}" for name in ppo.METRICS)}
    steps = [step for step, _ in tags["charts/episodic_return"]]
    assert steps == [400, 400]  # 200 steps of two environments
    rates = [value for _, value in tags["charts/learning_rate"]]
    assert rates == pytest.approx([ppo.Args.learning_rate * (1 - i / 5) for i in range(5)])


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "toy_envs:Counter-truncated-discrete-v0"])
def test_a_run_folder_is_one_folder_in_runs(env_id, monkeypatch):
    folders = []
    monkeypatch.setattr(runs.Run, "save", lambda run, _: folders.append(run.dir) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ppo_discrete.train(ppo_discrete.Args(env_id=env_id, compile=False))
    (folder,) = folders
    assert folder.parent == Path("runs") and "/" not in folder.name and ":" not in folder.name


def test_an_evaluation_is_played_on_the_device_of_the_run(ppo, monkeypatch):
    asked = []
    monkeypatch.setattr(compute, "setup_torch", lambda *_, **__: torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        load = lambda path, device: asked.append((path, device.type)) or 1 / 0  # noqa: E731
        runs.evaluate(load, ppo.Args(evaluate="r"), (None, None))
    assert asked == [("r", "cuda")]


def test_logged_returns_are_those_of_the_episodes(ppo):
    env_id = pick(ppo, "InvertedPendulum-v5", "CartPole-v1")
    ppo.train(ppo.Args(env_id=env_id, total_timesteps=640, **SHORT))
    logged = scalars(Path("r"))
    steps, lengths = (list(x) for x in zip(*logged["charts/episodic_length"]))
    assert np.cumsum(lengths).tolist() == steps  # every step belongs to one episode
    returns = [value for _, value in logged["charts/episodic_return"]]
    missing = pick(ppo, 1, 0)  # 1 a step, but 0 for the step that fails (v5)
    assert returns == [length - missing for length in lengths] and len(returns) > 10


def test_every_evaluation_is_filmed(run, tmp_path):
    """The first episode of each, under a name of its own; classic control renders without a display."""
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    options = SHORT | {
        "total_timesteps": 256,
        "eval_every": 128,
        "capture_video": True,
        "anneal_lr": False,
    }
    run("ppo_continuous.py", *flags(env_id="Pendulum-v1", **options), cwd=tmp_path)
    run("ppo_continuous.py", "--evaluate", "r/best.pt", "--capture-video", cwd=tmp_path)
    words = "--resume r --total-timesteps 384 --no-capture-video"
    run("ppo_continuous.py", *words.split(), cwd=tmp_path)
    first, *_ = films = sorted((tmp_path / "r" / "videos").glob("*.mp4"))
    assert len(films) == 3 and all(path.stat().st_size > 1000 for path in films)
    first.rename(first.with_name("evaluation-best.mp4"))
    run("ppo_continuous.py", "--evaluate", "r", "--capture-video", cwd=tmp_path)
    names = {path.name for path in first.parent.glob("*.mp4")}
    assert names == {"evaluation-best.mp4", *(f"evaluation-{i}-episode-0.mp4" for i in (1, 2, 3))}
