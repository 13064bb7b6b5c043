"""Stopping and going on: killed, signalled, in the middle of writing. Both scripts."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import toy_envs
from conftest import (
    CASES,
    ROOT,
    assert_killed_ends_as_whole,
    assert_same,
    assert_same_runs,
    command,
    each_script,
    flags,
    scalars,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dqn_atari as dqn
import sac_continuous as sac
from common import arguments, compute, envs, fail, runs
from common.checkpoint import load_checkpoint, save_checkpoint
from common.tensors import ReturnStatistics
from ppo_continuous import Args, check_args, load_agent, train

SHORT = {"num_envs": 1, "num_steps": 64, "num_minibatches": 4, "update_epochs": 2}
SHORT |= {"eval_episodes": 2, "compile": False}


@pytest.mark.parametrize(
    "script, env_id, num_envs, options",
    [
        ("ppo_continuous.py", "Hopper-v5", 4, {}),
        ("ppo_continuous.py", "HalfCheetah-v5", 1, {"compile": True}),
        ("ppo_continuous.py", "Pendulum-v1", 4, {"vectorization": "async"}),
        ("ppo_continuous.py", "toy_envs:Opaque-v0", 4, {}),
        ("ppo_discrete.py", "CartPole-v1", 4, {"compile": True, "bf16": True}),
        ("ppo_discrete.py", "Acrobot-v1", 1, {}),
    ],
)
def test_killed_and_resumed_ends_as_if_never_stopped(
    run, tmp_path, script, env_id, num_envs, options
):
    """SIGKILL at random moments; the same weights to the last bit, the same scalars."""
    arguments = SHORT | {
        "env_id": env_id,
        "num_envs": num_envs,
        "total_timesteps": 64 * num_envs * (40 if num_envs == 1 or "compile" in options else 20),
        "checkpoint_every": 64 * num_envs * 3,
        "eval_every": 64 * num_envs * 15,
        "seed": 3,
        "norm_obs": True,
        "norm_reward": True,
    }
    assert_killed_ends_as_whole(script, arguments | options, tmp_path, run)


@pytest.mark.parametrize("name", ["ppo", "sac", "dqn-all"])
def test_killed_while_writing_a_checkpoint(run, tmp_path, name):
    """The process dies with half a checkpoint written; the one before it is whole."""
    module, options = CASES[name]
    script = f"{module.SCRIPT}.py"
    options = options | {"total_timesteps": 64 * 8, "checkpoint_every": 64, "compile": False}
    arguments = flags(**options)
    run(script, *arguments, "--run-dir", "whole", cwd=tmp_path)
    saboteur = tmp_path / "saboteur.py"
    saboteur.write_text(f"""
import io, os, runpy, sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
original, calls = torch.save, []
def save(content, file):
    calls.append(1)
    if len(calls) == 6:
        whole = io.BytesIO()
        original(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), 9)
    original(content, file)
torch.save = save
sys.argv = ["{script}", *sys.argv[1:]]
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
""")
    died = run(saboteur, *arguments, "--run-dir", "killed", cwd=tmp_path, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert 256 <= load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["global_step"] < 320
    run(script, "--resume", "killed", cwd=tmp_path)
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_saving_and_evaluating_do_not_change_training(ppo):
    env_id, agents = {"ppo_continuous": "Hopper-v5", "ppo_discrete": "CartPole-v1"}[ppo.SCRIPT], []
    for every in (0, 64):
        options = SHORT | {"checkpoint_every": every, "eval_every": every * 2}
        args = ppo.Args(env_id=env_id, total_timesteps=640, run_dir=f"r{every}", **options)
        agents.append(dict(ppo.load_agent(ppo.train(args)).state_dict()))
    assert_same(*agents)


def members(session: int) -> list[int]:
    """Return the processes of a session, as Linux knows them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(") ")[2].split()[3]) == session:
                found.append(int(stat.parent.name))
    return found or [session]  # elsewhere


PROCESSES = {"num_envs": 2, "vectorization": "async"}


@pytest.mark.parametrize(
    "script, env_id, number, options",
    [
        ("ppo_continuous.py", "Pendulum-v1", signal.SIGTERM, PROCESSES),
        ("ppo_discrete.py", "CartPole-v1", signal.SIGINT, PROCESSES),
        ("ppo_discrete.py", "CartPole-v1", signal.SIGHUP, PROCESSES),
        ("ppo_continuous.py", "toy_envs:Helped-v0", signal.SIGINT, {}),
    ],
)
def test_signals_save_and_say_how_to_go_on(run, tmp_path, script, env_id, number, options):
    """To all processes of a run, as from a terminal, a scheduler or systemd; none is left."""
    options = SHORT | {"total_timesteps": 10**9, "anneal_lr": False, "run_dir": "r"} | options
    process = subprocess.Popen(
        command(ROOT / script, *flags(env_id=env_id, **options)),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also under nohup
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if "steps/s" in line:
                break
        for pid in members(process.pid):
            os.kill(pid, number)
        out, err = process.communicate(timeout=300)  # until every process that writes has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert shlex.join(["python", str(ROOT / script), "--resume", "r"]) in out
    step = load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"]
    assert step > 0 and f"stopped at step {step:,}" in out
    more = run(script, "--resume", "r", "--total-timesteps", step + 128, cwd=tmp_path).stdout
    assert load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"] == step + 128, more
    finished = run(script, "--resume", "r", cwd=tmp_path)
    assert "finished" in finished.stdout and (tmp_path / "r" / "checkpoint.pt").is_file()
    if env_id == "toy_envs:Helped-v0":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "helper").read_text()), 0)


