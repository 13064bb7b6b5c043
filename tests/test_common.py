"""Environments, seeding, checkpoints and parameters."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import multiprocessing
import operator
import os
import random
import re
import runpy
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pixel_envs
import pytest
import threadpoolctl
import torch
import torch.nn as nn
import toy_envs
from conftest import CASES, ROOT, assert_same, each_case, each_script, needs_git, read_args

import dqn_atari
import ppo_continuous
import ppo_discrete
import sac_continuous
from common import arguments, compute, envs, failing, provenance, runs
from common.checkpoint import load_checkpoint, save_checkpoint
from common.compute import to_numpy
from common.seeding import STREAMS, Streams, seed_process, stream_seed
from common.tensors import bounds, flatten_parameters, functional
from ppo_continuous import Args

MUJOCO = [
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
]
CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]
NEEDS_BOX2D = pytest.mark.skipif(not find_spec("Box2D"), reason="needs Box2D")


def make(env_id: str, num_envs: int = 2, seed: int = 1, vectorization: str = "sync"):
    args = Args(env_id=env_id, num_envs=num_envs, seed=seed, vectorization=vectorization)
    return envs.Environments(args)


def sample_actions(environments, steps: int) -> list[np.ndarray]:
    space = environments.vector_env.action_space
    space.seed(1)
    return [space.sample() for _ in range(steps)]


def play(environments, actions: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [[np.copy(x) for x in environments.step(np.copy(action))[:4]] for action in actions]


@pytest.mark.parametrize(
    "env_id, vectorization",
    [
        *((env_id, "sync") for env_id in [*MUJOCO, *CLASSIC]),
        pytest.param("LunarLander-v3", "sync", marks=NEEDS_BOX2D),
        ("toy_envs:Shaped-v0", "sync"),
        ("toy_envs:Buttons-v0", "sync"),
        ("toy_envs:Opaque-v0", "sync"),
        ("toy_envs:Listed-v0", "sync"),
        ("pixel_envs:Catch-v0", "sync"),
        ("Hopper-v5", "async"),
        ("CartPole-v1", "async"),
    ],
)
def test_environments_are_found_again_exactly(env_id, vectorization, tmp_path, capsys):
    """Observations, rewards and ends, through resets, in environments made anew."""
    first, second = (make(env_id, vectorization=vectorization) for _ in range(2))
    if env_id in MUJOCO and vectorization == "sync":  # the third episode is the one found again
        for env in (*first.vector_env.envs, *second.vector_env.envs):
            env.set_wrapper_attr("_max_episode_steps", 20)
    actions = sample_actions(first, 300)
    play(first, actions[:47])
    first.finished_episodes()
    save_checkpoint(tmp_path / "c", first.state_dict())
    pending = first.obs.copy()
    expected = play(first, actions[47:])
    play(second, actions[5:10])  # elsewhere by now
    second.finished_episodes()
    second.load_state_dict(saved := load_checkpoint(tmp_path / "c"))
    assert not second.lost.any() and not capsys.readouterr().out
    assert_same(saved, load_checkpoint(tmp_path / "c"))
    np.testing.assert_array_equal(second.obs, pending)
    assert_same(play(second, actions[47:]), expected)
    rest = first.finished_episodes()
    assert second.finished_episodes() == rest
    ends = sum(sum(a | b) for *_, a, b in expected)
    assert len(rest) == ends
    assert rest or env_id not in (*MUJOCO, "CartPole-v1", "toy_envs:Opaque-v0")
    first.close()
    second.close()


@pytest.mark.parametrize("env_id", ["toy_envs:Shaped-v0", "toy_envs:Buttons-v0"])
def test_environments_are_saved_and_found_again_between_any_two_steps(env_id):
    """Right after a reset too, and again and again."""
    first, second = make(env_id), make(env_id)
    for action in sample_actions(first, 100):
        second.load_state_dict(first.state_dict())
        assert_same(play(second, [action]), play(first, [action]))
        first.finished_episodes()
        second.finished_episodes()
        assert_same(first.state_dict(), second.state_dict())


def test_an_episode_of_which_not_all_actions_are_known_begins_anew(capsys):
    first, second = (make("toy_envs:Counter-truncated-v0") for _ in range(2))
    saved = first.state_dict()
    saved["lengths"][1] = 10**6 + 1
    second.load_state_dict(saved)
    assert second.lost.tolist() == [False, True] and "new episodes" in capsys.readouterr().out
    env, _ = first.vector_env.envs
    env.actions = [None] * (10**6 - 1)
    for _ in range(2):
        env.step(np.zeros(1, np.float32))
    assert len(env.actions) == 10**6


def test_an_environment_that_does_not_repeat_itself_begins_new_episodes(monkeypatch, capsys):
    """Only that one, in one line; here it is the episodes whose seed is odd."""
    monkeypatch.setattr(toy_envs.Unseeded, "drawn", itertools.count())  # as in any order of tests
    first = make("toy_envs:Unseeded-v0", num_envs=8)
    while not 0 < first.lengths.min():
        play(first, sample_actions(first, 3))
        first.finished_episodes()
    saved, pending = first.state_dict(), first.obs.copy()
    episodes = [episode for episode, _ in saved["histories"]]
    odd = np.array([stream_seed(1, "env", i, e) % 2 for i, e in enumerate(episodes)], bool)
    assert 0 < odd.sum() < 8
    second = make("toy_envs:Unseeded-v0", num_envs=8)
    second.load_state_dict(saved)
    assert second.lost.tolist() == odd.tolist()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "new episodes" in out
    assert (second.returns[odd] == 0).all() and (second.lengths[odd] == 0).all()
    assert_same(second.returns[~odd], first.returns[~odd])
    assert_same(second.lengths[~odd], first.lengths[~odd])
    np.testing.assert_array_equal(second.obs[~odd], pending[~odd])
    for i in range(8):
        episode, actions = second.vector_env.get_attr("history")[i]
        assert (episode, len(actions)) == (episodes[i] + odd[i], (not odd[i]) * first.lengths[i])
        if odd[i]:
            env = gym.make("toy_envs:Shaped-v0")
            obs, _ = env.reset(seed=stream_seed(1, "env", i, episode))
            np.testing.assert_array_equal(second.obs[i], obs)
    play(second, sample_actions(second, 30))


def test_an_environment_that_was_found_is_not_reset_again_where_another_was_lost():
    first, second = (make("toy_envs:Worn-v0", num_envs=2) for _ in range(2))
    play(first, [np.array(x) for x in ([1, 0], [0, 0], [0, 0])])
    second.load_state_dict(first.state_dict())  # each is reset twice: the second was once, before
    assert second.lost.tolist() == [False, True]
    assert second.obs.tolist() == [[2, 2], [3, 0]]
    assert second.lengths.tolist() == [2, 0]
    play(second, [np.array([0, 0])])
    assert second.obs.tolist() == [[3, 0], [3, 1]]


@pytest.mark.parametrize(
    "env_id, cls",
    [
        ("toy_envs:Counter-truncated-v0", toy_envs.Counter),
        ("pixel_envs:SmallCatch-v0", pixel_envs.Catch),
    ],
)
def test_an_episode_that_fails_when_repeated_is_lost(env_id, cls, monkeypatch):
    """As one may whose actions are not allowed in every state."""

    def refuse(*_):
        raise AssertionError("not allowed here")

    first, second = make(env_id), make(env_id)
    play(first, sample_actions(first, 3))
    saved = first.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", refuse)
        second.load_state_dict(saved)
    assert second.lost.all() and not second.lengths.any()
    assert not second.obs[:, -1:].any() or cls is pixel_envs.Catch


def test_rewards_may_be_arrays_of_one_number():
    for vectorization in ("sync", "async"):
        environments = make("toy_envs:Arrays-v0", vectorization=vectorization)
        play(environments, sample_actions(environments, 5))
        assert environments.finished_episodes() == [(3.0, 5, 10)] * 2
        environments.close()
    returns, lengths = envs.play(lambda _: np.zeros(1), Args(env_id="toy_envs:Arrays-v0"), Path())
    assert returns == [3.0] * 10 and lengths == [5] * 10


def test_evaluation_draws_from_process_wide_generators_the_same_and_leaves_them():
    """For environments that draw from these."""

    def states():
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()
        return str((generators, torch.get_float32_matmul_precision()))

    def act(obs):
        seen[-1].append(obs.tolist())
        return np.zeros(1)

    def fail(obs):
        raise ValueError

    seen, args = [], Args(env_id="toy_envs:Dice-v0", eval_episodes=2)
    torch.set_float32_matmul_precision("medium")
    for seed in (1, 1, 2):
        torch.manual_seed(len(seen)), random.seed(len(seen)), np.random.seed(len(seen))
        before = states()
        seen.append([])
        envs.play(act, dataclasses.replace(args, seed=seed), Path())
        assert states() == before
        with pytest.raises(ValueError):
            envs.play(fail, args, Path())
        assert states() == before
    torch.set_float32_matmul_precision("highest")
    assert seen[0] == seen[1] and len({x for obs in seen[0] + seen[2] for x in obs}) == 60
    seen.append([])
    envs.play(lambda obs: (np.random.rand(), act(obs))[1], args, Path())
    second = len(seen[0]) // 2
    assert seen[3][second] == seen[0][second]  # whatever was drawn in the first episode


def test_a_renderer_is_chosen_before_the_environment_that_is_filmed(monkeypatch):
    """Also where `play` is called from Python, and nothing was checked before."""
    order = []
    monkeypatch.setattr(envs, "prepare_video", lambda: order.append("renderer"))
    monkeypatch.setattr(envs, "make_env", lambda *_: order.append("env") or 1 / 0)
    for filmed in (False, True):
        with pytest.raises(ZeroDivisionError):
            envs.play(None, Args(capture_video=filmed), Path())
    assert order == ["env", "renderer", "env"]


def test_videos_that_cannot_be_written_end_in_one_line(tmp_path, capsys):
    (tmp_path / "videos").write_text("")
    args = Args(env_id="CartPole-v1", capture_video=True)
    with pytest.raises(SystemExit, match="2"):
        envs.play(lambda _: 0, args, tmp_path)
    assert capsys.readouterr().err.startswith("error: --capture-video: ")


def test_an_episode_that_ends_early_when_repeated_is_lost(monkeypatch):
    first = make("toy_envs:Counter-truncated-v0")
    play(first, sample_actions(first, 3))
    saved = first.state_dict()
    monkeypatch.setattr(toy_envs.Counter, "last", 2)
    second = make("toy_envs:Counter-truncated-v0")
    second.load_state_dict(saved)
    assert second.lost.all() and not second.obs.any()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_that_end_at_different_times_are_those_alone(vectorization):
    environments = make("CartPole-v1", num_envs=3, vectorization=vectorization)
    alone = [envs.Replayable(Args(env_id="CartPole-v1", seed=1), i) for i in range(3)]
    shown = [env.reset()[0] for env in alone]
    ended = 0
    for actions in sample_actions(environments, 100):
        np.testing.assert_array_equal(environments.obs, shown)
        _, _, terminated, _, infos = environments.step(actions)
        for n, env in enumerate(alone):
            shown[n], _, over, _, _ = env.step(actions[n])
            assert over == terminated[n]
            if over:
                ended += 1
                np.testing.assert_array_equal(infos["final_obs"][n], shown[n])
                shown[n], _ = env.reset()
    assert ended > 5
    environments.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("end", ["truncated", "terminated", "both"])
def test_environments_reset_in_the_step_that_ends_an_episode(vectorization, end):
    """No false transition between episodes, the real last observation at hand, one kind of end."""
    environments = make(f"toy_envs:Counter-{end}-v0", vectorization=vectorization)
    seen = [environments.obs.copy()]
    for t, action in enumerate(sample_actions(environments, 10), start=1):
        obs, rewards, terminated, truncated, infos = environments.step(action)
        seen.append(obs.copy())
        over = t % 5 == 0
        assert rewards.tolist() == [float((t - 1) % 5 > 1)] * 2
        assert truncated.tolist() == [over and end == "truncated"] * 2
        assert terminated.tolist() == [over and end != "truncated"] * 2
        assert ("final_obs" in infos) == over and "t" not in infos  # which nothing needs
        if over:
            assert [x.tolist() for x in infos["final_obs"]] == [[2.0], [2.0]]
    assert [int(x[0, 0]) for x in seen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    environments.close()


def test_spaces_may_be_properties():
    assert make("toy_envs:Fixed-v0").obs.shape == (2, 1)


def test_games_and_processes_step_in_the_background():
    environments = make("CartPole-v1", vectorization="async")
    environments.send(np.zeros(2, np.int64))
    assert environments.vector_env._state.value == "step"
    environments.recv()
    environments.close()
    games = envs.Environments(ppo_discrete.Args(env_id="ALE/Breakout-v5", num_envs=1))
    games.send(np.zeros(1, np.int64))
    assert len(games.vector_env.actions[0]) == 1  # begun
    games.recv()


def test_workers_can_be_ended_though_they_heed_no_signal():
    workers = make("CartPole-v1", vectorization="async").vector_env.processes
    for worker in workers:
        worker.terminate()
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2


def test_finished_episodes_are_all_that_terminated_or_were_truncated():
    """Against sums over slices of the same rewards; read in uneven pieces."""
    environments = make("toy_envs:Shaped-v0", num_envs=3)
    actions, got, steps = sample_actions(environments, 300), [], []
    for part in (actions[:33], actions[33:34], actions[34:]):
        steps += play(environments, part)
        got += environments.finished_episodes()
    assert environments.finished_episodes() == []
    _, rewards, terminated, truncated = (np.array(x) for x in zip(*steps))
    assert terminated.any() and truncated.any() and not (terminated & truncated).any()
    expected = []
    for n in range(3):
        begin = 0
        for t in np.flatnonzero(terminated[:, n] | truncated[:, n]):
            total = rewards[begin : t + 1, n].sum()
            expected.append((t, n, pytest.approx(total), t + 1 - begin))
            begin = t + 1
    expected.sort(key=lambda x: x[:2])
    assert got == [(total, length, (t + 1) * 3) for t, n, total, length in expected]


def test_cudas_generator_is_seeded_when_a_run_begins_and_not_by_evaluations(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Streams(1, (), torch.device("cpu"))
    assert seeded == [stream_seed(1, "init")]
    seed_process(1)
    assert len(seeded) == 1


def test_a_seed_means_what_it_meant():
    """Else no run made before would find its episodes again."""
    assert (stream_seed(1, "env", 2, 3), stream_seed(0, "numpy")) == (3582361221, 23012616)
    assert STREAMS[2:6] == ("action", "minibatch", "replay", "eval")


def test_streams_of_neighbouring_seeds_are_disjoint():
    seeds = [
        stream_seed(seed, name, *i)
        for seed in range(20)
        for name in STREAMS
        for i in [(), *((j,) for j in range(10)), *((j, k) for j in range(5) for k in range(5))]
    ]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= stream_seed(1, "env", 0, 0) < 2**32  # what environments may take at most


def test_every_stream_of_every_seed_draws_numbers_of_its_own_and_goes_on_where_it_was():
    def draw() -> list[tuple]:
        drawn = [torch.rand(4, generator=x).tolist() for x in streams.values()]
        drawn += [torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random()]]
        return [*map(tuple, drawn), tuple(np.random.normal(size=3)), (random.gauss(0, 1),)]

    drawn = []
    for seed in (1, 2):
        streams = Streams(seed, ("action", "minibatch", "replay"), torch.device("cpu"))
        drawn += draw()
        state = streams.state_dict()
        drawn += (following := draw())
        streams.load_state_dict(state)
        assert draw() == following
    assert len(set(drawn)) == 32


def test_episodes_of_an_evaluation_are_seeded_by_seed_and_number(monkeypatch):
    """And so are their random actions; training has other seeds."""
    reset, seeds = toy_envs.Counter.reset, []

    def note(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed)

    monkeypatch.setattr(toy_envs.Counter, "reset", note)
    args = SimpleNamespace(env_id="toy_envs:Counter-truncated-v0", seed=3, eval_episodes=2)
    args.render, args.capture_video, args.eval_e = False, False, 0.0
    precisions = []

    def act(obs):
        precisions.append(torch.get_float32_matmul_precision())
        return np.zeros(1, np.float32)

    torch.set_float32_matmul_precision("medium")
    envs.play(act, args, Path())
    assert set(precisions) == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    assert seeds == [stream_seed(3, "eval", 0), stream_seed(3, "eval", 1)]
    args.env_id, args.eval_e = "CartPole-v1", 1.0
    assert envs.play(None, args, Path()) == envs.play(None, args, Path())


def test_every_episode_has_a_seed_of_its_own():
    """From seed, environment and episode: neighbouring seeds share none, nor does their number."""
    begins = {}
    for seed in (1, 2):
        environments = make("toy_envs:Counter-terminated-v0", num_envs=3, seed=seed)
        seeds = [[] for _ in range(3)]
        for env, kept in zip(environments.vector_env.envs, seeds):
            env.env.reset = lambda *, seed, options=None, kept=kept, reset=env.env.reset: (
                kept.append(seed),
                reset(seed=seed, options=options),
            )[1]
        play(environments, sample_actions(environments, 15))
        begins[seed] = seeds
        assert seeds == [[stream_seed(seed, "env", i, e) for e in (1, 2, 3)] for i in range(3)]
    assert len({x for seeds in begins.values() for kept in seeds for x in kept}) == 18
    space, like = environments.vector_env.envs[0].action_space, gym.spaces.Box(-1, 1, (1,))
    like.seed(stream_seed(2, "env", 0, 3, 0))  # not the episode's own
    assert space == like and space.sample() == like.sample()
    a, b, more = (make("Pendulum-v1", n, seed).obs for n, seed in ((2, 1), (2, 2), (4, 1)))
    assert len(np.unique(np.concatenate([a, b]), axis=0)) == 4
    np.testing.assert_array_equal(more[:2], a)


def test_a_checkpoint_is_on_disk_before_it_takes_its_name(monkeypatch):
    done, sizes = [], []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(owner, name)

        def note(*args, real=real, name=name):
            done.append(name)
            sizes.append(os.stat(args[0]).st_size)  # of what the system has, not Python's buffer
            return real(*args)

        monkeypatch.setattr(owner, name, note)
    save_checkpoint(Path("checkpoint.pt"), {})
    assert done == ["fsync", "replace"] and load_checkpoint(Path("checkpoint.pt")) == {}
    assert sizes == 2 * [os.stat("checkpoint.pt").st_size]


def test_what_is_loaded_takes_memory_only_where_it_is_copied_to(tmp_path):
    """A replay of 7 GB would be there twice, when its run is resumed or evaluated."""
    path, status = tmp_path / "checkpoint.pt", Path("/proc/self/status")

    def anonymous():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    modes = []
    with mock.patch.object(torch, "load", lambda *_, **kw: modes.append(kw["mmap"])):
        save_checkpoint(path, {"replay": torch.ones(2**24)})  # 64 MiB
    assert modes == [True]
    before = anonymous() if status.exists() else 0
    replay = load_checkpoint(path)["replay"]
    save_checkpoint(path, {"replay": torch.zeros(2)})  # of a run that goes on
    assert replay.sum() == 2**24
    assert not status.exists() or anonymous() - before < 16


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": torch.zeros(10**6)})  # larger than a CNN
    whole = path.read_bytes()
    assert len(load_checkpoint(path)["x"]) == 10**6
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    def refused(why):
        with pytest.raises(SystemExit) as stopped:
            load_checkpoint(path)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and why in line and str(path) in line

    for content, why in (
        (b"", "empty"),
        (whole[: len(whole) // 2], "damaged"),
        (b"GIF89a" * 99, "damaged"),
        (whole.replace(bytes(4000), b"?" + bytes(3999), 1), "damaged"),  # one weight
    ):
        path.write_bytes(content)
        refused(why)
    torch.save({"weights": torch.zeros(3)}, path)
    refused("not a checkpoint of these scripts")
    torch.save({"format": "single-file-rl checkpoint", "version": 99, "state": {}}, path)
    refused("version 99")
    with monkeypatch.context() as patch:  # which nobody is to take for a lost run
        for error in (OSError(5, "Input/output error"), RuntimeError("unable to mmap 7 bytes")):
            patch.setattr(torch, "load", mock.Mock(side_effect=error))
            refused("cannot be read")
    torch.save(Evil(), path)
    refused("damaged or not a checkpoint")
    assert not (tmp_path / "pwned").exists()


def test_parameters_are_views_of_one_vector():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = [parameter.clone() for parameter in module.parameters()]
    flat = flatten_parameters(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    flat.mul_(2)
    assert all(torch.equal(2 * a, b) for a, b in zip(before, module.parameters()))
    module.load_state_dict({name: torch.ones_like(x) for name, x in module.state_dict().items()})
    assert torch.equal(flat, torch.ones(26))


def test_a_compiled_graph_takes_the_vector_and_not_its_views_too():
    """Overlapping inputs, of which one is changed in place, would cost a wrapper and a copy."""
    module, taken = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), []
    flat, x = flatten_parameters(module), torch.ones(1, 3)

    def step(parameters, x):
        y = functional(module, bf16=False)(parameters, x)
        parameters -= 1
        return y

    def backend(graph, inputs):
        taken.extend(inputs)
        return graph

    expected = module(x)
    got = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(flat, x)
    assert torch.equal(got, expected) and [tuple(y.shape) for y in taken] == [(26,), (1, 3)]


def test_due_is_a_pure_function_of_the_step():
    def due(every, step, before, last_step=10**9):
        return runs.Run.due(SimpleNamespace(step=before, last_step=last_step), every, step)

    got = [due(100, step, step - 64) for step in range(64, 64 * 7, 64)]
    assert got == [False, True, False, True, True, False]
    assert not due(0, 10**8, 0)
    assert not due(64, 640, 576, last_step=640)  # the end is a matter of its own


def test_progress_is_that_since_the_run_went_on(monkeypatch, capsys):
    """Speed and time left of a resumed run; a line every ten seconds."""
    logged, bar = [], SimpleNamespace(disable=True, update=lambda _: None)
    bar.set_postfix_str = lambda *_, **__: None
    state = {"first_step": 1000, "step": 1000, "last_step": 9000, "start": 0.0, "printed": 0.0}
    run = SimpleNamespace(**state, returns=[], bar=bar, signal=0, saved=0)
    run.scalars = lambda values, step: logged.append((step, values["charts/SPS"]))
    run._say = runs.say
    said = []
    for now, step in ((5.0, 1500), (14.9, 2490), (15.1, 2510), (25.0, 3500), (80.0, 9000)):
        monkeypatch.setattr(runs.time, "perf_counter", lambda now=now: now)
        runs.Run.progress(run, step)
        said.append(capsys.readouterr().out)
    assert logged == [(step, pytest.approx(100)) for step in (1500, 2490, 2510, 3500, 9000)]
    assert said[0] == "1,500 of 9,000 steps (17%) | 100 steps/s | 01:15 left | \n"
    assert [bool(line) for line in said] == [True, False, True, False, True]


def test_an_evaluation_is_described_by_mean_deviation_and_least():
    said = "evaluation of 2 episodes: return 2.0 ± 1.0 (min 1.0), length 15"
    assert runs.describe([1.0, 3.0], [10, 20]) == said


def test_the_fingerprint_of_code_is_of_the_script_and_common_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "common" / "provenance.py"))
    (tmp_path / "common").mkdir()
    seen = []
    for path in ("mine.py", "common/envs.py", "mine.py", "other.py", "README.md"):
        with (tmp_path / path).open("a") as file:
            file.write("1")
        seen.append(provenance.code("mine"))
    assert len(set(seen[:3])) == 3 and seen[2] == seen[3] == seen[4]


@needs_git
def test_the_commit_of_a_run_says_if_scripts_had_changed_or_were_new(tmp_path, monkeypatch):
    def git(*words):
        done = subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, check=True)
        return done.stdout.decode().strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "common" / "provenance.py"))
    assert provenance.record(torch.device("cpu"))["commit"] is None
    for name in ("a.py", "notes.txt"):
        (tmp_path / name).write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "1"], ["tag", "v1"]):
        git(*words)
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("2")
    assert provenance.record(torch.device("cpu"))["commit"] == commit
    for path, content in (("a.py", "2"), ("mine.py", "1")):
        (tmp_path / path).write_text(content)
        assert provenance.commit() == f"{commit}-dirty"
        git("add", "a.py")
        git(*who, "commit", "-qm", "2", "--allow-empty")
        commit = git("rev-parse", "HEAD")
    monkeypatch.setattr(provenance.subprocess, "run", lambda *_, **__: open("/no/git"))
    assert provenance.commit() == ""


def test_what_is_compiled_twice_in_a_process_keeps_what_it_closes_over(monkeypatch, capsys):
    """As when a notebook trains twice: the second run has its own arguments and network."""
    compile_, options, compiled = torch.compile, [], []

    def spy(*args, **kwargs):  # no code is generated: what guards it is the point
        options.append(dict(kwargs.pop("options")))
        guards = {name: x for name, x in options[-1].items() if name == "guard_filter_fn"}
        return compile_(*args, backend="eager", options=guards, **kwargs)

    def make(factor, network):
        return lambda x, number: factor * number * network(x)

    monkeypatch.setattr(torch, "compile", spy)
    networks, x = [torch.nn.Linear(3, 3) for _ in range(2)], torch.ones(2, 3)
    with torch.no_grad():
        for factor, network in zip((2.0, 3.0), networks):
            function, args = make(factor, network), SimpleNamespace(compile=True)
            compiled.append(
                (compute.compile_function(function, args, torch.device("cpu")), function)
            )
        for number in (1.0, 5.0):
            for got, expected in compiled:
                torch.testing.assert_close(got(x, number), expected(x, number))
    assert sum("guard_filter_fn" in x for x in options) == 2  # which is what could confuse them
    assert all(x["cpp_wrapper"] for x in options)
    assert capsys.readouterr().out == "compiling <lambda>\n" * 2  # once for each


def test_tracing_leaves_the_random_numbers_of_layers_alone():
    layer = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).requires_grad_(False)
    before = torch.get_rng_state()
    args = SimpleNamespace(compile=True)
    act = to_numpy(lambda x: (layer(x),), args, torch.ones(1, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert not all(np.array_equal(act(torch.ones(1, 3)), act(torch.ones(1, 3))) for _ in range(20))


@pytest.mark.parametrize("script", [ppo_discrete, dqn_atari])
@torch.no_grad()
def test_convolutions_act_in_pytorch_as_is_expected_of_them(script, capsys):
    agent = script.Agent((4, 84, 84), gym.spaces.Discrete(3), script.Args())
    act = to_numpy(agent.sample, agent.args, torch.zeros(2, 4, 84, 84), torch.zeros(2, 3))
    assert act.__name__ == "untraced"
    assert capsys.readouterr().out == ""


@each_script
def test_what_acting_is_compared_on_has_noise(script, options, monkeypatch):
    """Without, a mistake in what is done with the noise would hide."""
    monkeypatch.setattr(compute, "to_numpy", lambda *x: x[-1].abs().min().item() and 1 / 0)
    options = options | {"total_timesteps": 128, "run_dir": "r"}
    with pytest.raises(ZeroDivisionError):
        script.train(script.Args(**options | {"compile": False}))


def test_a_wrong_operation_is_noticed_even_in_ppos_first_policy(monkeypatch, capsys):
    """Whose means are below 0.01, beside noise of 1."""
    torch.manual_seed(0)
    monkeypatch.setitem(compute.OPERATIONS, "tanh", "0 * {0}")
    args, box = Args(), gym.spaces.Box(-1, 1, (6,))
    agent = ppo_continuous.Agent((17,), box, args).requires_grad_(False)
    to_numpy(agent.sample, args, torch.randn(1, 17), torch.ones(1, 6))
    assert "acting in PyTorch" in capsys.readouterr().out


def test_rounding_does_not_decide_where_it_acts(capsys):
    """A resumed run, whose weights are others, is to decide as it did at first."""
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 64).requires_grad_(False), 1e3 * torch.randn(1, 512)
    offset = layer(x)  # what is left of it is rounding
    act = to_numpy(lambda x: (layer(x) - offset,), SimpleNamespace(compile=True), x)
    assert act.__name__ == "traced" and not capsys.readouterr().out


def test_bounds_are_within_those_of_the_space_and_in_order():
    space = gym.spaces.Box(np.array([0.1, -0.3, 0.7]), np.array([0.1, 0.3, 0.7]), dtype=np.float64)
    low, high = (x.numpy() for x in bounds(space))
    assert float(low[1]) >= -0.3 and float(high[1]) <= 0.3
    assert low[0] == high[0] == pytest.approx(0.1) and low[2] == high[2] == pytest.approx(0.7)
    assert bounds(gym.spaces.Box(-2.0, 1.0, ())) == (-2, 1)


@pytest.mark.parametrize("name", ["ppo", "ppo-squash", "sac"])
def test_actions_may_have_no_axis(name):
    script, options = CASES[name]
    options = options | {"env_id": "toy_envs:Dial-v0", "total_timesteps": 64, "compile": False}
    agent = script.load_agent(script.train(script.Args(**options, run_dir="r")))
    action = agent.act(np.zeros(1))
    assert np.shape(action) == () and -2 <= action <= 1


def train_in_a_child():
    os.setsid()  # as a scheduler's worker may: it cannot change its process group
    group, numbers = os.getpgid(0), random.getstate()
    make("CartPole-v1").close()
    assert os.getpgid(0) == group and random.getstate() == numbers


def test_who_trains_in_a_child_process_is_no_worker():
    child = multiprocessing.get_context("fork").Process(target=train_in_a_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("asked", [True, False])
def test_algorithms_on_a_gpu_are_deterministic_as_asked(monkeypatch, asked):
    def use(deterministic):
        raise LookupError(deterministic)  # before anything goes to the GPU

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: not asked)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", use)
    args = sac_continuous.Args(device="cuda", torch_deterministic=asked, num_threads=1)
    with pytest.raises(LookupError) as called:
        compute.setup_torch(args, large=True)
    assert called.value.args == (asked,)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # as it demands


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(SystemExit):
        compute.setup_torch(sac_continuous.Args(bf16=True), large=True)
    assert capsys.readouterr().err == "error: --bf16: this GPU does not compute in bfloat16\n"


@pytest.mark.parametrize(
    "native, instruction, machine, evaluate, warned",
    [
        (False, False, "x86_64", None, True),
        (None, True, "x86_64", None, True),
        (True, True, "x86_64", None, False),
        (True, False, "x86_64", None, True),  # imitated with AVX-512
        (True, False, "aarch64", None, False),
        (False, False, "x86_64", "r", False),
    ],
)
def test_bfloat16_that_is_emulated_is_said_to_be_slow(
    native, instruction, machine, evaluate, warned, monkeypatch, capsys
):
    """None: PyTorch without oneDNN, which cannot be asked."""
    ask = pytest.fail if native is None else lambda: native
    monkeypatch.setattr(compute.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instruction)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: native is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", ask, raising=False)
    compute.setup_torch(sac_continuous.Args(bf16=True, device="cpu", evaluate=evaluate), "cuda")
    assert ("far slower" in capsys.readouterr().out) == warned


def test_what_fails_as_it_may_is_one_line(capsys):
    full = torch.OutOfMemoryError("CUDA out of memory.\nTry")
    for error, why in ((full, "CUDA out of memory. Try"), (MemoryError(), "MemoryError")):
        with pytest.raises(SystemExit), failing("--buffer-size 9", RuntimeError, MemoryError):
            raise error
        assert capsys.readouterr().err == f"error: --buffer-size 9: {why}\n"
    with pytest.raises(ValueError), failing("x", RuntimeError):
        raise ValueError("is a bug, which keeps its traceback")


@pytest.mark.parametrize("cores, most", [(1, 1), (3, 3), (6, 4)])
def test_at_most_four_threads_are_taken_unasked(cores, most, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    assert runpy.run_path(compute.__file__)["MOST_THREADS"] == most


def test_threads_do_not_depend_on_what_ran_before(monkeypatch):
    monkeypatch.setattr(compute, "MOST_THREADS", 3)
    before = torch.get_num_threads()
    for given, large, expected in ((0, True, 3), (0, False, 1), (2, True, 2)):
        torch.set_num_threads(1)
        args = sac_continuous.Args(device="cpu", num_threads=given)
        compute.setup_torch(args, large=large)
        assert args.num_threads == torch.get_num_threads() == expected
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["ppo", "ppo-discrete", "ppo-atari", "sac", "dqn"])
def test_auto_takes_a_gpu_for_images_sac_and_dqn(name, monkeypatch):
    def setup_torch(args, large):
        raise LookupError(large)

    monkeypatch.setattr(compute, "setup_torch", setup_torch)
    script, options = CASES[name]
    large = name not in ("ppo", "ppo-discrete")
    with pytest.raises(LookupError, match=f"^{large}$"):
        script.train(script.Args(**options))


@pytest.mark.parametrize("bits", [8, 11])  # of bfloat16 and TF32
def test_products_are_not_taken_in_a_precision_that_errs(bits, monkeypatch):
    matmul = torch.Tensor.__matmul__

    def cut(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    def product(a, b):
        return matmul(cut(a), cut(b)) if a.dtype == torch.float32 else matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    compute.setup_torch(sac_continuous.Args(device="cpu", num_threads=1), large=True)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("size, precision", [(64, "highest"), (256, "medium")])
def test_wide_layers_are_multiplied_by_onednn_and_a_gpu_is_for_large_networks(
    size, precision, monkeypatch
):
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(size))  # an exact product
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = ppo_continuous.Args(hidden_sizes=(size,), num_threads=1)
    assert compute.setup_torch(args, large=False).type == "cpu"
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.filterwarnings("ignore:.*is being initialised with render_mode")
@pytest.mark.parametrize(
    "mode, picture, why",
    [
        ("rgb_array", ZeroDivisionError("a flat camera"), "a flat camera"),
        ("rgb_array", [None], "it keeps no render_mode, or render() gives no array"),
        (None, [np.zeros((8, 8, 3), np.uint8)], "it keeps no render_mode, or render() gives no"),
    ],
)
def test_a_renderer_that_fails_is_noticed_before_the_training(
    mode, picture, why, monkeypatch, capsys
):
    class Undrawn(toy_envs.Counter):
        metadata = {"render_modes": ["rgb_array"]}
        render_mode, render = mode, mock.Mock(side_effect=picture)

    monkeypatch.setattr(envs, "prepare_video", lambda: None)
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry.copy())
    gym.register("Undrawn-v0", lambda render_mode=None: Undrawn())
    args = ppo_continuous.Args(env_id="Undrawn-v0", capture_video=True)
    with pytest.raises(SystemExit):
        envs.check_spaces(args, gym.spaces.Box, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: Undrawn-v0 cannot be drawn here: {why}")


@pytest.mark.filterwarnings("ignore:.*is being initialised with render_mode")
def test_what_cannot_be_shown_in_a_window_is_said_in_one_line(capsys):
    args = Args(env_id="toy_envs:Counter-truncated-v0", render=True)  # which takes no render_mode
    with pytest.raises(SystemExit, match="2"):
        envs.check_spaces(args, gym.spaces.Box, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert "Counter-truncated-v0 cannot be drawn here: " in line


def test_mujoco_that_cannot_be_drawn_says_which_package_would_do_it(monkeypatch, capsys):
    monkeypatch.delenv("DISPLAY", raising=False)
    order, make_env = [], envs.make_env
    monkeypatch.setattr(envs, "prepare_video", lambda: order.append("renderer"))
    monkeypatch.setattr(envs, "make_env", lambda *x: order.append("env") or make_env(*x))
    broken = mock.Mock(side_effect=OSError("EGL"))
    monkeypatch.setattr("gymnasium.envs.mujoco.MujocoEnv.render", broken)
    args = ppo_continuous.Args(env_id="Hopper-v5", capture_video=True)
    with pytest.raises(SystemExit):
        envs.check_spaces(args, gym.spaces.Box, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: Hopper-v5 cannot be drawn here (apt install libosmesa6): EGL"
    assert order[0] == "renderer"  # an environment keeps the one that it was made with


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    for error in (RuntimeError("unable to mmap 7 bytes"), OSError(19, "No such device")):
        with monkeypatch.context() as patch:  # that it cannot be mapped is no failed save
            patch.setattr(torch, "load", mock.Mock(side_effect=error))
            save_checkpoint(tmp_path / "checkpoint.pt", {"x": torch.ones(4)})
    assert load_checkpoint(tmp_path / "checkpoint.pt")["x"].sum() == 4
    save_checkpoint(tmp_path / "checkpoint.pt", {"x": torch.ones(3)})
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        torn = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos\nframe #0")
        patch.setattr(torch, "save", mock.Mock(side_effect=torn))  # as its zip writer does
        save_checkpoint(tmp_path / "checkpoint.pt", {})
    assert capsys.readouterr().err.endswith("unexpected pos\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="1"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"x": torch.zeros(3)})
    assert "checkpoint.pt could not be written: [Errno 28] No space" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["x"].sum() == 3


FLUSH = """
import platform, torch
import sac_continuous
from common import compute
compute.setup_torch(sac_continuous.Args(device="cpu", num_threads=2), large=True)
tiny = torch.full((1_000_000,), 1e-30) * 1e-10
supported = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
print(tiny.count_nonzero().item() if supported else 0)
"""


def test_every_thread_takes_what_is_below_float32_as_zero():
    done = subprocess.run([sys.executable, "-c", FLUSH], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "0\n", done.stderr


# a product as acting makes it, for 32 environments
PRODUCT = """
import numpy as np
import sac_continuous
from common import compute

