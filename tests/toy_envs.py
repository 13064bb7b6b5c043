"""Small environments with known answers, registered the way a user's own module would."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete


class Counter(gym.Env):
    """Five steps from 0 over 1, 2, 3, 4 to 2, rewards 0, 0, 1, 1, 1; then it ends as `end` says.

    Observations are always the same array.
    """

    observation_space = Box(0.0, 4.0, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    last = 5

    def __init__(self, end="truncated", discrete=False):
        self.end, self.obs = end, np.zeros(1, np.float32)
        self.action_space = Discrete(3) if discrete else self.action_space

    def reset(self, *, seed=None, options=None):
        self.t, self.obs[:] = 0, 0
        return self.obs, {}

    def step(self, action):
        self.t += 1
        over = self.t == self.last
        terminated, truncated = over and self.end != "truncated", over and self.end != "terminated"
        self.obs[:] = 2 if over else self.t
        return self.obs, float(self.t > 2), terminated, truncated, {"t": self.t}


class Shaped(gym.Env):
    """Float64 observations and actions of two axes; asserts its unequal bounds."""

    observation_space = Box(-np.inf, np.inf, (2, 3), np.float64)
    action_space = Box(np.float32([[-2.0], [0.0]]), np.float32([[1.0], [0.5]]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=(2, 3))
        return self.position.copy(), {}

    def push(self, action):
        return action[:, 0]

    def step(self, action):
        assert self.action_space.contains(action), action
        self.position = 0.9 * self.position + 0.1 * self.np_random.normal(size=(2, 3))
        self.position[:, 0] += self.push(action)
        reward = -float(np.square(self.position).sum())
        terminated, truncated = self.np_random.random(2) < (0.03, 0.05)  # now and then both
        return self.position.copy(), reward, bool(terminated), bool(truncated), {}


class Buttons(Shaped):
    """The same with three actions, of which the first is -1, looked up as in Gymnasium's tutorial."""

    action_space = Discrete(3, start=-1)

    def push(self, action):
        return {-1: np.array([-0.5, 0.0]), 0: np.zeros(2), 1: np.array([0.5, 0.3])}[action]


class Broken(Shaped):
    """Returns NaN from step 700 of its life on, as a reward, in an observation, or in a first one,
    or infinities where it cuts an episode for them, and begins anew.
    """

    steps = 0

    def __init__(self, where="reward", discrete=False):
        self.where = where
        self.action_space = Discrete(2) if discrete else self.action_space

    def push(self, action):
        return 0.0

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs * np.nan if self.where == "reset" and self.steps >= 700 else obs, info

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = super().step(np.nan_to_num(action))
        if self.steps >= 700 and self.where == "last":
            return np.full_like(obs, np.inf), reward, False, True, {}
        if self.steps >= 700 and self.where != "reset":
            obs, reward = (obs, np.nan) if self.where == "reward" else (obs * np.nan, reward)
        return obs, reward, *rest


class Opaque(Shaped):
    """Nobody could save its attributes, nobody is to use its get_state and set_state, and actions
    are changed in place.
    """

    def __init__(self):
        self.handle = iter([])

    def get_state(self):
        raise NotImplementedError

    set_state = get_state

    def push(self, action):
        action *= 0.5
        return action[:, 0]


class Unseeded(Shaped):
    """Draws other numbers each time, in episodes whose seed is odd."""

    drawn = itertools.count()

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if seed % 2:
            self.np_random = np.random.default_rng(next(self.drawn))
        return obs, info


class Worn(gym.Env):
    """Shows how often it was reset, and how often it was stepped since."""

    observation_space, action_space, resets = Box(0.0, 100.0, (2,), np.float32), Discrete(2), 0

    def reset(self, *, seed=None, options=None):
        self.resets, self.t = self.resets + 1, 0
        return np.array([self.resets, 0], np.float32), {}

    def step(self, action):
        self.t += 1
        ended = bool(action) or self.t >= 5 - self.resets
        return np.array([self.resets, self.t], np.float32), 0.0, ended, False, {}


class Flags(gym.Env):
    """MultiBinary actions, which no script takes."""

    observation_space = Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.MultiBinary(2)


class Words(gym.Env):
    """Dict observations."""

    observation_space = gym.spaces.Dict({"a": Box(0.0, 1.0, (1,))})

    def __init__(self, discrete=False):
        self.action_space = Discrete(2) if discrete else Box(-1.0, 1.0, (1,))


class Pictures(gym.Env):
    """Images of floats."""

    observation_space = Box(0.0, 1.0, (3, 64, 64))
    action_space = Discrete(2)


class Scalar(Counter):
    """Observations that have no axis."""

    observation_space = Box(0.0, 1.0, ())


class Unbounded(Counter):
    """Actions without bounds."""

    action_space = Box(-np.inf, np.inf, (1,), np.float32)


class Steps(Counter):
    """Actions that are whole numbers, in a Box."""

    action_space = Box(0, 9, (2,), np.int64)


class Dial(Counter):
    """Actions that have no axis."""

    action_space = Box(-2.0, 1.0, ())

    def step(self, action):
        assert np.shape(action) == () and -2 <= action <= 1, action
        return super().step(action)


class Dice(Counter):
    """Draws from the generators of the process, and shows what it drew."""

    observation_space = Box(0.0, 1.0, (3,), np.float64)

    def __init__(self):
        super().__init__()
        self.made = np.random.random()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.drawn(), {}

    def step(self, action):
        return self.drawn(), *super().step(action)[1:]

    def drawn(self):
        first = (np.random.random() + self.made) / 2
        return np.array([first, random.random(), torch.rand(()).item()])


