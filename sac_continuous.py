"""Soft Actor-Critic (SAC), in one file.

Learn Q-values from random batches of a replay buffer, trusting the smaller of two; move the policy
towards better actions while alpha, the weight of its entropy, keeps it as random as a target asks.
Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905.

    python sac_continuous.py
    python sac_continuous.py --env-id Pendulum-v1 --total-timesteps 20000 --learning-starts 1000

What to look at: charts/episodic_return rises, losses/alpha settles, losses/entropy nears -dim(A).
"""

import copy
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
METRICS = "qf_loss q_values actor_loss entropy alpha".split()  # two of the critic, then the actor's


@dataclass
class Args:
    """Train, resume or evaluate SAC."""

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

    env_id: str = "HalfCheetah-v5"
    """environment; my_module:MyEnv-v0 imports my_module first"""
    total_timesteps: int = 1_000_000
    """environment steps of the run, rounded down to a multiple of --num-envs"""
    num_envs: int = 1
    """environments that step together"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments in this process, or each in its own (Atari: always in threads)"""
    policy_lr: float = 3e-4
    """learning rate of the policy"""
    q_lr: float = 1e-3
    """learning rate of the Q-networks and of alpha"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer (a million: 170 MB for HalfCheetah, 7.2 GB for Atari)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """how far the target network moves towards the Q-network; 1: all the way"""
    target_network_frequency: int = 1
    """updates between moves of the target network"""
    batch_size: int = 256
    """transitions in a batch"""
    learning_starts: int = 5000
    """environment steps before learning begins"""
    checkpoint_replay: bool = True
    """save the replay, as large as in memory; else resuming first refills it, and is not exact"""
    utd_ratio: float = 1.0
    """updates per environment step"""
    policy_frequency: int = 2
    """after every so many updates of the Q-networks the policy is updated, as many times"""
    alpha: float = 0.2
    """coefficient of the entropy, with --no-autotune"""
    autotune: bool = True
    """tune alpha so that the entropy nears its target, -1 per action dimension"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of the policy and the Q-networks"""
    log_every: int = 1000
    """environment steps between logs; checkpoints and evaluations fall on these steps"""


class TwinLinear(nn.Module):
    """Two linear layers in one batched product, initialised as nn.Linear is."""

    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        bound = 1 / math.sqrt(in_size)
        self.weight = nn.Parameter(torch.empty(2, in_size, out_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, out_size).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, in_size], or [2, B, in_size], to [2, B, out_size]."""
        return x.expand(2, -1, -1) @ self.weight + self.bias  # expand: else weights are copied


def mlp(layer: type, *sizes: int) -> list[nn.Module]:
    """Layers of these widths, with ReLUs between them; the last one is linear."""
    layers = [f for a, b in zip(sizes, sizes[1:]) for f in (layer(a, b), nn.ReLU())]
    return layers[:-1]


class Actor(tensors.Network):
    """Policy: a Gaussian, whose samples tanh squashes into (-1, 1)."""

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-std [B, A] for observations [B, *obs_shape]; log-std is within [-5, 2]."""
        x = super().forward(obs.flatten(1)).unflatten(1, (2, -1))  # [B, 2, A]: mean and log-std
        return x.select(1, 0), x.select(1, 1).tanh() * 3.5 - 1.5  # select: to_numpy has no chunk


