"""DQN: its maths and its replay, each against a reference written in another way, and its runs."""

import copy
import dataclasses
import itertools
import math
import os
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import (
    assert_killed_ends_as_whole,
    assert_same,
    flags,
    needs_compiler,
    scalars,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dqn_atari as dqn
from common import arguments, atari, compute, envs
from common.checkpoint import load_checkpoint
from common.tensors import FlatAdam, flatten_parameters

SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="takes minutes: RUN_SLOW=1 runs it"),
]
CPU = torch.device("cpu")
ALL = {"double": True, "dueling": True, "prioritized": True, "n_step": 3}
SHORT = {"env_id": "pixel_envs:SmallCatch-v0", "num_envs": 4, "buffer_size": 400}
SHORT |= {"learning_starts": 40, "batch_size": 8, "num_threads": 1, "log_every": 20}
SHORT |= {"eval_episodes": 1, "compile": False, "run_dir": "r"}


def chi_squared(counts, expected) -> float:
    """Pearson's statistic over its value that one in a thousand exceeds (Wilson and Hilferty)."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    n = max(len(expected) - 1, 1)
    return (np.square(counts - expected) / expected).sum() / (
        n * (1 - 2 / (9 * n) + 3.09 * math.sqrt(2 / (9 * n))) ** 3
    )


# the replay, against one that stores two whole stacks for every transition


class World:
    """Environments [N] that end at random, whose every frame is another one."""

    def __init__(self, num_envs: int, rng, chances: tuple[float, float, float]):
        self.rng, self.chances = rng, chances
        self.episode, self.time = np.zeros((2, num_envs), int)
        self.stacks = [self.begin(n) for n in range(num_envs)]

    def frame(self, n):
        return np.array([[1 + n, self.episode[n]], [self.time[n], 7]], np.uint8)

    def begin(self, n):
        self.episode[n], self.time[n] = self.episode[n] + 1, 0
        return [np.zeros((2, 2), np.uint8)] * 3 + [self.frame(n)]

    @property
    def obs(self):
        return np.array(self.stacks)

    def step(self):
        """Actions, rewards and so on, as of a step of common.envs.Environments."""
        size = len(self.stacks)
        life, game, limit = self.rng.random((3, size)) < np.array(self.chances)[:, None]
        terminated, over = life | game, game | limit
        final_obs = np.full(size, None)
        for n in range(size):
            self.time[n] += 1
            self.stacks[n] = [*self.stacks[n][1:], self.frame(n)]
            if over[n]:
                final_obs[n] = np.array(self.stacks[n])
                self.stacks[n] = self.begin(n)
        infos = {"over": over} | ({"final_obs": final_obs} if over.any() else {})
        action, reward = self.rng.integers(5, size=size), self.rng.normal(size=size)
        return action, reward, terminated, limit & ~terminated, self.obs, infos


class Naive:
    """Every transition ever, whole."""

    def __init__(self, args):
        self.args, self.rows, self.truncations = args, [], 0

    def start(self, obs):
        self.obs = obs.copy()

    def add(self, action, reward, terminated, truncated, obs, infos):
        reward = np.sign(reward) if self.args.clip_reward else reward
        last = obs.copy()
        for n in np.flatnonzero(truncated):
            last[n] = infos["final_obs"][n]
        columns = self.obs, action, reward, terminated, truncated, last
        self.rows.append([[np.copy(x[n]) for x in columns] for n in range(len(obs))])
        self.obs = obs.copy()
        self.truncations += truncated.sum()

    def cut(self, obs):
        """What came before is lost, as if by a time limit."""
        for transition in self.rows[-1] if self.rows else ():
            transition[4] = True
        self.start(obs)

    def transition(self, row: int, n: int):
        """Observation, action, n-step reward, discount and what follows."""
        obs, action, *_ = self.rows[row][n]
        total, discount = 0.0, 1.0
        for later in self.rows[row : row + self.args.n_step]:
            _, _, reward, terminated, truncated, next_obs = later[n]
            total += discount * reward
            discount *= self.args.gamma
            if terminated or truncated:
                break
        return obs, action, total, 0.0 if terminated else discount, next_obs


def complete_rows(replay) -> range:
    """Those that have all n steps, by their number."""
    return range(replay.oldest, replay.num_rows - replay.args.n_step + 1)


def check_against(naive: Naive, replay: dqn.Replay) -> None:
    """All transitions that can be drawn, to the last pixel."""
    size, num_envs = replay.rewards.shape
    where = list(itertools.product(complete_rows(replay), range(num_envs)))
    if not where:
        return
    indices = torch.tensor([row % size * num_envs + n for row, n in where])
    batch = replay.batch(indices)
    assert all(batch[i].is_contiguous(memory_format=torch.channels_last) for i in (0, 4))
    got = [x.numpy() for x in batch]
    expected = [np.array(x) for x in zip(*(naive.transition(*x) for x in where))]
    for i in (0, 1):  # observations and actions
        np.testing.assert_array_equal(got[i], expected[i])
    for i in (2, 3):  # rewards and discounts
        np.testing.assert_allclose(got[i], expected[i], rtol=1e-5, atol=1e-6)
    goes_on = expected[3] > 0
    np.testing.assert_array_equal(got[4][goes_on], expected[4][goes_on])


class Priorities:
    """Priorities by row and environment."""

    def __init__(self, replay):
        self.replay, self.most, self.of = replay, 1.0, {}

    def added(self):
        """The newest transition with all n steps gets the most; what is lost, nothing."""
        rows, num_envs = complete_rows(self.replay), self.replay.args.num_envs
        if rows:
            self.of |= {(rows[-1], n): self.most for n in range(num_envs)}
        self.of = {key: value for key, value in self.of.items() if key[0] in rows}

    def learned(self, indices, errors):
        size, num_envs = self.replay.rewards.shape
        numbers = {row % size: row for row in complete_rows(self.replay)}
        for index, error in zip(indices.tolist(), errors.tolist()):
            priority = (abs(error) + 1e-6) ** self.replay.args.priority_alpha
            self.of[numbers[index // num_envs], index % num_envs] = priority
            self.most = max(self.most, priority)

    def check(self) -> np.ndarray:
        """Compare with the tree's leaves, its sums and the most there ever was; return the leaves."""
        (size, num_envs), tree = self.replay.rewards.shape, self.replay.tree
        leaves = np.zeros(tree.leaves.numel())
        for (row, n), priority in self.of.items():
            leaves[row % size * num_envs + n] = priority
        np.testing.assert_allclose(
            tree.leaves.flatten().double() / 2**30, leaves, rtol=0, atol=2**-30
        )
        np.testing.assert_array_equal(tree.sums, tree.leaves.sum(1))
        assert self.replay.max_priority.item() == pytest.approx(self.most, rel=1e-12)
        return leaves


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("n_step, num_envs", [(1, 2), (2, 8), (10, 8)])
def test_the_smallest_replay_has_something_to_draw_when_begun_anew(n_step, num_envs, prioritized):
    """With a truncation in every step of every environment but one, as many frames as can be."""
    options = {"buffer_size": 2 * n_step * num_envs, "prioritized": prioritized, "batch_size": 4}
    args = dqn.Args(num_envs=num_envs, n_step=n_step, **options)
    replay, obs = dqn.Replay(args, (4, 2, 2), CPU), np.zeros((num_envs, 4, 2, 2), np.uint8)
    truncated, no = np.arange(num_envs) > 0, np.zeros(num_envs, bool)
    infos = {"over": truncated, "final_obs": np.array([None, *obs[1:]], object)}
    replay.start(obs)
    for _ in range(50):
        replay.add(np.zeros(num_envs, int), np.zeros(num_envs), no, truncated, obs, infos)
    replay.start(obs)
    _, weights = replay.sample(1.0, torch.Generator())
    assert complete_rows(replay) and weights.isfinite().all()


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_envs=st.sampled_from([1, 3]),
    n_step=st.sampled_from([1, 3]),
    rows=st.integers(6, 20),
    steps=st.integers(1, 80),
    chances=st.tuples(*[st.sampled_from([0.0, 0.1, 0.4])] * 2, st.sampled_from([0, 0.2, 0.6, 1])),
    prioritized=st.booleans(),
    alpha=st.sampled_from([0.0, 0.6, 1.0]),
    saved=st.integers(0, 80),
    lost=st.integers(0, 80),
)
def test_replay_equals_one_of_whole_stacks(
    seed, num_envs, n_step, rows, steps, chances, prioritized, alpha, saved, lost
):
    """Lost lives, ends of games, time limits; rows and frames wrap around; on the way it is saved,
    and begins anew with other episodes, as a resumed run does that has lost its own.
    """
    args = dqn.Args(
        num_envs=num_envs,
        n_step=n_step,
        buffer_size=rows * num_envs,
        prioritized=prioritized,
        priority_alpha=alpha,
        batch_size=64,
        gamma=0.9,
        clip_reward=seed % 2 == 0,
    )
    world, naive = World(num_envs, np.random.default_rng(seed), chances), Naive(args)
    replay, draw = dqn.Replay(args, (4, 2, 2), CPU), torch.Generator().manual_seed(0)
    replay.start(world.obs)
    naive.start(world.obs)
    priorities = Priorities(replay)
    for t in range(steps):
        if t == saved:
            state, replay = copy.deepcopy(replay.state_dict()), dqn.Replay(args, (4, 2, 2), CPU)
            assert len(state["stacks"]) == min(t, rows)
            replay.load_state_dict(state)
            priorities.replay = replay
        if t == lost:
            world.stacks = [world.begin(n) for n in range(num_envs)]
            replay.start(world.obs)
            naive.cut(world.obs)
            check_against(naive, replay)
        outcome = world.step()
        replay.add(*outcome)
        naive.add(*outcome)
        check_against(naive, replay)
        priorities.added()
        usable = complete_rows(replay)
        if usable:
            indices, weights = replay.sample(0.7, draw)
            usable_now = {row % rows for row in usable}
            assert {index // num_envs for index in indices.tolist()} <= usable_now
            if not prioritized:
                assert (weights == 1).all()
                continue
            leaves = priorities.check()
            probabilities = leaves[indices] / leaves.sum()
            expected = (1 / (len(usable) * num_envs * probabilities)) ** 0.7
            np.testing.assert_allclose(weights, expected / expected.max(), rtol=1e-5)
            errors = 3 * torch.sin(indices * 7.0 + t).double()  # of one transition, always the same
            replay.update_priorities(indices, errors)
            priorities.learned(indices, errors)
            priorities.check()
    starts = 4 * num_envs * (1 + (lost < steps))  # of all stacks; then, each frame is kept once
    assert replay.num_frames == starts + steps * num_envs + naive.truncations
    assert len(replay.frames) == 1 + math.ceil(1.02 * rows * num_envs) + 12 * num_envs
    pushed_out = replay.oldest - 1
    assert replay.oldest >= max(0, steps - rows)
    if lost >= steps and pushed_out >= max(
        3, steps - rows
    ):  # before their time, as a frame of theirs is gone
        kept = {frame.tobytes() for frame in replay.frames.numpy()}
        frames = [x for row in naive.rows[pushed_out] for i in (0, 5) for x in row[i]]
        ended = [row for row in naive.rows[pushed_out] if row[3]]
        assert ended or any(frame.tobytes() not in kept for frame in frames)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("prioritized", [False, True])  # when all have the same priority
def test_replay_is_sampled_uniformly_from_all_that_is_complete(n_step, prioritized, monkeypatch):
    sample = dqn.SumTree.sample

    def exact(self, uniform):
        assert uniform.dtype == torch.float64  # float32 cannot tell a million leaves apart
        return sample(self, uniform)

    monkeypatch.setattr(dqn.SumTree, "sample", exact)
    options = {"n_step": n_step, "prioritized": prioritized}
    args = dqn.Args(num_envs=3, buffer_size=30, batch_size=20, **options)
    world, replay = (
        World(3, np.random.default_rng(0), (0, 0, 0.1)),
        dqn.Replay(args, (4, 2, 2), CPU),
    )
    replay.start(world.obs)
    for _ in range(17):
        replay.add(*world.step())
    rng = torch.Generator().manual_seed(0)
    indices = torch.cat([replay.sample(1.0, rng)[0] for _ in range(3000)])
    expected = np.zeros(30)
    for row in complete_rows(replay):
        expected[row % 10 * 3 : row % 10 * 3 + 3] = 1
    assert expected.sum() == 3 * (11 - n_step)
    counts = np.bincount(indices, minlength=30)
    assert chi_squared(counts, expected * 60_000 / expected.sum()) < 1
    if prioritized:  # stratified: each of a batch falls into its own twentieth of the sum
        place = (expected.cumsum()[indices.numpy()] - 1).reshape(-1, 20) * 20 / expected.sum()
        assert (np.abs(place - np.arange(20)) <= 1).all()


def test_n_steps_by_hand():
    """A termination and a time limit within three steps of rewards 1, 2, 4, 8, ..."""
    args = dqn.Args(num_envs=3, n_step=3, buffer_size=30, gamma=0.5, clip_reward=False)
    replay, no = dqn.Replay(args, (4, 1, 1), CPU), np.zeros(3, bool)
    shown = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * 50 + np.zeros((3, 4, 1, 1), np.uint8)
    replay.start(shown)
    for t in range(5):
        ended = no | (t == 1)
        terminated, truncated = ended & [True, False, False], ended & [False, True, False]
        over = terminated | truncated
        last = shown + np.uint8(1)
        shown = np.where(over[:, None, None, None], np.uint8(200), last)
        infos = {"over": over, "final_obs": last + np.uint8(20)}
        replay.add(np.full(3, t), np.full(3, 2.0**t), terminated, truncated, shown, infos)
    obs, action, reward, discount, next_obs = replay.batch(torch.arange(9))
    assert action.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert reward.tolist() == [2, 2, 3, 2, 2, 6, 12, 12, 12]  # 1 + 2/2 (+ 4/4), 2 (+ 4/2 + 8/4)
    assert discount.tolist() == [0, 0.25, 0.125, 0, 0.5, 0.125, 0.125, 0.125, 0.125]
    newest = next_obs[:, -1, 0, 0].tolist()
    assert newest[1] == newest[4] == 50 + 2 + 20 and newest[2] == 103 and newest[7] == 203
    assert obs[:, -1, 0, 0].tolist() == [0, 50, 100, 1, 51, 101, 200, 200, 102]
    assert obs[7, :, 0, 0].tolist() == [0, 0, 0, 200]


@pytest.mark.parametrize(
    "env_id, kinds",
    [
        ("pixel_envs:Clock-v0", "over limit"),
        ("ALE/Breakout-v5", "life over"),
        ("ALE/Berzerk-v5", "life limit"),
    ],
)
def test_training_stores_what_the_environments_showed(monkeypatch, env_id, kinds):
    """With real ends of episodes: lost lives, ends of games and truncations."""
    naive, replays, seen = [], [], set()

    class Limited(atari.AtariGames):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, max_num_frames_per_episode=720)

    if "limit" in kinds:
        monkeypatch.setattr(atari, "AtariGames", Limited)

    class Spy(dqn.Replay):
        def __init__(self, args, *rest):
            super().__init__(args, *rest)
            replays.append(self)
            naive.append(Naive(args))

        def start(self, obs):
            naive[-1].start(obs)
            super().start(obs)

        def add(self, *outcome):
            _, _, terminated, truncated, _, infos = outcome
            if self.num_rows >= 150:
                over = infos["over"]
                ends = {"life": terminated & ~over, "over": terminated & over, "limit": truncated}
                seen.update(kind for kind, which in ends.items() if which.any())
            naive[-1].add(*outcome)
            super().add(*outcome)

    monkeypatch.setattr(dqn, "Replay", Spy)
    monkeypatch.setattr(envs, "play", lambda *_: ([0.0], [1]))
    options = SHORT | {"env_id": env_id, "num_envs": 2, "n_step": 3, "total_timesteps": 900}
    options |= {"buffer_size": 600, "learning_starts": 900, "end_e": 1.0}
    dqn.train(dqn.Args(**options))
    assert replays[0].num_rows == 450 and replays[0].oldest >= 150
    check_against(naive[0], replays[0])
    assert set(kinds.split()) <= seen
    if "Clock" in env_id:  # what is logged is not clipped
        logged = scalars(Path("r"))
        lengths, returns = (logged[f"charts/episodic_{x}"] for x in ("length", "return"))
        totals = [sum(t % 5 - 2 for t in range(1, int(n) + 1)) for _, n in lengths]
        assert [total for _, total in returns] == totals and max(map(abs, totals)) > 0


