"""A run: its arguments, its folder, and what a person sees of it."""

import argparse
import ctypes
import dataclasses
import fcntl
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import NoReturn

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import atari, envs, fail, failing
from common.checkpoint import load_run, save_checkpoint

MISFIT = "does not fit the script or environment as it is now"  # one of them was edited, say
# what may be given anew; everything else comes from the run
ANEW = {"evaluate": "eval_episodes eval_e capture_video render"}
ANEW["resume"] = (
    "eval_episodes eval_e capture_video total_timesteps checkpoint_every eval_every track"
)
# what a number must be, by its name
RANGES = {
    (1, math.inf, "at least 1"): "total_timesteps num_envs num_steps num_minibatches "
    "minibatch_size update_epochs eval_episodes hidden_sizes buffer_size batch_size n_step "
    "policy_frequency target_network_frequency train_frequency log_every",
    (0, math.inf, "at least 0"): "seed checkpoint_every eval_every clip_coef ent_coef vf_coef "
    "learning_starts num_threads priority_alpha",
    (0, 1, "from 0 to 1"): "gamma gae_lambda tau start_e end_e eval_e exploration_fraction "
    "sticky_actions priority_beta",
    (1e-12, math.inf, "above 0"): "learning_rate policy_lr q_lr max_grad_norm target_kl utd_ratio "
    "alpha",
}
# flags that have no effect without another
EFFECTIVE_WITH = {"lr_schedule": "anneal_lr", "alpha": "no_autotune"}
EFFECTIVE_WITH |= {"priority_alpha": "prioritized", "priority_beta": "prioritized"}
# for --torch-deterministic; cuBLAS reads it once in a process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
MOST_THREADS = min(4, torch.get_num_threads())  # before a run sets them


def flag(name: str) -> str:
    """Spell an argument as on the command line: `num_envs` is `--num-envs`."""
    return "--" + name.replace("_", "-")


def require(condition: bool, args, name: str, need: str) -> None:
    """End with one line, as `error: --num-envs 0: must be at least 1`, unless `condition` holds."""
    if not condition:
        fail(f"{flag(name)} {getattr(args, name)}: must {need}")


def check_ranges(args) -> None:
    """End with one line if a number is out of its range, or the run could not begin."""
    new = args.resume is None and args.evaluate is None
    if new and args.run_dir and Path(args.run_dir).exists():
        resume = Path(args.run_dir, "checkpoint.pt").exists()
        what = (
            f"--resume {args.run_dir} continues it" if resume else "there is no run to resume in it"
        )
        fail(f"--run-dir {args.run_dir}: it exists already; {what}")
    folder = Path(args.run_dir or "runs/new").absolute()
    above = next(path for path in folder.parents if os.path.exists(path))
    if new and not os.access(above, os.W_OK | os.X_OK):
        fail(f"--run-dir {folder}: nothing can be written into {above}")
    for name, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, name) and (name != "track" or args.evaluate is None):
            with failing(f"{flag(name)} needs {package}: pip install {package}", ImportError):
                import_module(package)
    for (low, high, need), names in RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            for x in value if isinstance(value, tuple) else [value] * (value is not None):
                require(low <= x <= high and x < math.inf, args, name, f"be {need}")
    for name, other in EFFECTIVE_WITH.items():
        if new and getattr(args, name, None) != getattr(type(args), name, None):
            switch = other.removeprefix("no_")
            on = getattr(args, switch, switch == other) == (switch == other)
            require(on, args, name, f"go with {flag(other)}")


