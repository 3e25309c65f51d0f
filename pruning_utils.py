"""Prune, repair and shrink Keras 3 networks: single weights or whole neurons.

Every function returns a new network, of the same class and not compiled, and leaves its arguments alone. Any built
chain of `Dense` layers will do, `Sequential` or functional. A kernel has the shape (inputs, units); a mask is boolean,
True = kept; a score is higher for what should be kept; sparsity is a fraction in [0, 1].

    >>> layers = [keras.layers.Dense(30, "relu", name="hidden"), keras.layers.Dense(10)]
    >>> network = keras.Sequential([keras.Input((16,)), *layers])
    >>> cost(shrink(prune_neurons(network, sparsity=0.5)))["units_left"]
    {'hidden': 15}
"""

import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import keras
import numpy as np
import scipy.linalg
from keras import Model, ops
from keras.layers import Activation, Dense, Dropout, Flatten, ReLU, Softmax

# Keras' own types. A subclass of yours that computes the same may be added: SUPPORTED.add(MyDense).
SUPPORTED = {Dense, Flatten, Dropout, Activation, ReLU, Softmax}
BATCH_SIZE = 4096  # images per forward pass
Array = np.ndarray | None
Arrays = dict[str, np.ndarray]  # layer name -> scores or mask

# --- What can be pruned -------------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """A Dense layer, the shape of its output, and the layers between it and the next Dense layer."""

    layer: Dense
    shape: tuple
    after: list

    def weights(self) -> list[np.ndarray]:
        return [ops.convert_to_numpy(weight) for weight in self.layer.weights]

    def sums(self, inputs, weights: list | None = None):
        """Return the pre-activations, in float32 at least, for the layer's own or other `weights`."""
        kernel, *bias = (ops.stop_gradient(_wide(weight)) for weight in weights or self.layer.weights)
        sums = ops.matmul(inputs, kernel)
        return ops.add(sums, bias[0]) if bias else sums

    def act(self, sums):
        """Return what the next Dense layer receives for these pre-activations."""
        return _through(self.after, self.layer.activation(sums))


class _Chain(NamedTuple):
    """A network taken apart: the layers before the first Dense layer, and a stage per Dense layer."""

    network: Model
    before: list
    stages: list[_Stage]

    def start(self, images: np.ndarray):
        """Return what the first Dense layer receives for a batch of images."""
        return _through(self.before, _wide(ops.convert_to_tensor(images, self.network.inputs[0].dtype)))


def _wide(array):
    """Return a tensor in float32, or as it is if it is wider: half precision cannot add up a thousand squares."""
    array = ops.convert_to_tensor(array)
    return ops.cast(array, keras.backend.result_type(array.dtype, "float32"))


def _through(layers: Iterable[keras.layers.Layer], signal):
    for layer in layers:  # `call`, because `layer(signal)` would round to the precision of the layer
        signal = signal if isinstance(layer, Dropout) else layer.call(signal)
    return signal


def _rows(array):
    return ops.reshape(array, (-1, array.shape[-1]))


def _batches(images: np.ndarray, size: int = BATCH_SIZE) -> list[slice]:
    return [slice(first, first + size) for first in range(0, len(images), size)]


def prunable_layers(network: Model) -> list[Dense]:
    """Return the `Dense` layers that may be pruned: all but the last one, the output layer.

    Raises `TypeError` for a network or layer that is not supported, `ValueError` for a network that is not built, has
    only one `Dense` layer, is not a chain of layers used once, or holds NaN or infinite weights.
    """
    return [stage.layer for stage in _take_apart(network, check=True).stages[:-1]]


def _take_apart(network: Model, check: bool = False) -> _Chain:
    """Return a network's layers as a chain; `check` looks at all weights, once per call of a public function."""
    layers, chain = _layers_in_order(network), _Chain(network, [], [])
    shape = network.inputs[0].shape
    for layer in layers:
        shape, stages = layer.compute_output_shape(shape), chain.stages
        if not isinstance(layer, Dense):
            (stages[-1].after if stages else chain.before).append(layer)
            continue
        if stages and (units := stages[-1].layer.units) != (inputs := layer.kernel.shape[0]):
            raise ValueError(f"layer {stages[-1].layer.name!r} has {units} units, but {layer.name!r} takes {inputs}")
        if check and not all(np.isfinite(ops.convert_to_numpy(weight)).all() for weight in layer.weights):
            raise ValueError(f"layer {layer.name!r} holds NaN or infinite weights; nothing can be done with it")
        stages.append(_Stage(layer, shape, []))
    if len(chain.stages) < 2:
        names = [stage.layer.name for stage in chain.stages]
        raise ValueError(f"pruning needs a hidden layer before the output layer; {network.name!r} has only {names}")
    return chain


def _layers_in_order(network: Model) -> list[keras.layers.Layer]:
    """Return the layers in order of execution, or say why this network is not a plain chain of supported layers."""
    sequential, name = isinstance(network, keras.Sequential), getattr(network, "name", None)
    if not sequential and not (isinstance(network, Model) and hasattr(network, "_nodes_by_depth")):
        raise TypeError(f"expected a keras.Sequential or a functional network, got {type(network).__name__}")
    if not type(network).call.__module__.startswith("keras."):
        raise TypeError(f"network {name!r} is not supported: {type(network).__name__} has a `call` of its own")
    if not network.built or not network.inputs:
        raise ValueError(f"network {name!r} is not built; call network.build((None, inputs)) first")
    steps = [[layer] for layer in network.layers]
    if not sequential:  # all that happens at one distance from the output
        levels = sorted(network._nodes_by_depth.items(), reverse=True)
        steps = [[node.operation for node in nodes] for _, nodes in levels]
    layers = [layer for step in steps for layer in step if not isinstance(layer, keras.layers.InputLayer)]
    for layer in layers:
        kind = f"layer {layer.name!r} is a {type(layer).__name__}"
        if type(layer) not in SUPPORTED:
            supported = ", ".join(sorted(known.__name__ for known in SUPPORTED))
            raise TypeError(f"{kind}, which is not supported; supported: {supported}, as Keras has them")
        changed = getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False)
        if changed or len(layer.weights) != (1 + layer.use_bias if isinstance(layer, Dense) else 0):
            raise TypeError(f"{kind}, quantised, with LoRA or with weights beyond kernel and bias: not supported")
    names, structure = [layer.name for layer in layers], getattr(network, "_outputs_struct", None)
    ends = len(network.inputs) + len(network.outputs)
    if len(set(names)) < len(names) or max(map(len, steps)) > 1 or ends > 2 or isinstance(structure, Mapping):
        raise ValueError(f"network {name!r} is not a chain: it needs one input, one output (not in a dictionary) and "
                         f"every layer once, by a name of its own; got {names}")  # fmt: skip
    return layers