def test_frames_of_a_large_replay_are_found():
    """More than 16 bits can count."""
    args, n = dqn.Args(num_envs=20_000, buffer_size=40_000), 20_000
    replay, no = dqn.Replay(args, (4, 1, 1), CPU), np.zeros(n, bool)
    obs = (np.arange(4 * n) % 251).astype(np.uint8).reshape(n, 4, 1, 1)
    replay.start(obs)
    replay.add(np.zeros(n, int), np.zeros(n), no, no, obs, {"over": no})
    np.testing.assert_array_equal(replay.batch(torch.arange(n))[0].numpy(), obs)


def test_replay_begins_anew_where_an_environment_was_lost(monkeypatch):
    """No n-step reward goes on from an episode that a resumed run did not find again."""
    options = SHORT | {"env_id": "pixel_envs:Unrepeatable-v0", "num_envs": 2, "n_step": 3}
    options |= {"checkpoint_replay": True, "clip_reward": False, "exploration_fraction": 0.0}
    args = dqn.Args(**options, total_timesteps=100, checkpoint_every=50, gamma=1.0)
    monkeypatch.setattr(envs, "play", lambda *_: ([0.0], [1]))
    dqn.train(args)
    checkpoint, load = load_checkpoint(Path("r/checkpoint.pt")), envs.Environments.load_state_dict

    def one(self, state):
        load(self, state)
        self.lost[1] = False  # one is enough

    monkeypatch.setattr(envs.Environments, "load_state_dict", one)
    dqn.train(dataclasses.replace(args, resume="r", total_timesteps=120), checkpoint)
    state = load_checkpoint(Path("r/checkpoint.pt"))["replay"]
    replay = dqn.Replay(args, (4, 36, 36), CPU)
    replay.load_state_dict(state)
    obs, _, _, discount, next_obs = replay.batch(torch.arange(48 * 2, 50 * 2))
    alive = discount > 0
    assert alive.any()
    assert (obs[:, -1, -1, 0] == next_obs[:, -1, -1, 0])[alive].all()  # of the same episode


