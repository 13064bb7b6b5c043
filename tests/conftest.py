"""What the tests share: running a script as a user does, and reading what it left."""

import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)

import dqn_atari  # noqa: E402
import ppo_continuous  # noqa: E402
import ppo_discrete  # noqa: E402
import sac_continuous  # noqa: E402
from common import arguments  # noqa: E402
from common.checkpoint import load_checkpoint  # noqa: E402

# short runs of everything that is learned with
PPO = {"num_envs": 2, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2}
PPO |= {"norm_obs": True, "norm_reward": True}
REPLAY = {"num_envs": 2, "buffer_size": 200, "learning_starts": 40, "batch_size": 8}
REPLAY |= {"log_every": 20, "checkpoint_replay": True, "num_threads": 1}
DQN = REPLAY | {"double": True, "dueling": True, "prioritized": True, "n_step": 3}
PIXELS = {"env_id": "pixel_envs:SmallCatch-v0", "max_grad_norm": 1.0}
PIXELS |= {"target_network_frequency": 48}  # so that it moves
CASES = {
    "ppo": (ppo_continuous, PPO | {"env_id": "Pendulum-v1"}),
    "ppo-squash": (ppo_continuous, PPO | {"env_id": "Pendulum-v1", "squash": True}),
    "ppo-discrete": (ppo_discrete, PPO | {"env_id": "CartPole-v1", "target_kl": 1.0}),
    "ppo-atari": (ppo_discrete, PPO | {"env_id": "ALE/Breakout-v5", "norm_obs": False}),
    "sac": (sac_continuous, REPLAY | {"env_id": "Pendulum-v1", "hidden_sizes": (32, 32)}),
    "dqn": (dqn_atari, REPLAY | PIXELS),
    "dqn-all": (dqn_atari, DQN | PIXELS),
}
each_case = pytest.mark.parametrize("script, options", CASES.values(), ids=CASES)
each_script = pytest.mark.parametrize(
    "script, options", [CASES[x] for x in ("ppo", "ppo-discrete", "sac", "dqn-all")]
)
needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++"))
    or not Path(sysconfig.get_path("include"), "Python.h").exists()
    or os.statvfs(tempfile.gettempdir()).f_flag & getattr(os, "ST_NOEXEC", 0),
    reason="needs a C++ compiler, Python's headers and a place for programs",
)
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")
LONGEST = "test_resume test_dqn test_ppo_training test_sac test_common test_benchmarks".split()


