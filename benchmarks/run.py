"""Runs of a suite: each a process, several at a time, gone on with by calling the command again."""

import contextlib
import fcntl
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tyro.conf import Positional

from benchmarks import results
from benchmarks.suites import SUITES
from common import fail, failing, say
from common.provenance import code

SCRIPTS = Path(__file__).parent.parent
PROGRESS = re.compile(
    r"([\d,]+) of ([\d,]+) steps \(.*?\) \| ([\d,]+) steps/s \| (\S+) left \|(?: return (\S+))?"
)
NOT_RUN = {"elsewhere": "run by another process", "waiting": "waiting", "failed": "failed"}
# flags that a run gets from what this command is told itself
OWN = ("--env-id", "--seed", "--num-threads", "--run-dir", "--resume", "--evaluate")
# what --resume says of a run folder that cannot be gone on with, by whatever version
LOST = re.compile(r"it has no checkpoint\.pt|checkpoint\.pt is empty, damaged or not a checkpoint")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
THREADS += ("TORCHINDUCTOR_COMPILE_THREADS",)
ENVIRONMENT = {"PYTHONUNBUFFERED": "1"}  # so that errors are last in a log


class Progress(NamedTuple):
    """What a progress line says."""

    step: int
    total: int
    speed: int
    left: str
    recent_return: float | None


def read_progress(log: str) -> Progress | None:
    """Return what the last progress line of a log says."""
    if not (lines := PROGRESS.findall(log)):
        return None
    *counts, left, recent = lines[-1]
    step, total, speed = (int(x.replace(",", "")) for x in counts)
    return Progress(step, total, speed, left, float(recent.replace(",", "")) if recent else None)


