"""CUDA: runs of all four scripts where there is one, and elsewhere what can be checked without."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import PPO, assert_killed_ends_as_whole, each_case, each_script, flags, scalars
from torch.utils._python_dispatch import TorchDispatchMode

import dqn_atari
import ppo_continuous
import ppo_discrete
import sac_continuous
from common import compute
from common.checkpoint import load_checkpoint
from common.tensors import FlatAdam, Network, ReturnStatistics, flatten_parameters, functional

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


# on the device "meta", which has no values: like CUDA it refuses tensors of the CPU


META = torch.device("meta")


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def indices(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def on_meta(script, obs_space, action_space, **kwargs) -> tuple:
    """An agent that has acted there, and its arguments."""
    args = script.Args(num_envs=2, **kwargs)
    agent = script.Agent(obs_space.shape, action_space, args).to(META)
    noise = meta(2, gym.spaces.flatdim(action_space))
    assert [x.device for x in agent.sample(meta(2, *obs_space.shape), noise)] == [META, META]
    return agent, args


def flat(module, eps=1e-8) -> tuple:
    parameters = flatten_parameters(module)
    assert parameters.device == META == next(module.parameters()).device
    return parameters, FlatAdam(parameters, eps)


VECTOR, PICTURE = gym.spaces.Box(-1, 1, (5,)), gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
BOX, BUTTONS = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(3)


@torch.no_grad()
def test_nothing_that_learning_touches_stays_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # it knows no "meta"
    with pytest.raises(RuntimeError):
        meta(3) + torch.zeros(3)  # so that mixing would be noticed

    cases = (ppo_continuous, VECTOR, BOX, meta(8, 3)), (ppo_discrete, VECTOR, BUTTONS, indices(8))
    for script, obs_space, action_space, action in (*cases, (ppo_discrete, PICTURE, *cases[1][2:])):
        agent, args = on_meta(script, obs_space, action_space, norm_obs=obs_space is VECTOR)
        parameters, optimizer = flat(agent)
        batch = meta(8, *obs_space.shape), action, meta(8), meta(8), meta(8), meta(8)
        agent.obs_statistics.update(batch[0])
        update = script.make_update(agent, optimizer, args)
        assert update(parameters, batch, indices(4), meta()).device == META

    agent, args = on_meta(sac_continuous, VECTOR, BOX, buffer_size=100)
    (critic, of_critic), (target, _), (actor, of_actor) = map(
        flat, (agent.critic, agent.target, agent.actor)
    )
    optimizers = {"critic": of_critic, "actor": of_actor, "alpha": FlatAdam(agent.log_alpha, 1e-8)}
    replay = sac_continuous.Replay(args, (5,), 3, META)
    replay.start(np.zeros((2, 5), np.float32))
    replay.num_rows = 10
    assert replay.latest(4).device == META
    update_critic, update_actor = sac_continuous.make_updates(
        agent, torch.nn.ModuleDict(optimizers), replay.widths, args
    )
    drawn = replay.sample(None)
    batch = agent.log_alpha, replay.rows, drawn, meta(256, 3)
    assert update_critic(critic, target, actor, *batch).device == META
    assert update_actor(critic, actor, *batch).device == drawn.device == META

    for options in ({}, {"double": True, "dueling": True, "prioritized": True}):
        agent, args = on_meta(dqn_atari, PICTURE, BUTTONS, buffer_size=100, **options)
        (parameters, optimizer), (target, _) = map(flat, (agent.q_network, agent.target))
        replay = dqn_atari.Replay(args, (4, 84, 84), META)
        replay.num_rows = 10
        drawn, weight = replay.sample(0.5, None)
        update = dqn_atari.make_update(agent, optimizer, args)
        metrics, error = update(parameters, target, replay.batch(drawn), weight)
        replay.update_priorities(drawn, error)
        devices = {x.device for x in (drawn, weight, metrics, error, replay.max_priority)}
        assert devices == {META}
        assert replay.latest(4).device == META


@pytest.mark.filterwarnings("ignore:.*to a meta parameter in the current model")
@each_script
def test_an_agent_is_loaded_onto_the_device_asked_for(script, options):
    options = options | {"total_timesteps": 128, "eval_episodes": 1, "compile": False}
    script.train(script.Args(**options, run_dir="r"))
    agent = script.load_agent("r", device="meta")
    assert {x.device for x in (*agent.parameters(), *agent.buffers())} == {META}


def test_sums_of_rewards_go_on_where_memory_is_not_the_cpus(monkeypatch):
    rewards, ends = np.random.default_rng(0).normal(size=(6, 2)), np.zeros((6, 2), bool)
    statistics = [ReturnStatistics(2) for _ in range(2)]
    for number, x in enumerate(statistics):
        if number:
            monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
        for part in (slice(0, 3), slice(3, 6)):
            x.update_from_rewards(rewards[part], ends[part], 0.9)
    assert torch.equal(statistics[0].var, statistics[1].var)
    assert torch.equal(statistics[0].carry, statistics[1].carry)


class Deterministic(TorchDispatchMode):
    """Fails where CUDA has no deterministic kernel; see torch.use_deterministic_algorithms."""

    NEVER = "put_ histc bincount median kthvalue nll_loss_forward grid_sampler_2d put".split()
    NEVER += "_adaptive_avg_pool2d_backward max_unpool2d reflection_pad2d_backward".split()
    NEVER += "upsample_bilinear2d_backward _ctc_loss _embedding_bag".split()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.NEVER, name
        assert name != "cumsum" or not args[0].is_floating_point(), "cumsum of floats"
        return func(*args, **kwargs or {})


@each_case
def test_all_that_training_does_has_a_deterministic_kernel(script, options):
    options = options | {"total_timesteps": 128, "eval_episodes": 1, "compile": False}
    with Deterministic():
        script.train(script.Args(**options, run_dir="r"))
    with pytest.raises(AssertionError, match="cumsum"), Deterministic():
        torch.rand(3).cumsum(0)


def test_the_options_for_cuda_are_known_to_the_compiler(monkeypatch):
    """An unknown one would be taken for a missing compiler, and everything run eagerly."""
    zeros, args = torch.zeros, ppo_continuous.Args()
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest))
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, *_, **__: module)
    seen, compile_ = [], torch.compile
    spy = lambda f, **x: (seen.append(dict(x["options"])), compile_(f, **x))[1]  # noqa: E731
    monkeypatch.setattr(torch, "compile", spy)
    compute.compile_function(lambda x: x, args, torch.device("cuda"))
    assert args.compile
    assert seen == [{"shape_padding": False, "dynamic_scale_rblock": False}]  # nothing by timing


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_cuda_run_is_evaluated_on_the_cpu_where_there_is_no_cuda(run, tmp_path, monkeypatch):
    """But not resumed."""
    options = PPO | {"env_id": "Pendulum-v1", "compile": False, "anneal_lr": False}
    ppo_continuous.train(ppo_continuous.Args(**options, total_timesteps=64, run_dir="r"))
    content = torch.load("r/checkpoint.pt")
    content["state"]["device"] = "cuda"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    torch.save(content, "r/checkpoint.pt")
    out = run("ppo_continuous.py", "--evaluate", "r", cwd=tmp_path).stdout
    assert "evaluated on the CPU" in out and "evaluation of 10 episodes" in out
    words = ["--resume", "r", "--total-timesteps", 128]
    done = run("ppo_continuous.py", *words, cwd=tmp_path, check=False)
    assert (
        done.returncode == 2
        and done.stderr
        == "error: --device cuda: PyTorch finds no CUDA device; the run was begun on one\n"
    )


@needs_cuda
@torch.no_grad()
def test_hidden_layers_round_to_bfloat16_on_cuda_and_the_last_one_does_not():
    network = Network(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)).cuda()
    x = torch.randn(20, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden = network[0](x)
        rounded = network[1](hidden).float()
    expected = network[1](hidden.float())
    got = functional(network, bf16=True)(flatten_parameters(network), x)
    torch.testing.assert_close(got, expected)
    assert hidden.dtype == torch.bfloat16 and (got - rounded).abs().max() > 1e-4


@needs_cuda
def test_products_on_cuda_are_those_of_float32():
    compute.setup_torch(sac_continuous.Args(device="cuda"), large=True)
    x = torch.randn(256, 256, device="cuda")
    assert (x @ x - x.double() @ x.double()).abs().max() < 1e-3  # 0.05, where factors are rounded


@needs_cuda
@each_case
def test_killed_and_resumed_on_cuda_ends_as_if_never_stopped(run, tmp_path, script, options):
    options = options | {"device": "cuda", "eval_episodes": 2, "seed": 3, "eval_every": 640}
    options |= {"total_timesteps": 2560, "checkpoint_every": 128}
    assert_killed_ends_as_whole(f"{script.SCRIPT}.py", options, tmp_path, run)
    assert load_checkpoint(tmp_path / "whole" / "checkpoint.pt")["device"] == "cuda"


@needs_cuda
@each_case
def test_evaluates_on_cuda_as_in_training(run, tmp_path, script, options):
    options = options | {"device": "cuda", "total_timesteps": 128, "eval_episodes": 3}
    name = f"{script.SCRIPT}.py"
    trained = run(name, *flags(**options, run_dir="r"), cwd=tmp_path).stdout
    evaluated = run(name, "--evaluate", "r", cwd=tmp_path).stdout.strip()
    assert evaluated.startswith("evaluation of 3 episodes") and evaluated in trained


@needs_cuda
@each_case
def test_compiled_on_cuda_equals_eager(script, options, monkeypatch):
    """The losses that are logged first, up to rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    first = []
    for compiled in (False, True):
        run_dir = Path(f"r{compiled}")
        args = {"device": "cuda", "compile": compiled, "total_timesteps": 128, "eval_episodes": 1}
        script.train(args := script.Args(**options | args, run_dir=str(run_dir)))
        assert args.compile == compiled  # not given up
        logged = scalars(run_dir)
        first.append({tag: logged[tag][0] for tag in logged if tag.startswith("losses/")})
    eager, compiled = first
    assert eager and eager.keys() == compiled.keys()
    for tag, (step, value) in eager.items():
        assert compiled[tag] == (step, pytest.approx(value, rel=1e-2, abs=1e-4)), tag
