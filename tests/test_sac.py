"""SAC: its maths, each against a reference written in another way, its replay and its runs."""

import copy
import dataclasses
import gc
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections import deque
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import toy_envs
from conftest import (
    ROOT,
    assert_killed_ends_as_whole,
    assert_same,
    needs_compiler,
    scalars,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import sac_continuous as sac
from common import compute, envs, runs
from common.checkpoint import load_checkpoint
from common.compute import to_numpy
from common.tensors import FlatAdam, flatten_parameters

BOX = gym.spaces.Box(np.array([-2.0, 0.0, -1.0], np.float32), np.array([1.0, 0.5, 1.0], np.float32))
SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="takes minutes: RUN_SLOW=1 runs it"),
]
CPU = torch.device("cpu")
SHORT = {"learning_starts": 100, "buffer_size": 2000, "batch_size": 16, "hidden_sizes": (16, 16)}
SHORT |= {"num_threads": 1, "log_every": 50, "eval_episodes": 1, "compile": False, "run_dir": "r"}


def make_agent(space=BOX, **kwargs):
    torch.manual_seed(0)
    return sac.Agent((4,), space, sac.Args(**{"hidden_sizes": (32, 32)} | kwargs))


def squashed(mean, log_std):
    """The policy on torch.distributions, with the cache that remembers u of tanh(u)."""
    normal = Independent(Normal(mean, log_std.exp()), 1)
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def reference_sample(mean, log_std, noise):
    """Another way to the action and its log-density: the distribution transforms the sample."""
    distribution = squashed(mean, log_std)
    action = distribution.transforms[0](mean + log_std.exp() * noise)
    return action, distribution.log_prob(action)


# the maths


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_log_prob_equals_torch_distributions_far_into_the_tails(dtype, tolerance):
    """And its gradient, which stays finite, with |u| up to 20, by the mean or by the noise."""
    u = torch.linspace(-20, 20, 81, dtype=dtype)[:, None]
    spread = torch.tensor([-1.0, 0.0, 0.5], dtype=dtype).expand(81, 3)
    for mean in (u.expand(81, 3), torch.zeros(81, 3, dtype=dtype)):
        noise = (u - mean) / spread.exp() if mean[0, 0] == 0 else torch.zeros_like(mean)
        results = []
        for sample in (sac.sample_with_log_prob, reference_sample):
            policy = mean.clone().requires_grad_(), spread.clone().requires_grad_()
            action, log_prob = sample(*policy, noise)
            results.append((action, log_prob, *torch.autograd.grad(log_prob.sum(), policy)))
        for got, expected in zip(*results, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_log_prob_in_float32_equals_another_formula_in_float64():
    """1 - tanh(u)^2 = 4 / (e^u + e^-u)^2, with |u| up to 20; torch's transform has our formula."""
    mean, log_std = torch.linspace(-16, 16, 129).repeat(2, 1).T, torch.tensor([-1.0, 0.6])
    for noise in (torch.full((129, 2), -2.0), torch.zeros(129, 2), torch.full((129, 2), 2.1)):
        policy = [x.clone().requires_grad_() for x in (mean, log_std.expand_as(mean))]
        action, log_prob = sac.sample_with_log_prob(*policy, noise)
        gradient = torch.autograd.grad(log_prob.sum(), policy)
        m, s, z = (x.detach().double() for x in (*policy, noise))
        u = m + s.exp() * z
        expected = -(z**2) / 2 - s - math.log(2 * math.pi) / 2
        expected = expected - 2 * (math.log(2) - torch.logaddexp(u, -u))
        by_log_std = 2 * u.tanh() * s.exp() * z - 1
        pairs = (action, u.tanh()), (log_prob, expected.sum(1))
        for got, exact in (*pairs, *zip(gradient, (2 * u.tanh(), by_log_std))):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_log_prob_is_exact_where_tanh_rounds_to_one():
    """log(1 - tanh(10)^2 + 1e-6), a common repair, would be off by 4.8."""
    one = torch.ones(1, 1)
    for u in (-10.0, 10.0):
        _, got = sac.sample_with_log_prob(u * one, 0 * one, 0 * one)
        exact = -0.5 * math.log(2 * math.pi) - math.log(4) + 20 + 2 * math.log1p(math.exp(-20))
        assert got.item() == pytest.approx(exact, rel=1e-6)


def test_density_and_entropy_are_those_of_actions_from_minus_one_to_one():
    """Whatever the bounds are, which env_action fills; their integral over (-1, 1) is one."""
    noise, obs = torch.randn(50, 3), torch.randn(50, 4)
    results = []
    for bound in (1.0, 0.4):
        agent = make_agent(gym.spaces.Box(-bound, bound, (3,)))
        action, log_prob = sac.sample_with_log_prob(*agent.actor(obs), noise)
        stored, env_action = agent.sample(obs, noise)
        torch.testing.assert_close(stored, action)
        torch.testing.assert_close(env_action, bound * action)
        results.append(log_prob)
    assert torch.equal(*results)
    agent = make_agent()
    edges = torch.tensor([[-1.0] * 3, [1.0] * 3])
    assert agent.env_action(edges).numpy().tolist() == [BOX.low.tolist(), BOX.high.tolist()]
    torch.testing.assert_close(agent.env_action(0 * edges)[0], torch.tensor([-0.5, 0.25, 0.0]))
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)[:, None]
    policy = torch.full_like(grid, 0.3), torch.full_like(grid, -0.5)
    action, log_prob = sac.sample_with_log_prob(*policy, grid)
    assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_acting_equals_the_policy_in_training_and_deterministically_its_mean():
    agent = make_agent()
    for parameter in agent.actor.parameters():
        parameter.add_(torch.randn_like(parameter))
    obs, noise = 3 * torch.randn(200, 4), torch.randn(200, 3)
    mean, log_std = agent.actor(obs)
    assert log_std.min() >= -5 and log_std.max() <= 2 and log_std.max() - log_std.min() > 5
    output = nn.Sequential(*agent.actor)(obs)
    expected = -1.5 + 3.5 * (2 * torch.sigmoid(2 * output[:, 3:]) - 1)
    torch.testing.assert_close(log_std, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(mean, output[:, :3])
    action, _ = sac.sample_with_log_prob(mean, log_std, noise)
    assert to_numpy(agent.sample, sac.Args(compile=False), obs, noise).__name__ == "untraced"
    act = to_numpy(agent.sample, agent.args, obs, noise)
    assert act.__name__ == "traced"
    for sample in (agent.sample, act):  # as of weights gone wrong
        env_action = np.asarray(sample(torch.full_like(obs, math.nan), noise)[1])
        assert np.array_equal(env_action, np.broadcast_to(BOX.low, env_action.shape))
    stored, env_action = act(obs, noise)
    np.testing.assert_allclose(stored, action, rtol=1e-4, atol=1e-5)
    half = (BOX.high - BOX.low) / 2
    np.testing.assert_allclose(env_action, BOX.low + half + half * stored, rtol=1e-4, atol=1e-5)
    got = np.stack([agent.act(x) for x in obs.double().numpy()])
    expected = BOX.low + half + half * np.tanh(mean.numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert all(BOX.contains(x) for x in got)


def test_td_target_by_hand():
    """The smaller of both, minus alpha's share of the surprise; none of it after a termination."""
    reward, termination = torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0.0, 1.0, 0.0])
    next_q = torch.tensor([[5.0, 5.0, 3.0], [4.0, 4.0, 7.0]])
    surprise, alpha = torch.tensor([-2.0, -2.0, 1.0]), torch.tensor([0.5])
    got = sac.td_target(reward, termination, next_q, surprise, alpha, 0.9)
    torch.testing.assert_close(got, torch.tensor([1 + 0.9 * 5, 1.0, -2 + 0.9 * 2.5]))


