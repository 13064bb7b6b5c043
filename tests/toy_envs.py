"""Small environments with known answers, registered the way a user's own module would."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Counter(gym.Env):
    """Reward 1 a step, the step index as observation; after five steps it ends as `end` says."""

    def __init__(self, end="truncated"):
        self.observation_space = Box(0.0, 5.0, (1,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.end = end
        self.t = 0

    def _obs(self):
        return np.array([self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        over = self.t == 5
        terminated, truncated = over and self.end != "truncated", over and self.end != "terminated"
        return self._obs(), 1.0, terminated, truncated, {}


class Shaped(gym.Env):
    """Float64 observations and actions of two axes; asserts its unequal bounds."""

    def __init__(self):
        self.observation_space = Box(-np.inf, np.inf, (2, 3), np.float64)
        low, high = np.array([[-2.0], [0.0]]), np.array([[1.0], [0.5]])
        self.action_space = Box(low.astype(np.float32), high.astype(np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=(2, 3))
        return self.position.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.position = 0.9 * self.position + 0.1 * self.np_random.normal(size=(2, 3))
        self.position[:, 0] += action[:, 0]
        reward = -float(np.square(self.position).sum())
        return self.position.copy(), reward, False, self.np_random.random() < 0.05, {}


class Broken(Shaped):
    """Returns NaN, as a reward or in an observation, from step 700 of its life on."""

    steps = 0

    def __init__(self, where="reward"):
        super().__init__()
        self.where = where

    def step(self, action):
        self.steps += 1
        obs, reward, *rest = super().step(np.nan_to_num(action))
        if self.steps >= 700:
            obs, reward = (obs, np.nan) if self.where == "reward" else (obs * np.nan, reward)
        return obs, reward, *rest


class Opaque(Shaped):
    """Cannot be saved: an attribute is not plain data, and there is no get_state."""

    def __init__(self):
        super().__init__()
        self.handle = iter([])


class Pair(Opaque):
    """The same, with the pair get_state and set_state."""

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Flags(gym.Env):
    """MultiBinary actions, which no script takes."""

    observation_space = Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.MultiBinary(2)


class Words(gym.Env):
    """Dict observations."""

    observation_space = gym.spaces.Dict({"a": Box(0.0, 1.0, (1,))})
    action_space = Box(-1.0, 1.0, (1,))


class Unbounded(Counter):
    """Actions without bounds."""

    def __init__(self):
        super().__init__()
        self.action_space = Box(-np.inf, np.inf, (1,), np.float32)


for end in ("truncated", "terminated", "both"):
    gym.register(f"Counter-{end}-v0", Counter, kwargs={"end": end})
for where in ("reward", "observation"):
    gym.register(f"Broken-{where}-v0", Broken, kwargs={"where": where})
for cls in (Shaped, Opaque, Pair, Flags, Words, Unbounded):
    gym.register(f"{cls.__name__}-v0", cls)
