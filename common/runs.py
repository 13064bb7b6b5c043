"""A run: its folder, and what a person sees of it."""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import atari, compute, envs, fail, failing, provenance, say
from common.checkpoint import load_checkpoint, save_checkpoint

ASKED = signal.SIGINT, signal.SIGTERM  # not SIGHUP: a closing terminal may send it twice
# what --resume may be given anew, and a run then keeps
KEPT = {"total_timesteps", "track", "wandb_project_name", "wandb_entity", "capture_video"}
KEPT |= {"checkpoint_every", "eval_every", "eval_episodes", "eval_e"}
MISFIT = "does not fit the script or environment as it is now"  # one of them was edited, say


def load_run(run_dir: str | Path, script: str, name: str = "checkpoint.pt") -> dict:
    """Load a checkpoint of `script` from a run folder, or exit with a one-line error.

    `run_dir` may also be a checkpoint file, as r/best.pt.
    """
    with failing(f"{run_dir} is not a run folder", OSError):  # as it may not be entered
        path = Path(run_dir) if Path(run_dir).is_file() else Path(run_dir, name)
        known = path.is_file()
    if not known:
        young = ", or not evaluated yet" * ("best.pt" in path.parts)
        fail(f"{run_dir} is not a run folder{young}: it has no {name}")
    checkpoint = load_checkpoint(path)
    if checkpoint["script"] != script:
        fail(f"{run_dir} was made by {checkpoint['script']}.py, not by {script}.py")
    return checkpoint


def describe(returns: list[float], lengths: list[int]) -> str:
    """Say in words how an evaluation went."""
    spread = f"{np.mean(returns):,.1f} ± {np.std(returns):,.1f} (min {min(returns):,.1f})"
    return f"evaluation of {len(returns)} episodes: return {spread}, length {np.mean(lengths):,.0f}"


def evaluate(load_agent: Callable, args, spaces: tuple) -> None:
    """Play the episodes of --evaluate in an environment of these spaces, and say how it went."""
    device = compute.setup_torch(args, large=True)
    with failing(f"{args.evaluate} {MISFIT}", KeyError, RuntimeError):
        agent = load_agent(args.evaluate, device=device)
        if (shape := np.shape(agent.act(np.zeros(spaces[0].shape)))) != spaces[1].shape:
            raise RuntimeError(f"actions {list(shape)}, where {list(spaces[1].shape)} are taken")
    where = Path(args.evaluate)
    first = 10**6 * (where.is_file() and where.name != "checkpoint.pt")  # others than chose it
    folder = where.parent if where.is_file() else where
    begun = script = ""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none, or damaged
        config = json.loads((folder / "config.json").read_text())
        begun, script = config["code"], config["script"]
    if begun and begun != provenance.code(script):
        say("other code than the run was begun with: this may not be what was trained")
    say(describe(*envs.play(agent.act, args, folder, first)))


def leave(number: int, _frame=None) -> NoReturn:
    """Leave at once, with 128 + the signal's number, and without a word from worker processes."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(128 + number)


def _ours() -> list[int]:
    """Return the signals that have handlers of this package's."""
    handlers = ((number, signal.getsignal(number)) for number in (*ASKED, signal.SIGHUP))
    return [x for x, f in handlers if str(getattr(f, "__module__", "")).startswith("common.")]


def _hold() -> None:  # else Python would forget a signal that comes between fork and _begin_forked
    if ours := _ours():
        _held.append(signal.pthread_sigmask(signal.SIG_BLOCK, ours))


def _release() -> None:
    if _held:
        signal.pthread_sigmask(signal.SIG_SETMASK, _held.pop())


def _begin_forked() -> None:
    """In a process that an environment forks: SIGTERM ends it as ever; others are the trainer's."""
    for number in _ours():
        ignored = number != signal.SIGTERM  # but not by programs that it starts
        signal.signal(number, (lambda *_: None) if ignored else signal.SIG_DFL)
    _release()


_held = []  # the signals that were blocked before
os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_begin_forked)