def test_losses_equal_their_formulas_and_alpha_goes_where_it_should():
    rng = np.random.default_rng(0)
    q, surprise, alpha = rng.normal(size=(2, 9)), rng.normal(size=9), 0.3
    q_, surprise_, alpha_ = torch.tensor(q), torch.tensor(surprise), torch.tensor([alpha])
    expected = sum(alpha * surprise[b] - min(q[0, b], q[1, b]) for b in range(9)) / 9
    assert sac.actor_loss(q_, surprise_, alpha_).item() == pytest.approx(expected)
    for entropy in (-5.0, -1.0):  # with a target of -3
        log_alpha, log_prob = (
            torch.tensor([-1.2], dtype=torch.float64),
            surprise_ - surprise_.mean(),
        )
        log_prob = log_prob - entropy

        def loss(log_alpha, log_prob=log_prob):
            return sac.alpha_loss(log_alpha, log_prob, -3)

        assert loss(log_alpha).item() == pytest.approx(math.exp(-1.2) * (entropy + 3))
        slope = (loss(log_alpha + 1e-5) - loss(log_alpha - 1e-5)) / 2e-5
        gradient = torch.func.grad(loss)(log_alpha)
        assert gradient.item() == pytest.approx(slope.item(), rel=1e-6)
        assert (gradient < 0) == (entropy < -3)  # a step against it: up if too little is random


@torch.no_grad()
def test_twin_networks_equal_two_of_linear_layers_and_begin_as_they_do():
    agent = make_agent(hidden_sizes=(64, 48))
    obs, action = torch.randn(10, 4), torch.randn(10, 3)
    got = agent.critic(obs, action)
    assert_same(dict(agent.critic.state_dict()), dict(agent.target.state_dict()))
    for k in range(2):
        layers = [nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1)]
        for twin, layer in zip(agent.critic[::2], layers[::2], strict=True):
            layer.weight.copy_(twin.weight[k].T)
            layer.bias.copy_(twin.bias[k, 0])
            bound = layer.in_features**-0.5
            for initial in (layer.weight, layer.bias):
                assert initial.abs().max() <= bound
            assert layer.weight.abs().max() > 0.8 * bound
            assert layer.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        expected = nn.Sequential(*layers)(torch.cat((obs, action), 1))[:, 0]
        torch.testing.assert_close(got[k], expected)
    assert (got[0] - got[1]).abs().min() > 1e-4
    for twin in agent.critic[::2]:
        assert (twin.weight[0] != twin.weight[1]).all() and (twin.bias[0] != twin.bias[1]).all()


def test_the_policy_has_the_layers_that_are_asked_for():
    actor = make_agent(hidden_sizes=(64, 48, 32)).actor
    sizes = [(x.in_features, x.out_features) for x in actor[::2]]
    assert sizes == [(4, 64), (64, 48), (48, 32), (32, 6)]
    assert all(type(x) is nn.ReLU for x in actor[1::2])


# the two updates


