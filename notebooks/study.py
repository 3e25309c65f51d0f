"""What the notebooks share: data sets, trained networks, sweeps, statistics, tables and figures.

`pruning_utils.py` is what a reader takes away; this file is what was done here.
"""

import contextlib
import functools
import gzip
import hashlib
import inspect
import json
import numbers
import os
import sys
import timeit
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import cloudpickle
import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
from tqdm.auto import tqdm


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the C++ of TensorFlow and LiteRT writes there, whatever the logging level."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed: nothing to silence
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
with silent_stderr():
    import keras
    from keras import ops

    BACKEND = keras.backend.backend()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # TensorFlow is already running: its owner has decided
            for gpu in tf.config.list_physical_devices("GPU"):
                tf.config.experimental.set_memory_growth(gpu, True)

import pruning_utils
from pruning_utils import cost, outputs, repair

HIDDEN = (1000, 1000, 500, 200)
SEEDS = (0, 1, 2, 3, 4)
SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
DATA = Path(__file__).resolve().parent.parent / "data"
CACHE = DATA / "cache"
METHOD_IMAGES = 3000  # the first so many training images are what a method of a sweep may use

# --- Data ---------------------------------------------------------------------------------------------------------

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
_CLOTHES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
CLASS_NAMES = {"mnist": tuple("0123456789"), "fashion-mnist": tuple(_CLOTHES.split(", "))}
# SHA-256 of the uncompressed IDX files.
DIGESTS = {
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class Dataset(NamedTuple):
    """Images are float32 (n, 784) in [0, 1], labels int32 (n,) in 0..9."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]


@functools.lru_cache
def load_dataset(name: str, folder: Path | str = DATA) -> Dataset:
    """Return `"mnist"` or `"fashion-mnist"`: 60,000 training and 10,000 test images, in arrays that are read-only.

    Raises `ValueError` for another name, and for a file that is missing, damaged or not the original, by its SHA-256.
    """
    if name not in CLASS_NAMES:
        raise ValueError(f"unknown data set {name!r}; choose one of: {', '.join(CLASS_NAMES)}")
    arrays = []
    for part in ("train", "t10k"):
        images, labels = (
            _read_idx(Path(folder), f"{name}/{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
        )
        arrays += [np.divide(images[16:].reshape(-1, 784), 255, dtype=np.float32), labels[8:].astype(np.int32)]
    for array in arrays:
        array.setflags(write=False)
    return Dataset(name, *arrays, CLASS_NAMES[name])


def _read_idx(folder: Path, member: str) -> np.ndarray:
    """Return the bytes of a gzipped IDX file: the original, whose header is then known."""
    path, problem, content = folder / f"{member}.gz", "", b""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        problem = f" ({type(error).__name__}: {error})"
    if problem or hashlib.sha256(content).hexdigest() != DIGESTS[member]:
        raise ValueError(
            f"{path} is not the original data file: expected SHA-256 {DIGESTS[member]} uncompressed, found "
            f"{hashlib.sha256(content).hexdigest()}{problem}. Restore it with `git checkout -- data/{member}.gz` "
            "in a clone of this project."
        )
    return np.frombuffer(content, np.uint8)


def _progress(steps: Sequence, what: str) -> Iterable:
    """A progress bar that leaves no trace; tqdm's notebook bar does not heed TQDM_DISABLE by itself."""
    return tqdm(steps, what, leave=False, disable=os.environ.get("TQDM_DISABLE", "") not in ("", "0"))


# --- Networks -----------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A network with the data set it was trained on and the seed of its initial weights and order of batches."""

    dataset: Dataset
    seed: int
    network: keras.Model


def relu_network(
    hidden: Sequence[int] = HIDDEN,
    inputs: int = 784,
    classes: int = 10,
    use_bias: bool = False,
    seed: int | None = None,
) -> keras.Sequential:
    """Return an untrained ReLU network: layers `hidden_1`, `hidden_2`, … and the output layer `logits`.

    Kernels start Glorot-uniform and `seed` alone fixes them; `use_bias` concerns the hidden layers, the output layer
    always has a bias.
    """
    draws = [None] * (len(hidden) + 1) if seed is None else np.random.SeedSequence(seed).generate_state(len(hidden) + 1)
    starts = [keras.initializers.GlorotUniform(seed=None if draw is None else int(draw)) for draw in draws]
    layers = [
        keras.layers.Dense(units, "relu", use_bias=use_bias, kernel_initializer=start, name=f"hidden_{number}")
        for number, (units, start) in enumerate(zip(hidden, starts[:-1], strict=True), start=1)
    ]
    output = keras.layers.Dense(classes, kernel_initializer=starts[-1], name="logits")
    return keras.Sequential([keras.Input((inputs,)), *layers, output])


def study_networks() -> list[Trained]:
    """Return the ten networks of the study: five seeds on MNIST, then on Fashion-MNIST, trained or from the cache."""
    return [each for name in TITLES for each in train_networks(load_dataset(name))[0]]


def train_networks(
    dataset: Dataset,
    seeds: Sequence[int] = SEEDS,
    hidden: Sequence[int] = HIDDEN,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-3,
    use_bias: bool = False,
    side_by_side: int = 5,
    cache: Path | str | None = CACHE,
) -> tuple[list[Trained], pd.DataFrame]:
    """Train one ReLU network per seed with Adam on the cross-entropy and return them in the order of `seeds`.

    Up to `side_by_side` networks train as branches of one Keras model. Each depends on its own seed only: gradients do
    not mix, and Adam works entry by entry. A finished group is kept in the folder `cache` (None: no cache), under a
    name that hashes everything that determines the result. A damaged cache file gives a warning and is replaced, a
    folder that cannot be written a warning. Raises `ValueError` for labels that are not the data set's classes.

    The second return value is the history, one row per seed, epoch (0 = untrained) and images ("train": the first
    10,000 training images, "test"): columns dataset, seed, epoch, images, loss, accuracy (in [0, 1]).
    """
    recipe = {
        "hidden": list(hidden), "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "use_bias": use_bias, "inputs": dataset.x_train.shape[1], "classes": len(dataset.class_names),
    }  # fmt: skip
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        _check_labels(y, (len(x), recipe["classes"]))
    seeds, folder = list(seeds), None if cache is None else Path(cache)
    paths = {} if folder is None else _network_paths(folder, dataset, seeds, recipe)
    finished = {seed: stored for seed, path in paths.items() if (stored := _load_trained(path, recipe, seed))}
    missing = [seed for seed in dict.fromkeys(seeds) if seed not in finished]
    for first in range(0, len(missing), side_by_side):
        group = missing[first : first + side_by_side]
        for seed, (weights, curve) in zip(group, _train_side_by_side(dataset, group, recipe), strict=True):
            finished[seed] = weights, curve
            if folder is not None:
                arrays = {f"weight_{number}": weight for number, weight in enumerate(weights)}
                _store(
                    paths[seed],
                    arrays | {name: curve[name].to_numpy(str if name == "images" else None) for name in curve},
                )
    trained = [Trained(dataset, seed, _build(recipe, seed, finished[seed][0])) for seed in seeds]
    history = [finished[seed][1].assign(dataset=dataset.name, seed=seed) for seed in seeds]
    columns = ["dataset", "seed", "epoch", "images", "loss", "accuracy"]
    return trained, pd.concat(history, ignore_index=True)[columns]


class _FusedAdam(keras.optimizers.Adam):
    """Adam whose update is one TensorFlow kernel instead of a dozen passes over memory; the arithmetic is the same."""

    def update_step(self, gradient, variable, learning_rate):
        index, step = self._get_variable_index(variable), ops.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle, v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step, beta2_power=self.beta_2**step, lr=ops.cast(learning_rate, variable.dtype),
            beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon, grad=gradient,
        )  # fmt: skip