@pytest.mark.parametrize(
    "script, options, step",
    [
        (sac, {"env_id": "Pendulum-v1", "learning_starts": 50, "log_every": 50}, 150),
        (dqn, {"env_id": "pixel_envs:Catch-v0", "num_envs": 1, "log_every": 40}, 120),
    ],
)
def test_a_signal_saves_at_the_next_boundary(script, options, step, monkeypatch, capsys):
    send, sent = envs.Environments.send, []

    def interrupted(self, actions):
        sent.append(actions)
        if len(sent) == 101:
            os.kill(os.getpid(), signal.SIGTERM)
        send(self, actions)

    def said(line, file=None, say=runs.say):
        if file:
            raise RuntimeError("reentrant call")  # the signal came amid another line
        return say(line)

    monkeypatch.setattr(runs, "say", said)
    monkeypatch.setattr(envs.Environments, "close", mock.Mock(side_effect=BrokenPipeError))
    monkeypatch.setattr(envs.Environments, "send", interrupted)
    options |= {"compile": False, "buffer_size": 500, "run_dir": "r", "total_timesteps": 1000}
    with pytest.raises(SystemExit) as stopped:
        script.train(script.Args(**options))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"stopped at step {step}; go on: python {script.SCRIPT}.py" in capsys.readouterr().out
    assert load_checkpoint(Path("r/checkpoint.pt"))["global_step"] == step


@pytest.mark.parametrize(
    "number, again, ignored",
    [
        (signal.SIGHUP, signal.SIGHUP, False),
        (signal.SIGHUP, signal.SIGHUP, True),
        (signal.SIGTERM, signal.SIGTERM, False),
        (signal.SIGTERM, signal.SIGHUP, False),
    ],
)
def test_one_request_to_stop_may_come_twice_and_nohup_outlives_a_terminal(
    number, again, ignored, monkeypatch
):
    """Of a terminal from its shell and the kernel, of `timeout` to the process and to its group, or
    before the terminal is lost; that is nobody who asks once more. Environments are closed.
    """
    send, sent, closed, clock = envs.Environments.send, [], [], [0.0]

    def closing(self, actions):
        sent.append(actions)
        if len(sent) == 100:
            signal.raise_signal(number)
            clock[0] += 0.3 * (again != number)
            signal.raise_signal(again)
        send(self, actions)

    monkeypatch.setattr(envs.Environments, "close", lambda self: closed.append(self))
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])

    def leave(_):
        raise AssertionError("at once")

    monkeypatch.setattr(envs.Environments, "send", closing)
    monkeypatch.setattr(runs.os, "_exit", leave)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    ends = pytest.raises(SystemExit)
    try:
        with contextlib.nullcontext() if ignored else ends as stopped:
            train(Args(env_id="Pendulum-v1", total_timesteps=640, run_dir="r", **SHORT))
    finally:
        signal.signal(signal.SIGHUP, before)
    step = load_checkpoint("r/checkpoint.pt")["global_step"]
    assert step == (640 if ignored else 128) and len(closed) == 1
    assert ignored or stopped.value.code == 128 + number


def test_a_run_whose_output_nobody_reads_saves_and_ends(run, tmp_path):
    """As where Ctrl-C ends `2>&1 | tee` too; what it then says is lost, and no more than that."""
    options = SHORT | {"total_timesteps": 10**9, "anneal_lr": False, "run_dir": "r"}
    process = subprocess.Popen(
        command(ROOT / "ppo_continuous.py", *flags(env_id="Pendulum-v1", **options)),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if b"steps/s" in line:
                break
        process.stdout.close()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 130
    finally:
        process.kill()
    step = load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"]
    assert step > 0
    more = "--total-timesteps", step + 128
    out = run("ppo_continuous.py", "--resume", "r", *more, cwd=tmp_path).stdout
    assert "done: r" in out and "±" in out


def test_a_script_whose_output_nobody_reads_any_more_saves_and_ends(tmp_path):
    options = SHORT | {"total_timesteps": 10**9, "anneal_lr": False, "run_dir": "r"}
    words = command(ROOT / "ppo_continuous.py", *flags(env_id="Pendulum-v1", **options))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=tmp_path, **streams)
    try:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 128 + signal.SIGPIPE
    finally:
        process.kill()
    assert load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"] > 0


