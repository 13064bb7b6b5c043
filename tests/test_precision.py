"""--bf16: products in bfloat16, all else as ever."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import each_case, scalars

import dqn_atari
import ppo_continuous
import ppo_discrete
import sac_continuous
from common.tensors import Network, flatten_parameters, functional


def rounded(x: np.ndarray) -> np.ndarray:
    """To the nearest numbers with 8 bits, as float64; by NumPy."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


@torch.no_grad()
def test_hidden_layers_round_and_the_last_one_does_not():
    """Against the same network in float64, rounded where bfloat16 is."""
    torch.manual_seed(0)
    network, x = Network(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 3)), torch.randn(64, 24)
    w1, b1, w2, b2 = (p.detach().double().numpy().copy() for p in network.parameters())
    parameters = flatten_parameters(network)

    hidden = np.maximum(rounded(rounded(x.double().numpy()) @ rounded(w1).T + rounded(b1)), 0)
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)  # as CUDA's is
    try:
        got = functional(network, bf16=True)(parameters, x)
    finally:
        torch.set_autocast_dtype("cpu", before)
    assert got.dtype == torch.float32
    expected = hidden @ w2.T + b2
    # sums on the edge between two numbers may round to the other
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(got.numpy() - expected).mean() < 1e-5

    exact = functional(network, bf16=False)(parameters, x)
    assert torch.equal(exact, network(x))
    assert 1e-4 < (got - exact).abs().mean() < 1e-2


@torch.no_grad()
def test_gradients_of_the_last_layer_are_not_rounded():
    """Neither are errors: of a large value, a small one."""
    network = Network(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    parameters = flatten_parameters(network)
    parameters.copy_(torch.tensor([1.0, 0.0, 1000.0, 0.5]))
    error = functional(network, bf16=True)(parameters, torch.ones(1, 1)) - 1000.25
    assert error.item() == 0.25  # in bfloat16 1000.5 is 1000
    gradient = torch.func.grad(
        lambda p: functional(network, bf16=True)(p, torch.ones(1, 1)).sum() * (1 + 2**-20)
    )(parameters)
    assert gradient[3] == 1 + 2**-20


def test_every_network_of_the_scripts_is_one_whose_last_layer_does_not_round():
    box, buttons = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(3)
    for shape, script, action_space, parts in (
        ((5,), ppo_continuous, box, "actor critic"),
        ((5,), ppo_discrete, buttons, "actor critic"),
        ((4, 84, 84), ppo_discrete, buttons, "actor critic"),
        ((5,), sac_continuous, box, "actor critic target"),
        (
            (4, 84, 84),
            dqn_atari,
            buttons,
            "q_network.advantage q_network.state_value target.advantage",
        ),
    ):
        options = {"dueling": True} if script is dqn_atari else {}
        agent = script.Agent(shape, action_space, script.Args(**options))
        for name in parts.split():
            assert isinstance(agent.get_submodule(name), Network), (script, name)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_of_another_kind_rounds_and_returns_float32(compiled):
    """A user's own: in the loss nothing is to meet bfloat16. Outputs may be nested."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            return (self.layer(x), "as it was"), x

    own = Own()
    parameters = flatten_parameters(own)
    parameters.copy_(torch.tensor([1000.0, 0.5]))
    call = functional(own, bf16=True)
    call = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
    (value, text), x = call(parameters, torch.ones(1, 1))
    assert value.item() == 1000 and text == "as it was" and value.dtype == x.dtype == torch.float32


@torch.no_grad()
def test_without_the_flag_a_graph_has_no_trace_of_it():
    """Autocast in a graph, even if disabled, keeps PyTorch from storing what it compiled."""
    network, seen = Network(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), {}
    parameters = flatten_parameters(network)
    for bf16 in (False, True):

        def backend(graph, inputs, bf16=bf16):
            seen[bf16] = str(graph.graph)
            return graph

        torch._dynamo.reset()
        torch.compile(functional(network, bf16), backend=backend, fullgraph=True)(
            parameters, torch.ones(1, 2)
        )
    assert "autocast" in seen[True] and "autocast" not in seen[False]


@each_case
def test_learns_from_nearly_the_same_losses_in_bfloat16(script, options, monkeypatch):
    """Whole runs: the losses that are logged first, and weights that stay float32."""
    logged, weights, asked = {}, {}, []

    def spied(module, bf16):
        asked.append(bf16)
        return functional(module, bf16)

    monkeypatch.setattr(script.tensors, "functional", spied)
    for bf16 in (False, True):
        args = {"bf16": bf16, "compile": False, "total_timesteps": 128, "eval_episodes": 1}
        args |= {"log_every": 2} if "log_every" in options else {}  # before any weight differs
        run_dir = script.train(script.Args(**options | args, run_dir=f"r{bf16}"))
        logged[bf16] = scalars(Path(run_dir))
        weights[bf16] = script.load_agent(run_dir).state_dict()
    half = len(asked) // 2  # every network of the script in bfloat16, or none
    assert half and asked == [False] * half + [True] * half
    tags = [tag for tag in logged[False] if tag.startswith("losses/")]
    assert logged[False].keys() == logged[True].keys() and tags
    for tag in tags:
        (step, value), (other_step, other) = (logged[bf16][tag][0] for bf16 in (False, True))
        assert step == other_step and other == pytest.approx(value, rel=0.05, abs=5e-3), tag
    assert any(logged[False][tag][0] != logged[True][tag][0] for tag in tags)
    for name, weight in weights[True].items():
        assert weight.dtype == weights[False][name].dtype
    assert any(not torch.equal(weights[True][name], x) for name, x in weights[False].items())
