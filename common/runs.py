"""A run: its arguments, its folder, and what a person sees of it."""

import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

# what may be given anew; everything else comes from the run
ANEW = {
    "resume": {"total_timesteps", "checkpoint_every", "eval_every", "eval_episodes", "track"},
    "evaluate": {"eval_episodes", "render", "capture_video"},
}
# the range of a number, by its name, which means the same in every script
RANGES = {
    (
        1,
        math.inf,
    ): "total_timesteps num_envs num_steps num_minibatches minibatch_size update_epochs "
    "num_threads eval_episodes hidden_sizes",
    (0, math.inf): "seed checkpoint_every eval_every clip_coef ent_coef vf_coef",
    (0, 1): "gamma gae_lambda",
    (1e-12, math.inf): "learning_rate max_grad_norm target_kl",
}


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on standard error: code 2 for bad input, 1 for a run gone wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def flag(name: str) -> str:
    """Spell an argument as on the command line: `num_envs` is `--num-envs`."""
    return "--" + name.replace("_", "-")


def require(condition: bool, args, name: str, need: str) -> None:
    """End with one line, as `error: --num-envs 0: must be at least 1`, unless `condition` holds."""
    if not condition:
        fail(f"{flag(name)} {getattr(args, name)}: {need}")


def check_ranges(args) -> None:
    """End with one line if a number is out of its range."""
    for (low, high), names in RANGES.items():
        need = (
            f"from {low} to {high}"
            if high < math.inf
            else f"at least {low}"
            if low != 1e-12
            else "above 0"
        )
        for name in names.split():
            value = getattr(args, name, None)
            for x in value if isinstance(value, tuple) else [value] * (value is not None):
                require(low <= x <= high and x < math.inf, args, name, f"must be {need}")


def parse_args(args_class: type, script: str) -> tuple:
    """Return the arguments, and with --resume or --evaluate the checkpoint they are taken from."""
    args = tyro.cli(args_class)
    if args.resume and args.evaluate:
        fail("--resume and --evaluate exclude each other")
    mode = "resume" if args.resume else "evaluate"
    if not (run_dir := getattr(args, mode)):
        return args, None
    tokens = [x.split("=")[0][2:].replace("-", "_") for x in sys.argv[1:] if x[:2] == "--"]
    given = {x if hasattr(args, x) else x.removeprefix("no_") for x in tokens} - {mode}
    if given - ANEW[mode]:
        refused, allowed = (
            " ".join(map(flag, sorted(x))) for x in (given - ANEW[mode], ANEW[mode])
        )
        fail(f"{flag(mode)} takes {refused} from the run; what may be given anew: {allowed}")
    checkpoint = load_run(run_dir, script)
    stored = args_class(**checkpoint["args"])
    anew = {name: getattr(args, name) for name in given} | {mode: run_dir, "run_dir": run_dir}
    if (
        stored.anneal_lr
        and anew.get("total_timesteps", stored.total_timesteps) != stored.total_timesteps
    ):
        fail(f"--total-timesteps: the learning rate is annealed over {stored.total_timesteps}")
    return dataclasses.replace(stored, **anew), checkpoint


def load_run(run_dir: str | Path, script: str, name: str = "checkpoint.pt") -> dict:
    """Load a checkpoint of `script` from a run folder, or end with one line that says why not."""
    path = Path(run_dir) / name
    if not path.is_file():
        fail(f"{run_dir} is not a run folder: it has no {name}")
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        fail(str(error))
    if checkpoint["script"] != script:
        fail(f"{run_dir} was made by {checkpoint['script']}.py, not by {script}.py")
    return checkpoint


def setup_torch(args, faster: str) -> torch.device:
    """Set threads and determinism; return the device, `faster` being what auto takes."""
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    torch.set_num_threads(args.num_threads)
    device = faster if args.device == "auto" and torch.cuda.is_available() else args.device
    if device == "cuda" and args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device(device if device != "auto" else "cpu")


def compile_function(function: Callable, args) -> Callable:
    """Compile `function` into one graph, unless with --no-compile or where no compiler works."""
    if args.compile:
        try:
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(2))
            return torch.compile(function, fullgraph=True, dynamic=False)
        except (
            Exception
        ) as error:  # types differ between versions; none of them is about `function`
            args.compile = False
            print(f"running eagerly: no compiler (apt install g++ python3-dev): {error!r:.60}")
    return function


def due(every: int, before: int, step: int) -> bool:
    """Tell whether a multiple of `every` is in (before, step]; never, if it is 0."""
    return every > 0 and step // every > before // every


def describe(returns: list[float], lengths: list[int]) -> str:
    """Say in words how an evaluation went."""
    spread = f"{np.mean(returns):,.1f} ± {np.std(returns):,.1f} (least {min(returns):,.1f})"
    return f"evaluation of {len(returns)} episodes: return {spread}, length {np.mean(lengths):,.0f}"