@pytest.mark.parametrize("read_once, compiled", [(False, False), (True, False), (True, True)])
def test_a_closed_pipe_is_a_signal_to_end(monkeypatch, read_once, compiled):
    """Also where that it compiles is what nobody reads first."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal, so lines and no bar
    read, write = os.pipe()

    def introduce(self, introduce=runs.Run._introduce):
        if read_once:
            introduce(self)
        os.close(read)
        if not read_once:
            introduce(self)

    monkeypatch.setattr(runs.Run, "_introduce", introduce)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            options = SHORT | {"compile": compiled}
            train(Args(env_id="Pendulum-v1", total_timesteps=6400, run_dir="r", **options))
        print("to nobody", flush=True)
    assert stopped.value.code == 128 + signal.SIGPIPE
    assert 0 < load_checkpoint("r/checkpoint.pt")["global_step"] < 6400


def test_an_evaluation_by_other_code_says_so(monkeypatch, capsys):
    train(Args(env_id="Pendulum-v1", total_timesteps=64, run_dir="r", **SHORT))
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", "--evaluate", "r"])
    args, _ = arguments.parse_args(Args, "ppo_continuous")

    def evaluated() -> bool:
        capsys.readouterr()
        runs.evaluate(load_agent, args, check_args(args))
        said = capsys.readouterr().out
        assert "evaluation of 2 episodes" in said
        return "other code than the run was begun with" in said

    assert not evaluated()
    monkeypatch.setattr(runs.provenance, "code", lambda script: "another")
    assert evaluated()
    for content in ("[]", "{}", "half of a"):
        Path("r/config.json").write_text(content)
        assert not evaluated()
    Path("r/config.json").unlink()
    assert not evaluated()


def test_what_a_finished_run_says_may_go_unread(monkeypatch):
    train(Args(env_id="Pendulum-v1", total_timesteps=64, run_dir="r", **SHORT))
    read, write = os.pipe()
    os.close(read)
    for mode in ("--resume", "--evaluate"):
        with os.fdopen(os.dup(write), "w") as pipe, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", pipe)
            patch.setattr(sys, "argv", ["ppo_continuous.py", mode, "r"])
            args, checkpoint = arguments.parse_args(Args, "ppo_continuous")
            if mode == "--evaluate":
                runs.evaluate(load_agent, args, check_args(args))
                continue
            with pytest.raises(SystemExit) as stopped:
                train(args, checkpoint)
            assert stopped.value.code == 0
    os.close(write)


@pytest.mark.parametrize("name", ["resume", "evaluate"])
def test_train_does_not_take_a_run_to_resume_for_a_new_one(name, capsys):
    with pytest.raises(SystemExit, match="2"):
        train(Args(env_id="Pendulum-v1", total_timesteps=64, **SHORT, **{name: "r"}))
    assert "is set, which only the command line takes" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_what_another_process_went_on_with_is_not_gone_back_from(monkeypatch, capsys):
    """It read the checkpoint before that one had saved its last, and got the lock after."""
    args = Args(
        env_id="Pendulum-v1", total_timesteps=640, checkpoint_every=64, run_dir="r", **SHORT
    )
    first = []
    save = runs.Run.save

    def keep(self, step, finished=False):
        save(self, step, finished)
        first.append(torch.load("r/checkpoint.pt")["state"])

    monkeypatch.setattr(runs.Run, "save", keep)
    train(args)
    assert first[2]["global_step"] < 640
    with pytest.raises(SystemExit) as stopped:
        train(dataclasses.replace(args, resume="r"), first[2])
    assert stopped.value.code == 2 and "another process meanwhile" in capsys.readouterr().err
    assert load_checkpoint("r/checkpoint.pt")["global_step"] == 640


def test_a_run_whose_config_was_never_on_disk_goes_on(capsys):
    args = Args(env_id="Pendulum-v1", total_timesteps=64, anneal_lr=False, run_dir="r", **SHORT)
    train(args)
    Path("r/config.json").write_text("")
    more = dataclasses.replace(args, resume="r", total_timesteps=128)
    train(more, load_checkpoint("r/checkpoint.pt"))
    assert "r/config.json is damaged" in capsys.readouterr().out
    assert load_checkpoint("r/checkpoint.pt")["global_step"] == 128


def test_a_config_to_which_other_code_is_added_is_never_half_written(monkeypatch):
    args = Args(env_id="Pendulum-v1", total_timesteps=64, anneal_lr=False, run_dir="r", **SHORT)
    train(args)
    begun = Path("r/config.json").read_text()
    more = dataclasses.replace(args, resume="r", total_timesteps=128)
    monkeypatch.setattr(runs.provenance, "code", lambda script: "other")
    with monkeypatch.context() as patch:  # killed while it writes
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(more, load_checkpoint("r/checkpoint.pt"))
    assert Path("r/config.json").read_text() == begun
    train(more, load_checkpoint("r/checkpoint.pt"))
    (resumed,) = json.loads(Path("r/config.json").read_text())["resumed"]
    assert (resumed["step"], resumed["code"]) == (64, "other")


def test_a_full_disk_ends_a_run_in_one_line(monkeypatch, capsys):
    """That TensorBoard meets first (its thread adds a traceback); the last checkpoint stays."""

    def full(*_):
        raise OSError(28, "No space left on device")

    args = Args(
        env_id="Pendulum-v1", total_timesteps=640, checkpoint_every=64, run_dir="r", **SHORT
    )
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("add_scalar", "flush"):
        with monkeypatch.context() as patch:
            due = runs.Run.due

            def fills(self, every, step):
                if step >= 192:
                    patch.setattr(self.writer, name, full)  # noqa: B023
                    patch.setattr(self.writer, "close", full)  # noqa: B023
                return due(self, every, step)  # noqa: B023

            patch.setattr(runs.Run, "due", fills)
            with pytest.raises(SystemExit) as stopped:
                train(dataclasses.replace(args, run_dir=name))
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 1 and f"error: {name} could not be written: " in line
        assert 0 < load_checkpoint(f"{name}/checkpoint.pt")["global_step"] < 640
        assert signal.getsignal(signal.SIGTERM) == handler


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    args = Args(env_id="Pendulum-v1", total_timesteps=64, anneal_lr=False, run_dir="r", **SHORT)
    for module, name in ((runs, "SummaryWriter"), (Path, "write_text"), (os, "fsync")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(module, name, full)
            train(args)
        said = capsys.readouterr().err
        assert stopped.value.code == 1 and "could not be written: [Errno 28]" in said, said
        assert said.startswith("error: r") and not Path("r").exists()
    train(args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(runs, "SummaryWriter", full)
        more = dataclasses.replace(args, resume="r", total_timesteps=128)
        train(more, load_checkpoint("r/checkpoint.pt"))
    assert stopped.value.code == 1 and load_checkpoint("r/checkpoint.pt")["finished"]


def test_a_run_may_have_neither_output_nor_errors_open(tmp_path):
    options = SHORT | {"env_id": "Pendulum-v1", "total_timesteps": 128, "run_dir": "r"}
    line = shlex.join(command(ROOT / "ppo_continuous.py", *flags(**options)))
    done = subprocess.run(["sh", "-c", f"exec {line} >&- 2>&-"], cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and load_checkpoint(tmp_path / "r/checkpoint.pt")["finished"]


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    program = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import ppo_continuous as ppo
from common import envs
def interrupted(self, actions):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
    time.sleep(100)
envs.Environments.send = interrupted
ppo.train(ppo.Args(env_id="Pendulum-v1", compile=False, run_dir="r"))
"""
    words = [sys.executable, "-c", program, str(ROOT)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130 and "interrupt again to quit at once" in done.stderr
    assert load_checkpoint(tmp_path / "r" / "checkpoint.pt")["global_step"] == 0


def test_a_worker_that_cannot_begin_ends_a_run_at_once(tmp_path):
    """While the others, which heed no signal, have begun."""
    words = flags(env_id="toy_envs:Unlucky-v0", compile=False, num_envs=3, vectorization="async")
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    options |= {"env": os.environ | {"PYTHONPATH": str(ROOT / "tests")}}
    done = subprocess.run(command(ROOT / "ppo_continuous.py", *words), **options, timeout=300)
    assert done.returncode == 1 and "port in use" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_worker_processes_end_with_one_that_ends_before_its_run(tmp_path, number):
    """Without a word by a signal, and at once where it fails."""
    program = f"""
import os, signal, sys, time
sys.path.insert(0, sys.argv.pop(1))
import ppo_continuous as ppo
from common import arguments, runs
def begin(*_, **__):
    {f"os.killpg(0, {int(number)}), time.sleep(100)" if number else "1 / 0"}
runs.Run.__init__ = begin
args, _ = arguments.parse_args(ppo.Args, ppo.SCRIPT)
ppo.train(args)
"""
    words = flags(env_id="Pendulum-v1", compile=False, **PROCESSES)
    words = [sys.executable, "-c", program, str(ROOT), *words]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "start_new_session": True}
    done = subprocess.run(words, **options, timeout=300)
    assert done.returncode == (128 + number if number else 1)
    assert not done.stderr if number else done.stderr.count("Traceback") == 1