def _removable(stage: _Stage) -> bool:
    """Whether a unit whose pre-activation is 0 sends exactly 0 onwards and changes nothing for other units."""
    if stage.layer.activation in (keras.activations.relu, keras.activations.linear) and not stage.after:
        return True  # no need to try
    sums, even = _probe(stage), np.arange(stage.layer.units) % 2 == 0
    received = ops.convert_to_numpy(stage.act(sums))
    for silent in (even, ~even):
        others = ops.convert_to_numpy(stage.act(ops.where(silent, 0.0, sums)))
        if np.any(others[..., silent]) or not np.array_equal(others[..., ~silent], received[..., ~silent]):
            return False
    return True


def _probe(stage: _Stage):
    shape = (3, *(size or 2 for size in stage.shape[1:]))  # three images
    return ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape), "float32")


def _choice(kind: str, value: object, valid: Iterable[str]) -> None:
    if value not in (valid := list(valid)):
        raise ValueError(f"unknown {kind} {value!r}; choose one of: {', '.join(valid)}")


def _fits(shape: tuple, expected: tuple) -> bool:
    return len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))


def _images(network: Model, x) -> np.ndarray:
    """Return images as a NumPy array, having checked kind, shape and finiteness."""
    expected = tuple(network.inputs[0].shape)
    x = np.asanyarray(ops.convert_to_numpy(x) if isinstance(x, keras.Variable) or ops.is_tensor(x) else x)
    if isinstance(x, np.ma.MaskedArray) or (x.ndim and x.dtype.kind not in "fiub" and x.dtype.name != "bfloat16"):
        raise TypeError(f"x must be an array of real numbers, without a mask; got {type(x).__name__} of {x.dtype}")
    if not _fits(x.shape, (None, *expected[1:])) or len(x) == 0:
        raise ValueError(f"x has shape {x.shape}, but network {network.name!r} takes images {expected}")
    with np.errstate(over="ignore"):
        if bad := np.count_nonzero(~np.isfinite(x.astype(np.float32, copy=False))):
            raise ValueError(f"x holds NaN or infinite values in {bad} places; images must be finite")
    return np.asarray(x)


def _labels(chain: _Chain, x: np.ndarray, y) -> np.ndarray:
    """Return labels as a NumPy array, having checked that they are classes, and the network a classifier."""
    y, last = np.asarray(y), chain.stages[-1]
    shape, classes = (len(x), *last.shape[1:-1]), last.layer.units
    if y.dtype.kind not in "iu" or not _fits(y.shape, shape):
        raise ValueError(f"y must be one integer label per output, shape {shape}; got {y.dtype} {y.shape}")
    if classes < 2 or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels must be the classes 0 to {classes - 1}; got {y.min()} to {y.max()}")
    sums = _probe(last)
    found, *known = (ops.convert_to_numpy(each) for each in (last.act(sums), sums, ops.softmax(sums)))
    if not any(found.shape == each.shape and np.allclose(found, each, atol=1e-6) for each in known):
        raise ValueError(f"layer {last.layer.name!r} must return logits or their softmax, or there is no loss")
    return y.astype(np.int32)


# --- Scores -------------------------------------------------------------------------------------------------------


def weight_scores(
    network: Model, criterion: str = "magnitude", x: Array = None, y: Array = None, seed: int | None = None
) -> Arrays:
    """Return a score for every prunable weight: layer name -> array of the kernel's shape (inputs, units).

    criterion: "magnitude" |w|; "activation" |w| · rms of its input over images `x` (Sun et al. 2023, Wanda);
    "taylor" |w · gradient| per image of `x` with labels `y`, averaged (Molchanov et al. 2017); "reconstruction", by how
    much the squared error of the layer's pre-activations over images `x` rises without it when all others are refitted:
    backward elimination with refits (Hassibi and Stork 1993; Frantar and Alistarh 2022; ALPS, Meng et al. 2024, solves
    the same problem for one sparsity), a unit's error counted by its outgoing weights, each by what the next unit's
    counts, so that units' scales cancel out; choose by it if you `repair`; "random", from `seed`.
    What a criterion does not need is ignored. On sequences, every position counts as an image.
    Raises `ValueError` for another criterion, one that does not get what it needs, or scores that are not finite;
    `TypeError` for images that are no real numbers.
    """
    return _score(network, "weight", WEIGHT_CRITERIA, criterion, {"x": x, "y": y, "seed": seed})


def neuron_scores(
    network: Model, criterion: str = "norm", x: Array = None, y: Array = None, seed: int | None = None
) -> Arrays:
    """Return a score for every prunable neuron: layer name -> array (units,).

    criterion: "norm", the L2 norm of the incoming kernel column; "activation", rms output over images `x` · L2 norm of
    the outgoing kernel row; "taylor", |pre-activation · gradient| per image of `x` with labels `y`, averaged, the
    first-order change of the loss when the unit is silenced (Molchanov et al. 2017); "reconstruction", the share of the
    next layer's squared pre-activations over images `x`, counted as for weights, that least squares cannot explain from
    the better units of the layer: greedy forward selection (El Halabi et al. 2022), that is orthogonal matching pursuit
    (Pati et al. 1993), with the aim of ThiNet (Luo et al. 2017); "random", from `seed`.
    What a criterion does not need is ignored. Raises what `weight_scores` raises.
    """
    return _score(network, "neuron", NEURON_CRITERIA, criterion, {"x": x, "y": y, "seed": seed})


def _score(network: Model, kind: str, criteria: Mapping[str, Callable], criterion: str, data: dict) -> dict:
    chain = _take_apart(network, check=True)
    _choice(f"{kind} criterion", criterion, criteria)
    needed = inspect.signature(criteria[criterion]).parameters
    data = {name: value for name, value in data.items() if name in needed}
    if missing := [name for name, value in data.items() if value is None]:
        hint = f"x: training images of shape {network.inputs[0].shape}, y: their labels, seed: a number"
        raise ValueError(f"criterion {criterion!r} needs {' and '.join(missing)}; got None ({hint})")
    if "x" in data:
        data["x"] = _images(network, data["x"])
    if "y" in data:
        data["y"] = _labels(chain, data.get("x", data["y"]), data["y"])
    found = [np.asarray(score) for score in criteria[criterion](network, **data)]
    shapes = [tuple(stage.layer.kernel.shape)[kind == "neuron" :] for stage in chain.stages[:-1]]
    if [score.shape for score in found] != shapes:
        raise ValueError(f"criterion {criterion!r} must return scores of shapes {shapes}, one array per layer")
    scores = {stage.layer.name: score for stage, score in zip(chain.stages[:-1], found, strict=True)}
    _check_scores(scores)
    return scores


