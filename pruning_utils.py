"""Weight pruning and neuron pruning for Keras 3: data, networks, pruning, repairing, shrinking, measuring, plotting.

Every pruning function returns a new network and leaves its argument as it was. Kernels have the shape (inputs, units);
a mask is boolean, True = kept; a score is higher for what should be kept; sparsity is a fraction in [0, 1].
Any built chain of `Dense` layers can be pruned: `Sequential` or functional, with or without biases.

    >>> network = relu_network(hidden=(30, 20), inputs=16, seed=0)
    >>> pruned = prune_neurons(network, sparsity=0.5)
    >>> cost(shrink(pruned))["units_left"]
    {'hidden_1': 15, 'hidden_2': 10}
"""

import contextlib
import gc
import gzip
import hashlib
import inspect
import json
import numbers
import os
import struct
import sys
import timeit
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import scipy.linalg
import scipy.stats
import seaborn as sns
from tqdm.auto import tqdm


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the C++ of TensorFlow and LiteRT writes there, whatever the logging level."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
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

HIDDEN = (1000, 1000, 500, 200)
SEEDS = (0, 1, 2, 3, 4)
SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
DATA = Path(__file__).parent / "data"
CACHE = DATA / "cache"
Array = np.ndarray | None
_BATCH = 10_000  # images per forward pass when nothing is trained

# --- Data ---------------------------------------------------------------------------------------------------------

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


def load_dataset(name: str, folder: Path | str = DATA) -> Dataset:
    """Return `"mnist"` or `"fashion-mnist"`: 60,000 training and 10,000 test images.

    Raises `ValueError` for another name, and for a file that is missing, damaged or not the original: every file's
    SHA-256 and IDX header are checked before an array is made.
    """
    _check_name("dataset", name, CLASS_NAMES)

    def read(kind: str, shape: tuple[int, ...]) -> np.ndarray:
        member = f"{name}/{kind}-ubyte"
        return _read_idx(Path(folder) / f"{member}.gz", DIGESTS[member], shape)

    def images(part: str, count: int) -> np.ndarray:
        return np.divide(read(f"{part}-images-idx3", (count, 28, 28)).reshape(count, 784), 255, dtype=np.float32)

    def labels(part: str, count: int) -> np.ndarray:
        return read(f"{part}-labels-idx1", (count,)).astype(np.int32)

    train, test = ("train", 60_000), ("t10k", 10_000)
    return Dataset(name, images(*train), labels(*train), images(*test), labels(*test), CLASS_NAMES[name])


def _read_idx(path: Path, digest: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the uint8 array of a gzipped IDX file, having first hashed all of it piece by piece."""
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    hasher, start, problem = hashlib.sha256(), b"", ""
    try:
        with gzip.open(path) as file:
            while piece := file.read(1 << 20):
                start = start or piece[: len(header)]
                hasher.update(piece)
    except (OSError, EOFError, zlib.error) as error:
        problem = f" ({type(error).__name__}: {error})"
    if start and start != header:
        problem += f" (IDX header {start.hex()}, expected {header.hex()} for shape {shape})"
    if problem or hasher.hexdigest() != digest:
        found = "no file" if not path.exists() else f"SHA-256 {hasher.hexdigest()} of what could be read"
        raise ValueError(
            f"{path} is not the original data file: expected SHA-256 {digest} uncompressed, found {found}{problem}. "
            f"Restore it with `git checkout -- data/{path.parent.name}/{path.name}` in a clone of this project."
        )
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=len(header)).reshape(shape)


def _progress(steps: Sequence, what: str) -> Iterable:
    """A progress bar that leaves no trace; tqdm's notebook bar does not heed TQDM_DISABLE by itself."""
    return tqdm(steps, what, leave=False, disable=os.environ.get("TQDM_DISABLE", "") not in ("", "0"))


def _check_name(kind: str, value: object, valid: Mapping | Sequence) -> None:
    if value not in tuple(valid):
        raise ValueError(f"unknown {kind} {value!r}; choose one of: {', '.join(valid)}")


# --- Networks -----------------------------------------------------------------------------------------------------


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
) -> tuple[list[keras.Sequential], pd.DataFrame]:
    """Train one ReLU network per seed with Adam on the cross-entropy and return them in the order of `seeds`.

    Up to `side_by_side` networks train as branches of one Keras model. Each depends on its own seed only: gradients do
    not mix, and Adam works entry by entry. A finished group is kept in the folder `cache` (None: no cache), under a
    name that hashes everything that determines the result. A damaged cache file gives a warning and is replaced.

    The second return value is the history, one row per seed, epoch (0 = untrained) and images ("train": the first
    10,000 training images, "test"): columns dataset, seed, epoch, images, loss, accuracy (in [0, 1]).
    """
    folder = None if cache is None else Path(cache)
    recipe = {
        "hidden": list(hidden), "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate,
        "use_bias": use_bias, "inputs": dataset.x_train.shape[1], "classes": len(dataset.class_names),
    }  # fmt: skip
    paths = {} if folder is None else _cache_paths(folder, dataset, seeds, recipe)
    finished = {seed: stored for seed, path in paths.items() if (stored := _load_trained(path, recipe, seed))}
    missing = [seed for seed in dict.fromkeys(seeds) if seed not in finished]
    for first in range(0, len(missing), side_by_side):
        group = missing[first : first + side_by_side]
        for seed, (weights, curve) in zip(group, _train_side_by_side(dataset, group, recipe), strict=True):
            network = _build(recipe, seed)
            network.set_weights(weights)
            finished[seed] = network, curve
            if folder is not None:
                _save_trained(paths[seed], network, curve)
        gc.collect()  # the joint model and its table of images are cyclic garbage by now
    history = [finished[seed][1].assign(dataset=dataset.name, seed=seed) for seed in seeds]
    columns = ["dataset", "seed", "epoch", "images", "loss", "accuracy"]
    return [finished[seed][0] for seed in seeds], pd.concat(history, ignore_index=True)[columns]