class Run:
    """The run folder, and what a person sees of a run: TensorBoard, progress, Ctrl-C."""

    def __init__(
        self, args, script: str, last_step: int, device: torch.device, checkpoint: dict | None
    ):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
        if checkpoint is None and self.dir.exists():
            fail(f"--run-dir {self.dir}: it exists already; --resume {self.dir} continues it")
        self.args, self.script, self.last_step = args, script, last_step
        self.step = self.first_step = checkpoint["global_step"] if checkpoint else 0
        self.returns = deque(checkpoint["returns"] if checkpoint else [], maxlen=100)
        self.signal = 0  # the one that asked to stop
        if args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs wandb: pip install wandb")
        self.dir.mkdir(parents=True, exist_ok=checkpoint is not None)
        if args.track:
            ids = {
                "project": args.wandb_project_name,
                "entity": args.wandb_entity,
                "id": self.dir.name,
            }
            wandb.init(
                **ids, dir=self.dir, resume="allow", config=vars(args), sync_tensorboard=True
            )
        # readers drop what a killed run logged after its checkpoint, as it is logged again
        self.writer = SummaryWriter(str(self.dir), purge_step=self.step + 1 if checkpoint else None)
        if checkpoint is None:
            rows = "".join(f"|{key}|{value}|\n" for key, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            (self.dir / "config.json").write_text(json.dumps(self._config(device), indent=2) + "\n")
        auto = " (the faster here)" if args.device == "auto" else ""
        mode = "compiled" if args.compile else "eager"
        how = f"{device}{auto}, {args.num_threads} thread(s), {mode}"
        print(
            f"{self.dir}: {args.env_id}, {last_step:,} steps, seed {args.seed}, {how}", flush=True
        )

    def _config(self, device: torch.device) -> dict:
        git = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty",
        ]
        packages = ("torch", "gymnasium", "mujoco", "ale-py", "numpy")
        return {
            "script": self.script,
            "args": vars(self.args),
            "command": shlex.join(["python", *sys.argv]),
            "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in packages},
            "machine": {
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "device": str(device),
            },
            "num_threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }

    def __enter__(self) -> "Run":
        self._handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        silent = not sys.stderr.isatty()
        form = {"unit": "step", "unit_scale": True, "dynamic_ncols": True, "disable": silent}
        self.bar = tqdm(
            total=self.last_step, initial=self.step, desc="compiling" * self.args.compile, **form
        )
        self.start = self.printed = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.writer.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        tqdm.write("stopping at the next boundary; once more to leave at once", file=sys.stderr)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log scalars at an environment step."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def episode(self, episodic_return: float, length: int, step: int) -> None:
        """Log one finished training episode."""
        self.returns.append(episodic_return)
        self.scalars(
            {"charts/episodic_return": episodic_return, "charts/episodic_length": length}, step
        )

    def evaluation(self, returns: list[float], lengths: list[int], step: int) -> float:
        """Log one evaluation and return its mean return."""
        mean = float(np.mean(returns))
        self.scalars({"eval/episodic_return": mean, "eval/episodic_length": np.mean(lengths)}, step)
        if step == self.last_step:
            tqdm.write(describe(returns, lengths))
        return mean

    def progress(self, step: int) -> None:
        """Log the speed, and show it in a bar, or a line every ten seconds without a terminal."""
        now = time.perf_counter()
        speed = (step - self.first_step) / (now - self.start)
        recent = (
            f"return {np.mean(self.returns):,.1f} (last {len(self.returns)})"
            if self.returns
            else ""
        )
        self.scalars({"charts/SPS": speed}, step)
        self.bar.set_description(self.args.env_id, refresh=False)
        self.bar.set_postfix_str(recent, refresh=False)
        self.bar.update(step - self.step)
        if self.bar.disable and (
            now - self.printed > 10 or self.step == self.first_step or step == self.last_step
        ):
            left = tqdm.format_interval((self.last_step - step) / speed)
            share = f"{step:,} of {self.last_step:,} steps ({step / self.last_step:.0%})"
            print(f"{share} | {speed:,.0f} steps/s | {left} left | {recent}", flush=True)
            self.printed = now
        self.step = step

    def save(self, state: dict, name: str = "checkpoint.pt") -> None:
        """Write a checkpoint, once TensorBoard's events up to it are on disk."""
        self.writer.flush()
        about = {"script": self.script, "args": vars(self.args), "returns": list(self.returns)}
        save_checkpoint(self.dir / name, about | state)

    def leave_if_asked(self) -> None:
        """After a signal, leave with 128 + its number, saying how to go on."""
        if self.signal:
            self.bar.close()
            print(
                f"stopped at step {self.step:,}; go on: python {self.script}.py --resume {self.dir}"
            )
            raise SystemExit(128 + self.signal)

    def abort(self, message: str) -> NoReturn:
        """End a run gone wrong; its last checkpoint stays."""
        self.bar.close()
        fail(f"{message}; the last good checkpoint is {self.dir / 'checkpoint.pt'}", code=1)
