"""The suites: what `python -m benchmarks run` runs."""

from typing import NamedTuple


class Suite(NamedTuple):
    """Seeds 1 to `seeds` of every run: script, environment, flags; and the memory of one."""

    seeds: int
    runs: list[tuple[str, str, str]]
    gigabytes: float = 1.0


MUJOCO = ("HalfCheetah-v5", "Walker2d-v5", "Hopper-v5")
MORE_MUJOCO = ("InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Humanoid-v5", "Pusher-v5")
MORE_MUJOCO += ("Ant-v5", "Reacher-v5", "Swimmer-v5", "HumanoidStandup-v5")
CLASSIC = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0")
# LunarLander's settings in RL Baselines3 Zoo (where the value loss weighs twice as much)
LANDER = "--total-timesteps 1000000 --num-envs 16 --num-steps 1024 --gamma 0.999 --gae-lambda 0.98 "
LANDER += "--num-minibatches 256 --learning-rate 3e-4 --no-anneal-lr --no-clip-vloss"
ATARI = ("ALE/Pong-v5", "ALE/Breakout-v5", "ALE/BeamRider-v5")
# with its replay in the checkpoint, of 7 GB, DQN goes on exactly
EXACT = "--checkpoint-replay --checkpoint-every 1000000"

SUITES = {
    "ppo_continuous": Suite(5, [("ppo_continuous", x, "") for x in MUJOCO + MORE_MUJOCO]),
    "ppo_discrete": Suite(
        5,
        [
            *(("ppo_discrete", x, "") for x in CLASSIC),
            ("ppo_discrete", "LunarLander-v3", LANDER),
        ],
    ),
    "ppo_atari": Suite(3, [("ppo_discrete", x, "") for x in ATARI]),
    "dqn_atari": Suite(3, [("dqn_atari", x, EXACT) for x in ATARI], gigabytes=9.0),
    "sac_continuous": Suite(3, [("sac_continuous", x, "") for x in MUJOCO]),
    "smoke": Suite(
        2,
        [
            (
                "ppo_continuous",
                "Pendulum-v1",
                "--total-timesteps 20480 --num-envs 4 --num-steps 256 --gamma 0.9",
            ),
            ("ppo_discrete", "CartPole-v1", "--total-timesteps 20480"),
            (
                "sac_continuous",
                "InvertedPendulum-v5",
                "--total-timesteps 2000 --learning-starts 500 --log-every 250",
            ),
            (
                "dqn_atari",
                "ALE/Breakout-v5",
                "--total-timesteps 3000 --learning-starts 1500 --buffer-size 3000 "
                "--eval-episodes 1 --checkpoint-replay --checkpoint-every 1000",
            ),
        ],
    ),
}
