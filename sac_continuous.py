"""Soft Actor-Critic (SAC), in one file.

Keep every transition; learn from random batches of them what an action is worth (two Q-networks, of
which the smaller counts); move the policy towards actions that are worth more while it stays random
enough: reward plus alpha times entropy, with alpha tuned to a target entropy. Haarnoja et al. 2018,
"Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905.

    python sac_continuous.py
    python sac_continuous.py --env-id Pendulum-v1 --total-timesteps 20000 --learning-starts 1000

What to look at: charts/episodic_return rises, losses/alpha falls and settles, losses/entropy nears
minus the number of action dimensions, losses/q_values follow the return and do not run away.
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
from torch.func import functional_call, grad, grad_and_value

from common import envs, runs, seeding, tensors

SCRIPT = Path(__file__).stem
METRICS = ("qf_loss", "q_values"), ("actor_loss", "entropy", "alpha")  # of the two updates
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


@dataclass
class Args:
    """Train, resume or evaluate SAC."""

    exp_name: str = SCRIPT
    """name of the experiment, part of the run folder's name"""
    seed: int = 1
    """seed from which every random stream of the run is spawned"""
    torch_deterministic: bool = True
    """on CUDA take deterministic algorithms, for exact resuming (on the CPU it is always exact)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes what is faster for this work"""
    num_threads: int = 0
    """threads that PyTorch computes with; 0: one for small networks, up to four for large ones"""
    compile: bool = True
    """compile the update with torch.compile; --no-compile is plain eager PyTorch, for debugging"""
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
    resume: str = ""
    """continue the run in this folder, exactly as if it had never stopped"""
    evaluate: str = ""
    """evaluate the last checkpoint of the run in this folder, and train nothing"""
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
    """environment steps of the run, rounded down to whole steps of all environments"""
    num_envs: int = 1
    """environments that step together"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments in this process, or each in a process of its own"""
    buffer_size: int = 1_000_000
    """transitions that the replay keeps; a checkpoint holds them (HalfCheetah: 170 MB)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """how far the target networks move towards the Q-networks"""
    batch_size: int = 256
    """transitions in a batch"""
    learning_starts: int = 5000
    """environment steps with random actions before learning begins"""
    utd_ratio: float = 1.0
    """updates per environment step"""
    policy_lr: float = 3e-4
    """learning rate of the policy"""
    q_lr: float = 1e-3
    """learning rate of the Q-networks and of alpha"""
    policy_frequency: int = 2
    """update the policy after this many updates of the Q-networks, as many times (TD3's delay)"""
    target_network_frequency: int = 1
    """updates of the Q-networks between moves of the target networks"""
    alpha: float = 0.2
    """coefficient of the entropy, with --no-autotune"""
    autotune: bool = True
    """tune alpha so that the entropy nears its target, minus the number of action dimensions"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers of the policy's and the Q-networks"""
    log_every: int = 1000
    """environment steps between logs; checkpoints and evaluations fall on these steps"""


class Actor(nn.Module):
    """Gaussian policy of observations [B, *obs_shape]: mean and log-std, each [B, A]."""

    def __init__(self, obs_size: int, action_size: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_size, *hidden_sizes]
        layers = [f for a, b in zip(sizes, sizes[1:]) for f in (nn.Linear(a, b), nn.ReLU())]
        self.hidden = nn.Sequential(nn.Flatten(), *layers)
        self.mean = nn.Linear(sizes[-1], action_size)
        self.log_std = nn.Linear(sizes[-1], action_size)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-std, which is squashed between LOG_STD_MIN and LOG_STD_MAX."""
        x = self.hidden(obs)
        share = (self.log_std(x).tanh() + 1) / 2
        return self.mean(x), LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * share


class TwinLinear(nn.Module):
    """Two linear layers in one batched product, initialised as nn.Linear is."""

    def __init__(self, in_size: int, out_size: int):
        super().__init__()
        bound = 1 / math.sqrt(in_size)
        self.weight = nn.Parameter(torch.empty(2, in_size, out_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, out_size).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [2, B, in_size] to [2, B, out_size]."""
        return torch.baddbmm(self.bias, x, self.weight)


class Critics(nn.Module):
    """Two Q-networks of observations and actions in [-1, 1]: values [2, B]."""

    def __init__(self, obs_size: int, action_size: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_size + action_size, *hidden_sizes]
        layers = [f for a, b in zip(sizes, sizes[1:]) for f in (TwinLinear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, TwinLinear(sizes[-1], 1))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Values [2, B] of observations [B, *obs_shape] and actions [B, A]."""
        x = torch.cat((obs.flatten(1), action), 1)
        return self.layers(x.expand(2, *x.shape)).squeeze(-1)


class Agent(nn.Module):
    """Actor, twin Q-networks and their targets, and the logarithm of alpha."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.Space, args: Args):
        super().__init__()
        obs_size, action_size = math.prod(obs_shape), gym.spaces.flatdim(action_space)
        self.actor = Actor(obs_size, action_size, args.hidden_sizes)
        self.critics = Critics(obs_size, action_size, args.hidden_sizes)
        self.targets = copy.deepcopy(self.critics)
        log_alpha = 0.0 if args.autotune else math.log(args.alpha)
        self.register_buffer("log_alpha", torch.tensor([log_alpha]))
        self.register_buffer("low", torch.from_numpy(action_space.low).float())
        self.register_buffer("high", torch.from_numpy(action_space.high).float())

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple:
        """Actions for raw observations, given noise [B, A]: as stored, and for the environment."""
        mean, log_std = self.actor(obs)
        action = torch.addcmul(mean, log_std.exp(), noise).tanh()
        return action, self.env_action(action)

    def env_action(self, action: torch.Tensor) -> torch.Tensor:
        """Bring actions [B, A] in [-1, 1] into the environment's bounds and shape."""
        return self.low + (self.high - self.low) * (action.view(-1, *self.low.shape) + 1) / 2

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Return the deterministic action for one raw observation."""
        weight = next(self.parameters())
        obs = torch.as_tensor(np.asarray(obs), dtype=weight.dtype, device=weight.device)
        return self.sample(obs[None], noise=weight.new_zeros(()))[1][0].cpu().numpy()


class Replay:
    """The last transitions, one in each row: obs [O], action [A], reward, termination, next obs.

    The next observation is the one that the step led to, never the one after a reset.
    """

    def __init__(self, size: int, obs_size: int, action_size: int, device):
        self.columns = obs_size, action_size, 1, 1, obs_size
        self.rows = torch.zeros(size, sum(self.columns), device=device)
        self.count = 0  # of all transitions ever added

    def add(self, *transitions: np.ndarray) -> None:
        """Add a transition of every environment, whose number divides the size."""
        parts = [np.reshape(x, (len(x), -1)) for x in transitions]
        begin = self.count % len(self.rows)
        rows = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))
        self.rows[begin : begin + len(rows)] = rows
        self.count += len(rows)

    def sample(self, batch_size: int, rng: torch.Generator) -> torch.Tensor:
        """Draw the indices of a batch, uniformly."""
        filled = min(self.count, len(self.rows))
        return torch.randint(filled, (batch_size,), generator=rng, device=self.rows.device)

    def latest(self, count: int) -> torch.Tensor:
        """Return the last `count` rows, or as many as there are."""
        return self.rows[torch.arange(self.count - count, self.count) % len(self.rows)]

    def state_dict(self) -> dict:
        """Return what is filled."""
        return {"count": self.count, "rows": self.rows[: self.count].clone()}

    def load_state_dict(self, state: dict) -> None:
        """Put back what state_dict returned."""
        self.count = state["count"]
        self.rows[: self.count] = state["rows"]


def tanh_log_det(u: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2) of Haarnoja et al. 2018, arXiv:1812.05905, exact however large u is."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


def sample_with_log_prob(policy: tuple, noise: torch.Tensor) -> tuple:
    """Actions tanh(u) [B, A] from N(0, 1) noise, and their log-density [B] within (-1, 1).

    The target entropy is meant in these units, however wide the environment's bounds are.
    """
    mean, log_std = policy
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - tanh_log_det(u)
    return u.tanh(), log_prob.sum(-1)


def td_target(reward, termination, next_q, next_log_prob, alpha, gamma: float) -> torch.Tensor:
    """Soft Bellman target [B] (equations 3 and 5), from target Q-values [2, B] of the next state.

    A termination has no future; at a time limit the episode's real last state has.
    """
    next_value = next_q.min(0).values - alpha * next_log_prob
    return reward + gamma * (1 - termination) * next_value


def critic_loss(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared errors of both Q-networks [2, B], summed over the two (equation 5, twice)."""
    return (q - target).square().mean(1).sum()


def actor_loss(q: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Equation 7: a random action's value, by the smaller of both [2, B], and its surprise."""
    return (alpha * log_prob - q.min(0).values).mean()


def alpha_loss(log_alpha: torch.Tensor, log_prob: torch.Tensor, target_entropy: float):
    """Equation 18: alpha rises where the entropy is below its target, and falls above it."""
    return -(log_alpha.exp() * (log_prob + target_entropy)).mean()


def make_updates(agent: Agent, optimizer: nn.ModuleDict, columns: tuple, args: Args) -> tuple:
    """Return `update_critics` and `update_actor`, steps in place that return metrics.

    Each is one graph, once compiled, of functions of vectors: networks are called with pieces of
    `critics`, `targets` and `actor` as weights. Noise comes from outside, as a compiled graph draws
    from a generator of its own.
    """

    def q_values(parameters, obs, action):
        weights = tensors.unflatten(parameters, agent.critics)
        return functional_call(agent.critics, weights, (obs, action))

    def act(parameters, obs, noise):
        policy = functional_call(agent.actor, tensors.unflatten(parameters, agent.actor), obs)
        return sample_with_log_prob(policy, noise)

    def update_critics(critics, targets, actor, log_alpha, rows, indices, noise):
        obs, action, reward, termination, next_obs = rows[indices].split(columns, 1)
        next_action, log_prob = act(actor, next_obs, noise)
        next_q, alpha = q_values(targets, next_obs, next_action), log_alpha.exp()
        target = td_target(reward[:, 0], termination[:, 0], next_q, log_prob, alpha, args.gamma)

        def loss(critics):
            q = q_values(critics, obs, action)
            return critic_loss(q, target), q.mean()

        gradient, (qf_loss, mean_q) = grad_and_value(loss, has_aux=True)(critics)
        optimizer["critics"].step(critics, gradient, args.q_lr)
        return torch.stack((qf_loss / 2, mean_q))

    def update_actor(critics, actor, log_alpha, rows, indices, noise):
        obs, alpha = rows[indices, : columns[0]], log_alpha.exp()

        def loss(actor):
            action, log_prob = act(actor, obs, noise)
            return actor_loss(q_values(critics, obs, action), log_prob, alpha), log_prob

        gradient, (value, log_prob) = grad_and_value(loss, has_aux=True)(actor)
        optimizer["actor"].step(actor, gradient, args.policy_lr)
        if args.autotune:
            gradient = grad(alpha_loss)(log_alpha, log_prob, -noise.shape[1])
            optimizer["alpha"].step(log_alpha, gradient, args.q_lr)
        return torch.stack((value, -log_prob.mean(), alpha[0]))

    return update_critics, update_actor


def check_args(args: Args) -> tuple[gym.spaces.Box, gym.Space]:
    """Return the environment's spaces; end with one line if an argument cannot work."""
    runs.check_ranges(args)
    for name in ("buffer_size", "total_timesteps"):
        fits = getattr(args, name) >= args.num_envs
        runs.require(fits, args, name, f"be at least {args.num_envs}, one of each environment")
    return envs.check_spaces(args, gym.spaces.Box, "use ppo_discrete.py", bounded=True)


@torch.no_grad()
def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Train as `args` say, from `checkpoint` on if there is one; return the run folder."""
    obs_space, action_space = check_args(args)
    device = runs.setup_torch(args, faster="cuda")
    rng = seeding.Streams(args.seed, ("action", "replay"), device)
    agent = Agent(obs_space.shape, action_space, args).to(device)
    networks = agent.critics, agent.targets, agent.actor
    critics, targets, actor = (tensors.flatten_parameters(network) for network in networks)
    learned = {"critics": critics, "actor": actor, "alpha": agent.log_alpha}
    optimizer = nn.ModuleDict({name: tensors.FlatAdam(x, eps=1e-8) for name, x in learned.items()})
    environments = envs.Environments(args)
    size, action_size = args.buffer_size, gym.spaces.flatdim(action_space)
    replay = Replay(size - size % args.num_envs, math.prod(obs_space.shape), action_size, device)
    updates = make_updates(agent, optimizer, replay.columns, args)
    update_critics, update_actor = (runs.compile_function(update, args) for update in updates)
    last_step = args.total_timesteps // args.num_envs * args.num_envs
    parts = {"agent": agent, "optimizer": optimizer, "envs": environments, "rng": rng}
    with runs.Run(args, SCRIPT, last_step, device, checkpoint, parts | {"replay": replay}) as run:
        global_step, obs = run.step, environments.obs.astype(np.float32)
        noise = torch.zeros(args.num_envs, action_size, device=device)
        batch_noise = torch.zeros(args.batch_size, action_size, device=device)
        act = tensors.to_numpy(agent.sample, torch.tensor(obs).to(device), noise)
        while global_step < last_step:
            # a stretch of steps, at whose end there are logs, evaluations and checkpoints
            start_step, critic_metrics, actor_metrics = global_step, [], []
            while global_step < min(start_step + args.log_every, last_step):
                global_step += args.num_envs
                if global_step <= args.learning_starts:
                    action = noise.uniform_(-1, 1, generator=rng["action"])
                    env_action = agent.env_action(action).cpu().numpy()
                    action = action.cpu().numpy()
                else:
                    noise.normal_(generator=rng["action"])
                    action, env_action = act(torch.from_numpy(obs).to(device), noise)
                next_obs, reward, terminated, truncated, infos = environments.step(env_action)
                last_obs = next_obs = next_obs.astype(np.float32)
                if (ended := terminated | truncated).any():
                    last_obs = next_obs.copy()
                    last_obs[ended] = np.stack(infos["final_obs"][ended])
                replay.add(obs, action, reward, terminated, last_obs)
                obs = next_obs

                # as many updates as --utd-ratio says
                before = max(global_step - args.num_envs, args.learning_starts)
                for i in range(int(before * args.utd_ratio), int(global_step * args.utd_ratio)):
                    batch = replay.rows, replay.sample(args.batch_size, rng["replay"])
                    batch = agent.log_alpha, *batch, batch_noise
                    batch_noise.normal_(generator=rng["replay"])
                    critic_metrics.append(update_critics(critics, targets, actor, *batch))
                    if i % args.policy_frequency == 0:
                        for _ in range(args.policy_frequency):
                            batch_noise.normal_(generator=rng["replay"])
                            actor_metrics.append(update_actor(critics, actor, *batch))
                    if i % args.target_network_frequency == 0:
                        targets.lerp_(critics, args.tau)
            run.require_finite("a reward or observation", replay.latest(global_step - start_step))
            run.require_finite("the loss", critics, actor, agent.log_alpha)
            run.episodes(environments.finished_episodes())
            for names, metrics in zip(METRICS, (critic_metrics, actor_metrics)):
                losses = torch.stack(metrics).mean(0).tolist() if metrics else ()
                run.scalars(dict(zip(names, losses)), global_step)
            if run.due(args.eval_every, global_step):
                run.evaluate(agent, global_step)
            if run.signal or run.due(args.checkpoint_every, global_step):
                run.save(global_step)
            run.progress(global_step)
    environments.close()
    return run.dir


def load_agent(run_dir: str | Path, name: str = "checkpoint.pt") -> Agent:
    """Load the agent of a run, on the CPU. `agent.act(obs)` takes one raw observation."""
    checkpoint = runs.load_run(run_dir, SCRIPT, name)
    args, weights = Args(**checkpoint["args"]), checkpoint["agent"]
    action_space = gym.spaces.Box(weights["low"].numpy(), weights["high"].numpy())
    agent = Agent(weights["actor.hidden.1.weight"].shape[1:], action_space, args)
    tensors.flatten_parameters(agent.actor)  # laid out in memory as in training: rounds alike
    agent.load_state_dict(weights)
    return agent


def main() -> None:
    """Train, resume or evaluate, as the command line says."""
    args, checkpoint = runs.parse_args(Args, SCRIPT)
    if args.evaluate:
        check_args(args)
        runs.evaluate(load_agent(args.evaluate), args)
    else:
        train(args, checkpoint)


if __name__ == "__main__":
    main()