class TwinQNetwork(tensors.Network):
    """Two Q-networks, of TwinLinear layers."""

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q-values [2, B] of observations [B, *obs_shape] and actions [B, A] in [-1, 1]."""
        return super().forward(torch.cat((obs.flatten(1), action), 1)).squeeze(-1)


class Agent(nn.Module):
    """Actor, twin Q-networks and their target networks, and the logarithm of alpha."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.Space, args: Args):
        super().__init__()
        obs_size, action_size = math.prod(obs_shape), gym.spaces.flatdim(action_space)
        self.actor = Actor(*mlp(nn.Linear, obs_size, *args.hidden_sizes, 2 * action_size))
        self.critic = TwinQNetwork(*mlp(TwinLinear, obs_size + action_size, *args.hidden_sizes, 1))
        self.target = copy.deepcopy(self.critic)
        log_alpha = 0.0 if args.autotune else math.log(args.alpha)
        self.register_buffer("log_alpha", torch.tensor([log_alpha]))  # learned; [1], for FlatAdam
        self.args = args
        self.register_buffer("obs_shape", torch.tensor(obs_shape))  # for load_agent
        for name, bound in zip(("low", "high"), tensors.bounds(action_space)):
            self.register_buffer(name, bound)

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple:
        """Actions to store, and to send to the environment, for raw obs and noise [B, A]."""
        mean, log_std = self.actor(obs)
        action = (mean + log_std.exp() * noise).tanh()
        return action, self.env_action(action)

    def env_action(self, action: torch.Tensor) -> torch.Tensor:
        """Bring actions [B, A] in [-1, 1] into the environment's bounds and shape."""
        action = self.low + (self.high - self.low) * (action.view(-1, *self.low.shape) + 1) / 2
        return action.fmax(self.low).fmin(self.high)  # NaN, reported later, becomes `low`

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Return the deterministic action for one raw observation."""
        obs = torch.as_tensor(np.array(obs)).to(next(self.parameters()))
        _, env_action = self.sample(obs[None], noise=obs.new_zeros(()))
        return env_action[0].cpu().numpy()[()]  # [()]: an array without axes as a scalar


class Replay:
    """The last transitions, a row each: obs [O], action [A], reward, termination, real next obs."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], action_size: int, device):
        obs_size, size = math.prod(obs_shape), args.buffer_size // args.num_envs * args.num_envs
        self.widths = obs_size, action_size, 1, 1, obs_size
        self.rows = torch.zeros(size, sum(self.widths), device=device)
        self.num_rows, self.batch_size = 0, args.batch_size  # num_rows: ever added
        self.shown = None  # observations [N, O] that the environments show now

    def start(self, obs: np.ndarray) -> None:
        """Begin with observations [N, *obs_shape]."""
        self.shown = torch.from_numpy(obs.reshape(len(obs), -1).astype(np.float32))

    def add(self, action, reward, terminated, truncated, obs: np.ndarray, infos: dict) -> None:
        """Add a transition of every environment; `obs` is what it shows now, reset if it ended."""
        before, next_obs = self.shown.numpy(), obs.copy()
        self.start(obs)
        for n in np.flatnonzero(terminated | truncated):  # `obs` is already the next episode's
            next_obs[n] = infos["final_obs"][n]
        parts = [x.reshape(len(obs), -1) for x in (before, action, reward, terminated, next_obs)]
        rows = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))
        begin = self.num_rows % len(self.rows)  # both are multiples of N: no wrap
        self.rows[begin : begin + len(rows)] = rows
        self.num_rows += len(rows)

    def sample(self, rng: torch.Generator) -> torch.Tensor:
        """Draw the indices of a batch, uniformly."""
        filled = min(self.num_rows, len(self.rows))
        return torch.randint(filled, (self.batch_size,), generator=rng, device=self.rows.device)

    def latest(self, count: int) -> torch.Tensor:
        """Return obs, reward, next obs of the last `count` rows, and the current obs, to check."""
        rows = self.rows[torch.arange(self.num_rows - count, self.num_rows) % len(self.rows)]
        obs, _, reward, _, next_obs = rows.split(self.widths, 1)
        return torch.cat([x.flatten() for x in (obs, reward, next_obs, self.shown.to(obs.device))])

    def state_dict(self) -> dict:
        """Return the filled part through NumPy, so that torch.save does not write whole buffers."""
        rows = torch.from_numpy(self.rows[: self.num_rows].cpu().numpy())
        return {"num_rows": self.num_rows, "rows": rows, "obs": self.shown}

    def load_state_dict(self, state: dict) -> None:
        """Put back what state_dict returned."""
        self.num_rows, self.shown = state["num_rows"], state["obs"]
        self.rows[: self.num_rows] = state["rows"]