def test_ctrl_c_while_compiling_says_how_to_go_on(monkeypatch, capsys):
    """It reaches the compiler too, which then fails."""

    def compile_function(*_):
        def update(*_):
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("CppCompileError")

        return update

    args = Args(env_id="Pendulum-v1", total_timesteps=640, run_dir="r", **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(compute, "compile_function", compile_function)
        with pytest.raises(SystemExit) as stopped:
            train(args)
    said = capsys.readouterr()
    assert stopped.value.code == 130 and "CppCompileError" in said.err
    assert "stopped at step 0; go on: python ppo_continuous.py --resume r\n" in said.out
    train(dataclasses.replace(args, resume="r"), load_checkpoint("r/checkpoint.pt"))
    assert load_checkpoint("r/checkpoint.pt")["global_step"] == 640


def test_a_tracked_run_goes_on_as_itself(run, tmp_path):
    """Whatever its folder is called; one that cannot be tracked leaves none behind."""
    wandb = tmp_path / "hidden" / "wandb" / "__init__.py"
    wandb.parent.mkdir(parents=True)
    log = tmp_path / "log"
    wandb.write_text(f"""
finished = []
def finish(exit_code=None):  # at the start a run before, in the same process
    finished.append(exit_code)
    print("finish", exit_code, file=open({str(log) + "2"!r}, "a"))
def init(**options):
    assert finished and options["sync_tensorboard"] and options["config"]["num_steps"] == 64
    assert options["config"]["resume"] or not list(options["dir"].glob("events*"))  # to see all
    names = [options[x] for x in ("id", "name", "resume", "project", "entity")]
    print(*names, file=open({str(log)!r}, "a"))
""")
    options = SHORT | {"env_id": "Pendulum-v1", "total_timesteps": 128, "anneal_lr": False}
    for run_dir in ("a/r", "b/r"):
        words = flags(**options, run_dir=run_dir, track=True)
        run("ppo_continuous.py", *words, cwd=tmp_path)
    words = ["--resume", "a/r", "--total-timesteps", 256]
    words += ["--wandb-project-name", "p", "--wandb-entity", "e"]
    run("ppo_continuous.py", *words, cwd=tmp_path)
    first, other, again = (line.split() for line in log.read_text().splitlines())
    assert Path(f"{log}2").read_text() == 3 * "finish None\nfinish 0\n"
    assert first[1:] == ["r", "allow", "single-file-rl", "None"] == other[1:]
    assert again == [*first[:3], "p", "e"] and first[0] != other[0]
    (tmp_path / "a" / "r" / "wandb_id").write_text("")  # it was never on disk
    run("ppo_continuous.py", "--resume", "a/r", "--total-timesteps", 320, cwd=tmp_path)
    identity = log.read_text().splitlines()[-1].split()[0]
    assert (
        len(identity) == 12 and (tmp_path / "a" / "r" / "wandb_id").read_text() == identity + "\n"
    )
    for error, said in (
        ("raise RuntimeError('not\\nlogged in')", "not logged in"),
        ("import signal; signal.raise_signal(2)", "KeyboardInterrupt"),  # where it asks for a key
    ):
        wandb.write_text(f"def finish(exit_code=None): pass\ndef init(**options):\n    {error}\n")
        words = flags(**options, run_dir="c", track=True)
        done = run("ppo_continuous.py", *words, cwd=tmp_path, check=False)
        assert done.returncode == 2 and done.stderr == f"error: --track: {said}\n"
        assert not (tmp_path / "c").exists()
    words = ["--resume", "a/r", "--total-timesteps", 512]
    assert run("ppo_continuous.py", *words, cwd=tmp_path, check=False).returncode == 2
    assert load_checkpoint(tmp_path / "a/r/checkpoint.pt")["global_step"] == 320


def test_a_tracked_run_has_failed_only_if_it_failed(monkeypatch, capsys):
    """And ends at once, also where it ends before its first step."""
    wandb, to_come, step = mock.Mock(), [signal.SIGINT], envs.Environments.step
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options = SHORT | {"total_timesteps": 1024, "track": True}

    def asked(self, action):
        if to_come:
            signal.raise_signal(to_come.pop())
        return step(self, action)

    for name, env_id, change in (
        ("nan", "toy_envs:Broken-reward-v0", ()),
        ("stopped", "Pendulum-v1", (envs.Environments, "step", asked)),
        ("full", "Pendulum-v1", (runs, "save_checkpoint", lambda *_: fail("full", code=1))),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            if change:
                patch.setattr(*change)
            train(Args(env_id=env_id, run_dir=name, **options))
    before, ends = wandb.finish.call_args_list[::2], wandb.finish.call_args_list[1::2]
    assert before == 3 * [mock.call()]
    assert ends == [mock.call(exit_code=code) for code in (1, 0, 1)]
    wandb.finish.side_effect = [None, ConnectionError("no network")]  # which no run is to fail for
    train(Args(env_id="Pendulum-v1", run_dir="whole", **options | {"total_timesteps": 64}))
    said = capsys.readouterr()
    assert "--track: ConnectionError('no network')\n" in said.err and "done: whole" in said.out


def test_more_steps_are_not_forgotten_by_a_kill(monkeypatch):
    """Before the first checkpoint on the way to them; nor are lost environments, whose episodes
    are to begin anew in everything.
    """
    options = SHORT | {"num_envs": 8, "env_id": "toy_envs:Unseeded-v0", "anneal_lr": False}
    args = Args(**options, total_timesteps=512, run_dir="r")
    train(args)
    before = load_checkpoint("r/checkpoint.pt")
    more = dataclasses.replace(args, resume="r", total_timesteps=1536)
    monkeypatch.setitem(sys.modules, "wandb", mock.Mock())
    changes = {"wandb_entity": "me", "track": True, "wandb_project_name": "p", "eval_every": 512}
    changes |= {"eval_episodes": 3, "checkpoint_every": 700}
    for count in range(7):  # one more each time
        change = dict(list(changes.items())[:count])
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(envs.Environments, "send", lambda *_: 1 / 0)
            train(dataclasses.replace(more, **change), load_checkpoint("r/checkpoint.pt"))
        kept = load_checkpoint("r/checkpoint.pt")["args"]
        assert {name: kept[name] for name in change} == change
    after = load_checkpoint("r/checkpoint.pt")
    for name, value in changes.items():
        assert after["args"].pop(name) == value != before["args"].pop(name)
    assert after["args"].pop("total_timesteps") == 1536 != before["args"].pop("total_timesteps")
    assert_same(after | {"args": None}, before | {"args": None})
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", "--resume", "r"])
    train(*arguments.parse_args(Args, "ppo_continuous"))
    assert load_checkpoint("r/checkpoint.pt")["global_step"] == 1536
    steps = [step for step, _ in scalars(Path("r"))["eval/episodic_return"]]
    assert steps == [512, 1024, 1536]


def test_the_bar_of_a_resumed_run_goes_on_where_it_was(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    args = Args(env_id="Pendulum-v1", total_timesteps=64, anneal_lr=False, run_dir="r", **SHORT)
    train(args)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    more = dataclasses.replace(args, resume="r", total_timesteps=128)
    seconds = itertools.count(0, 64)  # at every look at the clock
    clock = SimpleNamespace(perf_counter=lambda: next(seconds), time_ns=time.time_ns)
    monkeypatch.setattr(runs, "time", clock)
    train(more, load_checkpoint("r/checkpoint.pt"))
    assert " 128/128 " in sys.stderr.getvalue()
    last = EventAccumulator("r").Reload().Scalars("charts/SPS")[-1]
    assert (last.step, last.value) == (128, 1)  # 64 steps, in 64 s


@pytest.mark.parametrize("name", [{"exp_name": "x" * 300}, {"run_dir": "runs/" + "x" * 300}])
def test_a_folder_that_cannot_be_made_is_said_in_one_line(capsys, name):
    Path("runs").mkdir()
    with pytest.raises(SystemExit) as stopped:
        train(Args(env_id="Pendulum-v1", total_timesteps=64, **SHORT | name))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: --run-dir runs")
    assert "File name too long" in line and not list(Path("runs").iterdir())


def test_best_pt_outlives_a_resumption_that_is_not_exact(monkeypatch):
    """Of what was evaluated after the checkpoint only the best is known."""
    means = iter([5.0, math.nan, 3.0, 4.0, 6.0, 1.0])

    def play(*_):
        if math.isnan(mean := next(means)):
            raise KeyboardInterrupt
        return [mean] * 2, [5, 5]

    monkeypatch.setattr(envs, "play", play)
    args = Args(env_id="Pendulum-v1", total_timesteps=256, eval_every=64, run_dir="r", **SHORT)
    with pytest.raises(KeyboardInterrupt):
        train(args)
    best = load_checkpoint("r/best.pt")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(runs.Run, "due", lambda run, every, step: every and (step < 192 or 1 / 0))
        train(dataclasses.replace(args, resume="r"), load_checkpoint("r/checkpoint.pt"))
    assert best["global_step"] == 64 and best["best_return"] == 5
    assert_same(load_checkpoint("r/best.pt"), best)
    train(dataclasses.replace(args, resume="r"), load_checkpoint("r/checkpoint.pt"))
    assert load_checkpoint("r/best.pt")["best_return"] == 6


@each_script
def test_a_run_that_dies_in_its_last_evaluation_has_but_to_evaluate(
    script, options, monkeypatch, capsys
):
    options = options | {"total_timesteps": 128, "checkpoint_every": 0, "eval_episodes": 1}
    args = script.Args(**options, compile=False, run_dir="whole")
    begun = []
    with monkeypatch.context() as patch:
        note = runs.Run.__enter__
        patch.setattr(
            runs.Run, "__enter__", lambda x: (begun.append(x.parts["rng"].state_dict()), note(x))[1]
        )
        script.train(args)
    ended = load_checkpoint("whole/checkpoint.pt")["rng"]
    assert torch.equal(ended["torch"], begun[0]["torch"])  # all that is drawn is of a stream
    streams = {"action", "minibatch", "replay"} & ended.keys()
    assert len(streams) == 2 and not any(torch.equal(ended[x], begun[0][x]) for x in streams)
    args = dataclasses.replace(args, run_dir="r")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(envs, "play", lambda *_: 1 / 0)
        script.train(args)
    died = load_checkpoint("r/checkpoint.pt")
    assert died["global_step"] == 128 and not died["finished"]
    assert "done: r" not in capsys.readouterr().out
    write = save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # its events are on disk
        patch.setattr(
            runs, "save_checkpoint", lambda *x: 1 / 0 if x[1].get("finished") else write(*x)
        )
        script.train(dataclasses.replace(args, resume="r"), died)
    died = load_checkpoint("r/checkpoint.pt")
    assert not died["finished"]
    script.train(dataclasses.replace(args, resume="r"), died)
    assert_same_runs(Path("whole"), Path("r"), "best.pt")
    with pytest.raises(SystemExit) as stop:
        script.train(dataclasses.replace(args, resume="r"), load_checkpoint("r/checkpoint.pt"))
    assert stop.value.code == 0 and "r is finished" in capsys.readouterr().out
    shorter = dataclasses.replace(args, resume="r", total_timesteps=64)
    with pytest.raises(SystemExit) as stop:
        script.train(shorter, load_checkpoint("r/checkpoint.pt"))
    told = "error: --total-timesteps 64: the run is at step 128\n"
    assert stop.value.code == 2 and capsys.readouterr().err == told
    monkeypatch.setattr(sys, "argv", [script.SCRIPT, "--resume", "r/best.pt"])
    monkeypatch.setattr(arguments.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        arguments.parse_args(script.Args, script.SCRIPT)
    assert "--resume r/best.pt: takes the run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["evaluation", "broken evaluation", "last rollout"])
def test_ctrl_c_at_the_end_says_how_to_go_on(monkeypatch, capsys, when):
    """The evaluation, in which it may end a simulator, too, is not waited for."""

    to_come = [signal.SIGINT] if when == "last rollout" else []

    def play(*args, play=envs.play):
        if when != "last rollout":
            signal.raise_signal(signal.SIGINT)
        if when == "evaluation":
            return play(*args)
        raise BrokenPipeError

    def step(self, action, step=envs.Environments.step):
        if to_come:
            signal.raise_signal(to_come.pop())
        return step(self, action)

    monkeypatch.setattr(envs, "play", play)
    monkeypatch.setattr(envs.Environments, "step", step)
    with pytest.raises(SystemExit) as stop:
        train(Args(env_id="Pendulum-v1", total_timesteps=64, run_dir="r", **SHORT))
    assert stop.value.code == 130
    assert "stopped at step 64; go on: python ppo_continuous.py --resume r" in (
        capsys.readouterr().out
    )
    saved = load_checkpoint("r/checkpoint.pt")
    assert not saved["finished"] and "charts/SPS" in dict(saved["last_scalars"])


def test_ctrl_c_in_an_evaluation_on_the_way_waits_for_it(monkeypatch):
    """And for the checkpoint after it: what was learned before it is not lost."""

    def play(*args, play=envs.play):
        signal.raise_signal(signal.SIGINT)
        return play(*args)

    monkeypatch.setattr(envs, "play", play)
    options = SHORT | {"eval_every": 64, "checkpoint_every": 0, "run_dir": "r"}
    with pytest.raises(SystemExit, match="130"):
        train(Args(env_id="Pendulum-v1", total_timesteps=192, **options))
    assert load_checkpoint("r/checkpoint.pt")["global_step"] == 64
    assert [step for step, _ in scalars(Path("r"))["eval/episodic_return"]] == [64]


@pytest.mark.parametrize("error", [TypeError, KeyboardInterrupt])
def test_a_run_that_cannot_begin_leaves_no_folder(error, monkeypatch):
    monkeypatch.setattr(envs.Environments, "state_dict", mock.Mock(side_effect=error))
    with pytest.raises(error):
        train(Args(env_id="Pendulum-v1", total_timesteps=192, run_dir="r", **SHORT))
    assert not Path("r").exists()


def test_what_environments_draw_as_they_are_restored_is_not_missed_later(monkeypatch):
    """Rewards have noise of a generator of the process: the same as without the interruption."""
    args = Args(env_id="toy_envs:Hazy-v0", total_timesteps=384, checkpoint_every=64, **SHORT)
    train(dataclasses.replace(args, run_dir="whole"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(runs.Run, "due", lambda run, every, step: every and (step < 192 or 1 / 0))
        train(dataclasses.replace(args, run_dir="r"))
    checkpoint = load_checkpoint("r/checkpoint.pt")
    assert checkpoint["global_step"] == 128
    train(dataclasses.replace(args, run_dir="r", resume="r"), checkpoint)
    assert_same_runs(Path("whole"), Path("r"))


def test_two_runs_begun_in_one_second_have_two_folders(monkeypatch):
    milliseconds = itertools.count(10**18, 10**6)
    monkeypatch.setattr(time, "time_ns", lambda: next(milliseconds))
    args = Args(env_id="Pendulum-v1", total_timesteps=64, **SHORT)
    assert train(args) != train(args)


def test_a_run_goes_on_where_the_environment_does_not_repeat_itself(monkeypatch, capsys):
    """New episodes begin, so that no sum of discounted rewards goes on across the gap either."""
    options = SHORT | {"num_envs": 16, "anneal_lr": False, "run_dir": "r"}
    args = Args(env_id="toy_envs:Unseeded-v0", total_timesteps=1024, **options)
    train(args)
    checkpoint = load_checkpoint("r/checkpoint.pt")
    carry = checkpoint["agent"]["return_statistics.carry"]
    lost, carries = [], []
    load, update = envs.Environments.load_state_dict, ReturnStatistics.update_from_rewards

    def load_spy(self, state):
        load(self, state)
        lost.append(self.lost)

    def update_spy(self, *args):
        carries.append(self.carry.clone())
        update(self, *args)

    monkeypatch.setattr(envs.Environments, "load_state_dict", load_spy)
    monkeypatch.setattr(ReturnStatistics, "update_from_rewards", update_spy)
    capsys.readouterr()
    train(dataclasses.replace(args, resume="r", total_timesteps=3072), checkpoint)
    assert capsys.readouterr().out.count("new episodes") == 1
    (lost,) = lost
    expected = torch.where(torch.tensor(lost), 0.0, carry)
    assert np.any(lost) and len(carries) == 2 and torch.equal(carries[0], expected)
    assert load_checkpoint("r/checkpoint.pt")["global_step"] == 3072


@pytest.mark.parametrize("end", ["finished", "NaN", "full disk"])
def test_every_environment_is_closed(end, monkeypatch):
    def full(path, state, save=runs.save_checkpoint):
        if state["global_step"] == 128:
            fail("full", code=1)
        save(path, state)

    monkeypatch.setattr(toy_envs.Open, "alive", 0)
    if end == "NaN":
        monkeypatch.setattr(envs, "_number", lambda _: math.nan)
    if end == "full disk":
        monkeypatch.setattr(runs, "save_checkpoint", full)
    options = SHORT | {"total_timesteps": 128, "eval_every": 64, "run_dir": "r"}
    ended = contextlib.nullcontext() if end == "finished" else pytest.raises(SystemExit, match="1")
    with ended:
        train(Args(env_id="toy_envs:Open-v0", **options))
    assert Path("r").exists() and toy_envs.Open.alive == 0


def test_events_are_on_disk_before_a_checkpoint_of_their_step(monkeypatch):
    save, seen = runs.save_checkpoint, []

    def spy(path, state):
        if path.name == "checkpoint.pt" and state["global_step"]:
            seen.append(scalars(Path("r"))["charts/learning_rate"][-1][0] == state["global_step"])
        save(path, state)

    monkeypatch.setattr(runs, "save_checkpoint", spy)
    options = SHORT | {"total_timesteps": 192, "checkpoint_every": 64, "run_dir": "r"}
    train(Args(env_id="Pendulum-v1", **options))
    assert len(seen) > 2 and all(seen)


def test_a_run_begins_where_a_file_system_has_no_locks(monkeypatch):
    monkeypatch.setattr(runs.fcntl, "lockf", mock.Mock(side_effect=OSError(37, "No locks")))
    train(Args(env_id="Pendulum-v1", total_timesteps=64, run_dir="r", **SHORT))
    assert load_checkpoint("r/checkpoint.pt")["finished"]


def test_a_slow_reader_does_not_end_a_run():
    slow = mock.Mock()
    slow.flush.side_effect = BlockingIOError
    assert runs.say("a line", slow)


def test_a_run_is_not_trained_by_two_processes_at_once(capsys):
    args = Args(env_id="Pendulum-v1", total_timesteps=64, run_dir="r", **SHORT)
    train(args)
    hold = "import fcntl, sys; file = open('r/.lock', 'w'); "
    hold += "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    checkpoint = load_checkpoint("r/checkpoint.pt") | {"finished": False}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as other:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(SystemExit) as stop:
            train(dataclasses.replace(args, resume="r"), dict(checkpoint))
        assert stop.value.code == 2
        assert capsys.readouterr().err == "error: r is being trained by another process\n"
        other.stdin.close()
    train(dataclasses.replace(args, resume="r"), checkpoint)