class Learner:
    """What train() makes for learning, with `compile_function`, and random transitions."""

    def __init__(self, wrap=lambda update, *_: update, dtype=torch.float32, **kwargs):
        self.args = sac.Args(q_lr=3e-3, policy_lr=2e-3, gamma=0.9, **kwargs)
        self.agent = agent = make_agent(**kwargs).to(dtype)
        self.critic, self.target, self.actor = (
            flatten_parameters(x) for x in (agent.critic, agent.target, agent.actor)
        )
        learned = {"critic": self.critic, "actor": self.actor, "alpha": agent.log_alpha}
        optimizer = nn.ModuleDict({k: FlatAdam(x, eps=1e-8) for k, x in learned.items()})
        updates = sac.make_updates(agent, optimizer, (4, 3, 1, 1, 4), self.args)
        self.updates = [wrap(update, self.args, CPU) for update in updates]
        rng = torch.Generator().manual_seed(2)
        self.rows = torch.randn(200, 13, generator=rng).to(dtype)
        self.rows[:, 8] = torch.rand(200, generator=rng) < 0.3  # terminations

    def update_critic(self, indices, noise):
        networks = self.critic, self.target, self.actor
        return self.updates[0](*networks, self.agent.log_alpha, self.rows, indices, noise)

    def update_actor(self, indices, noise):
        networks = self.critic, self.actor
        return self.updates[1](*networks, self.agent.log_alpha, self.rows, indices, noise)

    def vectors(self):
        """Copies of all that the updates may change."""
        named = {"critic": self.critic, "target": self.target, "actor": self.actor}
        return {k: x.clone() for k, x in (named | {"alpha": self.agent.log_alpha}).items()}


def draws(count: int):
    """Indices [16] and noise [16, 3] for `count` updates."""
    rng = torch.Generator().manual_seed(3)
    for _ in range(count):
        indices = torch.randint(200, (16,), generator=rng)
        yield indices, torch.randn(16, 3, generator=rng)


class Plain:
    """The same by autograd and torch.optim.Adam, on separate networks and torch.distributions."""

    def __init__(self, learner: Learner):
        self.args, agent = learner.args, copy.deepcopy(learner.agent).requires_grad_()
        self.actor, self.critic, self.target = agent.actor, agent.critic, agent.target
        self.log_alpha = nn.Parameter(agent.log_alpha.clone())
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), self.args.q_lr)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), self.args.policy_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], self.args.q_lr)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward(inputs=[x for group in optimizer.param_groups for x in group["params"]])
        optimizer.step()

    def update_critic(self, batch, noise):
        obs, action, reward, termination, next_obs = (
            x.squeeze(1) for x in batch.tensor_split((4, 7, 8, 9), 1)
        )
        with torch.no_grad():
            next_action, log_prob = reference_sample(*self.actor(next_obs), noise)
            q1, q2 = self.target(next_obs, next_action)
            value = torch.where(q1 < q2, q1, q2) - self.log_alpha.exp() * log_prob
            wanted = torch.where(termination.bool(), reward, reward + self.args.gamma * value)
        q1, q2 = self.critic(obs, action)
        mse = nn.functional.mse_loss
        loss = mse(q1, wanted) + mse(q2, wanted)
        self.step(self.critic_optimizer, loss)
        return [loss.item() / 2, (q1.mean() + q2.mean()).item() / 2]

    def update_actor(self, batch, noise):
        obs, alpha = batch[:, :4], self.log_alpha.exp().item()
        action, log_prob = reference_sample(*self.actor(obs), noise)
        loss = (alpha * log_prob - torch.minimum(*self.critic(obs, action))).mean()
        self.step(self.actor_optimizer, loss)
        log_prob = log_prob.detach()
        if self.args.autotune:
            self.step(self.alpha_optimizer, (self.log_alpha.exp() * (-log_prob + 3)).mean())
        return [loss.item(), -log_prob.mean().item(), alpha]


@pytest.mark.parametrize("autotune", [True, False])
@torch.no_grad()
def test_updates_equal_autograd_with_torch_optim_adam(autotune):
    """Fifteen steps; each update changes its own parameters alone, and says what it minimised."""
    learner = Learner(dtype=torch.float64, autotune=autotune)
    plain, begin = Plain(learner), learner.vectors()
    for indices, noise in draws(15):
        batch, before = learner.rows[indices], learner.vectors()
        got = learner.update_critic(indices, noise)
        after = learner.vectors()
        assert_same(before | {"critic": after["critic"]}, after)
        with torch.enable_grad():
            expected = plain.update_critic(batch, noise)
        assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        got = learner.update_actor(indices, -noise)
        with torch.enable_grad():
            expected = plain.update_actor(batch, -noise)
        assert got.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert_same(after["critic"], learner.critic)
        assert_same(after["target"], learner.target)
    end = learner.vectors()
    moved = {name: not torch.equal(begin[name], end[name]) for name in begin}
    assert moved == {"critic": True, "target": False, "actor": True, "alpha": autotune}
    for mine, other in ((learner.agent.critic, plain.critic), (learner.agent.actor, plain.actor)):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(end["alpha"], plain.log_alpha.detach(), rtol=1e-5, atol=1e-6)


@needs_compiler
@torch.no_grad()
def test_compiled_updates_equal_eager_ones_and_compile_once():
    results = []
    for wrap in (lambda update, *_: update, compute.compile_function):
        learner = Learner(wrap)
        torch._dynamo.utils.counters.clear()
        for indices, noise in draws(12):
            metrics = learner.update_critic(indices, noise), learner.update_actor(indices, noise)
            learner.target.lerp_(learner.critic, 0.01)
        results.append((learner.vectors(), *metrics))
    assert learner.args.compile and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


# when what happens in train()


