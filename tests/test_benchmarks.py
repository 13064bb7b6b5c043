"""The README's numbers come from the committed results, and those from runs."""

import csv
import json

import numpy as np
import pytest
from conftest import ROOT, scalars

import ppo_continuous as ppo
from benchmarks import results


def test_the_readmes_table_is_the_one_that_the_results_give():
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(results.rows("ppo_continuous")) in readme


def test_the_readmes_other_figures_are_those_of_the_committed_files():
    readme = (ROOT / "README.md").read_text()
    for path in results.FOLDER.glob("tutorial_*/*/*.json"):
        figure = json.loads(path.read_text())["evaluation"]["return"]
        assert f"{figure:,.0f}" in readme
    for path in results.FOLDER.glob("speed_*.json"):
        content = json.loads(path.read_text())
        ratios = content["ratios"]
        rates = [np.median(x["steps_per_second"]) for x in content.values() if isinstance(x, dict)]
        spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        assert f"{rates[0]:,.0f} | {rates[1]:,.0f} | {spread}" in readme


def test_committed_results_say_how_they_were_made():
    for path in (ROOT / "benchmarks" / "results").glob("*/*/*.csv"):
        config = json.loads(path.with_suffix(".json").read_text())
        assert config["args"]["seed"] == int(path.stem)
        assert config["args"]["env_id"].replace("/", "-") == path.parent.name
        assert len(config["commit"]) == 40 and config["versions"]["mujoco"]  # a clean checkout
        with path.open() as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(steps) and steps[-1] > 0.98 * config["args"]["total_timesteps"]
        if config["args"]["num_envs"] == 1:  # no episode is missing
            assert np.cumsum([int(row["length"]) for row in rows]).tolist() == steps


def test_export_writes_what_tensorboard_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    args = ppo.Args(
        env_id="InvertedPendulum-v5",
        total_timesteps=1024,
        num_steps=64,
        eval_episodes=1,
        num_minibatches=4,
        compile=False,
        run_dir="r",
        seed=7,
    )
    results.export([ppo.train(args)])
    path = tmp_path / "results/ppo_continuous/InvertedPendulum-v5/7.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    expected = scalars(tmp_path / "r")["charts/episodic_return"]
    assert [(int(row["step"]), float(row["return"])) for row in rows] == expected
    assert results.last_returns(path) == pytest.approx(np.mean([x for _, x in expected[-100:]]))
    config = {"script": "ppo_continuous", "command": "python a/x.py --seed 7 --run-dir r --squash"}
    assert results._command(config) == "python ppo_continuous.py --seed 7 --squash"


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = results.interval(rng.normal(3.0, 1.0, 20).tolist())
        hits += low <= 3.0 <= high
    assert 0.85 < hits / 200 <= 0.99
