"""Environments: making them, checking their spaces, restoring them when a run is resumed."""

import atexit
import copy
import importlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from common import atari, fail, failing
from common.seeding import kept_generators, seed_process, stream_seed

# what environments draw from; they would share one stream if they shared the space
_spaces = weakref.WeakValueDictionary()


def make_env(args, render_mode: str | None = None) -> gym.Env:
    """Make one environment; `my_module:MyEnv-v0` imports my_module, also from the working folder.

    Observations that are one frame [H, W] of bytes, at least 36 pixels wide and high, become stacks
    of four, black at the beginning.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if game := atari.find_game(args.env_id):
        sticky = getattr(args, "sticky_actions", 0.0)
        env = atari.AtariGame(game, sticky, render_mode and "rgb_array")
        return gym.wrappers.HumanRendering(env) if render_mode == "human" else env
    options = {"render_mode": render_mode} if render_mode else {}
    env = gym.make(args.env_id, disable_env_checker=True, **options)
    for name in ("action_space", "observation_space"):
        space = getattr(env.unwrapped, name, None)
        if _spaces.get(id(space)) is space is not None:  # a class's, say
            with suppress(AttributeError):  # a property
                setattr(env.unwrapped, name, copy.deepcopy(space))
        elif space is not None:
            _spaces[id(space)] = space
    shape = env.observation_space.shape or ()
    if len(shape) == 2 and min(shape) >= 36 and env.observation_space.dtype == np.uint8:
        env = gym.wrappers.TransformObservation(env, np.copy, None)  # it may reuse its buffer
        env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
    return env


def _number(reward) -> float:
    return float(reward.item() if hasattr(reward, "item") else reward)  # some are arrays [1]


def _seed_spaces(env: gym.Env, seed: int) -> None:  # some environments draw from them
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    names = "action_space", "observation_space"
    spaces = [getattr(x, name, None) for x in (env.unwrapped, *layers) for name in names]
    for space in {id(x): x for x in spaces if x is not None}.values():  # each once
        space.seed(seed)


class Replayable(gym.Wrapper):
    """Seeds every episode from (seed, index, episode), and remembers the actions of the last one.

    Repeating them leads back to the same state in any environment whose episodes depend on their
    seed and their actions alone, without knowing what it is made of.
    """

    def __init__(self, args, index: int):
        super().__init__(make_env(args))
        self.stream, self.episode, self.actions = (args.seed, "env", index), -1, []

    def reset(self, *, seed=None, options=None) -> tuple:
        """Begin the next episode."""
        self.episode, self.actions = self.episode + 1, []
        _seed_spaces(self.env, stream_seed(*self.stream, self.episode, 0))
        obs, _ = self.env.reset(seed=stream_seed(*self.stream, self.episode), options=options)
        return obs, {}

    def step(self, action) -> tuple:
        """Step, and record the action, up to a million. Infos would cost a quarter of a step."""
        if len(self.actions) < 10**6:
            self.actions.append(np.copy(action))
        obs, reward, terminated, truncated, _ = self.env.step(action)
        if terminated or truncated:  # the reset may use the same buffer
            obs = np.copy(obs)
        return obs, _number(reward), terminated, truncated, {}

    @property
    def history(self) -> tuple[int, np.ndarray]:
        """Number of the running episode and its actions so far.

        When set, they are repeated; with None, all stays as it is.
        """
        return self.episode, np.array(self.actions)

    @history.setter
    def history(self, history: tuple[int, np.ndarray] | None) -> None:
        if history is None:
            return
        self.episode = history[0] - 1
        self.obs, _ = self.reset()
        try:
            for action in history[1]:
                self.obs, _, terminated, truncated, _ = self.step(action.copy())
                if terminated or truncated:
                    raise RuntimeError("the episode ended before all were repeated")
        except Exception:  # or, e.g., this state does not allow the action
            self.obs = None


def _training_env(args, index: int, trainer: int) -> gym.Env:
    if os.getpid() != trainer:  # a worker, which the trainer ends after saving
        os.setpgid(0, 0)  # so that a terminal's Ctrl-C does not reach programs that it starts
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, for those too
                signal.signal(number, lambda *_: None)
        seed_process(args.seed, index)  # not the trainer's streams
        torch.set_num_threads(1)  # a fork lacks the trainer's threads, and would wait for them
    return Replayable(args, index)


def _end_workers() -> None:
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class Environments:
    """Environments [N] that step together, and the return and length of their episodes.

    They reset in the step that ends an episode (SAME_STEP); the real last observation is then in
    infos["final_obs"]. NEXT_STEP, Gymnasium's default, puts a false transition between episodes.
    """

    @torch.enable_grad()  # here and below for environments with networks of their own
    def __init__(self, args):
        # Python 3.14's fork server would know neither the trainer's signals nor what it has changed
        forked = partial(AsyncVectorEnv, context="fork" if sys.platform == "linux" else None)
        vectorize = {"sync": SyncVectorEnv, "async": forked}[args.vectorization]
        if game := atari.find_game(args.env_id):
            self.vector_env = atari.AtariGames(game, args.num_envs, args.seed, args.sticky_actions)
        else:
            makers = [partial(_training_env, args, i, os.getpid()) for i in range(args.num_envs)]
            atexit.register(_end_workers)  # before multiprocessing's own end, which would wait
            self.vector_env = vectorize(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
            for worker in getattr(self.vector_env, "processes", []):
                worker.terminate = worker.kill
        self.background = hasattr(self.vector_env, "step_async")
        self.obs, _ = self.vector_env.reset()
        self.returns, self.lengths = np.zeros(args.num_envs), np.zeros(args.num_envs, np.int64)
        self.steps, self.finished, self.lost = 0, [], np.zeros(args.num_envs, bool)

    def step(self, actions: np.ndarray) -> tuple:
        """Step all; return obs, rewards, terminated, truncated, each [N, ...], and infos.

        An end of both kinds is a termination. The next step overwrites `obs`: copy it. Of infos
        only final_obs is kept, and "over": all ends except Atari's lost lives.
        """
        self.send(actions)
        return self.recv()

    def send(self, actions: np.ndarray) -> None:
        """Begin a step, which games and --vectorization async make in the background."""
        self.actions = actions
        if self.background:
            self.vector_env.step_async(actions)

    def recv(self) -> tuple:
        """End the step that `send` began, and return what `step` does."""
        vector_env = self.vector_env
        with torch.enable_grad():
            outcome = vector_env.step_wait() if self.background else vector_env.step(self.actions)
        self.obs, rewards, terminated, truncated, infos = outcome
        over = infos.setdefault("over", terminated | truncated)  # which games tell themselves
        self.returns += rewards
        self.lengths += 1
        self.steps += len(over)
        for i in np.flatnonzero(over):
            self.finished.append((float(self.returns[i]), int(self.lengths[i]), self.steps))
            self.returns[i], self.lengths[i] = 0.0, 0
        return self.obs, rewards, terminated, truncated & ~terminated, infos

    def finished_episodes(self) -> list[tuple[float, int, int]]:
        """Undiscounted return, length and last environment step of what ended since the last call,
        terminated or truncated, but for Atari's lost lives.
        """
        finished, self.finished = self.finished, []
        return finished

    def state_dict(self) -> dict:
        """Return what restores the environments, and the observations they show now."""
        state = {x: torch.tensor(getattr(self, x)) for x in ("obs", "returns", "lengths")}
        # between processes tensors would take a file and shared memory each
        histories = [(i, torch.from_numpy(x)) for i, x in self.vector_env.get_attr("history")]
        return state | {"histories": histories, "steps": self.steps}

    @torch.enable_grad()
    def load_state_dict(self, state: dict) -> None:
        """Bring back what state_dict saw; where that fails, `lost` [N], begin new episodes."""
        long = state["lengths"].numpy() > 10**6  # of these not all actions are known
        known = zip(long, state["histories"])
        histories = [(e, actions.numpy()[: 0 if x else None]) for x, (e, actions) in known]
        self.steps, self.finished = state["steps"], []
        self.vector_env.set_attr("history", histories)
        saved = state["obs"].numpy()
        found = zip(self.vector_env.get_attr("obs"), saved.copy(), strict=True)
        same = [x is not None and np.array_equal(np.array(x, y.dtype), y, True) for x, y in found]
        self.lost = ~np.array(same) | long
        if self.lost.any():
            print("seed and actions replayed do not restore the environment: new episodes")
            histories = [(e + 1, a[:0]) if x else None for x, (e, a) in zip(self.lost, histories)]
            self.vector_env.set_attr("history", histories)
        self.obs = np.stack(self.vector_env.get_attr("obs")).astype(saved.dtype)
        self.returns[:] = np.where(self.lost, 0, state["returns"])
        self.lengths[:] = np.where(self.lost, 0, state["lengths"])

    def close(self) -> None:
        """Close them."""
        self.vector_env.close()


@torch.enable_grad()
def check_spaces(args, action_type: type, hint: str, bounded=False, images=False) -> tuple:
    """Return the observation and action space, or exit with a one-line error."""
    if args.capture_video:
        prepare_video()
    try:
        env = make_env(args)
    except (gym.error.Error, ImportError, AttributeError, ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        others = "<frozen", *(os.path.dirname(x.__file__) + os.sep for x in (gym, importlib))
        own = not last.filename.startswith(others)  # a mistake in a user's code
        where = f" ({last.filename}, line {last.lineno})" * own
        where += "; games are spelled as ALE/Breakout-v5" * args.env_id.startswith("ALE/")
        fail(f"--env-id {args.env_id}: {str(error) or type(error).__name__:.300}{where}")
    if getattr(args, "sticky_actions", 0) and not atari.find_game(args.env_id):
        fail(f"--sticky-actions: {args.env_id} is not an ale-py game")
    obs_space, action_space = env.observation_space, env.action_space
    stacked = getattr(env, "padding_type", "") == "zero" and env.stack_size == 4  # as in make_env
    stacked = stacked and len(obs_space.shape or ()) == 3
    if not isinstance(action_space, action_type):
        kind = type(action_space).__name__.lower().replace("box", "continuous")
        known = isinstance(action_space, (gym.spaces.Box, gym.spaces.Discrete))
        fail(f"{args.env_id} has {kind} actions; {hint if known else 'no script takes them'}")
    if action_type is gym.spaces.Box and not np.issubdtype(action_space.dtype, np.floating):
        fail(f"{args.env_id} has actions of {action_space.dtype}, not of floating point")
    if bounded:
        with np.errstate(all="ignore"):  # infinities, and what float32 cannot tell from them
            width = np.subtract(action_space.high, action_space.low, dtype=np.float32)
        if not np.isfinite(width).all():
            fail(f"{args.env_id} has actions without bounds, which tanh cannot be scaled to")
    if not isinstance(obs_space, gym.spaces.Box) or not obs_space.shape:
        kind = "scalar" if isinstance(obs_space, gym.spaces.Box) else type(obs_space).__name__
        fail(f"{args.env_id} has {kind} observations; wrap it in FlattenObservation")
    if images and not (stacked or atari.find_game(args.env_id)):
        what = "does not give one frame [H, W] of bytes, 36 pixels or more each way"
        fail(f"{args.env_id} {what}; use ppo_discrete.py")
    if action_type is gym.spaces.Discrete and len(obs_space.shape) == 3:
        if getattr(args, "norm_obs", False):
            fail("--norm-obs: images are divided by 255 instead")
        if obs_space.dtype != np.uint8 or min(obs_space.shape[1:]) < 36:
            what = "images must be of bytes, [C, H, W], at least 36 pixels each way"
            given = f"{obs_space.dtype} {list(obs_space.shape)}"
            advice = "move channels to the front, or wrap it in FlattenObservation"
            fail(f"{args.env_id}: {what}, not {given}; {advice}")
    obs = np.asarray(env.reset(seed=0)[0])
    env.close()
    if obs.shape != obs_space.shape or not np.can_cast(obs.dtype, obs_space.dtype, "same_kind"):
        what = f"observations of {obs.dtype} {list(obs.shape)}; its space says {obs_space.dtype}"
        fail(f"{args.env_id} gives {what} {list(obs_space.shape)}")
    if args.capture_video or args.render:
        about = f"{args.env_id} cannot be drawn here"
        if hasattr(env.unwrapped, "mujoco_renderer") and "DISPLAY" not in os.environ:
            about += " (apt install libosmesa6)" * args.capture_video
        with failing(about, Exception):  # now, not after the training; each renderer has its own
            env = make_env(args, "human" if args.render else "rgb_array")
            env.reset(seed=0)
            frame = env.render()
            if not (args.render or (env.render_mode and isinstance(frame, (np.ndarray, list)))):
                raise TypeError("it keeps no render_mode, or render() gives no array")
            env.close()
    return obs_space, action_space


def prepare_video() -> None:
    """Choose a MuJoCo renderer that works without a display, if there is one."""
    if "MUJOCO_GL" in os.environ or "DISPLAY" in os.environ:
        return
    for renderer in ("egl", "osmesa"):  # in a process of its own, as a failing one can take it down
        probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        environment = os.environ | {"MUJOCO_GL": renderer}
        if subprocess.run(probe, env=environment, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = renderer
            return


@torch.enable_grad()
@kept_generators()
def play(act: Callable, args, run_dir: Path, first: int = 0) -> tuple[list[float], list[int]]:
    """Play --eval-episodes episodes, episode i seeded from (seed, first + i): returns, lengths.

    An episode that neither terminates nor is truncated is cut off after 108,000 steps.
    """
    filming = args.capture_video and not args.render
    if filming:
        prepare_video()
    seed_process(stream_seed(args.seed, "eval", first))  # making an env may draw numbers, too
    env = make_env(args, "human" if args.render else "rgb_array" if args.capture_video else None)
    if filming:
        videos = run_dir / "videos"
        taken = (re.match(r"evaluation-(\d+)-", x.name) for x in videos.glob("*.mp4"))
        name = f"evaluation-{max((int(x[1]) + 1 for x in taken if x), default=0)}"
        warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # not with that name
        with failing("--capture-video", OSError):
            env = gym.wrappers.RecordVideo(env, str(videos), lambda i: i == 0, name_prefix=name)
    returns, lengths = [0.0] * args.eval_episodes, [0] * args.eval_episodes
    epsilon, precision = getattr(args, "eval_e", 0.0), torch.get_float32_matmul_precision()
    with ExitStack() as on_exit:
        on_exit.callback(env.close)
        on_exit.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")  # as fast on one row, the same everywhere
        for i in range(args.eval_episodes):
            stream = args.seed, "eval", first + i
            _seed_spaces(env, stream_seed(*stream, 0))
            seed_process(stream_seed(*stream))
            obs, _ = env.reset(seed=stream_seed(*stream))
            rng = np.random.default_rng(stream_seed(*stream, 1))
            terminated = truncated = False
            while not (terminated or truncated or lengths[i] == 108_000):
                action = env.action_space.sample() if rng.random() < epsilon else act(obs)
                obs, reward, terminated, truncated, _ = env.step(action)
                returns[i] += _number(reward)
                lengths[i] += 1
                if filming and lengths[i] == 3000 and env.recording:  # into memory
                    env.stop_recording()
    return returns, lengths