def _build(recipe: dict, seed: int, weights: list[np.ndarray] | None = None) -> keras.Sequential:
    network = relu_network(recipe["hidden"], recipe["inputs"], recipe["classes"], recipe["use_bias"], seed)
    if weights is not None:
        network.set_weights(weights)
    return network


def _train_side_by_side(dataset: Dataset, seeds: Sequence[int], recipe: dict) -> list[tuple[list, pd.DataFrame]]:
    """Train one network per seed as branches of a single Keras model and return (weights, history) pairs.

    Not the networks: as branches they would keep the joint model and its images in memory.
    """
    networks = [_build(recipe, seed) for seed in seeds]
    # The branches share one table of images, kept on the device; a batch is then only row numbers, a column per seed.
    images = keras.layers.Embedding(*dataset.x_train.shape, embeddings_initializer="zeros", trainable=False)
    images.build()
    images.set_weights([dataset.x_train])
    rows = keras.Input((len(seeds),), dtype="int32")
    joint = keras.Model(rows, [network(images(rows[:, branch])) for branch, network in enumerate(networks)])
    optimizer = _FusedAdam if BACKEND == "tensorflow" else keras.optimizers.Adam
    losses = [keras.losses.SparseCategoricalCrossentropy(from_logits=True) for _ in seeds]
    joint.compile(optimizer(recipe["learning_rate"], name="adam"), losses)

    curves = [_measure_epoch(network, dataset, 0) for network in networks]
    count, size = len(dataset.x_train), recipe["batch_size"]
    steps = [(epoch, first) for epoch in range(1, recipe["epochs"] + 1) for first in range(0, count, size)]
    # Not `fit`: its tf.data pipeline stalls for seconds at the end of some epochs.
    for epoch, first in _progress(steps, f"training on {dataset.name}"):
        if first == 0:
            orders = [np.random.default_rng([seed, epoch]).permutation(count) for seed in seeds]
            order = np.stack(orders, axis=1).astype(np.int32)
        batch = order[first : first + size]
        joint.train_on_batch(batch, list(dataset.y_train[batch].T))
        if first + size >= count:
            for curve, network in zip(curves, networks, strict=True):
                curve += _measure_epoch(network, dataset, epoch)
    trained = [(network.get_weights(), pd.DataFrame(curve)) for network, curve in zip(networks, curves, strict=True)]
    if BACKEND == "tensorflow":  # 2.21 never frees the variables that a compiled training step has used: empty them
        for variable in (*joint.variables, *joint.optimizer.variables):
            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tf.zeros(0, variable.dtype))
    return trained


