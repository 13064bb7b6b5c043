"""Stable-Baselines3's PPO with the settings of ppo_continuous.py; prints `step seconds`."""

import sys
import time

import torch

ENV_ID, NUM_ENVS, NUM_STEPS, TOTAL, THREADS = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(THREADS)

from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402


class Clock(BaseCallback):
    """Says when each rollout begins."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        print(self.num_timesteps, time.time(), flush=True)


if __name__ == "__main__":
    model = PPO(
        "MlpPolicy",
        VecNormalize(make_vec_env(ENV_ID, NUM_ENVS, seed=1)),
        learning_rate=lambda left: 3e-4 * left,
        n_steps=NUM_STEPS,
        batch_size=NUM_STEPS * NUM_ENVS // 32,
        n_epochs=10,
        clip_range_vf=0.2,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
        device="cpu",
        seed=1,
    )
    model.learn(TOTAL, callback=Clock())
    print(model.num_timesteps, time.time(), flush=True)