compute.setup_torch(sac_continuous.Args(device="cpu", num_threads=2), large=True)
rng = np.random.default_rng(0)
obs, weight = (rng.normal(size=(rows, 256)).astype(np.float32) for rows in (32, 256))
print((obs @ weight.T).tobytes().hex())
"""


def test_acting_rounds_the_same_however_many_threads_numpy_would_take():
    home, printed = os.path.dirname(os.path.realpath(np.__file__)), set()
    if not any(x["filepath"].startswith(home) for x in threadpoolctl.threadpool_info()):
        pytest.skip("NumPy is not its own wheel, or without OpenBLAS")
    for threads in ("1", "2"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads}
        words = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        done = subprocess.run([sys.executable, "-c", PRODUCT], env=environment, **words)
        printed.add(done.stdout)
    assert len(printed) == 1


@pytest.mark.parametrize(
    "flags, depends",
    [
        ({"prioritized": True, "exploration_fraction": 0.0}, "--prioritized depends on it"),
        ({"exploration_fraction": 0.1}, "--exploration-fraction depends on it"),
        ({"exploration_fraction": 0.0}, None),
        ({"exploration_fraction": 0.1, "total_timesteps": 200}, None),  # as many as it has
    ],
)
def test_a_run_is_extended_only_where_no_schedule_depends_on_it(
    flags, depends, monkeypatch, capsys
):
    stored = {"args": {"total_timesteps": 100} | flags, "device": "cpu"}
    monkeypatch.setattr(arguments, "load_run", lambda *_: stored)
    words = "--resume=r --total-timesteps=200 --checkpoint-every 5 --eval-every 6 --eval-episodes 7"
    monkeypatch.setattr(sys, "argv", ["dqn_atari.py", *words.split(), "--track"])
    if depends:
        with pytest.raises(SystemExit):
            arguments.parse_args(dqn_atari.Args, "dqn_atari")
        assert depends in capsys.readouterr().err
    else:
        args, _ = arguments.parse_args(dqn_atari.Args, "dqn_atari")
        assert (args.total_timesteps, args.checkpoint_every, args.eval_every) == (200, 5, 6)
        assert args.eval_episodes == 7 and args.track


def test_what_an_evaluation_may_be_given_is_taken(monkeypatch):
    stored = {"args": {"eval_episodes": 3, "eval_e": 0.5, "gamma": 0.9}, "device": "cpu"}
    monkeypatch.setattr(arguments, "load_run", lambda *_: stored)
    words = "--evaluate r --eval-episodes 100 --eval-e 0.001 --capture-video"
    monkeypatch.setattr(sys, "argv", ["dqn_atari.py", *words.split()])
    args, _ = arguments.parse_args(dqn_atari.Args, "dqn_atari")
    assert (args.eval_episodes, args.eval_e, args.capture_video) == (100, 0.001, True)
    assert (args.evaluate, args.gamma) == ("r", 0.9)


def test_a_run_that_filmed_may_be_shown(monkeypatch):
    stored = {"args": {"capture_video": True}, "device": "cpu"}
    monkeypatch.setattr(arguments, "load_run", lambda *_: stored)
    for words in ("--evaluate r --render", "--evaluate r --render --no-capture-video"):
        monkeypatch.setattr(sys, "argv", ["sac_continuous.py", *words.split()])
        args, _ = arguments.parse_args(sac_continuous.Args, "sac_continuous")
        assert args.render and not args.capture_video


def test_a_run_of_other_arguments_is_refused_in_one_line(monkeypatch, capsys):
    checkpoint = {"args": {"sede": 3}, "device": "cpu"}
    monkeypatch.setattr(arguments, "load_run", lambda *_: checkpoint)
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", "--evaluate", "r"])
    with pytest.raises(SystemExit) as stopped:
        arguments.parse_args(sac_continuous.Args, "sac_continuous")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "other arguments" in line and "sede" in line


def test_a_run_begun_on_the_cpu_goes_on_there_and_in_the_folder_that_it_is_in_now(monkeypatch):
    checkpoint = {"args": {"seed": 3, "run_dir": "before"}, "device": "cpu"}
    monkeypatch.setattr(arguments, "load_run", lambda *_: checkpoint)
    monkeypatch.setattr(sys, "argv", ["sac_continuous.py", "--resume", "r"])
    args, _ = arguments.parse_args(sac_continuous.Args, "sac_continuous")
    assert (args.device, args.seed, args.resume, args.run_dir) == ("cpu", 3, "r", "r")


PPO = {"gamma": 0.99, "gae_lambda": 0.95, "anneal_lr": True, "norm_adv": True, "clip_vloss": True}
PPO |= {"vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None}
PPO |= {"vf_loss": "mse", "lr_schedule": "linear", "recompute_advantages": False}
DISCRETE = PPO | {"learning_rate": 2.5e-4, "num_steps": 128, "num_minibatches": 4}
DISCRETE |= {"update_epochs": 4, "ent_coef": 0.01, "norm_obs": False, "norm_reward": False}


@pytest.mark.parametrize(
    "args, expected",
    [
        (
            ppo_continuous.Args(),
            PPO
            | {"total_timesteps": 1_000_000, "learning_rate": 3e-4, "num_envs": 1}
            | {"num_steps": 2048, "num_minibatches": 32, "update_epochs": 10, "clip_coef": 0.2}
            | {"ent_coef": 0.0, "norm_obs": True, "norm_reward": True, "hidden_sizes": (64, 64)}
            | {"clip_reward": False, "squash": False, "env_id": "HalfCheetah-v5"},
        ),
        (
            ppo_discrete.Args(),
            DISCRETE
            | {"total_timesteps": 500_000, "num_envs": 4, "clip_coef": 0.2}
            | {"clip_reward": False, "hidden_sizes": (64, 64), "env_id": "CartPole-v1"},
        ),
        (
            ppo_discrete.Args(**ppo_discrete.ATARI),
            DISCRETE
            | {"total_timesteps": 10_000_000, "num_envs": 8, "clip_coef": 0.1}
            | {"clip_reward": True},
        ),
        (
            sac_continuous.Args(),
            {"total_timesteps": 1_000_000, "buffer_size": 1_000_000, "gamma": 0.99, "tau": 0.005}
            | {"batch_size": 256, "learning_starts": 5000, "policy_lr": 3e-4, "q_lr": 1e-3}
            | {"policy_frequency": 2, "target_network_frequency": 1, "autotune": True}
            | {"num_envs": 1, "utd_ratio": 1.0, "hidden_sizes": (256, 256), "alpha": 0.2}
            | {"env_id": "HalfCheetah-v5", "log_every": 1000},
        ),
        (
            dqn_atari.Args(),
            {"total_timesteps": 10_000_000, "learning_rate": 1e-4, "buffer_size": 1_000_000}
            | {"gamma": 0.99, "tau": 1.0, "target_network_frequency": 1000, "batch_size": 32}
            | {"start_e": 1.0, "end_e": 0.01, "exploration_fraction": 0.1, "loss": "mse"}
            | {"learning_starts": 80_000, "train_frequency": 4, "max_grad_norm": None}
            | {"n_step": 1, "double": False, "dueling": False, "prioritized": False}
            | {"num_envs": 8, "checkpoint_replay": False, "sticky_actions": 0.0}
            | {"clip_reward": True, "priority_alpha": 0.6, "priority_beta": 0.4, "eval_e": 0.01}
            | {"env_id": "ALE/Breakout-v5", "log_every": 1000},
        ),
    ],
    ids=["ppo_continuous", "ppo_discrete", "ppo_atari", "sac_continuous", "dqn_atari"],
)
def test_defaults_are_cleanrls(args, expected):
    expected = expected | {"seed": 1, "torch_deterministic": True, "device": "auto"}
    expected |= {"compile": True, "bf16": False, "num_threads": 0, "vectorization": "sync"}
    expected |= {"checkpoint_every": 50_000, "eval_every": 0, "eval_episodes": 10}
    expected |= {"exp_name": sys.modules[type(args).__module__].SCRIPT, "run_dir": ""}
    expected |= {"wandb_project_name": "single-file-rl", "track": False, "capture_video": False}
    assert {name: getattr(args, name) for name in expected} == expected
    source = inspect.getsource(sys.modules[type(args).__module__].train)
    eps = "1e-5" if isinstance(args, (ppo_continuous.Args, ppo_discrete.Args)) else "1e-8"
    assert re.findall(r"FlatAdam\(\w+, eps=(\S+)\)", source) == [eps]


@pytest.mark.parametrize(
    "a, b, unlike",
    [
        (ppo_continuous, ppo_discrete, set()),
        (dqn_atari, sac_continuous, {"target_network_frequency"}),
        (ppo_continuous, sac_continuous, {"total_timesteps", "hidden_sizes"}),
        (ppo_discrete, dqn_atari, {"total_timesteps", "learning_rate", "max_grad_norm"}),
    ],
)
def test_what_scripts_share_is_alike_to_the_letter(a, b, unlike):
    first, second = (read_args(f"{script.SCRIPT}.py") for script in (a, b))
    assert {x for x in first.keys() & second.keys() if first[x] != second[x]} == unlike
    ends = []
    for script in (a, b):
        source = Path(script.__file__).read_text().replace(", ATARI)", ")")
        logged = source[source.index("            if run.due(args.eval_every") :]
        ends.append((logged[: logged.index("\n\n\n")], source[source.index("\nif __name__") :]))
    assert ends[0] == ends[1]


def test_dqn_differs_from_sac_by_250_lines_beside_networks_and_replay():
    """CleanRL's pair, with an imported replay, by 307."""
    own = {"QNetwork", "nature_cnn", "SumTree", "TwinLinear", "TwinQNetwork", "mlp", "Actor"}
    shared = []
    for script in (dqn_atari, sac_continuous):
        source = Path(script.__file__).read_text()
        left = source.splitlines()
        for part in ast.parse(source).body:
            if getattr(part, "name", "") in own | {"Replay"}:
                left[part.lineno - 1 : part.end_lineno] = [""] * (part.end_lineno - part.lineno + 1)
        shared.append([line for line in left if line])
    found = difflib.unified_diff(*shared, n=0)
    assert len([x for x in found if x[0] in "+-" and x[:3] not in ("+++", "---")]) <= 250


