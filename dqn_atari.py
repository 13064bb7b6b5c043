"""Deep Q-Network (DQN) for Atari, in one file, with its best-known extensions.

Learn what each action is worth from random batches of a replay buffer, with targets from an older
copy of the network; act greedily, or at random with probability epsilon. Mnih et al., Nature 2015.
On arXiv: --double 1509.06461, --dueling (Wang) 1511.06581, --prioritized (Schaul) 1511.05952.

    python dqn_atari.py
    python dqn_atari.py --env-id ALE/Pong-v5 --total-timesteps 2000000 --double --dueling

What to look at: charts/episodic_return rises as charts/epsilon falls; losses/q_values settles.
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
METRICS = "td_loss q_values".split()


@dataclass
class Args:
    """Train, resume or evaluate DQN."""

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

    env_id: str = "ALE/Breakout-v5"
    """environment; my_module:MyEnv-v0 imports my_module first"""
    sticky_actions: float = 0.0
    """Atari: probability that a game repeats the previous action instead"""
    total_timesteps: int = 10_000_000
    """environment steps of the run, rounded down to a multiple of --num-envs"""
    num_envs: int = 8
    """environments that step together"""
    vectorization: Literal["sync", "async"] = "sync"
    """step the environments in this process, or each in its own (Atari: always in threads)"""
    learning_rate: float = 1e-4
    """Adam's learning rate"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer (a million: 170 MB for HalfCheetah, 7.2 GB for Atari)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 1.0
    """how far the target network moves towards the Q-network; 1: all the way"""
    target_network_frequency: int = 1000
    """environment steps between moves of the target network"""
    batch_size: int = 32
    """transitions in a batch"""
    learning_starts: int = 80_000
    """environment steps before learning begins"""
    train_frequency: int = 4
    """environment steps per update"""
    checkpoint_replay: bool = False
    """save the replay, as large as in memory; else resuming first refills it, and is not exact"""
    clip_reward: bool = True
    """learn from the signs of rewards; what is logged is unclipped"""
    start_e: float = 1.0
    """epsilon at the start: the probability of a random action"""
    end_e: float = 0.01
    """epsilon once it has fallen"""
    exploration_fraction: float = 0.1
    """fraction of the run in which epsilon falls, linearly"""
    eval_e: float = 0.01
    """epsilon in evaluations"""
    loss: Literal["mse", "huber"] = "mse"
    """error that the loss measures; huber clips its gradient, as Mnih et al. did"""
    max_grad_norm: float | None = None
    """gradients of a larger global norm are scaled down to it"""
    double: bool = False
    """let the Q-network choose the next action, and the target network value it"""
    dueling: bool = False
    """estimate an action's value as the state's value plus the action's advantage"""
    n_step: int = 1
    """rewards summed in a target before it bootstraps (Rainbow: arXiv:1710.02298)"""
    prioritized: bool = False
    """draw transitions in proportion to a power of their last TD error"""
    priority_alpha: float = 0.6
    """exponent of the TD error in --prioritized; with 0 all are drawn alike"""
    priority_beta: float = 0.4
    """exponent of the importance weights at the start; it grows to 1 over the run"""
    log_every: int = 1000
    """environment steps between logs; checkpoints and evaluations fall on these steps"""


