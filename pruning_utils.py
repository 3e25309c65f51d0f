"""Prune, repair and shrink Keras 3 networks: single weights or whole units.

What changes a network returns a new one, of the same class and not compiled, and leaves its arguments alone. Any
network that is a graph of layers will do, `Sequential` or functional: branches, sums, nested and shared layers. A unit
is one output channel of a kernel (…, inputs, units): a neuron, a filter, a head of attention; what a sum ties is one
unit. A mask is boolean, True = kept; a score is higher for what should be kept; sparsity is a fraction in [0, 1].

    >>> layers = [keras.layers.Dense(30, "relu", name="hidden"), keras.layers.Dense(10)]
    >>> network = keras.Sequential([keras.Input((16,)), *layers])
    >>> cost(shrink(prune_neurons(network, sparsity=0.5)))["units_left"]
    {'hidden': 15}
"""

import contextlib
import inspect
import itertools
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import keras
import numpy as np
import scipy.linalg
import scipy.sparse
from keras import KerasTensor, Model, ops, tree
from keras.layers import Lambda, Layer, TimeDistributed

BATCH_SIZE = 4096  # images per forward pass, at most;
SIGNALS = 2**27  # fewer where all tensors of the network together would hold more numbers than this
ROWS = 2**14  # positions per forward pass that least squares look at, of layers that have several per image
Array = np.ndarray | None
Arrays = dict[str, np.ndarray]  # name -> scores or mask

# --- The channels of a network ------------------------------------------------------------------------------------
#
# Every channel has a number. Arrays of numbers, of the shape of one example's tensor, are sent through the network; its
# layers cannot tell them from images. 0 is a channel that stays; below 0 is one that is not 0 everywhere when its unit
# is removed (after a sigmoid, say). Numbers that a sum ties are one unit, and so are all that depend on each other.


class _Kernel(NamedTuple):
    """A kernel, and the numbers of the channels that it takes and makes."""

    name: str
    layer: Layer
    weight: keras.Variable
    bias: keras.Variable | None
    form: str  # "dense", "convolution", "transposed" or "depthwise"
    inputs: np.ndarray
    units: np.ndarray

    def weights(self) -> list:
        return [weight for weight in (self.weight, self.bias) if weight is not None]

    def taps(self) -> np.ndarray:
        """Return the kernel as an array (taps, inputs, units); depthwise (taps, units)."""
        weight = ops.convert_to_numpy(_wide(self.weight))
        if self.form == "transposed":
            return weight.reshape(-1, len(self.units), len(self.inputs)).swapaxes(1, 2)
        return weight.reshape(-1, *([] if self.form == "depthwise" else [len(self.inputs)]), len(self.units))

    def matrix(self) -> np.ndarray:
        """Return the kernel as the matrix by which what `_rows` returns is multiplied."""
        weight = ops.convert_to_numpy(_wide(self.weight))
        if self.form == "transposed":
            weight = np.moveaxis(weight, -1, 0)
            return weight.reshape(len(weight), -1)
        return weight.reshape(-1, len(self.units))

    def tensor(self, matrix: np.ndarray) -> np.ndarray:
        """Return such a matrix in the shape of the kernel."""
        shape = tuple(self.weight.shape)
        if self.form == "transposed":
            return np.moveaxis(matrix.reshape(shape[-1], *shape[:-1]), 0, -1)
        return matrix.reshape(shape)

    def per_column(self, values: np.ndarray) -> np.ndarray:
        """Return what there is per unit for every column of the matrix."""
        return np.tile(values, math.prod(self.weight.shape[:-2])) if self.form == "transposed" else values


class _Link(NamedTuple):
    """Which channels others are computed from, one by one or by a kernel.

    edges() is an array (taps, sources, targets) of a kernel, or (…, targets); constant() says which targets are not 0
    even if all sources are.
    """

    sources: list[np.ndarray]
    targets: np.ndarray
    kernel: bool = False
    edges: Callable = lambda: np.ones(1)
    constant: Callable = lambda: False


class _Slice(NamedTuple):
    """Along an axis, a weight has an entry per channel; it is zeroed with the unit, or only cut off."""

    weight: keras.Variable
    axis: int
    numbers: np.ndarray
    zeroed: bool


class _Call(NamedTuple):
    """An operation of the graph, what it is called with, and the numbers that arrive and their shapes."""

    operation: keras.Operation
    args: tuple
    kwargs: dict
    tensors: list[KerasTensor]
    ends: list[KerasTensor]

    @property
    def inputs(self) -> list[np.ndarray]:
        return [tensor.numbers for tensor in self.tensors]

    @property
    def shape(self) -> tuple:
        return _shape(self.ends[0])


class _Graph:
    """A network and its channels: which weights make them, take them, and which are one unit."""

    def __init__(self, network: Model, check: bool = False):
        _check_network(network, check)
        self.network, self.paths, self.steps, self.count, self.signals = network, dict(_paths(network)), [], 1, 0
        self.ties, self.seen, self.slices, self.links, self.makers = [np.zeros((2, 1), int)], {}, [], [], {}
        self.kernels, self.calls, self.positions, self.called, self.sizes, self.acts = {}, {}, {}, {}, {}, []
        self.unknown, self.reasons, self.after, self.beside, self.repeated = [], [], {}, {}, False
        starts = [KerasTensor(tensor.shape, tensor.dtype) for tensor in network.inputs]
        for start in starts:
            self._label(start, np.zeros(1, int))
        ends = tree.flatten(_walk(network, starts, self._send, self._enter))
        for end in ends:
            end.uses += 1
        self.ends = np.unique(np.abs(np.concatenate([_thin(end.numbers).ravel() for end in ends])))
        self.stay(self.ends)
        found = self._tied(np.concatenate(self.ties, axis=1))
        self.unit = np.where(found == found[0], 0, found + 1)  # of each number
        self.entries, taken = {}, {0}  # name -> units, under the first layer that makes them
        for name, (made, *_) in self.makers.items():
            if own := [unit for unit in dict.fromkeys(self.unit[made].tolist()) if unit not in taken]:
                self.entries[name] = np.array(own)
                taken.update(own)
        last = np.zeros(self.count, bool)  # what reaches an output without another kernel
        last[self.ends] = True
        for link in reversed([link for link in self.links if not link.kernel]):
            for source in link.sources:
                np.logical_or.at(last, source, last[link.targets])
        self.last = [kernel for kernel in self.kernels.values() if last[kernel.units].any()]
        self.hidden = [kernel for kernel in self.kernels.values() if not last[kernel.units].any()]
        once = {name for name, count in self.called.items() if count == 1}
        self.after = {name: layer for name, (layer, sums) in self.after.items() if name in once and sums.uses == 1}
        self.beside = {name: steps for name, (steps, *path) in self.beside.items()
                       if name in once and all(tensor.uses == 1 for tensor in path)}  # fmt: skip
        self.batch_size = max(1, min(BATCH_SIZE, SIGNALS // self.signals))

    def _tied(self, pairs: np.ndarray) -> np.ndarray:
        tied = scipy.sparse.coo_array((np.ones(pairs.shape[1], bool), pairs), shape=(self.count,) * 2)
        return scipy.sparse.csgraph.connected_components(tied, directed=False)[1]

    def _send(self, operation, *args, **kwargs):
        result = operation.compute_output_spec(*args, **kwargs)
        tensors = [each for each in tree.flatten((args, kwargs)) if isinstance(each, KerasTensor)]
        call, rule = _Call(operation, args, kwargs, tensors, tree.flatten(result)), _rule(operation)
        self.steps.append(operation)
        _check_layer(operation)
        found = rule(self, call) if rule else None
        for tensor in tensors:
            tensor.uses += 1
        for end, each in zip(call.ends, tree.flatten(self._keep(call) if found is None else found), strict=True):
            self._label(end, each)
        return result

    def _label(self, tensor: KerasTensor, found: np.ndarray) -> None:
        tensor.numbers, tensor.step, tensor.uses = np.broadcast_to(found, _shape(tensor)), len(self.steps), 0
        self.signals += tensor.numbers.size

    def _enter(self, network: Model, starts: list[KerasTensor]) -> None:
        for number, start in enumerate(starts):
            self.resize(network, number, start.numbers)

    def _keep(self, call: _Call) -> list[np.ndarray]:
        """Keep all channels of an operation without a rule, or that its rule does not fit."""
        operation, own = call.operation, self.new(1)
        received = np.concatenate([[0], *(_thin(each).ravel() for each in call.inputs)])
        weights = getattr(operation, "variables", [])
        if weights or received.any():
            self.unknown.append(f"{operation.name!r} ({type(operation).__name__})")
        self.stay(received, f"{operation.name!r} ({type(operation).__name__}) has no rule")
        return [self.lead(received, own, bool(weights)) for _ in call.ends]

    # What rules are written with. They take the graph and a call; they return numbers, or None if they do not fit.

    def new(self, count: int) -> np.ndarray:
        self.count += count
        return np.arange(self.count - count, self.count)

    def tie(self, some: np.ndarray, others: np.ndarray) -> None:
        self.ties.append(np.abs(np.stack(np.broadcast_arrays(some, others))).reshape(2, -1))

    def stay(self, some: np.ndarray, why: str = "") -> None:
        """Let channels stay, and all that are tied to them."""
        self.tie(some, 0)
        if why and np.any(some):
            self.reasons.append((np.abs(some).ravel(), why))

    def lead(self, some: np.ndarray, own: np.ndarray, kernel: bool = False) -> np.ndarray:
        """Let a channel stay that is computed from all of some others."""
        self.stay(own)
        self.links.append(_Link([np.abs(some).ravel()], own, kernel, lambda: np.ones((1, np.size(some), 1))))
        return own

    def same(self, place: object, some: np.ndarray) -> np.ndarray:
        """Tie what the calls of one layer meet in the same place; return what the first one met."""
        known = self.seen.setdefault(place, some)
        if known is not some:
            self.repeated = True
            self.join(some, known) if known.shape == some.shape else (self.stay(known), self.stay(some))
        return known

    def join(self, some: np.ndarray, known: np.ndarray) -> None:
        """Tie channels, some of which are met under the numbers of others."""
        self.tie(some, known)
        some, known = (np.abs(each).ravel() for each in np.broadcast_arrays(some, known))
        other = some != known
        if other.any():
            self.links.append(_Link([some[other]], known[other]))

    def along(self, found: np.ndarray, axis: int) -> np.ndarray:
        """Return the numbers along an axis; if they differ along another one, they stay."""
        thin, axis = _thin(found), axis % found.ndim
        if any(size > 1 and place != axis for place, size in enumerate(thin.shape)):
            self.stay(thin, "a layer takes another axis for that of the units")
            return np.broadcast_to(self.lead(thin, self.new(1)), found.shape[axis])
        return np.broadcast_to(thin.ravel(), found.shape[axis])

    def boxed(self, found: np.ndarray) -> np.ndarray:
        """Tie numbers until they differ along one axis only: what is left of a tensor must be a box."""
        thin = _thin(found)
        if sum(size > 1 for size in thin.shape) > 1:
            last = max(place for place, size in enumerate(thin.shape) if size > 1)
            others = tuple(place for place in range(thin.ndim) if place != last)
            self.join(thin, np.abs(thin).max(axis=others, keepdims=True))
            thin = np.abs(thin).max(axis=others, keepdims=True) * np.where((thin < 0).any(others, keepdims=True), -1, 1)
        return np.broadcast_to(thin, found.shape)

    def follow(self, *sources: np.ndarray, silent: object = True, together: bool = True, untied=(), **link):
        """Return new numbers for channels that are computed from others one by one, and are one unit with them.

        together: they are 0 where any of the sources is, not only where all are; untied: sources that stay.
        """
        targets = np.where(np.any(sources, axis=0), self.new(len(sources[0])), 0)
        sources = [np.abs(source) for source in sources]
        for source in sources:
            self.tie(source, targets)
        sources += [np.broadcast_to(np.abs(each).ravel(), targets.shape) for each in untied]
        self.links += [_Link(each, targets, **link) for each in ([sources] if together else [[one] for one in sources])]
        return np.where(silent, targets, -targets)

    def resize(self, operation, setting: object, found: np.ndarray) -> None:
        """Note that a setting of an operation is the length of a vector of numbers, or the shape of an array."""
        self.same((id(operation), setting), _thin(found).ravel())
        self.sizes.setdefault(id(operation), {})[setting] = found

    def cut(self, weight: keras.Variable, axis: int, found: np.ndarray, zeroed: bool = True) -> np.ndarray:
        """Note that a weight has an entry per channel along an axis; return the numbers that it has there."""
        if (id(weight), axis) not in self.seen:
            self.slices.append(_Slice(weight, axis, np.abs(found), zeroed))
        return self.same((id(weight), axis), found)

    def make(self, call: _Call, layer: Layer, setting: str, weight, axis: int, bias=None, part: str = "") -> np.ndarray:
        """Return the numbers that a layer makes: along an axis of its kernel, as many as one of its settings says."""
        made = self.cut(weight, axis, self.new(weight.shape[axis]))
        if bias is not None:
            self.cut(bias, 0, made)
        self.makers[self.paths[id(call.operation)] + part] = made, weight, axis
        self.resize(layer, setting, made)
        return made

    def kernel(self, call: _Call, layer, weight, bias, form: str, inputs, units, positions=0, part: str = "") -> None:
        """Note that a layer takes channels by a kernel, at so many positions, and makes others of them."""
        _check_layer(layer)
        self.stay(inputs[inputs < 0], f"{layer.name!r} receives from it what is not 0 without it")
        name = self.paths[id(call.operation)] + part
        known = self.kernels.setdefault(name, _Kernel(name, layer, weight, bias, form, np.abs(inputs), units))
        if known not in (own := self.calls.setdefault(id(call.operation), [])):
            own.append(known)
        self.positions[name], self.called[name] = self.positions.get(name, 0) + positions, self.called.get(name, 0) + 1
        constant = (lambda: ops.convert_to_numpy(bias).ravel() != 0) if bias is not None else (lambda: False)
        self.links.append(_Link([np.abs(inputs)], known.units, True, known.taps, constant))

    def act(self, function: Callable, found: np.ndarray, name: str) -> np.ndarray:
        """Send numbers through a function that may change every channel, but none by another."""
        thin = _thin(found)
        places = [place for place, size in enumerate(thin.shape) if size > 1]
        axis = places[0] if places else found.ndim - 1
        shape = (3, *(size if place == axis else min(size, 2) for place, size in enumerate(found.shape)))
        self.acts.append((function, shape))
        if not thin.any() or function in (keras.activations.relu, keras.activations.linear):
            return found
        signal = ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape), "float32")
        received, silent = ops.convert_to_numpy(function(signal)), True
        vector = np.arange(found.shape[axis]).reshape(-1, *[1] * (found.ndim - axis - 1))
        for gone in (vector % 2 == 0, vector % 2 == 1) if places else (vector >= 0,):
            got = ops.convert_to_numpy(function(ops.where(gone, 0.0, signal)))
            gone = np.broadcast_to(gone, got.shape)
            if not np.array_equal(got[~gone], received[~gone]):
                self.stay(thin, f"{name!r} mixes units")
                return found
            silent &= not got[gone].any()
        if silent:
            return found
        targets = self.follow(thin.ravel(), silent=False, constant=lambda: True).reshape(thin.shape)
        return np.broadcast_to(targets, found.shape)