def test_what_two_scripts_both_have_is_written_in_one_way():
    scripts = ppo_continuous, ppo_discrete, sac_continuous, dqn_atari
    for name, group in {
        "Agent.act": scripts,
        "nature_cnn": (ppo_discrete, dqn_atari),
        "tanh_log_det": (ppo_continuous, sac_continuous),
    }.items():
        assert len({inspect.getsource(operator.attrgetter(name)(x)) for x in group}) == 1


@pytest.mark.parametrize("script", [ppo_continuous, ppo_discrete, sac_continuous, dqn_atari])
def test_every_number_has_a_range(script, capsys):
    may_be_0 = "seed checkpoint_every eval_every learning_starts num_threads".split()
    shares = "gamma gae_lambda tau start_e end_e eval_e exploration_fraction".split()
    shares += ["sticky_actions", "priority_beta"]
    for field in dataclasses.fields(script.Args):
        if re.search(r"\b(int|float)\b", str(field.type)):
            several, integer = "tuple" in str(field.type), "int" in str(field.type)
            wrongs = [-1] + [0] * (integer and field.name not in may_be_0)
            for wrong in wrongs + [1.5] * (field.name in shares):
                given = {field.name: (wrong,) if several else wrong}
                with pytest.raises(SystemExit):
                    arguments.check_ranges(dataclasses.replace(script.Args(), **given))
                assert capsys.readouterr().err.startswith(f"error: {arguments.flag(field.name)} ")
            if field.name in may_be_0 + shares:
                on = {"prioritized": True} if hasattr(script.Args, "prioritized") else {}
                arguments.check_ranges(dataclasses.replace(script.Args(), **on, **{field.name: 0}))


