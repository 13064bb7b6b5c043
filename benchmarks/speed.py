"""Environment steps per second, beside a peer with equal settings, environment and threads."""

import importlib.util
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Literal, NamedTuple

import gymnasium as gym
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tyro.conf import Positional

from benchmarks import results
from common import fail, failing
from common.atari import find_game
from common.envs import make_env

ROOT = Path(__file__).parent.parent
PEERS = {  # module: name, package
    "stable_baselines3": ("Stable-Baselines3", "stable-baselines3"),
    "sbx": ("SBX", "sbx-rl"),
    "torchrl": ("TorchRL", "torchrl"),
    "cleanrl": ("CleanRL", "cleanrl"),
}
# CleanRL's scripts, by ours
CLEANRL = {"ppo_continuous": "ppo_continuous_action", "sac_continuous": "sac_continuous_action"}
CLEANRL |= {"ppo_discrete": "ppo", "ppo_discrete, Atari": "ppo_atari", "dqn_atari": "dqn_atari"}
OFF_POLICY = {"learning_starts": 1000, "buffer_size": 10_000}
# what --flags would give to our side alone
OWN = ("--env-id", "--num-envs", "--num-steps", "--total-timesteps", "--num-threads")
OWN += ("--learning-starts", "--buffer-size", "--run-dir", "--resume", "--evaluate")
ABOUT = ("commit", "versions", "machine", "num_threads", "float32_matmul_precision")


class Work(NamedTuple):
    """What is measured by default; `rollout` are the samples of a PPO rollout."""

    env_id: str
    num_envs: int
    rollout: int
    total_timesteps: int
    flags: str = ""


# of TorchRL's PPO tutorial
TUTORIAL = (
    "--hidden-sizes 256 256 256 --squash --lr-schedule cosine --vf-loss huber --no-clip-vloss "
    "--vf-coef 1 --recompute-advantages --minibatch-size 64 --ent-coef 1e-4 --max-grad-norm 1.0"
)
WORK = {
    "ppo_continuous": Work("HalfCheetah-v5", 1, 2048, 65_536),
    "ppo_continuous, torchrl": Work("InvertedDoublePendulum-v5", 1, 1000, 20_000, TUTORIAL),
    "ppo_discrete": Work("CartPole-v1", 4, 512, 65_536),
    "ppo_discrete, Atari": Work("ALE/Breakout-v5", 8, 1024, 12_288),
    "sac_continuous": Work("HalfCheetah-v5", 1, 0, 6000),
    "dqn_atari": Work("ALE/Breakout-v5", 8, 0, 8000),
}


