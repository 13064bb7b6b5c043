"""TorchRL's PPO with its tutorial's settings, given as JSON; prints `step seconds` as it goes."""

import json
import os
import sys
import time

import torch
import torch.nn as nn
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import Compose, DoubleToFloat, ObservationNorm, StepCounter, TransformedEnv
from torchrl.envs.libs.gym import GymEnv
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

SETTING = json.loads(sys.argv[1])
MINIBATCH_SIZE, EPOCHS, LEARNING_RATE, MAX_GRAD_NORM = 64, 10, 3e-4, 1.0
torch.set_num_threads(SETTING["threads"])
sys.path.append(os.getcwd())  # where a user's environments may be
torch.manual_seed(1)


def network(in_size: int, out_size: int) -> nn.Sequential:
    """Three tanh layers of 256."""
    sizes = in_size, 256, 256, 256
    layers = [f for a, b in zip(sizes, sizes[1:]) for f in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(256, out_size))


def main() -> None:
    """Train, and print when each batch of frames begins."""
    frames, total = SETTING["num_steps"] * SETTING["num_envs"], SETTING["total_timesteps"]
    normalise = ObservationNorm(in_keys=["observation"])
    transforms = Compose(normalise, DoubleToFloat(), StepCounter())
    env = TransformedEnv(GymEnv(SETTING["env_id"]), transforms)
    normalise.init_stats(num_iter=1000, reduce_dim=0, cat_dim=0)
    (obs_size,), (action_size,) = env.observation_spec["observation"].shape, env.action_spec.shape
    parameters = nn.Sequential(network(obs_size, 2 * action_size), NormalParamExtractor())
    space = env.action_spec.space
    actor = ProbabilisticActor(
        TensorDictModule(parameters, in_keys=["observation"], out_keys=["loc", "scale"]),
        spec=env.action_spec,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": space.low, "high": space.high},
        return_log_prob=True,
    )
    critic = ValueOperator(network(obs_size, 1), in_keys=["observation"])
    collector = Collector(
        env, actor, frames_per_batch=frames, total_frames=total, split_trajs=False
    )
    sampler, storage = SamplerWithoutReplacement(), LazyTensorStorage(frames)
    buffer = ReplayBuffer(storage=storage, sampler=sampler)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss = ClipPPOLoss(
        actor, critic, entropy_coeff=1e-4, critic_coeff=1.0, loss_critic_type="smooth_l1"
    )
    optimizer = torch.optim.Adam(loss.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total // frames)
    print(0, time.time(), flush=True)
    for i, data in enumerate(collector):
        for _ in range(EPOCHS):
            advantage(data)
            buffer.extend(data.reshape(-1))
            for _ in range(frames // MINIBATCH_SIZE):
                losses = loss(buffer.sample(MINIBATCH_SIZE))
                sum(losses[f"loss_{x}"] for x in ("objective", "critic", "entropy")).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        print((i + 1) * frames, time.time(), flush=True)
    collector.shutdown()


if __name__ == "__main__":
    main()