# the sum tree


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 90), decades=st.sampled_from([0, 3, 30]))
def test_sum_tree_equals_plain_sums(seed, size, decades):
    """After updates with duplicates; a draw finds the leaf whose stretch of the sum it falls into."""
    rng, tree, naive = np.random.default_rng(seed), dqn.SumTree(size, CPU), np.zeros(size)
    for _ in range(5):
        indices = rng.integers(size, size=rng.integers(1, 20))
        values = np.where(rng.random(size) < 0.3, 0, 10 ** rng.uniform(-decades, decades, size))
        tree.update(torch.from_numpy(indices), torch.from_numpy(values[indices]))
        for i in indices:
            naive[i] = values[i]
    most = 2 ** (62 - size.bit_length())
    whole = [min(math.ceil(x * 2**30), most) for x in naive]  # integers of any size
    assert tree.leaves.flatten().tolist() == whole + [0] * (tree.leaves.numel() - size)
    assert (total := sum(whole)) == tree.sums.sum().item() < 2**63
    assert tree.sums.tolist() == tree.leaves.sum(1).tolist()
    assert all((x > 0) == (y > 0) for x, y in zip(whole, naive))
    if total == 0:
        return
    ends = list(itertools.accumulate(whole))
    uniform = np.concatenate(([0, 1 - 2.0**-53, 1], np.array(ends[:-1]) / total, rng.random(50)))
    indices, probabilities = tree.sample(torch.from_numpy(uniform))
    assert probabilities.dtype == torch.float64
    for u, i, probability in zip(uniform.tolist(), indices.tolist(), probabilities.tolist()):
        assert whole[i] > 0 and probability == pytest.approx(whole[i] / total, rel=1e-12)
        mass = min(int(u * float(total)), total - 1)
        assert ends[i] - whole[i] <= mass < ends[i]