@each_case
def test_all_that_is_random_is_of_the_seed(script, options, monkeypatch):
    """The same seed begins alike; another with other weights, environments and streams."""
    begun = []

    def begin(run, _step):
        begun.append({name: part.state_dict() for name, part in run.parts.items()})
        run.writer.close()  # whose thread would write on
        raise ZeroDivisionError

    monkeypatch.setattr(runs.Run, "save", begin)  # as a run does at step 0
    for i, seed in enumerate((1, 1, 2)):
        with pytest.raises(ZeroDivisionError):
            script.train(script.Args(**options, seed=seed, compile=False, run_dir=f"r{i}"))
    one, again, other = begun
    assert_same(one["rng"], again["rng"])
    for name, state in one["rng"].items():
        with pytest.raises(AssertionError):
            assert_same(state, other["rng"][name])
    assert not torch.equal(one["envs"]["obs"], other["envs"]["obs"])
    for name in (name for name in one["agent"] if "weight" in name):
        a, b, c = (x["agent"][name] for x in begun)
        assert torch.equal(a, b) and not torch.equal(a, c), name


@pytest.mark.parametrize(
    "env_id",
    [
        "toy_envs:Whim-v0",
        "toy_envs:SharedWhim-v0",
        "toy_envs:HeldWhim-v0",
        "toy_envs:ModuleWhim-v0",
        "toy_envs:Wrapped-v0",
        "toy_envs:Layered-v0",
    ],
)
def test_an_environment_may_draw_from_its_spaces(env_id):
    def play(environments, steps: int) -> np.ndarray:
        action = np.zeros((environments.obs.shape[0], 1), np.float32)
        return np.stack([environments.step(action)[0].copy() for _ in range(steps)])

    def make(seed: int, num_envs: int = 2):
        return envs.Environments(Args(env_id=env_id, num_envs=num_envs, seed=seed))

    environments = make(1)
    seen = play(environments, 12)  # more than two episodes
    assert len(np.unique(seen)) == 24 and not np.isin(play(make(2), 12), seen).any()
    assert np.array_equal(play(make(1, num_envs=1), 12), seen[:, :1])
    resumed = make(1)
    resumed.load_state_dict(environments.state_dict())
    evaluated = Args(env_id=env_id, eval_episodes=1)
    envs.play(lambda _: np.zeros(1, np.float32), evaluated, Path())  # draws from spaces of its own
    assert not resumed.lost.any() and np.array_equal(play(resumed, 7), play(environments, 7))
    args = SimpleNamespace(env_id=env_id, seed=3, eval_episodes=2)
    args.render = args.capture_video = False
    shown = []
    for _ in range(2):
        envs.play(lambda obs: shown.append(obs.item()) or np.zeros(1, np.float32), args, Path())
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :] and len(set(shown)) > 8