def nature_cnn(obs_shape: tuple[int, ...]) -> nn.Sequential:
    """Encoder of images [B, C, H, W] into [B, 512] (Mnih et al. 2015)."""
    layers = [nn.Conv2d(obs_shape[0], 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()]
    size = nn.Sequential(*layers)(torch.zeros(1, *obs_shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(size, 512), nn.ReLU())


class QNetwork(nn.Module):
    """Q-values [B, A] of all actions for stacks of frames [B, 4, H, W], pixels from 0 to 255."""

    def __init__(self, obs_shape: tuple[int, ...], action_size: int, args: Args):
        super().__init__()
        *convolutions, linear, relu = nature_cnn(obs_shape)  # --dueling branches off before linear
        self.cnn = nn.Sequential(*convolutions)
        self.advantage = tensors.Network(linear, relu, nn.Linear(512, action_size))
        self.state_value = None
        if args.dueling:
            linear = nn.Linear(linear.in_features, 512)
            self.state_value = tensors.Network(linear, nn.ReLU(), nn.Linear(512, 1))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Q-values of all actions; with --dueling by Wang's equation 9: advantages of mean 0."""
        x = self.cnn(obs / 255)
        if self.state_value is None:
            return self.advantage(x)  # without --dueling, these are the Q-values
        x = x.detach().lerp(x, math.sqrt(0.5))  # same values, gradient / sqrt(2) (Wang, 4.2)
        advantage = self.advantage(x)
        return self.state_value(x) + advantage - advantage.mean(1, keepdim=True)


class Agent(nn.Module):
    """`q_network` and its `target` network; epsilon-greedy by noise added to the Q-values."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.Space, args: Args):
        super().__init__()
        self.q_network = QNetwork(obs_shape, gym.spaces.flatdim(action_space), args)
        self.target = copy.deepcopy(self.q_network)
        self.args = args
        self.register_buffer("obs_shape", torch.tensor(obs_shape))  # for load_agent
        self.register_buffer("actions", torch.arange(action_space.n) + int(action_space.start))

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple:
        """Actions to store, and to send to the environment, for raw obs and noise [B, A]."""
        action = (self.q_network(obs) + noise).argmax(-1)
        return action, self.actions.take(action)  # the space may not start at 0

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Return the deterministic action for one raw observation."""
        obs = torch.as_tensor(np.array(obs)).to(next(self.parameters()))
        _, env_action = self.sample(obs[None], noise=obs.new_zeros(()))
        return env_action[0].cpu().numpy()[()]  # [()]: an array without axes as a scalar


class SumTree:
    """A sum tree of two levels, sqrt(size) wide: few vector operations; a binary one has 20 levels.

    Priorities are integers in units of 2**-30, so that sums are exact on every device, rounded up,
    so that none is lost, and capped (at 4,096 with a million leaves) so that no sum overflows.
    """

    def __init__(self, size: int, device):
        width, self.max_leaf = math.ceil(math.sqrt(size)), 2.0 ** (62 - size.bit_length())
        self.leaves = torch.zeros(width, width, dtype=torch.int64, device=device)
        self.sums = torch.zeros(width, dtype=torch.int64, device=device)

    def update(self, indices: torch.Tensor, priorities: torch.Tensor) -> None:
        """Set the priorities [B] of the leaves `indices` [B]."""
        self.leaves.view(-1)[indices] = (priorities * 2**30).ceil().clamp(max=self.max_leaf).long()
        blocks = indices // len(self.sums)  # a block: a row of leaves, summed up in `sums`
        self.sums[blocks] = self.leaves[blocks].sum(1)

    def sample(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw leaves by float64 numbers [B] from 0 to 1; return indices and probabilities [B]."""
        cumulative = self.sums.cumsum(0)
        mass = (uniform * cumulative[-1]).long().clamp(max=cumulative[-1] - 1)  # below the total
        blocks = torch.searchsorted(cumulative, mass, right=True)
        leaves, rest = self.leaves[blocks], mass - (cumulative[blocks] - self.sums[blocks])
        inner = torch.searchsorted(leaves.cumsum(1), rest[:, None], right=True)  # in the block
        indices = blocks * len(self.sums) + inner.squeeze(1)
        return indices, leaves.gather(1, inner).squeeze(1) / cumulative[-1].double()


class Replay:
    """The last transitions of N environments, in rows [N]; every frame is kept once.

    Frames are numbered as they are kept, from 1 (0: black, before a game); slots index `frames`.
    `stacks` holds a transition's five slots: obs is the first four, next obs the last four.
    """

    def __init__(self, args: Args, obs_shape: tuple[int, ...], device):
        shape, self.args = (args.buffer_size // args.num_envs, args.num_envs), args
        # 2% more, as a truncated step keeps 2 frames (if many do, rows go early), and what the
        # oldest obs needs beside its row: 4 frames of `start`, and 2 of each of 4 earlier steps
        self.capacity = math.ceil(1.02 * args.buffer_size) + 12 * args.num_envs
        frames = self.capacity + 1, *obs_shape[1:]
        self.frames = torch.zeros(frames, dtype=torch.uint8, device=device)
        self.stacks = torch.zeros(*shape, 5, dtype=torch.int32, device=device)
        self.actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.rewards = torch.zeros(shape, device=device)
        self.ends = torch.zeros(*shape, 2, dtype=torch.bool, device=device)  # terminated, truncated
        self.tree = SumTree(math.prod(shape), device)
        self.max_priority = torch.ones((), dtype=torch.float64, device=device)
        self.needs = np.zeros(shape[0], np.int64)  # number of a row's oldest frame
        self.shown = None  # numbers [N, 4] of the frames that the environments show now
        self.num_frames = self.num_rows = self.oldest = 0  # ever kept, ever added, first row left

    def start(self, obs: np.ndarray) -> None:
        """Begin with observations [N, 4, H, W]; episodes before them are cut off."""
        self.ends[(self.num_rows - 1) % len(self.rewards), :, 1] = True  # no row yet: an unused one
        self.shown = np.stack([self._keep(obs[:, i]) for i in range(obs.shape[1])], axis=1)
        self._drop()

    def _keep(self, frames: np.ndarray) -> np.ndarray:  # stores them, and returns their numbers
        numbers = self.num_frames + np.arange(1, len(frames) + 1)
        self.num_frames += len(frames)
        self.frames[self._slots(numbers)] = torch.from_numpy(frames).to(self.frames.device)
        return numbers

    def _slots(self, numbers: np.ndarray) -> torch.Tensor:  # where `frames` has them
        slots = np.where(numbers > 0, (numbers - 1) % self.capacity + 1, 0)
        return torch.from_numpy(slots).to(self.frames.device)

    def add(self, action, reward, terminated, truncated, obs: np.ndarray, infos: dict) -> None:
        """Add a transition of every environment; `obs` is what it shows now, reset if it ended."""
        clip = self.args.clip_reward & np.isfinite(reward)  # infinities stay, to be noticed
        reward = np.where(clip, np.sign(reward), reward)
        newest = self._keep(obs[:, -1])  # numbers [N] of the frames shown now
        next_frames = newest.copy()
        if truncated.any():  # `obs` no longer shows their last frames
            last_frames = np.stack([x[-1] for x in infos["final_obs"][truncated]])
            next_frames[truncated] = self._keep(last_frames)
        numbers = np.column_stack((self.shown, next_frames))  # [N, 5]
        self.shown = np.column_stack((self.shown[:, 1:], newest))
        self.shown[infos["over"], :-1] = 0  # a new game: black before it (not after a lost life)

        row = self.num_rows % len(self.rewards)
        self.stacks[row] = self._slots(numbers)
        self.actions[row], self.rewards[row] = torch.as_tensor(action), torch.as_tensor(reward)
        self.ends[row] = torch.from_numpy(np.column_stack((terminated, truncated)))
        self.needs[row] = np.where(numbers > 0, numbers, self.num_frames).min()  # black stays
        self.num_rows += 1
        self._drop()
        complete = self.num_rows - self.args.n_step
        if self.args.prioritized and complete >= self.oldest:  # it has all n steps
            self._set_priority(complete, complete + 1, self.max_priority)  # Schaul, algorithm 1

    def _drop(self) -> None:  # forgets rows that are overwritten, or whose frames are
        before, self.oldest = self.oldest, max(self.oldest, self.num_rows - len(self.rewards))
        gone = self.num_frames - self.capacity
        while self.oldest < self.num_rows and self.needs[self.oldest % len(self.needs)] <= gone:
            self.oldest += 1
        if self.args.prioritized and before < self.oldest:
            self._set_priority(before, self.oldest, torch.zeros_like(self.max_priority))

    def _set_priority(self, start: int, stop: int, priority: torch.Tensor) -> None:
        num_envs, device = self.args.num_envs, priority.device
        indices = torch.arange(start * num_envs, stop * num_envs, device=device)
        self.tree.update(indices % self.rewards.numel(), priority.expand(len(indices)))

    def sample(self, beta: float, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw transitions that have all n steps; return their indices and weights [B]."""
        count = (self.num_rows - self.args.n_step + 1 - self.oldest) * self.args.num_envs
        size, device = (self.args.batch_size,), self.rewards.device
        if not self.args.prioritized:
            indices = torch.randint(count, size, generator=rng, device=device)
            indices = (self.oldest * self.args.num_envs + indices) % self.rewards.numel()
            return indices, torch.ones(size, device=device)
        strata = torch.arange(*size, device=device)  # of equal probability, one draw from each
        uniform = torch.rand(size, generator=rng, device=device, dtype=torch.float64)
        indices, probabilities = self.tree.sample((strata + uniform) / len(strata))
        weights = (count * probabilities) ** -beta  # Schaul, 3.4
        return indices, (weights / weights.max()).float()

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Observations, actions, n-step rewards, discounts and last observations of transitions.

        Rewards are summed until an episode ends; a termination's discount is 0, its last obs void.
        """
        row, env = indices // self.args.num_envs, indices % self.args.num_envs
        steps = torch.arange(self.args.n_step, device=row.device)
        rows, columns = (row[:, None] + steps) % len(self.rewards), env[:, None]
        ended = self.ends[rows, columns].any(2).int()
        running = (ended.cumsum(1) - ended) == 0  # [B, n]: no end before this step
        reward = (self.rewards[rows, columns] * self.args.gamma**steps * running).sum(1)
        last = rows.gather(1, running.sum(1, keepdim=True) - 1).squeeze(1)
        discount = self.args.gamma ** running.sum(1) * ~self.ends[last, env, 0]
        slots = torch.cat((self.stacks[row, env, :4], self.stacks[last, env, 1:]), 1)
        frames = self.frames.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        layout = torch.channels_last  # makes convolutions faster
        obs, next_obs = (x.contiguous(memory_format=layout) for x in frames.split(4, 1))
        return obs, self.actions[row, env], reward, discount, next_obs

    def update_priorities(self, indices: torch.Tensor, td_error: torch.Tensor) -> None:
        """Set priorities (|error| + 1e-6) ** alpha (Schaul's equation 1, proportional)."""
        error = td_error.abs().double().nan_to_num(0, 0)  # require_finite reports it
        priorities = (error + 1e-6) ** self.args.priority_alpha
        self.max_priority = torch.maximum(self.max_priority, priorities.max())
        self.tree.update(indices, priorities)

    def latest(self, count: int) -> torch.Tensor:
        """Return the rewards of the last rows, with at least `count` transitions, to check."""
        rows = torch.arange(self.num_rows - math.ceil(count / self.args.num_envs), self.num_rows)
        return self.rewards[rows % len(self.rewards)]

    def state_dict(self) -> dict:
        """Return the filled part through NumPy, so that torch.save does not write whole buffers."""
        rows, kept = min(self.num_rows, len(self.rewards)), min(self.num_frames, self.capacity) + 1
        filled = {"stacks": rows, "actions": rows, "rewards": rows, "ends": rows, "frames": kept}
        state = {k: torch.from_numpy(getattr(self, k)[:n].cpu().numpy()) for k, n in filled.items()}
        state["needs"] = torch.from_numpy(self.needs.copy())
        state["shown"] = None if self.shown is None else torch.from_numpy(self.shown.copy())
        state |= {"leaves": self.tree.leaves, "sums": self.tree.sums}
        counts = self.num_frames, self.num_rows, self.oldest
        return state | {"max_priority": self.max_priority, "counts": counts}

    def load_state_dict(self, state: dict) -> None:
        """Put back what state_dict returned."""
        for name in ("stacks", "actions", "rewards", "ends", "frames"):
            getattr(self, name)[: len(state[name])] = state[name]
        self.num_frames, self.num_rows, self.oldest = state["counts"]
        self.needs[:] = state["needs"]
        self.shown = None if state["shown"] is None else state["shown"].numpy()
        self.tree.leaves.copy_(state["leaves"])
        self.tree.sums.copy_(state["sums"])
        self.max_priority.copy_(state["max_priority"])


def linear_schedule(start: float, end: float, progress: float) -> float:
    """Go from `start` to `end` while `progress` goes from 0 to 1, and stay there."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def td_target(reward, discount, next_q, choosing_q) -> torch.Tensor:
    """Target [B]: the n-step reward plus the discounted next_q [B, A] of the best next action.

    The target network both chooses (choosing_q) and values it (Mnih et al. 2015), or the Q-network
    chooses it (van Hasselt et al. 2016). `discount` is 0 after a termination, not at a time limit.
    """
    return reward + discount * next_q.gather(1, choosing_q.argmax(1, keepdim=True)).squeeze(1)


def td_loss(q, target, weight, loss: str) -> torch.Tensor:
    """Mean over a batch [B] of squared or Huber errors times their importance-sampling weights."""
    error = F.huber_loss if loss == "huber" else F.mse_loss
    return (weight * error(q, target, reduction="none")).mean()


def make_update(agent: Agent, optimizer: tensors.FlatAdam, args: Args):
    """Return `update`, a gradient step in place that returns METRICS and the TD errors [B].

    Compiled, it is one graph. Only weights [P] with which `q_values` is called get gradients.
    """
    q_values = tensors.functional(agent.q_network, args.bf16)  # of weights and observations

    def update(parameters, target, batch, weight):
        obs, action, reward, discount, next_obs = batch
        next_q = q_values(target, next_obs)
        choosing_q = q_values(parameters, next_obs) if args.double else next_q
        y = td_target(reward, discount, next_q, choosing_q)

        def loss(parameters):
            q = q_values(parameters, obs).gather(1, action[:, None]).squeeze(1)
            return td_loss(q, y, weight, args.loss), q

        gradient, (loss_value, q) = grad_and_value(loss, has_aux=True)(parameters)
        if args.max_grad_norm:
            gradient *= (args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
        optimizer.step(parameters, gradient, args.learning_rate)
        return torch.stack((loss_value, q.mean())), y - q

    return update


def check_args(args: Args) -> tuple[gym.spaces.Box, gym.Space]:
    """Return the environment's spaces; exit with a one-line error if an argument cannot work."""
    arguments.check_ranges(args)
    for name in ("total_timesteps", "buffer_size", "learning_starts"):
        fits = getattr(args, name) >= args.num_envs
        arguments.require(fits, args, name, f"be at least {args.num_envs}, as --num-envs is")
    for name, least in (("learning_starts", args.n_step), ("buffer_size", 2 * args.n_step)):
        fits, need = getattr(args, name) >= args.num_envs * least, f"{least} times --num-envs"
        arguments.require(fits, args, name, f"be at least {need}, with --n-step {args.n_step}")
    return envs.check_spaces(args, gym.spaces.Discrete, "use sac_continuous.py", images=True)


@seeding.kept_generators()  # a caller's own random numbers go on as if this had not run
@torch.no_grad()  # grad_and_value takes gradients all the same
def train(args: Args, checkpoint: dict | None = None) -> Path:
    """Train as `args` say, from `checkpoint` (Run loads it) if there is one; return the folder."""
    obs_space, action_space = check_args(args)
    device = compute.setup_torch(args, large=True)
    rng = seeding.Streams(args.seed, ("action", "replay"), device)  # seeds weights, too
    agent = Agent(obs_space.shape, action_space, args).to(device)
    parameters, target = map(tensors.flatten_parameters, (agent.q_network, agent.target))  # [P]
    optimizer = tensors.FlatAdam(parameters, eps=1e-8)
    environments, action_size = envs.Environments(args), gym.spaces.flatdim(action_space)
    with failing(f"--buffer-size {args.buffer_size}", RuntimeError, MemoryError):
        replay = Replay(args, obs_space.shape, device)
    update = compute.compile_function(make_update(agent, optimizer, args), args, device)
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
                progress = global_step / (args.exploration_fraction * last_step + 1e-9)
                epsilon = linear_schedule(args.start_e, args.end_e, progress)
                uniform = torch.rand(len(noise), 1, generator=rng["action"], device=device)
                # epsilon-greedy: where uniform < epsilon, noise drowns Q-values: a uniform action
                noise.exponential_(generator=rng["action"]).mul_(1e9 * (uniform < epsilon))
                action, env_action = sample(torch.from_numpy(obs).to(device).to(noise), noise)
                environments.send(env_action)  # Atari and async ones step while the network learns

                before = max(global_step - args.num_envs, learn_after)  # learned up to here
                for i in range(before // args.train_frequency, global_step // args.train_frequency):
                    step = i * args.train_frequency
                    beta = linear_schedule(args.priority_beta, 1.0, step / last_step)
                    indices, weight = replay.sample(beta, rng["replay"])
                    losses, error = update(parameters, target, replay.batch(indices), weight)
                    metrics.append(losses)
                    if args.prioritized:
                        replay.update_priorities(indices, error)
                    if step % args.target_network_frequency < args.train_frequency:  # once a period
                        target.lerp_(parameters, args.tau)

                obs, reward, terminated, truncated, infos = environments.recv()
                replay.add(action, reward, terminated, truncated, obs, infos)
            run.require_finite("a reward or observation", replay.latest(global_step - start_step))
            means = dict(zip(METRICS, torch.stack(metrics).mean(0), strict=True)) if metrics else {}
            run.require_finite("a weight or loss", parameters, *means.values())
            run.episodes(environments.finished_episodes())
            run.scalars(means | {"charts/epsilon": epsilon}, global_step)
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
    agent = Agent(weights["obs_shape"].tolist(), action_space, args).to(device)
    tensors.flatten_parameters(agent.q_network)  # the memory layout of training, so its rounding
    agent.load_state_dict(weights)
    return agent.requires_grad_().eval()  # flatten_parameters had turned gradients off


if __name__ == "__main__":
    args, checkpoint = arguments.parse_args(Args, SCRIPT)
    if args.evaluate is None:
        train(args, checkpoint)
    else:
        runs.evaluate(load_agent, args, check_args(args))
