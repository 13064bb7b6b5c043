"""A peer with a script's settings, given as JSON; prints `step seconds` as it goes.

It is Stable-Baselines3, or SBX, by the same authors on JAX.
"""

import importlib
import json
import math
import os
import re
import sys
import time

import torch

SETTING = json.loads(sys.argv[1])
# minibatches, epochs, learning rate, coefficient of the entropy
PPO_SETTINGS = {"ppo_continuous": (32, 10, 3e-4, 0.0), "ppo_discrete": (4, 4, 2.5e-4, 0.01)}
torch.set_num_threads(SETTING["threads"])
os.environ["JAX_PLATFORMS"] = SETTING["device"]
if SETTING["threads"] == 1:  # for JAX
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
sys.path.append(os.getcwd())  # where a user's environments may be

import ale_py  # noqa: E402, F401  registers the games
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.env_util import make_atari_env, make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize  # noqa: E402

peer = importlib.import_module(SETTING["peer"])


class Clock(BaseCallback):
    """Prints when each rollout begins, at most every 500 steps."""

    last = -500

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps - self.last >= 500:
            self.last = self.num_timesteps
            print(self.num_timesteps, time.time(), flush=True)


def make_model(script: str, env_id: str, num_envs: int, atari: bool, device: str):
    """Return the model that does what the script does with its defaults."""
    if atari:
        env_id = re.sub(
            r"(ALE/)?(\w+?)(NoFrameskip|Deterministic)?-v\d", r"\2NoFrameskip-v4", env_id
        )
        env = VecFrameStack(make_atari_env(env_id, num_envs, seed=1), 4)
    else:
        env = make_vec_env(env_id, num_envs, seed=1)
    common = {"policy": "CnnPolicy" if atari else "MlpPolicy", "device": device, "seed": 1}
    if script.startswith("ppo"):
        minibatches, epochs, rate, entropy = PPO_SETTINGS[script]
        samples, clip = SETTING["num_steps"] * num_envs, 0.1 if atari else 0.2
        common |= {"learning_rate": lambda left: rate * left, "n_steps": SETTING["num_steps"]}
        common |= {"batch_size": samples // minibatches, "n_epochs": epochs, "ent_coef": entropy}
        common |= {"clip_range": clip, "clip_range_vf": clip}
        if not atari:
            common["policy_kwargs"] = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
        return peer.PPO(env=VecNormalize(env) if script == "ppo_continuous" else env, **common)
    common |= {name: SETTING[name] for name in ("learning_starts", "buffer_size")}
    if script == "sac_continuous":  # an update for every step of an environment
        return peer.SAC(env=env, train_freq=1, gradient_steps=num_envs, **common)
    both = math.gcd(4, num_envs)  # an update for every four steps of an environment
    pace = {"train_freq": 4 // both, "gradient_steps": num_envs // both}
    pace |= {"target_update_interval": 1000, "exploration_final_eps": 0.01}
    return peer.DQN(env=env, **pace, **common)


if __name__ == "__main__":
    names = ("script", "env_id", "num_envs", "atari", "device")
    model = make_model(*(SETTING[name] for name in names))
    model.learn(SETTING["total_timesteps"], callback=Clock())
    print(model.num_timesteps, time.time(), flush=True)