@pytest.mark.parametrize("end", ["truncated", "terminated", "both"])
def test_an_evaluated_episode_ends_either_way_and_is_summed(end, monkeypatch):
    args = SimpleNamespace(env_id=f"toy_envs:Counter-{end}-v0", seed=3, eval_episodes=2)
    args.render = args.capture_video = False

    def act(_obs):
        return np.zeros(1, np.float32)

    assert envs.play(act, args, Path()) == ([3.0, 3.0], [5, 5])
    if end != "truncated":  # once is enough
        return
    monkeypatch.setattr(toy_envs.Counter, "last", 10**9)
    args.eval_episodes = 1
    assert envs.play(act, args, Path())[1] == [108_000]


@pytest.mark.parametrize(
    "works, given, chosen",
    [
        (("egl", "osmesa"), {}, "egl"),
        (("osmesa",), {}, "osmesa"),
        ((), {}, None),
        (("egl",), {"MUJOCO_GL": "glfw"}, "glfw"),
        (("egl",), {"DISPLAY": ":0"}, None),
    ],
)
def test_a_renderer_that_works_is_chosen(monkeypatch, works, given, chosen):
    def probe(_words, env, **_options):
        return SimpleNamespace(returncode=int(env["MUJOCO_GL"] not in works))

    monkeypatch.setattr(envs.os, "environ", dict(given))
    monkeypatch.setattr(envs.subprocess, "run", probe)
    envs.prepare_video()
    assert envs.os.environ.get("MUJOCO_GL") == chosen