def test_sum_tree_draws_in_proportion_to_priorities():
    rng = np.random.default_rng(0)
    priorities = np.where(rng.random(50) < 0.3, 0, rng.gamma(1, size=50))
    tree = dqn.SumTree(50, CPU)
    tree.update(torch.arange(50), torch.from_numpy(priorities))
    indices, _ = tree.sample(torch.from_numpy(rng.random(200_000)))
    counts, expected = np.bincount(indices, minlength=50), priorities * 200_000 / priorities.sum()
    assert chi_squared(counts, expected) < 1 < chi_squared(counts[::-1], expected + 1)


# the maths


def test_targets_by_hand():
    """The target network values the action, which is best by itself, or by the Q-network."""
    reward, discount = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 0.0, 0.5])
    next_q = torch.tensor([[1.0, 5.0], [7.0, 9.0], [-4.0, -2.0]])
    online = torch.tensor([[3.0, 2.0], [0.0, 1.0], [8.0, 1.0]])
    got = dqn.td_target(reward, discount, next_q, next_q)
    torch.testing.assert_close(got, torch.tensor([1 + 0.9 * 5, 2, 3 - 0.5 * 2]))
    got = dqn.td_target(reward, discount, next_q, online)
    torch.testing.assert_close(got, torch.tensor([1 + 0.9 * 1, 2, 3 - 0.5 * 4]))


def test_losses_equal_their_formulas():
    rng = np.random.default_rng(0)
    q, target, weight = 2 * rng.normal(size=20), 2 * rng.normal(size=20), rng.random(20)
    errors = np.abs(q - target)
    assert errors.min() < 1 < errors.max()
    huber = [0.5 * e * e if e < 1 else e - 0.5 for e in errors]
    for loss, each in (("mse", errors**2), ("huber", huber)):
        got = dqn.td_loss(*map(torch.tensor, (q, target, weight)), loss)
        assert got.item() == pytest.approx(sum(w * e for w, e in zip(weight, each)) / 20)


def make_agent(**kwargs):
    torch.manual_seed(0)
    return dqn.Agent((4, 36, 36), gym.spaces.Discrete(3, start=-1), dqn.Args(**kwargs))


def random_batch(count: int):
    """Observations, actions, rewards, discounts, next observations, and weights."""
    rng = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randint(256, (2, count, 4, 36, 36), generator=rng, dtype=torch.uint8)
    action, reward = torch.randint(3, (count,), generator=rng), torch.randn(count, generator=rng)
    discount = 0.9 * (torch.rand(count, generator=rng) < 0.7)
    return (obs, action, reward, discount, next_obs), torch.rand(count, generator=rng)


@torch.no_grad()
def test_the_q_network_acts_and_the_target_network_begins_as_its_copy():
    agent, obs = make_agent(), random_batch(50)[0][0]
    for a, b in zip(agent.q_network.parameters(), agent.target.parameters(), strict=True):
        assert torch.equal(a, b)
        b += 0.1 * torch.randn_like(b)
    best = agent.q_network(obs).argmax(1)
    assert torch.equal(agent.sample(obs, torch.zeros(50, 3))[0], best)
    assert not torch.equal(agent.target(obs).argmax(1), best)


@torch.no_grad()
def test_dueling_networks_tell_values_from_advantages():
    """Advantages have mean zero, so that a constant in them changes nothing."""
    network, obs = make_agent(dueling=True).q_network, random_batch(20)[0][0]
    q = network(obs)
    torch.testing.assert_close(q.mean(1, keepdim=True), network.state_value(network.cnn(obs / 255)))
    network.advantage[-1].bias += 3.0
    torch.testing.assert_close(network(obs), q, rtol=1e-4, atol=1e-5)
    network.advantage[-1].bias += torch.tensor([0.0, 3.0, 0.0])
    torch.testing.assert_close(network(obs) - q, torch.tensor([[-1.0, 2, -1]]).expand(20, 3))
    network.state_value[-1].bias += 2.0
    torch.testing.assert_close(network(obs) - q, torch.tensor([[1.0, 4, 1]]).expand(20, 3))


@pytest.mark.parametrize("dueling", [False, True])
def test_layers_are_those_of_the_papers(dueling):
    """Each stream of a dueling network has a hidden layer of its own; their gradients meet where
    the convolutions end, and are scaled down there by the root of two.
    """
    network, obs = make_agent(dueling=dueling).q_network, random_batch(20)[0][0]
    streams = (network.advantage, network.state_value) if dueling else (network.advantage,)
    for x in streams:
        assert [type(layer) for layer in x] == [nn.Linear, nn.ReLU, nn.Linear]
    shapes = [tuple(x.shape) for x in network.parameters() if x.ndim > 1]
    stream = [(512, 64), (3, 512), (512, 64), (1, 512)]
    convolutions = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert shapes == convolutions + (stream if dueling else stream[:2])
    network(obs).square().sum().backward()
    got = [x.grad for x in network.parameters()]
    plain = copy.deepcopy(network)
    plain.zero_grad()
    x = plain.cnn(obs / 255)
    q = plain.advantage(x)
    if dueling:
        q = plain.state_value(x) + q - q.mean(1, keepdim=True)
    q.square().sum().backward()
    for i, (gradient, parameter) in enumerate(zip(got, plain.parameters(), strict=True)):
        expected = parameter.grad / (math.sqrt(2) if dueling and i < 6 else 1)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e3])
