"""Results: from TensorBoard's events to small CSV files, and from those to the README's table."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).parent / "results"
PUBLISHED = Path(__file__).parent / "published_returns.csv"


def export(run_dirs: list[Path]) -> None:
    """Write results/SCRIPT/ENV/SEED.csv and .json for finished runs.

    The CSV has a row for every training episode: step at its end, seconds since the first event,
    return and length. The JSON is the run's config.json, with its evaluation.

    Args:
        run_dirs: run folders.
    """
    for run_dir in run_dirs:
        reader = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        config = json.loads((run_dir / "config.json").read_text())
        evaluation = reader.Scalars("eval/episodic_return")[-1]
        target = FOLDER / config["script"] / config["args"]["env_id"].replace("/", "-")
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
    args = config["args"]
    return f"python {config['script']}.py --env-id {args['env_id']} --seed {args['seed']}"


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


def rows(script: str) -> list[str]:
    """Return the lines of the table: last 100 training episodes, mean over seeds, 95% interval."""
    published = defaultdict(lambda: "-")
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            if row["script"] == script and row["source"].startswith("CleanRL"):
                name = row["env_id"].rsplit("-", 1)[0]
                published[name] = f"{float(row['mean']):,.0f} ± {float(row['std']):,.0f}"
    lines = ["| environment | steps | return | 95% interval | each seed | CleanRL |", "|---" * 6 + "|"]
    for folder in sorted((FOLDER / script).iterdir()):
        files = sorted(folder.glob("*.csv"))
        values = [last_returns(path) for path in files]
        low, high = interval(values)
        steps = json.loads(files[0].with_suffix(".json").read_text())["args"]["total_timesteps"]
        each = ", ".join(f"{value:,.0f}" for value in values)
        name = folder.name.rsplit("-", 1)[0]
        columns = folder.name, f"{steps:,}", f"{np.mean(values):,.0f}", f"{low:,.0f} to {high:,.0f}"
        lines.append(f"| {' | '.join([*columns, each, published[name]])} |")
    return lines
