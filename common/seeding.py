"""Random streams, spawned from (seed, name, index), so that neighbouring seeds share nothing."""

import random

import numpy as np
import torch

STREAMS = ("init", "env", "action", "minibatch", "replay", "eval", "python", "numpy")


def stream_seed(seed: int, name: str, *index: int) -> int:
    """Return the 64-bit seed of a stream, as `stream_seed(1, "env", 3)` of the fourth environment.

    `seed + i` would hand the second environment of seed 1 and the first of seed 2 the same numbers.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name), *index))
    return int(sequence.generate_state(1, np.uint64)[0])


def env_seeds(seed: int, num_envs: int) -> list[int]:
    """Return a seed for each of the training environments."""
    return [stream_seed(seed, "env", i) for i in range(num_envs)]


def torch_generators(seed: int, names: tuple, device: torch.device) -> dict[str, torch.Generator]:
    """Return a generator on `device` for each of the streams `names`."""
    return {name: torch.Generator(device).manual_seed(stream_seed(seed, name)) for name in names}


def seed_global(seed: int) -> None:
    """Seed the process-wide generators: initial weights use them, and some users' environments."""
    torch.manual_seed(stream_seed(seed, "init"))
    random.seed(stream_seed(seed, "python"))
    np.random.seed(stream_seed(seed, "numpy") % 2**32)


def get_rng_state(generators: dict[str, torch.Generator]) -> dict:
    """Return the states of the process-wide generators and of `generators`."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    return state | {name: generator.get_state() for name, generator in generators.items()}


def set_rng_state(state: dict, generators: dict[str, torch.Generator]) -> None:
    """Put back what get_rng_state returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for name, generator in generators.items():
        generator.set_state(state[name])