@torch.no_grad()
def test_update_equals_autograd_with_torch_optim_adam(double, dueling, loss, max_grad_norm):
    """Five steps, in which the target network stays as it is; clipping only with its flag."""
    options = {"double": double, "dueling": dueling, "loss": loss, "max_grad_norm": max_grad_norm}
    args, agent = dqn.Args(learning_rate=1e-3, **options), make_agent(**options).double()
    for parameter in agent.target.parameters():  # which then disagree on what is best
        parameter.add_(0.1 * torch.randn_like(parameter))
    plain, target_network = copy.deepcopy(agent.q_network), copy.deepcopy(agent.target)
    q_network, target = map(flatten_parameters, (agent.q_network, agent.target))
    update = dqn.make_update(agent, FlatAdam(q_network, eps=1e-8), args)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    whole, weights = random_batch(80)
    whole = [x if x.dtype == torch.int64 else x.double() for x in whole]
    before, initial, norms, disagreed = target.clone(), q_network.clone(), [], 0
    for i in range(5):
        batch, weight = [x[i * 16 : i * 16 + 16] for x in whole], weights[i * 16 : i * 16 + 16]
        metrics, error = update(q_network, target, batch, weight)
        obs, action, reward, discount, next_obs = batch
        next_q, online = target_network(next_obs), plain(next_obs)
        disagreed += (next_q.argmax(1) != online.argmax(1)).sum()
        if double:
            future = torch.stack([q[best] for q, best in zip(next_q, online.argmax(1))])
        else:
            future = next_q.amax(1)
        wanted = reward + discount * future
        with torch.enable_grad():
            q = (plain(obs) * nn.functional.one_hot(action, 3)).sum(1)
            e = wanted - q
            each = torch.where(e.abs() < 1, e**2 / 2, e.abs() - 0.5) if loss == "huber" else e**2
            value = (each * weight).mean()
            optimizer.zero_grad()
            value.backward()
        norms.append(nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm or math.inf))
        optimizer.step()
        torch.testing.assert_close(error, e.detach(), rtol=1e-3, atol=1e-5)
        expected = torch.stack((value, q.mean())).detach()
        torch.testing.assert_close(metrics, expected, rtol=1e-3, atol=1e-5)
    assert min(norms) > 0.05 and disagreed > 0 and torch.equal(target, before)
    expected = nn.utils.parameters_to_vector(plain.parameters())
    assert (q_network - expected).norm() < 1e-3 * (q_network - initial).norm()


@needs_compiler
@torch.no_grad()
def test_compiled_updates_equal_eager_ones_and_compile_once():
    results = []
    for wrap in (lambda update, *_: update, compute.compile_function):
        args = dqn.Args(learning_rate=1e-3, max_grad_norm=1.0, **ALL)
        agent = make_agent(**ALL)
        q_network, target = map(flatten_parameters, (agent.q_network, agent.target))
        update = wrap(dqn.make_update(agent, FlatAdam(q_network, eps=1e-8), args), args, CPU)
        torch._dynamo.utils.counters.clear()
        whole, weights = random_batch(96)
        for i in range(12):
            batch, weight = [x[i * 8 : i * 8 + 8] for x in whole], weights[i * 8 : i * 8 + 8]
            metrics = update(q_network, target, batch, weight)
            target.lerp_(q_network, 0.1)
        results.append((q_network, *metrics))
    assert args.compile and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@needs_compiler
def test_a_run_compiles_its_update_once():
    torch._dynamo.utils.counters.clear()
    dqn.train(dqn.Args(**SHORT | {"total_timesteps": 100, "compile": True}))
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    )  # one: of the compiler's trial


def test_linear_schedule():
    points = (-1, 0, 0.25, 0.5, 1, 7)
    assert [dqn.linear_schedule(1.0, 0.2, x) for x in points] == pytest.approx(
        [1, 1, 0.8, 0.6, 0.2, 0.2]
    )
    assert [dqn.linear_schedule(0.4, 1.0, x) for x in (0, 0.5, 1, 2)] == pytest.approx(
        [0.4, 0.7, 1, 1]
    )


# when what happens in train()


class Record:
    """What train() does in order (s: a step of all environments, u: an update), what the target
    network is at each update, observations and actions; it learns nothing.
    """

    def __init__(self, monkeypatch):
        self.log, self.targets, self.betas, self.acted = [], [], [], []
        self.drawn, self.learned = [], []
        self.power_cut_at = None
        send, recv, sample = envs.Environments.send, envs.Environments.recv, dqn.Replay.sample
        learn = dqn.Replay.update_priorities

        def make_update(agent, optimizer, args):
            def update(q_network, target, batch, weight):
                self.log.append("u")
                self.targets.append(round(1e3 * target[0].item()))
                q_network.fill_(1e-3 * self.log.count("u"))  # the network's number
                assert weight is self.drawn[-1][1]
                return torch.tensor([1.0, 2.0]), torch.arange(args.batch_size)

            return update

        def sent(environments, action):
            self.log.append("s")
            self.acted.append((environments.obs.copy(), action.copy()))
            if len(self.acted) == self.power_cut_at:
                raise RuntimeError("power cut")
            send(environments, action)
            self.stepping = True

        def received(environments):
            self.stepping = False
            return recv(environments)

        def sampled(replay, beta, rng):
            assert self.stepping  # the environments, while the network learns
            self.betas.append(beta)
            self.drawn.append(sample(replay, beta, rng))
            return self.drawn[-1]

        def learned(replay, indices, error):
            assert error.tolist() == list(range(len(indices)))
            self.learned.append(indices)
            learn(replay, indices, error)

        monkeypatch.setattr(dqn, "make_update", make_update)
        monkeypatch.setattr(dqn.Replay, "sample", sampled)
        monkeypatch.setattr(dqn.Replay, "update_priorities", learned)
        monkeypatch.setattr(envs.Environments, "send", sent)
        monkeypatch.setattr(envs.Environments, "recv", received)


@pytest.mark.parametrize(
    "num_envs, frequency, starts, steps, expected",
    [
        (1, 4, 4, 16, "ssss ssssu ssssu ssssu"),
        (4, 4, 8, 24, "ss su su su su"),
        (8, 4, 16, 43, "ss suu suu suu"),
        (4, 3, 8, 24, "ss suu su su suu"),
        (8, 16, 8, 48, "s su s su s su"),
        (4, 1, 6, 16, "s suu suuuu suuuu"),
    ],
)
def test_updates_come_when_they_should(monkeypatch, num_envs, frequency, starts, steps, expected):
    """Counted in environment steps, and none before --learning-starts."""
    record = Record(monkeypatch)
    options = SHORT | {"num_envs": num_envs, "learning_starts": starts, "total_timesteps": steps}
    dqn.train(dqn.Args(**options, train_frequency=frequency))
    assert "".join(record.log) == expected.replace(" ", "")
    logged = scalars(Path("r"))
    assert logged["losses/td_loss"][0][1] == 1 and logged["losses/q_values"][0][1] == 2


@pytest.mark.parametrize(
    "num_envs, train_frequency, target_frequency, expected",
    [
        # updates of steps 8, 12, 16, ..., the first moves it; whatever steps together
        *((n, 4, 8, [0, 1, 1, 3, 3, 5]) for n in (1, 2, 4, 8)),
        (4, 4, 4, [0, 1, 2, 3, 4, 5, 6]),
        (4, 4, 12, [0, 0, 2, 2, 2, 5, 5]),  # after those of steps 12 and 24
        (4, 3, 10, [0, 0, 0, 3, 3, 3, 6]),  # after those of 12 and 21, of 6, 9, 12, 15, 18, 21, ...
        (4, 8, 2, [0, 1, 2]),
    ],
)
def test_target_network_moves_when_it_should(
    monkeypatch, num_envs, train_frequency, target_frequency, expected
):
    record = Record(monkeypatch)
    options = {"train_frequency": train_frequency, "target_network_frequency": target_frequency}
    options |= {"num_envs": num_envs, "learning_starts": 8, "total_timesteps": 36}
    dqn.train(dqn.Args(**SHORT | options))
    initial = record.targets[0]
    assert record.targets[: len(expected)] == [x or initial for x in expected]


