"""The maths of PPO, each against a reference written in another way."""

import dataclasses
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import ppo_continuous
import ppo_discrete
from common.compute import to_numpy
from common.tensors import FlatAdam, RunningStatistics, discounted_returns, flatten_parameters

BOX = gym.spaces.Box(np.array([-2.0, 0.0, -1.0], np.float32), np.array([1.0, 0.5, 1.0], np.float32))
BUTTONS = gym.spaces.Discrete(3, start=-1)


def make_agent(ppo, **kwargs):
    torch.manual_seed(0)
    space = BOX if ppo is ppo_continuous else BUTTONS
    return ppo.Agent((4,), space, ppo.Args(**{"hidden_sizes": (64, 64)} | kwargs))


def random_batch(ppo, size: int = 64) -> tuple[torch.Tensor, ...]:
    """Observations, actions, old log-probabilities, advantages, old values, targets."""
    rng = torch.Generator().manual_seed(1)
    obs = torch.randn(size, 4, generator=rng)
    actions = torch.randn(size, 3, generator=rng)
    usual = -4.0 if ppo is ppo_continuous else -math.log(3)
    rest = [
        scale * torch.randn(size, generator=rng) + shift
        for scale, shift in ((0.5, usual), (2.0, 0.3), (1.0, 0.0), (1.0, 0.0))
    ]
    return obs, actions if ppo is ppo_continuous else actions.argmax(-1), *rest


def test_the_two_scripts_share_their_maths_to_the_letter():
    """So that a reference that one of them meets is met by the other."""
    for name in "compute_gae ppo_loss make_update learning_rate estimate mlp".split():
        a, b = (inspect.getsource(getattr(ppo, name)) for ppo in (ppo_continuous, ppo_discrete))
        assert a == b
    a, b = (inspect.getsource(ppo.train).splitlines() for ppo in (ppo_continuous, ppo_discrete))
    ((noise, _),) = {(x, y) for x, y in zip(a, b, strict=True) if x != y}
    assert "rollout.noise.normal_" in noise
    a, b = (
        inspect.getsource(ppo.check_args).splitlines() for ppo in (ppo_continuous, ppo_discrete)
    )
    assert a[:-1] == b[:-1]  # the last one checks the spaces


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
    ends = terminations, truncations
    got = ppo_continuous.compute_gae(rewards, values, next_values, *ends, gamma, lam)
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


@torch.no_grad()
def test_estimate_bootstraps_from_the_real_last_observation(ppo):
    """Terminated, truncated, both, and the rollout's edge, where value equals observation."""
    options = {"norm_obs": False, "norm_reward": False, "hidden_sizes": ()}
    args = ppo.Args(num_steps=3, num_envs=5, gamma=0.5, gae_lambda=0.5, **options)
    obs_space, action_space = gym.spaces.Box(-1, 1, (1,)), BOX if ppo is ppo_continuous else BUTTONS
    agent = ppo.Agent((1,), action_space, args)
    nn.init.ones_(agent.critic[0].weight)  # V(s) = s
    rollout = ppo.Rollout(args, obs_space, action_space, torch.device("cpu"))
    rollout.obs[:, :, 0] = torch.arange(4.0)[:, None] * 10  # 0, 10, 20, and pending 30
    rollout.terminations[1, [0, 2]] = True
    rollout.truncations[1, [1, 2]] = rollout.truncations[2, 4] = True
    last = torch.tensor([100.0], dtype=torch.float64)
    rollout.final_obs = {(1, 1): last, (1, 2): last, (2, 4): last}
    rollout.rewards[0, 3] = 7.0
    values = agent(rollout.obs[:-1].flatten(0, 1))[1].detach()
    results = ppo.estimate(agent, rollout, values, args)
    advantages, targets, values = (x.view(3, 5) for x in (*results, values))
    expected = [[2.5, 15, 2.5, 11.6875, 6.875], [0, 50, 0, 8.75, 17.5], [15, 15, 15, 15, 50]]
    expected = torch.tensor(expected)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(advantages, targets - values)


