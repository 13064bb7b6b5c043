"""Pictures of results: learning curves, aggregates over environments, two results compared."""

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from benchmarks import random_returns, results
from benchmarks.results import Result
from benchmarks.suites import SUITES
from common import fail, failing

INSTALL = "pip install -e '.[plot]'"
ROOT = Path("runs/benchmarks")
MEASURES = {
    "in the end": lambda result: float(result.last().mean()),
    "over the run": lambda result: float(np.average(result.returns, weights=result.lengths)),
}
UNITS = {1: "seconds", 60: "minutes", 3600: "hours"}


def plot(suites: Positional[tuple[str, ...]] = (), run_dir: Path = ROOT) -> None:
    """Draw the results of suites, to pictures beside their folders.

    SUITE.png has a learning curve for every environment: the return averaged in windows of 2% of
    the run (more where episodes are few), mean over seeds, its 95% bootstrap interval, the seeds
    faintly, and the published return as a line; SUITE_time.png the same against wall time.
    SUITE_aggregate.png has the interquartile mean over seeds and environments and the performance
    profile (rliable), of scores (x - random) / (published - random).

    Args:
        suites: names under benchmarks/results/ or under the run folder, or folders; by default
            all of `run`.
        run_dir: folder of the suites' runs.
    """
    folders = [_find(name, run_dir) for name in suites]
    folders = folders or [results.FOLDER / suite for suite in SUITES] + sorted(run_dir.glob("*/"))
    known = {}
    if files := [str(folder) for folder in folders if suites and not folder.is_dir()]:
        fail(f"{files[0]} is not a folder")
    for folder in (folder for folder in folders if folder.is_dir()):
        with contextlib.suppress(*(() if suites else (SystemExit,))):  # one does not end them all
            known[folder] = results.read_folder(folder)
    empty = [folder for folder in known if suites and not known[folder]]
    if empty or not any(known.values()):
        where = f" in {empty[0]}" if empty else ""
        fail(f"no results{where}: python -m benchmarks run SUITE")
    for folder, by_env in known.items():
        pictures = {"": draw_curves, "_time": draw_times, "_aggregate": draw_aggregate}
        for suffix, draw in pictures.items() if by_env else ():
            draw(by_env, folder.parent / f"{folder.name}{suffix}.png")


def _find(name: str, root: Path) -> Path:
    places = (Path(name), results.FOLDER / name, root / name)
    found = next((path for path in places if path.exists()), None)
    if found is None:
        fail(f"there is no {', '.join(map(str, places))}")
    return Path(os.path.abspath(found)) if found.name in ("", "..") else found  # "." has no name


def _pyplot():
    with failing(f"pictures need matplotlib: {INSTALL}", ImportError):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _axes(count: int) -> tuple:
    """Return a figure and `count` axes, at most four side by side."""
    columns = count if count < 5 else min((4, 3), key=lambda x: -count % x)  # few empty places
    rows = -(-count // columns)
    options = {"figsize": (2.4 * columns + 0.2, 2.0 * rows + 0.5), "layout": "constrained"}
    _pyplot().rcParams |= {"font.size": 8}  # as in a paper, two panels to a column
    figure, axes = _pyplot().subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def _save(figure, path: Path, by_env: dict[str, list[Result]]) -> None:
    """Save a picture that says which results it was drawn from."""
    description = {"Software": None, "Description": digest(by_env)}
    with failing(f"{path} cannot be written", OSError, ValueError):
        path = path if path.suffix else path.with_suffix(".png")  # as Matplotlib does
        options = {"metadata": description} if path.suffix == ".png" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=220, bbox_inches="tight", **options)
    _pyplot().close(figure)
    print(path)


def digest(by_env: dict[str, list[Result]]) -> str:
    """Return a fingerprint of results."""
    drawn, random = hashlib.sha256(), random_returns.read()
    for env_id, found in by_env.items():
        known = results.published(found[0].config)
        drawn.update(f"{env_id} {known} {random.get(env_id)}".encode())
        for result in found:
            unfinished = b"unfinished" * ("evaluation" not in result.config)
            drawn.update(np.stack(result[1:]).tobytes() + unfinished)
    return drawn.hexdigest()[:16]