def _measure_epoch(network: keras.Sequential, dataset: Dataset, epoch: int) -> list[dict]:
    rows = []
    for images, x, y in (("train", dataset.x_train, dataset.y_train), ("test", dataset.x_test, dataset.y_test)):
        correct, entropy = _evaluate(network, x[:10_000], y[:10_000])
        rows.append({"epoch": epoch, "images": images, "loss": entropy, "accuracy": correct})
    return rows


def _evaluate(network: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy from one forward pass."""
    activation = getattr(network.layers[-1], "activation", None)
    if activation not in (keras.activations.linear, keras.activations.softmax):
        raise ValueError(f"network {network.name!r} must end in a layer that returns logits or has Keras' own softmax")
    found = outputs(network, x)
    if not np.isfinite(found).all():
        raise ValueError(f"network {network.name!r} returns NaN or infinite values")
    y = _check_labels(y, found.shape)
    entropy = keras.losses.sparse_categorical_crossentropy(y, found, from_logits=activation is keras.activations.linear)
    return float(np.mean(found.argmax(axis=1) == y)), float(ops.mean(entropy))


def accuracy(network: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the fraction in [0, 1] of images `x` (n, inputs) whose largest output is at their label `y` (n,).

    Equal outputs count for the first class: a network that outputs only zeros predicts class 0 throughout. Raises
    `ValueError` for labels that are not its classes, outputs that are neither logits nor Keras' softmax or not finite,
    and what `pruning_utils.outputs` raises, for NaN weights above all.
    """
    return _evaluate(network, x, y)[0]


def loss(network: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats per image, of images `x` (n, inputs) with integer labels `y` (n,)."""
    return _evaluate(network, x, y)[1]


def _check_labels(y: np.ndarray, shape: tuple) -> np.ndarray:
    y = np.asarray(y)
    if len(shape) != 2 or shape[1] < 2 or y.shape != shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(f"y must be one integer label per row of outputs, of shape {shape}; got {y.dtype} {y.shape}")
    if y.size and (y.min() < 0 or y.max() >= shape[1]):
        raise ValueError(f"labels must be the classes 0 to {shape[1] - 1}; got {y.min()} to {y.max()}")
    return y.astype(np.int32)


# --- The cache ----------------------------------------------------------------------------------------------------


def _network_paths(folder: Path, dataset: Dataset, seeds: Sequence[int], recipe: dict) -> dict[int, Path]:
    """Name the cache file of every seed by a hash of all that determines the result."""
    settings = json.dumps(recipe, sort_keys=True, default=keras.saving.serialize_keras_object)
    functions = (relu_network, _FusedAdam, _train_side_by_side, _measure_epoch, _evaluate)
    key = _key(settings, *map(inspect.getsource, functions), *dataset[1:5])
    return {seed: _path(folder, f"{dataset.name}-seed-{seed}-{key}") for seed in seeds}


def _path(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"{name!r} cannot be the name of a cache file; give the data set a name without a slash")
    return folder / f"{name}.npz"


def _key(*parts: str | np.ndarray) -> str:
    """Return a hash of texts and arrays, and of versions, precision and backend."""
    versions = [f"{package} {sys.modules[package].__version__}" for package in ("keras", "numpy", BACKEND)]
    hasher = hashlib.sha256(str([*versions, keras.config.floatx(), keras.config.dtype_policy().name]).encode())
    for part in parts:
        part = part if isinstance(part, str) else np.ascontiguousarray(part)
        hasher.update(f"\n{len(part) if isinstance(part, str) else (part.shape, part.dtype)}\n".encode())
        hasher.update(part.encode() if isinstance(part, str) else part)
    return hasher.hexdigest()[:16]


def _store(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays beside `path` and move them there, so that no reader ever sees half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}); the result is not kept for the next run", stacklevel=4)


def _fetch(path: Path, read: Callable[[Mapping], object]) -> object | None:
    """Return read(what `_store` wrote), or None if there is no such file or (with a warning) it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:  # a zip archive: every member has a checksum
            return read(stored)
    except Exception as error:  # whatever a damaged header makes zipfile, zlib and NumPy raise
        warnings.warn(f"cache file {path} is damaged ({error}); computing it again", stacklevel=4)
        return None


def _load_trained(path: Path, recipe: dict, seed: int) -> tuple[list[np.ndarray], pd.DataFrame] | None:
    def read(stored):
        shapes = [tuple(weight.shape) for weight in _build(recipe, seed).weights]
        weights = [stored[f"weight_{number}"] for number in range(len(shapes))]
        history = pd.DataFrame({name: stored[name] for name in ("epoch", "images", "loss", "accuracy")})
        if [weight.shape for weight in weights] != shapes:
            raise ValueError(f"weights of other shapes than {shapes}")
        if not all(np.isfinite(each).all() for each in (*weights, history[["epoch", "loss", "accuracy"]].to_numpy())):
            raise ValueError("it holds NaN or infinite values")
        return weights, history

    return _fetch(path, read)


# --- Measuring ----------------------------------------------------------------------------------------------------


def repaired(prune: Callable, network: keras.Model, sparsity: float, *, x, y, seed) -> keras.Model:
    """Prune and repair: `partial(repaired, prune_neurons)` is a method of `sweep`."""
    return repair(prune(network, sparsity, x=x, y=y, seed=seed), network, x)


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
    machines; two processes on two cores gain nothing, because one network's matrix products fill both.
    cache: folder for what methods made of functions of `pruning_utils` and this file found, by all that determines it.

    When a method fails, the rest is still measured; then a `RuntimeError` names network, method and sparsity, and its
    attribute `rows` holds the frame of what was measured.
    """
    trained, sparsities = list(trained), list(sparsities)
    names = dict.fromkeys(each.dataset.name for each in trained)
    grid = [(each, method) for name in names for method in methods for each in trained if each.dataset.name == name]
    tasks = [(each, methods[method], sparsities) for each, method in grid]
    paths = _sweep_paths(None if cache is None else Path(cache), tasks)
    results = [path and _fetch(path, lambda stored: (pd.DataFrame({name: stored[name] for name in stored}), None))
               for path in paths]  # fmt: skip
    missing = [number for number, result in enumerate(results) if result is None]
    run = _in_turn if joblib.effective_n_jobs(n_jobs) == 1 else functools.partial(_in_processes, n_jobs=n_jobs)
    for number, result in zip(missing, run([tasks[number] for number in missing]), strict=True):
        results[number] = result
        if paths[number] and result[1] is None:
            _store(paths[number], {name: result[0][name].to_numpy() for name in result[0]})
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


_MEASURED = ["sparsity", "accuracy", "loss", "weights_left", "multiply_adds"]


def _run_task(each: Trained, method: Callable, sparsities: list[float]) -> tuple[pd.DataFrame, Exception | None]:
    """Return the rows of a network and a method, up to a sparsity at which the method fails, and its error."""
    data, rows, problem = each.dataset, [], None
    x, y = data.x_train[:METHOD_IMAGES], data.y_train[:METHOD_IMAGES]
    for sparsity in sparsities:
        try:
            pruned = method(each.network, sparsity, x=x, y=y, seed=each.seed)
            correct, entropy = _evaluate(pruned, data.x_test, data.y_test)
        except Exception as error:
            problem = error
            break
        left = cost(pruned)
        rows.append([sparsity, correct, entropy, left["weights_left"], left["multiply_adds"]])
    return pd.DataFrame(rows, columns=_MEASURED), problem


def _in_turn(tasks: Sequence[tuple]) -> Iterator[tuple]:
    return (_run_task(*task) for task in _progress(tasks, "pruning"))


def _in_processes(tasks: Sequence[tuple], n_jobs: int | None) -> list[tuple]:
    """Run tasks in other processes, which import TensorFlow only when they know how many cores they have."""

    def run(task: bytes, folders: list[str], jobs: int):  # by value, because it is local: nothing is imported yet
        import os
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
        network = type(each.network), each.network.get_config(), each.network.get_weights()  # not the optimizer
        data = each.dataset.name if known else tuple(each.dataset)
        packed.append(cloudpickle.dumps((_unpacked_task, data, each.seed, network, method, sparsities)))
    return joblib.Parallel(n_jobs=n_jobs)(joblib.delayed(run)(task, here, jobs) for task in packed)


def _unpacked_task(data: str | tuple, seed: int, network: tuple, method: Callable, sparsities: list[float]) -> tuple:
    kind, config, weights = network
    network = kind.from_config(config)
    network.set_weights(weights)
    frame, error = _run_task(
        Trained(load_dataset(data) if isinstance(data, str) else Dataset(*data), seed, network), method, sparsities
    )
    return frame, error and RuntimeError(repr(error))  # not every error can be pickled


def _sweep_paths(folder: Path | None, tasks: Sequence[tuple]) -> list[Path | None]:
    """Name the cache file of every task by a hash of all that determines the result; None: it is not kept."""
    criteria = (*pruning_utils.WEIGHT_CRITERIA.values(), *pruning_utils.NEURON_CRITERIA.values())
    if folder is None or any(criterion.__module__ != "pruning_utils" for criterion in criteria):  # a reader's own
        return [None] * len(tasks)
    code = [Path(pruning_utils.__file__).read_text("utf-8"), *map(inspect.getsource, (_run_task, _evaluate, repaired))]
    prints = {each.dataset.name: _key(*(part[:METHOD_IMAGES] for part in each.dataset[1:3]), *each.dataset[3:5])
              for each, *_ in tasks}  # fmt: skip
    paths = []
    for each, method, sparsities in tasks:
        with contextlib.suppress(TypeError):
            recipe = json.dumps(
                [_recipe(method), sparsities, each.seed, prints[each.dataset.name], each.network.to_json()]
            )
            key = _key(recipe, *code, *each.network.get_weights())
            paths.append(_path(folder, f"sweep-{each.dataset.name}-{each.seed}-{key}"))
            continue
        paths.append(None)
    return paths


def _recipe(method: object):
    """Return a method as JSON, if it is made of functions of ours alone."""
    if isinstance(method, functools.partial):
        return [_recipe(method.func), *map(_recipe, method.args), {k: _recipe(v) for k, v in method.keywords.items()}]
    if inspect.isfunction(method):
        if method in (pruning_utils.prune_weights, pruning_utils.prune_neurons, repaired):
            return method.__name__
        raise TypeError("a function of the reader's own can change without notice")
    return method


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


# --- Statistics and tables ----------------------------------------------------------------------------------------


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
        calls[name] = max(1, round(seconds / timeit.timeit(run, number=1)))
    turns = [
        {name: timeit.timeit(run, number=calls[name]) / calls[name] for name, run in contenders.items()}
        for _ in _progress(range(rounds), "timing")
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
    """Plot test accuracy against `x` ("sparsity" or "weights_left"), one panel per data set, one colour per method.

    frame: as `sweep` returns it. The mean over seeds is drawn over one thin line per seed; a dotted line marks the
    10 % or so that one and the same answer for every image scores.
    """
    scale, label = {"sparsity": (100, "Sparsity (%)"), "weights_left": (1, "Weights left")}[x]
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
    grid.figure.suptitle(title, fontweight="bold", y=1.02)
    return grid.figure


def show(figure: plt.Figure, alt: str) -> None:
    """Display a figure in a notebook with the alternative text `alt`, and close it."""
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def device() -> str:
    """Return in words what the arithmetic runs on."""
    names = []
    if BACKEND == "tensorflow":
        gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
        names = [details.get("device_name", "GPU") for details in gpus]
    elif BACKEND == "jax":
        import jax

        names = [found.device_kind for found in jax.devices() if found.platform != "cpu"]
    elif BACKEND == "torch":
        import torch

        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names) or f'{os.cpu_count()} CPU cores'}; Keras {keras.__version__} on {BACKEND}"
