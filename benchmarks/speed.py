"""Environment steps per second, beside a peer with equal settings, environment and threads."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


def _clock_ours(
    env_id: str, num_envs: int, num_steps: int, total: int, threads: int, folder: Path
) -> list:
    flags = (
        f"--env-id {env_id} --num-envs {num_envs} --num-steps {num_steps} --num-threads {threads}"
    )
    flags += f" --total-timesteps {total} --eval-episodes 1 --checkpoint-every 0 --run-dir {folder}"
    subprocess.run(
        [sys.executable, ROOT / "ppo_continuous.py", *flags.split()],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    events = EventAccumulator(str(folder)).Reload().Scalars("charts/SPS")
    return [
        (event.step, event.wall_time) for event in events[:-1]
    ]  # the last one waits for the evaluation


def _clock_sb3(
    env_id: str, num_envs: int, num_steps: int, total: int, threads: int, _: Path
) -> list:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "peer_sb3.py",
        env_id,
        num_envs,
        num_steps,
        total,
        threads,
    ]
    done = subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    return [(int(step), float(seconds)) for step, seconds in lines]


def speed(
    env_id: str = "HalfCheetah-v5",
    num_envs: int = 1,
    num_steps: int = 2048,
    total_timesteps: int = 65_536,
    threads: int = 1,
    repeats: int = 3,
    output: Path | None = None,
) -> None:
    """Steps per second of ppo_continuous.py and of Stable-Baselines3's PPO, in turn.

    The steady state is measured from the end of the second rollout on. Start-up, with compilation,
    is the time until then, less what those two rollouts take in the steady state.

    Args:
        env_id: environment.
        num_envs: environments that step together.
        num_steps: steps of each environment in a rollout; a minibatch is 1/32 of a rollout.
        total_timesteps: environment steps of each measurement.
        threads: threads that PyTorch computes with.
        repeats: measurements of each, alternating.
        output: JSON file for the result.
    """
    clocks = {"ppo_continuous.py": _clock_ours, "Stable-Baselines3 PPO": _clock_sb3}
    results = {name: {"steps_per_second": [], "startup_seconds": []} for name in clocks}
    for _ in range(repeats):
        for name, clock in clocks.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.time()
                times = clock(
                    env_id, num_envs, num_steps, total_timesteps, threads, Path(folder) / "run"
                )
            times = [(step, seconds) for step, seconds in times if step >= 2 * num_steps * num_envs]
            (first, begin), (last, end) = times[0], times[-1]
            rate = (last - first) / (end - begin)
            results[name]["steps_per_second"].append(rate)
            results[name]["startup_seconds"].append(begin - start - first / rate)
    print(f"{env_id}, {num_envs} environment(s), {threads} thread(s), {repeats} runs each, in turn")
    print(f"{'':24}{'steps/s':>9}{'least':>9}{'most':>9}{'start-up':>10}")
    for name, result in results.items():
        rates, startup = result["steps_per_second"], statistics.median(result["startup_seconds"])
        columns = "".join(f"{f(rates):9,.0f}" for f in (statistics.median, min, max))
        print(f"{name:24}{columns}{startup:9.1f}s")
    ours, peer = (result["steps_per_second"] for result in results.values())
    ratios = [a / b for a, b in zip(ours, peer)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio, pair by pair: {statistics.median(ratios):.2f} ({spread})")
    if output:
        output.write_text(
            json.dumps(
                {"env_id": env_id, "num_envs": num_envs, "ratios": ratios} | results, indent=2
            )
            + "\n"
        )