class Job:
    """A run of a suite: its folder SUITE/ENV/SEED, and beside it SEED.log and more."""

    def __init__(self, script: str, env_id: str, flags: str, seed: int, folder: Path):
        self.script, self.flags, self.env_id, self.seed = script, shlex.split(flags), env_id, seed
        self.run_dir = folder / env_id.replace("/", "-") / str(seed)
        self.name = f"{self.run_dir.parent.name}/{seed}"
        self.state, self.error, self.note = "waiting", "", ""
        self.process, self.resumed, self.signals = None, False, 0

    def path(self, suffix: str) -> Path:
        """Return a path beside the run folder, as SEED.log."""
        return self.run_dir.with_name(self.run_dir.name + suffix)

    def log(self) -> str:
        """Return the end of the log."""
        if not self.path(".log").exists():
            return ""
        with self.path(".log").open("rb") as file:
            file.seek(max(0, self.path(".log").stat().st_size - 10_000))
            return file.read().decode(errors="replace")

    def command(self) -> list[str]:
        """Return the script and its arguments, but for threads and folder."""
        script = os.path.relpath(SCRIPTS / f"{self.script}.py")
        return [script, "--env-id", self.env_id, "--seed", str(self.seed), *self.flags]

    def checkpoint_every(self) -> list[str]:
        """Return the flag that may be another when the run is gone on with, if it was given."""
        words = [part for word in self.flags for part in word.split("=", 1)]
        name, pairs = "--checkpoint-every", itertools.pairwise(words)
        given = [value for flag, value in pairs if flag.replace("_", "-") == name]
        return [name, given[-1]] if given else []

    def made_by(self) -> dict | None:
        """Return what made the run folder, or the results that are left of it."""
        left = [self.path(".json")] if self.path(".csv").exists() else []
        for path in (self.run_dir / "config.json", *left):
            try:
                config = json.loads(path.read_text())
                return config | {"command": results.command(config, results.FREE)}
            except (OSError, ValueError, LookupError, TypeError):
                continue
        return None

    def foreign(self) -> str:
        """Say that the run, if there is one, is not of this command; "" if it is."""
        ours = self.script, self.env_id, self.seed, shlex.join(self.flags)
        made_by = self.made_by()
        same = made_by is None or made_by["command"] == results.suite_command(*ours)
        return "" if same else f"{self.run_dir} was made by another command: {made_by['command']}"

    def finished(self) -> bool:
        """Tell if the run is finished, by its results or by what it said last."""
        folder = re.escape(str(self.run_dir))
        said = re.compile(rf"done: {folder}$|^{folder} is finished; to see it", re.MULTILINE)
        return self.path(".csv").exists() or bool(said.search(self.log().split("\n$ ")[-1]))

    def start(self, threads: int) -> None:
        """Start the run or go on with it, unless it is finished or another process has it.

        A run keeps its log locked while it lives, also when the one who started it is gone; but not
        by what it writes to, which a program that it started may have open for longer.
        """
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with self.path(".log").open("a") as log, self.path(".log").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.state = "elsewhere"
                return
            except OSError:  # a file system without locks
                pass
            if words := self.foreign():
                self.fail(words)
                return
            self.resumed = (self.run_dir / "checkpoint.pt").exists() and bool(self.made_by())
            words = self.command()
            words += ["--num-threads", str(threads), "--run-dir", str(self.run_dir)]
            if self.made_by() and self.finished():
                self.finish()
                return
            if self.resumed:
                words = [words[0], "--resume", str(self.run_dir), *self.checkpoint_every()]
            else:
                self.set_aside()
                log.truncate(0)
            print(f"$ {shlex.join(['python', *words])}", file=log, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                env=os.environ | ENVIRONMENT | dict.fromkeys(THREADS, str(threads)),
                start_new_session=True,  # Ctrl-C is for the runner, which passes it on
            )
            self.state = "running"

    def set_aside(self) -> None:
        """Rename a run folder that cannot be gone on with, and forget what was known of it."""
        if self.run_dir.exists():
            names = (self.path(f".{i}{results.UNUSABLE}") for i in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.run_dir.rename(aside)
            self.note = f"begun anew: {self.name}, as it cannot be resumed; what it was: {aside}"
        for suffix in (".csv", ".json"):
            self.path(suffix).unlink(missing_ok=True)

    def poll(self) -> None:
        """If the process has ended, note how it did."""
        if (code := self.process.poll()) is None:
            return
        self.process = None
        last = (self.log().split("\n$ ")[-1].strip().splitlines() or [""])[-1]
        if code == 0 and self.finished():
            self.finish()
        elif code == 2 and self.resumed and LOST.search(last):
            self.set_aside()
            self.state = "waiting"
        elif self.signals:
            self.state = "waiting"
        else:
            ended = f"exit {code}" if code >= 0 else signal.Signals(-code).name
            self.fail(f"{ended}: {last}")

    def finish(self) -> None:
        """Export what the run has learned, beside its folder."""
        self.state = "finished"
        if not self.path(".csv").exists():
            try:
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    result = results.read_run(self.run_dir)
                    if "evaluation" not in result.config:
                        fail(f"{self.run_dir} is not finished")
                    results.write(result, self.path(".csv"))
            except (Exception, SystemExit) as error:  # the other runs go on
                self.fail(f"its episodes cannot be kept: {said.getvalue().strip() or repr(error)}")

    def fail(self, error: str) -> None:
        """Note why the run failed."""
        self.state, self.error = "failed", error

    def row(self) -> str:
        """Return the line of the table."""
        if not (now := read_progress(self.log())):
            return f"{self.name:30} starting"
        speed = f"{now.speed:,} steps/s {now.left:>8} left"
        recent = "" if now.recent_return is None else f"  return {now.recent_return:,.1f}"
        return f"{self.name:30} {now.step / now.total:4.0%} {speed:>30}{recent}"


class Screen:
    """A table that is redrawn on a terminal; a line a minute without one."""

    def __init__(self):
        self.live, self.height, self.last = sys.stdout.isatty(), 0, -60.0

    def say(self, line: str) -> None:
        """Print a line that stays, in place of the table."""
        say(f"\x1b[{self.height}F\x1b[J" * (self.height > 0) + line)  # if nobody reads, in vain
        self.height = 0

    def show(self, lines: list[str]) -> None:
        """Show the table."""
        if self.live:
            size = shutil.get_terminal_size()
            lines = [line[: size.columns] for line in lines[: size.lines - 1]]
            self.say("\n".join(lines))
            self.height = len(lines)
        elif time.monotonic() - self.last >= 60:
            self.last = time.monotonic()
            self.say("; ".join(" ".join(line.split()) for line in lines))


def describe(jobs: list[Job]) -> list[str]:
    """Return the table: what runs, what waits, what failed."""
    finished = sum(job.state == "finished" for job in jobs)
    lines = [f"{jobs[0].run_dir.parent.parent.name}: {finished} of {len(jobs)} finished"]
    lines += [job.row() for job in jobs if job.state == "running"]
    for state, words in NOT_RUN.items():
        if names := [job.name for job in jobs if job.state == state]:
            lines.append(f"{words} {len(names)}: {', '.join(names)}")
    return lines


def available_cores() -> int:
    """Return how many cores this process may use, in a container as in a batch system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = Path("/sys/fs/cgroup/cpu.max")  # microseconds in every so many
    quota, period = limit.read_text().split() if limit.exists() else ("max", 0)
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def available_memory() -> int:
    """Return the bytes of memory there are, of the machine or of the container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    limit = limit.read_text().strip() if limit.exists() else "max"
    return machine if limit == "max" else min(machine, int(limit))


def select(
    suite: str, env_ids: tuple, seeds: int, first_seed: int, script: str, flags: str, run_dir: Path
) -> list[Job]:
    """Return the runs that the arguments of `run` name, or exit with one line."""
    if suite not in SUITES:
        fail(f"no suite {suite}; there are {', '.join(SUITES)}")
    runs, several = SUITES[suite].runs, len({name for name, *_ in SUITES[suite].runs}) > 1
    if unknown := set(env_ids) - {env_id for _, env_id, _ in runs}:
        if several:
            known = ", ".join(env_id for _, env_id, _ in runs)
            fail(f"--env-ids {' '.join(sorted(unknown))}: not in {suite}, which has {known}")
        runs = runs + [(runs[0][0], env_id, runs[0][2]) for env_id in sorted(unknown)]
    chosen = range(first_seed, first_seed + seeds if seeds else 1 + SUITES[suite].seeds)
    if not chosen:
        fail(f"--first-seed {first_seed}: beyond the {suite} suite's last; say how many: --seeds")
    if script and (Path(script).name != script or not (SCRIPTS / f"{script}.py").exists()):
        fail(f"--script {script}: there is no {script}.py among the files in {SCRIPTS}")
    with failing(f"--flags {flags}", ValueError):
        words = [word.split("=")[0].replace("_", "-") for word in shlex.split(flags)]
    if own := [word for word in words if word in OWN]:
        fail(f"--flags {flags}: {own[0]} is for this command to give")
    for option, value in (("script", script), ("flags", flags)):
        if value and several:
            fail(f"--{option} {value}: {suite} has runs of several scripts")
    folder = run_dir / (script or suite)
    return [
        Job(script or name, env_id, f"{own} {flags}", seed, folder)
        for name, env_id, own in runs
        for seed in chosen
        if env_id in env_ids or not env_ids
    ]


def work(jobs: list[Job], workers: int, threads: int, screen: Screen) -> list[int]:
    """Run the jobs, so many at a time, until they have ended; return the signals that came."""
    signals, told = [], set()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def ask(number: int = 0, _frame=None) -> None:
        # at once, as a scheduler signals the runs as well: they take both for one
        if number and (number != signal.SIGHUP or not signals):  # a closing terminal may send two
            signals.append(number)
        for job in jobs:
            if job.process and job.signals < len(signals):
                job.signals += 1
                job.process.send_signal(signals[job.signals - 1])

    asked = [signal.SIGINT, signal.SIGTERM]
    asked += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)  # no nohup
    handlers = {number: signal.signal(number, ask) for number in asked}
    for job in jobs:
        if job.made_by() and job.path(".csv").exists():
            job.state = "finished"
    while True:
        ask()  # those that were about to begin when a signal came
        for job in jobs:
            if job.process:
                try:
                    job.poll()
                except OSError as error:  # the other runs go on
                    job.fail(str(error))
        for job in jobs:
            free = workers > sum(other.process is not None for other in jobs)
            if free and not signals and job.state in ("waiting", "elsewhere"):
                try:
                    job.start(threads)
                except OSError as error:  # the other runs go on
                    job.fail(str(error))
            if job.note:
                screen.say(job.note)
                job.note = ""
            if job.state in ("finished", "failed") and job not in told:
                told.add(job)
                screen.say(f"{job.state}: {job.name} {job.error}")
        if signals and "stopping" not in told:
            told.add("stopping")
            screen.say("stopping, once the runs have saved; interrupt again to quit at once")
        left = [job for job in jobs if job.state in ("waiting", "elsewhere")]
        if not any(job.process for job in jobs) and (signals or not left):
            break
        screen.show(describe(jobs))
        time.sleep(0.5)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return signals


