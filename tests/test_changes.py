"""What a reader's change meets: it works, or says at once why it cannot."""

import contextlib
import dataclasses
import importlib.util
import random
import shutil
import sys
from collections import deque
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import CASES, PPO, assert_same, assert_same_runs, each_script, needs_compiler, scalars

import dqn_atari
import ppo_continuous
import ppo_discrete
import sac_continuous
from common import compute, envs, fail, runs
from common.checkpoint import load_checkpoint
from common.tensors import flatten_parameters, functional

SHORT = {"total_timesteps": 128, "eval_episodes": 1}
PENDULUM = PPO | SHORT | {"env_id": "Pendulum-v1", "compile": False}
SAC_MLP, DQN_CNN = sac_continuous.mlp, dqn_atari.nature_cnn


def test_a_frozen_parameter_is_not_trained_unasked():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen.*: 0.bias$"):
        flatten_parameters(module)


def test_two_networks_do_not_take_an_encoder_from_each_other():
    encoder = nn.Linear(3, 4)
    actor = nn.Sequential(encoder, nn.Linear(4, 2))
    flat = flatten_parameters(actor)
    with pytest.raises(ValueError, match="another vector"):
        flatten_parameters(nn.Sequential(encoder, nn.Linear(4, 1)))
    flat.zero_()
    assert not encoder.weight.any()  # it is still the first one's


