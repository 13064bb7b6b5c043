"""Proximal Policy Optimization (PPO), in one file.

Collect a rollout with the current policy; estimate how much better than expected each action was
(GAE); take many small gradient steps that make good actions likelier, with no more to gain once
an action's probability has changed by the fraction --clip-coef. Schulman et al. 2017,
arXiv:1707.06347; numbered core details: Huang et al. 2022, "The 37 Implementation Details of PPO".

    python ppo_discrete.py
    python ppo_discrete.py --env-id ALE/Breakout-v5

What to look at: charts/episodic_return rises, losses/explained_variance nears 1; in most tasks
losses/approx_kl stays below 0.02 and losses/clipfrac below 0.3.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import grad_and_value  # of a function, in place of loss.backward()

from common import arguments, compute, envs, failing, runs, seeding, tensors

SCRIPT = Path(__file__).stem
METRICS = "loss policy_loss value_loss entropy old_approx_kl approx_kl clipfrac".split()
ATARI = {"total_timesteps": 10_000_000, "num_envs": 8, "clip_coef": 0.1}  # as in Huang et al.
ATARI |= {"clip_reward": True, "hidden_sizes": ()}  # heads directly on the CNN's 512 features


@dataclass
class Args:
    """Train, resume or evaluate PPO."""

    exp_name: str = SCRIPT
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed from which every random stream of the run is spawned"""
    torch_deterministic: bool = True
    """on CUDA use deterministic algorithms, for exact resuming (on the CPU it is always exact)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU, if there is one, for images, SAC and DQN; else the CPU"""
    num_threads: int = 0
    """threads that PyTorch computes with; 0: one in PPO on vector observations, else up to four"""
    compile: bool = True
    """compile the update, and on the CPU act in NumPy (not with a CNN); --no-compile: to debug"""
    bf16: bool = False
    """mixed precision: faster with images or layers of 256 units, on hardware that has bfloat16"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "single-file-rl"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """entity (team) in Weights & Biases"""
    capture_video: bool = False
    """record the first episode of every evaluation to the run folder's videos/"""
    run_dir: str = ""
    """run folder; by default runs/{env_id}__{exp_name}__{seed}__{time}"""
    resume: str | None = None
    """continue the run in this folder; exactly, unless it has a replay that is not saved"""
    evaluate: str | None = None
    """evaluate the last checkpoint of the run in this folder, or FOLDER/best.pt; do not train"""
    render: bool = False
    """with --evaluate: show the episodes in a window"""
    checkpoint_every: int = 50_000
    """environment steps between checkpoints; 0: only at the end and when stopped"""
    eval_every: int = 0
    """environment steps between evaluations; 0: only at the end"""
    eval_episodes: int = 10
    """episodes of an evaluation"""

    env_id: str = "CartPole-v1"
    """environment; my_module:MyEnv-v0 imports my_module first"""
    sticky_actions: float = 0.0
    """Atari: probability that a game repeats the previous action instead"""
    total_timesteps: int = 500_000
    """environment steps of the run, rounded down to whole rollouts"""
    learning_rate: float = 2.5e-4
    """Adam's learning rate at the start"""
    num_envs: int = 4
    """environments that step together"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments in this process, or each in its own (Atari: always in threads)"""
    num_steps: int = 128
    """steps of each environment in a rollout"""
    anneal_lr: bool = True
    """let the learning rate fall over the run, as --lr-schedule says"""
    lr_schedule: Literal["linear", "cosine"] = "linear"
    """how the learning rate falls to zero"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches that the rollout is split into in every epoch"""
    minibatch_size: int | None = None
    """samples in a minibatch, in place of --num-minibatches; an epoch drops the remainder"""
    update_epochs: int = 4
    """passes over each rollout"""
    norm_obs: bool = False
    """normalise observations with running statistics, and clip at 10 standard deviations"""
    norm_reward: bool = False
    """divide rewards by the standard deviation of their running discounted sum; clip at 10"""
    clip_reward: bool = False
    """learn from the signs of rewards; what is logged is unclipped"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    recompute_advantages: bool = False
    """recompute advantages, and values (for --clip-vloss, too), before every epoch"""
    clip_coef: float = 0.2
    """how far the probability ratio may move from 1 before the objective stops rewarding it"""
    clip_vloss: bool = True
    """in the value loss, clip the change of the value too, by the same --clip-coef"""
    vf_loss: Literal["mse", "huber"] = "mse"
    """error that the value loss measures"""
    ent_coef: float = 0.01
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """gradients of a larger global norm are scaled down to it"""
    target_kl: float | None = None
    """skip the epochs after one whose last minibatch has a larger KL (auxiliary detail 3)"""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """widths of the hidden layers of the policy and the value network"""


def mlp(*sizes: int) -> tensors.Network:
    """Tanh network with layers of these widths; the last one is linear."""
    layers = [f for a, b in zip(sizes, sizes[1:]) for f in (nn.Linear(a, b), nn.Tanh())]
    return tensors.Network(*layers[:-1])


def nature_cnn(obs_shape: tuple[int, ...]) -> nn.Sequential:
    """Encoder of images [B, C, H, W] into [B, 512] (Mnih et al. 2015)."""
    layers = [nn.Conv2d(obs_shape[0], 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()]
    size = nn.Sequential(*layers)(torch.zeros(1, *obs_shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(size, 512), nn.ReLU())


class Agent(nn.Module):
    """Policy and value network of raw observations, with the statistics that normalise these."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.Space, args: Args):
        super().__init__()
        self.cnn = nature_cnn(obs_shape) if len(obs_shape) == 3 else None
        obs_size = 512 if self.cnn else math.prod(obs_shape)
        self.actor = mlp(obs_size, *args.hidden_sizes, gym.spaces.flatdim(action_space))
        self.critic = mlp(obs_size, *args.hidden_sizes, 1)
        gains = {self.actor[-1]: 0.01, self.critic[-1]: 1.0}  # of the output layers
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):  # detail 2
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                nn.init.zeros_(layer.bias)
        self.args = args
        self.obs_statistics = tensors.RunningStatistics(obs_shape)
        self.return_statistics = tensors.ReturnStatistics(args.num_envs)
        self.register_buffer("actions", torch.arange(action_space.n) + int(action_space.start))

    def encode(self, obs: torch.Tensor) -> torch.Tensor:
        """Features [B, F] of raw obs [B, *obs_shape]; norm_obs clips at 10 standard deviations."""
        if self.cnn:  # in pieces that fit into the cache
            return torch.cat([self.cnn(x / 255) for x in obs.split(256)])
        if self.args.norm_obs:
            obs = ((obs - self.obs_statistics.shift) * self.obs_statistics.scale).clamp(-10, 10)
        return obs.flatten(1)

    def policy(self, x: torch.Tensor) -> torch.Tensor:
        """Policy, a categorical distribution: its logits [B, A]; of features [B, F]."""
        return self.actor(x)

    def forward(self, obs: torch.Tensor) -> tuple:
        """Policy and values [B] of raw observations."""
        x = self.encode(obs)
        return self.policy(x), self.critic(x).squeeze(-1)

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple:
        """Actions to store, and to send to the environment, for raw obs and noise [B, A]."""
        action = (self.policy(self.encode(obs)) + noise).argmax(-1)  # the Gumbel-max trick
        return action, self.actions.take(action)  # the space may not start at 0

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Return the deterministic action for one raw observation."""
        obs = torch.as_tensor(np.array(obs)).to(next(self.parameters()))
        _, env_action = self.sample(obs[None], noise=obs.new_zeros(()))
        return env_action[0].cpu().numpy()[()]  # [()]: an array without axes as a scalar


class Rollout:
    """T steps of N environments: raw obs [T + 1, N, ...], actions as sampled, unscaled rewards."""

    def __init__(self, args: Args, obs_space: gym.Space, action_space: gym.Space, device):
        shape = args.num_steps, args.num_envs
        self.obs = torch.zeros(shape[0] + 1, shape[1], *obs_space.shape, device=device)
        if len(obs_space.shape) == 3:  # bytes, in memory with channels last: faster convolutions
            self.obs = self.obs.byte().movedim(2, -1).contiguous().movedim(-1, 2)
        self.noise = torch.ones(*shape, gym.spaces.flatdim(action_space), device=device)
        self.terminations, self.truncations = np.zeros(shape, bool), np.zeros(shape, bool)
        self.rewards, self.actions, self.final_obs = np.zeros(shape), [], {}  # final_obs by (t, n)


def log_prob_and_entropy(policy, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of stored actions, and entropy, under a policy; each [B]."""
    log_probs = policy.log_softmax(-1)
    log_prob = log_probs.gather(-1, action[:, None]).squeeze(-1)
    return log_prob, -(log_probs.exp() * log_probs).sum(-1)


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalised advantage estimates (detail 5; arXiv:1506.02438, equation 16); all [T, N].

    next_values[t] is the value of the observation that step t really led to, also at a truncation;
    at a termination it is ignored. Both end the episode, so that no later delta is added.
    """
    deltas = rewards + gamma * next_values * ~terminations - values
    decays = gamma * gae_lambda * ~(terminations | truncations)
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages


def estimate(agent: Agent, rollout: Rollout, values: torch.Tensor, args: Args) -> torch.Tensor:
    """Advantages and value targets [2, T * N] of a rollout, given its values [T * N]."""
    values = torch.cat((values, agent(rollout.obs[-1])[1])).view(rollout.obs.shape[:2]).cpu()
    values, next_values = values[:-1].numpy(), values[1:].clone().numpy()  # clone: changed below
    if rollout.final_obs:  # after a truncation: the episode's real last observation
        t, n = zip(*rollout.final_obs)  # its keys
        final_obs = torch.stack(list(rollout.final_obs.values())).to(rollout.obs)
        next_values[t, n] = agent(final_obs)[1].cpu().numpy()
    rewards = rollout.rewards
    if args.norm_reward:
        rewards = (rewards * agent.return_statistics.scale.item()).clip(-10, 10)
    ends = rollout.terminations, rollout.truncations
    advantages = compute_gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
    arrays = np.stack((advantages, advantages + values)).astype(np.float32)
    return torch.from_numpy(arrays).to(rollout.obs.device).flatten(1)


def ppo_loss(log_prob, entropy, value, old_log_prob, advantage, old_value, target, args: Args):
    """Loss of a minibatch (equation 9 of Schulman et al. 2017, negated) and METRICS; inputs [B]."""
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    if args.norm_adv:  # detail 7: per minibatch
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)  # detail 8
    policy_loss = -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()  # equation 7
    error = F.huber_loss if args.vf_loss == "huber" else F.mse_loss
    value_error = error(value, target, reduction="none")
    if args.clip_vloss:  # detail 9: the larger of the two errors
        clipped_value = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.maximum(value_error, error(clipped_value, target, reduction="none"))
    value_loss = value_error.mean() * (0.5 if args.vf_loss == "mse" else 1.0)  # Huber has its 1/2
    loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss  # detail 10
    kl = -log_ratio.mean(), (ratio - 1 - log_ratio).mean()  # k1, k3: joschu.net/blog/kl-approx.html
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()  # detail 12: only to look at
    metrics = loss, policy_loss, value_loss, entropy.mean(), *kl, clipfrac
    return loss, torch.stack(metrics).detach()


def make_update(agent: Agent, optimizer: tensors.FlatAdam, args: Args):
    """Return `update`, a gradient step in place that returns METRICS; compiled, it is one graph."""
    forward = tensors.functional(agent, args.bf16)  # only weights used through it get gradients

    def loss(parameters, obs, actions, old_log_prob, advantage, old_value, target):
        policy, value = forward(parameters, obs)
        log_prob, entropy = log_prob_and_entropy(policy, actions)
        return ppo_loss(log_prob, entropy, value, old_log_prob, advantage, old_value, target, args)

    def update(parameters, batch, indices, lr):
        minibatch = [x[indices] for x in batch]  # of the rollout's tensors [T * N, ...]
        gradient, (_, metrics) = grad_and_value(loss, has_aux=True)(parameters, *minibatch)
        gradient *= (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)  # detail 11
        optimizer.step(parameters, gradient, lr)
        return metrics

    return update


def learning_rate(progress: float, args: Args) -> torch.Tensor:
    """Learning rate (detail 4) at a fraction `progress` of the run; a tensor: floats recompile."""
    left = (1 + math.cos(math.pi * progress)) / 2 if args.lr_schedule == "cosine" else 1 - progress
    return torch.tensor(args.learning_rate * (left if args.anneal_lr else 1.0))


def check_args(args: Args) -> tuple[gym.spaces.Box, gym.Space]:
    """Return the environment's spaces; exit with a one-line error if an argument cannot work."""
    arguments.check_ranges(args)
    batch_size, least = args.num_envs * args.num_steps, (2 if args.norm_adv else 1)  # 1: no std
    if args.minibatch_size is None:
        fits = batch_size % args.num_minibatches == 0 and args.num_minibatches * least <= batch_size
        need = f"divide a rollout's {batch_size} samples, {least} or more in each"
        arguments.require(fits, args, "num_minibatches", need)
    fits = args.minibatch_size is None or least <= args.minibatch_size <= batch_size
    arguments.require(fits, args, "minibatch_size", f"be from {least} to {batch_size}")
    fits = args.total_timesteps >= batch_size
    arguments.require(fits, args, "total_timesteps", f"be at least {batch_size}, one rollout")
    return envs.check_spaces(args, gym.spaces.Discrete, "use ppo_continuous.py")