@torch.no_grad()
def test_normalised_rewards_and_observations_end_at_ten(ppo):
    args = ppo.Args(num_steps=3, num_envs=1, gae_lambda=0.0, norm_obs=True, norm_reward=True)
    obs_space, action_space = gym.spaces.Box(-1, 1, (1,)), BOX if ppo is ppo_continuous else BUTTONS
    agent = ppo.Agent((1,), action_space, args)
    agent.obs_statistics.update(torch.tensor([[1.0], [5.0]]))  # mean 3, deviation 2
    obs = torch.tensor([[3.0], [4.0], [-1.0], [22.0], [24.0], [-1e9]])
    expected = torch.tensor([[0.0], [0.5], [-2.0], [9.5], [10.0], [-10.0]])
    torch.testing.assert_close(agent.encode(obs), expected)
    agent.return_statistics.update(torch.tensor([-0.25, 0.25]))
    rollout = ppo.Rollout(args, obs_space, action_space, torch.device("cpu"))
    rollout.rewards[:, 0], rollout.terminations[:] = (1.5, -2.4, 99.0), True
    targets = ppo.estimate(agent, rollout, torch.zeros(3), args)[1]
    torch.testing.assert_close(targets, torch.tensor([6.0, -9.6, 10.0]))
    plain = dataclasses.replace(args, norm_reward=False)
    targets = ppo.estimate(agent, rollout, torch.zeros(3), plain)[1]
    torch.testing.assert_close(targets, torch.tensor([1.5, -2.4, 99.0]))


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
    got, _ = ppo_continuous.log_prob_and_entropy((mean, log_std, True), u)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    # and the correction alone, in a third form: log(1 - tanh^2) = -2 log cosh
    log_cosh = u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2)
    got = ppo_continuous.tanh_log_det(u)
    torch.testing.assert_close(got, -2 * log_cosh, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(got.sum(), u)
    torch.testing.assert_close(gradient, -2 * u.tanh(), rtol=tolerance, atol=tolerance)


def test_gaussian_log_prob_and_entropy_equal_torch_distributions():
    mean, log_std, u = torch.randn(50, 3), torch.randn(3), 3 * torch.randn(50, 3)
    normal = Independent(Normal(mean, log_std.exp()), 1)
    got = ppo_continuous.log_prob_and_entropy((mean, log_std, False), u)
    torch.testing.assert_close(got, (normal.log_prob(u), normal.entropy()))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4, 1e30])
def test_categorical_log_prob_and_entropy_equal_torch_distributions(scale):
    """However large the logits are, and with finite gradients."""
    rng = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(50, 6, generator=rng) + scale
    logits.requires_grad_()
    action = torch.randint(6, (50,), generator=rng)
    policy = Categorical(logits=logits)
    log_prob, entropy = ppo_discrete.log_prob_and_entropy(logits, action)
    torch.testing.assert_close(log_prob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy())
    (gradient,) = torch.autograd.grad((log_prob + entropy).sum(), logits)
    assert log_prob.shape == entropy.shape == (50,) and gradient.isfinite().all()


