"""Environments, seeding and checkpoints."""

import numpy as np
import pytest
import torch
from conftest import assert_same

from common import envs, runs
from common.checkpoint import (
    CheckpointError,
    from_plain,
    load_checkpoint,
    save_checkpoint,
    to_plain,
)
from common.seeding import STREAMS, env_seeds, stream_seed
from common.tensors import flatten_parameters

MUJOCO = [
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
]
CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]


@pytest.mark.parametrize(
    "env_id, vectorization",
    [
        *((env_id, "sync") for env_id in [*MUJOCO, *CLASSIC]),
        ("toy_envs:Shaped-v0", "sync"),
        ("toy_envs:Pair-v0", "sync"),
        ("Hopper-v5", "async"),
    ],
)
def test_an_environment_goes_on_exactly_from_its_snapshot(env_id, vectorization, tmp_path):
    """Observations, rewards and ends, through resets, in environments made anew."""

    def make():
        vector_env = envs.make_vector_env(env_id, 2, vectorization)
        vector_env.reset(seed=env_seeds(1, 2))
        vector_env.action_space.seed(1)
        return vector_env

    first = make()
    actions = [first.action_space.sample() for _ in range(300)]
    for action in actions[:47]:
        obs = np.copy(first.step(action)[0])
    save_checkpoint(tmp_path / "c", envs.save_envs(first, envs.EpisodeStatistics(2), obs))
    expected = [[np.copy(x) for x in first.step(action)[:4]] for action in actions[47:]]
    second = make()
    for action in actions[:5]:  # elsewhere by now
        second.step(action)
    pending = np.zeros_like(obs)
    assert not envs.load_envs(
        second, envs.EpisodeStatistics(2), pending, load_checkpoint(tmp_path / "c")
    ).any()
    np.testing.assert_array_equal(pending, obs)
    for action, want in zip(actions[47:], expected):
        for got, value in zip(second.step(action)[:4], want):
            np.testing.assert_array_equal(got, value)
    first.close()
    second.close()


def test_vector_environments_reset_in_the_step_that_ends_an_episode():
    """No false transition between episodes, and the real last observation at hand."""
    for vectorization in ("sync", "async"):
        vector_env = envs.make_vector_env("toy_envs:Counter-truncated-v0", 2, vectorization)
        obs, _ = vector_env.reset(seed=[1, 2])
        seen = [obs.copy()]
        for t in range(1, 11):
            obs, _, _, truncated, infos = vector_env.step(vector_env.action_space.sample())
            seen.append(obs.copy())
            assert truncated.tolist() == [t % 5 == 0] * 2
            assert ("final_obs" in infos) == (t % 5 == 0)
            if t % 5 == 0:
                assert [x.tolist() for x in infos["final_obs"]] == [[5.0], [5.0]]
        assert [int(x[0, 0]) for x in seen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
        vector_env.close()


def test_episode_statistics_count_what_terminates_and_what_is_truncated():
    statistics, rng = envs.EpisodeStatistics(3), np.random.default_rng(0)
    rewards, ends = rng.normal(size=(100, 3)), rng.random((100, 3)) < 0.1
    got = statistics.update(rewards[:33], ends[:33])
    got += [(t + 33, *rest) for t, *rest in statistics.update(rewards[33:], ends[33:])]
    expected = []
    for n in range(3):
        begin = 0
        for t in np.flatnonzero(ends[:, n]):
            expected.append((t, n, rewards[begin : t + 1, n].sum(), t + 1 - begin))
            begin = t + 1
    expected = [
        (t, pytest.approx(total), length)
        for t, n, total, length in sorted(expected, key=lambda x: x[:2])
    ]
    assert got == expected and len(got) == ends.sum()


def test_streams_of_neighbouring_seeds_are_disjoint():
    seeds = [
        stream_seed(seed, name, *i)
        for seed in range(20)
        for name in STREAMS
        for i in [(), *((j,) for j in range(20))]
    ]
    assert len(set(seeds)) == len(seeds)
    assert not set(env_seeds(1, 8)) & set(env_seeds(2, 8))
    assert env_seeds(1, 4) == env_seeds(1, 8)[:4]


def test_plain_data_comes_back_with_its_types():
    rng = np.random.default_rng(3)
    rng.normal(size=3)
    state = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": np.float32(0.1),
        "c": (1, [2.5, None, "x", b"y"]),
        "d": {"e": True, 3: np.bool_(False)},
        "f": torch.ones(2),
        "g": ("ndarray", 1),
        "h": np.array(2.0),
    }
    back = from_plain(to_plain(state))
    assert_same(back, state)
    assert type(back["b"]) is np.float32 and back["h"].shape == ()
    assert from_plain(to_plain(rng)).normal() == rng.normal()
    for bad in (object(), {1, 2}, iter([])):
        with pytest.raises(TypeError):
            to_plain({"x": [bad]})


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"x": torch.zeros(1000)})
    whole = path.read_bytes()
    assert len(load_checkpoint(path)["x"]) == 1000 and [p.name for p in tmp_path.iterdir()] == [
        "checkpoint.pt"
    ]

    def refused(why):
        with pytest.raises(CheckpointError, match=why) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    for content, why in (
        (b"", "empty"),
        (whole[: len(whole) // 2], "damaged"),
        (b"GIF89a" * 99, "damaged"),
    ):
        path.write_bytes(content)
        refused(why)
    torch.save({"weights": torch.zeros(3)}, path)
    refused("not a checkpoint of these scripts")
    torch.save({"format": "single-file-rl checkpoint", "version": 99, "state": {}}, path)
    refused("version 99")
    torch.save(Evil(), path)
    refused("damaged or not a checkpoint")
    assert not (tmp_path / "pwned").exists()


def test_parameters_are_views_of_one_vector():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = [parameter.clone() for parameter in module.parameters()]
    flat = flatten_parameters(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    flat.mul_(2)
    assert all(torch.equal(2 * a, b) for a, b in zip(before, module.parameters()))
    module.load_state_dict({name: torch.ones_like(x) for name, x in module.state_dict().items()})
    assert torch.equal(flat, torch.ones(26))


def test_due_is_a_pure_function_of_the_step():
    assert [runs.due(100, step - 64, step) for step in range(64, 64 * 7, 64)] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]
    assert not runs.due(0, 0, 10**9)