def tell_other_code(jobs: list[Job]) -> None:
    """Say which runs were begun with other code than there is now."""
    made = [(job, job.made_by()) for job in jobs]
    if old := [job.name for job, by in made if by and by.get("code") != code(job.script)]:
        print(f"begun with other code: {', '.join(old)}; to run what has changed: --run-dir")


def run(
    suite: Positional[str],
    env_ids: tuple[str, ...] = (),
    seeds: int = 0,
    first_seed: int = 1,
    workers: int = 0,
    threads: int = 1,
    script: str = "",
    flags: str = "",
    run_dir: Path = Path("runs/benchmarks"),
) -> None:
    """Run a suite: the commands that a user would type, each in a process of its own.

    A run is in RUN_DIR/SUITE/ENV/SEED, what it says in SEED.log beside that, and its episodes, once
    it is finished, in SEED.csv. The same command again resumes what was stopped or died, and
    repeats nothing that is finished. Ctrl-C, SIGTERM or the loss of its terminal (without nohup)
    lets the runs save, and leaves.

    Args:
        suite: ppo_continuous, ppo_discrete, ppo_atari, dqn_atari, sac_continuous or smoke; what
            they have is in benchmarks/suites.py.
        env_ids: only these environments; also others, where the suite is of one script.
        seeds: how many of each; 0: up to the last that the suite has.
        first_seed: the first of them, as where another machine runs the ones before.
        workers: runs at a time; by default as many as cores and memory allow (dqn_atari: 9 GB each;
            others: 1, too little for SAC on Humanoid). On a GPU, say how many it has memory for.
        threads: threads of each run.
        script: your copy of the suite's script, as mine or mine.py: it is run, into RUN_DIR/mine.
        flags: more flags of the script, as --flags="--gamma 0.9"; with them, name a
            --run-dir of their own.
        run_dir: folder of the suites' runs.
    """
    for name, value, least in (
        ("seeds", seeds, 0),
        ("first-seed", first_seed, 0),
        ("workers", workers, 0),
        ("threads", threads, 1),
    ):
        if value < least:
            fail(f"--{name} {value}: must be at least {least}")
    jobs = select(suite, env_ids, seeds, first_seed, script.removesuffix(".py"), flags, run_dir)
    folder = jobs[0].run_dir.parent.parent
    with failing(f"--run-dir {run_dir}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    fit = int(available_memory() / 1e9 / SUITES[suite].gigabytes)
    workers = workers or max(1, min(available_cores() // threads, fit))
    if foreign := [words for job in jobs if (words := job.foreign())]:
        fail(f"{foreign[0]}; take another --run-dir")
    begun = [(job.name, by) for job in jobs if (by := job.made_by()) and not job.finished()]
    if other := [name for name, by in begun if by.get("num_threads", threads) != threads]:
        print(f"with as many threads as before: {', '.join(other)}")
    tell_other_code(jobs)
    screen = Screen()
    signals = work(jobs, workers, threads, screen)
    screen.say("\n".join(describe(jobs)))
    tell_other_code(jobs)  # it may have been edited meanwhile
    again = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    if signals:
        print(f"stopped; go on: {again}")
        raise SystemExit(128 + signals[0])
    if any(job.state == "failed" for job in jobs):
        print(f"what died is resumed by the same command: {again}\nlogs: {folder}")
        raise SystemExit(1)
    print(f"to see it: python -m benchmarks plot {folder}")