def test_squashed_entropy_and_its_gradient_equal_those_of_a_fine_integral():
    mean = torch.tensor([[0.0, 0.5, -1.0], [2.0, -2.0, 3.0], [6.0, -8.0, 0.1]], dtype=torch.float64)
    log_std = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    mean.requires_grad_(), log_std.requires_grad_()
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    mass = Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    u = mean[..., None] + log_std.exp()[:, None] * z
    normal = Normal(mean[..., None], log_std.exp()[:, None])
    expected = -((normal.log_prob(u) + 2 * u.cosh().log()) * mass).sum((-2, -1))
    _, entropy = ppo_continuous.log_prob_and_entropy((mean, log_std, True), torch.zeros(3, 3))
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-4)
    gradients = (torch.autograd.grad(x.sum(), (mean, log_std)) for x in (entropy, expected))
    for got, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=2e-3)


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("vf_loss", ["mse", "huber"])
@pytest.mark.parametrize("norm_adv", [False, True])
@pytest.mark.parametrize("kind", ["gaussian", "squashed", "categorical"])
def test_loss_and_its_gradient_equal_an_independent_formula(clip_vloss, vf_loss, norm_adv, kind):
    """Sample by sample, by cases, on torch.distributions and autograd in float64."""
    ppo = ppo_discrete if kind == "categorical" else ppo_continuous
    squash = {"squash": kind == "squashed"} if ppo is ppo_continuous else {}
    args = ppo.Args(
        clip_vloss=clip_vloss,
        vf_loss=vf_loss,
        norm_adv=norm_adv,
        ent_coef=0.0 if kind == "squashed" else 0.01,
        vf_coef=0.7,
        clip_coef=0.3,
    )
    agent = make_agent(ppo, norm_obs=False, **squash).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    obs, action, *rest = random_batch(ppo)
    obs, old_log_prob, advantage, old_value, target = (x.double() for x in (obs, *rest))
    value = agent.critic(obs)[:, 0]
    if kind == "categorical":
        policy = Categorical(agent.actor(obs).softmax(-1))
        log_prob, entropy = policy.log_prob(action), policy.entropy()
    else:
        action = action.double()
        policy = Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1)
        log_prob, entropy = policy.log_prob(action), policy.entropy()
    if kind == "squashed":
        transform = TanhTransform(cache_size=1)
        log_prob = TransformedDistribution(policy, transform).log_prob(transform(action))
    if norm_adv:
        centred = advantage - sum(advantage) / 64
        advantage_used = centred / (math.sqrt(sum(centred**2) / 63) + 1e-8)
    else:
        advantage_used = advantage
    gains, errors_of_value = [], []
    for i in range(64):
        ratio, a = torch.exp(log_prob[i] - old_log_prob[i]), advantage_used[i]
        stuck = (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.7)
        gains.append((1.3 if a > 0 else 0.7) * a if stuck else ratio * a)
        errors = [value[i] - target[i]]
        if clip_vloss:
            errors.append(old_value[i] + max(min(value[i] - old_value[i], 0.3), -0.3) - target[i])
        costs = [
            e.abs() - 0.5 if vf_loss == "huber" and e.abs() > 1 else 0.5 * e * e for e in errors
        ]
        errors_of_value.append(max(costs))
    policy_loss, value_loss = -sum(gains) / 64, sum(errors_of_value) / 64
    expected = policy_loss + 0.7 * value_loss - args.ent_coef * entropy.mean()
    got_policy, got_value = agent(obs)
    got, metrics = ppo.ppo_loss(
        *ppo.log_prob_and_entropy(got_policy, action),
        got_value,
        old_log_prob,
        advantage,
        old_value,
        target,
        args,
    )
    torch.testing.assert_close(got, expected)
    parameters = list(agent.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (got, expected))
    torch.testing.assert_close(*gradients)
    ratio = torch.exp(log_prob - old_log_prob)
    named = dict(zip(ppo.METRICS, metrics.tolist()))
    assert named["clipfrac"] == pytest.approx(sum(abs(r - 1) > 0.3 for r in ratio).item() / 64)
    assert named["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert named["old_approx_kl"] == pytest.approx(-ratio.log().mean().item())
    parts = {"loss": expected, "policy_loss": policy_loss, "value_loss": value_loss}
    parts |= {} if kind == "squashed" else {"entropy": entropy.mean()}
    assert {name: named[name] for name in parts} == pytest.approx(
        {name: part.item() for name, part in parts.items()}
    )


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e3])  # always clipped, and never
@torch.no_grad()
def test_update_equals_autograd_with_torch_optim_adam(ppo, max_grad_norm):
    """Twenty steps of gradient, clipping and Adam against the stock ones."""
    args = ppo.Args(ent_coef=0.01, max_grad_norm=max_grad_norm)
    agent, twin = make_agent(ppo), make_agent(ppo)
    parameters = flatten_parameters(agent)
    update = ppo.make_update(agent, FlatAdam(parameters, eps=1e-5), args)
    optimizer = torch.optim.Adam(twin.parameters(), lr=3e-3, eps=1e-5)
    batch = random_batch(ppo, 640)
    for i in range(20):
        indices = torch.arange(i * 32, i * 32 + 32)
        update(parameters, batch, indices, torch.tensor(3e-3))
        with torch.enable_grad():
            obs, action, *rest = (x[indices] for x in batch)
            policy, value = twin(obs)
            loss, _ = ppo.ppo_loss(*ppo.log_prob_and_entropy(policy, action), value, *rest, args)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), args.max_grad_norm)
        optimizer.step()
    for a, b in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("options", [{"squash": True}, {}])