def _walk(network: Model, inputs: list, apply: Callable, enter: Callable = lambda network, inputs: None):
    """Send values through a network and those nested in it: apply(operation, …) once for every call, in order."""

    def visit(operation):
        if not _is_graph(operation):
            return lambda *args, **kwargs: apply(operation, *args, **kwargs)
        return lambda inputs, **_: _walk(operation, tree.flatten(inputs), apply, enter)

    enter(network, inputs)
    return _through(network, inputs, visit)


def _through(network: Model, inputs: list, visit: Callable):
    """Call visit(operation) with what arrives there, for every call of an operation, in order.

    Keras' own walk does it. It is private: an error here says that your Keras is not one that was tested.
    """
    function = keras.Function(network.inputs, network.outputs) if isinstance(network, keras.Sequential) else network
    return function._run_through_graph(inputs, operation_fn=visit)


def _is_graph(thing) -> bool:
    graph = isinstance(thing, keras.Sequential) or (isinstance(thing, Model) and hasattr(thing, "_run_through_graph"))
    return graph and type(thing).call.__module__.startswith("keras.")


def _paths(network: Model, before: str = "") -> Iterable[tuple[int, str]]:
    for layer in network.layers:
        yield id(layer), before + layer.name
        if _is_graph(layer):
            yield from _paths(layer, f"{before}{layer.name}/")


def _shape(tensor: KerasTensor) -> tuple:
    return tuple(size or 1 for size in tensor.shape[1:])  # an open length counts as one


def _thin(found: np.ndarray) -> np.ndarray:
    """Return an array of numbers with length 1 along axes where they do not differ: images have many positions."""
    found = found[tuple(slice(None if stride else 1) for stride in found.strides)]
    for axis in range(found.ndim):
        first = found[(slice(None),) * axis + (slice(1),)]
        found = first if (found == first).all() else found
    return found


def _wide(array):
    """Return a tensor in float32, or as it is if it is wider: half precision cannot add up a thousand squares."""
    array = ops.convert_to_tensor(array)
    return ops.cast(array, keras.backend.result_type(array.dtype, "float32"))


# --- Rules --------------------------------------------------------------------------------------------------------


def _first(layer) -> bool:
    return getattr(layer, "data_format", None) == "channels_first"


def _spread(graph: _Graph, call: _Call, made: np.ndarray, layer=None) -> np.ndarray:
    """Place numbers along the axis of the channels, and send them through the layer's activation."""
    layer = layer or call.operation
    place = (-1, *[1] * (len(call.shape) - 1)) if _first(layer) else (-1,)
    found = np.broadcast_to(made.reshape(place), call.shape)
    activation, own = getattr(layer, "activation", None), graph.calls.get(id(call.operation))
    if own and own[-1].form != "transposed" and activation in (None, keras.activations.linear):
        call.ends[0].origin = own[-1], [call.ends[0]]  # the kernel whose sums these are
    return graph.act(activation, found, layer.name) if activation is not None else found


def _dense(graph: _Graph, call: _Call):
    layer = call.operation.layer if isinstance(call.operation, TimeDistributed) else call.operation
    if type(layer) is not keras.layers.Dense and type(layer) not in RULES:
        return None
    inputs = graph.cut(layer.kernel, 0, graph.along(call.inputs[0], -1), zeroed=False)
    units = graph.make(call, layer, "units", layer.kernel, 1, layer.bias)
    graph.kernel(call, layer, layer.kernel, layer.bias, "dense", inputs, units, math.prod(call.shape[:-1]))
    return _spread(graph, call, units, layer)


def _convolution(graph: _Graph, call: _Call):
    layer, transposed = call.operation, "Transpose" in type(call.operation).__name__
    if getattr(layer, "groups", 1) != 1:
        return None
    ins, outs = (layer.rank + 1, layer.rank) if transposed else (layer.rank, layer.rank + 1)
    inputs = graph.cut(layer.kernel, ins, graph.along(call.inputs[0], 0 if _first(layer) else -1), zeroed=False)
    units = graph.make(call, layer, "filters", layer.kernel, outs, layer.bias)
    places = math.prod(call.inputs[0].shape) // len(inputs) if transposed else math.prod(call.shape) // len(units)
    form = "transposed" if transposed else "convolution"
    graph.kernel(call, layer, layer.kernel, layer.bias, form, inputs, units, places)
    return _spread(graph, call, units)


def _depthwise(graph: _Graph, call: _Call, weight=None, part: str = ""):
    layer, separable = call.operation, weight is not None
    weight, bias = (weight, None) if separable else (layer.kernel, layer.bias)
    sources = graph.cut(weight, layer.rank, graph.along(call.inputs[0], 0 if _first(layer) else -1))
    sources = np.repeat(np.abs(sources), layer.depth_multiplier)
    units = graph.same(("units", id(weight)), np.where(sources > 0, graph.new(len(sources)), 0))
    graph.tie(sources, units)
    if bias is not None:
        graph.cut(bias, 0, units)
    places = math.prod(call.shape) // (layer.filters if separable else len(units))
    graph.kernel(call, layer, weight, bias, "depthwise", sources, units, places, part)
    return units if separable else _spread(graph, call, units)


def _separable(graph: _Graph, call: _Call):
    layer = call.operation
    between = _depthwise(graph, call, layer.depthwise_kernel, "/depthwise")
    inputs = graph.cut(layer.pointwise_kernel, layer.rank, between, zeroed=False)
    units = graph.make(call, layer, "filters", layer.pointwise_kernel, layer.rank + 1, layer.bias)
    places = math.prod(call.shape) // len(units)
    graph.kernel(call, layer, layer.pointwise_kernel, layer.bias, "dense", inputs, units, places, "/pointwise")
    return _spread(graph, call, units)


def _attention(graph: _Graph, call: _Call):
    """A head is a unit: its values are made, its queries and keys go with them."""
    layer, extra = call.operation, len(call.args) > 3 or call.kwargs.keys() - {"key"}
    masked = any(getattr(step, "mask_zero", False) or isinstance(step, keras.layers.Masking) for step in graph.steps)
    if extra or masked or getattr(layer, "_use_gate", False) or getattr(layer, "_sliding_window", None):
        return None
    query, value, *key = call.inputs
    heads = graph.make(call, layer, "num_heads", layer._value_dense.kernel, 1, layer._value_dense.bias)
    for part, found in {"query": query, "key": (key or [value])[0], "value": value}.items():
        dense = getattr(layer, f"_{part}_dense")
        graph.cut(dense.kernel, 1, heads)
        if dense.bias is not None:
            graph.cut(dense.bias, 0, heads)
        inputs, units = graph.along(found, -1), np.repeat(heads, dense.kernel.shape[2])
        inputs = graph.cut(dense.kernel, 0, inputs, zeroed=False)
        graph.kernel(call, dense, dense.kernel, dense.bias, "dense", inputs, units, _places(found), f"/{part}")
    dense = layer._output_dense
    inputs = np.repeat(graph.cut(dense.kernel, 0, heads, zeroed=False), dense.kernel.shape[1])
    units = graph.make(call, layer, "output_shape", dense.kernel, 2, dense.bias, "/output")
    graph.kernel(call, dense, dense.kernel, dense.bias, "dense", inputs, units, _places(query), "/output")
    return np.broadcast_to(units, call.shape)


def _places(found: np.ndarray) -> int:
    return math.prod(found.shape[:-1])


def _embedding(graph: _Graph, call: _Call):
    weight = call.operation.embeddings
    units = graph.make(call, call.operation, "output_dim", weight, 1)
    used = lambda: (ops.convert_to_numpy(weight) != 0).any(axis=0)  # noqa: E731
    graph.links.append(_Link([np.zeros(len(units), int)], units, True, lambda: np.zeros(1), used))
    return units


