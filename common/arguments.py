"""Arguments: from the command line or from a run, and whether they can work."""

import argparse
import dataclasses
import math
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import tyro

from common import atari, fail, failing
from common.runs import ASKED, KEPT, leave, load_run

# what may be given anew; everything else comes from the run
ANEW = {"resume": KEPT, "evaluate": {"eval_episodes", "eval_e", "capture_video", "render"}}
# arguments with a schedule over the whole run, which then cannot be made longer
SCHEDULES = ("anneal_lr", "exploration_fraction", "prioritized")
# what a number must be, by its name
RANGES = {
    (1, math.inf, "at least 1"): "total_timesteps num_envs num_steps num_minibatches "
    "minibatch_size update_epochs eval_episodes buffer_size n_step policy_frequency "
    "target_network_frequency train_frequency log_every",
    (0, math.inf, "at least 0"): "seed checkpoint_every eval_every clip_coef ent_coef vf_coef "
    "learning_starts priority_alpha",
    (0, 1024, "from 0 to 1024"): "num_threads",
    (1, 10**5, "from 1 to 100000"): "hidden_sizes batch_size",
    (0, 1, "from 0 to 1"): "gamma gae_lambda tau start_e end_e eval_e exploration_fraction "
    "sticky_actions priority_beta",
    (1e-12, math.inf, "above 0"): "learning_rate policy_lr q_lr max_grad_norm target_kl utd_ratio "
    "alpha",
}
# flags that have no effect without another
EFFECTIVE_WITH = {"lr_schedule": "anneal_lr", "alpha": "no_autotune"}
EFFECTIVE_WITH |= {"priority_alpha": "prioritized", "priority_beta": "prioritized"}
EFFECTIVE_WITH |= {"wandb_project_name": "track", "wandb_entity": "track"}


def flag(name: str) -> str:
    """Spell an argument as on the command line: `num_envs` is `--num-envs`."""
    return "--" + name.replace("_", "-")


def require(condition: bool, args, name: str, need: str) -> None:
    """Exit with a line like `error: --num-envs 0: must be at least 1`, unless `condition` holds."""
    if not condition:
        fail(f"{flag(name)} {getattr(args, name)}: must {need}")


def _plain(x):  # JSON and checkpoints refuse NumPy's numbers, as np.arange gives, and paths
    x = x.tolist() if isinstance(x, (np.generic, np.ndarray)) else x
    x = os.fspath(x) if isinstance(x, os.PathLike) else x
    return tuple(map(_plain, x)) if isinstance(x, (tuple, list)) else x


def check_ranges(args) -> None:
    """Exit with a one-line error if a number is out of range or the run could not start."""
    vars(args).update({name: _plain(value) for name, value in vars(args).items()})
    new = args.resume is None and args.evaluate is None
    if new and args.run_dir and os.path.exists(args.run_dir):
        run = Path(args.run_dir, "checkpoint.pt").exists()
        what = f"--resume {args.run_dir} continues it" if run else "there is no run to resume in it"
        fail(f"--run-dir {args.run_dir}: it exists already; {what}")
    for name, package in (("track", "wandb"), ("capture_video", "moviepy")):
        if getattr(args, name) and (name != "track" or args.evaluate is None):
            with failing(f"{flag(name)} needs {package}: pip install {package}", ImportError):
                import_module(package)
    for name, kind in get_type_hints(type(args)).items():  # which tyro checks on a command line
        if get_origin(kind) is Literal:
            known = get_args(kind)
            require(
                getattr(args, name) in known, args, name, f"be one of {', '.join(map(str, known))}"
            )
    for (low, high, need), names in RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            for x in value if isinstance(value, (tuple, list)) else [value]:
                fits = x is None or low <= x <= high and x < math.inf
                require(fits, args, name, f"be {need}")
    for name, other in EFFECTIVE_WITH.items():
        if new and getattr(args, name, None) != getattr(type(args), name, None):
            on = getattr(args, other.removeprefix("no_"), None) != other.startswith("no_")
            require(on, args, name, f"go with {flag(other)}")
    if new and getattr(args, "minibatch_size", None) is not None:
        default = args.num_minibatches == type(args).num_minibatches
        require(default, args, "num_minibatches", "not go with --minibatch-size")


def parse_args(args_class: type, script: str, atari_defaults: dict | None = None) -> tuple:
    """Return the arguments, and with --resume or --evaluate the checkpoint they are taken from."""
    for number in ASKED:  # until there is a run
        signal.signal(number, leave)
    for name in ("stdin", "stdout", "stderr"):  # in the order of their descriptors
        if getattr(sys, name) is None:  # closed, as a daemon's are
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    if hasattr(sys.stdout, "reconfigure"):  # in a notebook it is no file
        sys.stdout.reconfigure(errors="replace")  # where it is not UTF-8
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env-id", "--env_id", default=args_class.env_id)
    game = atari.find_game(parser.parse_known_args()[0].env_id)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head`
    args = tyro.cli(args_class, default=args_class(**atari_defaults or {}) if game else None)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if args.resume is not None and args.evaluate is not None:
        fail("--resume and --evaluate exclude each other")
    if args.render and args.evaluate is None:
        fail("--render goes with --evaluate")
    mode = "resume" if args.resume is not None else "evaluate"
    if (run_dir := getattr(args, mode)) is None:
        return args, None
    tokens = [x.split("=")[0][2:].replace("-", "_") for x in sys.argv[1:] if x[:2] == "--"]
    given = {x if hasattr(args, x) else x.removeprefix("no_") for x in tokens} - {mode}
    allowed = {name for name in ANEW[mode] if hasattr(args, name)}
    if refused := given - allowed:
        refused, allowed = (" ".join(map(flag, sorted(x))) for x in (refused, allowed))
        fail(f"{flag(mode)} takes {refused} from the run; it accepts only {allowed}")
    if args.render and args.capture_video:
        fail("--render and --capture-video exclude each other")
    checkpoint = load_run(run_dir, script)
    if mode == "resume" and Path(run_dir).is_file():
        fail(f"--resume {run_dir}: takes the run's folder")
    if mode == "evaluate" and checkpoint["device"] == "cuda" and not torch.cuda.is_available():
        print("trained on CUDA, evaluated on the CPU: it rounds differently")
        checkpoint["device"] = "cpu"
    with failing(f"{run_dir} was made by a script with other arguments", TypeError):
        stored = args_class(**checkpoint["args"])
    if "total_timesteps" in given and args.total_timesteps != stored.total_timesteps:
        for schedule in SCHEDULES:
            if getattr(stored, schedule, False):
                fail(f"--total-timesteps cannot change: {flag(schedule)} depends on it in this run")
    anew = {name: getattr(args, name) for name in given} | {mode: run_dir, "run_dir": run_dir}
    anew |= {"capture_video": False} if args.render else {}  # a run that filmed is only shown
    anew["device"] = checkpoint["device"]  # not auto: a GPU may have come or gone
    return dataclasses.replace(stored, **anew), checkpoint