@torch.no_grad()
def test_compiled_and_eager_agree_over_a_whole_update_and_compile_once(options):
    ppo = ppo_continuous if options else ppo_discrete
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        agent = make_agent(ppo, norm_obs=True, **options)
        parameters = flatten_parameters(agent)
        optimizer = FlatAdam(parameters, eps=1e-5)
        args = ppo.Args(ent_coef=0.01, learning_rate=1e-3, compile=compiled)
        update = ppo.make_update(agent, optimizer, args)
        update = ppo.compute.compile_function(update, args, torch.device("cpu"))
        torch._dynamo.utils.counters.clear()  # of the compiler's trial
        batch = random_batch(ppo, 320)
        for i in range(50):  # rate and statistics change, the graph does not
            lr = ppo.learning_rate(i / 50, args)
            metrics = update(parameters, batch, torch.arange(64) + i % 5 * 64, lr)
            agent.obs_statistics.update(batch[0] * i)
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


def test_networks_begin_orthogonal_with_their_gains(ppo):
    def check(layers, gains):
        for layer, gain in zip(layers, gains, strict=True):
            singular = torch.linalg.svdvals(layer.weight.detach().flatten(1))
            torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=0)
            assert not layer.bias.any()

    agent = make_agent(ppo)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        assert [type(x) for x in network] == [nn.Linear, nn.Tanh] * 2 + [nn.Linear]
        check([x for x in network if isinstance(x, nn.Linear)], [math.sqrt(2)] * 2 + [last])
    if ppo is ppo_continuous:
        assert isinstance(agent.log_std, nn.Parameter) and not agent.log_std.any()
    if ppo is ppo_discrete:
        agent = ppo.Agent((4, 84, 84), BUTTONS, ppo.Args(hidden_sizes=()))
        kinds = [nn.Conv2d, nn.ReLU] * 3 + [nn.Flatten, nn.Linear, nn.ReLU]
        assert [type(x) for x in agent.cnn] == kinds
        weighted = [x for x in agent.cnn if hasattr(x, "weight")]
        shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]  # Mnih et al. 2015
        assert [tuple(x.weight.shape) for x in weighted] == shapes
        check(weighted, [math.sqrt(2)] * 4)
        check([*agent.actor, *agent.critic], [0.01, 1.0])