@pytest.mark.parametrize(
    "obs, gives",
    [
        (np.zeros(1, np.float64), None),
        (np.zeros(1, np.int64), None),
        (np.zeros((1, 1), np.float32), "float32 [1, 1]; its space says float32 [1]"),
        (0.5, "float64 []; its space says float32 [1]"),
        (np.zeros(1, np.complex64), "complex64 [1]; its space says float32 [1]"),
    ],
)
def test_observations_are_to_be_what_their_space_says(obs, gives, monkeypatch, capsys):
    monkeypatch.setattr(toy_envs.Counter, "reset", lambda *_, **__: (obs, {}))
    args = Args(env_id="toy_envs:Counter-truncated-v0")
    if gives is None:
        envs.check_spaces(args, gym.spaces.Box, "")
        return
    with pytest.raises(SystemExit):
        envs.check_spaces(args, gym.spaces.Box, "")
    assert f"Counter-truncated-v0 gives observations of {gives}\n" in capsys.readouterr().err


@each_case
def test_observations_may_be_views_that_run_backwards(script, options):
    """As of colours that were turned round; vector environments copy them, evaluations do not."""
    args = script.Args(**options)
    env = envs.make_env(args)
    agent = script.Agent(env.observation_space.shape, env.action_space, args)
    obs, _ = env.reset(seed=0)
    obs = np.asarray(obs)
    assert np.array_equal(agent.act(obs[::-1].copy()[::-1]), agent.act(obs))