def _normalised(graph: _Graph, call: _Call):
    layer = call.operation
    sources = graph.along(call.inputs[0], layer.axis - (layer.axis > 0))
    weights = [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
    sources = sources if layer.scale else graph.cut(layer.moving_mean, 0, sources)

    def arrays():
        gamma, beta, mean, variance = (0.0 if each is None else ops.convert_to_numpy(_wide(each)) for each in weights)
        return (gamma if layer.scale else 1.0) / np.sqrt(variance + layer.epsilon), beta, mean

    def constant():
        scale, beta, mean = arrays()
        return (beta != 0) | (scale * mean != 0)

    units = graph.follow(sources, silent=layer.scale or sources > 0, edges=lambda: arrays()[0], constant=constant)
    for weight, zeroed in zip(weights, (True, True, not layer.scale, False), strict=True):
        if weight is not None:
            graph.cut(weight, 0, units, zeroed)
    if (origin := getattr(call.tensors[0], "origin", None)) and layer.center and len(origin[1]) == 1:
        graph.after[origin[0].name] = layer, call.tensors[0]
        call.ends[0].origin = origin[0], [*origin[1], call.ends[0]]
    place = [1] * len(call.shape)
    place[layer.axis - (layer.axis > 0)] = -1
    return np.broadcast_to(units.reshape(place), call.shape)


def _mixed(graph: _Graph, call: _Call):
    graph.stay(_thin(call.inputs[0]), f"{call.operation.name!r} ({type(call.operation).__name__}) mixes units")
    return call.inputs[0]


def _prelu(graph: _Graph, call: _Call):
    thin, alpha = _thin(call.inputs[0]), call.operation.alpha
    for axis in range(alpha.ndim):
        if alpha.shape[axis] > 1 and thin.shape[axis] > 1:
            graph.cut(alpha, axis, graph.along(call.inputs[0], axis), zeroed=False)
    return call.inputs[0]


def _pointwise(graph: _Graph, call: _Call):
    """Activations, noise, and whatever of Keras' functions of one tensor keeps its shape: they are tried out."""
    if len(call.tensors) != 1 or len(call.ends) != 1 or call.inputs[0].shape != call.shape or not call.args:
        return None
    if any(getattr(each, "ndim", 0) for each in tree.flatten((call.args, call.kwargs)) if each is not call.tensors[0]):
        graph.stay(_thin(call.inputs[0]), f"{call.operation.name!r} adds an array to it")
        return call.inputs[0]

    def function(signal):
        swap = lambda each: signal if each is call.tensors[0] else each  # noqa: E731
        args, kwargs = tree.map_structure(swap, (call.args, call.kwargs))
        return call.operation.call(*args, **kwargs)

    return graph.act(function, call.inputs[0], call.operation.name)


def _spatial(graph: _Graph, call: _Call):
    """Pooling, padding, cropping and the like: images get another size."""
    return _spread(graph, call, graph.along(call.inputs[0], 0 if _first(call.operation) else -1))


def _reduced(graph: _Graph, call: _Call):
    """Means, sums and extremes over positions."""
    rank, axes = call.inputs[0].ndim + 1, call.operation.axis
    axes = {axis % rank - 1 for axis in ([axes] if isinstance(axes, int) else axes or [0])}
    thin = _thin(call.inputs[0])
    if -1 in axes or any(thin.shape[axis] > 1 for axis in axes):
        return None
    keep = [size for axis, size in enumerate(thin.shape) if axis not in axes or call.operation.keepdims]
    return np.broadcast_to(thin.reshape(keep), call.shape)


def _moved(graph: _Graph, call: _Call):
    """Flatten, reshape, transpose, index: what they do to images, they do to numbers."""
    batch = call.tensors[0].shape[0] or 1

    def fill(each):
        if not isinstance(each, KerasTensor):
            return each
        return ops.convert_to_tensor(np.broadcast_to(each.numbers, (batch, *_shape(each))), "float32")

    args, kwargs = tree.map_structure(fill, (call.args, call.kwargs))
    try:
        found = ops.convert_to_numpy(call.operation.call(*args, **kwargs))
    except Exception:  # every backend has its own: what does not work on one image moves the axis of the images
        return None
    if found.shape != (batch, *call.shape):
        return None  # it moves the axis of the images
    found, (received,) = found[0].astype(int), call.inputs
    if type(call.operation).__name__ == "GetItem" and not np.array_equal(_thin(found).ravel(), _thin(received).ravel()):
        graph.stay(_thin(received), f"{call.operation.name!r} takes it by its place")
    found = graph.boxed(found)
    for setting in SHAPES & vars(call.operation).keys():
        graph.resize(call.operation, setting, found)
    return found


def _split(graph: _Graph, call: _Call):
    """Equal parts stay equal: a channel of the first is one unit with its like in the others."""
    (received,), sections = call.inputs, call.operation.indices_or_sections
    axis = call.operation.axis % (received.ndim + 1) - 1
    if axis < 0 or not isinstance(sections, int):
        return None
    parts = [graph.boxed(part) for part in np.split(received, sections, axis)]
    if _thin(received).shape[axis] > 1:
        for part in parts:
            graph.tie(_thin(part), _thin(parts[0]))
    return parts


def _concatenated(graph: _Graph, call: _Call):
    axis = call.operation.axis % (len(call.shape) + 1) - 1
    if len(call.tensors) != len(tree.flatten(call.args)) or axis < 0:
        return None
    thin, parts = [_thin(found) for found in call.inputs], []
    for each, found in zip(thin, call.inputs, strict=True):
        shape = np.max([other.shape for other in thin], axis=0)
        shape[axis] = found.shape[axis]
        parts.append(np.broadcast_to(each, shape))
    return graph.boxed(np.concatenate(parts, axis))


def _joined(graph: _Graph, call: _Call):
    """What is added, multiplied or compared channel by channel is one unit."""
    kind, shape, name = type(call.operation).__name__, call.shape, call.operation.name
    if len(call.tensors) == 1:
        return _pointwise(graph, call)
    thin = [_thin(found) for found in call.inputs]
    places = {place for each in thin for place, size in enumerate(each.shape) if size > 1} or {len(shape) - 1}
    constants = len(call.tensors) < len(tree.flatten(call.args))
    if constants or len(places) > 1 or any(found.ndim != len(shape) for found in call.inputs):
        return None
    (axis,), sources, silent, untied = places, [], [], []
    for each, found in zip(thin, call.inputs, strict=True):
        if found.shape[axis] < shape[axis] or (each.size == 1 and each.any() and found.shape != shape):
            graph.stay(each, f"{name!r} stretches it")
            untied.append(each)
            silent.append(np.zeros(shape[axis], bool))
        else:
            sources.append(np.broadcast_to(each.ravel(), shape[axis]))
            silent.append(sources[-1] > 0)
    product = kind == "Multiply"
    silent = np.any(silent, axis=0) if product else np.all(silent, axis=0)
    constant = lambda: bool(untied) and not product  # noqa: E731
    units = graph.follow(*sources, silent=silent, together=product, untied=untied, constant=constant)
    for tensor in call.tensors if kind == "Add" and not untied else []:
        if origin := getattr(tensor, "origin", None):
            others = [_made_at(other) for other in call.tensors if other is not tensor]
            if max(others)[0] < origin[1][0].step:
                graph.beside[origin[0].name] = others, *origin[1]
    return np.broadcast_to(units.reshape([-1 if place == axis else 1 for place in range(len(shape))]), shape)


def _made_at(tensor: KerasTensor) -> tuple[int, int]:
    """Return the step that makes a tensor, or sums and, the other, what a BatchNormalization makes of them; or 0."""
    _, path = getattr(tensor, "origin", (None, [tensor]))
    return path[0].step, path[-1].step if len(path) > 1 else 0


SHAPES = {"target_shape", "newshape"}  # settings that are shapes
# How channel numbers pass an operation, by the name of Keras' own class or one of its bases, or by a class of yours:
# RULES[MyDense] = RULES["Dense"]. Of a layer without a rule the channels stay, and `neuron_scores` warns; Keras' own
# functions of one tensor are tried out.
RULES: dict[str | type, Callable] = {
    "Dense": _dense, "TimeDistributed": _dense, "BaseConv": _convolution, "BaseConvTranspose": _convolution,
    "BaseDepthwiseConv": _depthwise, "BaseSeparableConv": _separable, "MultiHeadAttention": _attention,
    "Embedding": _embedding, "BatchNormalization": _normalised, "PReLU": _prelu,
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "RMSNormalization", "UnitNormalization"), _mixed),
    **dict.fromkeys(("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Dropout", "GaussianNoise", "GaussianDropout",
                     "AlphaDropout", "ActivityRegularization", "Identity", "Rescaling"), _pointwise),
    **dict.fromkeys(("BasePooling", "BaseGlobalPooling"), _spatial),
    **dict.fromkeys((f"{kind}{d}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for d in "123"), _spatial),
    **dict.fromkeys(("Mean", "Sum", "Max", "Min"), _reduced),
    **dict.fromkeys(("Flatten", "Reshape", "Permute", "RepeatVector", "Transpose", "Moveaxis", "Swapaxes", "Squeeze",
                     "ExpandDims", "Flip", "Ravel", "GetItem"), _moved),
    "Split": _split, "Concatenate": _concatenated,
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _joined),
}  # fmt: skip


def _rule(operation) -> Callable | None:
    kind = type(operation)
    if kind in RULES or not kind.__module__.startswith("keras."):
        return RULES.get(kind)
    names = [base.__name__ for base in kind.__mro__ if base.__name__ in RULES]
    return RULES[names[0]] if names else None if isinstance(operation, Layer) else _pointwise


def _check_network(network: Model, weights: bool) -> None:
    if not _is_graph(network):
        own = isinstance(network, keras.Sequential) or hasattr(network, "_run_through_graph")
        what = f"{network.name!r}: {type(network).__name__} has a `call` of its own" if own else type(network).__name__
        raise TypeError(f"expected a keras.Sequential or a functional network, got {what}")
    if not network.built or not network.inputs:
        raise ValueError(f"network {network.name!r} is not built; call network.build((None, inputs)) first")
    names = list(dict(_paths(network)).values())
    if len(set(names)) < len(names):
        raise ValueError(f"network {network.name!r} has layers of the same name: {names}")
    for variable in network.weights if weights else []:
        array = ops.convert_to_numpy(variable)
        if array.dtype.kind not in "iu" and not np.isfinite(array).all():
            name = variable.path.split("/")[-2]
            raise ValueError(f"layer {name!r} holds NaN or infinite weights; nothing can be done with it")


def _check_layer(layer: Layer) -> None:
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        raise TypeError(f"layer {layer.name!r} is a {type(layer).__name__}, quantised or with LoRA: not supported")


def prunable_layers(network: Model) -> list[Layer]:
    """Return the layers whose single weights may be pruned: all with a known kernel but the output layers.

    These are Dense, convolutions, their transposed, depthwise and separable forms, and the projections of attention. A
    kernel whose result reaches an output without another one is never pruned. Raises `TypeError` for what is no network
    of layers, quantised layers and layers with LoRA; `ValueError` for a network that is not built, has nothing to
    prune, two layers of one name, or NaN or infinite weights.
    """
    return list({id(kernel.layer): kernel.layer for kernel in _prunable(_Graph(network, check=True))}.values())


def prunable_units(network: Model) -> dict[str, list[list[tuple[str, int]]]]:
    """Return the units that may be removed: name of a layer -> for each of its units, all channels that go together.

    A channel is (name of a kernel, number of its output). What a sum ties is listed once, under the first layer that
    makes it; what must stay is not listed. Raises what `prunable_layers` raises.
    """
    graph = _Graph(network, check=True)
    members = {}
    for kernel in graph.kernels.values():
        for number, unit in enumerate(graph.unit[kernel.units].tolist()):
            members.setdefault(unit, []).append((kernel.name, number))
    return {name: [members.get(unit, []) for unit in units.tolist()] for name, units in _removable(graph).items()}


def _prunable(graph: _Graph) -> list[_Kernel]:
    if not graph.hidden:
        has = f"{graph.network.name!r} has only {list(graph.kernels)}{_told(graph)}"
        raise ValueError(f"pruning needs a hidden layer before the output layer; {has}")
    return graph.hidden


def _removable(graph: _Graph) -> dict[str, np.ndarray]:
    if not graph.entries:
        raise ValueError(f"no unit of {graph.network.name!r} can be removed{_told(graph)}")
    return graph.entries


def _told(graph: _Graph) -> str:
    """Say which layers' channels all stay, and why."""
    last, told, ties = {kernel.name for kernel in graph.last}, [], np.concatenate(graph.ties, axis=1)
    unit = graph._tied(ties[:, (ties > 0).all(axis=0)])  # without what stays
    for name, (made, *_) in graph.makers.items():
        if name not in last and not graph.unit[made].any():
            whys = [why for some, why in graph.reasons if np.isin(unit[some[some > 0]], unit[made]).any()]
            told.append(f"{name!r} stays: {whys[0] if whys else 'it is tied to what stays'}")
    told += [f"{each} has no rule" for each in graph.unknown if not any(each in text for text in told)]
    more = f"; and {len(told) - 9} more" if len(told) > 9 else ""
    return "".join(f"; {text}" for text in told[:9]) + more


