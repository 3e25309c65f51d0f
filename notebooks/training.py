"""Data sets, networks, their training, and the cache of what took long: what `study.py` stands on."""

import contextlib
import functools
import gzip
import hashlib
import inspect
import json
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the C++ of TensorFlow and LiteRT writes there, whatever the logging level."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed: nothing to silence
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


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

from pruning_utils import outputs

HIDDEN = (1000, 1000, 500, 200)
SEEDS = (0, 1, 2, 3, 4)
DATA = Path(__file__).resolve().parent.parent / "data"
CACHE = DATA / "cache"

# --- Data ---------------------------------------------------------------------------------------------------------

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
_CLOTHES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
CLASS_NAMES = {"mnist": tuple("0123456789"), "fashion-mnist": tuple(_CLOTHES.split(", "))}
# SHA-256 of the uncompressed files, in the one place where a reader finds them.
_HASHES = re.findall(r"(?m)^(\w{64})  (\S+)$", (DATA / "README.md").read_text("utf-8"))
DIGESTS = {member: digest for digest, member in _HASHES}


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
        images, labels = (_read(Path(folder), f"{name}/{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        arrays += [np.divide(images[16:].reshape(-1, 784), 255, dtype=np.float32), labels[8:].astype(np.int32)]
    for array in arrays:
        array.setflags(write=False)
    return Dataset(name, *arrays, CLASS_NAMES[name])


def _read(folder: Path, member: str) -> np.ndarray:
    """Return the bytes of a gzipped IDX file, whose header is known if it is the original."""
    path, content, problem = folder / f"{member}.gz", b"", ""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        problem = f" ({type(error).__name__}: {error})"
    if (found := hashlib.sha256(content).hexdigest()) != DIGESTS[member]:
        raise ValueError(f"{path} is not the original data file: expected SHA-256 {DIGESTS[member]} uncompressed, got "
                         f"{found}{problem}. Restore it with `git checkout -- data/{member}.gz` in a clone of this "
                         "project.")  # fmt: skip
    return np.frombuffer(content, np.uint8)


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
                store(
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
    for epoch, first in progress(steps, f"training on {dataset.name}"):
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
        correct, entropy = evaluate(network, x[:10_000], y[:10_000])
        rows.append({"epoch": epoch, "images": images, "loss": entropy, "accuracy": correct})
    return rows


def progress(steps: Sequence, what: str) -> Iterable:
    """A progress bar that leaves no trace; tqdm's notebook bar does not heed TQDM_DISABLE by itself."""
    return tqdm(steps, what, leave=False, disable=os.environ.get("TQDM_DISABLE", "") not in ("", "0"))


def evaluate(network: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy from one forward pass."""
    last, activation = network.layers[-1], getattr(network.layers[-1], "activation", None)
    logits = isinstance(last, keras.layers.Dense) and activation is keras.activations.linear
    if not logits and activation is not keras.activations.softmax:
        raise ValueError(f"network {network.name!r} must end in logits or in Keras' own softmax, as an activation")
    found = outputs(network, x)
    if not np.isfinite(found).all():
        raise ValueError(f"network {network.name!r} returns NaN or infinite values")
    y = _check_labels(y, found.shape)
    entropy = keras.losses.sparse_categorical_crossentropy(y, found, from_logits=logits)
    return float(np.mean(found.argmax(axis=1) == y)), float(ops.mean(entropy))


def accuracy(network: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the fraction in [0, 1] of images `x` (n, inputs) whose largest output is at their label `y` (n,).

    Equal outputs count for the first class: a network that outputs only zeros predicts class 0 throughout. Raises
    `ValueError` for labels that are not its classes, outputs that are neither logits nor Keras' softmax or not finite,
    and what `pruning_utils.outputs` raises, for NaN weights above all.
    """
    return evaluate(network, x, y)[0]


def loss(network: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats per image, of images `x` (n, inputs) with integer labels `y` (n,)."""
    return evaluate(network, x, y)[1]


def _check_labels(y: np.ndarray, shape: tuple) -> np.ndarray:
    y = np.asarray(y)
    if len(shape) != 2 or shape[1] < 2 or y.shape != shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(f"y must be one integer label per row of outputs, of shape {shape}; got {y.dtype} {y.shape}")
    if y.size and (y.min() < 0 or y.max() >= shape[1]):
        raise ValueError(f"labels must be the classes 0 to {shape[1] - 1}; got {y.min()} to {y.max()}")
    return y.astype(np.int32)


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


# --- The cache ----------------------------------------------------------------------------------------------------


def _network_paths(folder: Path, dataset: Dataset, seeds: Sequence[int], recipe: dict) -> dict[int, Path]:
    """Name the cache file of every seed by a hash of all that determines the result."""
    settings = json.dumps(recipe, sort_keys=True, default=keras.saving.serialize_keras_object)
    functions = (relu_network, _FusedAdam, _train_side_by_side, _measure_epoch, evaluate)
    key = cache_key(settings, *map(inspect.getsource, functions), *dataset[1:5])
    return {seed: cache_path(folder, f"{dataset.name}-seed-{seed}-{key}") for seed in seeds}


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

    return fetch(path, read)


def cache_path(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"{name!r} cannot be the name of a cache file; give the data set a name without a slash")
    return folder / f"{name}.npz"


def cache_key(*parts: str | np.ndarray) -> str:
    """Return a hash of texts and arrays, and of versions, precision and backend."""
    versions = [f"{package} {sys.modules[package].__version__}" for package in ("keras", "numpy", BACKEND)]
    hasher = hashlib.sha256(str([*versions, keras.config.floatx(), keras.config.dtype_policy().name]).encode())
    for part in parts:
        part = part if isinstance(part, str) else np.ascontiguousarray(part)
        hasher.update(f"\n{len(part) if isinstance(part, str) else (part.shape, part.dtype)}\n".encode())
        hasher.update(part.encode() if isinstance(part, str) else part)
    return hasher.hexdigest()[:16]


def store(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
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


def fetch(path: Path, read: Callable[[Mapping], object]) -> object | None:
    """Return read(what `store` wrote), or None if there is no such file or (with a warning) it is damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:  # a zip archive: every member has a checksum
            return read(stored)
    except Exception as error:  # whatever a damaged header makes zipfile, zlib and NumPy raise
        warnings.warn(f"cache file {path} is damaged ({error}); computing it again", stacklevel=4)
        return None