def test_an_agent_of_other_actions_is_not_evaluated(capsys):
    spaces = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (1,))
    agent = SimpleNamespace(act=lambda _: np.zeros(2))
    with pytest.raises(SystemExit, match="2"):
        runs.evaluate(lambda *_, **__: agent, Args(evaluate="r", device="cpu"), spaces)
    assert "actions [2], where [1] are taken" in capsys.readouterr().err


def test_a_mistake_in_a_users_environment_is_said_to_be_there(capsys):
    for env_id, said in (
        ("toy_envs:Mistaken-v0", r"no attribute 'size' \(.*toy_envs.py, line \d+\)\n"),
        ("Missing-v0", r"error: --env-id Missing-v0: [^(]*\n"),
        ("toy_envs:Needy-v0", "error: --env-id toy_envs:Needy-v0: .*missing 1 required"),
        (":CartPole-v1", "error: --env-id :CartPole-v1: Empty module name"),
        ("ALE/breakout-v5", "; games are spelled as ALE/Breakout-v5\n"),
    ):
        with pytest.raises(SystemExit):
            envs.check_spaces(Args(env_id=env_id), gym.spaces.Box, "")
        assert re.search(said, capsys.readouterr().err)


def test_only_daemons_end_with_the_trainer(monkeypatch):
    worker, own = mock.Mock(daemon=True), mock.Mock(daemon=False)
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [own, worker])
    envs._end_workers()
    assert worker.kill.called and not own.kill.called