def pytest_collection_modifyitems(items):
    """Longest modules first, so that both workers end together."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.module.__name__, len(LONGEST)))


@pytest.fixture(params=[ppo_continuous, ppo_discrete], ids=lambda module: module.SCRIPT)
def ppo(request):
    """Each of the two scripts."""
    return request.param


def flags(**kwargs) -> list[str]:
    """Spell arguments as on a command line."""
    words = []
    for name, value in kwargs.items():
        if isinstance(value, bool):
            words.append(arguments.flag(name if value else "no_" + name))
        else:
            words += [
                arguments.flag(name),
                *map(str, value if isinstance(value, tuple) else [value]),
            ]
    return words


def command(*args) -> list[str]:
    return [sys.executable, *(str(arg) for arg in args)]


def run_script(script: str, *args, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script from the repository in `cwd`, with the tests' own environments importable."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        command(ROOT / script, *args),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# imports once what takes seconds, then forks a process for every line of what it is to run, and how
FORK = """
import json, os, runpy, socket, sys, time
import common.arguments, common.tensors, gymnasium.envs.mujoco.mujoco_env, torch._inductor
print("ready", flush=True)
for line in sys.stdin:
    script, words, cwd, path, environment = json.loads(line)
    if not (child := os.fork()):
        os.chdir(cwd), os.environ.clear(), os.environ.update(environment)
        # events of one second are read in the order of their files' names: host, then process
        socket.gethostname = lambda: str(time.time_ns())
        for number in (1, 2):
            os.dup2(os.open(f"{cwd}.{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        # without '', where a script started by its path has its own folder
        sys.argv, sys.path[:] = [script, *words], [*path, *filter(None, sys.path)]
        try:
            runpy.run_path(script, run_name="__main__")
            sys.exit(0)
        except SystemExit as stop:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(stop.code)  # at once: to take all libraries down takes a second
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def run():
    """As run_script, in a process that finds all libraries imported already."""
    options = {"stdin": -1, "stdout": -1, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORK], cwd=ROOT, **options) as process:

        def call(script: str, *args, cwd: Path, check=True, meanwhile=None) -> SimpleNamespace:
            """`meanwhile`, if given, is called with the process's number while it runs."""
            path = [str(ROOT), str(cwd / "hidden"), str(ROOT / "tests")]
            line = [str(ROOT / script), [str(arg) for arg in args], str(cwd), path]
            line.append(os.environ | {"COLUMNS": "300"})  # of --help
            print(json.dumps(line), file=process.stdin, flush=True)
            pid = int(process.stdout.readline())
            watchdog = threading.Timer(300, os.kill, (pid, signal.SIGKILL))
            watchdog.start()
            try:
                if meanwhile:
                    meanwhile(pid)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise
            finally:  # its line is read in any case, else the next call would
                ended = process.stdout.readline()
                hung = not watchdog.is_alive()
                watchdog.cancel()
            assert not hung, f"{script} took more than five minutes"
            code = int(ended)
            out, err = (cwd.with_name(f"{cwd.name}.{n}").read_text() for n in (1, 2))
            assert not check or code == 0, out + err
            return SimpleNamespace(returncode=code, stdout=out, stderr=err)

        assert process.stdout.readline() == "ready\n"  # tests may time their runs
        yield call
        process.kill()  # processes forked meanwhile may keep its stdin open


def kill_after_checkpoint(
    run, script: str, words: list[str], checkpoint: Path, cwd: Path, least: int = 1
) -> bool:
    """Start a run and kill it at a random moment after its next checkpoint, unless it has ended.

    The checkpoint is of step `least` or a later one; that of step 0 is from before all learning.
    """

    def saved() -> int:
        return load_checkpoint(checkpoint)["global_step"] if checkpoint.exists() else -1

    enough = max(least, saved() + 1)

    def kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            last = now = None
            while now == last or saved() < enough:  # read only once it is another
                os.kill(pid, 0)  # raises once it has ended
                time.sleep(0.005)
                last, now = now, checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
            time.sleep(random.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)

    done = run(script, *words, cwd=cwd, check=False, meanwhile=kill)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything TensorBoard shows of a run but the speed: tag -> [(step, value)]."""
    reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def read_args(script: str) -> dict[str, tuple[str, str]]:
    """Annotation and help of every argument of a script, as written."""
    statements = ast.parse((ROOT / script).read_text()).body
    (args,) = (x for x in statements if isinstance(x, ast.ClassDef) and x.name == "Args")
    pairs = zip(args.body[1::2], args.body[2::2], strict=True)
    return {x.target.id: (ast.unparse(x.annotation), about.value.value) for x, about in pairs}


def assert_same(a, b) -> None:
    """Equality to the last bit, through dictionaries, sequences, arrays and tensors."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, (str, bytes, int, type(None))):
        assert a == b
    elif not (isinstance(a, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)):
        torch.testing.assert_close(
            torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0, equal_nan=True
        )


def assert_same_runs(a, b, *also: str) -> None:
    """The same state to the last bit, down to the environments, and the same scalars."""
    for name in ("checkpoint.pt", *also):
        whole, resumed = (load_checkpoint(run_dir / name) for run_dir in (a, b))
        for state in (whole, resumed):
            del state["args"]  # of which --run-dir and --resume differ
        assert_same(whole, resumed)
    assert_same(scalars(a), scalars(b))


def assert_killed_ends_as_whole(script: str, options: dict, cwd: Path, run):
    """Kill a run at random moments, resume it, and compare with one that was never stopped.

    Up to twice, at first maybe before it learns; or once, later, where processes have to compile.
    """
    most, least = (1, 1) if options.get("compile", True) else (2, 0)
    run(script, *flags(**options | {"run_dir": "whole"}), cwd=cwd)
    words = flags(**options | {"run_dir": "killed"})
    checkpoint, kills = cwd / "killed" / "checkpoint.pt", 0
    while kills < most and kill_after_checkpoint(run, script, words, checkpoint, cwd, least):
        kills, words = kills + 1, ["--resume", "killed"]
        assert kills > 1 or load_checkpoint(checkpoint)["global_step"] < options["total_timesteps"]
    assert kills > 0
    run(script, "--resume", "killed", cwd=cwd)
    whole = load_checkpoint(cwd / "whole" / "checkpoint.pt")
    assert whole["global_step"] == options["total_timesteps"]
    assert_same_runs(cwd / "whole", cwd / "killed", "best.pt")


@pytest.fixture(autouse=True)
def in_tmp_path(request, tmp_path, monkeypatch):
    """Tests write where they may, see a GPU where they should, and no repository of the user's."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    # events of one second are read in the order of their files' names, in which 10 is before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(1000))
    if request.module.__name__ != "test_cuda":  # others look into runs as the CPU has them
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that they start
        monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # an old driver would warn
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def handlers_and_settings():
    """A script's own, which it sets, stay in the test that runs one in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)
