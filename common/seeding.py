"""Random streams, spawned from (seed, name, index), so that neighbouring seeds share nothing."""

import random
from contextlib import contextmanager

import numpy as np
import torch

# a stream's place here is part of its seed: add others at the end
STREAMS = ("init", "env", "action", "minibatch", "replay", "eval", "python", "numpy")


def stream_seed(seed: int, name: str, *index: int) -> int:
    """Return the seed of a stream, as `stream_seed(1, "action")`: 32 bits, as all libraries take.

    `seed + i` would hand the second environment of seed 1 and the first of seed 2 the same numbers.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS.index(name), *index))
    return int(sequence.generate_state(1)[0])


def seed_process(seed: int, *index: int) -> None:
    """Seed the process-wide generators on the CPU, which some users' environments draw from."""
    random.seed(stream_seed(seed, "python", *index))
    np.random.seed(stream_seed(seed, "numpy", *index))
    torch.default_generator.manual_seed(stream_seed(seed, "init", *index))


@contextmanager
def kept_generators():
    """Put the process-wide generators on the CPU back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Streams(dict):
    """A torch.Generator for each of some streams, by name, as in `rng["action"]`.

    The process-wide generators are seeded and saved with them: initial weights use them, and some
    users' environments.
    """

    def __init__(self, seed: int, names: tuple[str, ...], device: torch.device):
        for name in names:
            self[name] = torch.Generator(device).manual_seed(stream_seed(seed, name))
        self.device = device
        torch.manual_seed(stream_seed(seed, "init"))  # on CUDA, too
        seed_process(seed)

    def state_dict(self) -> dict:
        """Return all states, in tensors and plain Python."""
        kind, keys, *position = np.random.get_state()
        state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *position)}
        state["torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state | {name: generator.get_state() for name, generator in self.items()}

    def load_state_dict(self, state: dict) -> None:
        """Put back what state_dict returned."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        for name, generator in self.items():
            generator.set_state(state[name])