def test_target_network_moves_as_far_as_it_should(monkeypatch):
    record = Record(monkeypatch)
    options = {"learning_starts": 8, "total_timesteps": 60, "target_network_frequency": 4}
    dqn.train(dqn.Args(**SHORT | options, tau=0.1))
    lagging = record.targets[0]
    for k, target in enumerate(record.targets):
        assert target == pytest.approx(lagging, abs=1.01)
        lagging += 0.1 * (k + 1 - lagging)
    assert k == 12


def test_importance_exponent_grows_to_one_and_epsilon_follows_its_schedule(monkeypatch):
    """Functions of the step alone: a run that was cut off and resumed logs the same."""
    record, epsilons, linear_schedule = Record(monkeypatch), [], dqn.linear_schedule

    def schedule(start, *rest):
        value = linear_schedule(start, *rest)
        epsilons.extend([value] * (start == 0.9))
        return value

    monkeypatch.setattr(dqn, "linear_schedule", schedule)
    options = SHORT | {"prioritized": True, "total_timesteps": 400, "checkpoint_every": 100}
    options |= {"priority_beta": 0.3}
    args = dqn.Args(**options, start_e=0.9, end_e=0.1, exploration_fraction=0.8)
    record.power_cut_at = 68  # steps of four environments
    with pytest.raises(RuntimeError, match="power cut"):
        dqn.train(args)
    record.power_cut_at = None
    dqn.train(dataclasses.replace(args, resume="r"), load_checkpoint(Path("r/checkpoint.pt")))
    steps = np.arange(20, 401, 20)
    expected = list(zip(steps.tolist(), np.maximum(0.9 - 0.8 * steps / 320, 0.1)))
    logged = scalars(Path("r"))["charts/epsilon"]
    assert [step for step, _ in logged] == steps.tolist()
    np.testing.assert_allclose(logged, expected, rtol=1e-6)
    acted = np.array([*range(4, 273, 4), *range(204, 401, 4)])  # resumed from 200
    np.testing.assert_allclose(epsilons, np.maximum(0.9 - 0.8 * acted / 320, 0.1))
    updated = [*range(40, 268, 4), *range(240, 400, 4)]  # resumed from 200, and 40 to fill
    np.testing.assert_allclose(record.betas, [0.3 + 0.7 * step / 400 for step in updated])
    pairs = zip(record.drawn, record.learned, strict=True)  # each with the errors of its batch
    assert all(drawn is indices for (drawn, _), indices in pairs)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_exploration_is_uniform_and_the_rest_greedy(monkeypatch, epsilon):
    record, forward = Record(monkeypatch), dqn.QNetwork.forward
    # larger than without --clip-reward
    monkeypatch.setattr(dqn.QNetwork, "forward", lambda self, obs: 1e6 * forward(self, obs))
    options = SHORT | {"start_e": epsilon, "end_e": epsilon, "total_timesteps": 4000}
    run_dir = dqn.train(dqn.Args(**options | {"learning_starts": 4000}))
    obs, actions = (np.concatenate(x) for x in zip(*record.acted))
    with torch.no_grad():
        q = dqn.load_agent(run_dir).q_network(torch.from_numpy(obs))
    greedy = q.argmax(1).numpy() - 1  # as the space begins at -1
    ranks = (actions - greedy) % 3
    share = epsilon / 3
    expected = 4000 * np.array([1 - 2 * share, share, share])
    assert chi_squared(np.bincount(ranks, minlength=3), expected) < 1
    explored = (ranks != 0).reshape(-1, 4)
    if epsilon == 0.3:  # each environment by itself
        assert np.abs(np.triu(np.corrcoef(explored.T), 1)).max() < 0.13
    if epsilon == 1:
        assert chi_squared(np.bincount(actions + 1, minlength=3), [4000 / 3] * 3) < 1


def test_it_acts_with_the_epsilon_of_the_schedule(monkeypatch):
    record = Record(monkeypatch)
    options = SHORT | {"start_e": 1.0, "end_e": 0.0, "exploration_fraction": 0.5}
    options |= {"total_timesteps": 4000, "learning_starts": 4000, "compile": True}
    run_dir = dqn.train(dqn.Args(**options))  # which learns nothing
    obs, actions = (np.concatenate(x) for x in zip(*record.acted))
    with torch.no_grad():
        q = dqn.load_agent(run_dir).q_network(torch.from_numpy(obs))
    explored = actions != q.argmax(1).numpy() - 1  # as the space begins at -1
    for quarter in range(4):  # of the half in which epsilon falls; 2 of 3 random actions show
        share = explored[quarter * 500 : (quarter + 1) * 500].mean()
        assert share == pytest.approx((7 - 2 * quarter) / 8 * 2 / 3, abs=0.09)
    assert not explored[2000:].any()


def test_asynchronous_environments_train_the_same(monkeypatch):
    """Also where a step overwrites at once what the one before returned."""
    replays, send = [], envs.Environments.send

    def overwriting(environments, action):
        environments.obs[:] = 99
        send(environments, action)

    for run in ("sync", "async", "overwritten"):
        options = {"env_id": "pixel_envs:Clock-v0", "total_timesteps": 400, "run_dir": run}
        options |= {"vectorization": run if run == "async" else "sync", "checkpoint_replay": True}
        if run == "overwritten":
            monkeypatch.setattr(envs.Environments, "send", overwriting)
        run_dir = dqn.train(dqn.Args(**SHORT | options))
        replays.append(load_checkpoint(run_dir / "checkpoint.pt")["replay"])
    assert_same(replays[0], replays[1])
    assert_same(replays[0], replays[2])


def test_without_its_replay_a_resumed_run_first_fills_a_new_one(monkeypatch, capsys):
    record = Record(monkeypatch)
    record.power_cut_at = 68
    args = dqn.Args(**SHORT, total_timesteps=400, checkpoint_every=100)
    with pytest.raises(RuntimeError, match="power cut"):
        dqn.train(args)
    record.log.clear()
    record.power_cut_at = None
    checkpoint = load_checkpoint(Path("r/checkpoint.pt"))
    assert "replay" not in checkpoint
    dqn.train(dataclasses.replace(args, resume="r"), checkpoint)
    out = capsys.readouterr().out
    assert "no replay kept: inexact, learns from step 240 of 400\n" in out
    assert out.count("no replay kept") == 1  # and not when a run begins
    assert "".join(record.log) == "s" * 10 + "su" * 40
    ended = load_checkpoint(Path("r/checkpoint.pt"))
    assert ended["global_step"] == 400
    dqn.train(dataclasses.replace(args, resume="r"), ended | {"finished": False})
    assert "no replay kept" not in capsys.readouterr().out  # only its evaluation was left