def test_what_is_no_floating_point_number_stays_what_it_is():
    class Choice(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y > 0, y.argmax(-1)

    module = Choice(3, 4)
    values, mask, best = functional(module, bf16=True)(flatten_parameters(module), torch.ones(2, 3))
    assert (values.dtype, mask.dtype, best.dtype) == (torch.float32, torch.bool, torch.int64)


def deeper_mlp(layer, *sizes):
    layers = SAC_MLP(layer, *sizes[:-1], 24, sizes[-1])
    return sac_continuous.tensors.Network(*(nn.Tanh() if type(x) is nn.ReLU else x for x in layers))


def deeper_cnn(obs_shape):
    *convolutions, flatten, linear, relu = DQN_CNN(obs_shape)
    more = nn.Conv2d(64, 64, 3, padding=1), nn.Tanh()
    return nn.Sequential(*convolutions, *more, flatten, linear, relu)


@pytest.mark.parametrize(
    "case, network, edited", [("sac", "mlp", deeper_mlp), ("dqn-all", "nature_cnn", deeper_cnn)]
)
def test_an_edited_network_acts_and_learns_alike(case, network, edited, monkeypatch, capsys):
    """Of PPO see test_ppo_maths.py."""
    script, options = CASES[case]
    begun, acting, to_numpy, save = {}, [], compute.to_numpy, runs.Run.save

    def spy(*rest):
        acting.append(to_numpy(*rest))
        return acting[-1]

    def begin(run, step, **rest):
        if step == 0:
            begun.update({k: x.clone() for k, x in run.parts["agent"].named_parameters()})
        save(run, step, **rest)

    monkeypatch.setattr(script, network, edited)
    monkeypatch.setattr(compute, "to_numpy", spy)
    monkeypatch.setattr(compute, "compile_function", lambda function, *_: function)  # not the point
    monkeypatch.setattr(runs.Run, "save", begin)
    script.train(script.Args(**options | SHORT | {"run_dir": "r"}))
    assert "slower" not in capsys.readouterr().out
    agent, (act,) = script.load_agent("r").requires_grad_(False), acting
    assert act.__name__ == ("traced" if case == "sac" else "untraced")
    noise = torch.zeros(2, *(agent.actions.shape if case == "dqn-all" else agent.low.shape))
    for _ in range(20):
        obs = torch.rand(2, *agent.obs_shape.tolist()) * (255 if case == "dqn-all" else 1)
        for got, expected in zip(act(obs, noise), agent.sample(obs, noise), strict=True):
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    for name, parameter in agent.named_parameters():
        assert name.startswith("target") or not torch.equal(parameter, begun[name]), name


FLAG = '    term_coef: float = 0.0\n    """coefficient of the term"""\n'
TERM = "args.term_coef * (extra * {}).mean()"
OF_PPO = {  # what a reader changes to, by what there is: a term with something known of each sample
    "    target_kl: float": FLAG + "    target_kl: float",
    "old_value, target, args": "old_value, target, extra, args",
    "old_value, target):": "old_value, target, extra):",
    "    kl = -log_ratio": f"    loss = loss + {TERM.format('value')}\n    kl = -log_ratio",
    "values, targets\n": "values, targets, torch.tensor(rollout.rewards).float().flatten()\n",
}
OF_SAC = {
    "    log_every: int": FLAG + "    log_every: int",
    "size, 1, 1, obs_size\n": "size, 1, 1, obs_size, 1\n",
    "reward, terminated, next_obs)]": "reward, terminated, next_obs, reward)]",
    "_, reward, _, next_obs =": "_, reward, _, next_obs, _ =",
    "reward, termination, next_obs =": "reward, termination, next_obs, extra =",
    "return (q - y)": f"return {TERM.format('q.T')} + (q - y)",
}
OF_DQN = {
    "    log_every: int": FLAG + "    log_every: int",
    "self.rewards = torch": "self.extra, self.rewards = torch.zeros(shape, device=device), torch",
    "self.actions[row], self.": "self.extra[row] = torch.as_tensor(reward); self.actions[row], self.",
    "reward, discount, next_obs\n": "reward, discount, next_obs, self.extra[row, env]\n",
    "reward, discount, next_obs =": "reward, discount, next_obs, extra =",
    "return td_loss(": f"return {TERM.format('q')} + td_loss(",
    '"rewards": rows,': '"rewards": rows, "extra": rows,',
    '"actions", "rewards"': '"actions", "rewards", "extra"',
}


@pytest.mark.parametrize(
    "case, edits",
    [("ppo", OF_PPO), ("ppo-discrete", OF_PPO), ("sac", OF_SAC), ("dqn-all", OF_DQN)],
)
def test_a_term_of_the_loss_is_added_where_the_readme_says(case, edits, monkeypatch):
    """Without weight it changes no bit, and with some what is learned."""
    (script, options), text = CASES[case], Path(CASES[case][0].__file__).read_text()
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    Path("mine.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mine", "mine.py")
    mine = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", mine)
    spec.loader.exec_module(mine)
    options = options | SHORT | {"compile": False}
    script.train(script.Args(**options, run_dir="as it is"))
    for coef in (0.0, 0.1):
        mine.train(mine.Args(**options, term_coef=coef, run_dir=f"{coef}"))
    weights = [load_checkpoint(Path(x, "checkpoint.pt"))["agent"] for x in ("as it is", "0.0")]
    assert_same(*weights)
    learned = load_checkpoint(Path("0.1/checkpoint.pt"))["agent"]
    assert any(not torch.equal(learned[name], x) for name, x in weights[0].items())


@each_script
def test_agents_are_evaluated_as_such(script, options, monkeypatch):
    """Dropout, say, is then off; afterwards all is as before."""
    modes, agents = [], set()

    class Agent(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.frozen = nn.Dropout().eval()

        def act(self, obs):
            modes.append([module.training for module in self.modules()])
            agents.add(self)
            return super().act(obs)

    monkeypatch.setattr(script, "Agent", Agent)
    options = options | {"compile": False, "total_timesteps": 128, "eval_episodes": 1}
    script.train(script.Args(**options, eval_every=64, run_dir="r"))
    assert len(modes) > 1 and not any(map(any, modes))
    (agent,) = agents
    assert [x for x in agent.modules() if not x.training] == [agent.frozen]
    agent = script.load_agent("r")
    assert not agent.training and all(x.requires_grad for x in agent.parameters())
    a, b, *_ = (getattr(agent, "q_network", None) or agent.actor).parameters()
    assert b.data_ptr() == a.data_ptr() + a.nbytes  # one vector, as in training


def test_dropout_is_off_in_evaluations_and_they_repeat_themselves(monkeypatch):
    def mlp(*sizes):
        layers = [nn.Linear(sizes[0], 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, sizes[-1])]
        return ppo_continuous.tensors.Network(*layers)

    monkeypatch.setattr(ppo_continuous, "mlp", mlp)
    ppo_continuous.train(ppo_continuous.Args(**PENDULUM, run_dir="r"))
    agent, obs = ppo_continuous.load_agent("r"), np.ones(3, np.float32)
    assert all(agent.act(obs) == agent.act(obs) for _ in range(20))
    agent.train()
    assert any(agent.act(obs) != agent.act(obs) for _ in range(20))


@needs_compiler
def test_dropout_and_layer_norm_are_resumed_exactly_where_compiled(monkeypatch):
    """The compiled update draws from PyTorch's own generator, which checkpoints hold."""

    def mlp(*sizes):
        layers = nn.Linear(sizes[0], 32), nn.LayerNorm(32), nn.Dropout(0.5), nn.Tanh()
        return ppo_continuous.tensors.Network(*layers, nn.Linear(32, sizes[-1]))

    def save(run, step, save=runs.Run.save, **rest):
        save(run, step, **rest)
        if step == 128 and run.dir == Path("r"):
            shutil.copytree("r", "cut")

    monkeypatch.setattr(ppo_continuous, "mlp", mlp)
    monkeypatch.setattr(runs.Run, "save", save)
    options = PENDULUM | {"compile": True, "total_timesteps": 256, "checkpoint_every": 64}
    args = ppo_continuous.Args(**options, run_dir="r")
    ppo_continuous.train(args)
    assert args.compile  # it is turned off where compiling fails
    cut = load_checkpoint("cut/checkpoint.pt")
    assert cut["global_step"] == 128
    ppo_continuous.train(dataclasses.replace(args, run_dir="cut", resume="cut"), cut)
    assert_same_runs(Path("r"), Path("cut"))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_infos_that_are_let_through_arrive_and_the_last_ones_apart(vectorization, monkeypatch):
    def step(self, action, step=envs.Replayable.step):
        *outcome, _ = step(self, action)
        return *outcome, {"taken": len(self.actions)}

    monkeypatch.setattr(envs.Replayable, "step", step)
    args = ppo_continuous.Args(**PENDULUM | {"num_envs": 2, "vectorization": vectorization})
    environments, seen = envs.Environments(args), []
    for _ in range(201):
        *_, infos = environments.step(np.zeros((2, 1), np.float32))
        seen.append({"last": infos.get("final_info")} | {"taken": infos.get("taken")})
    environments.close()
    assert seen[9]["taken"].tolist() == [10, 10] and seen[200]["taken"].tolist() == [1, 1]
    assert [i for i, x in enumerate(seen) if x["last"]] == [199]
    assert seen[199]["last"]["taken"].tolist() == [200, 200]


@each_script
def test_a_metric_without_a_name_is_not_dropped(script, options, monkeypatch):
    monkeypatch.setattr(script, "METRICS", script.METRICS[:-1])
    options = options | {"compile": False, "total_timesteps": 128, "target_kl": None}
    options = {name: x for name, x in options.items() if hasattr(script.Args, name)}
    with pytest.raises(ValueError, match="zip"):
        script.train(script.Args(**options, run_dir="r"))


@pytest.mark.parametrize("kept", [np.float64(1), np.zeros(2), deque([1])], ids=type)
def test_what_a_checkpoint_cannot_give_back_is_said_at_the_start(kept, monkeypatch, capsys):
    state_dict = ppo_continuous.tensors.FlatAdam.state_dict
    monkeypatch.setattr(
        ppo_continuous.tensors.FlatAdam,
        "state_dict",
        lambda self, *rest, **named: state_dict(self, *rest, **named) | {"kept": kept},
    )
    with pytest.raises(SystemExit):
        ppo_continuous.train(ppo_continuous.Args(**PENDULUM, run_dir="r"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "Unsupported global" in line and type(kept).__module__.split(".")[0] in line
    assert not Path("r").exists()


def test_arguments_are_kept_as_the_run_began_with_them(monkeypatch):
    args = sac_continuous.Args(
        env_id="Pendulum-v1", total_timesteps=60, learning_starts=20, log_every=20, batch_size=8,
        hidden_sizes=(8,), compile=False, eval_episodes=1, run_dir="r",
    )  # fmt: skip
    progress = runs.Run.progress

    def decay(self, step):
        args.q_lr *= 0.5
        progress(self, step)

    monkeypatch.setattr(runs.Run, "progress", decay)
    sac_continuous.train(args)
    assert args.q_lr < 1e-3 == load_checkpoint(Path("r/checkpoint.pt"))["args"]["q_lr"]


def test_a_new_name_of_a_metric_is_logged(monkeypatch):
    loss = ppo_continuous.ppo_loss

    def more(*inputs):
        value, metrics = loss(*inputs)
        return value, torch.cat((metrics, metrics[:1] * 2))

    monkeypatch.setattr(ppo_continuous, "ppo_loss", more)
    monkeypatch.setattr(ppo_continuous, "METRICS", [*ppo_continuous.METRICS, "twice_loss"])
    logged = scalars(ppo_continuous.train(ppo_continuous.Args(**PENDULUM, run_dir="r")))
    first, second = ([x[-1] for x in logged[f"losses/{name}"]] for name in ("loss", "twice_loss"))
    np.testing.assert_allclose(np.multiply(first, 2), second, rtol=1e-6)


class Simulator:
    """Pendulums that step together, and cannot repeat what they did."""

    def __init__(self, makers, **_):
        self.envs = [gym.make("Pendulum-v1", max_episode_steps=20) for _ in makers]

    def reset(self):
        return np.stack([env.reset()[0] for env in self.envs]), {}

    def step(self, actions):
        steps = zip(*(env.step(action) for env, action in zip(self.envs, actions)))
        obs, rewards, terminated, truncated, _ = map(np.array, steps)
        infos = {"final_obs": obs.copy()}
        for n in np.flatnonzero(truncated):
            obs[n], _ = self.envs[n].reset()
        return obs, rewards, terminated, truncated, infos

    def close(self):
        for env in self.envs:
            env.close()


@pytest.mark.parametrize("case", ["ppo", "sac"])
def test_a_simulator_that_cannot_repeat_itself_goes_on_with_new_episodes(case, monkeypatch):
    """As README says where it tells of simulators."""

    class Simulated(envs.Environments):
        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]
            self.lost[:] = True

    monkeypatch.setattr(envs, "SyncVectorEnv", Simulator)
    monkeypatch.setattr(envs, "Environments", Simulated)
    script, options = CASES[case]
    options = options | SHORT | {"compile": False, "run_dir": "r"}
    args = script.Args(**options | ({"anneal_lr": False} if case == "ppo" else {}))
    script.train(args)
    longer = dataclasses.replace(args, resume="r", total_timesteps=256)
    logged = scalars(script.train(longer, load_checkpoint(Path("r/checkpoint.pt"))))
    ends = [*(40, 80, 120), *(168, 208, 248)]  # two pendulums: of 64 steps each four are cut off
    assert sorted({step for step, _ in logged["charts/episodic_length"]}) == ends
    assert {length for _, length in logged["charts/episodic_length"]} == {20}


@pytest.mark.parametrize(
    "script, env_id",
    [
        (ppo_continuous, "toy_envs:Unbounded-v0"),
        (ppo_continuous, "pixel_envs:Film-v0"),
        (sac_continuous, "pixel_envs:Film-v0"),
        (ppo_discrete, "pixel_envs:Colours-v0"),
    ],
)
def test_unbounded_actions_and_images_are_taken(script, env_id, monkeypatch):
    monkeypatch.setattr(envs, "play", lambda *_: ([0.0], [1]))  # some never end
    options = {"num_steps": 16, "num_minibatches": 2, "learning_starts": 8, "buffer_size": 64}
    options = {name: x for name, x in options.items() if hasattr(script.Args, name)}
    options |= {"total_timesteps": 64, "compile": False, "run_dir": "r"}
    script.train(script.Args(env_id=env_id, **options))
    assert load_checkpoint(Path("r/checkpoint.pt"))["global_step"] == 64


@each_script
def test_a_run_may_begin_with_the_weights_of_another(script, options, monkeypatch):
    options = options | SHORT | {"compile": False}
    known = script.load_agent(script.train(script.Args(**options, run_dir="a"))).state_dict()
    begun, save = {}, runs.Run.save

    class Agent(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.load_state_dict(known)

    def begin(run, step, **rest):
        if step == 0:
            begun.update({k: x.clone() for k, x in run.parts["agent"].state_dict().items()})
        save(run, step, **rest)

    monkeypatch.setattr(script, "Agent", Agent)
    monkeypatch.setattr(runs.Run, "save", begin)
    script.train(script.Args(**options, run_dir="b"))
    assert_same(begun, dict(known))
    shutil.copy("b/checkpoint.pt", "a/other.pt")
    other, last = (dict(script.load_agent(*x).state_dict()) for x in (("a", "other.pt"), ("b",)))
    assert_same(other, last)
    assert any(not torch.equal(other[name], x) for name, x in known.items())


def test_batch_norm_is_refused(monkeypatch):
    def mlp(*sizes):
        layers = nn.Linear(sizes[0], 8), nn.BatchNorm1d(8), nn.Linear(8, sizes[-1])
        return ppo_continuous.tensors.Network(*layers)

    monkeypatch.setattr(ppo_continuous, "mlp", mlp)
    with pytest.raises(RuntimeError, match="in.?place"):
        ppo_continuous.train(ppo_continuous.Args(**PENDULUM, run_dir="r"))


@each_script
def test_training_leaves_the_callers_random_numbers_alone(script, options, monkeypatch):
    """Else a search at random would draw the same arguments again after every run."""
    for failing in (False, True):
        if failing:
            monkeypatch.setattr(runs.Run, "_introduce", lambda _: fail("on purpose"))
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
        with pytest.raises(SystemExit) if failing else contextlib.nullcontext():
            args = options | SHORT | {"compile": False, "run_dir": f"r{failing}"}
            script.train(script.Args(**args))
        after = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
        assert before[0] == after[0] and torch.equal(before[2], after[2])
        assert_same(before[1]["state"], after[1]["state"])


@pytest.mark.parametrize(
    "vectorization",
    [
        "sync",
        pytest.param(
            "async",
            marks=pytest.mark.skipif(
                torch.cuda.device_count() > 0, reason="autograd refuses forks there"
            ),
        ),
    ],
)
@pytest.mark.parametrize("case", ["ppo", "sac"])
def test_an_environment_may_take_gradients(case, vectorization):
    script, options = CASES[case]
    options = options | SHORT | {"compile": False, "env_id": "toy_envs:Curious-v0"}
    options |= {"vectorization": vectorization, "run_dir": "r"}
    args = script.Args(**options | ({"anneal_lr": False} if case == "ppo" else {}))
    script.train(args)
    longer = dataclasses.replace(args, resume="r", total_timesteps=192)
    script.train(longer, load_checkpoint(Path("r/checkpoint.pt")))
    assert load_checkpoint(Path("r/checkpoint.pt"))["finished"]


@each_script
def test_floats_may_be_double_by_default(script, options):
    """As an environment's module may have set them."""
    torch.set_default_dtype(torch.float64)
    try:
        script.train(script.Args(**options | SHORT | {"compile": False, "run_dir": "r"}))
        assert next(script.load_agent("r").parameters()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_arguments_may_be_numbers_of_numpy():
    options = PENDULUM | {"seed": np.arange(3)[2], "learning_rate": np.float64(1e-3)}
    options |= {"clip_coef": np.float32(0.25), "hidden_sizes": np.array([8, 8])}
    args = ppo_continuous.Args(**options, run_dir="r")
    ppo_continuous.train(args)
    stored = load_checkpoint(Path("r/checkpoint.pt"))["args"]
    assert (stored["seed"], stored["learning_rate"], stored["clip_coef"]) == (2, 1e-3, 0.25)
    assert stored["hidden_sizes"] == (8, 8)


def test_what_a_checkpoint_cannot_give_back_later_leaves_the_last_good_one(monkeypatch, capsys):
    """As a part's state that is a NumPy number once it has one."""
    state_dict, states = ppo_continuous.tensors.FlatAdam.state_dict, []

    def grown(self, *rest, **named):
        states.append(np.float64(1) if states else None)
        return state_dict(self, *rest, **named) | {"kept": states[-1]}

    monkeypatch.setattr(ppo_continuous.tensors.FlatAdam, "state_dict", grown)
    with pytest.raises(SystemExit, match="1"):
        ppo_continuous.train(ppo_continuous.Args(**PENDULUM, checkpoint_every=64, run_dir="r"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "r/checkpoint.pt could not be written: Unsupported global" in line
    assert load_checkpoint(Path("r/checkpoint.pt"))["global_step"] == 0
    assert not [*Path("r").glob(".*.writing")]


def test_a_run_may_be_resumed_from_its_path():
    args = ppo_continuous.Args(**PENDULUM, anneal_lr=False, run_dir=Path("r"))
    folder = ppo_continuous.train(args)
    args = dataclasses.replace(args, resume=folder, run_dir=folder, total_timesteps=256)
    ppo_continuous.train(args, load_checkpoint(folder / "checkpoint.pt"))
    assert load_checkpoint(folder / "checkpoint.pt")["args"]["resume"] == "r"


def test_what_takes_a_number_from_a_buffer_acts_in_pytorch(capsys):
    """Traced, it would keep the first number for ever."""
    module = nn.Linear(2, 1).requires_grad_(False)
    module.register_buffer("scale", torch.ones(()))
    args, x = ppo_continuous.Args(), torch.ones(1, 2)
    act = compute.to_numpy(lambda x: (module(x) * module.scale.item(),), args, x)
    assert "a number taken from a tensor" in capsys.readouterr().out
    before = act(x)[0]
    module.scale.mul_(3)
    np.testing.assert_allclose(act(x)[0], 3 * before)
    assert compute.to_numpy(lambda x: (module(x) * module.scale,), args, x).__name__ == "traced"


@pytest.mark.parametrize("case", ["ppo", "ppo-discrete"])
def test_episodes_of_another_run_are_not_gone_on_with(case, monkeypatch):
    """Whose weights and statistics, with its discounted returns, a run begins with."""
    script, options = CASES[case]
    options = options | SHORT | {"compile": False}
    known = script.load_agent(script.train(script.Args(**options, run_dir="a"))).state_dict()
    known["return_statistics.carry"][:] = 1e6
    begun = []

    class Agent(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.load_state_dict(known)

    def record(self, rewards, ends, gamma):
        begun.append(self.carry.clone())

    monkeypatch.setattr(script, "Agent", Agent)
    monkeypatch.setattr(script.tensors.ReturnStatistics, "update_from_rewards", record)
    script.train(script.Args(**options, run_dir="b"))
    assert begun and not begun[0].any()