def _check_scores(scores: Arrays) -> None:
    for name, score in scores.items():
        if not np.isfinite(score).all():
            raise ValueError(f"scores of layer {name!r} hold NaN or inf; they cannot be ranked")


def _kernels(network: Model) -> list[np.ndarray]:
    return [ops.convert_to_numpy(_wide(stage.layer.kernel)) for stage in _take_apart(network).stages]


def _input_rms(network, x) -> list[np.ndarray]:
    squares = _mean_square(network, x, lambda a: ops.sum(ops.square(a), axis=0), np.multiply)
    return [np.sqrt(each) for each in squares]


def _weight_activation(network, x) -> list[np.ndarray]:
    inputs = _input_rms(network, x)[:-1]
    return [np.abs(kernel) * rms[:, None] for kernel, rms in zip(_kernels(network), inputs, strict=False)]


def _weight_taylor(network, x, y) -> list[np.ndarray]:
    # The gradient of one image's loss by w_ij is input_i · delta_j; its mean |.| over images is one matrix product.
    means = _mean_over_rows(network, x, y, lambda a, z, delta: ops.matmul(ops.transpose(ops.abs(a)), ops.abs(delta)))
    return [np.abs(kernel) * mean for kernel, mean in zip(_kernels(network), means[:-1], strict=False)]


def _sent_on(network) -> list[np.ndarray]:
    """Return what errors of the units of every Dense layer count: 1 for outputs; else the L2 norm of the outgoing row,
    whose entries are each times what the next unit counts, so that no unit's scale matters."""
    kernels = _kernels(network)
    sent = [np.ones(kernels[-1].shape[1])]
    for kernel in kernels[:0:-1]:
        sent.insert(0, np.linalg.norm(kernel * sent[0], axis=1))
    return sent


def _grams(network, x, layers: range) -> list[np.ndarray]:
    """Return, for these Dense layers, mean products (inputs + 1, inputs + 1) of inputs and of 1, the bias's input."""

    def products(rows):
        rows = ops.concatenate([rows, ops.ones_like(rows[:, :1])], axis=1)
        return ops.matmul(ops.transpose(rows), rows)

    return _mean_square(network, x, products, lambda powers, _: np.outer([*powers, 1], [*powers, 1]), layers)


def _weight_reconstruction(network, x) -> list[np.ndarray]:
    return [_rise_at_removal(*problem) for problem in _weight_problems(network, x)]


def _weight_problems(network, x, layers: range | None = None) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield for all prunable layers, or for these, what their weights are chosen by, in float32.

    That is the mean products of its inputs, each scaled to 1 and without what a bias takes up, with a ridge of 0.1 %,
    and the kernel in units of these and of what errors of its units count; the energy of its pre-activations is 1.
    """
    stages, kernels, sent = _take_apart(network).stages, _kernels(network), _sent_on(network)
    layers = layers or range(len(stages) - 1)
    for number, gram in zip(layers, _grams(network, x, layers), strict=True):
        energy, mean = gram.diagonal()[:-1], gram[:-1, -1] * stages[number].layer.use_bias
        gram = gram[:-1, :-1] - np.outer(mean, mean) + np.diag(1e-3 * energy)
        scale = np.sqrt(np.maximum(gram.diagonal(), 0.5e-3 * energy))
        kernel, scale = kernels[number] * sent[number] * scale[:, None], np.where(scale > 0, scale, 1.0)
        gram = gram / np.outer(scale, scale)
        gram[np.diag_indices_from(gram)] = 1
        total = np.sum(kernel * (gram @ kernel))
        yield gram.astype(np.float32), (kernel / np.sqrt(total or 1.0)).astype(np.float32)


def _rise_at_removal(gram: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Rank weights by backward elimination: what is needed least goes, the rest is refitted, and so on.

    Takes what `_weight_problems` has. Returns higher scores for what goes later: sums of what rounds and weights before
    it cost. As long as many are left, a quarter goes at a time, those with the smallest |w| · rms of the input.
    """
    if not np.isfinite(kernel).all():
        return np.full(kernel.shape, np.nan)
    cross, alive = gram @ kernel, kernel != 0
    scores, highest = np.zeros(kernel.shape), 0.0
    while np.mean(alive.sum(axis=0) ** 3) > 64**3:
        rise = np.where(alive, kernel.astype(float) ** 2, np.inf)
        number = np.count_nonzero(alive) // 4
        last = np.partition(rise, number - 1, axis=None)[number - 1]
        gone = rise <= last
        scores[gone], highest, alive = highest + rise[gone], highest + last, alive & ~gone
        kernel = kernel * alive
        kernel += _conjugate_gradients(gram, (cross - gram @ kernel) * alive, alive, limit=8)[0]
    return scores + alive * (highest + _one_by_one(gram, cross, alive))