def test_losses_are_logged_as_their_means_since_the_last_log(monkeypatch):
    record, make_update = Record(monkeypatch), dqn.make_update

    def counted(*args):
        update = make_update(*args)

        def call(*inputs):
            _, error = update(*inputs)
            return torch.tensor([float(record.log.count("u")), 0.0]), error

        return call

    monkeypatch.setattr(dqn, "make_update", counted)
    dqn.train(dqn.Args(**SHORT, total_timesteps=100))
    assert scalars(Path("r"))["losses/td_loss"] == [(60, 3), (80, 8), (100, 13)]


# runs


LEARN = {"num_envs": 8, "buffer_size": 6000, "learning_starts": 500, "learning_rate": 5e-4}
LEARN |= {"target_network_frequency": 200, "exploration_fraction": 0.6, "end_e": 0.02}
LEARN |= {"eval_episodes": 50, "eval_e": 0.0, "compile": False, "run_dir": "r"}


@pytest.mark.parametrize(
    "env_id, options",
    [
        ("SmallCatch", {}),
        pytest.param("SmallCatch", {"num_envs": 1}, marks=SLOW, id="num_envs"),
        pytest.param("Catch", {}, marks=SLOW),
        ("SmallCatch", ALL | {"loss": "huber", "max_grad_norm": 10.0}),
        *(
            pytest.param("SmallCatch", {name: value}, marks=SLOW, id=name)
            for name, value in (
                ALL | {"loss": "huber", "max_grad_norm": 10.0, "bf16": True}
            ).items()
        ),
    ],
)
def test_learns_to_catch(env_id, options):
    """Every block, where a random policy catches a third of them or less."""
    steps = 4000 if env_id == "Catch" else 6000
    env_id = f"pixel_envs:{env_id}-v0"
    dqn.train(dqn.Args(env_id=env_id, total_timesteps=steps, **LEARN | options))
    logged = scalars(Path("r"))
    returns = [value for _, value in logged["charts/episodic_return"]]
    assert np.mean(returns[:100]) < 0 and np.mean(returns[-100:]) > 0.7  # with 2% at random
    ((_, evaluated),) = logged["eval/episodic_return"]
    assert evaluated > 0.9
    assert {"losses/td_loss", "losses/q_values", "charts/epsilon"} <= logged.keys()


@pytest.mark.parametrize(
    "options",
    [{}, ALL | {"compile": True, "bf16": True}, {"env_id": "ALE/Breakout-v5"}],
    ids=["plain", "all", "atari"],
)
def test_killed_and_resumed_ends_as_if_never_stopped(run, tmp_path, options):
    """SIGKILL at random moments; the same weights, replay and scalars to the last bit."""
    options = SHORT | {"num_envs": 2, "buffer_size": 300, "checkpoint_replay": True} | options
    options |= {"checkpoint_every": 100, "eval_every": 300, "total_timesteps": 800, "seed": 3}
    options |= {"target_network_frequency": 48}  # moves on both sides of a kill
    assert_killed_ends_as_whole("dqn_atari.py", options, tmp_path, run)


def test_saving_and_evaluating_do_not_change_training():
    agents = []
    for every in (0, 40):
        options = SHORT | ALL | {"checkpoint_every": every, "eval_every": 2 * every}
        options |= {"checkpoint_replay": every > 0, "run_dir": f"r{every}"}
        run_dir = dqn.train(dqn.Args(total_timesteps=400, **options))
        agents.append(dict(dqn.load_agent(run_dir).state_dict()))
    assert_same(*agents)


def test_atari_trains_resumes_and_evaluates(run, tmp_path, monkeypatch):
    """Breakout, in processes of their own; the evaluation repeats itself."""
    options = SHORT | {"env_id": "ALE/Breakout-v5", "num_envs": 2, "checkpoint_replay": True}
    options |= {"total_timesteps": 240, "eval_episodes": 2, "run_dir": str(tmp_path / "r")}
    options |= {"exploration_fraction": 0.0, "checkpoint_every": 80}
    out = run("dqn_atari.py", *flags(**options), cwd=tmp_path).stdout
    assert "Atari protocol" in out and "clipped for learning; sticky actions 0\n" in out
    words = ["--resume", "r", "--total-timesteps", 400]
    out = run("dqn_atari.py", *words, cwd=tmp_path).stdout
    assert load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"] == 400
    (line,) = re.findall("^evaluation of 2 episodes.*$", out, re.M)
    assert "done: r" in out and "new episodes" not in out
    assert run("dqn_atari.py", "--evaluate", "r", cwd=tmp_path).stdout.strip() == line
    agent = dqn.load_agent(tmp_path / "r")
    assert int(agent.act(np.zeros((4, 84, 84), np.uint8))) in range(4)
    monkeypatch.setattr(arguments.signal, "signal", lambda *_: None)
    for mode in ("--evaluate", "--resume"):
        monkeypatch.setattr(sys, "argv", ["dqn_atari.py", mode, "r", "--eval-e", "0.5"])
        assert arguments.parse_args(dqn.Args, dqn.SCRIPT)[0].eval_e == 0.5


def test_evaluation_acts_at_random_as_often_as_it_says(monkeypatch):
    greedy, played = [], []
    env = envs.make_env(dqn.Args(env_id="pixel_envs:SmallCatch-v0"))
    step = env.step
    monkeypatch.setattr(env, "step", lambda action: (played.append(int(action)), step(action))[1])
    monkeypatch.setattr(envs, "make_env", lambda *_: env)

    def act(obs):
        greedy.append(len(played))
        return np.int64(1)

    for epsilon in (0.0, 0.3, 1.0):
        greedy.clear(), played.clear()
        args = dqn.Args(eval_e=epsilon, eval_episodes=600)
        envs.play(act, args, Path("r"))
        assert len(played) == 3000
        assert (
            chi_squared([3000 - len(greedy), len(greedy)], [3000 * epsilon, 3000 - 3000 * epsilon])
            < 1
        )
        if epsilon == 1:
            assert chi_squared(np.bincount(np.array(played) + 1), [1000] * 3) < 1