def record(monkeypatch) -> tuple[list[str], list[float], list[np.ndarray]]:
    """Have train() learn nothing; return what it does in order (s: a step of all environments, c
    and a: updates), how far each c finds the target networks behind, and the actions.
    """
    log, lags, actions, stepping = [], [], [], []
    send, recv = envs.Environments.send, envs.Environments.recv

    def make_updates(*_):
        def update_critic(critic, target, *_):
            assert stepping[-1]  # the environments, while the networks learn
            if "c" not in log:
                critic.fill_(1.0)
                target.fill_(0.0)
            log.append("c")
            lags.append((critic - target).mean().item())
            return torch.tensor([1.0, 2.0])

        def update_actor(*_):
            log.append("a")
            return torch.tensor([3.0, 4.0, 5.0])

        return update_critic, update_actor

    def sent(self, action):
        log.append("s")
        actions.append(action.copy())
        send(self, action)
        stepping.append(True)

    def received(self):
        stepping.append(False)
        return recv(self)

    monkeypatch.setattr(sac, "make_updates", make_updates)
    monkeypatch.setattr(envs.Environments, "send", sent)
    monkeypatch.setattr(envs.Environments, "recv", received)
    return log, lags, actions


@pytest.mark.parametrize(
    "num_envs, utd_ratio, policy_frequency, starts, steps, expected",
    [
        (1, 1.0, 1, 2, 5, "s s sca sca sca"),
        (1, 1.0, 2, 2, 7, "s s scaa sc scaa sc scaa"),  # twice after every second
        (1, 1.0, 3, 3, 8, "s s s scaaa sc sc scaaa sc"),
        (1, 0.5, 2, 2, 10, "s s s sc s scaa s sc s scaa"),
        (1, 2.0, 2, 2, 5, "s s scaac scaac scaac"),
        (3, 1.0, 1, 4, 10, "s scaca scacaca"),  # steps 5, 6 | 7, 8, 9; no fourth of all three
        (3, 0.5, 1, 4, 13, "s sca sca scaca"),
        (3, 2.0, 1, 6, 9, "s s scacacacacaca"),
        (3, 0.1, 1, 3, 33, "s s s sca s s sca s s sca s"),  # due in steps 10, 20 and 30
    ],
)
def test_updates_come_when_they_should(
    monkeypatch, num_envs, utd_ratio, policy_frequency, starts, steps, expected
):
    """Counted in environment steps, and none before --learning-starts."""
    log, _, _ = record(monkeypatch)
    options = SHORT | {"num_envs": num_envs, "learning_starts": starts, "total_timesteps": steps}
    options |= {"utd_ratio": utd_ratio, "policy_frequency": policy_frequency}
    sac.train(sac.Args(env_id="toy_envs:Counter-truncated-v0", **options))
    assert "".join(log) == expected.replace(" ", "")
    logged = {tag: values[0][1] for tag, values in scalars(Path("r")).items() if "losses" in tag}
    metrics = "qf_loss", "q_values", "actor_loss", "entropy", "alpha"
    assert logged == {f"losses/{name}": i for i, name in enumerate(metrics, 1)}


@pytest.mark.parametrize(
    "utd_ratio, frequency, moves",
    [
        (1.0, 1, [1] * 30),
        (1.0, 4, [1, 0, 0, 0] * 7 + [1, 0]),
        (0.5, 3, [0, 0, 1] * 5),
        (2.0, 1, [1] * 60),
    ],
)
def test_target_networks_follow_geometrically(monkeypatch, utd_ratio, frequency, moves):
    """The lag behind networks that stand still is (1 - tau)^n after n moves."""
    _, lags, _ = record(monkeypatch)
    options = SHORT | {"learning_starts": 8, "total_timesteps": 38, "tau": 0.1}
    options |= {"utd_ratio": utd_ratio, "target_network_frequency": frequency}
    run_dir = sac.train(sac.Args(env_id="toy_envs:Counter-truncated-v0", **options))
    target = next(sac.load_agent(run_dir).target.parameters())
    lags.append(1 - target.mean().item())
    assert lags == pytest.approx(0.9 ** np.cumsum([0, *moves]), rel=1e-4)


def test_actions_are_uniform_over_the_bounds_until_learning_starts(monkeypatch):
    """And what is stored is where they lie between them; then they are the policy's."""
    _, _, actions = record(monkeypatch)
    options = SHORT | {"num_envs": 2, "learning_starts": 2000, "total_timesteps": 3000}
    options |= {"buffer_size": 3000}
    run_dir = sac.train(sac.Args(env_id="toy_envs:Shaped-v0", **options))
    stored = load_checkpoint(run_dir / "checkpoint.pt")["replay"]["rows"][:, 6:8].numpy()
    shares = (np.concatenate(actions)[:, :, 0] - [-2, 0]) / [3, 0.5]
    np.testing.assert_allclose(stored, 2 * shares - 1, atol=1e-6)

    def distance(sample):  # of Kolmogorov and Smirnov
        return np.abs(np.sort(sample) - (np.arange(len(sample)) + 0.5) / len(sample)).max()

    for random_share, policy_share in zip(shares[:2000].T, shares[2000:].T):
        assert distance(random_share) < 1.95 / math.sqrt(2000)  # one in a thousand is farther
        assert distance(policy_share) > 0.1
    assert abs(np.corrcoef(shares[:2000].T)[0, 1]) < 0.1