# --- What users hand over -----------------------------------------------------------------------------------------


def _choice(kind: str, value: object, valid: Iterable[str]) -> None:
    if value not in (valid := list(valid)):
        raise ValueError(f"unknown {kind} {value!r}; choose one of: {', '.join(valid)}")


def _fits(shape: tuple, expected: tuple) -> bool:
    return len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))


def _images(network: Model, x):
    """Return images as a NumPy array, or a list of them for several inputs; check kind, shape and finiteness."""
    if len(network.inputs) == 1:
        return _image_array(network, network.inputs[0], x[next(iter(x))] if isinstance(x, Mapping) else x)
    if not isinstance(x, Mapping | list | tuple) or len(x) != len(network.inputs):
        raise ValueError(f"network {network.name!r} takes {len(network.inputs)} inputs: x must be a list of arrays")
    arrays = [x[key] for key in sorted(x)] if isinstance(x, Mapping) else x
    arrays = [_image_array(network, start, each) for start, each in zip(network.inputs, arrays, strict=True)]
    if len({len(each) for each in arrays}) > 1:
        raise ValueError(f"inputs must have equally many images, got {[len(each) for each in arrays]}")
    return arrays


def _image_array(network: Model, start: KerasTensor, x) -> np.ndarray:
    expected = tuple(start.shape)
    x = np.asanyarray(ops.convert_to_numpy(x) if isinstance(x, keras.Variable) or ops.is_tensor(x) else x)
    if isinstance(x, np.ma.MaskedArray) or (x.ndim and x.dtype.kind not in "fiub" and x.dtype.name != "bfloat16"):
        raise TypeError(f"x must be an array of real numbers, without a mask; got {type(x).__name__} of {x.dtype}")
    if not _fits(x.shape, (None, *expected[1:])) or len(x) == 0:
        raise ValueError(f"x has shape {x.shape}, but network {network.name!r} takes images {expected}")
    with np.errstate(over="ignore"):
        if bad := np.count_nonzero(~np.isfinite(x.astype(np.float32, copy=False))):
            raise ValueError(f"x holds NaN or infinite values in {bad} places; images must be finite")
    return np.asarray(x)


def _labels(graph: _Graph, x, y) -> np.ndarray:
    """Return labels as a NumPy array, having checked that they are classes, and the network a classifier."""
    y, end = np.asarray(y), graph.network.outputs[0].shape
    shape, classes = (None if x is None else _count(x), *end[1:-1]), end[-1]
    if y.dtype.kind not in "iu" or not _fits(y.shape, shape):
        raise ValueError(f"y must be one integer label per output, shape {shape}; got {y.dtype} {y.shape}")
    if classes < 2 or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels must be the classes 0 to {classes - 1}; got {y.min()} to {y.max()}")
    if not _logits(graph):
        raise ValueError(f"layer {graph.last[-1].name!r} must return logits or their softmax, or there is no loss")
    return y.astype(np.int32)


def _count(x) -> int:
    return len(x[0] if isinstance(x, list) else x)


def _part(x, batch: slice) -> list[np.ndarray]:
    return [each[batch] for each in (x if isinstance(x, list) else [x])]


def _batches(x, size: int) -> list[list[np.ndarray]]:
    return [_part(x, slice(first, first + size)) for first in range(0, _count(x), size)]


# --- Networks at work ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _full_precision():
    """GPUs multiply float32 with mantissas of 10 bits (TF32) unless told otherwise; sums of squares need all 24."""
    backend = sys.modules[keras.backend.backend()]  # Keras has imported it
    if backend.__name__ == "jax":
        with backend.default_matmul_precision("highest"):
            yield
    elif backend.__name__ == "tensorflow":
        settings = backend.config.experimental
        before = settings.tensor_float_32_execution_enabled()
        settings.enable_tensor_float_32_execution(False)
        try:
            yield
        finally:
            settings.enable_tensor_float_32_execution(before)
    else:
        yield


def _sums(kernel: _Kernel, signal, weights: list | None = None):
    """Return what a kernel makes of a signal, in float32 at least, with its own or other weights."""
    layer, (weight, *bias) = kernel.layer, [ops.stop_gradient(_wide(each)) for each in weights or kernel.weights()]
    common = keras.backend.result_type(signal.dtype, weight.dtype)
    signal, weight = ops.cast(signal, common), ops.cast(weight, common)
    first = "channels_first" if _first(layer) else "channels_last"
    if kernel.form == "dense":
        signal = ops.moveaxis(signal, 1, -1) if _first(layer) else signal
        signal = ops.matmul(signal, weight if weight.ndim == 2 else ops.reshape(weight, (signal.shape[-1], -1)))
        signal = ops.moveaxis(signal, -1, 1) if _first(layer) else signal
    elif kernel.form == "transposed":
        padding = layer.padding, layer.output_padding
        signal = ops.conv_transpose(signal, weight, layer.strides, *padding, first, layer.dilation_rate)
    else:
        padding = layer.padding
        if padding == "causal":
            signal, padding = ops.pad(signal, [(0, 0), *_padding(kernel, signal.shape[1:-1]), (0, 0)]), "valid"
        convolve = ops.depthwise_conv if kernel.form == "depthwise" else ops.conv
        signal = convolve(signal, weight, layer.strides, padding, first, layer.dilation_rate)
    if not bias:
        return signal
    return ops.add(signal, ops.reshape(bias[0], (-1, *[1] * layer.rank) if _first(layer) else (-1,)))


