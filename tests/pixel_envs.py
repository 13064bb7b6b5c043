"""Catch: a block falls through 84 x 84 pixels, and a paddle below must be where it lands."""

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """Six cells wide and high; actions left, stay, right; reward 1 or -1 where the block lands."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def _obs(self):
        frame = np.zeros((6, 6), np.uint8)
        frame[5, self.paddle] = 255
        frame[self.row, self.column] = 255
        return frame.repeat(14, 0).repeat(14, 1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column = 0, int(self.np_random.integers(6))
        self.paddle = int(self.np_random.integers(6))
        return self._obs(), {}

    def step(self, action):
        self.row += 1
        self.paddle = min(max(self.paddle + int(action) - 1, 0), 5)
        over = self.row == 5
        reward = (1.0 if self.paddle == self.column else -1.0) if over else 0.0
        return self._obs(), reward, over, False, {}


gym.register("Catch-v0", Catch)