def tanh_log_det(u: torch.Tensor) -> torch.Tensor:
    """Log of tanh's derivative, log(1 - tanh(u)^2); accurate for any u (arXiv:1812.05905)."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


def sample_with_log_prob(mean, log_std, noise: torch.Tensor) -> tuple:
    """Actions tanh(u) [B, A], where u = mean + std * noise, and log-densities [B] on (-1, 1).

    The target entropy refers to these actions, whatever the environment's bounds are.
    """
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - tanh_log_det(u)
    return u.tanh(), log_prob.sum(-1)


def td_target(reward, termination, next_q, next_log_prob, alpha, gamma: float) -> torch.Tensor:
    """Soft Bellman target [B] (equations 3 and 5), from target Q-values [2, B] of the next obs."""
    next_value = next_q.amin(0) - alpha * next_log_prob  # the smaller, as maximising overestimates
    return reward + gamma * (1 - termination) * next_value  # a time limit is no termination


def actor_loss(q: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Equation 7: the mean of alpha * log_prob [B] - min(q [2, B]), the soft value negated."""
    return (alpha * log_prob - q.amin(0)).mean()


def alpha_loss(log_alpha, log_prob: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """Equation 18: alpha rises where the entropy is below its target, and falls above it."""
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


def make_updates(agent: Agent, optimizer: nn.ModuleDict, widths: tuple, args: Args) -> tuple:
    """Return `update_critic` and `update_actor`, gradient steps in place that return their METRICS.

    critic, target and actor are vectors of weights [P], which get gradients only where `functional`
    calls a network with them. Each update is one graph. Noise is an input, to come from `rng`.
    """
    actor_net, critic_net = (tensors.functional(x, args.bf16) for x in (agent.actor, agent.critic))

    def update_critic(critic, target, actor, log_alpha, rows, indices, noise):
        obs, action, reward, termination, next_obs = rows[indices].split(widths, 1)
        next_action, log_prob = sample_with_log_prob(*actor_net(actor, next_obs), noise)
        next_q, alpha = critic_net(target, next_obs, next_action), log_alpha.exp()
        y = td_target(reward[:, 0], termination[:, 0], next_q, log_prob, alpha, args.gamma)

        def loss(critic):
            q = critic_net(critic, obs, action)
            return (q - y).square().mean(1).sum(), q  # equation 5 without its 1/2

        gradient, (loss_value, q) = grad_and_value(loss, has_aux=True)(critic)
        optimizer["critic"].step(critic, gradient, args.q_lr)
        return torch.stack((loss_value / len(q), q.mean()))  # means over the two networks

    def update_actor(critic, actor, log_alpha, rows, indices, noise):
        obs, alpha = rows[indices, : widths[0]], log_alpha.exp()

        def loss(actor):
            action, log_prob = sample_with_log_prob(*actor_net(actor, obs), noise)
            q = critic_net(critic, obs, action)
            return actor_loss(q, log_prob, alpha), log_prob

        gradient, (loss_value, log_prob) = grad_and_value(loss, has_aux=True)(actor)
        optimizer["actor"].step(actor, gradient, args.policy_lr)
        if args.autotune:  # target entropy: -1 per action dimension
            gradient, _ = grad_and_value(alpha_loss)(log_alpha, log_prob, -widths[1])
            optimizer["alpha"].step(log_alpha, gradient, args.q_lr)
        return torch.stack((loss_value, -log_prob.mean(), alpha[0]))

    return update_critic, update_actor


def check_args(args: Args) -> tuple[gym.spaces.Box, gym.Space]:
    """Return the environment's spaces; exit with a one-line error if an argument cannot work."""
    arguments.check_ranges(args)
    for name in ("total_timesteps", "buffer_size", "learning_starts"):
        fits = getattr(args, name) >= args.num_envs
        arguments.require(fits, args, name, f"be at least {args.num_envs}, as --num-envs is")
    return envs.check_spaces(args, gym.spaces.Box, "use ppo_discrete.py", bounded=True)


@seeding.kept_generators()  # a caller's own random numbers go on as if this had not run
@torch.no_grad()  # grad_and_value takes gradients all the same
def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Train as `args` say, from `checkpoint` (Run loads it) if there is one; return the folder."""
    obs_space, action_space = check_args(args)
    device = compute.setup_torch(args, large=True)
    rng = seeding.Streams(args.seed, ("action", "replay"), device)  # seeds weights, too
    agent = Agent(obs_space.shape, action_space, args).to(device)
    critic, target = map(tensors.flatten_parameters, (agent.critic, agent.target))  # vectors [P]
    actor, log_alpha = tensors.flatten_parameters(agent.actor), agent.log_alpha
    learned = {"critic": critic, "actor": actor, "alpha": log_alpha}
    optimizer = nn.ModuleDict({name: tensors.FlatAdam(x, eps=1e-8) for name, x in learned.items()})
    environments, action_size = envs.Environments(args), gym.spaces.flatdim(action_space)
    with failing(f"--buffer-size {args.buffer_size}", RuntimeError, MemoryError):
        replay = Replay(args, obs_space.shape, action_size, device)
    updates = make_updates(agent, optimizer, replay.widths, args)
    update_critic, update_actor = (compute.compile_function(x, args, device) for x in updates)
    batch_noise = torch.zeros(args.batch_size, action_size, device=device)
    last_step = args.total_timesteps // args.num_envs * args.num_envs
    parts = {"agent": agent, "optimizer": optimizer, "envs": environments, "rng": rng}
    parts |= {"replay": replay} if args.checkpoint_replay else {}
    with runs.Run(args, SCRIPT, last_step, device, checkpoint, parts) as run:
        global_step, learn_after, obs = run.step, args.learning_starts, environments.obs
        if 0 < global_step < last_step and not args.checkpoint_replay:
            learn_after += global_step  # first fill a new replay, with the policy it has
            print(f"no replay kept: inexact, learns from step {learn_after:,} of {last_step:,}")
        if replay.shown is None or environments.lost.any():  # a new run, or not restored
            replay.start(obs)
        noise = torch.ones(args.num_envs, action_size, device=device)  # 0 would hide errors
        sample = compute.to_numpy(agent.sample, args, torch.tensor(obs).to(device).to(noise), noise)
        while global_step < last_step:  # --log-every steps, then a log and what else is due
            start_step, metrics = global_step, []
            while global_step < min(start_step + args.log_every, last_step):
                global_step += args.num_envs
                if global_step <= args.learning_starts:  # uniformly random actions
                    action = noise.uniform_(-1, 1, generator=rng["action"]).cpu().numpy()
                    env_action = agent.env_action(noise).cpu().numpy()
                else:
                    noise.normal_(generator=rng["action"])
                    action, env_action = sample(torch.from_numpy(obs).to(device).to(noise), noise)
                environments.send(env_action)  # Atari and async ones step while the network learns

                before = max(global_step - args.num_envs, learn_after)  # learned up to here
                for i in range(int(before * args.utd_ratio), int(global_step * args.utd_ratio)):
                    indices = replay.sample(rng["replay"])
                    inputs = replay.rows, indices, batch_noise.normal_(generator=rng["replay"])
                    losses = update_critic(critic, target, actor, log_alpha, *inputs)
                    if i % args.policy_frequency == 0:
                        for _ in range(args.policy_frequency):
                            batch_noise.normal_(generator=rng["replay"])  # in `inputs`, too
                            policy_losses = update_actor(critic, actor, log_alpha, *inputs)
                        metrics.append(torch.cat((losses, policy_losses)))  # only these are logged
                    if i % args.target_network_frequency == 0:
                        target.lerp_(critic, args.tau)

                obs, reward, terminated, truncated, infos = environments.recv()
                replay.add(action, reward, terminated, truncated, obs, infos)
            run.require_finite("a reward or observation", replay.latest(global_step - start_step))
            means = dict(zip(METRICS, torch.stack(metrics).mean(0), strict=True)) if metrics else {}
            run.require_finite("a weight or loss", critic, actor, log_alpha, *means.values())
            run.episodes(environments.finished_episodes())
            run.scalars(means, global_step)
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
    action_space = gym.spaces.Box(weights["low"].numpy(), weights["high"].numpy())
    agent = Agent(weights["obs_shape"].tolist(), action_space, args).to(device)
    tensors.flatten_parameters(agent.actor)  # the memory layout of training, so its rounding
    agent.load_state_dict(weights)
    return agent.requires_grad_().eval()  # flatten_parameters had turned gradients off


if __name__ == "__main__":
    args, checkpoint = arguments.parse_args(Args, SCRIPT)
    if args.evaluate is None:
        train(args, checkpoint)
    else:
        runs.evaluate(load_agent, args, check_args(args))
