"""What the notebooks share: trained networks, sweeps, statistics, tables and figures.

`pruning_utils.py` is what a reader takes away; this file and `training.py` are what was done here.
"""

import functools
import inspect
import itertools
import json
import numbers
import os
import sys
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import cloudpickle
import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
from training import (  # noqa: F401 - the notebooks import all of it from here
    CACHE,
    CLASS_NAMES,
    HIDDEN,
    SEEDS,
    TITLES,
    Dataset,
    Trained,
    accuracy,
    cache_key,
    cache_path,
    device,
    evaluate,
    fetch,
    keras,
    load_dataset,
    loss,
    progress,
    relu_network,
    silent_stderr,
    store,
    study_networks,
    train_networks,
)

import pruning_utils
from pruning_utils import apply_masks, cost, keep_masks, repair, weight_scores

SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
METHOD_IMAGES = 3000  # the first so many training images are what a method of a sweep may use

# --- Sweeps ----------------------------------------------------------------------------------------------------


def repaired(prune: Callable, network: keras.Model, sparsity: float, *, x, y, seed) -> keras.Model:
    """Prune and repair: `partial(repaired, prune_neurons)` is a method of `sweep`."""
    return repair(prune(network, sparsity, x=x, y=y, seed=seed), network, x)


def repaired_weights(network: keras.Model, sparsity: float, *, x, y=None, seed=None) -> keras.Model:
    """Prune weights by "reconstruction" and repair: a method of `sweep`. One score serves all sparsities."""
    return repair(apply_masks(network, keep_masks(reconstruction(network, x), sparsity)), network, x)


def reconstruction(network: keras.Model, x: np.ndarray, folder: Path = CACHE) -> dict[str, np.ndarray]:
    """Return `weight_scores(network, "reconstruction", x)`, kept in the cache for the next sparsity or notebook."""
    key = cache_key(Path(pruning_utils.__file__).read_text("utf-8"), x, *network.get_weights())
    path = cache_path(folder, f"scores-{key}")
    scores = fetch(path, dict)
    if scores is None:
        scores = {name: score.astype(np.float32) for name, score in weight_scores(network, "reconstruction", x).items()}
        store(path, scores)
    return scores


def sweep(
    trained: Iterable[Trained],
    methods: Mapping[str, Callable],
    sparsities: Iterable[float] = SPARSITIES,
    n_jobs: int | None = None,
    cache: Path | str | None = CACHE,
) -> pd.DataFrame:
    """Prune every network with every method at every sparsity and measure it on the test images of its data set.

    methods: name -> function(network, sparsity, *, x, y, seed) that returns a pruned network; x and y are the first
    3,000 training images and labels, seed is the network's. `prune_weights`, `partial(prune_neurons,
    criterion="activation")` and a function of your own are methods. One row per pruned network: dataset, method, seed,
    sparsity, accuracy (in [0, 1]), loss, weights_left, multiply_adds; data set by data set, method by method.

    n_jobs: None computes here, one after the other; more go to processes by joblib, as does
    `joblib.parallel_config(backend="dask")` around the call, once there is a `dask.distributed.Client`. Rows and their
    order stay the same. A task is a network and a method with all sparsities. It pays with many networks on many
    machines; two processes on two cores took 1.3 to 1.5 times as long as one, whose matrix products fill both.
    cache: folder for what methods made of functions of `pruning_utils` and this file found, by all that determines it.

    When a method fails, the rest is still measured; then a `RuntimeError` names network, method and sparsity, and its
    attribute `rows` holds the frame of what was measured.
    """
    trained, sparsities = list(trained), [float(sparsity) for sparsity in sparsities]
    if not trained or not methods or not sparsities:
        raise ValueError("a sweep needs a network, a method and a sparsity at least")
    names = dict.fromkeys(each.dataset.name for each in trained)
    grid = [(each, method) for name in names for method in methods for each in trained if each.dataset.name == name]
    tasks = [(each, methods[method], sparsities) for each, method in grid]
    paths = _sweep_paths(None if cache is None else Path(cache), tasks)
    results = [path and fetch(path, lambda stored: (pd.DataFrame({name: stored[name] for name in stored}), None))
               for path in paths]  # fmt: skip
    missing = [number for number, result in enumerate(results) if result is None]
    if joblib.effective_n_jobs(n_jobs) == 1:
        found = (_run_task(*tasks[number]) for number in progress(missing, "pruning"))
    else:
        found = _in_processes([tasks[number] for number in missing], n_jobs)
    for number, result in zip(missing, found, strict=True):
        results[number] = result
        if paths[number] and result[1] is None:
            store(paths[number], {name: result[0][name].to_numpy() for name in result[0]})
    frames = [frame.assign(dataset=each.dataset.name, method=method, seed=each.seed)
              for (each, method), (frame, _) in zip(grid, results, strict=True)]  # fmt: skip
    rows = pd.concat(frames, ignore_index=True).reindex(columns=["dataset", "method", "seed", *_MEASURED])
    for (each, method), (frame, error) in zip(grid, results, strict=True):
        if error is not None:
            failure = RuntimeError(f"method {method!r} failed on {each.dataset.name}, seed {each.seed}, at sparsity "
                                   f"{sparsities[len(frame)]}: {error!r}; the rows so far are in `rows`")  # fmt: skip
            failure.rows = rows
            raise failure from error
    return rows