def speed(
    script: Positional[
        Literal["ppo_continuous", "ppo_discrete", "sac_continuous", "dqn_atari"]
    ] = "ppo_continuous",
    env_id: str = "",
    num_envs: tuple[int, ...] = (),
    num_steps: int = 0,
    total_timesteps: int = 0,
    threads: int = 1,
    peer: Literal["stable_baselines3", "sbx", "torchrl", "cleanrl"] = "stable_baselines3",
    cleanrl: Path | None = None,
    repeats: int = 3,
    flags: str = "",
    output: Path | None = None,
) -> None:
    """Steps per second of a script and of a peer with its settings, in turn.

    The steady state is measured after two rollouts, or a thousand steps after SAC and DQN began to
    learn. Start-up, with compilation, is the time until then, less what those steps of learning
    take in the steady state. Several --num-envs show how speed grows with them.

    Args:
        script: the script.
        env_id: environment, if not the script's own; ppo_discrete plays CartPole-v1.
        num_envs: environments that step together; each number is measured.
        num_steps: steps of each environment in a PPO rollout; by default as many as leave the
            rollout about its size. It has as many minibatches as by default.
        total_timesteps: environment steps of each measurement; 0: as many as the script needs,
            at least six rollouts of PPO.
        threads: threads that PyTorch computes with.
        peer: Stable-Baselines3; SBX, by the same authors on JAX (pip install sbx-rl); or for
            ppo_continuous TorchRL, with the settings of its tutorial (pip install torchrl);
            or CleanRL's own script, on v4 of MuJoCo's environments, one of them in SAC and DQN.
        cleanrl: with --peer cleanrl, a checkout of it, with what it needs in its .venv.
        repeats: measurements of each, alternating.
        flags: more flags for the script alone: --flags=--bf16.
        output: JSON file for the result; by default runs/speed_SCRIPT_PEER.json.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what it runs, too
    atari = find_game(env_id or WORK[script].env_id) is not None
    if peer == "torchrl" and (script != "ppo_continuous" or set(num_envs) - {1}):
        fail("--peer torchrl: goes with ppo_continuous and one environment")
    if (peer == "cleanrl") != (cleanrl is not None):
        fail("--peer cleanrl and --cleanrl, a checkout of it, go together")
    if cleanrl and not (cleanrl / ".venv/bin/python").exists():
        fail(f"--cleanrl {cleanrl}: has no .venv/bin/python")
    counts = [("repeats", repeats), ("threads", threads), *(("num-envs", x) for x in num_envs)]
    for name, value in counts:
        if value < 1:
            fail(f"--{name} {value}: must be at least 1")
    with failing(f"--flags {flags}", ValueError):
        words = [word.split("=")[0].replace("_", "-") for word in shlex.split(flags)]
    if own := [word for word in words if word in OWN]:
        fail(f"--flags {flags}: {own[0]} is for this command to give")
    if num_steps and script in ("sac_continuous", "dqn_atari"):
        fail(f"--num-steps {num_steps}: goes with PPO")
    work = WORK.get(f"{script}, {'Atari' if atari else peer}", WORK[script])
    peer_name, package = PEERS[peer]
    beside = cleanrl is not None or importlib.util.find_spec(peer) is not None
    if not beside:
        print(f"without {peer_name}: pip install {package}")
    if beside and not atari and script in ("ppo_discrete", "dqn_atari"):
        errors = gym.error.Error, ImportError, AttributeError, ValueError, TypeError
        with failing(f"--env-id {env_id}", *errors):
            space = make_env(SimpleNamespace(env_id=env_id or work.env_id)).observation_space
        if len(space.shape or ()) == 3:
            print(f"without {peer_name}: it would not take {env_id} for frames, as we do")
            beside = False
    versions = cleanrl_versions(cleanrl) if cleanrl else {}
    measurements = []
    for envs in num_envs or (work.num_envs,):
        setting = {"script": script, "env_id": env_id or work.env_id, "num_envs": envs}
        steps = 0
        if work.rollout:
            minibatches = importlib.import_module(script).Args().num_minibatches
            least = minibatches // math.gcd(envs, minibatches)  # so that they divide the rollout
            least = 1 if peer == "torchrl" else least  # its remainder is dropped
            steps = num_steps or max(1, work.rollout // envs // least) * least
        enough = max(work.total_timesteps, 6 * steps * envs)
        setting |= {"total_timesteps": total_timesteps or enough}
        setting |= {"num_steps": steps} if steps else OFF_POLICY
        theirs = cleanrl_setting(setting, atari) if cleanrl and beside else setting
        ours, peers = [], []
        for i in range(repeats):
            measured, config = clock_script(setting, threads, f"{work.flags} {flags}")
            ours.append(measured)
            device = "cpu" if config["machine"]["device"] == "cpu" else "cuda"  # it has a name
            if device == "cuda" and peer == "torchrl":
                fail("--peer torchrl: computes on the CPU here, but the script on a GPU")
            if beside:
                where = {"threads": threads, "device": device, "atari": atari, "peer": peer}
                args = (theirs, where, cleanrl) if cleanrl else (theirs, where)
                peers.append((clock_cleanrl if cleanrl else clock_peer)(*args))
            print(f"{count(envs)}: {i + 1} of {repeats} measured", flush=True)
        result = {"env_id": setting["env_id"], "num_envs": envs, "command": results.command(config)}
        for name, measured in ((f"{script}.py", ours), (peer_name, peers)):
            if measured:
                rates, startups = zip(*measured)
                result[name] = {"steps_per_second": rates, "startup_seconds": startups}
        if theirs != setting:
            result[peer_name]["setting"] = theirs
        result["ratios"] = [a / b for (a, _), (b, _) in zip(ours, peers)]
        measurements.append(result)
        if beside:
            config["versions"][package] = versions or version(package)
        content = {"script": script, "command": results.own_command()}
        content |= {name: config[name] for name in ABOUT} | {"measurements": measurements}
        results.write_json(content, output or Path(f"runs/speed_{script}_{peer}.json"))
    print("\n".join(rows(content)))


def rows(content: dict) -> list[str]:
    """Return a table of what `speed` wrote, in lines; growth is from the first on."""
    name = next((x for x, _ in PEERS.values() if x in content["measurements"][0]), "no peer")
    lines = [
        f"| {content['script']}.py | here | {name} | ratio, pair by pair | start-up | growth |"
    ]
    lines.append("|---" * 6 + "|")
    first = None
    for result in content["measurements"]:
        series = [x for x in result.values() if isinstance(x, dict)]
        rates = [median(x["steps_per_second"]) for x in series]
        startups = [f"{median(x['startup_seconds']):.1f} s" for x in series]
        first = first or rates[0]
        ratios = result["ratios"]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
        columns = [f"{result['env_id']}, {count(result['num_envs'])}"]
        columns += [f"{rate:,.0f}" for rate in rates] + ["-"] * (2 - len(rates))
        columns += [spread, " / ".join(startups), f"{rates[0] / first:.2f}"]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def count(environments: int) -> str:
    """Return their number in words."""
    return f"{environments} environment{'s' * (environments > 1)}"


def steady(times: list[tuple[int, float]], start: float, setting: dict) -> tuple[float, float]:
    """Return steps per second in the steady state, and seconds of start-up.

    `times` are steps and when they were done, of a process that began at `start`.
    """
    learning_starts = setting.get("learning_starts", 0)
    warm = learning_starts + 1000
    if "num_steps" in setting:
        warm = 2 * setting["num_steps"] * setting["num_envs"]
    times = [(step, when) for step, when in times if step >= warm]
    if len(times) < 2:
        fail(f"--total-timesteps {setting['total_timesteps']}: too few, as {warm} are to warm up")
    (first, begin), (last, end) = times[0], times[-1]
    rate = (last - first) / (end - begin)
    return rate, begin - start - (first - learning_starts) / rate


def clock_script(setting: dict, threads: int, flags: str) -> tuple[tuple[float, float], dict]:
    """Run a script; return what `steady` does, and the run's config."""
    words = [str(ROOT / f"{setting['script']}.py"), "--num-threads", str(threads)]
    for name, value in list(setting.items())[1:]:
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--log-every", "500"] * ("learning_starts" in setting)
    words += ["--eval-episodes", "1", "--checkpoint-every", "0", *shlex.split(flags)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        _run([*words, "--run-dir", f"{folder}/run"])
        config = json.loads(Path(folder, "run", "config.json").read_text())
        events = EventAccumulator(f"{folder}/run").Reload().Scalars("charts/SPS")
    times = [(event.step, event.wall_time) for event in events]
    return steady(times, start, setting), config


def clock_peer(setting: dict, where: dict) -> tuple[float, float]:
    """Run the peer; return what `steady` does."""
    start = time.time()
    program = "peer_torchrl.py" if where["peer"] == "torchrl" else "peer.py"
    out = _run([str(Path(__file__).with_name(program)), json.dumps(setting | where)])
    lines = re.findall(r"^(\d+) ([\d.]+)$", out, re.MULTILINE)
    return steady([(int(step), float(when)) for step, when in lines], start, setting)


def cleanrl_setting(setting: dict, atari: bool) -> dict:
    """Return what CleanRL can do of a setting: v4 of MuJoCo's environments, one in SAC and DQN."""
    script, env_id = setting["script"], setting["env_id"]
    name = CLEANRL.get(f"{script}, Atari" * atari, CLEANRL[script])
    if atari:
        game = find_game(env_id).title().replace("_", "")
        env_id = f"ale_py:{game}NoFrameskip-v4"
    elif f"{env_id.removesuffix('-v5')}-v4" in gym.registry:  # its Gymnasium has no v5
        env_id = env_id.replace("-v5", "-v4")
    one = {} if script.startswith("ppo") else {"num_envs": 1}  # of which it counts the steps
    return setting | {"script": name, "env_id": env_id} | one


def clock_cleanrl(setting: dict, where: dict, checkout: Path) -> tuple[float, float]:
    """Run CleanRL's script with the Python of its own .venv; return what `steady` does."""
    checkout = checkout.absolute()
    words = [str(checkout / "cleanrl" / f"{setting['script']}.py")]
    words += ["--no-cuda"] * (where["device"] == "cpu")
    for name, value in list(setting.items())[1:]:
        words += [f"--{name.replace('_', '-')}", str(value)]
    own = {"OMP_NUM_THREADS": str(where["threads"]), "PYTHONPATH": f"{checkout}:{os.getcwd()}"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        _run(words, str(checkout / ".venv/bin/python"), cwd=folder, env=os.environ | own)
        (path,) = Path(folder, "runs").rglob("events.out.tfevents.*")
        events = EventAccumulator(str(path)).Reload().Scalars("charts/SPS")
    return steady([(event.step, event.wall_time) for event in events], start, setting)


def cleanrl_versions(checkout: Path) -> dict[str, str]:
    """Return the commit of a checkout, and the versions of what is in its .venv."""
    python = str(checkout / ".venv/bin/python")
    code = "from importlib.metadata import distributions as d\n"
    code += "for x in d(): print(x.metadata['Name'], x.version)"
    words = [python, "-c", code], ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    with failing(f"--cleanrl {checkout}", OSError):
        done = [subprocess.run(x, capture_output=True, text=True).stdout for x in words]
    installed = dict(line.split() for line in done[0].splitlines())
    names = ("torch", "gymnasium", "mujoco", "ale-py", "numpy")
    return {"commit": done[1].strip()} | {x: installed[x] for x in names if x in installed}


def _run(words: list[str], python: str = sys.executable, **options) -> str:
    """Run a Python script, and return what it printed."""
    done = subprocess.run([python, *words], capture_output=True, text=True, **options)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        fail(f"{Path(words[0]).name} ended with exit code {done.returncode}: {last}", code=1)
    return done.stdout