def parse_args(args_class: type, script: str, atari_defaults: dict | None = None) -> tuple:
    """Return the arguments, and with --resume or --evaluate the checkpoint they are taken from."""
    signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))  # until there is a run
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env-id", "--env_id", default=args_class.env_id)
    game = atari.find_game(parser.parse_known_args()[0].env_id)
    args = tyro.cli(args_class, default=args_class(**atari_defaults or {}) if game else None)
    if args.resume is not None and args.evaluate is not None:
        fail("--resume and --evaluate exclude each other")
    if args.render and args.evaluate is None:
        fail("--render goes with --evaluate")
    mode = "resume" if args.resume is not None else "evaluate"
    if (run_dir := getattr(args, mode)) is None:
        return args, None
    tokens = [x.split("=")[0][2:].replace("-", "_") for x in sys.argv[1:] if x[:2] == "--"]
    given = {x if hasattr(args, x) else x.removeprefix("no_") for x in tokens} - {mode}
    allowed = {name for name in ANEW[mode].split() if hasattr(args, name)}
    if refused := given - allowed:
        refused, allowed = (" ".join(map(flag, sorted(x))) for x in (refused, allowed))
        fail(f"{flag(mode)} takes {refused} from the run; what may be given anew: {allowed}")
    if {"render", "capture_video"} <= given:
        fail("--render and --capture-video exclude each other")
    if mode == "resume" and Path(run_dir).is_file():
        fail(f"--resume {run_dir}: takes the run's folder")
    checkpoint = load_run(run_dir, script)
    if mode == "evaluate" and checkpoint["device"] == "cuda" and not torch.cuda.is_available():
        print("trained on CUDA, evaluated on the CPU: it rounds differently")
        checkpoint["device"] = "cpu"
    with failing(f"{run_dir} was made by a script with other arguments", TypeError):
        stored = args_class(**checkpoint["args"])
    if "total_timesteps" in given and args.total_timesteps != stored.total_timesteps:
        for schedule in ("anneal_lr", "exploration_fraction", "prioritized"):
            if getattr(stored, schedule, False):
                fail(f"--total-timesteps: {flag(schedule)} depends on it, in this run")
    anew = {name: getattr(args, name) for name in given} | {mode: run_dir, "run_dir": run_dir}
    anew["device"] = checkpoint["device"]  # not auto: a GPU may have come or gone
    return dataclasses.replace(stored, **anew), checkpoint


def setup_torch(args, faster: str) -> torch.device:
    """Set threads, precision and determinism; return the device.

    `faster` is what auto takes: cuda for large networks. For them, and for layers of 256 units,
    "medium" precision lets the CPU multiply with oneDNN, on some twice as fast as MKL; it is not
    kept where the error shows that products are in TF32 or bfloat16. (Convolutions of cuDNN take
    TF32 where they can, as is PyTorch's default.)
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        advice = "use --device cpu" if args.resume is None else "the run was begun on one"
        fail(f"--device cuda: PyTorch finds no CUDA device; {advice}")
    auto = faster if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    large = faster == "cuda"
    if args.bf16 and args.evaluate is None:
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            fail("--bf16: this GPU does not compute in bfloat16")
        onednn = torch.backends.mkldnn.is_available()
        if device.type == "cpu" and not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            print("--bf16: this processor has no bfloat16, which makes it many times slower")
    args.num_threads = args.num_threads or (MOST_THREADS if large else 1)
    # Adam's averages of a dead unit decay below 1e-38, where arithmetic is far slower. Set before
    # PyTorch's threads begin, which inherit it
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.num_threads)
    deterministic = device.type == "cuda" and args.torch_deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # a run before may have
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel for each tensor
    if large and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # glibc gives memory back too readily: page faults cost a quarter
        libc.mallopt(-3, 2**25)  # of an update (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    wide = large or max(args.hidden_sizes, default=0) >= 256
    torch.set_float32_matmul_precision("medium" if wide else "highest")
    if (x @ x - x.double() @ x.double()).abs().max() > 1e-4:
        torch.set_float32_matmul_precision("highest")
    return device


def compile_function(function: Callable, args, device: torch.device) -> Callable:
    """Compile a plain function into one graph, unless with --no-compile or without a compiler.

    Guards check a call's inputs alone, so what changes during a run must be one; kernels are called
    from C++. Both together take a third off a small update.
    """
    # what is chosen by timing it, a resumed run might choose otherwise
    timed = {"shape_padding": False, "dynamic_scale_rblock": False}
    options = {"cpp_wrapper": True} if device.type == "cpu" else timed
    if args.compile:
        try:
            x = torch.zeros(2, device=device)
            torch.compile(lambda x: x + 1, fullgraph=True, options=options)(x)
        except Exception as error:  # its type depends on the version; it is not about `function`
            args.compile = False
            advice = " (no compiler? apt install g++ python3-dev)" * (device.type == "cpu")
            print(f"running eagerly{advice}: {repr(error).split(chr(92))[0]:.200}")
    if not args.compile:
        return function
    inputs = {"", *inspect.signature(function).parameters}  # "" is PyTorch's own state
    named = re.compile(r"\w*")  # of x, or of batch[0]
    options["guard_filter_fn"] = lambda guards: [named.match(x.name)[0] in inputs for x in guards]
    # what is compiled is kept by code object: without the other checks, a second run in this
    # process would take the first one's, so each has a copy
    code, rest = function.__code__.replace(), (None, function.__defaults__, function.__closure__)
    function = FunctionType(code, function.__globals__, *rest)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
    called = False

    def call(*inputs):
        nonlocal called
        if not called:  # which takes seconds, in SAC and DQN well after the start
            called = True
            tqdm.write(f"compiling {function.__name__}")
            sys.stdout.flush()
        return compiled(*inputs)

    return call


def describe(returns: list[float], lengths: list[int]) -> str:
    """Say in words how an evaluation went."""
    spread = f"{np.mean(returns):,.1f} ± {np.std(returns):,.1f} (least {min(returns):,.1f})"
    return f"evaluation of {len(returns)} episodes: return {spread}, length {np.mean(lengths):,.0f}"


def evaluate(load_agent: Callable, args, spaces: tuple) -> None:
    """Play the episodes of --evaluate in an environment of these spaces, and say how it went."""
    device = setup_torch(args, faster="cuda")
    with failing(f"{args.evaluate} {MISFIT}", KeyError, RuntimeError):
        agent = load_agent(args.evaluate, device=device)
        if (shape := np.shape(agent.act(spaces[0].sample()))) != spaces[1].shape:
            raise RuntimeError(f"actions {list(shape)}, where {list(spaces[1].shape)} are taken")
    where = Path(args.evaluate)
    print(describe(*envs.play(agent.act, args, where.parent if where.is_file() else where)))


def processor() -> str:
    """Return the processor's name."""
    about = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", about.read_text() if about.exists() else "", re.M)
    return names[0] if names else platform.processor()