def _one_by_one(gram: np.ndarray, cross: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Return the rise of each column's squared error when of its `alive` weights the least needed goes, then the next.

    Without weight i, refitted, the error is larger by w² / [gram⁻¹]ᵢᵢ (Hassibi and Stork 1993); the inverse is kept up
    to date as in Frantar and Alistarh 2022. A weight counts at least as much as those that went before it.
    """
    scores = np.zeros(cross.shape)
    for columns, rows, own, parts in _column_by_column(gram, alive):
        every, most = np.arange(len(columns)), rows.shape[1]
        inverse, highest = np.array(ops.linalg.inv(parts)), np.zeros(len(columns))
        weights = (inverse @ (cross[rows, columns[:, None]] * own)[:, :, None])[:, :, 0]
        for _ in range(most):
            doubt = np.where(own, inverse.diagonal(axis1=1, axis2=2), 1.0)
            rise = np.where(own, weights.astype(float) ** 2 / doubt, np.inf)
            least = rise.argmin(axis=1)
            going, line, pivot = own[every, least], inverse[every, least], doubt[every, least]
            highest = np.where(going, np.maximum(highest, rise[every, least]), highest)
            scores[rows[every, least][going], columns[going]] = highest[going]
            weights -= (going * weights[every, least] / pivot)[:, None] * line
            inverse -= ((going / pivot)[:, None] * line)[:, :, None] * line[:, None, :]
            own[every, least] = False
    return scores


def _best_together(gram: np.ndarray, kernel: np.ndarray, sparsity: float) -> np.ndarray:
    """Score weights for one sparsity: those with the highest scores leave little error once they are refitted.

    Takes what `_weight_problems` has. ADMM (ALPS, Meng et al. 2024): the best weights of any number and the largest of
    them take turns, and are pulled together ever more strongly.
    """
    if not np.isfinite(kernel).all():
        return np.full(kernel.shape, np.nan)
    (values, vectors), wanted, strength = np.linalg.eigh(gram), gram @ kernel, np.float32(0.1)
    largest, pull = np.where(_keep_highest(np.abs(kernel), sparsity), kernel, 0), np.zeros_like(kernel)
    for _ in range(25):
        free = vectors.T @ (wanted + strength * (largest - pull))
        free = vectors @ (free / (values + strength)[:, None]) + pull
        largest = np.where(_keep_highest(np.abs(free), sparsity), free, 0)
        pull, strength = (free - largest) / np.float32(1.1), strength * np.float32(1.1)
    return np.abs(free)


def _column_by_column(gram: np.ndarray, alive: np.ndarray) -> Iterable[tuple]:
    """Yield columns, their `alive` rows (columns, n), which of these are no padding, and `gram` (columns, n, n) there.

    Columns with about as many rows come together, few enough to bound memory; padding is that of the identity.
    """
    counts, first = alive.sum(axis=0), 0
    order = np.argsort(-counts, kind="stable")
    while first < len(order) and (most := counts[order[first]]):
        columns = order[first : first + max(1, 2**20 // most**2)]
        first += len(columns)
        rows = np.argsort(~alive[:, columns], axis=0, kind="stable")[:most].T
        own = np.take_along_axis(alive[:, columns].T, rows, axis=1)
        parts = gram[rows[:, :, None], rows[:, None, :]] * (own[:, :, None] & own[:, None, :])
        parts[:, range(most), range(most)] += ~own
        yield columns, rows, own, parts


def _neuron_reconstruction(network, x) -> list[np.ndarray]:
    return [_error_before_each(*problem) for problem in _neuron_problems(network, x)]


def _neuron_problems(network, x, layers: range | None = None) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield for all prunable layers, or for these, what their units are chosen by.

    That is the mean products of their outputs, without what the next bias takes up, and the next kernel in units of
    what errors of its units count.
    """
    stages, kernels, sent = _take_apart(network).stages, _kernels(network), _sent_on(network)
    layers = layers or range(len(stages) - 1)
    following = range(layers.start + 1, layers.stop + 1)
    for number, gram in zip(following, _grams(network, x, following), strict=True):
        mean, energy = gram[:-1, -1] * stages[number].layer.use_bias, gram.diagonal()[:-1]
        varies = energy - mean**2 > 1e-5 * energy  # or only rounding is left
        gram = (gram[:-1, :-1] - np.outer(mean, mean)) * np.outer(varies, varies)
        yield gram, kernels[number] * sent[number]


def _error_before_each(gram: np.ndarray, kernel: np.ndarray, ridge: float = 1e-3, block: int = 128) -> np.ndarray:
    """Rank units by orthogonal matching pursuit: always take the one that most reduces the error of what comes next.

    gram: (units, units) of a layer's outputs; kernel: (units, next units); ridge: a share of the mean unit's energy.
    Returns, per unit, the share of the next layer's squared sums that those taken before cannot explain: first 1.
    """
    size = np.linalg.norm(kernel.astype(np.float64), axis=1)  # in units of what it sends on, its own scale cancels out
    gram, kernel = gram * np.outer(size, size), kernel / np.where(size > 0, size, 1.0)[:, None]
    gram /= gram.trace() / len(gram) or 1.0
    cross = gram @ kernel
    energy = total = np.sum(kernel * cross)
    if not np.isfinite(total):
        return np.full(len(gram), np.nan)
    among = cross @ cross.T
    gram[np.diag_indices_from(gram)] += ridge
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


def _neuron_activation(network, x) -> list[np.ndarray]:
    sent = [np.linalg.norm(kernel.astype(float), axis=1) for kernel in _kernels(network)[1:]]
    return [rms * each for rms, each in zip(_input_rms(network, x)[1:], sent, strict=True)]


def _neuron_taylor(network, x, y) -> list[np.ndarray]:
    return _mean_over_rows(network, x, y, lambda a, z, delta: ops.sum(ops.abs(z * delta), axis=0))[:-1]


def _random(seed: int, arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [np.random.default_rng([seed, number]).random(array.shape) for number, array in enumerate(arrays)]


# A criterion takes the network and, by these names, those of x, y and seed that it needs; it returns an array of scores
# per prunable layer. Add yours here.
WEIGHT_CRITERIA: dict[str, Callable] = {
    "magnitude": lambda network: [np.abs(kernel) for kernel in _kernels(network)[:-1]],
    "activation": _weight_activation,
    "taylor": _weight_taylor,
    "reconstruction": _weight_reconstruction,
    "random": lambda network, seed: _random(seed, _kernels(network)[:-1]),
}
NEURON_CRITERIA: dict[str, Callable] = {
    "norm": lambda network: [np.linalg.norm(kernel.astype(float), axis=0) for kernel in _kernels(network)[:-1]],
    "activation": _neuron_activation,
    "taylor": _neuron_taylor,
    "reconstruction": _neuron_reconstruction,
    "random": lambda network, seed: _random(seed, [kernel[0] for kernel in _kernels(network)[:-1]]),
}


def _forward(chain: _Chain, images: np.ndarray, offsets: Iterable | None = None) -> tuple[list, list]:
    """Return inputs and pre-activations of every Dense layer, with `offsets` added to the latter."""
    signal, inputs, sums = chain.start(images), [], []
    for stage, offset in zip(chain.stages, offsets or [0.0] * len(chain.stages), strict=True):
        inputs.append(signal)
        sums.append(stage.sums(signal) + offset)
        signal = stage.act(sums[-1])
    return inputs, sums


def _near_one(rows) -> tuple:
    """Return rows divided by a power of two per column that brings them between -2 and 2, and these powers."""
    most = ops.convert_to_numpy(ops.max(ops.abs(rows), axis=0))
    powers = np.exp2(np.floor(np.log2(np.where(most > 2.0**-120, most, 1.0))))
    return rows / ops.convert_to_tensor(powers, rows.dtype), powers.astype(np.float64)


def _mean_square(network: Model, x: np.ndarray, term: Callable, scale: Callable, layers: range | None = None) -> list:
    """Return, per Dense layer, the mean over images of a term that is quadratic in its inputs, in float64.

    Inputs are brought near 1 first, so that squares neither under- nor overflow; scale(powers, powers) undoes it.
    """
    chain = _take_apart(network)
    totals = dict.fromkeys(layers or range(len(chain.stages)), 0.0)
    for batch in _batches(x):
        received = _forward(chain, x[batch])[0]
        for number in totals:
            rows, powers = _near_one(_rows(received[number]))
            total = scale(powers, powers) * ops.convert_to_numpy(term(rows))
            totals[number] += total / (len(x) * len(rows) // len(received[number]))
    return list(totals.values())


def _mean_over_rows(network: Model, x: np.ndarray, y: np.ndarray, term: Callable) -> list[np.ndarray]:
    """Return, per Dense layer, the mean over images of term(input, pre-activation, gradient by the pre-activation)."""
    chain = _take_apart(network)
    totals = [0.0] * len(chain.stages)
    for batch in _batches(x, 1000):
        inputs, sums = _forward(chain, x[batch])

        def total_loss(offsets, batch=batch):
            logits = _forward(chain, x[batch], offsets)[1][-1]
            return ops.sum(keras.losses.sparse_categorical_crossentropy(y[batch], logits, from_logits=True))

        deltas = _gradients(total_loss, [ops.zeros_like(each) for each in sums])
        for number, parts in enumerate(zip(inputs, sums, deltas, strict=True)):
            totals[number] += ops.convert_to_numpy(term(*map(_rows, parts))).astype(np.float64) / y.size
    return totals


def _gradients(function: Callable, arrays: list) -> list:
    """Return the gradient of the scalar function(arrays) by each array: the one thing Keras has no common name for."""
    name = keras.backend.backend()
    backend = sys.modules[name]  # Keras has imported it
    if name == "tensorflow":
        with backend.GradientTape() as tape:
            tape.watch(arrays)
            value = function(arrays)
        return tape.gradient(value, arrays)
    if name == "jax":
        return backend.grad(function)(arrays)
    if name == "torch":
        arrays = [array.requires_grad_() for array in arrays]
        return backend.autograd.grad(function(arrays), arrays)
    raise ValueError(f"Keras backend {name!r} has no gradients; use tensorflow, jax or torch")


# --- Masks and pruning --------------------------------------------------------------------------------------------


def keep_masks(scores: Arrays, sparsity: float | Mapping[str, float], scope: str = "layer") -> Arrays:
    """Return boolean masks (True = kept) of the scores' shapes that remove the lowest `sparsity` of them.

    Exactly `round(sparsity * n)` of n entries are removed: with scope "layer" of every layer (`sparsity` may then be a
    dictionary, one per layer), with "global" of all layers, ranked together by value, with "equal" of all, ranked by
    the place in their own, because scores of different layers have no common scale: then all layers keep equally
    many, and narrow ones stay whole until wider ones have come down to them. Among equal scores the first go first, so
    masks are nested: what is removed at one sparsity is removed at every higher one.
    Raises `ValueError` for a sparsity outside [0, 1] or of other layers, an unknown scope, or a score that is NaN or
    infinite; `TypeError` for a sparsity that is no number.

    >>> keep_masks({"a": np.array([[3.0, 1.0], [2.0, 1.0]])}, 0.25)["a"].tolist()
    [[True, False], [True, True]]
    """
    _choice("scope", scope, ("layer", "global", "equal"))
    _check_scores(scores)
    flat = {name: np.ravel(score) for name, score in scores.items()}
    if scope == "layer":
        shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(flat, sparsity)
        if set(shares) != set(flat):
            raise ValueError(f"sparsity must have the layers of the scores, {list(flat)}; got {list(shares)}")
        kept = [_keep_highest(score, shares[name]) for name, score in flat.items()]
    else:
        if scope == "equal":
            flat = {name: np.argsort(np.argsort(score, kind="stable")) - score.size for name, score in flat.items()}
        ends = np.cumsum([score.size for score in flat.values()])[:-1]
        kept = np.split(_keep_highest(np.concatenate(list(flat.values())), sparsity), ends)
    return {name: mask.reshape(np.shape(score)) for mask, (name, score) in zip(kept, scores.items(), strict=True)}


def _keep_highest(scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Mask of an array. A partition finds the threshold in linear time; ties at it are settled by position."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"sparsity must be a number in [0, 1], such as 0.5 for 50 %; got {sparsity!r}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be a fraction in [0, 1], such as 0.5 for 50 %; got {sparsity!r}")
    removed = round(float(sparsity) * scores.size)
    if removed == 0:
        return np.ones(scores.shape, bool)
    threshold = np.partition(scores, removed - 1, axis=None)[removed - 1]
    kept = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    kept.flat[ties[removed - (scores.size - np.count_nonzero(kept) - ties.size) :]] = True
    return kept


def apply_masks(network: Model, masks: Arrays) -> Model:
    """Return a copy of the network with zeros where the masks are False; layers without a mask stay as they are.

    A mask of shape (inputs, units) removes single weights. A mask of shape (units,) removes whole neurons: kernel
    column and bias, so that a removed unit outputs exactly 0. The copy has the network's class, input signature, names,
    dtypes and layer settings, down to the very activation functions and initialisers; it is not compiled.
    Raises `TypeError` for a mask that is no boolean array; `ValueError` for a layer that is unknown or may not be
    pruned, a mask of another shape, or a removed neuron whose activation is not 0 at 0 or depends on other units.
    """
    chain = _take_apart(network, check=True)
    stages = {stage.layer.name: stage for stage in chain.stages[:-1]}
    weights = {stage.layer.name: list(stage.layer.weights) for stage in chain.stages}
    for name, mask in masks.items():
        _choice("prunable layer", name, stages)
        shape, kind = tuple(weights[name][0].shape), getattr(mask, "dtype", type(mask).__name__)
        if not isinstance(mask, np.ndarray) or mask.dtype != bool:
            raise TypeError(f"the mask of layer {name!r} must be a boolean NumPy array (True = kept), got {kind}")
        if mask.shape not in (shape, shape[1:]):
            raise ValueError(f"the mask of layer {name!r} has shape {mask.shape}; allowed: {shape} or {shape[1:]}")
        if mask.ndim == 1 and not mask.all() and not _removable(stages[name]):
            raise ValueError(f"neurons of layer {name!r} cannot be removed: their activation is not 0 at 0, or mixed")
        masked = 2 if mask.ndim == 1 else 1  # the bias goes with its unit
        weights[name][:masked] = [ops.where(mask, ops.convert_to_tensor(w), 0) for w in weights[name][:masked]]
    return _rebuild(network, weights)


def _rebuild(network: Model, weights: Mapping[str, list]) -> Model:
    """Return a copy of the network whose Dense layers have these kernels and biases, and as many units."""
    originals, start = _layers_in_order(network), network.inputs[0]
    start = keras.Input(batch_shape=start.shape, dtype=start.dtype, name=start.name)
    layers = [_again(layer, weights.get(layer.name)) for layer in originals]
    if isinstance(network, keras.Sequential):
        copy = keras.Sequential([start, *layers], name=network.name)
    else:
        end = start
        for layer in layers:
            end = layer(end)
        ends = keras.tree.map_structure(lambda _: end, network._outputs_struct)
        copy = Model(keras.tree.map_structure(lambda _: start, network._inputs_struct), ends, name=network.name)
    copy.__class__ = type(network)
    for layer, original in zip(layers, originals, strict=True):
        if isinstance(layer, Dense):
            layer.kernel_initializer, layer.bias_initializer = original.kernel_initializer, original.bias_initializer
    return copy


def _again(layer: keras.layers.Layer, weights: list | None) -> keras.layers.Layer:
    """Return an unbuilt layer that starts with these weights; other settings from attributes, which hold functions."""
    kinds = type(layer).__mro__[: type(layer).__mro__.index(keras.layers.Layer)]
    specs = [inspect.getfullargspec(kind.__init__) for kind in kinds]
    settings = {"name": layer.name, "dtype": layer.dtype_policy, "trainable": layer.trainable}
    try:
        settings |= {name: getattr(layer, name) for spec in specs for name in (*spec.args[1:], *spec.kwonlyargs)}
    except AttributeError as error:
        raise TypeError(f"layer {layer.name!r} must keep what it is made with as attributes: {error}") from error
    if weights:
        kernel, *bias = (lambda shape, dtype=None, w=w: ops.copy(ops.convert_to_tensor(w, dtype)) for w in weights)
        settings |= {"units": weights[0].shape[1], "kernel_initializer": kernel}
        settings |= {"bias_initializer": bias[0]} if bias else {}
    return type(layer)(**settings)


def prune_weights(network: Model, sparsity: float, criterion: str = "magnitude", scope: str = "layer", **data) -> Model:
    """Return a copy of the network with the lowest-scoring `sparsity` of its weights set to zero.

    The output layer and all biases stay. See `weight_scores` for criterion and data (x, y, seed), `keep_masks` for
    sparsity, scope and exact counts; both say what they raise.
    """
    return apply_masks(network, keep_masks(weight_scores(network, criterion, **data), sparsity, scope))


def prune_neurons(network: Model, sparsity: float, criterion: str = "norm", scope: str = "layer", **data) -> Model:
    """Return a copy of the network in which the lowest-scoring `sparsity` of its hidden units output exactly 0.

    Kernel columns and biases become zero; `shrink` then removes them. See `neuron_scores` for criterion and data (x, y,
    seed), `keep_masks` for sparsity, scope and exact counts, `apply_masks` for what cannot be removed.
    """
    return apply_masks(network, keep_masks(neuron_scores(network, criterion, **data), sparsity, scope))


# --- Shrinking and cost -------------------------------------------------------------------------------------------


def shrink(network: Model) -> Model:
    """Return a physically smaller network with the same outputs, without the units that cannot influence them.

    Such a unit has no non-zero path from any input or bias, or none to the output. A hidden layer keeps one at least.
    """
    return _rebuild(network, _live_weights(_take_apart(network, check=True)))


def outputs(network: Model, x: np.ndarray) -> np.ndarray:
    """Return the outputs for images `x` (n, ...) as a NumPy array: those of `shrink(network)`, without building it.

    In float32 at least, for measuring many networks. Raises what `prunable_layers` and, for images, `neuron_scores` do.
    """
    chain, x, parts = _take_apart(network, check=True), _images(network, x), []
    weights = [[_wide(weight) for weight in own] for own in _live_weights(chain).values()]
    for batch in _batches(x):
        signal = chain.start(x[batch])
        for stage, own in zip(chain.stages, weights, strict=True):
            signal = stage.act(stage.sums(signal, own))
        parts.append(ops.convert_to_numpy(signal))
    return np.concatenate(parts)


def _live_units(chain: _Chain) -> list[np.ndarray]:
    """Return boolean arrays, for the inputs and then for each Dense layer: which units lie on a path that matters.

    All units stay where they cannot be removed one by one: of a softmax, for one, each acts on all others.
    """
    weights = [stage.weights() for stage in chain.stages]
    needed = [not _removable(stage) for stage in chain.stages[:-1]] + [True]
    edges, live = [kernel != 0 for kernel, *_ in weights], [np.ones(len(weights[0][0]), bool)]
    for edge, (_, *bias), all_of_it in zip(edges, weights, needed, strict=True):
        live.append(edge[live[-1]].any(axis=0) | (bias[0] != 0 if bias else False) | all_of_it)
    for number in range(len(edges) - 1, 0, -1):
        live[number] &= edges[number][:, live[number + 1]].any(axis=1) | needed[number - 1]
    return live


def _live_weights(chain: _Chain) -> dict[str, list]:
    (rows, *live), weights = map(np.flatnonzero, _live_units(chain)), {}
    for stage, columns in zip(chain.stages, live, strict=True):
        kernel, *bias = stage.layer.weights
        columns = columns if columns.size else np.array([0])
        if (rows.size, columns.size) != tuple(kernel.shape):
            kernel = ops.convert_to_numpy(kernel)[np.ix_(rows, columns)]
            bias = [ops.convert_to_numpy(each)[columns] for each in bias]
        weights[stage.layer.name], rows = [kernel, *bias], columns
    return weights


def cost(network: Model) -> dict:
    """Return what is left of a network and what it costs.

    weights_left: non-zero kernel entries of the prunable layers that can still influence the output; units_left: layer
    name -> units that can; multiply_adds: per image (an open length counts as one), and bytes: of the shrunk network.
    """
    chain = _take_apart(network, check=True)
    live, left, units, multiply_adds, size = _live_units(chain), 0, {}, 0, 0
    for stage, rows, columns in zip(chain.stages, live, live[1:], strict=False):
        kernel, *bias = stage.weights()
        width = max(1, np.count_nonzero(columns))
        entries = max(1, np.count_nonzero(rows)) * width
        multiply_adds += entries * math.prod(count or 1 for count in stage.shape[1:-1])
        size += (entries + len(bias) * width) * kernel.itemsize
        if stage is not chain.stages[-1]:
            left += np.count_nonzero((kernel != 0) & rows[:, None] & columns)
            units[stage.layer.name] = int(np.count_nonzero(columns))
    return {"weights_left": int(left), "units_left": units, "multiply_adds": int(multiply_adds), "bytes": int(size)}


# --- Repair -------------------------------------------------------------------------------------------------------


def repair(pruned: Model, dense: Model, x: Array, ridge: float = 1e-3, batch_size: int = BATCH_SIZE) -> Model:
    """Return a copy of `pruned` whose remaining weights are refitted so that it computes again what `dense` computed.

    Layer by layer from the input, the weights that are left, and the biases of units that are left, become those that
    bring the layer's pre-activations on the images `x` (n, ...), computed from the layers repaired so far, closest to
    those of `dense` in least squares. What was pruned stays zero: entries that are zero in `pruned` and not in `dense`,
    and, in a layer that lost single weights, all zeros. The output layer is refitted too: nothing of it was pruned, but
    its inputs have changed. No labels, no gradients; a few thousand training images are enough.

    ridge: how strongly weights are held to the pruned ones, as a fraction of the energy that the mean input sends on,
    in (0, 1e12]. Dead or duplicated inputs and few images do no harm: what images do not determine stays as it was.
    Neurons share their inputs, and all units of a layer are solved for at once. For single weights every unit has its
    own problem: up to 256 weights are solved for directly, more by conjugate gradients, side by side, until 0.1 % of
    each right-hand side is left (what 300 steps do not reach, directly). batch_size: images per pass; it bounds memory.

    `pruned` comes from `dense` by pruning; repair first, `shrink` afterwards. Raises `ValueError` for networks of other
    layers or activations, exchanged arguments, or a ridge or batch size out of range, and what `outputs` raises.
    """
    ours, theirs, x = _take_apart(pruned, check=True), _take_apart(dense, check=True), _images(pruned, x)
    _check_pair(ours, theirs, x[:3])
    return _repair_layers(ours, theirs, x, ridge, batch_size, range(len(ours.stages)))


def prune_and_repair(network: Model, sparsity: float | Mapping[str, float], x: Array, kind: str = "weights",
                     ridge: float = 1e-3, batch_size: int = BATCH_SIZE) -> Model:  # fmt: skip
    """Return a copy of the network, pruned by "reconstruction" and repaired layer by layer: choose, refit, go on.

    `kind` is "weights" or "neurons". What a layer keeps is chosen when those before it are pruned and repaired, from
    the inputs it has by then; weights are chosen for this one sparsity, by ADMM (ALPS, Meng et al. 2024), neurons as
    `neuron_scores` has it. (`prune_weights` chooses in all layers of the dense network, and one score serves all
    sparsities.) In the study this pays for weights, by more the more of them go, and not for neurons. Weights that are
    0 in the dense network go first. Of two inputs that are always equal ADMM keeps both or neither. Arguments and
    errors are those of `keep_masks` and `repair`.
    """
    _choice("kind", kind, ("weights", "neurons"))
    theirs, x, pruned = _take_apart(network, check=True), _images(network, x), network
    shapes = {stage.layer.name: stage.layer.kernel.shape[kind == "neurons" :] for stage in theirs.stages[:-1]}
    kept = keep_masks({name: np.zeros(shape) for name, shape in shapes.items()}, sparsity)
    for number, (name, mask) in enumerate(kept.items()):
        share, this = 1 - np.mean(mask), range(number, number + 1)
        if kind == "neurons":
            (problem,) = _neuron_problems(pruned, x, this)
            scores = _error_before_each(*problem)
        else:
            (problem,) = _weight_problems(pruned, x, this)
            scores = _best_together(*problem, share) * (theirs.stages[number].weights()[0] != 0)
        ours = _take_apart(apply_masks(pruned, keep_masks({name: scores}, share)))
        # This layer, and the one or two after it whose kernels the next choice looks at.
        pruned = _repair_layers(ours, theirs, x, ridge, batch_size, range(number, number + 2 + (kind == "neurons")))
    return pruned


def _repair_layers(ours: _Chain, theirs: _Chain, x: np.ndarray, ridge: float, batch_size: int, layers: range) -> Model:
    if isinstance(ridge, bool) or not (isinstance(ridge, numbers.Real) and 0 < ridge <= 1e12):
        raise ValueError(f"ridge must be a positive number up to 1e12, such as 1e-3; got {ridge!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive number of images, got {batch_size!r}")
    batches, fitted, known = _batches(x, batch_size), [], None

    def arriving(number: int) -> Iterable[tuple]:  # what a layer receives in both networks, batch by batch, not kept
        if number == 0:
            return ((ours.start(x[batch]), theirs.start(x[batch])) for batch in batches)
        stage, whole, pairs = ours.stages[number - 1], theirs.stages[number - 1], known or arriving(number - 1)
        return ((stage.act(stage.sums(a, fitted[number - 1])), whole.act(whole.sums(b))) for a, b in pairs)

    for number, (stage, whole) in enumerate(zip(ours.stages, theirs.stages, strict=True)):
        pairs = arriving(number)
        if len(batches) == 1 and number <= max(layers):  # there is memory for one
            pairs = known = list(pairs)
        fitted.append(_refit(stage, whole, pairs, float(ridge)) if number in layers else stage.weights())
    weights = {stage.layer.name: weights for stage, weights in zip(ours.stages, fitted, strict=True)}
    return _rebuild(ours.network, weights)


def _check_pair(ours: _Chain, theirs: _Chain, images: np.ndarray) -> None:
    kinds = [[f"{type(layer).__name__}{[tuple(weight.shape) for weight in layer.weights[:1]]}"
              for layer in _layers_in_order(chain.network)] for chain in (ours, theirs)]  # fmt: skip
    if kinds[0] != kinds[1]:
        raise ValueError(f"pruned and dense must have the same layers, got {kinds[0]} and {kinds[1]}; shrink later")
    pairs = [(ours.start(images), theirs.start(images))]
    pairs += [(a.act(_probe(a)), b.act(_probe(a))) for a, b in zip(ours.stages, theirs.stages, strict=True)]
    if not all(np.allclose(*map(ops.convert_to_numpy, pair), atol=1e-6) for pair in pairs):
        raise ValueError("pruned and dense must have the same activations; theirs turn the same numbers into others")
    zeros = [[stage.weights()[0] == 0 for stage in chain.stages] for chain in (ours, theirs)]
    lost, gained = (any((a & ~b).any() for a, b in zip(*pair, strict=True)) for pair in (zeros, zeros[::-1]))
    if gained and not lost:
        raise ValueError("dense has zeros that pruned does not have: exchange the arguments, repair(pruned, dense, x)")


def _refit(stage: _Stage, whole: _Stage, pairs: Iterable[tuple], ridge: float) -> list[np.ndarray]:
    """Return weights that map the first of each pair of inputs closest to what `whole` makes of the second."""
    own, inputs = stage.weights(), stage.layer.kernel.shape[0]
    weights, target = (np.vstack(each.weights()).astype(np.float64) for each in (stage, whole))
    alive = weights != 0
    units = alive.any(axis=0)
    if not (~alive & (target != 0))[:inputs, units].any():  # only whole units went: other zeros are the layer's own
        alive[:inputs, units] = True
    alive[inputs:] = units  # the bias is the weight of one more input, which is always 1
    exact = (alive[:, units] == alive[:, units][:, :1]).all()
    gram, cross, most = np.zeros((len(weights), len(weights))), np.zeros(weights.shape), 0.0
    for signal, wanted in pairs:
        wanted = _rows(whole.sums(wanted))
        missing, signal = wanted - _rows(stage.sums(signal)), _rows(signal)
        signal, powers = _near_one(ops.concatenate([signal, ops.ones_like(signal[:, : len(own) - 1])], axis=1))
        used = np.flatnonzero(ops.convert_to_numpy(ops.any(signal != 0, axis=0)))  # removed units send nothing
        signal, powers = ops.take(signal, used, axis=1), powers[used]
        most = np.maximum(most, [ops.convert_to_numpy(ops.max(ops.abs(each), axis=0)) for each in (missing, wanted)])
        if exact:  # in float64, because duplicated inputs leave only the ridge to divide by
            signal, missing = (ops.convert_to_numpy(each).astype(np.float64) for each in (signal, missing))
            squares, mixed = signal.T @ signal, signal.T @ missing
        else:
            both = (ops.matmul(ops.transpose(signal), each) for each in (signal, missing))
            squares, mixed = map(ops.convert_to_numpy, both)
        gram[np.ix_(used, used)] += np.outer(powers, powers) * squares
        cross[used] += powers[:, None] * mixed
    # What holds an input is the share of its outputs' energy that the mean input sends: scales of inputs and outputs
    # cancel out. The bias is held by its own energy.
    energy, squares = gram.diagonal(), target[:inputs] ** 2
    sent = squares @ (1 / np.maximum(energy[:inputs] @ squares, 1e-300)) * (energy[:inputs] > 0)
    strength = energy.copy()
    strength[:inputs][sent > 0] = np.mean((energy[:inputs] * sent)[sent > 0]) / sent[sent > 0] if sent.any() else 0
    rows = np.flatnonzero((energy > 0) & alive.any(axis=1))
    columns = np.flatnonzero(units & (most[0] > 1e-5 * most[1]))  # what is missing is more than rounding
    if rows.size and columns.size:
        place = np.ix_(rows, columns)
        gram = gram[np.ix_(rows, rows)] + np.diag(ridge * strength[rows])
        scale = np.sqrt(gram.diagonal())[:, None]
        gram, cross = gram / (scale * scale.T), cross[place] / scale
        gram[np.diag_indices_from(gram)] += 4 * np.finfo(float).eps * len(gram)
        if exact:
            change = scipy.linalg.solve(gram, cross, assume_a="pos")
        else:
            change = _solve_within(gram, cross * alive[place], alive[place])
        weights[place] += change / scale
    return [part.astype(old.dtype) for part, old in zip((weights[:inputs], weights[-1]), own, strict=False)]


def _solve_within(gram: np.ndarray, cross: np.ndarray, alive: np.ndarray, few: int = 256) -> np.ndarray:
    """Solve gram · u = cross for all columns, each within its own `alive` rows.

    Directly in columns with `few` rows, and in those that conjugate gradients do not reach.
    """
    found, direct, many = np.zeros(cross.shape), alive.copy(), np.flatnonzero(alive.sum(axis=0) > few)
    if many.size:
        found[:, many], reached = _conjugate_gradients(gram, cross[:, many], alive[:, many])
        direct[:, many[reached]] = False
    for columns, rows, own, parts in _column_by_column(gram, direct):
        place = rows, columns[:, None]
        found[place] = np.linalg.solve(parts, (cross[place] * own)[:, :, None])[:, :, 0]
    harm = np.sum(found * (gram @ found - 2 * cross), axis=0) > 0  # further from dense than before
    return np.where(harm, 0.0, found)


def _conjugate_gradients(gram, cross, alive, share: float = 1e-3, limit: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Solve gram · u = cross for all columns, each within its own `alive` rows (Hestenes, Stiefel 1952).

    Stops when `share` of each right-hand side is left, or at the `limit`. Returns u, and which columns came so far.
    """
    most = np.abs(cross).max(axis=0)
    scale = np.where(most > 0, most, 1.0)
    squares, wanted, own = (ops.convert_to_tensor(array, "float32") for array in (gram, cross / scale, alive))
    solution, residual, direction, power = ops.zeros_like(wanted), wanted, wanted, ops.sum(ops.square(wanted), axis=0)
    enough = share**2 * power
    for step in range(limit):
        if step % 8 == 0 and not bool(ops.any(power > enough)):  # not in every step: it waits for the device
            break
        image = ops.matmul(squares, direction) * own
        curvature = ops.sum(direction * image, axis=0)
        going = ops.logical_and(power > enough, curvature > 0)  # not positive: rounding has taken over
        length = ops.where(going, ops.divide_no_nan(power, curvature), 0.0)
        solution, residual = solution + length * direction, residual - length * image
        power, previous = ops.where(going, ops.sum(ops.square(residual), axis=0), power), power
        direction = ops.where(going, residual + ops.divide_no_nan(power, previous) * direction, 0.0)
    return ops.convert_to_numpy(solution) * scale, ops.convert_to_numpy(power <= enough)