def test_noise_is_normal_and_never_used_twice(monkeypatch):
    """Of actions, of the critic's targets and of each of the actor's updates on the same batch."""
    noises, to_numpy = {"act": [], "critic": [], "actor": []}, sac.compute.to_numpy

    def make_updates(*_):
        def update_critic(*inputs):
            noises["critic"].append(inputs[-1].clone())
            return torch.zeros(2)

        def update_actor(*inputs):
            noises["actor"].append(inputs[-1].clone())
            return torch.zeros(3)

        return update_critic, update_actor

    def spied(function, *examples):
        act = to_numpy(function, *examples)

        def spy(obs, noise):
            noises["act"].append(noise.clone())
            return act(obs, noise)

        return spy

    monkeypatch.setattr(sac, "make_updates", make_updates)
    monkeypatch.setattr(sac.compute, "to_numpy", spied)
    options = SHORT | {"num_envs": 8, "total_timesteps": 2100, "learning_starts": 96}
    sac.train(sac.Args(env_id="Pendulum-v1", **options))
    assert [len(draws) for draws in noises.values()] == [250, 2000, 2000]
    assert len({x.numpy().tobytes() for draws in noises.values() for x in draws}) == 4250
    for draws in noises.values():
        x = torch.stack(draws).double()
        bound = 4 / math.sqrt(x.numel())
        assert abs(x.mean()) < bound and abs(x.var() - 1) < bound * math.sqrt(2)
        assert abs((x**4).mean() - 3) < bound * math.sqrt(96)


def test_updates_are_given_the_right_networks_and_the_same_batch(monkeypatch):
    seen = []

    def make_updates(agent, *_):
        vectors = zip((agent.actor, agent.critic, agent.target), ("actor", "critic", "target"))
        names = {next(x.parameters()).data_ptr(): name for x, name in vectors}

        def note(*inputs):
            *networks, _, _, indices, _ = inputs
            seen.append(([names[x.data_ptr()] for x in networks], tuple(indices.tolist())))
            return torch.tensor([float(len(seen))] * (5 - len(networks)))

        return note, note

    monkeypatch.setattr(sac, "make_updates", make_updates)
    options = SHORT | {"num_envs": 4, "learning_starts": 16, "total_timesteps": 48, "log_every": 16}
    sac.train(sac.Args(env_id="toy_envs:Counter-truncated-v0", policy_frequency=1, **options))
    networks, batches = zip(*seen)
    assert list(networks) == [["critic", "target", "actor"], ["critic", "actor"]] * 32
    assert batches[::2] == batches[1::2] and len(set(batches)) == 32
    logged = scalars(Path("r"))  # means since the last log: of 1, 3, ..., and of 2, 4, ...
    assert logged["losses/qf_loss"] == [(32, 16.0), (48, 48.0)]
    assert logged["losses/actor_loss"] == [(32, 17.0), (48, 49.0)]


def test_alpha_begins_at_one_or_as_given():
    assert make_agent().log_alpha.exp() == 1
    given = make_agent(autotune=False, alpha=0.3)
    assert given.log_alpha.exp().item() == pytest.approx(0.3)


# the replay


def make_replay(size: int, num_envs: int = 1, batch_size: int = 64) -> sac.Replay:
    args = sac.Args(buffer_size=size, num_envs=num_envs, batch_size=batch_size)
    return sac.Replay(args, (2,), 1, CPU)