class Hazy(Counter):
    """Draws noise on its rewards from a generator of the process."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + np.random.normal(), *rest


class Listed(Counter):
    """Gives its observations in lists."""

    def reset(self, *, seed=None, options=None):
        obs, infos = super().reset(seed=seed)
        return obs.tolist(), infos

    def step(self, action):
        obs, *rest = super().step(action)
        return obs.tolist(), *rest


class Whim(Counter):
    """Shows an observation, then actions, that it draws itself, from spaces of its own."""

    def __init__(self):
        super().__init__()
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = Box(0.0, 4.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        shown = self.action_space.sample().astype(np.float64) / 3  # not of the space's precision
        return shown, *super().step(action)[1:]


class SharedWhim(Whim):
    """The same from spaces of the class."""

    action_space, observation_space = Box(-1.0, 1.0, (1,), np.float32), Counter.observation_space

    def __init__(self):
        Counter.__init__(self)


WHIM = Whim()


class ModuleWhim(Whim):
    """The same from spaces of the module."""

    def __init__(self):
        super().__init__()
        self.action_space, self.observation_space = WHIM.action_space, WHIM.observation_space


class Fixed(Whim):
    """Its spaces are the module's, and cannot be set."""

    action_space = property(lambda _: WHIM.action_space)
    observation_space = property(lambda _: WHIM.observation_space)

    def __init__(self):
        self.end, self.obs = "truncated", np.zeros(1, np.float32)


class HeldWhim(Whim):
    """The same, but another part of it draws from the space."""

    def __init__(self):
        super().__init__()
        self.held = self.action_space

    def step(self, action):
        return self.held.sample().astype(np.float64) / 3, *Counter.step(self, action)[1:]


class Open(Counter):
    """Counts how many are not closed."""

    alive = 0

    def __init__(self):
        super().__init__()
        Open.alive += 1

    def close(self):
        Open.alive -= 1


class Drawing(gym.Wrapper):
    """Shows, to begin with, an action that it draws from the space of the wrapper below."""

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed)
        return self.env.action_space.sample(), {}


class Curious(Counter):
    """Takes a gradient in every reset and step, as one that learns what is new would."""

    def reset(self, *, seed=None, options=None):
        self.wonder()
        return super().reset(seed=seed)

    def step(self, action):
        self.wonder()
        return super().step(action)

    def wonder(self):
        (torch.ones(1, requires_grad=True) * 2).backward()


class Threads(Counter):
    """Its observation is how many threads PyTorch has."""

    observation_space = Box(0.0, 100.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.full(1, torch.get_num_threads(), np.float32), {}

    def ignores(self, number):
        """Tell if programs that it starts would ignore a signal."""
        return signal.getsignal(number) == signal.SIG_IGN

    def end_a_fork(self):
        """Return how a process that it forks ends when it is told to."""
        if not (child := os.fork()):
            time.sleep(20)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Arrays(Counter):
    """Rewards are arrays of one number, as of a formula of the action."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


class Helped(Counter):
    """Has a process of its own, as a simulator is, which is to outlive Ctrl-C and no more."""

    def __init__(self):
        super().__init__()
        options = {"target": time.sleep, "args": (600,), "daemon": True}
        self.helper = multiprocessing.get_context("fork").Process(**options)
        self.helper.start()
        Path("helper").write_text(str(self.helper.pid))  # of the last that was made

    def step(self, action):
        assert self.helper.is_alive()
        return super().step(action)

    def close(self):
        self.helper.terminate()
        self.helper.join(20)
        assert self.helper.exitcode is not None


class Unlucky(Counter):
    """Cannot be made in the second of the processes."""

    def __init__(self):
        super().__init__()
        if multiprocessing.current_process().name.endswith("-1"):
            raise OSError("port in use")


class Mistaken(Counter):
    """Cannot be made."""

    def __init__(self):
        _ = None.size


for kind, discrete in (("", False), ("-discrete", True)):
    for end in ("truncated", "terminated", "both"):
        gym.register(f"Counter-{end}{kind}-v0", Counter, kwargs={"end": end, "discrete": discrete})
    for where in ("reward", "observation", "reset", "last"):
        gym.register(
            f"Broken-{where}{kind}-v0", Broken, kwargs={"where": where, "discrete": discrete}
        )
    gym.register(f"Words{kind}-v0", Words, kwargs={"discrete": discrete})
gym.register(
    "Wrapped-v0", lambda: Drawing(gym.wrappers.RescaleAction(Whim(), *np.float32([-2, 2])))
)
gym.register(
    "Layered-v0",
    lambda: gym.wrappers.RescaleAction(
        gym.make("Wrapped-v0", disable_env_checker=True), *np.float32([-1, 1])
    ),
)
gym.register("Needy-v0", lambda size: Counter())
for cls in (
    Shaped,
    Buttons,
    Opaque,
    Unseeded,
    Worn,
    Flags,
    Pictures,
    Scalar,
    Unbounded,
    Steps,
    Whim,
    SharedWhim,
    ModuleWhim,
    Fixed,
    HeldWhim,
    Open,
    Curious,
    Dial,
    Dice,
    Hazy,
    Listed,
    Threads,
    Arrays,
    Helped,
    Unlucky,
    Mistaken,
):
    gym.register(f"{cls.__name__}-v0", cls)