def _padding(kernel: _Kernel, sizes: tuple) -> list[tuple[int, int]]:
    """Return the zeros that a convolution puts before and after each axis of its positions."""
    layer, pads = kernel.layer, []
    for size, taps, stride, rate in zip(sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True):
        reach = (taps - 1) * rate
        total = max((math.ceil(size / stride) - 1) * stride + reach + 1 - size, 0)
        pads.append({"valid": (0, 0), "causal": (reach, 0)}.get(layer.padding, (total // 2, total - total // 2)))
    return pads


def _rows(kernel: _Kernel, signal, channels: bool = False):
    """Return the inputs of a kernel as rows (positions, inputs of its matrix); depthwise (positions, taps, units).

    Of layers with more positions than ROWS in a batch, evenly spread ones. channels: each position once, not patches.
    """
    signal = ops.moveaxis(signal, 1, -1) if _first(kernel.layer) else signal
    if channels or kernel.form in ("dense", "transposed"):
        return _sample(signal)
    layer, pads = kernel.layer, _padding(kernel, signal.shape[1:-1])
    signal = ops.pad(signal, [(0, 0), *pads, (0, 0)])
    steps = list(zip(signal.shape[1:-1], layer.kernel_size, layer.strides, layer.dilation_rate, strict=True))
    taps = []
    for place in itertools.product(*map(range, layer.kernel_size)):
        cuts = [slice(tap * rate, size - (count - 1 - tap) * rate, stride)
                for tap, (size, count, stride, rate) in zip(place, steps, strict=True)]  # fmt: skip
        taps.append(_sample(signal[(slice(None), *cuts)]))
    if kernel.form == "convolution":
        return ops.concatenate(taps, axis=1)
    return ops.repeat(ops.stack(taps, axis=1), len(kernel.units) // taps[0].shape[1], axis=2)


def _sample(signal):
    """Return rows, a position each: all, or if there are several per image and too many, evenly spread ones."""
    rows = ops.reshape(signal, (-1, signal.shape[-1]))
    if len(signal.shape) == 2 or rows.shape[0] <= ROWS:
        return rows
    return ops.take(rows, np.linspace(0, rows.shape[0] - 1, ROWS).astype("int32"), axis=0)


def _run(graph: _Graph, batch: list[np.ndarray], meet: Callable = _sums):
    """Send images through a network; meet(kernel, inputs) returns the sums that a kernel makes of them."""
    return _walk(graph.network, _inputs(graph, batch), partial(_compute, graph, meet))


def _inputs(graph: _Graph, batch: list[np.ndarray]) -> list:
    starts = zip(batch, graph.network.inputs, strict=True)
    return [_wide(ops.convert_to_tensor(each, start.dtype)) for each, start in starts]


def _compute(graph: _Graph, meet: Callable, operation, *args, **kwargs):
    kernels = graph.calls.get(id(operation))
    if not kernels:
        half = getattr(operation, "compute_dtype", "float32") in ("float16", "bfloat16")
        return (operation.call if half and not operation.variables else operation)(*args, **kwargs)
    if len(kernels) < 3:
        signal = _wide(args[0])
        for kernel in kernels:
            signal = meet(kernel, signal)
        signal = kernels[-1].layer.activation(signal)
        if getattr(args[0], "_keras_mask", None) is not None:  # which layers further on may need
            signal._keras_mask = args[0]._keras_mask
        return signal
    query, value, *key = *args, *kwargs.values()
    arriving, parts = (query, (key or [value])[0], value), []
    for kernel, signal in zip(kernels, arriving, strict=False):
        shape = -1, *signal.shape[1:-1], *kernel.weight.shape[1:]
        parts.append(ops.reshape(meet(kernel, _wide(signal)), shape))
    mixed = operation._compute_attention(*parts)[0]
    return meet(kernels[-1], ops.reshape(mixed, (-1, *query.shape[1:-1], mixed.shape[-2] * mixed.shape[-1])))


# --- Scores -------------------------------------------------------------------------------------------------------


def weight_scores(
    network: Model, criterion: str = "magnitude", x: Array = None, y: Array = None, seed: int | None = None
) -> Arrays:
    """Return a score for every prunable weight: name -> array of the kernel's shape (…, inputs, units).

    A name is that of the layer, in nested networks "network/layer"; of layers with several kernels, "layer/depthwise",
    "layer/pointwise", "layer/query" and so on.
    criterion: "magnitude" |w|; "activation" |w| · rms of its input over images `x` (Sun et al. 2023, Wanda);
    "taylor" |w · gradient| per image of `x` with labels `y`, averaged (Molchanov et al. 2017); "reconstruction", by how
    much the squared error of the layer's pre-activations over images `x` rises without it when all others are refitted:
    backward elimination with refits (Hassibi and Stork 1993; Frantar and Alistarh 2022; ALPS, Meng et al. 2024, solves
    the same problem for one sparsity), a unit's error counted by its outgoing weights, each by what the next unit's
    counts, so that units' scales cancel out; choose by it if you `repair`; "random", from `seed`.
    What a criterion does not need is ignored. Every position counts as an image, of convolutions a sample of them; for
    the gradient only if it has a label of its own.
    Raises `ValueError` for another criterion, one that does not get what it needs, or scores that are not finite;
    `TypeError` for images that are no real numbers.
    """
    return _score(_Graph(network, check=True), "weight", criterion, x, y, seed)


def neuron_scores(
    network: Model, criterion: str = "norm", x: Array = None, y: Array = None, seed: int | None = None
) -> Arrays:
    """Return a score for every unit that can be removed: name -> array (units,), as `prunable_units` lists them.

    criterion: "norm", the L2 norm of the kernel columns that make the unit; "activation", that of rms outputs over
    images `x` · L2 norm of the kernel row that takes them, over all kernels that do; "taylor", |output · gradient|
    per image of `x` with labels `y`, averaged, the first-order change of the loss when the unit is silenced (Molchanov
    et al. 2017); "reconstruction", the share of the next kernel's squared sums over images `x`, counted as for weights,
    that least squares cannot explain from the better units: greedy forward selection (El Halabi et al. 2022), that is
    orthogonal matching pursuit (Pati et al. 1993), with the aim of ThiNet (Luo et al. 2017), where each tap of a kernel
    and each channel of a unit is a sum of its own, and of several kernels that counts which needs the unit most;
    "random", from `seed`.
    What a criterion does not need is ignored. Warns if a layer's units stay. Raises what `weight_scores` raises.
    """
    return _score(_Graph(network, check=True), "neuron", criterion, x, y, seed)


def _score(
    graph: _Graph, kind: str, criterion: str, x: Array = None, y: Array = None, seed: int | None = None
) -> Arrays:
    network, criteria = graph.network, WEIGHT_CRITERIA if kind == "weight" else NEURON_CRITERIA
    _choice(f"{kind} criterion", criterion, criteria)
    needed = inspect.signature(criteria[criterion]).parameters
    data = {name: value for name, value in {"x": x, "y": y, "seed": seed}.items() if name in needed}
    if missing := [name for name, value in data.items() if value is None]:
        hint = f"x: training images of shape {network.inputs[0].shape}, y: their labels, seed: a number"
        raise ValueError(f"criterion {criterion!r} needs {' and '.join(missing)}; got None ({hint})")
    if "x" in data:
        data["x"] = _images(network, data["x"])
    if "y" in data:
        data["y"] = _labels(graph, data.get("x"), data["y"])
    if kind == "weight":
        shapes = {kernel.name: tuple(kernel.weight.shape) for kernel in _prunable(graph)}
    else:
        shapes = {name: units.shape for name, units in _removable(graph).items()}
    found = [np.asarray(score) for score in criteria[criterion](network, **data)]
    if [score.shape for score in found] != list(shapes.values()):
        raise ValueError(f"criterion {criterion!r} must return scores of shapes {list(shapes.values())}, one per layer")
    scores = dict(zip(shapes, found, strict=True))
    _check_scores(scores)
    if kind == "neuron" and (told := _told(graph)):
        warnings.warn(f"of {network.name!r} not all units can be removed{told}", stacklevel=3)
    return scores


def _check_scores(scores: Arrays) -> None:
    for name, score in scores.items():
        if not np.isfinite(score).all():
            raise ValueError(f"scores of layer {name!r} hold NaN or inf; they cannot be ranked")


def _weight_magnitude(network) -> list[np.ndarray]:
    return [np.abs(ops.convert_to_numpy(_wide(kernel.weight))) for kernel in _Graph(network).hidden]


def _weight_activation(network, x) -> list[np.ndarray]:
    graph = _Graph(network)
    squares = _mean_square(graph, x, graph.hidden, _rows, _own_squares, np.multiply)
    rms = {name: np.sqrt(each if each.ndim == 2 else each[:, None]) for name, each in squares.items()}
    return [kernel.tensor(np.abs(kernel.matrix()) * rms[kernel.name]) for kernel in graph.hidden]


def _own_squares(kernel: _Kernel, rows):
    return ops.sum(ops.square(rows), axis=0)


def _weight_taylor(network, x, y) -> list[np.ndarray]:
    graph, totals = _Graph(network), {}
    for kernel, count, signal, delta in itertools.chain.from_iterable(_gradients_of(graph, x, y, "sums")):
        if kernel.form == "transposed":  # the transpose of a convolution, which takes the gradients
            around = kernel._replace(form="convolution", inputs=kernel.units, units=kernel.inputs)
            signal, delta = _rows(kernel, signal), _rows(around, delta)
        else:
            signal, delta = _rows(kernel, signal), _rows(kernel._replace(form="dense"), delta)
        depthwise, places = kernel.form == "depthwise", max(1, delta.shape[0] // count)
        if places == 1:  # the gradient of one image's loss by w_ij is input_i · delta_j: its mean |.| is one product
            signal, delta = ops.abs(signal), ops.abs(delta)
            total = ops.einsum("ptu,pu->tu", signal, delta) if depthwise else ops.matmul(ops.transpose(signal), delta)
        else:
            signal, delta = (ops.reshape(each, (-1, places, *each.shape[1:])) for each in (signal, delta))
            product = ops.einsum("nptu,npu->ntu" if depthwise else "npi,npj->nij", signal, delta)
            total = ops.sum(ops.abs(product), axis=0)
        totals[kernel.name] = totals.get(kernel.name, 0.0) + ops.convert_to_numpy(total).astype(np.float64) / y.size
    return [kernel.tensor(np.abs(kernel.matrix()) * totals[kernel.name]) for kernel in graph.hidden]


def _what_errors_count(graph: _Graph) -> np.ndarray:
    """Return what an error of each channel counts: 1 for outputs; else the L2 norm of what it is multiplied by on its
    way on, each entry times what the next channel counts, so that no unit's scale matters."""
    counts = np.zeros(graph.count)
    counts[graph.ends] = 1
    for link in reversed(graph.links):
        edges, targets = link.edges(), counts[link.targets]
        if edges.ndim == 3:
            sent = np.linalg.norm(edges[0] * targets, axis=1) if len(edges) == 1 else _norm(edges * targets, 1)
        else:
            sent = (np.abs(edges) if edges.ndim == 1 else np.linalg.norm(edges, axis=0)) * targets
        for source in link.sources:
            np.hypot.at(counts, source, sent)
    return counts


def _norm(array: np.ndarray, axis: int) -> np.ndarray:
    """Return the L2 norm over all axes but one."""
    return np.linalg.norm(np.moveaxis(array.astype(np.float64), axis, -1).reshape(-1, array.shape[axis]), axis=0)


def _weight_reconstruction(network, x) -> list[np.ndarray]:
    graph = _Graph(network)
    problems = zip(graph.hidden, _weight_problems(graph, x, graph.hidden), strict=True)
    return [kernel.tensor(_rise_at_removal(*problem)) for kernel, problem in problems]


def _products(kernel: _Kernel, rows):
    """Return products (inputs + 1, inputs + 1) of rows and of 1, the bias's input; depthwise, (units, …)."""
    rows = ops.concatenate([rows, ops.ones_like(rows[:, :1])], axis=1)
    if kernel.form == "depthwise":
        rows = ops.transpose(rows, (2, 0, 1))
        return ops.matmul(ops.swapaxes(rows, 1, 2), rows)
    return ops.matmul(ops.transpose(rows), rows)


def _product_scale(powers: np.ndarray, _) -> np.ndarray:
    powers = np.append(powers, np.ones_like(powers[:1]), axis=0).T
    return powers[..., :, None] * powers[..., None, :]


def _biased(graph: _Graph, kernel: _Kernel) -> bool:
    """Whether the mean of what a kernel makes can be made up for."""
    return kernel.form != "transposed" and (kernel.bias is not None or kernel.name in graph.after)


def _weight_problems(graph: _Graph, x, kernels: list[_Kernel]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield for kernels what their weights are chosen by, in float32.

    That is the mean products of the inputs, each scaled to 1 and without what a bias takes up, with a ridge of 0.1 %,
    and the matrix in units of these and of what errors of its units count; the energy of what it makes is 1. Units of a
    depthwise kernel have products each of their own.
    """
    counts, grams = _what_errors_count(graph), _mean_square(graph, x, kernels, _rows, _products, _product_scale)
    for kernel in kernels:
        gram = grams[kernel.name]
        energy, mean = _diagonal(gram)[..., :-1], gram[..., :-1, -1] * _biased(graph, kernel)
        gram = gram[..., :-1, :-1] - mean[..., :, None] * mean[..., None, :]
        _diagonal(gram)[...] += 1e-3 * energy
        scale = np.sqrt(np.maximum(_diagonal(gram), 0.5e-3 * energy))
        matrix = (
            kernel.matrix() * kernel.per_column(counts[kernel.units]) * (scale.T if scale.ndim > 1 else scale[:, None])
        )
        scale = np.where(scale > 0, scale, 1.0)
        gram = gram / (scale[..., :, None] * scale[..., None, :])
        _diagonal(gram)[...] = 1
        total = np.sum(matrix * _times(gram, matrix))
        yield gram.astype(np.float32), (matrix / np.sqrt(total or 1.0)).astype(np.float32)


def _diagonal(gram: np.ndarray) -> np.ndarray:
    """Return a view of the diagonals."""
    return np.einsum("...ii->...i", gram)


def _times(gram: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return gram @ matrix if gram.ndim == 2 else np.einsum("uts,su->tu", gram, matrix)


def _rise_at_removal(gram: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Rank weights by backward elimination: what is needed least goes, the rest is refitted, and so on.

    Takes what `_weight_problems` has. Returns higher scores for what goes later: sums of what rounds and weights before
    it cost. As long as many are left, a quarter goes at a time, those with the smallest |w| · rms of the input.
    """
    if not np.isfinite(kernel).all():
        return np.full(kernel.shape, np.nan)
    cross, alive = _times(gram, kernel), kernel != 0
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

    Columns with about as many rows come together, few enough to bound memory; padding is that of the identity. gram is
    one for all columns, or has one for each.
    """
    counts, first = alive.sum(axis=0), 0
    order = np.argsort(-counts, kind="stable")
    while first < len(order) and (most := counts[order[first]]):
        columns = order[first : first + max(1, 2**20 // most**2)]
        first += len(columns)
        rows = np.argsort(~alive[:, columns], axis=0, kind="stable")[:most].T
        own = np.take_along_axis(alive[:, columns].T, rows, axis=1)
        place = rows[:, :, None], rows[:, None, :]
        parts = gram[place if gram.ndim == 2 else (columns[:, None, None], *place)] * (
            own[:, :, None] & own[:, None, :]
        )
        parts[:, range(most), range(most)] += ~own
        yield columns, rows, own, parts


def _neuron_norm(network) -> list[np.ndarray]:
    graph = _Graph(network)
    return _per_unit(graph, np.hypot, ((made, _norm(ops.convert_to_numpy(_wide(weight)), axis))
                                       for made, weight, axis in graph.makers.values()))  # fmt: skip


def _per_unit(graph: _Graph, add: np.ufunc, found: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return what channels with these numbers have for every unit, over all that belong to it."""
    total = np.zeros(graph.count + 1)
    for channels, values in found:
        add.at(total, graph.unit[channels], values)
    return [total[units] for units in graph.entries.values()]


def _takers(graph: _Graph) -> list[_Kernel]:
    """Return the kernels that take units, not single channels one by one."""
    return [kernel for kernel in graph.kernels.values() if kernel.form != "depthwise"]


def _neuron_activation(network, x) -> list[np.ndarray]:
    graph = _Graph(network)
    squares = _mean_square(graph, x, _takers(graph), _channels, _own_squares, np.multiply)
    found = [(kernel.inputs, np.sqrt(squares[kernel.name]) * _norm(kernel.taps(), 1)) for kernel in _takers(graph)]
    return _per_unit(graph, np.hypot, found)


def _channels(kernel: _Kernel, signal):
    return _rows(kernel, signal, channels=True)


def _neuron_taylor(network, x, y) -> list[np.ndarray]:
    graph, total = _Graph(network), 0.0
    ends = scipy.sparse.eye_array(graph.count + 1, format="csr")[graph.unit]  # channel -> unit
    for batch in _gradients_of(graph, x, y, "inputs"):
        effect = 0.0
        for kernel, count, signal, delta in batch:
            if kernel.form != "depthwise":
                rows = _channels(kernel, signal * delta)
                places = max(1, rows.shape[0] // count)
                rows = ops.sum(ops.reshape(rows, (-1, places, rows.shape[1])), axis=1)
                effect = effect + ends[kernel.inputs].T @ ops.convert_to_numpy(rows).T
        total = total + np.abs(effect).sum(axis=1) / y.size
    return [total[units] for units in graph.entries.values()]


def _neuron_reconstruction(network, x) -> list[np.ndarray]:
    graph = _Graph(network)
    problems = _neuron_problems(graph, x, _takers(graph))
    return _per_entry(graph, problems)


def _neuron_problems(graph: _Graph, x, kernels: list[_Kernel]) -> Iterable[tuple]:
    """Yield for kernels a channel of each unit they take, and what these are chosen by.

    That is the mean products of their channels, without what a bias takes up, and the kernel in units of what errors of
    its units count. Channels of a unit and taps of a kernel are as many kernels side by side, whose errors add up.
    """
    counts, places = _what_errors_count(graph), {}
    for kernel in kernels:
        units = graph.unit[kernel.inputs]
        own = [np.flatnonzero(units == unit) for unit in dict.fromkeys(units[units > 0].tolist())]
        most = max(map(len, own), default=0)
        places[kernel.name] = np.array([[*each, *[-1] * (most - len(each))] for each in own], int).reshape(
            len(own), most
        )
    kernels = [kernel for kernel in kernels if places[kernel.name].size]

    def products(kernel, rows):
        rows = ops.pad(rows, [(0, 0), (0, 1)])  # what -1 is
        return ops.stack([_products(kernel, ops.take(rows, own, axis=1)) for own in places[kernel.name].T])

    def scale(powers, kernel):
        powers = np.append(powers, 1.0)[places[kernel.name].T]
        powers = np.append(powers, np.ones((len(powers), 1)), axis=1)
        return powers[:, :, None] * powers[:, None, :]

    grams = _mean_square(graph, x, kernels, _channels, products, scale)
    for kernel in kernels:
        gram, total = grams[kernel.name], 0.0
        for each in gram:
            mean, energy = each[:-1, -1] * _biased(graph, kernel), each.diagonal()[:-1]
            varies = energy - mean**2 > 1e-5 * energy  # or only rounding is left
            total = total + (each[:-1, :-1] - np.outer(mean, mean)) * np.outer(varies, varies)
        taps = np.pad(kernel.taps() * counts[kernel.units], [(0, 0), (0, 1), (0, 0)])
        matrix = np.moveaxis(taps[:, places[kernel.name]], 1, 0).reshape(len(total), -1)
        yield kernel.inputs[places[kernel.name][:, 0]], total, matrix


def _per_entry(graph: _Graph, problems: Iterable[tuple]) -> list[np.ndarray]:
    """Return the scores of units: of several kernels that take one, that counts which needs it most."""
    return _per_unit(graph, np.maximum, ((first, _error_before_each(*problem)) for first, *problem in problems))


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
            pivot = np.maximum(pivot - factor[step] ** 2, ridge / 2)  # but for rounding it is never below the ridge
            gain += factor[step] * (norm[step] * factor[step] - 2 * shift[step])
            pivot[best], gain[best] = 1.0, -np.inf  # taken
        left = np.isfinite(gain)
        units, pivot, gain, factor, shift = units[left], pivot[left], gain[left], factor[:, left], shift[:, left]
        mixed = shift.T @ factor
        gram = gram[np.ix_(left, left)] - factor.T @ factor
        among = among[np.ix_(left, left)] - mixed - mixed.T + (factor.T * norm) @ factor
    return error


def _random(seed: int, shapes: list[tuple]) -> list[np.ndarray]:
    return [np.random.default_rng([seed, number]).random(shape) for number, shape in enumerate(shapes)]


def _weight_random(network, seed) -> list[np.ndarray]:
    return _random(seed, [tuple(kernel.weight.shape) for kernel in _Graph(network).hidden])


def _neuron_random(network, seed) -> list[np.ndarray]:
    return _random(seed, [units.shape for units in _Graph(network).entries.values()])


# A criterion takes the network and, by these names, those of x, y and seed that it needs; it returns an array of scores
# per prunable kernel, or per name of `prunable_units`. Add yours here.
WEIGHT_CRITERIA: dict[str, Callable] = {
    "magnitude": _weight_magnitude,
    "activation": _weight_activation,
    "taylor": _weight_taylor,
    "reconstruction": _weight_reconstruction,
    "random": _weight_random,
}
NEURON_CRITERIA: dict[str, Callable] = {
    "norm": _neuron_norm,
    "activation": _neuron_activation,
    "taylor": _neuron_taylor,
    "reconstruction": _neuron_reconstruction,
    "random": _neuron_random,
}


def _near_one(rows) -> tuple:
    """Return rows divided by a power of two per column that brings them between -2 and 2, and these powers."""
    most = ops.convert_to_numpy(ops.max(ops.abs(rows), axis=0))
    powers = np.exp2(np.floor(np.log2(np.where(most > 2.0**-120, most, 1.0))))
    return rows / ops.convert_to_tensor(powers, rows.dtype), powers.astype(np.float64)


@_full_precision()
def _mean_square(graph: _Graph, x, kernels: list[_Kernel], rows_of: Callable, term: Callable, scale: Callable) -> dict:
    """Return, per kernel, the mean over the rows of its inputs of a term that is quadratic in them, in float64.

    Inputs are brought near 1 first, so that squares neither under- nor overflow; scale(powers, kernel) undoes it.
    """
    totals, counts = {kernel.name: 0.0 for kernel in kernels}, {kernel.name: 0 for kernel in kernels}

    def meet(kernel, signal):
        if kernel.name in totals:
            rows, powers = _near_one(rows_of(kernel, signal))
            again = scale(powers, powers if scale is np.multiply else kernel)
            totals[kernel.name] += again * ops.convert_to_numpy(term(kernel, rows))
            counts[kernel.name] += rows.shape[0]
        return _sums(kernel, signal)

    for batch in _batches(x, graph.batch_size):
        _run(graph, batch, meet)
    return {name: total / counts[name] for name, total in totals.items()}


def _logits(graph: _Graph) -> bool:
    """Whether the outputs are the sums of the last kernel, or the softmax of them; it is tried."""
    sums, random = [], np.random.default_rng(0)
    batch = [random.random((8, *(size or 2 for size in start.shape[1:]))) for start in graph.network.inputs]
    found = tree.flatten(_run(graph, batch, lambda *met: sums.append(_sums(*met)) or sums[-1]))
    wanted = [ops.convert_to_numpy(each) for each in (sums[-1], ops.softmax(sums[-1]))]
    found = ops.convert_to_numpy(found[0]) if len(found) == 1 else np.zeros(0)
    return any(found.shape == each.shape and np.allclose(found, each, atol=1e-6, equal_nan=True) for each in wanted)


def _gradients_of(graph: _Graph, x, y: np.ndarray, by: str) -> Iterable[list[tuple]]:
    """Yield per batch, for every call of a kernel: it, the number of labels, its inputs, and the gradients of the
    summed cross-entropy by these ("inputs") or by its sums ("sums")."""
    size = min(1000, graph.batch_size, max(1, ROWS // max(graph.positions.values())))
    for batch, labels in zip(_batches(x, size), _batches(y, size), strict=True):
        met = []

        def forward(offsets, batch=batch, met=met):
            met.clear()
            offsets = iter(offsets)

            def meet(kernel, signal):
                offset = next(offsets)
                signal = signal + offset if by == "inputs" else signal
                sums = _sums(kernel, signal)
                met.append((kernel, signal, sums if by == "inputs" else sums + offset))
                return met[-1][2]

            _run(graph, batch, meet)
            return met[-1][2]

        def total_loss(offsets, labels=labels[0], forward=forward):
            logits = forward(offsets)
            return ops.sum(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))

        forward(itertools.repeat(0.0))
        kernels, signals, sums = zip(*met, strict=True)
        deltas = _gradients(total_loss, [ops.zeros_like(each) for each in (signals if by == "inputs" else sums)])
        yield list(zip(kernels, itertools.repeat(labels[0].size), signals, deltas, strict=False))


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
    """Return a copy of the network with zeros where the masks are False; what no mask concerns stays as it is.

    A mask of a kernel's shape removes single weights. A mask (units,), by a name of `prunable_units`, removes whole
    units: what makes a channel (kernel column, bias) and what carries it on (depthwise kernel, gamma, beta) become 0 in
    all layers it passes, so that every kernel that takes it receives exactly 0. The copy has the network's class, input
    signature, names, dtypes and layer settings, down to the very activation functions and initialisers; not what a
    class of yours keeps besides. It is not compiled. Raises `TypeError` for a mask that is no boolean array;
    `ValueError` for a layer that is unknown or may not be pruned, or a mask of another shape.
    """
    return _mask(_Graph(network, check=True), masks)


def _mask(graph: _Graph, masks: Arrays) -> Model:
    kernels, values = {kernel.name: kernel.weight for kernel in graph.hidden}, {}
    gone = np.zeros(graph.count + 1, bool)
    for name, mask in masks.items():
        _choice("prunable layer", name, dict.fromkeys([*kernels, *graph.entries]))
        shapes = [tuple(kernels[name].shape)] if name in kernels else []
        shapes += [graph.entries[name].shape] if name in graph.entries else []
        if not isinstance(mask, np.ndarray) or mask.dtype != bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"the mask of layer {name!r} must be a boolean NumPy array (True = kept), got {kind}")
        if mask.shape not in shapes:
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"the mask of layer {name!r} has shape {mask.shape}; allowed: {allowed}{_told(graph)}")
        if mask.ndim == 1:
            gone[graph.entries[name][~mask]] = True
        else:
            values[id(kernels[name])] = ops.where(mask, ops.convert_to_tensor(kernels[name]), 0)
    for weight, axis, found, zeroed in graph.slices:
        left = ~gone[graph.unit[found]]
        if zeroed and not left.all():
            value = values.get(id(weight), ops.convert_to_tensor(weight))
            values[id(weight)] = ops.where(left.reshape(-1, *[1] * (weight.ndim - axis - 1)), value, 0)
    return _rebuild(graph, values)


def _rebuild(graph: _Graph, values: Mapping[int, object], keep: np.ndarray | None = None) -> Model:
    """Return a copy of the network with these values, id(variable) -> array, and only the channels that `keep` has."""
    copies, cuts = {}, {}
    for each in graph.slices if keep is not None else []:
        cuts.setdefault(id(each.weight), []).append(each)

    def again(operation):
        if id(operation) not in copies:
            if _is_graph(operation):
                copy = model(operation)
            elif isinstance(operation, TimeDistributed):
                copy = TimeDistributed(again(operation.layer), name=operation.name, dtype=operation.dtype_policy)
            else:
                copy = _again(operation, _sized(graph, operation, keep))
            copies[id(operation)] = operation, copy
        return copies[id(operation)][1]

    def model(network: Model) -> Model:
        sizes = _sized(graph, network, keep)
        starts = [keras.Input(batch_shape=sizes.get(number, start.shape), dtype=start.dtype, name=start.name)
                  for number, start in enumerate(network.inputs)]  # fmt: skip
        if isinstance(network, keras.Sequential):
            copy = keras.Sequential([*starts, *map(again, network.layers)], name=network.name)
        else:
            ends = _through(network, starts, again)
            copy = Model(tree.pack_sequence_as(network._inputs_struct, starts), ends, name=network.name)
        copy.__class__ = type(network)
        if not network.trainable:
            copy.trainable = False
        return copy

    result = model(graph.network)
    for operation, copy in copies.values():
        if not isinstance(operation, Layer) or _is_graph(operation):
            continue
        for variable, new in zip(operation.weights, copy.weights, strict=True):
            value = values.get(id(variable), variable)
            for _, axis, found, _ in cuts.get(id(variable), []):
                value = np.take(ops.convert_to_numpy(value), np.flatnonzero(keep[found]), axis)
            new.assign(ops.copy(ops.convert_to_tensor(value)))  # JAX deletes what networks share when one is trained
        if hasattr(copy, "finalize_state"):
            copy.finalize_state()
        for name, value in vars(operation).items():
            if name.endswith("_initializer"):
                setattr(copy, name, value)
    return result


def _sized(graph: _Graph, operation, keep: np.ndarray | None) -> dict:
    """Return the settings of an operation that change if only these channels are kept."""
    changes = {}
    for setting, found in graph.sizes.get(id(operation), {}).items() if keep is not None else []:
        thin = _thin(found)
        if (left := keep[np.abs(thin)]).all() and setting != "output_shape":  # which by default is that of the inputs
            continue
        sizes = [left.sum() if size > 1 else full for size, full in zip(thin.shape, found.shape, strict=True)]
        if isinstance(setting, int) or setting in SHAPES:
            old = operation.inputs[setting].shape if isinstance(setting, int) else getattr(operation, setting)
            before = old[: len(old) - len(sizes)]
            changed = zip(old[len(before) :], sizes, found.shape, strict=True)
            changes[setting] = (*before, *(known if size == full else int(size) for known, size, full in changed))
        else:
            changes[setting] = int(sizes[0])
    return changes


def _again(operation, changes: dict):
    """Return an unbuilt copy of a layer or operation with some settings changed."""
    if isinstance(operation, Lambda) or not isinstance(operation, Layer):  # no weights, and functions without a name
        if changes:
            return type(operation).from_config(operation.get_config() | changes)
        copy = object.__new__(type(operation))
        copy.__dict__.update(vars(operation), _inbound_nodes=[], _outbound_nodes=[], **changes)
        return copy
    functions = {name: each for name, each in vars(operation).items()
                 if name.endswith("activation") and callable(each) and not getattr(each, "weights", None)}  # fmt: skip
    plain = object.__new__(type(operation))
    plain.__dict__.update(vars(operation), **dict.fromkeys(functions, keras.activations.linear))
    config = plain.get_config() | changes
    for kind in type(operation).__mro__:
        if kind is not Layer and not kind.__module__.startswith(("keras.", "builtins")) and "__init__" in vars(kind):
            for name in inspect.getfullargspec(kind.__init__).args[1:]:
                if name not in config and not hasattr(operation, name):
                    raise TypeError(f"layer {operation.name!r} must keep what it is made with as attributes: {name!r}")
                config.setdefault(name, getattr(operation, name, None))
    copy = type(operation).from_config(config | {name: "zeros" for name in config if name.endswith("_initializer")})
    vars(copy).update(functions)  # the very same
    return copy


def prune_weights(network: Model, sparsity: float, criterion: str = "magnitude", scope: str = "layer", **data) -> Model:
    """Return a copy of the network with the lowest-scoring `sparsity` of its weights set to zero.

    The output layer and all biases stay. See `weight_scores` for criterion and data (x, y, seed), `keep_masks` for
    sparsity, scope and exact counts; both say what they raise.
    """
    graph = _Graph(network, check=True)
    return _mask(graph, keep_masks(_score(graph, "weight", criterion, **data), sparsity, scope))


def prune_neurons(network: Model, sparsity: float, criterion: str = "norm", scope: str = "layer", **data) -> Model:
    """Return a copy of the network in which the lowest-scoring `sparsity` of its hidden units output exactly 0.

    `shrink` then removes them. Warns of layers whose units stay, and says why. See `neuron_scores` for criterion and
    data (x, y, seed), `keep_masks` for sparsity, scope and exact counts, `apply_masks` for what becomes zero.
    """
    graph = _Graph(network, check=True)
    return _mask(graph, keep_masks(_score(graph, "neuron", criterion, **data), sparsity, scope))


# --- Shrinking and cost -------------------------------------------------------------------------------------------


def shrink(network: Model) -> Model:
    """Return a physically smaller network with the same outputs, without the units that cannot influence them.

    Such a unit has no non-zero path from any input or bias, or none to the output. A hidden layer keeps one at least.
    """
    graph = _Graph(network, check=True)
    return _rebuild(graph, {}, _live(graph)[1])


def outputs(network: Model, x) -> np.ndarray:
    """Return the outputs for images `x` (n, ...) as a NumPy array, of several outputs a list: those of
    `shrink(network)`, in float32 at least, for measuring many networks; where only kernels shrink, without building it.

    Raises what `prunable_layers` and, for images, `neuron_scores` do.
    """
    graph, x = _Graph(network, check=True), _images(network, x)
    keep, meet = _live(graph)[1], _sums
    if not keep.all():
        weights = {id(weight): weight for kernel in graph.kernels.values() for weight in kernel.weights()}
        others = [step for step in graph.steps if len(graph.calls.get(id(step), [])) not in (1, 2)]
        if all(id(each.weight) in weights for each in graph.slices) and not any(
            _sized(graph, step, keep) for step in others
        ):
            for weight, axis, found, _ in graph.slices:
                weights[id(weight)] = np.take(
                    ops.convert_to_numpy(weights[id(weight)]), np.flatnonzero(keep[found]), axis
                )
            weights = {key: _wide(weight) for key, weight in weights.items()}

            def meet(kernel, signal):
                return _sums(kernel, signal, [weights[id(weight)] for weight in kernel.weights()])
        else:
            graph = _Graph(shrink(network))
    parts = [tree.flatten(_run(graph, batch, meet)) for batch in _batches(x, graph.batch_size)]
    found = [np.concatenate(list(map(ops.convert_to_numpy, each))) for each in zip(*parts, strict=True)]
    return found[0] if len(found) == 1 else found


def _live(graph: _Graph) -> tuple[np.ndarray, np.ndarray]:
    """Return two boolean arrays over channel numbers: lies on a path that matters; its unit has one that does.

    All units stay where they cannot be removed one by one: of a softmax, for one, each acts on all others.
    """
    fed, needed = np.zeros(graph.count, bool), graph.unit == 0
    fed[0] = True
    links = []
    for link in graph.links:
        edges = link.edges() != 0
        links.append((link.sources, link.targets, edges if edges.ndim == 1 else edges.any(axis=0), link.constant()))
    known = -1
    while known != (known := np.count_nonzero(fed)):  # once more, for a layer that is called again with its own outputs
        for sources, targets, edges, constant in links:
            arriving = np.logical_and.reduce([fed[source] for source in sources])
            reached = edges.T @ arriving if edges.ndim == 2 else edges & arriving
            np.logical_or.at(fed, targets, reached | constant)
        if not graph.repeated:
            break
    for _ in range(2 if graph.repeated else 1):
        for sources, targets, edges, _ in reversed(links):
            going = needed[targets] & fed[targets]
            wanted = edges @ going if edges.ndim == 2 else edges & going
            for source in sources:
                np.logical_or.at(needed, source, wanted)
    live = fed & needed
    units = np.zeros(graph.count + 1, bool)
    units[graph.unit[live]] = units[0] = True
    for made, *_ in graph.makers.values():
        if not units[graph.unit[made]].any():
            units[graph.unit[made[0]]] = True
    return live, units[graph.unit]


def cost(network: Model) -> dict:
    """Return what is left of a network and what it costs.

    weights_left: non-zero kernel entries of the prunable layers that can still influence the output; units_left: layer
    name -> units that can; multiply_adds: of its kernels per image (an open length counts as one), and bytes of all
    weights: of the shrunk network.
    """
    graph = _Graph(network, check=True)
    live, keep = _live(graph)
    left = multiply_adds = 0
    for kernel in graph.kernels.values():
        taps, depthwise = kernel.taps(), kernel.form == "depthwise"
        entries = len(taps) * np.count_nonzero(keep[kernel.units])
        entries *= 1 if depthwise else np.count_nonzero(keep[kernel.inputs])
        multiply_adds += entries * graph.positions[kernel.name]
        if kernel in graph.hidden:
            left += np.count_nonzero(
                (taps != 0) & live[kernel.units] & (True if depthwise else live[kernel.inputs][:, None])
            )
    sizes = {id(weight): list(weight.shape) for weight in network.weights}
    for weight, axis, found, _ in graph.slices:
        sizes[id(weight)][axis] = np.count_nonzero(keep[found])
    size = sum(math.prod(sizes[id(weight)]) * ops.convert_to_numpy(weight).itemsize for weight in network.weights)
    last = {kernel.name for kernel in graph.last}
    useful = np.isin(graph.unit, graph.unit[live])
    units = {name: int(np.count_nonzero(useful[made])) for name, (made, *_) in graph.makers.items() if name not in last}
    return {"weights_left": int(left), "units_left": units, "multiply_adds": int(multiply_adds), "bytes": int(size)}


# --- Repair -------------------------------------------------------------------------------------------------------


def repair(pruned: Model, dense: Model, x, ridge: float = 1e-3, batch_size: int | None = None) -> Model:
    """Return a copy of `pruned` whose remaining weights are refitted so that it computes again what `dense` computed.

    Kernel by kernel from the input, the weights that are left, and the biases of units that are left, become those that
    bring what the kernel makes on the images `x` (n, ...), computed from the layers repaired so far, closest to what it
    makes in `dense` in least squares; before a BatchNormalization, whose statistics stay and whose beta stands for the
    bias. Where a sum follows, what its other terms, repaired already, lack is made up for too. What was pruned stays
    zero: entries that are zero in `pruned` and not in `dense`, and, in a layer that lost single weights, all zeros. The
    output layer is refitted too: nothing of it was pruned, but its inputs have changed. No labels, no gradients; a few
    thousand training images are enough. A layer that is called several times is refitted where it is called first;
    biases of transposed convolutions and embeddings stay.

    ridge: how strongly weights are held to the pruned ones, as a fraction of the energy that the mean input sends on,
    in (0, 1e12]. Dead or duplicated inputs and few images do no numerical harm: what images do not determine stays.
    Neurons share their inputs, and all units of a layer are solved for at once. For single weights every unit has its
    own problem: up to 256 weights are solved for directly, more by conjugate gradients, side by side, until 0.1 % of
    each right-hand side is left (what 300 steps do not reach, directly). batch_size: images per pass; it bounds memory
    (None: as many as are reasonable; with more images than one batch takes, every layer is one more pass over them).

    `pruned` comes from `dense` by pruning; repair first, `shrink` afterwards. Raises `ValueError` for networks of other
    layers or activations, exchanged arguments, or a ridge or batch size out of range, and what `outputs` raises.
    """
    ours, theirs, x = _Graph(pruned, check=True), _Graph(dense, check=True), _images(pruned, x)
    _check_pair(ours, theirs)
    return _repair_layers(ours, theirs, x, ridge, batch_size, list(ours.kernels))


def prune_and_repair(network: Model, sparsity: float | Mapping[str, float], x, kind: str = "weights",
                     ridge: float = 1e-3, batch_size: int | None = None) -> Model:  # fmt: skip
    """Return a copy of the network, pruned by "reconstruction" and repaired layer by layer: choose, refit, go on.

    `kind` is "weights" or "neurons". What a layer keeps is chosen when those before it are pruned and repaired, from
    the inputs it has by then; weights are chosen for this one sparsity, by ADMM (ALPS, Meng et al. 2024; in depthwise
    kernels by elimination), neurons as `neuron_scores` has it. (`prune_weights` chooses in all layers of the dense
    network, and one score serves all sparsities.) In the study this pays for weights, by more the more of them go, and
    not for neurons. Weights that are 0 in the dense network go first. Of two inputs that are always equal ADMM keeps
    both or neither. Arguments and errors are those of `keep_masks` and `repair`.
    """
    _choice("kind", kind, ("weights", "neurons"))
    theirs, x, pruned = _Graph(network, check=True), _images(network, x), network
    names = list(theirs.kernels)
    if kind == "weights":
        shapes = {kernel.name: kernel.weight.shape for kernel in _prunable(theirs)}
    else:
        shapes = {name: units.shape for name, units in _removable(theirs).items()}
    kept = keep_masks({name: np.zeros(shape) for name, shape in shapes.items()}, sparsity)
    for name, mask in kept.items():
        share, graph = 1 - np.mean(mask), _Graph(pruned)
        if kind == "weights":
            kernel, first = graph.kernels[name], names.index(name)
            (problem,) = _weight_problems(graph, x, [kernel])
            alone = problem[0].ndim == 3
            scores = _rise_at_removal(*problem) if alone else _best_together(*problem, share)
            scores, last = kernel.tensor(scores * (theirs.kernels[name].matrix() != 0)), first
        else:
            takers = [
                kernel for kernel in _takers(graph) if np.isin(graph.unit[kernel.inputs], graph.entries[name]).any()
            ]
            scores = dict(zip(graph.entries, _per_entry(graph, _neuron_problems(graph, x, takers)), strict=True))[name]
            first = min(
                number
                for number, kernel in enumerate(graph.kernels.values())
                if np.isin(graph.unit[kernel.units], graph.entries[name]).any()
            )
            last = max(names.index(kernel.name) for kernel in takers)
        ours = _Graph(apply_masks(pruned, keep_masks({name: scores}, share)))
        # From here to the last that takes what was chosen, and the one whose kernel the next choice looks at.
        pruned = _repair_layers(ours, theirs, x, ridge, batch_size, names[first : last + 2])
    return pruned


class _Pair:
    """A signal in the repaired network and in the dense one."""

    def __init__(self, ours, theirs):
        self.ours, self.theirs = ours, theirs


class _Reached(Exception):
    """A walk has come as far as it needs to."""


@_full_precision()
def _repair_layers(ours: _Graph, theirs: _Graph, x, ridge: float, batch_size: int | None, names: list[str]) -> Model:
    if isinstance(ridge, bool) or not (isinstance(ridge, numbers.Real) and 0 < ridge <= 1e12):
        raise ValueError(f"ridge must be a positive number up to 1e12, such as 1e-3; got {ridge!r}")
    batch_size = ours.batch_size if batch_size is None else batch_size
    if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive number of images, got {batch_size!r}")
    batches, fitted, steps = _batches(x, batch_size), {}, {step for steps in ours.beside.values() for step, _ in steps}

    def travel(batch: list[np.ndarray]) -> None:
        """Send a batch through both networks, as far as a kernel that is to be fitted to several."""
        done, known = itertools.count(), {}

        def apply(operation, *args, **kwargs):
            step, arrived = next(done), []
            sides = [tree.map_structure(lambda each, side=side: getattr(each, side, each), (args, kwargs))
                     for side in ("theirs", "ours")]  # fmt: skip

            def note(kernel, signal):
                arrived.append(signal)
                return _sums(kernel, signal)

            def meet(kernel, signal):
                name = kernel.name
                if name in names and name not in fitted:
                    lacking = _lacking(ours, theirs, kernel, known)
                    reached = signal, arrived[0], lacking
                    if len(batches) > 1:
                        raise _Reached(reached)
                    fitted[name] = _refit(ours, theirs, kernel, [reached], float(ridge))
                    if len(fitted) == len(names):
                        raise _Reached
                arrived.pop(0)
                return _sums(kernel, signal, fitted.get(name))

            wanted = _compute(theirs, note, theirs.steps[step], *sides[0][0], **sides[0][1])
            found = _compute(ours, meet, operation, *sides[1][0], **sides[1][1])
            result = tree.map_structure(_Pair, found, wanted)
            if step + 1 in steps:
                known[step + 1] = result
            return result

        _walk(ours.network, [_Pair(each, each) for each in _inputs(ours, batch)], apply)

    def reach(batch: list[np.ndarray]) -> tuple:
        try:
            travel(batch)
        except _Reached as reached:
            return reached.args[0] if reached.args else ()
        return ()

    for kernel in ours.kernels.values():
        if kernel.name in names and kernel.name not in fitted:
            if len(batches) == 1:
                reach(batches[0])
            else:
                fitted[kernel.name] = _refit(ours, theirs, kernel, map(reach, batches), float(ridge))
    values = {}
    for name, weights in fitted.items():
        kernel = ours.kernels[name]
        values |= {id(weight): value for weight, value in zip(kernel.weights(), weights, strict=False)}
        if kernel.bias is None and len(weights) > 1:
            layer = ours.after[name]
            beta = ops.convert_to_numpy(layer.beta)
            values[id(layer.beta)] = (beta + _scale(layer) * weights[1]).astype(beta.dtype)
    return _rebuild(ours, values)


def _scale(layer) -> np.ndarray:
    """Return by what a BatchNormalization multiplies."""
    gamma = 1.0 if layer.gamma is None else ops.convert_to_numpy(_wide(layer.gamma)).astype(np.float64)
    return gamma / np.sqrt(ops.convert_to_numpy(_wide(layer.moving_variance)) + layer.epsilon)


def _lacking(ours: _Graph, theirs: _Graph, kernel: _Kernel, known: dict) -> object:
    """Return what the other terms of a sum lack, in units of what the kernel makes: rows, or 0 without a sum."""
    lacking = 0.0
    for step, norm in ours.beside.get(kernel.name, []):
        if step in known:  # or it is an input, which is the same in both networks
            found, wanted = known[step].ours, known[step].theirs
            if norm:  # its BatchNormalization has not been reached yet
                found, wanted = ours.steps[norm - 1](found), theirs.steps[norm - 1](wanted)
            lacking = lacking + _rows(kernel._replace(form="dense"), ops.subtract(_wide(wanted), _wide(found)))
    if kernel.name in ours.after and not isinstance(lacking, float):
        lacking = ops.multiply(lacking, _inverse(_scale(ours.after[kernel.name])))
    return lacking


def _check_pair(ours: _Graph, theirs: _Graph) -> None:
    kinds = [[f"{type(step).__name__}{[tuple(weight.shape) for weight in getattr(step, 'weights', [])[:1]]}"
              for step in graph.steps] for graph in (ours, theirs)]  # fmt: skip
    if kinds[0] != kinds[1]:
        raise ValueError(f"pruned and dense must have the same layers, got {kinds[0]} and {kinds[1]}; shrink later")
    for (one, shape), (other, _) in zip(ours.acts, theirs.acts, strict=True):
        if one is not other:
            probe = ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape), "float32")
            if not np.allclose(*(ops.convert_to_numpy(function(probe)) for function in (one, other)), atol=1e-6):
                raise ValueError("pruned and dense must have the same activations; theirs turn the same into others")
    zeros = [[kernel.taps() == 0 for kernel in graph.kernels.values()] for graph in (ours, theirs)]
    lost, gained = (any((a & ~b).any() for a, b in zip(*pair, strict=True)) for pair in (zeros, zeros[::-1]))
    if gained and not lost:
        raise ValueError("dense has zeros that pruned does not have: exchange the arguments, repair(pruned, dense, x)")


def _refit(ours: _Graph, theirs: _Graph, kernel: _Kernel, reached: Iterable[tuple], ridge: float) -> list[np.ndarray]:
    """Return weights that map what arrives closest to what the dense network makes of what arrives there.

    reached: tuples of both, and of what is lacking elsewhere. After a BatchNormalization, beta stands for a bias, and
    what is returned is what to add to it.
    """
    whole, biased, depthwise = theirs.kernels[kernel.name], _biased(ours, kernel), kernel.form == "depthwise"
    first, shift = [kernel.matrix(), whole.matrix()], 0.0
    last = [np.zeros((int(biased), first[0].shape[1]), np.float32)] * 2
    if biased and kernel.bias is not None:
        last = [ops.convert_to_numpy(_wide(each.bias)).reshape(1, -1) for each in (kernel, whole)]
    elif biased:  # what was added to beta when this kernel was fitted before
        layers = ours.after[kernel.name], theirs.after[kernel.name]
        added = np.subtract(*(ops.convert_to_numpy(_wide(layer.beta)) for layer in layers))
        shift = ops.convert_to_tensor(added * _inverse(_scale(layers[0])), "float32")
    weights, target = (np.vstack(pair).astype(np.float64) for pair in zip(first, last, strict=True))
    alive, inputs = weights != 0, len(first[0])
    units = alive.any(axis=0)
    if not (~alive & (target != 0))[:inputs, units].any():  # only whole units went: other zeros are the layer's own
        alive[:inputs, units] = True
    alive[inputs:] = units  # the bias is the weight of one more input, which is always 1
    exact = not depthwise and (alive[:, units] == alive[:, units][:, :1]).all()
    make = (lambda rows, matrix: ops.einsum("ptu,tu->pu", rows, matrix)) if depthwise else ops.matmul
    most, gram, cross = 0.0, np.zeros((*[len(units)] * depthwise, *[len(weights)] * 2)), np.zeros(weights.shape)
    for signal, wanted, lacking in reached:
        signal, wanted = _rows(kernel, signal), _rows(whole, wanted)
        sums, wanted = (ops.add(make(rows, ops.convert_to_tensor(matrix)), bias.sum(axis=0))
                        for rows, matrix, bias in zip((signal, wanted), first, last, strict=True))  # fmt: skip
        wanted = ops.subtract(ops.add(wanted, lacking), shift)
        missing = ops.subtract(wanted, sums)
        signal = ops.concatenate([signal, ops.ones_like(signal[:, :1])], axis=1) if biased else signal
        signal, powers = _near_one(signal)
        used = np.arange(len(weights))
        if not depthwise:
            used = np.flatnonzero(ops.convert_to_numpy(ops.any(signal != 0, axis=0)))  # removed units send nothing
            signal, powers = ops.take(signal, used, axis=1), powers[used]
        most = np.maximum(most, [ops.convert_to_numpy(ops.max(ops.abs(each), axis=0)) for each in (missing, wanted)])
        if exact:  # in float64, because duplicated inputs leave only the ridge to divide by
            signal, missing = (ops.convert_to_numpy(each).astype(np.float64) for each in (signal, missing))
            squares, mixed = signal.T @ signal, signal.T @ missing
        elif depthwise:
            squares = ops.convert_to_numpy(ops.einsum("ptu,psu->uts", signal, signal))
            mixed = ops.convert_to_numpy(ops.einsum("ptu,pu->tu", signal, missing))
        else:
            both = (ops.matmul(ops.transpose(signal), each) for each in (signal, missing))
            squares, mixed = map(ops.convert_to_numpy, both)
        if depthwise:
            gram += powers.T[:, :, None] * powers.T[:, None, :] * squares
            cross += powers * mixed
        else:
            gram[np.ix_(used, used)] += np.outer(powers, powers) * squares
            cross[used] += powers[:, None] * mixed
    alive &= units & (most[0] > 1e-5 * most[1])  # what is missing is more than rounding
    if depthwise:
        weights += _change_each(gram, cross, alive, ridge)
    else:
        _change(gram, cross, alive, ridge, exact, weights, target[:inputs])
    found = [kernel.tensor(weights[:inputs]), *([weights[inputs]] if biased else [])]
    if biased and kernel.bias is None:  # what to add to beta
        return [found[0].astype(ops.convert_to_numpy(kernel.weight).dtype), found[1]]
    olds = [ops.convert_to_numpy(each) for each in kernel.weights()]
    found += olds[len(found) :]
    return [new.reshape(old.shape).astype(old.dtype) for new, old in zip(found, olds, strict=True)]


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale != 0, 1 / np.where(scale != 0, scale, 1), 0)


def _change(gram, cross, alive, ridge: float, exact: bool, weights: np.ndarray, target: np.ndarray) -> None:
    """Change weights, in place, by what least squares say; `exact`: all columns have the same rows."""
    # What holds an input is the share of its outputs' energy that the mean input sends: scales of inputs and outputs
    # cancel out. The bias is held by its own energy.
    inputs, energy, squares = len(target), gram.diagonal(), target**2
    sent = squares @ (1 / np.maximum(energy[:inputs] @ squares, 1e-300)) * (energy[:inputs] > 0)
    strength = energy.copy()
    strength[:inputs][sent > 0] = np.mean((energy[:inputs] * sent)[sent > 0]) / sent[sent > 0] if sent.any() else 0
    rows, columns = np.flatnonzero((energy > 0) & alive.any(axis=1)), np.flatnonzero(alive.any(axis=0))
    if not (rows.size and columns.size):
        return
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


def _change_each(gram: np.ndarray, cross: np.ndarray, alive: np.ndarray, ridge: float) -> np.ndarray:
    """Return by what the weights of a depthwise kernel change: each column by its own products."""
    energy, eps = _diagonal(gram).copy(), 4 * np.finfo(float).eps * gram.shape[-1]
    _diagonal(gram)[...] += ridge * energy
    scale = np.sqrt(np.where(energy > 0, _diagonal(gram), 1.0))
    gram = gram / (scale[:, :, None] * scale[:, None, :])
    _diagonal(gram)[...] += eps
    alive = alive & (energy.T > 0)
    return _solve_within(gram, cross / scale.T * alive, alive) / scale.T


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
    harm = np.sum(found * (_times(gram, found) - 2 * cross), axis=0) > 0  # further from dense than before
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