def random_step(rng, num_envs: int):
    """Random action, reward, terminated, truncated, obs and infos of a step."""
    terminated, truncated = rng.random((2, num_envs)) < 0.3
    truncated &= ~terminated
    final_obs = np.full(num_envs, None)
    for n in np.flatnonzero(terminated | truncated):
        final_obs[n] = rng.normal(size=2)
    action, reward, obs = (rng.normal(size=(num_envs, k)) for k in (1, 1, 2))
    return action, reward[:, 0], terminated, truncated, obs, {"final_obs": final_obs}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(3, 40),
    num_envs=st.integers(1, 3),
    steps=st.integers(1, 60),
    saved=st.integers(0, 60),
)
def test_replay_holds_the_last_transitions_whole(seed, size, num_envs, steps, saved):
    """Against a list; saved and loaded on the way, before or after it is full."""
    rng, draw = np.random.default_rng(seed), torch.Generator().manual_seed(0)
    naive = deque(maxlen=size // num_envs * num_envs)
    replay, obs = make_replay(size, num_envs), rng.normal(size=(num_envs, 2))
    replay.start(obs)
    for t in range(steps):
        if t == saved:
            state, replay = replay.state_dict(), make_replay(size, num_envs)
            assert state["rows"].untyped_storage().nbytes() == len(naive) * 7 * 4
            replay.load_state_dict(state)
        action, reward, terminated, truncated, next_obs, infos = random_step(rng, num_envs)
        shown = next_obs.copy()  # and overwritten afterwards, as the environments do it
        replay.add(action, reward, terminated, truncated, shown, infos)
        shown[:] = np.nan
        for n in range(num_envs):
            ended = terminated[n] or truncated[n]
            last = infos["final_obs"][n] if ended else next_obs[n]
            naive.append([*obs[n], action[n, 0], reward[n], float(terminated[n]), *last])
        obs = next_obs
        expected = torch.tensor(list(naive), dtype=torch.float32)
        batch = replay.rows[replay.sample(draw)]
        assert (batch[:, None] == expected).all(2).any(1).all()
        parts = expected[:, :2], expected[:, 3], expected[:, 5:], torch.tensor(obs).float()
        assert torch.equal(replay.latest(len(naive)), torch.cat([x.flatten() for x in parts]))
    assert sorted(expected.tolist()) == sorted(replay.rows[: len(expected)].tolist())


@pytest.mark.parametrize("steps", [25, 60])  # in half of it, and past its end
def test_replay_is_sampled_uniformly(steps):
    replay, rng = make_replay(50, batch_size=50_000), np.random.default_rng(0)
    replay.start(np.zeros((1, 2)))
    for _ in range(steps):
        replay.add(*random_step(rng, 1))
    indices = replay.sample(torch.Generator().manual_seed(0))
    counts, expected = torch.bincount(indices).double(), 50_000 / min(steps, 50)
    assert len(counts) == min(steps, 50)
    critical = {25: 51.2, 60: 85.4}[steps]  # of 24 and 49 degrees of freedom, one in a thousand
    assert ((counts - expected) ** 2 / expected).sum() < critical


def test_replay_takes_no_more_memory_once_it_is_full():
    replay, rng, sizes = make_replay(30, 3), np.random.default_rng(0), []
    replay.start(np.zeros((3, 2)))
    address = replay.rows.data_ptr()
    for _ in range(200):
        replay.add(*random_step(rng, 3))
        sizes.append(len(pickle.dumps(vars(replay))))  # of all that it holds
    assert max(sizes[10:]) - min(sizes[10:]) < 16 and replay.rows.data_ptr() == address
    assert replay.rows.shape == (30, 7) and replay.num_rows == 600


def test_a_run_takes_no_more_memory_once_its_replay_is_full(monkeypatch):
    """At the end of every episode; with evaluations and checkpoints."""
    sizes, progress = [], runs.Run.progress

    def measure(self, step):
        progress(self, step)
        gc.collect()
        count = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        sizes.append((count, tracemalloc.get_traced_memory()[0]))

    monkeypatch.setattr(runs.Run, "progress", measure)
    options = {"total_timesteps": 2400, "buffer_size": 500, "log_every": 200, "utd_ratio": 0.2}
    options |= {"checkpoint_every": 400, "eval_every": 800}
    tracemalloc.start()
    sac.train(sac.Args(env_id="Pendulum-v1", **SHORT | options))
    tracemalloc.stop()
    counts, traced = np.transpose(sizes[4:])
    assert np.ptp(counts) < 3 and traced[-1] - traced[0] < 50_000, sizes


@pytest.mark.parametrize("end", ["truncated", "terminated", "both"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_training_stores_the_real_last_observation(monkeypatch, end, num_envs):
    record(monkeypatch)
    options = SHORT | {"num_envs": num_envs, "total_timesteps": 12 * num_envs}
    run_dir = sac.train(sac.Args(env_id=f"toy_envs:Counter-{end}-v0", **options))
    rows = load_checkpoint(run_dir / "checkpoint.pt")["replay"]["rows"]
    over = float(end != "truncated")
    episode = [[0, 0, 0, 1], [1, 0, 0, 2], [2, 1, 0, 3], [3, 1, 0, 4], [4, 1, over, 2]]
    expected = [row for row in (episode * 3)[:12] for _ in range(num_envs)]
    assert rows[:, [0, 2, 3, 4]].tolist() == expected


# runs


@pytest.mark.parametrize(
    "end, expected",
    [
        ("truncated", [8.1, 9.0, 10.0, 10.0, 10.0]),  # not what follows the reset
        ("terminated", [0.81 * 2.71, 0.9 * 2.71, 2.71, 1.9, 1.0]),
        ("both", [0.81 * 2.71, 0.9 * 2.71, 2.71, 1.9, 1.0]),
    ],
)
def test_value_at_time_limits(end, expected):
    """Rewards 0, 0, 1, 1, 1: cut off, with the future of where it was; ended, with none."""
    options = SHORT | {"hidden_sizes": (32, 32), "batch_size": 64, "total_timesteps": 3000}
    options |= {"gamma": 0.9, "tau": 0.05, "q_lr": 3e-3, "policy_frequency": 10**6}
    options |= {"autotune": False, "alpha": 1e-6, "log_every": 1000}
    agent = sac.load_agent(sac.train(sac.Args(env_id=f"toy_envs:Counter-{end}-v0", **options)))
    obs, action = torch.arange(5.0)[:, None], torch.rand(5, 1) * 2 - 1
    with torch.no_grad():
        np.testing.assert_allclose(agent.critic(obs, action), [expected] * 2, atol=0.15)


FAST = {"total_timesteps": 10_000, "hidden_sizes": (64, 64), "batch_size": 128, "gamma": 0.95}
FAST |= {"policy_lr": 1e-3, "q_lr": 2e-3, "tau": 0.01}


@needs_compiler
@pytest.mark.parametrize(
    "options", [FAST, pytest.param({"total_timesteps": 20_000}, marks=SLOW, id="defaults")]
)
def test_learns_to_swing_a_pendulum_up(options, monkeypatch):
    """From about -1,200 on, a random policy's return, to what others publish, about -150."""
    graphs, progress = [], runs.Run.progress

    def count(self, step):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        progress(self, step)

    monkeypatch.setattr(runs.Run, "progress", count)
    options = options | {"learning_starts": 1000, "num_threads": 1, "run_dir": "r"}
    sac.train(sac.Args(env_id="Pendulum-v1", **options))
    assert graphs[1] == graphs[0] + 2 and set(graphs[1:]) == {graphs[1]}  # each compiled once
    logged = scalars(Path("r"))
    returns = [value for _, value in logged["charts/episodic_return"]]
    assert np.mean(returns[:5]) < -800 and np.mean(returns[-20:]) > -250
    ((_, evaluated),) = logged["eval/episodic_return"]
    assert evaluated > -200


@pytest.mark.parametrize(
    "options",
    [
        {"num_envs": 2, "bf16": True, "policy_frequency": 3, "target_network_frequency": 3},
        {"compile": True},
    ],
    ids=["eager", "compiled"],
)
def test_killed_and_resumed_ends_as_if_never_stopped(run, tmp_path, options):
    """SIGKILL at random moments; the same weights, replay and scalars to the last bit."""
    options = SHORT | {"buffer_size": 500, "seed": 3} | options
    options |= {"checkpoint_every": 100, "eval_every": 300}
    options["total_timesteps"] = 1200 if options["compile"] else 700  # more than it keeps
    options |= {"env_id": "Pendulum-v1", "learning_starts": 50}
    assert_killed_ends_as_whole("sac_continuous.py", options, tmp_path, run)


def test_without_its_replay_a_resumed_run_first_fills_a_new_one(monkeypatch, capsys):
    """Which it does with the policy it has, not at random."""
    log, _, _ = record(monkeypatch)
    send, to_numpy, acted = envs.Environments.send, sac.compute.to_numpy, []

    def spied(function, *examples):
        act = to_numpy(function, *examples)
        return lambda *inputs: (acted.append(1), act(*inputs))[1]

    def broken(self, action):
        send(self, action)
        if log.count("s") == 130:
            raise RuntimeError("power cut")

    options = SHORT | {"checkpoint_every": 50, "total_timesteps": 300, "checkpoint_replay": False}
    args = sac.Args(env_id="Pendulum-v1", policy_frequency=10**6, **options)
    with monkeypatch.context() as context:
        context.setattr(envs.Environments, "send", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            sac.train(args)
    log.clear()
    monkeypatch.setattr(sac.compute, "to_numpy", spied)
    checkpoint = load_checkpoint(Path("r/checkpoint.pt"))
    assert "replay" not in checkpoint
    sac.train(dataclasses.replace(args, resume="r"), checkpoint)
    assert len(acted) == 200
    out = capsys.readouterr().out
    assert "no replay kept: inexact, learns from step 200 of 300\n" in out
    assert out.count("no replay kept") == 1  # and not when a run begins
    assert "".join(log) == "s" * 100 + "sc" * 100
    ended = load_checkpoint(Path("r/checkpoint.pt")) | {"finished": False}
    sac.train(dataclasses.replace(args, resume="r"), ended)
    assert "no replay kept" not in capsys.readouterr().out  # only its evaluation was left


def test_replay_begins_anew_where_an_environment_was_lost(monkeypatch, capsys):
    """What a transition begins with is what its environment showed then."""
    monkeypatch.setattr(toy_envs.Unseeded, "drawn", itertools.count())  # as in any order of tests
    record(monkeypatch)
    send, add, shown = envs.Environments.send, sac.Replay.add, []

    def sent(self, action):
        shown.append(self.obs.reshape(8, -1).astype(np.float32))
        send(self, action)

    def added(self, *step):
        np.testing.assert_array_equal(self.shown, shown[-1])
        add(self, *step)

    monkeypatch.setattr(envs.Environments, "send", sent)
    monkeypatch.setattr(sac.Replay, "add", added)
    options = SHORT | {"num_envs": 8, "learning_starts": 800, "total_timesteps": 160}
    args = sac.Args(env_id="toy_envs:Unseeded-v0", **options)
    sac.train(args)
    args = dataclasses.replace(args, resume="r", total_timesteps=240)
    sac.train(args, load_checkpoint(Path("r/checkpoint.pt")))
    assert "new episodes" in capsys.readouterr().out and len(shown) == 30


def test_saving_and_evaluating_do_not_change_training():
    agents = []
    for every in (0, 50):
        options = SHORT | {
            "checkpoint_every": every,
            "eval_every": 2 * every,
            "run_dir": f"r{every}",
        }
        run_dir = sac.train(sac.Args(env_id="Pendulum-v1", total_timesteps=300, **options))
        agents.append(dict(sac.load_agent(run_dir).state_dict()))
    assert_same(*agents)


def test_asynchronous_environments_train_the_same():
    replays = []
    for vectorization in ("sync", "async"):
        options = SHORT | {"num_envs": 2, "vectorization": vectorization, "run_dir": vectorization}
        run_dir = sac.train(sac.Args(env_id="Pendulum-v1", total_timesteps=500, **options))
        replays.append(load_checkpoint(run_dir / "checkpoint.pt")["replay"])
    assert_same(*replays)


AGAIN = """
import json
import sac_continuous as sac
from common import arguments, envs, runs
play = envs.play
envs.play = lambda *args: print(json.dumps(played := play(*args))) or played
args, _ = arguments.parse_args(sac.Args, sac.SCRIPT)
runs.evaluate(sac.load_agent, args, sac.check_args(args))
"""


def test_evaluation_from_the_checkpoint_equals_the_one_in_training(
    run, tmp_path, capsys, monkeypatch
):
    """In a new process, to the last bit; and the tags that a run leaves."""
    played, play = [], envs.play
    monkeypatch.setattr(envs, "play", lambda *args: played.append(play(*args)) or played[-1])
    options = SHORT | {"total_timesteps": 1100, "eval_episodes": 3, "run_dir": str(tmp_path / "r")}
    options |= {"learning_starts": 1000, "hidden_sizes": (256, 256)}
    sac.train(sac.Args(env_id="HalfCheetah-v5", **options))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("evaluation of 3"))
    again = [sys.executable, "-c", AGAIN, "--evaluate", "r"]
    again = subprocess.run(again, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, check=True)
    assert json.loads(again.stdout.splitlines()[0]) == [list(x) for x in played[0]]
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    done = run("sac_continuous.py", "--evaluate", "r", cwd=tmp_path)
    assert done.stdout.strip() == line
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before
    assert "charts/SPS" in EventAccumulator("r").Reload().Tags()["scalars"]
    expected = "charts/episodic_return charts/episodic_length eval/episodic_return "
    expected += "eval/episodic_length losses/qf_loss losses/q_values losses/actor_loss "
    expected += "losses/entropy losses/alpha"
    assert set(scalars(tmp_path / "r")) == set(expected.split())


@pytest.mark.parametrize("where", ["reward", "observation", "reset"])
def test_nan_from_an_environment_stops_the_run_and_leaves_the_last_good_checkpoint(where, capsys):
    options = SHORT | {"checkpoint_every": 50, "total_timesteps": 2000, "learning_starts": 600}
    with pytest.raises(SystemExit) as stopped:
        sac.train(sac.Args(env_id=f"toy_envs:Broken-{where}-v0", **options))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and "r/checkpoint.pt" in line
    assert "reward or observation became NaN or infinite" in line
    checkpoint = load_checkpoint(Path("r/checkpoint.pt"))
    assert checkpoint["global_step"] == 650 or where == "reset"  # a little later
    assert checkpoint["replay"]["rows"].isfinite().all()
    assert checkpoint["replay"]["obs"].isfinite().all()
    assert all(x.isfinite().all() for x in sac.load_agent("r").parameters())


@pytest.mark.parametrize("when", [101, 150], ids=["first", "last"])
def test_one_infinite_reward_between_two_logs_is_noticed_at_the_next(when, capsys, monkeypatch):
    count = itertools.count(1)
    monkeypatch.setattr(envs, "_number", lambda _: math.inf if next(count) == when else 0.0)
    options = SHORT | {"checkpoint_every": 50, "total_timesteps": 400, "log_every": 50}
    with pytest.raises(SystemExit) as stopped:
        sac.train(sac.Args(env_id="Pendulum-v1", **options | {"learning_starts": 300}))
    assert stopped.value.code == 1 and "a reward or observation" in capsys.readouterr().err
    assert load_checkpoint(Path("r/checkpoint.pt"))["global_step"] == 100


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "toy_envs:Shaped-v0"])
def test_nan_loss_stops_the_run(env_id, capsys):
    """No environment meets the actions: one would return NaN, the other refuse them."""
    options = SHORT | {"q_lr": 1e30, "total_timesteps": 300}
    with pytest.raises(SystemExit) as stopped:
        sac.train(sac.Args(env_id=env_id, **options))
    assert stopped.value.code == 1 and "a weight or loss became NaN" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in sac.load_agent("r").parameters())


