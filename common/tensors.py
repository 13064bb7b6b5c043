"""Running statistics, networks whose parameters are one vector, and Adam on it."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

# Gauss-Hermite quadrature: the mean of f(z) over a standard normal z is f(NODES) @ WEIGHTS
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
NODES, WEIGHTS = NODES.tolist(), (WEIGHTS / WEIGHTS.sum()).tolist()


class RunningStatistics(nn.Module):
    """Mean and variance of every sample ever passed to `update`; all environments share them."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(shape))  # mean and 1 / std as float32
        self.register_buffer("scale", torch.ones(shape))

    def update(self, x: torch.Tensor) -> None:
        """Take samples [B, *shape]: the pairwise algorithm of Chan, Golub and LeVeque 1979."""
        x = x.double()
        count, delta = self.count + len(x), x.mean(0) - self.mean
        between = delta**2 * self.count * len(x) / count
        self.var.copy_((self.var * self.count + x.var(0, correction=0) * len(x) + between) / count)
        self.mean += delta * len(x) / count
        self.count.copy_(count)
        self.shift.copy_(self.mean)
        self.scale.copy_((self.var + 1e-8).rsqrt())


def discounted_returns(rewards, ends, gamma: float, carry: np.ndarray) -> np.ndarray:
    """Sums of past rewards R_t = gamma R_(t-1) + r_t [T, N], reset at ends; updates `carry` [N]."""
    returns = np.zeros_like(rewards)
    for t in range(len(rewards)):
        returns[t] = gamma * carry + rewards[t]
        carry[:] = returns[t] * ~ends[t]
    return returns


class ReturnStatistics(RunningStatistics):
    """Statistics of discounted_returns: rewards are divided by their standard deviation."""

    def __init__(self, num_envs: int):
        super().__init__(())
        self.register_buffer("carry", torch.zeros(num_envs, dtype=torch.float64))

    def update_from_rewards(self, rewards: np.ndarray, ends: np.ndarray, gamma: float) -> None:
        """Take the rewards of a rollout, and where episodes ended, either way [T, N]."""
        carry = self.carry.cpu().numpy()
        returns = discounted_returns(rewards, ends, gamma, carry)
        self.carry.copy_(torch.from_numpy(carry))
        self.update(torch.from_numpy(returns).flatten().to(self.mean.device))


def flatten_parameters(module: nn.Module) -> torch.Tensor:
    """Return a vector [P] with the parameters of `module`, which become views of it.

    Differentiate with respect to it; the parameters themselves no longer require gradients. They
    follow each other as in named_parameters(), a module's own before its children's. ValueError if
    one is frozen (it would be trained) or already a view of another vector (which would lose it).
    """
    if frozen := [name for name, x in module.named_parameters() if not x.requires_grad]:
        raise ValueError(f"frozen, or part of another vector already: {', '.join(frozen)}")
    flat = nn.utils.parameters_to_vector(module.requires_grad_(False).parameters())
    nn.utils.vector_to_parameters(flat, module.parameters())
    return flat


def functional(module: nn.Module, bf16: bool) -> Callable:
    """Return `module` as a function of a vector of its parameters [P] and of its inputs.

    With `bf16` it multiplies in bfloat16 (mixed precision), except in the last layer of a Network.
    Floating-point outputs are float32. Weights get gradients only through this function: a plain
    `module(x)` passes gradients on to x, but trains nothing.
    """

    def call(parameters: torch.Tensor, *inputs: torch.Tensor):
        named = dict(module.named_parameters())
        chunks = parameters.split([parameter.numel() for parameter in named.values()])
        # shapes alone: parameters would be inputs of a compiled graph, overlapping the vector
        views = {name: chunk.view(named[name].shape) for name, chunk in zip(named, chunks)}
        if not bf16:
            return functional_call(module, views, inputs)
        with torch.autocast(parameters.device.type, torch.bfloat16):
            out = functional_call(module, views, inputs)
        return tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, out)

    return call


class Network(nn.Sequential):
    """Layers, the last of which computes in float32 even where the others use bfloat16.

    Its outputs, rounded to 8 bits, would hide small errors in large values.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs of the first layer to outputs of the last."""
        *hidden, last = self
        for layer in hidden:
            x = layer(x)
        if not torch.is_autocast_enabled(x.device.type):
            return last(x)
        with torch.autocast(x.device.type, enabled=False):
            return last(x.float())


class FlatAdam(nn.Module):
    """Adam (Kingma & Ba 2015, algorithm 1) on one vector of parameters [P], to be compiled."""

    def __init__(self, parameters: torch.Tensor, eps: float):
        super().__init__()
        self.eps = eps
        for beta in ("beta1_power", "beta2_power"):  # beta ** steps
            self.register_buffer(beta, parameters.new_ones((), dtype=torch.float64))
        self.register_buffer("exp_avg", torch.zeros_like(parameters))
        self.register_buffer("exp_avg_sq", torch.zeros_like(parameters))

    def step(
        self, parameters: torch.Tensor, gradient: torch.Tensor, lr: float | torch.Tensor
    ) -> None:
        """Step against `gradient` [P], in place; an `lr` that changes must be a tensor."""
        self.beta1_power *= 0.9
        self.beta2_power *= 0.999
        self.exp_avg.lerp_(gradient, 1 - 0.9)
        self.exp_avg_sq.lerp_(gradient**2, 1 - 0.999)
        bias1, bias2 = (1 - self.beta1_power).float(), (1 - self.beta2_power).float()
        parameters -= lr / bias1 * self.exp_avg / ((self.exp_avg_sq / bias2).sqrt() + self.eps)


def bounds(space) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of a Box as float32, rounded inwards where that is less precise."""
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    low = np.where(low < space.low, np.nextafter(low, high), low)
    high = np.where(high > space.high, np.nextafter(high, low), high)  # never below `low`
    return torch.as_tensor(low), torch.as_tensor(high)