_OURS = (pruning_utils.prune_weights, pruning_utils.prune_neurons, repaired, repaired_weights)
_MEASURED = ["sparsity", "accuracy", "loss", "weights_left", "multiply_adds"]


def _run_task(each: Trained, method: Callable, sparsities: list[float]) -> tuple[pd.DataFrame, Exception | None]:
    """Return the rows of a network and a method, up to a sparsity at which the method fails, and its error."""
    data, rows, problem = each.dataset, [], None
    x, y = data.x_train[:METHOD_IMAGES], data.y_train[:METHOD_IMAGES]
    for sparsity in sparsities:
        try:
            pruned = method(each.network, sparsity, x=x, y=y, seed=each.seed)
            correct, entropy = evaluate(pruned, data.x_test, data.y_test)
            left = cost(pruned)
        except Exception as error:
            problem = error
            break
        rows.append([sparsity, correct, entropy, left["weights_left"], left["multiply_adds"]])
    kinds = dict(zip(_MEASURED, [float, float, float, int, int], strict=True))
    return pd.DataFrame(rows, columns=_MEASURED).astype(kinds), problem


def _in_processes(tasks: Sequence[tuple], n_jobs: int | None) -> list[tuple]:
    """Run tasks in other processes, which import TensorFlow only when they know how many cores they have."""

    def run(task: bytes, folders: list[str], jobs: int):  # by value, because it is local: nothing is imported yet
        import pickle
        import sys

        for variable in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
            os.environ.setdefault(variable, str(max(1, os.cpu_count() // jobs)))
        sys.path += [folder for folder in folders if folder not in sys.path]
        unpack, *packed = pickle.loads(task)
        return unpack(*packed)

    here = [str(Path(module.__file__).parent) for module in (sys.modules[__name__], pruning_utils)]
    jobs, packed = joblib.effective_n_jobs(n_jobs), []
    for each, method, sparsities in tasks:
        known = each.dataset.name in CLASS_NAMES and each.dataset is load_dataset(each.dataset.name)
        functions = [layer.activation for layer in _activated(each.network)]
        network = type(each.network), each.network.get_config(), functions, each.network.get_weights()  # no optimizer
        data = each.dataset.name if known else tuple(each.dataset)
        packed.append(cloudpickle.dumps((_unpacked_task, data, each.seed, network, method, sparsities)))
    return joblib.Parallel(n_jobs=n_jobs)(joblib.delayed(run)(task, here, jobs) for task in packed)


def _unpacked_task(data: str | tuple, seed: int, network: tuple, method: Callable, sparsities: list[float]) -> tuple:
    kind, config, functions, weights = network
    for layer in config["layers"]:  # in a configuration, functions are only names
        layer["config"] |= {"activation": "linear"} if "activation" in layer["config"] else {}
    network, data = kind.from_config(config), load_dataset(data) if isinstance(data, str) else Dataset(*data)
    for layer, function in zip(_activated(network), functions, strict=True):
        layer.activation = function
    network.set_weights(weights)
    frame, error = _run_task(Trained(data, seed, network), method, sparsities)
    return frame, error and RuntimeError(repr(error))  # not every error can be pickled


def _activated(network: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in network.layers if hasattr(layer, "activation")]


def _sweep_paths(folder: Path | None, tasks: Sequence[tuple]) -> list[Path | None]:
    """Name the cache file of every task by a hash of all that determines the result; None: it is not kept."""
    criteria = (*pruning_utils.WEIGHT_CRITERIA.values(), *pruning_utils.NEURON_CRITERIA.values())
    if folder is None or any(criterion.__module__ != "pruning_utils" for criterion in criteria):  # a reader's own
        return [None] * len(tasks)
    ours = map(inspect.getsource, (_run_task, evaluate, reconstruction, *_OURS))
    code = [Path(pruning_utils.__file__).read_text("utf-8"), *ours]
    data = {id(each.dataset): [part[:METHOD_IMAGES] for part in each.dataset[1:3]] + list(each.dataset[3:5])
            for each, *_ in tasks}  # fmt: skip
    data, paths = {number: cache_key(*arrays) for number, arrays in data.items()}, []
    for (dataset, seed, network), method, sparsities in tasks:
        recipe, layers, path = _recipe(method), _described(network), None
        if recipe is not None and layers is not None:
            settings = json.dumps([recipe, layers, sparsities, int(seed), data[id(dataset)]])
            key = cache_key(settings, *code, *network.get_weights())
            path = cache_path(folder, f"sweep-{dataset.name}-{seed}-{key}")
        paths.append(path)
    return paths


def _described(network: keras.Model) -> str | None:
    """Return what a network computes but for its weights, or None if a reader's own layer or function is part of it."""
    parts = [network, *network.layers, *(layer.activation for layer in _activated(network))]
    if not all((getattr(part, "__module__", None) or "").startswith("keras.") for part in parts):
        return None
    said = ("name", "kernel_initializer", "bias_initializer")  # but not part of it
    layers = [{key: value for key, value in layer.get_config().items() if key not in said} for layer in network.layers]
    return json.dumps(
        [[type(layer).__name__ for layer in network.layers], layers, network.inputs[0].dtype], default=str
    )


def _recipe(method: object) -> object | None:
    """Return a method as JSON, or None if it is not made of our functions alone: a reader's may change unnoticed."""
    if isinstance(method, functools.partial):
        parts = [method.func, *method.args, *method.keywords.values()]
        recipes = [_recipe(part) for part in parts]
        return None if None in recipes else [recipes, list(method.keywords)]
    if any(method is known for known in _OURS):
        return method.__name__
    return method if isinstance(method, str | int | float) else None


# --- Layer budgets ------------------------------------------------------------------------------------------------


def weights_left(kept: Mapping[str, int], scores: Mapping[str, np.ndarray], inputs: int = 784) -> int:
    """Return how many weights are left when each layer keeps so many of what `scores` rank: weights or units."""
    if all(score.ndim == 2 for score in scores.values()):
        return sum(kept.values())
    return sum(above * below for above, below in itertools.pairwise([inputs, *kept.values()]))


def widest(kept_at: Callable[[float], dict], budget: int, scores: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return kept_at(share) for the largest share in [0, 1] that leaves no more weights than `budget`."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if weights_left(kept_at(middle), scores) <= budget else (low, middle)
    return kept_at(low)


def in_proportion(base: Mapping[str, float], budget: int, scores: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return what each layer keeps, in proportion to `base` and at most all of it, with `budget` weights left."""
    most = max(score.size / base[name] for name, score in scores.items())

    def kept_at(share: float) -> dict:
        return {name: min(score.size, max(1, round(share * most * base[name]))) for name, score in scores.items()}

    return widest(kept_at, budget, scores)


def pruned_to(network: keras.Model, scores: Mapping[str, np.ndarray], kept: Mapping[str, int], x) -> keras.Model:
    """Prune to the numbers of weights or units that each layer keeps, and repair."""
    shares = {name: 1 - kept[name] / score.size for name, score in scores.items()}
    return repair(apply_masks(network, keep_masks(scores, shares)), network, x)


# --- Statistics and tables ----------------------------------------------------------------------------------------


def sparsity_at_drop(frame: pd.DataFrame, drop: float) -> pd.DataFrame:
    """Return, per dataset, method and seed, the sparsity at which accuracy has first fallen `drop` percentage points.

    frame: as `sweep` returns it, with sparsity 0 in it. Between two measured sparsities accuracy is taken as a straight
    line; the column `sparsity` is NaN where accuracy never falls that far. Raises `ValueError` without sparsity 0, with
    a sparsity measured twice, or for a drop that is not positive.
    """
    if not (isinstance(drop, numbers.Real) and 0 < drop < np.inf):
        raise ValueError(f"drop must be a positive number of percentage points, such as 5; got {drop!r}")
    rows = []
    for (dataset, method, seed), curve in frame.groupby(["dataset", "method", "seed"], sort=False):
        curve = curve.sort_values("sparsity")
        sparsity, lost = curve["sparsity"].to_numpy(), 100 * curve["accuracy"].to_numpy()
        lost = lost[0] - lost
        if sparsity[0] != 0 or (np.diff(sparsity) == 0).any():
            raise ValueError(
                f"{method!r} on {dataset}, seed {seed}, needs sparsity 0 and each sparsity once, got {sparsity}"
            )
        after, where = np.argmax(lost >= drop), np.nan
        if lost[after] >= drop:
            where = np.interp(drop, lost[after - 1 : after + 1], sparsity[after - 1 : after + 1])
        rows.append({"dataset": dataset, "method": method, "seed": seed, "sparsity": float(where)})
    return pd.DataFrame(rows)


def at_weights_left(frame: pd.DataFrame, budgets: Sequence[int]) -> pd.DataFrame:
    """Return accuracy in % with the given numbers of weights left, per dataset, method and seed (rows) and budget.

    frame: as `sweep` returns it. Between measured points accuracy is a straight line over the logarithm of weights
    left; networks without any weight left are ignored. Raises `ValueError` for a budget beyond the measured points.
    """
    rows = {}
    for curve, part in frame[frame["weights_left"] > 0].groupby(["dataset", "method", "seed"], sort=False):
        part = part.sort_values("weights_left")
        least, most = part["weights_left"].min(), part["weights_left"].max()
        if not least <= min(budgets) <= max(budgets) <= most:
            raise ValueError(f"budgets {budgets} must lie between the {least:,} and {most:,} weights left of {curve}")
        rows[curve] = np.interp(np.log(budgets), np.log(part["weights_left"]), 100 * part["accuracy"])
    table = pd.DataFrame.from_dict(rows, orient="index", columns=[f"{budget:,}" for budget in budgets])
    return table.set_axis(pd.MultiIndex.from_tuples(rows, names=["dataset", "method", "seed"]))


def mean_sd(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± sample standard deviation (n - 1) of two or more finite values, as text.

    >>> mean_sd([90.0, 92.0, 91.0])
    '91.0 ± 1.0'
    """
    values = np.asarray(values, float)
    if values.size < 2 or not np.isfinite(values).all():
        raise ValueError(f"a mean with ± needs two or more finite values, got {values.tolist()}")
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def mean_interval(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± half of its 95 % confidence interval (Student's t) from two or more finite values, as text.

    >>> mean_interval([90.0, 92.0, 91.0])
    '91.0 ± 2.5'
    """
    low, high = _interval(values)
    return f"{(low + high) / 2:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def verdict(values: Sequence[float], at_least: float = -np.inf, at_most: float = np.inf) -> str:
    """Return whether the mean of two or more values lies in a range, as far as they can tell.

    "supported" if all of the 95 % confidence interval of the mean (Student's t) lies in [at_least, at_most], "refuted"
    if all of it lies outside, else "undecided".

    >>> verdict([90.0, 92.0, 91.0], at_least=80)
    'supported'
    """
    low, high = _interval(values)
    if at_least <= low and high <= at_most:
        return "supported"
    return "refuted" if high < at_least or low > at_most else "undecided"


def _interval(values: Sequence[float]) -> tuple[float, float]:
    mean_sd(values)  # refuses what has no interval
    values = np.asarray(values, float)
    if np.ptp(values) == 0:
        return values[0], values[0]
    return scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)


def accuracy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return test accuracy in %, mean ± standard deviation over seeds: sparsities down, data sets and methods across.

    frame: as `sweep` returns it, with at least two seeds.
    """
    cells = pd.DataFrame(
        {
            "Sparsity (%)": frame["sparsity"].map(lambda sparsity: f"{100 * sparsity:g}"),
            "column": frame["dataset"].map(lambda name: TITLES.get(name, name)) + ", " + frame["method"],
            "accuracy": 100 * frame["accuracy"],
        }
    )
    table = cells.pivot_table("accuracy", "Sparsity (%)", "column", aggfunc=mean_sd, sort=False)
    return table.rename_axis(index=None, columns="Sparsity (%)")


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 7, seconds: float = 0.05
) -> pd.DataFrame:
    """Return seconds per call: a row per round, a column per contender, a name -> function without arguments.

    Contenders take turns, so that a machine that is busy for a while is busy for all of them: compare columns row by
    row. Two calls of each do not count (warm-up); a quick one is called until `seconds` are over, and the mean counts.
    """
    calls = {}
    for name, run in contenders.items():
        run()
        calls[name] = max(1, round(seconds / max(timeit.timeit(run, number=1), 1e-9)))
    turns = [
        {name: timeit.timeit(run, number=calls[name]) / calls[name] for name, run in contenders.items()}
        for _ in progress(range(rounds), "timing")
    ]
    return pd.DataFrame(turns)


# --- Figures ------------------------------------------------------------------------------------------------------

# One code for the whole project: method -> (colour, line style, marker), from seaborn's colour-blind palette.
_PALETTE = sns.color_palette("colorblind")
STYLES = {
    "weight pruning": (_PALETTE[0], "", "o"),
    "neuron pruning": (_PALETTE[1], (4, 2), "s"),
    "repaired neurons": (_PALETTE[2], "", "D"),
    "repaired weights": (_PALETTE[9], "", "D"),
    "random": (_PALETTE[7], (1, 2), "X"),
}
STYLES |= {"filter pruning": STYLES["neuron pruning"], "repaired filters": STYLES["repaired neurons"]}
_SPARE = [(_PALETTE[4], "^"), ("black", "P"), (_PALETTE[5], "p"), (_PALETTE[3], "v"), (_PALETTE[6], "<")]


def set_style() -> None:
    """Set the look of all figures and tables; call it once at the top of a notebook."""
    sns.set_theme(style="ticks", font_scale=1.0)
    plt.rcParams.update(
        {"figure.dpi": 100, "savefig.dpi": 100, "figure.facecolor": "white", "savefig.facecolor": "white",
         "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "axes.grid.axis": "y", "grid.alpha": 0.3, "axes.titlesize": 12}
    )  # fmt: skip
    pd.set_option("display.max_colwidth", None, "display.width", 200, "display.max_columns", 20)


def plot_curves(frame: pd.DataFrame, x: str = "sparsity", title: str = "") -> plt.Figure:
    """Plot test accuracy against `x` ("sparsity", "weights_left" or "multiply_adds"), a panel per data set.

    frame: as `sweep` returns it. One colour per method: the mean over one thin line per seed; a dotted line marks the
    10 % or so that one and the same answer for every image scores.
    """
    labels = {"sparsity": "Sparsity (%)", "weights_left": "Weights left", "multiply_adds": "Multiply-adds"}
    scale, label = 100 if x == "sparsity" else 1, labels[x]
    frame = frame.assign(**{"Test accuracy (%)": 100 * frame["accuracy"], label: scale * frame[x]})
    frame["dataset"] = frame["dataset"].map(lambda name: TITLES.get(name, name))
    mean = (
        frame.groupby(["dataset", "method", "sparsity"], sort=False)[[label, "Test accuracy (%)"]].mean().reset_index()
    )
    spare = cycle((colour, (4, 1, 1, 1), marker) for colour, marker in _SPARE)
    styles = {method: STYLES.get(method) or next(spare) for method in frame["method"].unique()}
    colours, dashes, markers = ({method: style[part] for method, style in styles.items()} for part in range(3))
    axes = {"x": label, "y": "Test accuracy (%)", "hue": "method", "palette": colours}
    with plt.rc_context({"figure.constrained_layout.use": False}):  # relplot lays out by itself
        grid = sns.relplot(mean, kind="line", col="dataset", style="method", dashes=dashes, markers=markers,
                           height=3.8, aspect=1.05, errorbar=None, **axes)  # fmt: skip
    for dataset, panel in grid.axes_dict.items():
        sns.lineplot(frame[frame["dataset"] == dataset], units="seed", estimator=None, linewidth=0.6, alpha=0.4,
                     legend=False, ax=panel, **axes)  # fmt: skip
        panel.axhline(10, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        place = {"xycoords": ("axes fraction", "data"), "ha": "left" if x == "sparsity" else "right", "fontsize": 8}
        panel.annotate("one answer for all", (0.01 if x == "sparsity" else 0.99, 11), **place)
        panel.set(ylim=(0, 102), xscale="linear" if x == "sparsity" else "log")
    grid.set_titles("{col_name}")
    grid.legend.set_title(None)
    grid.figure.suptitle(title, fontweight="bold")
    grid.figure.set_size_inches(9.5, 3.8)  # relplot widens it by its legend, whose width depends on fonts
    grid.figure.subplots_adjust(left=0.07, right=0.81, bottom=0.14, top=0.85)
    return grid.figure


def show(figure: plt.Figure, alt: str) -> None:
    """Display a figure in a notebook with the alternative text `alt`, and close it."""
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)