class Run:
    """The run folder, and what a person sees of a run: TensorBoard, progress, Ctrl-C.

    `parts`, by name, are everything that decides how training continues. A checkpoint holds their
    state_dicts; from `checkpoint`, if there is one, they are loaded.
    """

    def __init__(self, args, script: str, last_step: int, device, checkpoint, parts: dict):
        if checkpoint is None and (args.resume is not None or args.evaluate is not None):
            fail("`resume` or `evaluate` is set, which only the command line takes")
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        self.dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
        self.args, self.script, self.last_step, self.parts = args, script, last_step, parts
        self.about = {"script": script, "args": dict(vars(args)), "device": device.type}
        history = {"global_step": 0, "returns": [], "finished": False, "last_scalars": []}
        history |= checkpoint or {}
        self.step = self.first_step = history["global_step"]
        self.returns = deque(history["returns"], maxlen=100)
        best = self.dir / "best.pt"  # it may be younger than the checkpoint
        known = load_checkpoint(best) if checkpoint and best.exists() else {}
        self.best_return = known.get("best_return", -math.inf)
        self.last_scalars = []  # logged at the last step; again, if resumed just for the evaluation
        self.signal, self.saved = 0, self.step  # the one that asked to stop; the last checkpoint
        if self.step > last_step:
            fail(f"--total-timesteps {args.total_timesteps}: the run is at step {self.step:,}")
        if history["finished"] and self.step == last_step:
            parts["envs"].close()  # a simulator, say, would outlive this process
            say(f"{self.dir} is finished; to see it: --evaluate {self.dir}")
            raise SystemExit(0)
        if checkpoint:  # popped: no replay in memory twice; users' envs raise their own
            parts["envs"].load_state_dict(checkpoint.pop("envs"))
            with failing(f"{self.dir} {MISFIT}", KeyError, RuntimeError):
                for name in [name for name in parts if name != "envs"]:
                    parts[name].load_state_dict(checkpoint.pop(name))
        config = self.about | {"code": provenance.code(script)} | provenance.record(device)
        with failing(f"--{'resume' if checkpoint else 'run-dir'} {self.dir}", OSError):
            self.dir.mkdir(parents=True, exist_ok=checkpoint is not None)
            self._lock()
        try:
            if args.track:
                self._track()
            # readers drop what a killed run logged after its checkpoint: it is logged again, as is
            # all of the last step, to which the last evaluation belongs
            purge_step = self.step + (not history["last_scalars"]) if checkpoint else None
            with failing(f"{self.dir} could not be written", OSError, code=1):
                self.writer = SummaryWriter(str(self.dir), purge_step=purge_step)
                self._keep_config(config, new=checkpoint is None)
            for name, value in history["last_scalars"]:
                self.scalars({name: value}, self.step)
            self._introduce()
            if checkpoint is None:
                self.save(0)
            elif any(history["args"].get(x) != getattr(args, x, None) for x in KEPT):
                # now, as it may be killed; otherwise the file stays as it was
                save_checkpoint(self.dir / "checkpoint.pt", history | self.about)
        except BaseException:
            with contextlib.suppress(AttributeError, OSError):  # there is none; a full disk
                self.writer.close()
            self._untrack(exit_code=1)
            if checkpoint is None:
                shutil.rmtree(self.dir, ignore_errors=True)  # NFS keeps open files
            raise

    def _lock(self) -> None:  # until the run ends, or its process
        self._locked = (self.dir / ".lock").open("w")
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"{self.dir} is being trained by another process")
        except OSError:  # a file system without locks
            pass
        path = self.dir / "checkpoint.pt"  # another process may have gone on until now
        if path.exists() and load_checkpoint(path)["global_step"] != self.step:
            fail(f"{self.dir} was trained by another process meanwhile: resume it again")

    def _track(self) -> None:
        import wandb

        args, identity = self.args, self.dir / "wandb_id"
        with failing(f"{self.dir} could not be written", OSError, code=1):
            if not identity.exists() or not identity.read_text():  # it was never on disk
                # not the folder's name, which may be another run's too
                identity.write_text(f"{uuid.uuid4().hex[:12]}\n")
            ids = {"id": identity.read_text().strip(), "name": self.dir.name, "dir": self.dir}
        ids |= {"project": args.wandb_project_name, "entity": args.wandb_entity}
        # not `leave`: while wandb asks for a key, the terminal hides what is typed
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with failing("--track", Exception, KeyboardInterrupt):  # wandb has many
                wandb.finish()  # a run of this process before, which it would go on with
                wandb.init(**ids, resume="allow", config=vars(args), sync_tensorboard=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def _untrack(self, exit_code: int) -> None:  # else it would log later runs of this process, too
        try:
            if self.args.track:
                sys.modules["wandb"].finish(exit_code=exit_code)
        except Exception as error:  # of a service, for which no run is to fail
            self._say(f"--track: {error!r:.200}", sys.stderr)

    def _keep_config(self, config: dict, new: bool) -> None:  # or say what is not as it was kept
        path = self.dir / "config.json"
        if new:
            rows = "".join(f"|{key}|{value}|\n" for key, value in config["args"].items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            path.write_text(json.dumps(config, indent=2) + "\n")
        elif path.exists():
            try:
                before = json.loads(path.read_text())
            except ValueError:  # it was never on disk as a whole
                print(f"{path} is damaged: what the run was begun with is not known")
                return
            if other := [x for x in ("code", "versions", "machine") if before.get(x) != config[x]]:
                print(f"changed since the run began: {', '.join(other)}; resuming may not be exact")
                now = {x: config[x] for x in ("commit", *other)}
                before["resumed"] = [*before.get("resumed", []), {"step": self.step} | now]
                whole = path.with_name(".config.json.writing")
                whole.write_text(json.dumps(before, indent=2) + "\n")
                whole.replace(path)

    def _introduce(self) -> None:
        args, last_step = self.args, self.last_step
        why = "the faster here" if torch.cuda.is_available() else "no CUDA here"
        auto = f" ({why})" if args.device == "auto" else ""
        mode = ("compiled" if args.compile else "eager") + ", bfloat16" * args.bf16
        how = f"{self.about['device']}{auto}, {args.num_threads} thread(s), {mode}"
        self._say(f"{self.dir}: {args.env_id}, {last_step:,} steps, seed {args.seed}, {how}")
        if atari.find_game(args.env_id):
            rewards = "clipped for learning" if args.clip_reward else "learned from as they are"
            self._say(f"{atari.PROTOCOL}; {rewards}; sticky actions {args.sticky_actions:g}")
        elif getattr(args, "clip_reward", False):
            self._say("--clip-reward: only the signs of rewards are learned from")
        if (begin := getattr(args, "learning_starts", 0)) >= last_step:
            self._say(f"nothing is learned: --learning-starts {begin} is not below {last_step}")

    def _say(self, line: str, file: TextIO | None = None) -> None:
        if not say(line, file):  # save, and leave
            self.signal = self.signal or signal.SIGPIPE

    def __enter__(self) -> "Run":
        hup = [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)  # no nohup
        self._handlers = {x: signal.signal(x, self._stop) for x in (*ASKED, *hup)}
        form = {"unit": "step", "unit_scale": True, "dynamic_ncols": True, "disable": None}
        self.bar = tqdm(desc=self.args.env_id, total=self.last_step, initial=self.step, **form)
        self.start = self.printed = time.perf_counter()
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _) -> None:
        if isinstance(error, SystemExit):  # between two steps: of `fail`, or of `_leave`
            with contextlib.suppress(Exception):  # a signal may have ended what they are made of
                self.parts["envs"].close()
        self.bar.close()
        with contextlib.suppress(OSError):  # of a full disk; what counts is in a checkpoint
            self.writer.close()
        self._locked.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._untrack(exit_code=int(error is not None and not self.signal))
        if error is None:
            self._say(f"done: {self.dir}")
            self.parts["envs"].close()
        if self.signal in ASKED and isinstance(error, Exception):  # Ctrl-C ends a compiler too
            self._say(f"ended by {error!r:.200}", sys.stderr)
            self._leave()  # without closing them: amid a step, that might wait for ever

    def _leave(self) -> NoReturn:
        script = sys.argv[0] if Path(sys.argv[0]).stem == self.script else f"{self.script}.py"
        resume = shlex.join(["python", script, "--resume", str(self.dir)])
        self._say(f"stopped at step {self.saved:,}; go on: {resume}")
        raise SystemExit(128 + self.signal)

    def _stop(self, number: int, _frame) -> None:
        if self.signal not in ASKED:
            self.signal, self.asked = number, time.monotonic()
        elif number in ASKED:
            if time.monotonic() - self.asked < 0.2:  # one signal, sent to process and group
                return
            leave(number)
        with contextlib.suppress(RuntimeError):  # it came amid another line
            self._say("stopping at the next boundary; interrupt again to quit at once", sys.stderr)

    def due(self, every: int, step: int) -> bool:
        """Tell if a multiple of `every` was passed since the last progress, before the end."""
        return step < self.last_step and every > 0 and step // every > self.step // every

    def scalars(self, values: dict[str, float | torch.Tensor], step: int) -> None:
        """Log scalars at an environment step; a name without a section belongs to losses/."""
        with failing(f"{self.dir} could not be written", OSError, code=1):
            for name, value in values.items():
                name = name if "/" in name else f"losses/{name}"
                self.writer.add_scalar(name, value, step)
                if step == self.last_step:
                    self.last_scalars.append((name, float(value)))

    def episodes(self, finished: list[tuple[float, int, int]]) -> None:
        """Log finished training episodes: return, length, last step of each."""
        for total, length, step in finished:
            self.returns.append(total)
            self.scalars({"charts/episodic_return": total, "charts/episodic_length": length}, step)

    def evaluate(self, agent: torch.nn.Module, step: int) -> None:
        """Evaluate, log, and save the agent to best.pt if it is the best so far."""
        learning = [module for module in agent.modules() if module.training]
        agent.eval()

        def act(obs: np.ndarray) -> np.ndarray:
            if self.signal and self.saved == self.last_step:  # it is played again when resumed
                self._leave()
            return agent.act(obs)

        returns, lengths = envs.play(act, self.args, self.dir)
        for module in learning:
            module.training = True
        mean = float(np.mean(returns))
        self.scalars({"eval/episodic_return": mean, "eval/episodic_length": np.mean(lengths)}, step)
        if step == self.last_step:
            self._say(describe(returns, lengths))
        if mean > self.best_return:
            self.best_return = mean
            best = {"global_step": step, "best_return": mean, "agent": agent.state_dict()}
            save_checkpoint(self.dir / "best.pt", self.about | best)

    def progress(self, step: int) -> None:
        """Log the speed, and show it in a bar, or a line every ten seconds without a terminal.

        After a signal, leave with 128 + its number, saying how to go on.
        """
        now = time.perf_counter()
        speed = (step - self.first_step) / (now - self.start)
        recent = f"return {np.mean(last):,.1f} (last {len(last)})" if (last := self.returns) else ""
        self.scalars({"charts/SPS": speed}, step)
        self.bar.set_postfix_str(recent, refresh=False)
        self.bar.update(step - self.step)
        edge = self.step == self.first_step or step == self.last_step
        if self.bar.disable and (edge or now - self.printed > 10):
            left = tqdm.format_interval((self.last_step - step) / speed)
            share = f"{step:,} of {self.last_step:,} steps ({step / self.last_step:.0%})"
            self._say(f"{share} | {speed:,.0f} steps/s | {left} left | {recent}")
            self.printed = now
        self.step = step
        if self.signal and self.saved == step < self.last_step:
            self._leave()

    def finish(self) -> Path:
        """Evaluate the agent once all steps are done, and save the run; return its folder."""
        if self.saved < self.step or self.signal:  # first: an evaluation is long, in a user's code
            self.save(self.step)
        if self.signal:
            self._leave()
        self.evaluate(self.parts["agent"], self.step)
        self.save(self.step, finished=True)
        return self.dir

    def save(self, step: int, finished: bool = False) -> None:
        """Write a checkpoint, once TensorBoard's events up to it are on disk."""
        with failing(f"{self.dir} could not be written", OSError, code=1):
            self.writer.flush()
        state = {"returns": list(self.returns), "finished": finished}
        state["last_scalars"] = [] if finished else self.last_scalars
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.dir / "checkpoint.pt", self.about | {"global_step": step} | state)
        self.saved = step

    def require_finite(self, what: str, *values: float | np.ndarray | torch.Tensor) -> None:
        """End a run gone wrong, which leaves its last good checkpoint."""
        if not all(torch.as_tensor(x).isfinite().all() for x in values):
            self.bar.close()
            kept = f"the last good checkpoint is {self.dir / 'checkpoint.pt'}"
            fail(f"{what} became NaN or infinite at step {self.step:,} or later; {kept}", code=1)