class _FusedAdam(keras.optimizers.Adam):
    """Adam whose update is one TensorFlow kernel instead of a dozen passes over memory; the arithmetic is the same."""

    def update_step(self, gradient, variable, learning_rate):
        index, step = self._get_variable_index(variable), ops.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=self._momentums[index].value.handle, v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step, beta2_power=self.beta_2**step, lr=ops.cast(learning_rate, variable.dtype),
            beta1=self.beta_1, beta2=self.beta_2, epsilon=self.epsilon, grad=gradient,
        )  # fmt: skip


def _build(recipe: dict, seed: int) -> keras.Sequential:
    return relu_network(recipe["hidden"], recipe["inputs"], recipe["classes"], recipe["use_bias"], seed)


def _train_side_by_side(
    dataset: Dataset, seeds: Sequence[int], recipe: dict
) -> list[tuple[list[np.ndarray], pd.DataFrame]]:
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

    curves = [_measure(network, dataset, epoch=0) for network in networks]
    for epoch in _progress(range(1, recipe["epochs"] + 1), f"training on {dataset.name}"):
        orders = [np.random.default_rng([seed, epoch]).permutation(len(dataset.x_train)) for seed in seeds]
        order = np.stack(orders, axis=1).astype(np.int32)
        # Not `fit`: its tf.data pipeline stalls for seconds at the end of some epochs.
        for first in range(0, len(order), recipe["batch_size"]):
            batch = order[first : first + recipe["batch_size"]]
            joint.train_on_batch(batch, list(dataset.y_train[batch].T))
        for curve, network in zip(curves, networks, strict=True):
            curve += _measure(network, dataset, epoch)
    trained = [(network.get_weights(), pd.DataFrame(curve)) for network, curve in zip(networks, curves, strict=True)]
    _release(joint)
    return trained


def _release(trained: keras.Model) -> None:
    """Empty the variables of a model: TensorFlow 2.21 never frees what a compiled training step has used."""
    if BACKEND == "tensorflow":
        for variable in (*trained.variables, *trained.optimizer.variables):
            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tf.zeros(0, variable.dtype))


def _measure(network: keras.Sequential, dataset: Dataset, epoch: int) -> list[dict]:
    rows = []
    for images, x, y in (("train", dataset.x_train, dataset.y_train), ("test", dataset.x_test, dataset.y_test)):
        correct, cost_value = _evaluate(network, x[:10_000], y[:10_000])
        rows.append({"epoch": epoch, "images": images, "loss": cost_value, "accuracy": correct})
    return rows


def _cache_paths(folder: Path, dataset: Dataset, seeds: Sequence[int], recipe: dict) -> dict[int, Path]:
    """Name the cache file of every seed by a hash of all that determines the result, and sweep up after dead runs."""
    folder.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    for leftover in folder.glob("*.npz.[0-9]*.tmp"):  # named <file>.<process>.tmp by _save_trained
        if not psutil.pid_exists(int(leftover.suffixes[-2][1:])):
            leftover.unlink(missing_ok=True)
    versions = [f"{package} {sys.modules[package].__version__}" for package in ("keras", "numpy", BACKEND)]
    settings = [recipe, versions, keras.config.floatx()]
    settings = json.dumps(settings, sort_keys=True, default=keras.saving.serialize_keras_object)
    hasher = hashlib.sha256(settings.encode())
    for function in (relu_network, _FusedAdam, _train_side_by_side, _measure, _evaluate):
        hasher.update(inspect.getsource(function).encode())
    for array in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        hasher.update(str((array.shape, array.dtype)).encode())
        hasher.update(np.ascontiguousarray(array))
    return {seed: folder / f"{dataset.name}-seed-{seed}-{hasher.hexdigest()[:16]}.npz" for seed in seeds}


def _save_trained(path: Path, network: keras.Sequential, history: pd.DataFrame) -> None:
    """Write weights and history beside `path` and move them there, so that no reader ever sees half a file."""
    arrays = {f"weight_{number}": weight for number, weight in enumerate(network.get_weights())}
    arrays |= {column: history[column].to_numpy(str if column == "images" else None) for column in history}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_trained(path: Path, recipe: dict, seed: int) -> tuple[keras.Sequential, pd.DataFrame] | None:
    """Return what `_save_trained` wrote, or None if there is no such file or (with a warning) it is damaged."""
    if not path.exists():
        return None
    network = _build(recipe, seed)
    try:
        with np.load(path, allow_pickle=False) as stored:  # a zip archive: every member has a checksum
            network.set_weights([stored[f"weight_{number}"] for number in range(len(network.weights))])
            history = pd.DataFrame({column: stored[column] for column in ("epoch", "images", "loss", "accuracy")})
        prunable_layers(network)  # refuses NaN
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"cache file {path} is damaged ({error}); training this network again", stacklevel=3)
        return None
    return network, history