def curve(result: Result, total: int, windows: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the mean return of the episodes that ended in the window before each.

    A window without one takes what lies between its neighbours; there is nothing before the first
    episode, and after the last.
    """
    ends = np.linspace(0, total, windows + 1)[1:]
    window = np.ceil(result.steps * windows / total).astype(int) - 1
    known = np.unique(window[window < windows])
    if not known.size:
        return ends, np.full(windows, np.nan)
    means = [result.returns[window == i].mean() for i in known]
    return ends, np.interp(ends, ends[known], means, left=np.nan, right=np.nan)


def seconds_at(steps: np.ndarray, result: Result) -> np.ndarray:
    """Return the seconds of work after which a run had made so many steps."""
    last = np.flatnonzero(np.diff(result.seconds, append=np.inf) > 0)  # of those logged together
    return np.interp(steps, result.steps[last], result.seconds[last])


def _draw(axis, found: list[Result], color: str, unit: int = 0, prefix: str = "") -> None:
    """Draw the curves of an environment's seeds, their mean and its interval.

    They are drawn against environment steps, or against wall time in a unit of so many seconds,
    where the mean ends with the fastest seed. Seeds that are not finished are not in the mean,
    unless none is.
    """
    from matplotlib.ticker import EngFormatter

    if not (found := [result for result in found if result.steps.size]):
        return
    whole = ["evaluation" in result.config for result in found]
    unfinished = len(whole) - sum(whole)
    whole = np.array(whole) if any(whole) else np.ones(len(found), bool)
    total = max(result.total for result in found)
    fewest = min(result.steps.size for result, inside in zip(found, whole) if inside)
    curves = [curve(result, total, windows=min(50, max(5, fewest // 10))) for result in found]
    x, returns = curves[0][0], np.stack([returns for _, returns in curves])
    if not unit:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel("environment steps")
        own = [x] * len(found)
    else:
        axis.set_xlabel(f"wall time in {UNITS[unit]}")
        own = [seconds_at(x, result) / unit for result in found]
        x = np.linspace(0, min(own[i][-1] for i in np.flatnonzero(whole)), len(x) + 1)[1:]
    for times, seed in zip(own, returns, strict=True):
        axis.plot(times, seed, color=color, alpha=0.5, linewidth=0.5)
    # before the slowest seed's first window there is no mean
    returns = [np.interp(x, *seed, left=np.nan) for seed in zip(own, returns)]
    returns = np.stack(returns)[whole]
    low, high = np.transpose([results.interval(column) for column in returns.T])
    label = f"mean of {len(returns)} seeds, 95% bootstrap interval"
    few = {1: "1 seed", 2: "mean and range of 2 seeds"}
    label = few.get(len(returns), label) + f" ({unfinished} not finished)" * (unfinished > 0)
    axis.plot(x, returns.mean(axis=0), color=color, label=prefix + label)
    axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _legend(figure, axes) -> None:
    """Explain the lines of all axes once."""
    figure.supylabel("training return", fontsize="medium")
    labels = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        labels |= dict(zip(names, handles))
    options = {"ncols": 3 if len(axes) > 2 else 1, "frameon": False, "fontsize": "small"}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", **options)


def draw_curves(by_env: dict[str, list[Result]], path: Path, unit: int = 0) -> None:
    """Draw a suite's learning curves, against environment steps or in a unit of wall time."""
    figure, axes = _axes(len(by_env))
    scripts = {env_id: found[0].config["script"] for env_id, found in by_env.items()}
    for axis, (env_id, found) in zip(axes, by_env.items(), strict=True):
        _draw(axis, found, "C0", unit)
        if known := results.published(found[0].config):
            axis.axhline(known.mean, color="0.3", linestyle="--", linewidth=1, label=known.label)
            axis.axhspan(known.mean - known.std, known.mean + known.std, color="0.3", alpha=0.1)
        several = len(set(scripts.values())) > 1
        axis.set_title(env_id + f" ({scripts[env_id]})" * several, fontsize="medium")
    _legend(figure, axes)
    _save(figure, path, by_env)


def draw_times(by_env: dict[str, list[Result]], path: Path) -> None:
    """Draw a suite's learning curves against wall time."""
    seconds = [result.seconds[-1] for x in by_env.values() for result in x if result.seconds.size]
    longest = max(seconds, default=0)
    draw_curves(by_env, path, max((x for x in UNITS if x <= longest / 2), default=1))


def normalised(by_env: dict[str, list[Result]]) -> tuple[dict[str, list[float]], list[str]]:
    """Return each environment's scores (x - random) / (published - random), one for each seed.

    Also return the environments that have none, and why.
    """
    random, scores, missing = random_returns.read(), {}, []
    for env_id, found in by_env.items():
        known = results.published(found[0].config)
        if unfinished := sum("evaluation" not in result.config for result in found):
            missing.append(f"{env_id}: {unfinished} of {len(found)} runs are not finished")
        elif not all(len(result.returns) for result in found):
            missing.append(f"{env_id}: a run has no finished episode")
        elif known is None:
            script = found[0].config["script"]
            missing.append(f"{env_id}: nothing is published for {script} and these steps")
        elif env_id not in random:
            missing.append(f"{env_id}: python -m benchmarks random --env-ids {env_id}")
        elif abs(known.mean - random[env_id]) < 1e-6:
            missing.append(f"{env_id}: what is published is what random actions return")
        else:
            last = np.array([result.last().mean() for result in found])
            scores[env_id] = (last - random[env_id]) / (known.mean - random[env_id])
    return scores, missing


def draw_aggregate(by_env: dict[str, list[Result]], path: Path) -> None:
    """Draw a suite's aggregate scores and performance profile, or say why there are none."""
    name = path.stem.removesuffix("_aggregate")
    scores, missing = normalised(by_env)
    for reason in missing:
        print(f"not in the aggregate of {name}: {reason}")
    seeds = {len(x) for x in scores.values()}
    if len(seeds) > 1:
        counts = ", ".join(f"{env_id} {len(x)}" for env_id, x in scores.items())
        print(f"no aggregate of {name}: as many seeds are needed everywhere ({counts})")
    elif seeds == {1}:
        print(f"no aggregate of {name}: of one seed there is no interval")
    if len(seeds) != 1 or seeds == {1}:
        path.unlink(missing_ok=True)  # it would be of older results
        return
    try:
        from rliable import library, metrics
    except ImportError as error:
        print(f"no aggregate of {name} ({error}): {INSTALL}, with Python below 3.14")
        path.unlink(missing_ok=True)
        return
    functions = {"interquartile mean": metrics.aggregate_iqm, "mean": metrics.aggregate_mean}
    functions |= {"median": metrics.aggregate_median}
    matrix = np.column_stack(list(scores.values()))  # [seeds, environments]
    thresholds = np.linspace(min(0.0, matrix.min()), max(1.0, matrix.max()) * 1.05, 101)

    def estimate(function, repeats: int) -> tuple:
        state = np.random.get_state()
        np.random.seed(0)  # it draws from there, whatever it is given
        with warnings.catch_warnings():  # rliable calls arch as arch was
            warnings.simplefilter("ignore")
            points, intervals = library.get_interval_estimates({"": matrix}, function, reps=repeats)
        np.random.set_state(state)
        return points[""], intervals[""]

    points, intervals = estimate(lambda x: np.array([f(x) for f in functions.values()]), 5000)
    profile, band = estimate(lambda x: library.score_distributions(x, thresholds), 1000)
    what = f"{name}, {len(matrix)} seeds of {len(scores)} environments"
    what += f" (of {len(by_env)})" * (len(scores) < len(by_env))
    spread = f"{intervals[0, 0]:.2f} to {intervals[1, 0]:.2f}"
    print(f"{what}; interquartile mean {points[0]:.2f} ({spread}) of what is published")

    figure, (left, right) = _axes(2)
    left.errorbar(points, range(3), xerr=abs(intervals - points), fmt="o", capsize=4)
    left.set(yticks=range(3), yticklabels=functions, ylim=(2.5, -0.5))
    right.step(thresholds, profile, where="post")
    right.fill_between(thresholds, *band, alpha=0.2, linewidth=0, step="post")
    right.set_ylabel("share of runs above")
    for axis in (left, right):
        axis.set_xlabel("score (random 0, published 1)")
        axis.axvline(1.0, color="0.3", linestyle="--", linewidth=1)
    figure.suptitle(f"{what}; 95% stratified bootstrap intervals", fontsize="medium")
    _save(figure, path, by_env)


def compare(
    a: Positional[Path], b: Positional[Path], output: Path = Path("runs/compare.png")
) -> None:
    """Tell whether B learns better than A, and draw their learning curves over one another.

    Two things are compared: the mean return of the last 100 training episodes (and what share of
    the steps they took), and that of all steps, which tells who learns faster. Intervals of the
    difference are Welch's, over seeds; all that are printed hold at once in 95% of cases. Where one
    side has a single seed, the interval tells if that could be one more seed of the other.

    Args:
        a: A: run folder, folder of run folders, folder of results, or a result's CSV file; or the
            name of one under benchmarks/results/ or, else, under runs/benchmarks/.
        b: B: the same.
        output: the picture.
    """
    a, b = (_find(str(path), ROOT) for path in (a, b))
    sides = [results.read_folder(path) for path in (a, b)]
    both = [env_id for env_id in sides[0] if env_id in sides[1]]
    if not both:
        known = (", ".join(side) or "nothing" for side in sides)
        fail(f"no environment in common: {a} has {next(known)}, {b} has {next(known)}")
    if alone := sorted(sides[0].keys() ^ sides[1].keys()):
        print(f"on one side only: {', '.join(alone)}")
    figure, axes = _axes(len(both))
    judged: dict[str, list[str]] = {}
    level = 1 - 0.05 / (len(both) * len(MEASURES))  # Bonferroni
    for axis, env_id in zip(axes, both, strict=True):
        for side, color, path in zip(sides, ("C0", "C1"), (a, b)):
            _draw(axis, side[env_id], color, prefix=f"{path}: ")
        axis.set_title(env_id, fontsize="medium")
        pair = [side[env_id] for side in sides]
        print(f"{env_id}: {unlike(*pair)}")
        for word, sentence in judge(*pair, level):
            judged.setdefault(word, []).append(env_id)
            print(f"  {sentence}")
    print(verdict(a, b, judged))
    _legend(figure, axes)
    _save(figure, output, {str(i): [x for e in both for x in s[e]] for i, s in enumerate(sides)})


def unlike(a: list[Result], b: list[Result]) -> str:
    """Say in which arguments, but for seeds, two sides differ, and in what they were made with.

    An argument that is newer than one side, and off on the other, is no difference.
    """
    configs = [side[0].config for side in (a, b)]
    args = [config["args"] | {"script": config["script"]} for config in configs]
    sizes = [results.minibatch_size(x) or "-" for x in args]
    args = [x | {"minibatch": size} for x, size in zip(args, sizes)]
    names = sorted((args[0].keys() | args[1].keys()) - results.LIKE)
    pairs = [(name, *(str(side.get(name, "-")) for side in args)) for name in names]
    newer = {"-", "False"}, {"-", "None"}
    told = [f"{x} {y} and {z}" for x, y, z in pairs if y != z and {y, z} not in newer]
    one, other = made_with(a), made_with(b)
    pairs = [(x, one.get(x), other.get(x)) for x in one | other]
    made = [f"{name} {x} and {y}" for name, x, y in pairs if x != y]
    return ("; ".join(told) or "the same arguments") + f" ({', '.join(made)})" * bool(made)


def made_with(side: list[Result]) -> dict[str, str]:
    """Return the commits and versions behind some results."""
    found: dict[str, set[str]] = {}
    for config in (x for result in side for x in _parts(result.config)):
        commit = re.sub(r"^(\w{7})\w*", r"\1", str(config.get("commit")))
        if commit.endswith(("-dirty", "None")) and "code" in config:  # it may be any
            commit += f" {config['code']}"
        for name, value in ({"commit": commit} | config.get("versions", {})).items():
            found.setdefault(name, set()).add(value)
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _parts(config: dict) -> list[dict]:
    """Return what a run was begun with, and what else it was resumed with."""
    return [config, *(config | other for other in config.get("resumed", []))]


def judge(a: list[Result], b: list[Result], level: float = 0.95) -> list[tuple[str, str]]:
    """Judge B by each of MEASURES, or as a whole; and say why in a sentence.

    It is `better in the end` or `worse over the run`, say, `the same`, `open` or `not compared`.
    """
    if unfinished := sum("evaluation" not in result.config for result in a + b):
        return [("not compared", f"{unfinished} of {len(a + b)} runs are not finished")]
    if empty := sum(not result.steps.size for result in a + b):
        return [("not compared", f"{empty} of {len(a + b)} runs had no episode")]
    if a[0].total != b[0].total:
        steps = f"{a[0].total:,} steps cannot be compared with {b[0].total:,}"
        return [("not compared", steps)]
    pairs = [(x, y) for x in a for y in b if x.config["args"]["seed"] == y.config["args"]["seed"]]
    same = len(pairs) == min(len(a), len(b)) and all(results.repeats(x, y) for x, y in pairs)
    if same and any(np.ptp(x.returns) for x, _ in pairs):  # a constant return proves nothing
        return [("the same", f"the same to the last episode, {len(pairs)} seed(s)")]
    begins = [result.steps[-101] if len(result.steps) > 100 else 0 for result in a + b]
    # PPO plays whole rollouts; CleanRL's own runs have no evaluation
    ends = [(x.config["evaluation"] or {"step": x.total})["step"] for x in a + b]
    share = max(1 - begin / end for begin, end in zip(begins, ends))
    shares = {"in the end": f" (the last {share:.0%})"}
    judged = []
    for when, measure in MEASURES.items():
        values = [[measure(result) for result in side] for side in (a, b)]
        means = [np.mean(side) for side in values]
        sentence = f"{when}{shares.get(when, '')}: return {means[0]:,.1f} and {means[1]:,.1f}"
        sentence += f" ({len(a)} and {len(b)} seeds), difference {means[1] - means[0]:+,.1f}"
        if min(len(a), len(b)) == 1 and np.ptp(max(values, key=len)) == 0:
            judged.append(("open", sentence + "; of how far seeds lie apart that says nothing"))
            continue
        low, high = difference(*values, level)
        sentence += f", {100 * level:.4g}% interval {low:+,.1f} to {high:+,.1f}"
        word = f"better {when}" if low > 0 else f"worse {when}" if high < 0 else "open"
        judged.append((word, sentence))
    return judged


def difference(a: list[float], b: list[float], level: float) -> tuple[float, float]:
    """Return the interval of B's mean less A's, of a value for each seed: Welch's.

    Of a single value it is the one in which one more of the other side would lie.
    """
    with failing(f"intervals need scipy: {INSTALL}", ImportError):
        from scipy import stats
    apart = np.mean(b) - np.mean(a)
    if min(len(a), len(b)) > 1 and np.ptp(a) == np.ptp(b) == 0:
        low = high = apart
    elif min(len(a), len(b)) > 1:
        errors = [np.var(side, ddof=1) / len(side) for side in (a, b)]  # squared
        freedom = sum(errors) ** 2 / sum(x**2 / (len(y) - 1) for x, y in zip(errors, (a, b)))
        low, high = stats.t.interval(level, freedom, apart, np.sqrt(sum(errors)))
    else:
        seeds = max(a, b, key=len)
        scale = np.std(seeds, ddof=1) * np.sqrt(1 + 1 / len(seeds))
        low, high = stats.t.interval(level, len(seeds) - 1, apart, scale)
    return float(low), float(high)


def verdict(a: Path, b: Path, judged: dict[str, list[str]]) -> str:
    """Say in one sentence how B compares with A, from environments by how it was judged there."""
    if not (compared := judged.keys() - {"not compared"}):
        return f"Nothing of {b} was compared with {a}."
    if compared == {"the same"}:
        return f"{b} repeats {a}, in what was compared."
    told = [
        f"{word} on {', '.join(env_ids)}"
        for word, env_ids in judged.items()
        if word.startswith(("better", "worse"))
    ]
    return f"{b} is {'; '.join(told)}, than {a}." if told else f"{b} cannot be told from {a}."