@pytest.mark.parametrize(
    "end, n_step, expected",
    [
        ("terminated", 3, [2.71, 1.9, 1.0]),
        ("truncated", 1, [10, 10, 10, 10]),
        ("truncated", 3, [10, 10, 10, 10]),
    ],
)
def test_value_at_time_limits(end, n_step, expected):
    """Reward 1 forever, discount 0.9: cut off, it is worth 10 at every step."""
    options = SHORT | {"env_id": f"pixel_envs:Constant-{end}-v0", "gamma": 0.9, "n_step": n_step}
    options |= {"train_frequency": 1, "target_network_frequency": 12, "learning_rate": 5e-4}
    agent = dqn.load_agent(
        dqn.train(dqn.Args(**options | {"total_timesteps": 1000, "batch_size": 32}))
    )
    stacks = torch.zeros(len(expected), 4, 36, 36)
    for t in range(len(expected)):
        stacks[t, 3 - t :] = 200
    with torch.no_grad():
        values = agent.q_network(stacks)
    np.testing.assert_allclose(values, np.transpose([expected] * 2), rtol=0.2)  # other seeds: 0.1


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("wrong, when", [(math.nan, 24), (math.inf, 24), (math.nan, 40)])
def test_wrong_reward_stops_the_run_and_leaves_the_last_good_checkpoint(
    monkeypatch, capsys, prioritized, wrong, when
):
    """At the first or the last step between two logs."""
    recv = envs.Environments.recv

    def broken(self):
        obs, reward, *rest = recv(self)
        return obs, reward + (wrong if self.steps == when else 0), *rest

    monkeypatch.setattr(envs.Environments, "recv", broken)
    options = SHORT | {"learning_starts": 4, "checkpoint_every": 20, "total_timesteps": 400}
    options |= {"prioritized": prioritized}
    with pytest.raises(SystemExit) as stopped:
        dqn.train(dqn.Args(**options))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and "reward or observation became NaN" in line
    assert all(x.isfinite().all() for x in dqn.load_agent("r").parameters())


@pytest.mark.parametrize("prioritized", [False, True])
def test_loss_gone_wrong_stops_the_run(capsys, prioritized):
    options = SHORT | {"learning_rate": 1e30, "prioritized": prioritized, "log_every": 200}
    with pytest.raises(SystemExit) as stopped:
        dqn.train(dqn.Args(**options, total_timesteps=400))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and "a weight or loss became NaN" in line


def test_weights_gone_wrong_after_finite_losses_stop_the_run(capsys, monkeypatch):
    def make_update(*_):
        def update(q_network, *_):
            q_network.fill_(math.nan)
            return torch.ones(2), torch.zeros(8)

        return update

    monkeypatch.setattr(dqn, "make_update", make_update)
    with pytest.raises(SystemExit) as stopped:
        dqn.train(dqn.Args(**SHORT, total_timesteps=100, checkpoint_every=20))
    assert stopped.value.code == 1 and "a weight or loss became NaN" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in dqn.load_agent("r").parameters())


def test_infinite_loss_stops_the_run(capsys, monkeypatch):
    """Weights stay finite, but Adam's averages do not: nothing would be learned any more."""
    monkeypatch.setattr(envs, "_number", lambda reward: 1e25 * float(reward))
    with pytest.raises(SystemExit) as stopped:
        dqn.train(dqn.Args(**SHORT, clip_reward=False, total_timesteps=400))
    assert stopped.value.code == 1 and "or loss became NaN or inf" in capsys.readouterr().err


def test_replay_is_neither_copied_to_be_saved_nor_kept_twice():
    args = dqn.Args(**SHORT, checkpoint_replay=True, total_timesteps=200)
    dqn.train(args)
    checkpoint = load_checkpoint(Path("r/checkpoint.pt"))
    replay = dqn.Replay(args, (4, 36, 36), CPU)
    replay.load_state_dict(checkpoint["replay"])
    assert 200 < replay.num_frames < 300 < replay.capacity
    assert len(checkpoint["replay"]["frames"]) == replay.num_frames + 1  # and black
    for name in ("stacks", "actions", "rewards", "ends", "frames"):
        for saved in (checkpoint["replay"][name], replay.state_dict()[name]):
            assert saved.untyped_storage().nbytes() == saved.nbytes  # what is filled
        assert saved.data_ptr() == getattr(replay, name).data_ptr()
    dqn.train(dataclasses.replace(args, resume="r", total_timesteps=240), checkpoint)
    assert "replay" not in checkpoint


@pytest.mark.parametrize(
    "options, why",
    [
        ({"env_id": "CartPole-v1"}, "CartPole-v1"),
        ({"env_id": "HalfCheetah-v5"}, "use sac_continuous.py"),
        ({"env_id": "pixel_envs:Colours-v0"}, "Colours"),
        ({"env_id": "pixel_envs:ColoursLast-v0"}, "ColoursLast"),
        ({"env_id": "pixel_envs:Tiny-v0"}, "of bytes, 36 pixels or more each way"),
        ({"env_id": "pixel_envs:Stacked-v0"}, "does not give one frame"),
        ({"env_id": "pixel_envs:StackedVectors-v0"}, "does not give one frame"),
        ({"env_id": "pixel_envs:Floats-v0"}, "Floats"),
        ({"n_step": 0}, "--n-step 0"),
        (
            {"n_step": 6, "buffer_size": 20},
            "--buffer-size 20: must be at least 12 times --num-envs, with --n-step 6",
        ),
        ({"n_step": 6, "learning_starts": 20}, "--learning-starts 20: must be at least 6 times"),
        (
            {"buffer_size": 4},
            "--buffer-size 4: must be at least 2 times --num-envs, with --n-step 1",
        ),
        ({"priority_beta": 0.5}, "--priority-beta 0.5: must go with --prioritized"),
        ({"priority_alpha": 0.5}, "--priority-alpha 0.5: must go with --prioritized"),
        ({"start_e": 2.0}, "--start-e 2.0: must be from 0 to 1"),
        ({"eval_e": -0.1}, "--eval-e"),
        ({"priority_alpha": -1.0}, "--priority-alpha -1.0"),
        ({"priority_alpha": math.nan}, "--priority-alpha nan"),
        ({"priority_beta": -0.1}, "--priority-beta -0.1"),
        ({"train_frequency": 0}, "--train-frequency"),
        ({"target_network_frequency": 0}, "--target-network-frequency"),
        ({"buffer_size": 1}, "--buffer-size 1"),
        ({"buffer_size": 10**14}, f"--buffer-size {10**14}: "),
        ({"learning_starts": 3}, "--learning-starts 3"),
        ({"total_timesteps": 3}, "--total-timesteps 3: must be at least 4, as --num-envs is"),
        ({"tau": 1.5}, "--tau"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, options, why):
    with pytest.raises(SystemExit) as stopped:
        dqn.train(dqn.Args(**SHORT | {"total_timesteps": 80} | options))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and why in line
    assert not Path("r").exists()
