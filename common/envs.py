"""Environments: making them, checking their spaces, counting their episodes, saving their state."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from common.checkpoint import from_plain, to_plain
from common.runs import fail
from common.seeding import stream_seed

CONSTANTS = (gym.Space, EnvSpec, FunctionType, MethodType, BuiltinFunctionType, ModuleType, type)


def make_env(env_id: str, **kwargs) -> gym.Env:
    """Make one environment; `my_module:MyEnv-v0` imports my_module, from where you stand too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return gym.make(env_id, disable_env_checker=True, **kwargs)


def _make_training_env(env_id: str, vectorization: str) -> gym.Env:
    if vectorization == "async":  # Ctrl-C reaches workers too, but stopping is for the main process
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Snapshot(make_env(env_id))


def make_vector_env(env_id: str, num_envs: int, vectorization: str) -> VectorEnv:
    """Make environments that step together and reset in the step that ends an episode (SAME_STEP).

    The real last observation is then in infos["final_obs"]. NEXT_STEP, Gymnasium's default, puts a
    false transition between episodes. The next step overwrites the observations: copy them.
    """
    vector_class = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[vectorization]
    make = partial(_make_training_env, env_id, vectorization)
    return vector_class([make] * num_envs, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)


def make_eval_env(args, run_dir: Path) -> gym.Env:
    """Make the environment of an evaluation, in a window (--render) or filmed (--capture-video)."""
    if args.render:
        return make_env(args.env_id, render_mode="human")
    if not args.capture_video:
        return make_env(args.env_id)
    env, videos = make_env(args.env_id, render_mode="rgb_array"), run_dir / "videos"
    name = f"evaluation-{len(list(videos.glob('*.mp4')))}"
    first = {"episode_trigger": lambda i: i == 0}
    return gym.wrappers.RecordVideo(env, str(videos), name_prefix=name, **first)


def check_spaces(args, action_type: type, hint: str) -> tuple[gym.spaces.Box, gym.Space]:
    """Return the observation and action space, or end with one line if they do not fit."""
    if args.capture_video:
        prepare_video()
    try:
        env = make_env(args.env_id)
    except (gym.error.Error, ImportError, AttributeError, ValueError, TypeError) as error:
        fail(f"--env-id {args.env_id}: {' '.join(str(error).split())}")
    obs_space, action_space = env.observation_space, env.action_space
    env.close()
    if not isinstance(action_space, action_type):
        kind = {"Box": "continuous"}.get(
            type(action_space).__name__, type(action_space).__name__.lower()
        )
        fail(f"{args.env_id} has {kind} actions; {hint}")
    if not isinstance(obs_space, gym.spaces.Box):
        kind = type(obs_space).__name__
        fail(f"{args.env_id} has {kind} observations, not a Box; wrap it in FlattenObservation")
    return obs_space, action_space


def prepare_video() -> None:
    """Choose a MuJoCo renderer that works here, without a display too, or say what to install."""
    try:
        import moviepy  # noqa: F401
    except ImportError:
        fail("--capture-video needs moviepy: pip install moviepy")
    if "MUJOCO_GL" in os.environ or "DISPLAY" in os.environ:
        return
    for renderer in ("egl", "osmesa"):  # in a process of its own, as a failing one can take it down
        probe = "import mujoco; mujoco.GLContext(8, 8).make_current()"
        environment = os.environ | {"MUJOCO_GL": renderer}
        if (
            subprocess.run(
                [sys.executable, "-c", probe], env=environment, capture_output=True
            ).returncode
            == 0
        ):
            os.environ["MUJOCO_GL"] = renderer
            return
    fail("--capture-video needs a display, a GPU, or a renderer: apt install libosmesa6")


class Snapshot(gym.Wrapper):
    """Gives an environment the attribute `snapshot`: all that decides its future, or None.

    It exists for MuJoCo, for environments with the pair `get_state()` and `set_state(state)`, and
    for those whose attributes are plain data (numbers, arrays, generators), as in classic control.
    """

    @property
    def snapshot(self) -> list[dict] | None:
        """State of every wrapper and of the environment itself, from the outside in."""
        try:
            return [_save_layer(layer) for layer in _layers(self.env)]
        except TypeError:
            return None

    @snapshot.setter
    def snapshot(self, states: list[dict] | None) -> None:
        for layer, state in zip(_layers(self.env), states or []):  # None leaves it as it is
            _load_layer(layer, state)