def commit() -> str:
    """Return git's commit, with -dirty where a Python file is changed or new; "" without git."""
    root, words = Path(__file__).parent.parent, ("rev-parse HEAD", "status --porcelain -- *.py")
    git = [["git", "-C", str(root), *x.split()] for x in words]
    try:
        done = [subprocess.run(x, capture_output=True, text=True).stdout.strip() for x in git]
    except OSError:  # no git
        return ""
    return done[0] + "-dirty" * bool(done[1])


def code(script: str) -> str:
    """Return a fingerprint of what a run of `script` executes: its file, and common/."""
    root = Path(__file__).parent.parent
    files = [root / f"{script}.py", *sorted(root.glob("common/*.py"))]
    content = b"".join(path.read_bytes() for path in files if path.exists())
    return hashlib.sha256(content).hexdigest()[:12]


def provenance(device: torch.device) -> dict:
    """Return what a result depends on beyond its arguments: command line, commit, versions, ..."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    packages = ("torch", "gymnasium", "mujoco", "ale-py", "numpy")
    versions = {name: version(name) for name in packages}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit() or None,
        "versions": {"python": platform.python_version()} | versions,
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "device": name,
        },
        "num_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


class Run:
    """The run folder, and what a person sees of a run: TensorBoard, progress, Ctrl-C.

    `parts` are all that decides how training goes on, by name. A checkpoint has the state_dict of
    each, and they are loaded from `checkpoint`, if there is one.
    """

    def __init__(self, args, script: str, last_step: int, device, checkpoint, parts: dict):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
        self.args, self.script, self.last_step, self.parts = args, script, last_step, parts
        history = {"global_step": 0, "returns": [], "best_return": -math.inf, "finished": False}
        history |= checkpoint or {}
        self.step = self.first_step = history["global_step"]
        self.returns = deque(history["returns"], maxlen=100)
        self.best_return = history["best_return"]
        self.signal, self.saved = 0, self.step  # the one that asked to stop; the last checkpoint
        if self.step > last_step:
            fail(f"--total-timesteps {args.total_timesteps}: the run is at step {self.step:,}")
        if history["finished"] and self.step == last_step:
            print(f"{self.dir} is finished; to see it: --evaluate {self.dir}")
            raise SystemExit(0)
        self.device = device.type
        if checkpoint:  # a replay is not to stay in memory twice; user's errors are their own
            parts["envs"].load_state_dict(checkpoint.pop("envs"))
            with failing(f"{self.dir} {MISFIT}", KeyError, RuntimeError):
                for name in [name for name in parts if name != "envs"]:
                    parts[name].load_state_dict(checkpoint.pop(name))
        config = {"script": script, "args": vars(args), "code": code(script)} | provenance(device)
        with failing(f"--run-dir {self.dir}", OSError):
            self.dir.mkdir(parents=True, exist_ok=checkpoint is not None)
            self._lock()
        if args.track:
            self._track(new=checkpoint is None)
        # readers drop what a killed run logged after its checkpoint, as it is logged again
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if checkpoint else None)
        self._keep_config(config, new=checkpoint is None)
        self._introduce()
        if checkpoint is None:
            self.save(0)

    def _lock(self) -> None:  # as long as the process lives
        self._locked = (self.dir / "lock").open("w")
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"{self.dir} is being trained by another process")

    def _track(self, new: bool) -> None:
        import wandb

        args, identity = self.args, self.dir / "wandb_id"
        if not identity.exists():  # a folder's name may be another run's too
            identity.write_text(f"{uuid.uuid4().hex[:12]}\n")
        ids = {"project": args.wandb_project_name, "entity": args.wandb_entity}
        ids |= {"id": identity.read_text().strip(), "name": self.dir.name, "dir": self.dir}
        try:
            wandb.init(**ids, resume="allow", config=vars(args), sync_tensorboard=True)
        except Exception as error:  # wandb has many
            if new:
                shutil.rmtree(self.dir)
            fail(f"--track: {error}")

    def _keep_config(self, config: dict, new: bool) -> None:  # or say what is not as it was kept
        path = self.dir / "config.json"
        if new:
            rows = "".join(f"|{key}|{value}|\n" for key, value in config["args"].items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            path.write_text(json.dumps(config, indent=2) + "\n")
        elif path.exists():
            before = json.loads(path.read_text())
            if other := [x for x in ("code", "versions", "machine") if before.get(x) != config[x]]:
                print(f"not as it was begun: {', '.join(other)}; it goes on, perhaps not exactly")

    def _introduce(self) -> None:
        args, last_step = self.args, self.last_step
        why = "the faster here" if torch.cuda.is_available() else "no CUDA here"
        auto = f" ({why})" if args.device == "auto" else ""
        mode = ("compiled" if args.compile else "eager") + ", bfloat16" * args.bf16
        how = f"{self.device}{auto}, {args.num_threads} thread(s), {mode}"
        print(f"{self.dir}: {args.env_id}, {last_step:,} steps, seed {args.seed}, {how}")
        if atari.find_game(args.env_id):
            rewards = "clipped for learning" if args.clip_reward else "learned from as they are"
            print(f"{atari.PROTOCOL}; {rewards}; sticky actions {args.sticky_actions:g}")
        elif getattr(args, "clip_reward", False):
            print("--clip-reward: only the signs of rewards are learned from")
        if (begin := getattr(args, "learning_starts", 0)) >= last_step:
            print(f"nothing is learned: --learning-starts {begin} is not below {last_step}")
        sys.stdout.flush()

    def __enter__(self) -> "Run":
        self._handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        form = {"unit": "step", "unit_scale": True, "dynamic_ncols": True, "disable": None}
        self.bar = tqdm(desc=self.args.env_id, total=self.last_step, initial=self.step, **form)
        self.start = self.printed = time.perf_counter()
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _) -> None:
        try:
            if error is None and self.step == self.last_step:
                self._finish()
        except Exception as raised:
            error = raised
            if not self.signal:
                raise
        finally:
            self.bar.close()
            self.writer.close()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if error is None and self.step == self.last_step:
            print(f"done: {self.dir}")
            self.parts["envs"].close()
        if self.signal and isinstance(error, Exception):  # Ctrl-C ends a compiler too
            print(f"ended by {error!r:.200}", file=sys.stderr)
            self._leave()

    def _finish(self) -> None:  # saved first: an evaluation is long, and plays in a user's code
        if self.saved < self.step:
            self.save(self.step)
        if self.signal:
            self._leave()
        self.evaluate(self.parts["agent"], self.step)
        self.save(self.step, finished=True)

    def _leave(self) -> NoReturn:
        script = sys.argv[0] if Path(sys.argv[0]).stem == self.script else f"{self.script}.py"
        resume = shlex.join(["python", script, "--resume", str(self.dir)])
        tqdm.write(f"stopped at step {self.saved:,}; go on: {resume}")
        raise SystemExit(128 + self.signal)

    def _stop(self, number: int, _frame) -> None:
        if self.signal:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)
        self.signal = number
        tqdm.write("stopping at the next boundary; once more to leave at once", file=sys.stderr)

    def due(self, every: int, step: int) -> bool:
        """Tell if a multiple of `every` was passed since the last progress, before the end."""
        return step < self.last_step and every > 0 and step // every > self.step // every

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log scalars at an environment step; a name without a section belongs to losses/."""
        for name, value in values.items():
            self.writer.add_scalar(name if "/" in name else f"losses/{name}", value, step)

    def episodes(self, finished: list[tuple[float, int, int]]) -> None:
        """Log finished training episodes: return, length, last step of each."""
        for total, length, step in finished:
            self.returns.append(total)
            self.scalars({"charts/episodic_return": total, "charts/episodic_length": length}, step)

    def evaluate(self, agent: torch.nn.Module, step: int) -> None:
        """Evaluate, log, and save the agent to best.pt if it never was as good."""
        returns, lengths = envs.play(agent.act, self.args, self.dir)
        mean = float(np.mean(returns))
        self.scalars({"eval/episodic_return": mean, "eval/episodic_length": np.mean(lengths)}, step)
        if step == self.last_step:
            tqdm.write(describe(returns, lengths))
        if mean > self.best_return:
            self.best_return = mean
            self._write("best.pt", {"global_step": step, "agent": agent.state_dict()})

    def progress(self, step: int) -> None:
        """Log the speed, and show it in a bar, or a line every ten seconds without a terminal.

        After a signal, leave with 128 + its number, saying how to go on.
        """
        now = time.perf_counter()
        speed = (step - self.first_step) / (now - self.start)
        known = f"return {np.mean(self.returns or 0):,.1f} (last {len(self.returns)})"
        recent = known if self.returns else ""
        self.scalars({"charts/SPS": speed}, step)
        self.bar.set_postfix_str(recent, refresh=False)
        self.bar.update(step - self.step)
        edge = self.step == self.first_step or step == self.last_step
        if self.bar.disable and (edge or now - self.printed > 10):
            left = tqdm.format_interval((self.last_step - step) / speed)
            share = f"{step:,} of {self.last_step:,} steps ({step / self.last_step:.0%})"
            print(f"{share} | {speed:,.0f} steps/s | {left} left | {recent}", flush=True)
            self.printed = now
        self.step = step
        if self.signal and self.saved == step < self.last_step:
            self._leave()

    def save(self, step: int, finished: bool = False) -> None:
        """Write a checkpoint, once TensorBoard's events up to it are on disk."""
        self.writer.flush()
        state = {"returns": list(self.returns), "best_return": self.best_return}
        state["finished"] = finished
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        self._write("checkpoint.pt", {"global_step": step} | state)
        self.saved = step

    def _write(self, name: str, state: dict) -> None:
        about = {"script": self.script, "args": vars(self.args), "device": self.device}
        save_checkpoint(self.dir / name, about | state)

    def require_finite(self, what: str, *values: np.ndarray | torch.Tensor) -> None:
        """End a run gone wrong, which leaves its last good checkpoint."""
        if not all(torch.as_tensor(x).isfinite().all() for x in values):
            self.bar.close()
            kept = f"the last good checkpoint is {self.dir / 'checkpoint.pt'}"
            fail(f"{what} became NaN or infinite at step {self.step:,} or later; {kept}", code=1)