@seeding.kept_generators()  # a caller's own random numbers go on as if this had not run
@torch.no_grad()  # grad_and_value takes gradients all the same
def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Train as `args` say, from `checkpoint` (Run loads it) if there is one; return the folder."""
    obs_space, action_space = check_args(args)
    device = compute.setup_torch(args, large=len(obs_space.shape) == 3)
    rng = seeding.Streams(args.seed, ("action", "minibatch"), device)  # seeds weights, too
    agent = Agent(obs_space.shape, action_space, args).to(device)
    parameters = tensors.flatten_parameters(agent)  # [P]; the weights, in `sample` too, are views
    optimizer = tensors.FlatAdam(parameters, eps=1e-5)  # detail 3
    update = compute.compile_function(make_update(agent, optimizer, args), args, device)
    environments, batch_size = envs.Environments(args), args.num_envs * args.num_steps
    size = args.minibatch_size or batch_size // args.num_minibatches
    with failing(f"--num-steps {args.num_steps}", RuntimeError, MemoryError):
        rollout = Rollout(args, obs_space, action_space, device)
    last_step = args.total_timesteps // batch_size * batch_size
    parts = {"agent": agent, "optimizer": optimizer, "envs": environments, "rng": rng}
    with runs.Run(args, SCRIPT, last_step, device, checkpoint, parts) as run:
        global_step, rollout.obs[-1] = run.step, torch.as_tensor(environments.obs)
        agent.return_statistics.carry[environments.lost | (run.step == 0)] = 0.0  # new episodes
        sample = compute.to_numpy(agent.sample, args, rollout.obs[-1], rollout.noise[0])
        while global_step < last_step:
            # collect a rollout; values and log-probabilities are computed once it is complete
            start_step, global_step = global_step, global_step + batch_size
            rollout.noise.exponential_(generator=rng["action"]).log_().neg_()  # Gumbel(0, 1)
            rollout.obs[0], rollout.actions, rollout.final_obs = rollout.obs[-1], [], {}
            for t in range(args.num_steps):
                action, env_action = sample(rollout.obs[t], rollout.noise[t])
                obs, reward, terminated, truncated, infos = environments.step(env_action)
                rollout.actions.append(action)
                rollout.obs[t + 1], rollout.rewards[t] = torch.as_tensor(obs), reward
                rollout.terminations[t], rollout.truncations[t] = terminated, truncated
                for n in np.flatnonzero(truncated):
                    rollout.final_obs[t, n] = torch.tensor(infos["final_obs"][n])
            seen = rollout.rewards, rollout.obs, *rollout.final_obs.values()
            run.require_finite("a reward or observation", *seen)
            rollout.rewards = np.sign(rollout.rewards) if args.clip_reward else rollout.rewards
            run.episodes(environments.finished_episodes())

            # learn; statistics stay those of the rollout, so that with its weights all ratios are 1
            lr, metrics = learning_rate(start_step / last_step, args).to(device), []
            obs = rollout.obs[:-1].flatten(0, 1)
            actions = torch.from_numpy(np.concatenate(rollout.actions)).to(device)
            policy, values = tensors.functional(agent, args.bf16)(parameters, obs)  # as in `update`
            old_log_prob, _ = log_prob_and_entropy(policy, actions)
            advantages, targets = estimate(agent, rollout, values, args)
            losses = {"explained_variance": 1 - ((targets - values).var() / targets.var()).item()}
            for epoch in range(args.update_epochs):
                if epoch > 0 and args.recompute_advantages:
                    values = agent.critic(agent.encode(obs)).squeeze(-1)  # as in Agent.forward
                    advantages, targets = estimate(agent, rollout, values, args)
                batch = obs, actions, old_log_prob, advantages, values, targets
                order = torch.randperm(batch_size, generator=rng["minibatch"], device=device)
                for indices in order.split(size)[: batch_size // size]:  # detail 6; drops the rest
                    metrics.append(update(parameters, batch, indices, lr))
                if args.target_kl and metrics[-1][METRICS.index("approx_kl")] > args.target_kl:
                    break
            losses |= dict(zip(METRICS, torch.stack(metrics).mean(0).tolist(), strict=True))
            run.require_finite("a weight or loss", parameters, losses["loss"])
            run.scalars(losses | {"charts/learning_rate": lr.item()}, global_step)

            # only now update the statistics, of which the first rollout thus has none
            if args.norm_obs:
                agent.obs_statistics.update(obs)
            if args.norm_reward:
                ends = rollout.terminations | rollout.truncations
                agent.return_statistics.update_from_rewards(rollout.rewards, ends, args.gamma)
            if run.due(args.eval_every, global_step):
                run.evaluate(agent, global_step)
            if run.signal or run.due(args.checkpoint_every, global_step):
                run.save(global_step)
            run.progress(global_step)  # last: `due` counts from here on; Ctrl-C ends here
        return run.finish()


def load_agent(run_dir: str | Path, name: str = "checkpoint.pt", device: str = "cpu") -> Agent:
    """Load the agent of a run. `agent.act(obs)` takes one raw observation."""
    checkpoint = runs.load_run(run_dir, SCRIPT, name)
    args, weights = Args(**checkpoint["args"]), checkpoint["agent"]
    action_space = gym.spaces.Discrete(len(weights["actions"]), start=weights["actions"][0].item())
    agent = Agent(weights["obs_statistics.mean"].shape, action_space, args).to(device)
    tensors.flatten_parameters(agent)  # the memory layout of training, so its rounding
    agent.load_state_dict(weights)
    return agent.requires_grad_().eval()  # flatten_parameters had turned gradients off


if __name__ == "__main__":
    args, checkpoint = arguments.parse_args(Args, SCRIPT, ATARI)
    if args.evaluate is None:
        train(args, checkpoint)
    else:
        runs.evaluate(load_agent, args, check_args(args))