@pytest.mark.parametrize("wrong", range(3), ids=["critic", "actor", "alpha"])
def test_weights_gone_wrong_after_finite_losses_stop_the_run(wrong, capsys, monkeypatch):
    def make_updates(*_):
        def update_actor(*networks):
            networks[wrong].fill_(math.nan)
            return torch.ones(3)

        return lambda *_: torch.ones(2), update_actor

    monkeypatch.setattr(sac, "make_updates", make_updates)
    with pytest.raises(SystemExit) as stopped:
        args = sac.Args(env_id="Pendulum-v1", **SHORT, total_timesteps=200, checkpoint_every=50)
        sac.train(args)
    assert stopped.value.code == 1 and "a weight or loss became NaN" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in sac.load_agent("r").parameters())


def test_infinite_loss_stops_the_run(capsys, monkeypatch):
    """Weights stay finite, but Adam's averages do not: nothing would be learned any more."""
    monkeypatch.setattr(envs, "_number", lambda reward: 1e25 * float(reward))
    with pytest.raises(SystemExit) as stopped:
        sac.train(sac.Args(env_id="toy_envs:Counter-truncated-v0", total_timesteps=300, **SHORT))
    assert stopped.value.code == 1 and "or loss became NaN or inf" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, why",
    [
        ({"env_id": "CartPole-v1"}, "discrete actions; use ppo_discrete.py"),
        ({"env_id": "toy_envs:Unbounded-v0"}, "without bounds"),
        ({"env_id": "toy_envs:Words-v0"}, "Dict observations"),
        ({"buffer_size": 0}, "--buffer-size 0"),
        ({"buffer_size": 10**15}, f"--buffer-size {10**15}: "),
        ({"buffer_size": 3, "num_envs": 4}, "--buffer-size 3"),
        ({"tau": 2.0}, "--tau 2.0: must be from 0 to 1"),
        ({"policy_lr": 0.0}, "--policy-lr 0.0: must be above 0"),
        ({"q_lr": math.nan}, "--q-lr nan"),
        ({"utd_ratio": 0.0}, "--utd-ratio 0.0: must be above 0"),
        ({"gamma": 1.1}, "--gamma"),
        ({"policy_frequency": 0}, "--policy-frequency"),
        ({"target_network_frequency": 0}, "--target-network-frequency"),
        ({"batch_size": 0}, "--batch-size"),
        ({"learning_starts": -1}, "--learning-starts"),
        ({"learning_starts": 3, "num_envs": 4}, "--learning-starts 3: must be at least 4"),
        ({"total_timesteps": 3, "num_envs": 4}, "--total-timesteps 3: must be at least 4"),
        ({"alpha": -1.0}, "--alpha"),
        ({"alpha": 0.0, "autotune": False}, "--alpha"),
        ({"alpha": 0.1}, "--alpha 0.1: must go with --no-autotune"),
        ({"hidden_sizes": (64, 0)}, "--hidden-sizes"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, options, why):
    options = {"env_id": "Pendulum-v1", "total_timesteps": 10} | options
    with pytest.raises(SystemExit) as stopped:
        sac.train(sac.Args(run_dir="r", compile=False, **options))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and why in line
    assert not Path("r").exists()


@pytest.mark.parametrize("num_envs", [1, 4])
def test_learning_starts_with_the_first_transitions_at_the_earliest(num_envs, capsys):
    options = SHORT | {"num_envs": num_envs, "total_timesteps": 12}
    for starts in (num_envs, 12):
        options |= {"learning_starts": starts, "run_dir": f"r{starts}"}
        run_dir = sac.train(sac.Args(env_id="Pendulum-v1", **options))
        assert load_checkpoint(run_dir / "checkpoint.pt")["global_step"] == 12
        assert ("nothing is learned" in capsys.readouterr().out) == (starts == 12)