def test_equal_advantages_give_a_finite_loss(ppo):
    """They have no deviation to be divided by."""
    obs, action, log_prob, advantage, *rest = random_batch(ppo)
    policy, value = make_agent(ppo)(obs)
    now = *ppo.log_prob_and_entropy(policy, action), value
    loss, _ = ppo.ppo_loss(*now, log_prob, torch.ones_like(advantage), *rest, ppo.Args())
    assert loss.isfinite()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_falls_to_zero(ppo, schedule):
    args = ppo.Args(lr_schedule=schedule, learning_rate=2.0)
    rates = [ppo.learning_rate(x, args).item() for x in np.linspace(0, 1, 21)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 2 and rates[-1] == pytest.approx(0)
    assert rates[10] == pytest.approx(1)
    assert rates[5] == pytest.approx(1.5 if schedule == "linear" else 1 + math.sqrt(0.5))
    assert ppo.learning_rate(0.7, ppo.Args(anneal_lr=False, learning_rate=2.0)) == 2


class Wide(nn.Sequential):
    """What a reader might do: another activation, another layer, a residual sum."""

    def forward(self, x):
        return self[2](torch.relu(self[0](x)) + torch.tanh(self[1](x)))


class Between(nn.Sequential):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__(nn.Linear(4, 16), nn.Linear(16, 3))
        self.function = function

    def forward(self, x):
        return self[1](self.function(self[0](x)))


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "categorical"])
@pytest.mark.parametrize(
    "make_network, traced",
    [
        (None, True),
        (lambda: Wide(nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 3)), True),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3)),
            False,  # beyond OPERATIONS
        ),
        (lambda: Between(lambda x: torch.add(x, x.tanh(), alpha=2.0)), False),
        (lambda: Between(lambda x: x.clamp(min=-0.5)), False),
        (lambda: Between(lambda x: x if x.isfinite().all() else 0 * x), False),  # of values
    ],
)
@torch.no_grad()
def test_an_edited_network_acts_and_trains_alike(make_network, traced, kind, capsys):
    """Acting is derived from the module: it follows edits and gradient steps."""
    ppo = ppo_discrete if kind == "categorical" else ppo_continuous
    options = {"squash": kind == "squashed"} if ppo is ppo_continuous else {}
    agent = make_agent(ppo, norm_obs=True, **options)
    agent.actor = make_network() if make_network else agent.actor
    for layer in agent.actor:  # as mlp() begins: of zeros, as act() is traced on, it makes zeros
        nn.init.zeros_(layer.bias) if isinstance(layer, nn.Linear) else None
    parameters = flatten_parameters(agent)
    agent.obs_statistics.update(torch.randn(100, 4) * 3 + 1)
    obs, noise = torch.randn(500, 4), 0.1 * torch.randn(500, 3)
    act = to_numpy(agent.sample, agent.args, torch.zeros_like(obs), torch.zeros_like(noise))
    assert (act.__name__ == "traced") == traced
    assert ("acting in PyTorch" in capsys.readouterr().out) == (not traced)
    update = ppo.make_update(agent, FlatAdam(parameters, eps=1e-5), agent.args)
    before = act(obs, noise)[0]

    def assert_alike():
        for got, expected in zip(act(obs, noise), agent.sample(obs, noise), strict=True):
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)

    for _ in range(3):
        assert_alike()
        update(parameters, random_batch(ppo), torch.arange(64), torch.tensor(0.01))
    assert np.abs(act(obs, noise)[0] - before).max() > 1e-3
    agent.obs_statistics.update(torch.randn(1000, 4) * 5)
    assert_alike()


@torch.no_grad()
def test_sampled_actions_have_the_policys_distribution_and_respect_bounds():
    for squash in (False, True):
        agent = make_agent(ppo_continuous, squash=squash)
        agent.log_std.copy_(torch.tensor([0.0, -1.0, 1.0]))
        obs, noise = torch.zeros(20_000, 4), torch.randn(20_000, 3)
        action, env_action = to_numpy(agent.sample, agent.args, obs, noise)(obs, noise)
        np.testing.assert_allclose(action.std(0), agent.log_std.exp(), rtol=0.05)
        assert (env_action >= BOX.low).all() and (env_action <= BOX.high).all()
        if squash:
            expected = BOX.low + (BOX.high - BOX.low) * (np.tanh(action) + 1) / 2
        else:
            expected = action.clip(BOX.low, BOX.high)
            assert not np.array_equal(action, env_action)  # what is stored stays unclipped
        np.testing.assert_allclose(env_action, expected, rtol=1e-4, atol=1e-6)


