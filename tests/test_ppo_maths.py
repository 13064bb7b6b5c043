"""The maths of PPO, each against a reference written in another way."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import ppo_continuous as ppo
from common.tensors import (
    FlatAdam,
    RunningStatistics,
    discounted_returns,
    flatten_parameters,
    to_numpy,
)

BOX = gym.spaces.Box(np.array([-2.0, 0.0, -1.0], np.float32), np.array([1.0, 0.5, 1.0], np.float32))


def make_agent(**kwargs) -> ppo.Agent:
    torch.manual_seed(0)
    return ppo.Agent((4,), BOX, ppo.Args(**kwargs))


def random_batch(size: int = 64) -> tuple[torch.Tensor, ...]:
    """Observations, actions, old log-probabilities, advantages, old values, targets."""
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(size, 4, generator=rng),
        torch.randn(size, 3, generator=rng),
        *(
            scale * torch.randn(size, generator=rng) + shift
            for scale, shift in ((0.5, -4.0), (2.0, 0.3), (1.0, 0.0), (1.0, 0.0))
        ),
    )


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 12),
    num_envs=st.integers(1, 3),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    p=st.sampled_from([0.0, 0.2, 0.7]),
)
def test_gae_is_the_sum_over_k_step_advantages(seed, steps, num_envs, gamma, lam, p):
    """Equation 16 as it is printed: the sum of (gamma lambda)^l delta_(t+l)."""
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, steps, num_envs))
    terminations, truncations = rng.random((2, steps, num_envs)) < p
    truncations &= ~terminations
    got = ppo.compute_gae(rewards, values, next_values, terminations, truncations, gamma, lam)
    for n in range(num_envs):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                future = 0.0 if terminations[k, n] else gamma * next_values[k, n]
                expected += weight * (rewards[k, n] + future - values[k, n])
                weight *= gamma * lam
                if terminations[k, n] or truncations[k, n]:
                    break
            assert got[t, n] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_estimate_bootstraps_from_the_real_last_observation():
    """Terminated, truncated, both, and the rollout's edge, where value equals observation."""
    args = ppo.Args(gamma=0.5, gae_lambda=0.0, norm_obs=False, norm_reward=False, hidden_sizes=())
    agent = ppo.Agent((1,), BOX, args)
    nn.init.ones_(agent.critic[0].weight)  # V(s) = s
    rollout = ppo.Rollout(3, 4, (1,), (3,), torch.device("cpu"))
    rollout.obs[:, :, 0] = torch.arange(4.0)[:, None] * 10  # 0, 10, 20, and pending 30
    rollout.terminations[1, [0, 2]] = True
    rollout.truncations[1, [1]] = True
    rollout.final_obs = {(1, 1): np.array([100.0], np.float32)}
    with torch.no_grad():
        advantages, values, targets = (x.view(3, 4) for x in ppo.estimate(agent, rollout, args))
    expected = torch.tensor([[5.0, 5, 5, 5], [0, 50, 0, 10], [15, 15, 15, 15]])
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(advantages, targets - values)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 12), split=st.integers(0, 12))
def test_discounted_returns_restart_after_either_end_and_carry_over(seed, steps, split):
    rng = np.random.default_rng(seed)
    rewards, ends = rng.normal(size=(steps, 2)), rng.random((steps, 2)) < 0.3
    carry = np.zeros(2)
    parts = [slice(None, split), slice(split, None)]
    got = np.concatenate([discounted_returns(rewards[x], ends[x], 0.9, carry) for x in parts])
    for n in range(2):
        for t in range(steps):
            begin = max((k + 1 for k in range(t) if ends[k, n]), default=0)
            expected = sum(0.9 ** (t - k) * rewards[k, n] for k in range(begin, t + 1))
            assert got[t, n] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_squashed_log_prob_equals_torch_distributions_far_into_the_tails(dtype, tolerance):
    mean, log_std = torch.randn(41, 3, dtype=dtype), torch.tensor([-1.0, 0.0, 0.5], dtype=dtype)
    u = torch.linspace(-20, 20, 41, dtype=dtype)[:, None].expand(41, 3).clone().requires_grad_()
    transform = TanhTransform(cache_size=1)  # remembers u, of which tanh(u) = 1 would know nothing
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), transform)
    expected = Independent(squashed, 1).log_prob(transform(u))
    got = ppo.gaussian_log_prob(mean, log_std, u, squash=True)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    # and the correction alone, in a third form: log(1 - tanh^2) = -2 log cosh
    log_cosh = u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)
    torch.testing.assert_close(ppo.tanh_log_det(u), -2 * log_cosh, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(ppo.tanh_log_det(u).sum(), u)
    torch.testing.assert_close(gradient, -2 * u.tanh(), rtol=tolerance, atol=tolerance)


def test_gaussian_log_prob_and_entropy_equal_torch_distributions():
    mean, log_std, u = torch.randn(50, 3), torch.randn(3), 3 * torch.randn(50, 3)
    normal = Independent(Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(ppo.gaussian_log_prob(mean, log_std, u, False), normal.log_prob(u))
    torch.testing.assert_close(ppo.gaussian_entropy(mean, log_std, False), normal.entropy())


def test_squashed_entropy_is_the_expected_surprise():
    mean = torch.tensor([[0.0, 0.5, -1.0], [2.0, -2.0, 3.0]], dtype=torch.float64)
    log_std = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, 1, 3, dtype=torch.float64, generator=rng)
    u = mean + log_std.exp() * noise
    surprise = -ppo.gaussian_log_prob(mean, log_std, u, squash=True)
    error = 5 * surprise.std(0) / math.sqrt(len(u))
    assert (ppo.gaussian_entropy(mean, log_std, True) - surprise.mean(0)).abs().lt(error).all()


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("vf_loss", ["mse", "huber"])
@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_loss_and_its_gradient_equal_an_independent_formula(clip_vloss, vf_loss, norm_adv, squash):
    """Sample by sample, by cases, on torch.distributions and autograd in float64."""
    args = ppo.Args(
        clip_vloss=clip_vloss,
        vf_loss=vf_loss,
        norm_adv=norm_adv,
        squash=squash,
        ent_coef=0.0 if squash else 0.01,
        vf_coef=0.7,
        norm_obs=False,
    )
    agent = make_agent(squash=squash).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    obs, action, old_log_prob, advantage, old_value, target = (x.double() for x in random_batch())
    policy = Normal(agent.actor(obs), agent.log_std.exp())
    value = agent.critic(obs)[:, 0]
    if squash:
        transform = TanhTransform(cache_size=1)
        log_prob = TransformedDistribution(policy, transform).log_prob(transform(action)).sum(1)
    else:
        log_prob = policy.log_prob(action).sum(1)
    if norm_adv:
        centred = advantage - sum(advantage) / 64
        advantage_used = centred / (math.sqrt(sum(centred**2) / 63) + 1e-8)
    else:
        advantage_used = advantage
    terms = []
    for i in range(64):
        ratio, a = torch.exp(log_prob[i] - old_log_prob[i]), advantage_used[i]
        stuck = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
        gain = (1.2 if a > 0 else 0.8) * a if stuck else ratio * a
        errors = [value[i] - target[i]]
        if clip_vloss:
            errors.append(old_value[i] + max(min(value[i] - old_value[i], 0.2), -0.2) - target[i])
        costs = [
            e.abs() - 0.5 if vf_loss == "huber" and e.abs() > 1 else 0.5 * e * e for e in errors
        ]
        terms.append(-gain + 0.7 * max(costs))
    expected = sum(terms) / 64 - args.ent_coef * policy.entropy().sum(1).mean()
    got, metrics = ppo.ppo_loss(
        ppo.gaussian_log_prob(agent.actor(obs), agent.log_std, action, squash),
        ppo.gaussian_entropy(agent.actor(obs), agent.log_std, squash),
        agent.value(obs),
        old_log_prob,
        advantage,
        old_value,
        target,
        args,
    )
    torch.testing.assert_close(got, expected)
    parameters = list(agent.parameters())
    for a, b in zip(
        torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters)
    ):
        torch.testing.assert_close(a, b)
    ratio = torch.exp(log_prob - old_log_prob)
    named = dict(zip(ppo.METRICS, metrics.tolist()))
    assert named["clipfrac"] == pytest.approx(sum(abs(r - 1) > 0.2 for r in ratio).item() / 64)
    assert named["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert named["loss"] == pytest.approx(expected.item())


@torch.no_grad()
def test_update_equals_autograd_with_torch_optim_adam():
    """Twenty steps of gradient, clipping and Adam against the stock ones."""
    args = ppo.Args(ent_coef=0.01, max_grad_norm=0.05)
    agent, twin = make_agent(), make_agent()
    parameters = flatten_parameters(agent)
    update = ppo.make_update(agent, FlatAdam(parameters, eps=1e-5), args)
    optimizer = torch.optim.Adam(twin.parameters(), lr=3e-3, eps=1e-5)
    batch = random_batch(640)
    for i in range(20):
        indices = torch.arange(i * 32, i * 32 + 32)
        update(parameters, batch, indices, torch.tensor(3e-3))
        with torch.enable_grad():
            obs, action, *rest = (x[indices] for x in batch)
            policy, value = twin(obs)
            log_prob = ppo.gaussian_log_prob(*policy, action, False)
            entropy = ppo.gaussian_entropy(*policy, False)
            loss, _ = ppo.ppo_loss(log_prob, entropy, value, *rest, args)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        optimizer.step()
    for a, b in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_and_eager_agree_over_a_whole_update_and_compile_once():
    torch._dynamo.utils.counters.clear()
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, dynamic=False)):
        agent = make_agent(squash=True)
        parameters = flatten_parameters(agent)
        optimizer = FlatAdam(parameters, eps=1e-5)
        update = wrap(ppo.make_update(agent, optimizer, ppo.Args(squash=True, ent_coef=0.01)))
        batch = random_batch(320)
        for i in range(50):  # the learning rate changes, the graph does not
            lr = torch.tensor(1e-3 * (1 - i / 50))
            metrics = update(parameters, batch, torch.arange(64) + i % 5 * 64, lr)
        results.append((parameters, metrics))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_statistics_equal_numpy_on_the_concatenated_data(seed, sizes):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(1e3, 2.0, (size, 2, 3)) for size in sizes]
    statistics = RunningStatistics((2, 3))
    for batch in batches:
        statistics.update(torch.as_tensor(batch))
    whole = np.concatenate(batches)
    np.testing.assert_allclose(statistics.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.var, whole.var(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(statistics.scale, 1 / np.sqrt(whole.var(0) + 1e-8), rtol=1e-4)


def test_networks_begin_orthogonal_with_their_gains():
    agent = make_agent()
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, gain in zip(layers, [math.sqrt(2), math.sqrt(2), last]):
            assert not layer.bias.any()
            torch.testing.assert_close(
                torch.linalg.matrix_norm(layer.weight, 2).item(), gain, rtol=1e-4, atol=0
            )


@pytest.mark.parametrize("schedule, middle", [("linear", 0.5), ("cosine", 0.5)])
def test_learning_rate_falls_to_zero(schedule, middle):
    args = ppo.Args(lr_schedule=schedule, learning_rate=2.0)
    rates = [ppo.learning_rate(x, args) for x in np.linspace(0, 1, 21)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 2 and rates[-1] == pytest.approx(0)
    assert rates[10] == pytest.approx(2 * middle)
    assert rates[5] == pytest.approx(1.5 if schedule == "linear" else 1 + math.sqrt(0.5))
    assert ppo.learning_rate(0.7, ppo.Args(anneal_lr=False, learning_rate=2.0)) == 2


class Wide(nn.Sequential):
    """What a reader might do: another activation, another layer, a residual sum."""

    def forward(self, x):
        return self[2](torch.relu(self[0](x)) + torch.tanh(self[1](x)))


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize(
    "network",
    [
        None,
        Wide(nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 3)),
        nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3)
        ),  # beyond OPERATIONS
    ],
)
@torch.no_grad()
def test_an_edited_network_acts_and_trains_alike(network, squash):
    """Acting is derived from the module: it follows edits and gradient steps."""
    agent = make_agent(squash=squash)
    agent.actor = network or agent.actor
    parameters = flatten_parameters(agent)
    agent.obs_statistics.update(torch.randn(100, 4) * 3 + 1)
    obs, noise = torch.randn(5, 4), torch.randn(5, 3)
    act = to_numpy(agent.sample, obs, noise)
    assert (act.__name__ == "traced") == (
        not isinstance(network, nn.Sequential) or isinstance(network, Wide)
    )
    update = ppo.make_update(agent, FlatAdam(parameters, eps=1e-5), ppo.Args(squash=squash))
    before = act(obs, noise)[0]
    for _ in range(3):
        for got, expected in zip(act(obs, noise), agent.sample(obs, noise)):
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
        update(parameters, random_batch(), torch.arange(64), torch.tensor(0.01))
    assert np.abs(act(obs, noise)[0] - before).max() > 1e-3
    agent.obs_statistics.update(torch.randn(1000, 4) * 5)
    np.testing.assert_allclose(
        act(obs, noise)[0], agent.sample(obs, noise)[0].numpy(), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_sampled_actions_have_the_policys_distribution_and_respect_bounds():
    for squash in (False, True):
        agent = make_agent(squash=squash)
        agent.log_std.copy_(torch.tensor([0.0, -1.0, 1.0]))
        obs, noise = torch.zeros(20_000, 4), torch.randn(20_000, 3)
        action, env_action = to_numpy(agent.sample, obs, noise)(obs, noise)
        np.testing.assert_allclose(action.std(0), agent.log_std.exp(), rtol=0.05)
        assert (env_action >= BOX.low).all() and (env_action <= BOX.high).all()
        if squash:
            expected = BOX.low + (BOX.high - BOX.low) * (np.tanh(action) + 1) / 2
        else:
            expected = action.clip(BOX.low, BOX.high)
            assert not np.array_equal(action, env_action)  # what is stored stays unclipped
        np.testing.assert_allclose(env_action, expected, rtol=1e-4, atol=1e-6)