def _evaluate(network: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy from one eager forward pass in large batches."""
    prunable_layers(network)  # refuses what cannot be measured, NaN weights first of all
    x, y = _check_images(network, x), _check_labels(x, y)
    correct, total = 0, 0.0
    for first in range(0, len(x), _BATCH):
        outputs, labels = network(x[first : first + _BATCH], training=False), y[first : first + _BATCH]
        correct += int(np.sum(np.argmax(ops.convert_to_numpy(outputs), axis=-1) == labels))
        total += float(ops.sum(_cross_entropy(network, outputs, labels)))
    return correct / len(x), total / len(x)


def accuracy(network: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the fraction in [0, 1] of images `x` (n, inputs) whose largest output is at their label `y` (n,).

    Equal outputs count for the first class: a network that outputs only zeros predicts class 0 throughout. Raises
    `ValueError` for images or labels of another shape, and what `prunable_layers` raises, for NaN weights above all.
    """
    return _evaluate(network, x, y)[0]


def loss(network: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean cross-entropy, in nats per image, of images `x` (n, inputs) with integer labels `y` (n,)."""
    return _evaluate(network, x, y)[1]


def _cross_entropy(network: keras.Model, outputs, y: np.ndarray):
    last = _chain(network)[-1]
    probabilities = getattr(last, "activation", None) is keras.activations.softmax
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=not probabilities)


def _check_images(network: keras.Model, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    if x.ndim < 2 or len(x) == 0 or x.shape[1:] != tuple(network.input_shape[1:]):
        raise ValueError(f"x has shape {x.shape}, but network {network.name!r} takes images {network.input_shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"x holds NaN or infinite values in {np.sum(~np.isfinite(x))} places; images must be finite")
    return x


def _check_labels(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = np.asarray(y)
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(f"y must be one integer label per image, shape ({len(x)},); got {y.dtype} {y.shape}")
    return y


# --- What can be pruned -------------------------------------------------------------------------------------------

_SUPPORTED = ("Dense", "Flatten", "Dropout", "Activation", "ReLU")


def prunable_layers(network: keras.Model) -> list[keras.layers.Dense]:
    """Return the `Dense` layers that may be pruned: all but the last one, the output layer.

    Raises `TypeError` for a network or layer of a kind that is not supported, `ValueError` for a network that is not
    built, has only one `Dense` layer, is not a chain, or holds NaN or infinite weights.
    """
    for layer in (layers := _dense_layers(network)):
        if not all(np.isfinite(np.asarray(weight)).all() for weight in layer.weights):
            raise ValueError(f"layer {layer.name!r} holds NaN or infinite weights; nothing can be measured or pruned")
    return layers[:-1]


def _chain(network: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers in order of execution, or say why this network is not a plain chain of supported layers."""
    sequential = isinstance(network, keras.Sequential)
    if not sequential and not hasattr(network, "operations"):
        raise TypeError(f"expected a keras.Sequential or a functional network, got {type(network).__name__}")
    if not network.built:
        raise ValueError(f"network {network.name!r} is not built; call network.build((None, inputs)) first")
    layers = list(network.layers if sequential else network.operations)
    layers = [layer for layer in layers if not isinstance(layer, keras.layers.InputLayer)]
    for layer in layers:
        if type(layer).__name__ not in _SUPPORTED or not isinstance(layer, keras.layers.Layer):
            kind = f"{layer.name!r} is a {type(layer).__name__}"
            raise TypeError(f"layer {kind}, which is not supported; supported: {', '.join(_SUPPORTED)}")
    if not sequential:
        uses = [len(layer["inbound_nodes"]) for layer in network.get_config()["layers"]]
        if len(network.inputs) != 1 or len(network.outputs) != 1 or max(uses) > 1:
            raise ValueError(f"network {network.name!r} is not a chain: one input, one output, every layer used once")
    return layers


def _dense_layers(network: keras.Model) -> list[keras.layers.Dense]:
    layers = [layer for layer in _chain(network) if isinstance(layer, keras.layers.Dense)]
    if len(layers) < 2:
        names = [layer.name for layer in layers]
        raise ValueError(f"pruning needs a hidden layer before the output layer; {network.name!r} has only {names}")
    for layer, following in pairwise(layers):
        if layer.units != (inputs := following.kernel.shape[0]):
            raise ValueError(f"layer {layer.name!r} has {layer.units} units, but {following.name!r} takes {inputs}")
    return layers


def _kernel(layer: keras.layers.Dense) -> np.ndarray:
    return np.asarray(layer.kernel)


def _bias(layer: keras.layers.Dense) -> np.ndarray:
    return np.asarray(layer.bias) if layer.use_bias else np.zeros(layer.units, np.float32)


# --- Scores -------------------------------------------------------------------------------------------------------


def weight_scores(
    network: keras.Model, criterion: str = "magnitude", x: Array = None, y: Array = None, seed: int | None = None
) -> dict[str, np.ndarray]:
    """Return a score for every prunable weight: layer name -> array of the kernel's shape (inputs, units).

    criterion: "magnitude" |w|; "activation" |w| · rms of its input over images `x` (Sun et al. 2023, Wanda);
    "taylor" |w · gradient| per image of `x` with labels `y`, averaged (Molchanov et al. 2017); "random", from `seed`.
    Raises `ValueError` for another criterion, or if one that needs `x`, `y` or `seed` does not get it.
    """
    _check_name("weight criterion", criterion, WEIGHT_CRITERIA)
    return _score(WEIGHT_CRITERIA[criterion], criterion, network, x, y, seed)


def neuron_scores(
    network: keras.Model, criterion: str = "norm", x: Array = None, y: Array = None, seed: int | None = None
) -> dict[str, np.ndarray]:
    """Return a score for every prunable neuron: layer name -> array (units,).

    criterion: "norm", the L2 norm of the incoming kernel column; "activation", rms output over images `x` · L2 norm of
    the outgoing kernel row; "taylor", |pre-activation · gradient| per image of `x` with labels `y`, averaged, the
    first-order change of the loss when the unit is silenced (Molchanov et al. 2017); "reconstruction", the share of the
    next layer's squared pre-activations over images `x` that least squares cannot explain from the better units of the
    layer: greedy forward selection, that is orthogonal matching pursuit (Pati et al. 1993), with the aim of ThiNet (Luo
    et al. 2017) and, for single units, of the optimal brain surgeon (Hassibi and Stork 1993); "random", from `seed`.
    Raises `ValueError` as `weight_scores` does.
    """
    _check_name("neuron criterion", criterion, NEURON_CRITERIA)
    return _score(NEURON_CRITERIA[criterion], criterion, network, x, y, seed)


def _score(function: Callable, criterion: str, network: keras.Model, x, y, seed) -> dict[str, np.ndarray]:
    layers = prunable_layers(network)
    if criterion == "random" and seed is None:
        raise ValueError("criterion 'random' needs a seed, such as seed=0; got None")
    if criterion in ("activation", "taylor", "reconstruction"):
        if x is None:
            raise ValueError(
                f"criterion {criterion!r} needs training images x of shape {network.input_shape}; got None"
            )
        x = _check_images(network, x)
        if criterion == "taylor":
            y = _check_labels(x, np.empty(0) if y is None else y)
    scores = dict(zip([layer.name for layer in layers], function(network, x, y, seed), strict=True))
    _check_scores(scores)
    return scores


def _check_scores(scores: Mapping[str, np.ndarray]) -> None:
    for name, score in scores.items():
        if np.isnan(score).any():
            raise ValueError(f"scores of layer {name!r} hold NaN; they cannot be ranked")


def _kernels(network: keras.Model) -> list[np.ndarray]:
    return [_kernel(layer) for layer in _dense_layers(network)[:-1]]


def _random_like(arrays: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    return [np.random.default_rng([seed, number]).random(array.shape) for number, array in enumerate(arrays)]


def _weight_activation(network, x, y, seed) -> list[np.ndarray]:
    return [
        np.abs(kernel) * rms[:, None] for kernel, rms in zip(_kernels(network), _input_rms(network, x), strict=False)
    ]


def _weight_taylor(network, x, y, seed) -> list[np.ndarray]:
    # The gradient of one image's loss by w_ij is input_i · delta_j; its mean |.| over images is one matrix product.
    means = _mean_over_images(network, x, y, lambda a, z, delta: ops.matmul(ops.transpose(ops.abs(a)), ops.abs(delta)))
    return [np.abs(kernel) * mean for kernel, mean in zip(_kernels(network), means, strict=False)]


def _neuron_activation(network, x, y, seed) -> list[np.ndarray]:
    outgoing = [np.linalg.norm(_kernel(layer), axis=1) for layer in _dense_layers(network)]
    return [rms * norm for rms, norm in zip(_input_rms(network, x)[1:], outgoing[1:], strict=True)]


def _neuron_reconstruction(network, x, y, seed) -> list[np.ndarray]:
    grams = _sum_over_images(network, x, lambda a: ops.matmul(ops.transpose(a), a))
    following = [_kernel(layer) for layer in _dense_layers(network)[1:]]
    return [_error_before_each(*both) for both in zip(grams, following, strict=True)]


def _error_before_each(gram: np.ndarray, kernel: np.ndarray, ridge: float = 1e-3, block: int = 128) -> np.ndarray:
    """Rank units by orthogonal matching pursuit: always take the one that most reduces the error of what comes next.

    gram: (units, units) of a layer's outputs; kernel: (units, next units). Returns, per unit, the share of the next
    layer's squared pre-activations that least squares cannot explain from the units taken before it: 1 for the first.
    """
    gram, kernel = gram.astype(np.float64), kernel.astype(np.float64)
    cross = gram @ kernel
    energy = total = np.sum(kernel * cross)
    if not np.isfinite(total):
        return np.full(len(gram), np.nan)
    among = cross @ cross.T
    gram[np.diag_indices_from(gram)] += ridge * gram.trace() / len(gram) or 1.0
    # Taking unit i lowers the error by among[i, i] / gram[i, i]. It is a step of Cholesky's method on `gram` that also
    # changes `among`. Both diagonals are kept up to date; the rest, once per block, by matrix products.
    pivot, gain = gram.diagonal().copy(), among.diagonal().copy()
    units, error = np.arange(len(gram)), np.empty(len(gram))
    while units.size:
        factor, shift, norm = np.zeros((block, units.size)), np.zeros((block, units.size)), np.zeros(block)
        for step in range(min(block, units.size)):
            best = np.argmax(gain / pivot)
            error[units[best]] = max(energy, 0.0) / total if total > 0 else 0.0
            energy -= gain[best] / pivot[best]
            past, root = factor[:step, best], np.sqrt(pivot[best])
            known, changed = np.stack([past, shift[:step, best] - norm[:step] * past]) @ factor[:step]
            factor[step] = (gram[best] - known) / root
            shift[step] = (among[best] - changed - past @ shift[:step]) / root
            norm[step] = shift[step, best] / root
            pivot -= factor[step] ** 2
            gain += factor[step] * (norm[step] * factor[step] - 2 * shift[step])
            pivot[best], gain[best] = 1.0, -np.inf  # taken
        left = np.isfinite(gain)
        units, pivot, gain, factor, shift = units[left], pivot[left], gain[left], factor[:, left], shift[:, left]
        mixed = shift.T @ factor
        gram = gram[np.ix_(left, left)] - factor.T @ factor
        among = among[np.ix_(left, left)] - mixed - mixed.T + (factor.T * norm) @ factor
    return error


def _neuron_taylor(network, x, y, seed) -> list[np.ndarray]:
    return _mean_over_images(network, x, y, lambda a, z, delta: ops.sum(ops.abs(z * delta), axis=0))[:-1]


# A criterion takes (network, x, y, seed) and returns one array of scores per prunable layer; add yours here.
WEIGHT_CRITERIA = {
    "magnitude": lambda network, x, y, seed: [np.abs(kernel) for kernel in _kernels(network)],
    "activation": _weight_activation,
    "taylor": _weight_taylor,
    "random": lambda network, x, y, seed: _random_like(_kernels(network), seed),
}
NEURON_CRITERIA = {
    "norm": lambda network, x, y, seed: [np.sqrt(np.square(kernel).sum(axis=0)) for kernel in _kernels(network)],
    "activation": _neuron_activation,
    "taylor": _neuron_taylor,
    "reconstruction": _neuron_reconstruction,
    "random": lambda network, x, y, seed: _random_like([kernel[0] for kernel in _kernels(network)], seed),
}


def _forward(network: keras.Model, hidden, offsets: Iterable = repeat(0.0)) -> tuple:
    """Return outputs, and the inputs and pre-activations of every Dense layer, with `offsets` added to the latter."""
    inputs, sums, remaining = [], [], iter(offsets)
    for layer in _chain(network):
        if isinstance(layer, keras.layers.Dense):
            inputs.append(hidden)
            hidden = ops.matmul(hidden, layer.kernel) + (layer.bias if layer.use_bias else 0.0) + next(remaining)
            sums.append(hidden)
            hidden = layer.activation(hidden)
        else:
            hidden = layer(hidden, training=False)
    return hidden, inputs, sums


def _input_rms(network: keras.Model, x: np.ndarray) -> list[np.ndarray]:
    """Return the root mean square over images `x` of every input of every Dense layer."""
    squares = _sum_over_images(network, x, lambda a: ops.sum(ops.square(a), axis=0), first_layer=0)
    return [np.sqrt(total / len(x)) for total in squares]


def _sum_over_images(network: keras.Model, x: np.ndarray, term: Callable, first_layer: int = 1) -> list[np.ndarray]:
    """Return term(inputs), summed over batches of the images `x`, per Dense layer from `first_layer` on."""
    totals = 0
    for first in range(0, len(x), _BATCH):
        inputs = _forward(network, ops.convert_to_tensor(x[first : first + _BATCH]))[1]
        terms = [ops.convert_to_numpy(term(a)) for a in inputs[first_layer:]]
        totals = terms if first == 0 else [total + part for total, part in zip(totals, terms, strict=True)]
    return totals


def _mean_over_images(network: keras.Model, x: np.ndarray, y: np.ndarray, term: Callable) -> list[np.ndarray]:
    """Return, per Dense layer, the mean over images of term(input, pre-activation, gradient by the pre-activation)."""
    totals = 0
    for first in range(0, len(x), 1000):
        images, labels = ops.convert_to_tensor(x[first : first + 1000]), y[first : first + 1000]
        _, inputs, sums = _forward(network, images)

        def total_loss(offsets, images=images, labels=labels):
            return ops.sum(_cross_entropy(network, _forward(network, images, offsets)[0], labels))

        deltas = _gradients(total_loss, [ops.zeros_like(z) for z in sums])
        terms = [ops.convert_to_numpy(term(*parts)) for parts in zip(inputs, sums, deltas, strict=True)]
        totals = terms if first == 0 else [total + part for total, part in zip(totals, terms, strict=True)]
    return [total / len(x) for total in totals]


def _gradients(function: Callable, arrays: list) -> list:
    """Return the gradient of the scalar function(arrays) by each array: the one thing Keras has no common name for."""
    if BACKEND == "tensorflow":
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            value = function(arrays)
        return tape.gradient(value, arrays)
    if BACKEND == "jax":
        import jax

        return jax.grad(function)(arrays)
    if BACKEND == "torch":
        import torch

        arrays = [array.requires_grad_() for array in arrays]
        return torch.autograd.grad(function(arrays), arrays)
    raise ValueError(f"Keras backend {BACKEND!r} has no gradients; use tensorflow, jax or torch")


# --- Masks and pruning --------------------------------------------------------------------------------------------


def keep_masks(scores: Mapping[str, np.ndarray], sparsity: float, scope: str = "layer") -> dict[str, np.ndarray]:
    """Return boolean masks (True = kept) of the scores' shapes that remove the lowest `sparsity` of them.

    Exactly `round(sparsity * n)` of n entries are removed: of every layer with scope "layer", of all layers ranked
    together with scope "global". Among equal scores those that come first go first, as a stable sort would have it, so
    masks are nested: what is removed at one sparsity is removed at every higher one.
    Raises `ValueError` for a sparsity outside [0, 1], an unknown scope or a NaN score, `TypeError` for no number.

    >>> keep_masks({"a": np.array([[3.0, 1.0], [2.0, 1.0]])}, 0.25)["a"].tolist()
    [[True, False], [True, True]]
    """
    _check_sparsity(sparsity)
    _check_name("scope", scope, ("layer", "global"))
    _check_scores(scores)
    if scope == "layer":
        return {name: _keep_highest(np.ravel(score), sparsity).reshape(score.shape) for name, score in scores.items()}
    kept = _keep_highest(np.concatenate([np.ravel(score) for score in scores.values()]), sparsity)
    pieces = np.split(kept, np.cumsum([score.size for score in scores.values()])[:-1])
    return {name: piece.reshape(scores[name].shape) for name, piece in zip(scores, pieces, strict=True)}


def _keep_highest(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Mask of a flat array. A partition finds the threshold in linear time; ties at it are settled by position."""
    removed = round(sparsity * scores.size)
    if removed == 0:
        return np.ones(scores.size, bool)
    threshold = np.partition(scores, removed - 1)[removed - 1]
    kept = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    kept[ties[removed - (scores.size - np.count_nonzero(kept) - ties.size) :]] = True
    return kept


def _check_sparsity(sparsity: float) -> None:
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity must be a number in [0, 1], such as 0.5 for 50 %; got {sparsity!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a fraction in [0, 1], such as 0.5 for 50 %; got {sparsity!r}")


def apply_masks(network: keras.Model, masks: Mapping[str, np.ndarray]) -> keras.Model:
    """Return a copy of the network with zeros where the masks are False; layers without a mask stay as they are.

    A mask of shape (inputs, units) removes single weights. A mask of shape (units,) removes whole neurons: kernel
    column and bias, so that a removed unit outputs exactly 0.
    Raises `TypeError` for a mask that is not boolean; `ValueError` for a layer that is unknown or may not be pruned, a
    mask of another shape, or a removed neuron whose activation function would turn 0 into something else.
    """
    layers = {layer.name: layer for layer in prunable_layers(network)}
    for name, mask in masks.items():
        _check_name("prunable layer", name, layers)
        shape = tuple(layers[name].kernel.shape)
        if mask.dtype != bool:
            raise TypeError(f"the mask of layer {name!r} must be boolean (True = kept), got {mask.dtype}")
        if mask.shape not in (shape, shape[1:]):
            raise ValueError(f"the mask of layer {name!r} has shape {mask.shape}; allowed: {shape} or {shape[1:]}")
        if mask.ndim == 1 and not mask.all() and not _silent_at_zero(network, layers[name]):
            raise ValueError(f"neurons of layer {name!r} cannot be removed: its activation function is not 0 at 0")
    weights = []
    for layer in _dense_layers(network):
        mask = masks.get(layer.name, np.True_)
        weights.append(np.where(mask, _kernel(layer), np.float32(0)))
        if layer.use_bias:
            weights.append(np.where(mask, _bias(layer), np.float32(0)) if mask.ndim == 1 else _bias(layer))
    pruned = keras.models.clone_model(network, clone_function=_blank_copy)
    if not pruned.built:
        pruned.build(network.input_shape)
    pruned.set_weights(weights)
    return pruned


def _blank_copy(layer: keras.layers.Layer, units: int | None = None) -> keras.layers.Layer:
    """Return an unbuilt copy of a layer whose kernel will start at zero: drawing random numbers takes longer."""
    config = layer.get_config()
    if isinstance(layer, keras.layers.Dense):
        config |= {"kernel_initializer": "zeros", "units": units or layer.units}
    return type(layer).from_config(config)


def _silent_at_zero(network: keras.Model, layer: keras.layers.Dense) -> bool:
    """Whether units whose pre-activation is 0 send exactly 0 to the next Dense layer."""
    layers = _chain(network)
    signal = layer.activation(ops.zeros((1, layer.units)))
    for following in layers[layers.index(layer) + 1 :]:
        if isinstance(following, keras.layers.Dense):
            break
        signal = following(signal, training=False)
    return not np.any(ops.convert_to_numpy(signal))


def prune_weights(
    network: keras.Model, sparsity: float, criterion: str = "magnitude", scope: str = "layer", **data: object
) -> keras.Model:
    """Return a copy of the network with the lowest-scoring `sparsity` of its weights set to zero.

    The output layer and all biases stay. See `weight_scores` for criterion and data (x, y, seed), `keep_masks` for
    scope and exact counts; both say what they raise.
    """
    return apply_masks(network, keep_masks(weight_scores(network, criterion, **data), sparsity, scope))


def prune_neurons(
    network: keras.Model, sparsity: float, criterion: str = "norm", scope: str = "layer", **data: object
) -> keras.Model:
    """Return a copy of the network in which the lowest-scoring `sparsity` of its hidden units output exactly 0.

    Their kernel columns and biases are set to zero; `shrink` then removes them. See `neuron_scores` for criterion and
    data (x, y, seed), `keep_masks` for exact counts, `apply_masks` for what cannot be removed.
    With scope "global" a unit competes by its place in its own layer, because scores of different layers have no common
    scale: all layers keep equally many units, and narrow ones stay whole until wider ones have come down to them.
    """
    scores = neuron_scores(network, criterion, **data)
    if scope == "global":
        scores = {name: np.argsort(np.argsort(score, kind="stable")) - score.size for name, score in scores.items()}
    return apply_masks(network, keep_masks(scores, sparsity, scope))


def shrink(network: keras.Model) -> keras.Sequential:
    """Return a physically smaller network with the same outputs, without the units that cannot influence them.

    Such a unit has no non-zero path from any input or bias, or none to the output. A hidden layer keeps at least one
    unit, because Keras has no layer of none.
    """
    return _shrink(network, _live_units(network))


def _shrink(network: keras.Model, live: Sequence[np.ndarray]) -> keras.Sequential:
    layers = _dense_layers(network)
    kept = {layer.name: np.flatnonzero(units) for layer, units in zip(layers, live[1:], strict=True)}
    small, weights, rows = [keras.Input(network.input_shape[1:])], [], np.flatnonzero(live[0])
    for layer in _chain(network):
        if layer.name not in kept:
            small.append(_blank_copy(layer))
            continue
        columns = kept[layer.name] if kept[layer.name].size else np.array([0])
        small.append(_blank_copy(layer, columns.size))
        weights.append(_kernel(layer)[np.ix_(rows, columns)])
        weights += [_bias(layer)[columns]] if layer.use_bias else []
        rows = columns
    smaller = keras.Sequential(small, name=network.name)
    smaller.set_weights(weights)
    return smaller


def _live_units(network: keras.Model) -> list[np.ndarray]:
    """Return boolean arrays, for the inputs and then for each Dense layer: which units lie on a path that matters.

    All units of a layer whose activation is not 0 at 0 stay: with a softmax, for one, every unit acts on all others.
    """
    hidden, layers = prunable_layers(network), _dense_layers(network)
    edges = [_kernel(layer) != 0 for layer in layers]
    removable = [_silent_at_zero(network, layer) for layer in hidden]
    live = [np.ones(len(edges[0]), bool)]
    for layer, edge, free in zip(hidden, edges, removable, strict=False):
        live.append((edge[live[-1]].any(axis=0) | (_bias(layer) != 0)) if free else np.ones(layer.units, bool))
    live.append(np.ones(layers[-1].units, bool))
    for position in range(len(hidden), 0, -1):
        if removable[position - 1]:
            live[position] &= edges[position][:, live[position + 1]].any(axis=1)
    return live


def cost(network: keras.Model) -> dict:
    """Return what is left of a network and what it costs.

    weights_left: non-zero kernel entries of the prunable layers that can still influence the output; units_left: layer
    name -> units that can; multiply_adds: per image, and bytes: of all parameters, both of the shrunk network (at least
    one unit per layer).
    """
    return _cost(network, _live_units(network))


def _cost(network: keras.Model, live: Sequence[np.ndarray]) -> dict:
    layers = _dense_layers(network)
    weights = [
        np.count_nonzero((_kernel(layer) != 0) & rows[:, None] & columns)
        for layer, rows, columns in zip(layers[:-1], live, live[1:], strict=False)
    ]
    widths = [live[0].size, *(max(1, np.count_nonzero(units)) for units in live[1:])]
    multiply_adds = sum(rows * columns for rows, columns in pairwise(widths))
    biases = sum(width for layer, width in zip(layers, widths[1:], strict=True) if layer.use_bias)
    return {
        "weights_left": int(sum(weights)),
        "units_left": {layer.name: int(units.sum()) for layer, units in zip(layers[:-1], live[1:], strict=False)},
        "multiply_adds": int(multiply_adds),
        "bytes": int(multiply_adds + biases) * _kernel(layers[0]).itemsize,
    }


# --- Repair -------------------------------------------------------------------------------------------------------


def repair(pruned: keras.Model, dense: keras.Model, x: np.ndarray, ridge: float = 1e-3) -> keras.Model:
    """Return a copy of `pruned` whose remaining weights are refitted so that it computes again what `dense` computed.

    Layer by layer from the input, the non-zero entries of each kernel, and the biases of units that are left, become
    those that bring the layer's pre-activations on the images `x` (n, inputs), computed from the layers repaired so
    far, closest to those of `dense` in least squares. Zeros stay zero. The output layer is refitted too: nothing of it
    was pruned, but what it hears has changed. No labels, no gradients; a few thousand training images are enough.

    ridge: weight, as a fraction of the mean squared input, of the distance to the pruned weights. It is greater than 0,
    so that dead or duplicated inputs and few images do no harm: what the images cannot tell stays as it was.
    Neurons share their inputs, and all units of a layer are solved for at once, exactly. For single weights every unit
    has a problem of its own; up to 30 steps of conjugate gradients solve all of them side by side.

    `pruned` comes from `dense` by pruning; repair first, `shrink` afterwards. Raises `ValueError` for networks of
    different layers, images of another width or with NaN, or a ridge that is not positive, and what `prunable_layers`
    raises.
    """
    kinds = [[_kind(layer) for layer in _chain(network)] for network in (pruned, dense)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"pruned and dense must have the same layers, got {kinds[0]} and {kinds[1]}; shrink later")
    if isinstance(ridge, bool) or not (isinstance(ridge, numbers.Real) and 0 < ridge < np.inf):
        raise ValueError(f"ridge must be a positive number, such as 1e-3; got {ridge!r}")
    prunable_layers(dense)  # refuses NaN weights
    signal = wanted = ops.convert_to_tensor(_check_images(pruned, x))
    repaired = apply_masks(pruned, {})
    for ours, theirs in zip(_chain(repaired), _chain(dense), strict=True):
        if isinstance(ours, keras.layers.Dense):
            wanted = ops.matmul(wanted, theirs.kernel) + (theirs.bias if theirs.use_bias else 0.0)
            _refit(ours, signal, wanted, ridge)
            signal, wanted = ours(signal), theirs.activation(wanted)
        else:
            signal, wanted = ours(signal, training=False), theirs(wanted, training=False)
    return repaired


def _kind(layer: keras.layers.Layer) -> str:
    dense = isinstance(layer, keras.layers.Dense)
    return f"Dense{tuple(layer.kernel.shape)}" if dense else type(layer).__name__


def _refit(layer: keras.layers.Dense, inputs, wanted, ridge: float) -> None:
    """Move the non-zero weights of a Dense layer to where it maps `inputs` closest to `wanted`."""
    weights = _kernel(layer).copy()
    alive = weights != 0
    if layer.use_bias:  # the weight of one more input, which is always 1
        inputs = ops.concatenate([inputs, ops.ones_like(inputs[..., :1])], axis=-1)
        weights = np.vstack([weights, _bias(layer)])
        alive = np.vstack([alive, alive.any(axis=0) | (_bias(layer) != 0)])
    inputs, wanted = (ops.reshape(array, (-1, array.shape[-1])) for array in (inputs, wanted))
    rows = np.flatnonzero(ops.convert_to_numpy(ops.any(inputs != 0, axis=0)))
    columns = np.flatnonzero(alive.any(axis=0))
    if rows.size == 0 or columns.size == 0:
        return
    place = np.ix_(rows, columns)
    inputs, wanted = ops.take(inputs, rows, axis=1), ops.take(wanted, columns, axis=1)
    missing = wanted - ops.matmul(inputs, weights[place])
    if float(ops.max(ops.abs(missing))) <= 1e-5 * float(ops.max(ops.abs(wanted))):  # by rounding only
        return
    solve = _solve_together if alive[place].all() else _solve_side_by_side
    weights[place] += solve(inputs, missing, alive[place], ridge)
    layer.set_weights([weights[:-1], weights[-1]] if layer.use_bias else [weights])


def _solve_together(inputs, missing, alive: np.ndarray, ridge: float) -> np.ndarray:
    """Cholesky's method, in float64 because duplicated inputs leave only the ridge to divide by."""
    inputs, missing = (ops.convert_to_numpy(array).astype(np.float64) for array in (inputs, missing))
    gram = inputs.T @ inputs
    gram[np.diag_indices_from(gram)] += max(ridge / len(gram), 4 * np.finfo(np.float64).eps) * gram.trace()
    return scipy.linalg.solve(gram, inputs.T @ missing, assume_a="pos")


def _solve_side_by_side(inputs, missing, alive: np.ndarray, ridge: float, steps: int = 30) -> np.ndarray:
    """Conjugate gradients for all columns at once, each restricted to its own `alive` rows (Hestenes, Stiefel 1952)."""
    gram, cross = ops.matmul(ops.transpose(inputs), inputs), ops.matmul(ops.transpose(inputs), missing)
    gram = gram + ridge * ops.mean(ops.diagonal(gram)) * ops.eye(gram.shape[0])
    scale = ops.cast(alive, cross.dtype) / ops.diagonal(gram)[:, None]  # the preconditioner, and 0 keeps zeros zero
    residual, direction = cross, cross * scale
    solution, power = ops.zeros_like(cross), ops.sum(cross * direction, axis=0)
    tolerance = 1e-6 * power
    for _ in range(steps):
        power = ops.where(power > tolerance, power, 0.0)  # a column that is done stays where it is
        if not bool(ops.any(power)):
            break
        image = ops.matmul(gram, direction)
        length = ops.divide_no_nan(power, ops.sum(direction * image, axis=0))
        solution, residual = solution + length * direction, residual - length * image
        scaled = residual * scale
        power, previous = ops.sum(residual * scaled, axis=0), power
        direction = scaled + ops.divide_no_nan(power, previous) * direction
    return ops.convert_to_numpy(solution)


# --- Measuring ----------------------------------------------------------------------------------------------------


def sweep(
    networks: Sequence[keras.Model],
    dataset: Dataset,
    methods: Mapping[str, Callable[[keras.Model, float], keras.Model]],
    sparsities: Sequence[float] = SPARSITIES,
) -> pd.DataFrame:
    """Prune every network with every method at every sparsity and measure it on the test images.

    methods: name -> function(network, sparsity) that returns a pruned network. One row per pruned network: dataset,
    method, seed (position in `networks`), sparsity, accuracy (in [0, 1]), loss, weights_left, multiply_adds. Pruned
    networks are evaluated shrunk, which changes their outputs by rounding only.
    """
    grid = [(method, seed, sparsity) for method in methods for seed in range(len(networks)) for sparsity in sparsities]
    rows = []
    gc.freeze()  # pruned networks are cyclic garbage: collect each one without looking at anything older
    try:
        for method, seed, sparsity in _progress(grid, f"pruning on {dataset.name}"):
            rows.append({"dataset": dataset.name, "method": method, "seed": seed, "sparsity": sparsity})
            rows[-1] |= _measure_pruned(methods[method](networks[seed], sparsity), dataset)
            gc.collect()
    finally:
        gc.unfreeze()
    return pd.DataFrame(rows)


def _measure_pruned(pruned: keras.Model, dataset: Dataset) -> dict:
    live = _live_units(pruned)
    whole = all(units.all() for units in live)
    correct, entropy = _evaluate(pruned if whole else _shrink(pruned, live), dataset.x_test, dataset.y_test)
    left = _cost(pruned, live)
    return {"accuracy": correct, "loss": entropy} | {key: left[key] for key in ("weights_left", "multiply_adds")}


def knee(frame: pd.DataFrame, drop: float) -> pd.DataFrame:
    """Return, per dataset, method and seed, the sparsity at which accuracy has first fallen `drop` percentage points.

    frame: as `sweep` returns it, with sparsity 0 in it. Between two measured sparsities accuracy is taken as a straight
    line; the column `knee` is NaN where accuracy never falls that far. Raises `ValueError` without sparsity 0.
    """
    rows = []
    for (dataset, method, seed), curve in frame.groupby(["dataset", "method", "seed"], sort=False):
        curve = curve.sort_values("sparsity")
        sparsity, percent = curve["sparsity"].to_numpy(), 100 * curve["accuracy"].to_numpy()
        if sparsity[0] != 0:
            raise ValueError(f"knee needs the accuracy at sparsity 0; the lowest of {method!r} is {sparsity[0]}")
        limit = percent[0] - drop
        below = np.flatnonzero(percent <= limit) if drop > 0 else np.array([0])
        where = np.nan
        if below.size:
            after = max(1, below[0])
            where = np.interp(-limit, -percent[after - 1 : after + 1], sparsity[after - 1 : after + 1])
        rows.append({"dataset": dataset, "method": method, "seed": seed, "knee": float(where)})
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
        raise ValueError(f"mean_sd needs two or more finite values, got {values.tolist()}")
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
    half = scipy.stats.t.ppf(0.975, values.size - 1) * scipy.stats.sem(values)
    return values.mean() - half, values.mean() + half


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


def accuracy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return test accuracy in %, mean ± standard deviation over seeds: sparsities down, data sets and methods across.

    frame: as `sweep` returns it, with at least two seeds.
    """
    percent = 100 * frame["accuracy"]
    row = frame["sparsity"].map(lambda sparsity: f"{100 * sparsity:g}")
    column = frame["dataset"].map(lambda name: TITLES.get(name, name)) + ", " + frame["method"]
    cells = percent.groupby([row, column], sort=False).agg(mean_sd)
    return cells.unstack(sort=False).rename_axis(index=None, columns="Sparsity (%)")


# --- Showing ------------------------------------------------------------------------------------------------------

# One code for the whole project: method -> (colour, line style, marker), from seaborn's colour-blind palette.
_PALETTE = sns.color_palette("colorblind")
STYLES = {
    "weight pruning": (_PALETTE[0], "-", "o"),
    "neuron pruning": (_PALETTE[1], "--", "s"),
    "repaired neurons": (_PALETTE[2], "-", "D"),
    "repaired weights": (_PALETTE[9], "-", "D"),
    "random": (_PALETTE[7], ":", "x"),
}
TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}


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
    _check_name("x", x, ("sparsity", "weights_left"))
    datasets, methods, logarithmic = frame["dataset"].unique(), frame["method"].unique(), x == "weights_left"
    colours = [_PALETTE[4], "black", _PALETTE[5], _PALETTE[3], _PALETTE[6]]
    spare = cycle((colour, "-.", marker) for colour, marker in zip(colours, "^*Pv<", strict=True))
    styles = {method: STYLES.get(method) or next(spare) for method in methods}
    figure, panels = plt.subplots(1, len(datasets), figsize=(9.5, 3.8), sharey=True, squeeze=False)
    for panel, dataset in zip(panels[0], datasets, strict=True):
        part = frame[frame["dataset"] == dataset]
        for method in methods:
            _plot_method(panel, part[part["method"] == method], x, method, styles[method])
        panel.axhline(10, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        place = {"xycoords": ("axes fraction", "data"), "ha": "right" if logarithmic else "left", "fontsize": 8}
        panel.annotate("one answer for all", (0.99 if logarithmic else 0.01, 11), **place)
        panel.set(title=TITLES.get(dataset, dataset), ylim=(0, 102), xscale="log" if logarithmic else "linear")
        panel.set_xlabel("Weights left" if logarithmic else "Sparsity (%)")
    panels[0, 0].set_ylabel("Test accuracy (%)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, labelcolor="linecolor")
    figure.suptitle(title, fontweight="bold")
    return figure


def _plot_method(panel: plt.Axes, part: pd.DataFrame, x: str, label: str, style: tuple) -> None:
    colour, line, marker = style
    scale = 100 if x == "sparsity" else 1
    for _, curve in part.groupby("seed"):
        panel.plot(scale * curve[x], 100 * curve["accuracy"], color=colour, linewidth=0.6, alpha=0.4)
    mean = part.groupby("sparsity")[["weights_left", "accuracy"]].mean().reset_index()
    look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "label": label}
    panel.plot(scale * mean[x], 100 * mean["accuracy"], **look)


def show(figure: plt.Figure, alt: str) -> None:
    """Display a figure in a notebook with the alternative text `alt`, and close it."""
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def device() -> str:
    """Return in words what the arithmetic runs on."""
    if BACKEND == "tensorflow":
        gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
        names = [details.get("device_name", "GPU") for details in gpus]
    elif BACKEND == "jax":
        import jax

        names = [found.device_kind for found in jax.devices() if found.platform != "cpu"]
    elif BACKEND == "torch":
        import torch

        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    else:
        names = []
    return f"{', '.join(names) or f'{os.cpu_count()} CPU cores'}; Keras {keras.__version__} on {BACKEND}"