def chi_squared(actions: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic of sampled actions [B] under probabilities [B, n]."""
    expected = probabilities.sum(0)
    counts = np.bincount(actions, minlength=len(expected))
    return (np.square(counts - expected) / expected).sum()


@torch.no_grad()
def test_rollouts_sample_discrete_actions_from_the_softmax(monkeypatch):
    """The noise that train() draws makes the argmax a sample; in NumPy, and in PyTorch as on CUDA."""

    class Biased(ppo_discrete.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.actor[-1].bias.data = torch.tensor([0.0, 2.0, -1.0])

    seen = []
    estimate = ppo_discrete.estimate
    monkeypatch.setattr(ppo_discrete, "Agent", Biased)
    monkeypatch.setattr(
        ppo_discrete, "estimate", lambda *args: (seen.append(args), estimate(*args))[1]
    )
    options = {"num_envs": 8, "num_steps": 1000, "num_minibatches": 1, "update_epochs": 1}
    options |= {"learning_rate": 1e-12, "eval_episodes": 1, "compile": False, "run_dir": "r"}
    args = ppo_discrete.Args(env_id="toy_envs:Buttons-v0", total_timesteps=8000, **options)
    ppo_discrete.train(args)
    ((agent, rollout, _, _),) = seen
    obs, noise = rollout.obs[:-1].flatten(0, 1), rollout.noise.flatten(0, 1)
    probabilities = agent.actor(agent.encode(obs)).softmax(-1).numpy()
    critical = 13.8  # of two degrees of freedom, one in a thousand
    assert chi_squared(np.concatenate(rollout.actions), probabilities) < critical
    indices, env_actions = to_numpy(agent.sample, ppo_discrete.Args(), obs, noise)(obs, noise)
    assert np.array_equal(indices, np.concatenate(rollout.actions))
    assert np.array_equal(indices, agent.sample(obs, noise)[0])
    assert np.array_equal(env_actions, indices - 1)  # as the space begins at -1
    uniform = np.full_like(probabilities, 1 / 3)  # the statistic can tell
    assert chi_squared(indices, uniform) > 100 * critical
    wrong = agent.sample(obs, torch.randn_like(noise))[0].numpy()  # another distribution's noise
    assert chi_squared(wrong, probabilities) > critical


def test_acting_is_deterministic_the_mean_or_the_likeliest_action(ppo):
    agent = make_agent(ppo)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        agent.obs_statistics.update(torch.randn(100, 4) * 3 + 1)
    obs = np.random.default_rng(0).normal(size=(50, 4))  # float64, as of many environments
    output = agent.actor(agent.encode(torch.from_numpy(obs).float())).detach().numpy()
    expected = output.clip(BOX.low, BOX.high) if ppo is ppo_continuous else output.argmax(1) - 1
    got = [agent.act(x) for x in obs]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert all((BOX if ppo is ppo_continuous else BUTTONS).contains(x) for x in got)
    if ppo is ppo_discrete:
        assert len({*got}) == 3  # each of them, and as a number, which can be a dictionary's key


def test_policy_and_value_of_images_share_the_encoder_and_take_bytes_as_from_0_to_1():
    space = gym.spaces.Discrete(3)
    agent = ppo_discrete.Agent((4, 84, 84), space, ppo_discrete.Args(**ppo_discrete.ATARI))
    obs = torch.randint(256, (300, 4, 84, 84), dtype=torch.uint8).float()
    logits, values = agent(obs)
    features = agent.cnn(obs / 255)
    torch.testing.assert_close(logits, agent.actor(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, agent.critic(features)[:, 0], rtol=1e-4, atol=1e-5)
    for output in (logits, values):
        (gradient,) = torch.autograd.grad(output.sum(), agent.cnn[0].weight, retain_graph=True)
        assert gradient.abs().max() > 0