def _layers(env: gym.Env) -> list[gym.Env]:
    return [env, *_layers(env.env)] if isinstance(env, gym.Wrapper) else [env]


def _save_layer(env: gym.Env) -> dict:
    attributes, state = dict(vars(env)), {}
    if isinstance(env, gym.Wrapper):
        del attributes["env"]
    elif hasattr(env, "mujoco_renderer"):  # has a set_state too, but a different one
        attributes = {
            k: v for k, v in attributes.items() if k not in ("model", "data", "mujoco_renderer")
        }
        state["mujoco"] = _save_mujoco(env)
    elif hasattr(env, "get_state") and hasattr(env, "set_state"):
        attributes = {"_np_random": env.np_random}
        state["user"] = to_plain(env.get_state())
    plain = {k: to_plain(v) for k, v in attributes.items() if not isinstance(v, CONSTANTS)}
    return state | {"attributes": plain}


def _load_layer(env: gym.Env, state: dict) -> None:
    vars(env).update(from_plain(state["attributes"]))
    if "mujoco" in state:
        _load_mujoco(env, from_plain(state["mujoco"]))
    if "user" in state:
        env.set_state(from_plain(state["user"]))


def _save_mujoco(env: gym.Env) -> dict:
    import mujoco

    physics = np.empty(mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(env.model, env.data, physics, mujoco.mjtState.mjSTATE_INTEGRATION)
    # observations and rewards read arrays that lag behind the physics: recomputing is not enough
    arrays = {name: getattr(env.data, name) for name in dir(env.data) if name[0] != "_"}
    return to_plain(
        {"physics": physics} | {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}
    )


def _load_mujoco(env: gym.Env, state: dict) -> None:
    import mujoco

    integration = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(env.model, env.data, state.pop("physics"), integration)
    mujoco.mj_forward(env.model, env.data)
    for name, array in state.items():
        if (
            getattr(env.data, name).shape == array.shape
        ):  # but for those as long as the list of contacts
            getattr(env.data, name)[...] = array


class EpisodeStatistics:
    """Undiscounted return and length of every episode that ends, terminated or truncated."""

    def __init__(self, num_envs: int):
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)

    def update(self, rewards: np.ndarray, ends: np.ndarray) -> list[tuple[int, float, int]]:
        """Take rewards and ends [T, N]; return (t, return, length) of the episodes that ended."""
        finished = []
        for t in range(len(rewards)):
            self.returns += rewards[t]
            self.lengths += 1
            for i in np.flatnonzero(ends[t]):
                finished.append((t, float(self.returns[i]), int(self.lengths[i])))
                self.returns[i], self.lengths[i] = 0.0, 0
        return finished


def save_envs(vector_env: VectorEnv, episodes: EpisodeStatistics, next_obs: np.ndarray) -> dict:
    """Return the state of environments and episodes, and the observations they wait with."""
    state = {"snapshots": list(vector_env.get_attr("snapshot")), "next_obs": next_obs}
    return state | {"returns": episodes.returns, "lengths": episodes.lengths}


def load_envs(
    vector_env: VectorEnv, episodes: EpisodeStatistics, next_obs, state: dict
) -> np.ndarray:
    """Put back what save_envs returned, also into `next_obs`; return which episodes were lost."""
    vector_env.set_attr("snapshot", state["snapshots"])
    lost = np.array([snapshot is None for snapshot in state["snapshots"]])
    if lost.any():
        print("the environment cannot be saved (no get_state and set_state): new episodes begin")
    for target, saved in (
        (next_obs, state["next_obs"]),
        (episodes.returns, state["returns"]),
        (episodes.lengths, state["lengths"]),
    ):
        target[~lost] = saved[~lost]
    return lost


def play(act: Callable, args, run_dir: Path) -> tuple[list[float], list[int]]:
    """Play --eval-episodes episodes, episode i seeded from (seed, i): returns, lengths."""
    env = make_eval_env(args, run_dir)
    returns, lengths = [0.0] * args.eval_episodes, [0] * args.eval_episodes
    for i in range(args.eval_episodes):
        obs, _ = env.reset(seed=stream_seed(args.seed, "eval", i))
        terminated = truncated = False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            returns[i] += float(reward)
            lengths[i] += 1
    env.close()
    return returns, lengths
