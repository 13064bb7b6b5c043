"""Small environments whose observations are frames, registered the way a user's own module would."""

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """A block falls through six cells, and a paddle below must be where it lands: reward 1 or -1.

    Actions left, stay, right; random ones end with -0.6 or so, the best always with 1.
    """

    def __init__(self, pixels=84, start=0):
        self.cell = pixels // 6
        self.observation_space = gym.spaces.Box(0, 255, (pixels, pixels), np.uint8)
        self.action_space = gym.spaces.Discrete(3, start=start)

    def _obs(self):
        frame = np.zeros((6, 6), np.uint8)
        frame[5, self.paddle] = 255
        frame[self.row, self.column] = 255
        return frame.repeat(self.cell, 0).repeat(self.cell, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column = 0, int(self.np_random.integers(6))
        self.paddle = int(self.np_random.integers(6))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.row += 1
        self.paddle = min(max(self.paddle + int(action - self.action_space.start) - 1, 0), 5)
        over = self.row == 5
        reward = (1.0 if self.paddle == self.column else -1.0) if over else 0.0
        return self._obs(), reward, over, False, {}


class Clock(gym.Env):
    """Pixels that say episode and time, in one array forever; rewards of all signs; ends either way,
    now and then both.
    """

    observation_space = gym.spaces.Box(0, 255, (36, 36), np.uint8)
    action_space = gym.spaces.Discrete(2)
    episode = 0

    def __init__(self):
        self.frame = np.zeros((36, 36), np.uint8)

    def _obs(self):
        self.frame[18:], self.frame[:18] = 1 + self.episode % 255, self.t
        return self.frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        terminated, truncated = self.np_random.random(2) < (0.1, 0.15)
        return self._obs(), float(self.t % 5 - 2), bool(terminated), bool(truncated), {}


class Constant(gym.Env):
    """Reward 1 and a grey frame at every step; after `length` steps it terminates or is truncated."""

    observation_space = gym.spaces.Box(0, 255, (36, 36), np.uint8)
    action_space = gym.spaces.Discrete(2)
    frame = np.full((36, 36), 200, np.uint8)

    def __init__(self, length, terminates):
        self.length, self.terminates = length, terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.frame, {}

    def step(self, action):
        self.t += 1
        over = self.t == self.length
        return self.frame, 1.0, over and self.terminates, over and not self.terminates, {}


class Unrepeatable(Clock):
    """Draws from a generator that nobody seeded: a resumed run cannot find its episodes again."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.t = int(np.random.default_rng().integers(200))
        return self._obs(), info


class Noise(gym.Env):
    """Frames of any shape, without end."""

    def __init__(self, shape, dtype=np.uint8, continuous=False):
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)
        self.action_space = gym.spaces.Box(-1, 1, (2,)) if continuous else gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("Catch-v0", Catch)
gym.register("SmallCatch-v0", Catch, kwargs={"pixels": 36, "start": -1})
gym.register("Clock-v0", Clock)
gym.register("Constant-terminated-v0", Constant, kwargs={"length": 3, "terminates": True})
gym.register("Constant-truncated-v0", Constant, kwargs={"length": 6, "terminates": False})
gym.register("Unrepeatable-v0", Unrepeatable)
gym.register("Colours-v0", Noise, kwargs={"shape": (3, 84, 84)})
gym.register("ColoursLast-v0", Noise, kwargs={"shape": (84, 84, 3)})
FILM = {"shape": (3, 8, 8), "dtype": np.float32, "continuous": True}
gym.register("Film-v0", Noise, kwargs=FILM)
gym.register("Tiny-v0", Noise, kwargs={"shape": (35, 84)})
gym.register("Low-v0", Noise, kwargs={"shape": (3, 35, 84)})
gym.register("Floats-v0", Noise, kwargs={"shape": (84, 84), "dtype": np.float32})


def stacked(**_):
    """Frames stacked by the user, as Gymnasium does by default: with the first one repeated."""
    return gym.wrappers.FrameStackObservation(Catch(pixels=36, start=-1), 4)


gym.register("Stacked-v0", stacked, order_enforce=False, disable_env_checker=True)


def stacked_vectors(**_):
    """Stacks [4, 8] that are no frames."""
    return gym.wrappers.FrameStackObservation(Noise((8,)), 4, padding_type="zero")


gym.register("StackedVectors-v0", stacked_vectors, order_enforce=False, disable_env_checker=True)