def test_workers_do_not_wait_for_threads_of_the_trainer():
    """Which a fork leaves behind: an environment that computes with PyTorch would hang."""
    args = Args(env_id="toy_envs:Threads-v0", num_envs=2, vectorization="async")
    torch.set_num_threads(2)
    try:
        torch.randn(512, 512) @ torch.randn(512, 512)
        environments = envs.Environments(args)
        assert environments.obs.tolist() == [[1], [1]]
        environments.close()
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("nohup", [True, False])
def test_what_workers_start_ends_as_ever_and_outlives_a_terminal_as_the_trainer_does(nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    method = multiprocessing.get_start_method(allow_none=True)
    if sys.platform == "linux":  # as it is by default from Python 3.14 on
        multiprocessing.set_start_method("forkserver", force=True)
    try:
        environments = make("toy_envs:Threads-v0", vectorization="async")
        workers, vector_env = environments.vector_env.processes, environments.vector_env
        assert all(os.getpgid(x.pid) == x.pid for x in workers)  # a terminal's Ctrl-C stays away
        assert vector_env.call("ignores", signal.SIGHUP) == (nohup, nohup)
        assert vector_env.call("ignores", signal.SIGTERM) == (False, False)
        assert vector_env.call("end_a_fork") == (-signal.SIGTERM, -signal.SIGTERM)
        environments.close()
    finally:
        signal.signal(signal.SIGHUP, before)
        multiprocessing.set_start_method(method, force=True)


def test_who_ends_at_once_leaves_no_semaphore_to_complain_of():
    code = "import multiprocessing, os; multiprocessing.set_start_method('forkserver')\n"  # as 3.14
    code += "from common import say; say('said'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("said\n", "")


def test_forks_of_others_find_signals_as_they_were(monkeypatch):
    """Python runs handlers where it masks signals, and forgets what they raise in a fork."""
    with monkeypatch.context() as patch:
        patch.setattr(signal, "pthread_sigmask", None)
        runs._hold(), runs._release()
    before = signal.signal(signal.SIGTERM, runs.leave)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        runs._hold(), runs._release()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGTERM, before)
    assert signal.SIGTERM in blocked and signal.SIGINT not in blocked


def test_a_film_is_no_longer_than_memory_affords(monkeypatch):
    """Frames are kept until it is written."""

    class Film(toy_envs.Counter):
        last, recording, stopped = 5000, True, 0

        def stop_recording(self):
            self.recording, self.stopped = False, self.stopped + self.t

    film = Film()
    monkeypatch.setattr(envs, "make_env", lambda *_: film)
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, *_, **__: env)
    args = SimpleNamespace(seed=3, eval_episodes=2, render=False, capture_video=True)
    envs.play(lambda _: np.zeros(1, np.float32), args, Path())
    assert film.stopped == 3000
    args.render = True  # of a run that filmed: it is only shown
    del film.recording, Film.recording
    assert envs.play(lambda _: np.zeros(1, np.float32), args, Path())[1] == [5000, 5000]
    assert film.stopped == 3000


@pytest.mark.parametrize("bound", [np.inf, float(np.finfo(np.float32).max), 1e300])
def test_bounds_that_tanh_cannot_be_scaled_to_are_refused(monkeypatch, capsys, bound):
    space = gym.spaces.Box(-bound, bound, (1,), np.float64)
    monkeypatch.setattr(toy_envs.Counter, "action_space", space)
    args = Args(env_id="toy_envs:Counter-truncated-v0")
    with pytest.raises(SystemExit):
        envs.check_spaces(args, gym.spaces.Box, "", bounded=True)
    assert "has actions without bounds" in capsys.readouterr().err
    envs.check_spaces(args, gym.spaces.Box, "")
