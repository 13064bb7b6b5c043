"""Results: from TensorBoard's events to small CSV files, and from those to the README's table."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published_returns.csv"


def export(run_dirs: list[Path], name: str = "") -> None:
    """Write results/NAME/ENV/SEED.csv and .json for finished runs.

    The CSV has a row for every training episode: step at its end, seconds since the first event,
    return and length. The JSON is the run's config.json, with its evaluation.

    Args:
        run_dirs: run folders.
        name: folder under results/; by default the run's --exp-name.
    """
    for run_dir in run_dirs:
        reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        config = json.loads((run_dir / "config.json").read_text())
        evaluation = reader.Scalars("eval/episodic_return")[-1]
        target = (
            FOLDER
            / (name or config["args"]["exp_name"])
            / config["args"]["env_id"].replace("/", "-")
        )
        target.mkdir(parents=True, exist_ok=True)
        begin = reader.Scalars("charts/SPS")[0].wall_time
        returns, lengths = (reader.Scalars(f"charts/episodic_{x}") for x in ("return", "length"))
        with (target / f"{config['args']['seed']}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("step", "seconds", "return", "length"))
            for a, b in zip(returns, lengths, strict=True):
                row = a.step, f"{a.wall_time - begin:.1f}", f"{a.value:.6g}", int(b.value)
                writer.writerow(row)
        config |= {"evaluation": {"step": evaluation.step, "return": evaluation.value}}
        del config["args"]["run_dir"]
        config["command"] = _command(config)
        path = target / f"{config['args']['seed']}.json"
        path.write_text(json.dumps(config, indent=2) + "\n")
        print(path.with_suffix(".csv"))


def _command(config: dict) -> str:
    """Return the command line without what only said where and how often to save."""
    words = iter(shlex.split(config["command"])[2:])
    kept = []
    for word in words:
        if word in ("--run-dir", "--checkpoint-every"):
            next(words)
        else:
            kept.append(word)
    return shlex.join(["python", f"{config['script']}.py", *kept])


def last_returns(path: Path, episodes: int = 100) -> float:
    """Return the mean training return of the last episodes of a CSV file that `export` wrote."""
    with path.open() as file:
        return float(np.mean([float(row["return"]) for row in csv.DictReader(file)][-episodes:]))


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(draws.mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def table(script: str = "ppo_continuous") -> None:
    """Print the README's table of a script's committed results, beside CleanRL's published ones.

    Args:
        script: the script's name.
    """
    print("\n".join(rows(script)))


def plot(script: str = "ppo_continuous") -> None:
    """Draw the learning curves of a script's committed results to results/SCRIPT.png.

    Mean over seeds of the return averaged in windows of 2% of the run, its 95% bootstrap interval,
    the seeds faintly, and CleanRL's published mean as a line.

    Args:
        script: the script's name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folders = sorted((FOLDER / script).iterdir())
    _, axes = plt.subplots(1, len(folders), figsize=(3.6 * len(folders), 3.2), squeeze=False)
    for axis, folder in zip(axes[0], folders, strict=True):
        curves = [_curve(path) for path in sorted(folder.glob("*.csv"))]
        steps, returns = curves[0][0], np.stack([curve for _, curve in curves])
        low, high = np.transpose([interval(column) for column in returns.T])
        axis.plot(steps, returns.T, color="C0", alpha=0.25, linewidth=0.8)
        axis.plot(steps, returns.mean(axis=0), color="C0", label=f"mean of {len(curves)} seeds")
        axis.fill_between(steps, low, high, color="C0", alpha=0.2, linewidth=0)
        if known := published(script).get(folder.name.rsplit("-", 1)[0]):
            axis.axhline(known[0], color="0.3", linestyle="--", linewidth=1, label="CleanRL (v4)")
        axis.set(title=folder.name, xlabel="environment steps")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(6, 6))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training return")
    axes[0][0].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(FOLDER / f"{script}.png", dpi=130, metadata={"Software": None})
    print(FOLDER / f"{script}.png")


def _curve(path: Path, windows: int = 50) -> tuple[np.ndarray, np.ndarray]:
    with path.open() as file:
        data = [(int(row["step"]), float(row["return"])) for row in csv.DictReader(file)]
    steps, returns = np.transpose(data)
    total = json.loads(path.with_suffix(".json").read_text())["args"]["total_timesteps"]
    grid = np.linspace(0, total, windows + 1)[1:]
    inside = [(steps > end - total / windows) & (steps <= end) for end in grid]
    means = np.array([returns[mask].mean() if mask.any() else np.nan for mask in inside])
    known = ~np.isnan(means)
    return grid, np.interp(grid, grid[known], means[known])


def published(script: str) -> dict[str, tuple[float, float]]:
    """Return CleanRL's published mean and deviation by environment, without its version."""
    with PUBLISHED.open() as file:
        found = [row for row in csv.DictReader(file) if row["script"] == script]
    return {
        row["env_id"].rsplit("-", 1)[0]: (float(row["mean"]), float(row["std"]))
        for row in found
        if row["source"].startswith("CleanRL")
    }


def rows(script: str) -> list[str]:
    """Return the lines of the table: last 100 training episodes, mean over seeds, 95% interval."""
    lines = [
        "| environment | steps | return | 95% interval | each seed | CleanRL |",
        "|---" * 6 + "|",
    ]
    for folder in sorted((FOLDER / script).iterdir()):
        files = sorted(folder.glob("*.csv"))
        values = [last_returns(path) for path in files]
        low, high = interval(values)
        steps = json.loads(files[0].with_suffix(".json").read_text())["args"]["total_timesteps"]
        each = ", ".join(f"{value:,.0f}" for value in values)
        name = folder.name.rsplit("-", 1)[0]
        columns = folder.name, f"{steps:,}", f"{np.mean(values):,.0f}", f"{low:,.0f} to {high:,.0f}"
        known = published(script).get(name)
        peer = f"{known[0]:,.0f} ± {known[1]:,.0f}" if known else "-"
        lines.append(f"| {' | '.join([*columns, each, peer])} |")
    return lines
