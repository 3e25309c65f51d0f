"""Convolutions and graphs: scores and repair against plain NumPy on explicit patches, in every precision, and exported."""

from functools import cache, partial
from itertools import product
from typing import NamedTuple

import keras
import numpy as np
import pytest
from hypothesis import given
from keras import layers, ops, tree
from networks import (
    assert_same_outputs,
    backward_elimination,
    bits,
    chain,
    fractions,
    greedy_selection,
    on_networks,
    predictions,
    random_network,
    seeds,
)

from pruning_utils import (
    NEURON_CRITERIA,
    WEIGHT_CRITERIA,
    apply_masks,
    cost,
    keep_masks,
    neuron_scores,
    outputs,
    prunable_layers,
    prunable_units,
    prune_and_repair,
    prune_neurons,
    prune_weights,
    repair,
    shrink,
    weight_scores,
)

EVERY = [*((weight_scores, name) for name in WEIGHT_CRITERIA), *((neuron_scores, name) for name in NEURON_CRITERIA)]
with_every_criterion = pytest.mark.parametrize(("scores", "criterion"), [each for each in EVERY if each[1] != "random"])
PRUNE = {"weights": prune_weights, "neurons": prune_neurons}
both_kinds = pytest.mark.parametrize("kind", PRUNE)
Conv, Norm, Dense = partial(layers.Conv2D, padding="same"), layers.BatchNormalization, layers.Dense
TINY = 1e-8  # a ridge


def filled(network, seed=0):
    rng = np.random.default_rng(seed)
    for weight in network.weights:
        if any(part in weight.name for part in ("gamma", "variance")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        else:
            size = np.prod(weight.shape[:-1]) ** -0.5 if "kernel" in weight.name else 0.3
            weight.assign(size * rng.normal(size=weight.shape))
    return network


def images(count=40, shape=(6, 6, 2), seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(0, 3, count)


def kernel_of(network, name):
    return ops.convert_to_numpy(network.get_layer(name).kernel).astype(np.float64)


def signals(network, names, x, which="input"):
    """What arrives at layers, or leaves them."""
    ends = [getattr(network.get_layer(name), which) for name in names]
    found = tree.flatten(keras.Model(network.inputs[0], ends)(x, training=False))
    return [np.float64(ops.convert_to_numpy(each)) for each in found]


def distance(network, other, x):
    return np.mean((np.float64(predictions(network, x)) - predictions(other, x)) ** 2)


def halved(network):
    """The network without every second unit."""
    return apply_masks(network, {name: np.arange(len(units)) % 2 == 0 for name, units in prunable_units(network).items()})


def twins(network):
    """Let every second channel of every layer but the last do what the one before it does."""
    for weight in network.weights:
        array = np.array(ops.convert_to_numpy(weight))
        if "logits" not in weight.path:
            turned = array.ndim > 1 and ("depthwise" in weight.path or "transpose" in weight.path)
            channels = array.swapaxes(-1, -2) if turned else array
            channels[..., 1::2] = channels[..., ::2]
        weight.assign(array)
    return network


# --- Scores against plain NumPy -----------------------------------------------------------------------------------


FORMS = {
    "Conv1D": partial(layers.Conv1D, 3, 3, strides=2, padding="same"),
    "Conv1D, causal": partial(layers.Conv1D, 3, 3, padding="causal", dilation_rate=2),
    "Conv2D": partial(layers.Conv2D, 3, (3, 2)),
    "Conv2D, stride": partial(layers.Conv2D, 3, 3, strides=2, padding="same"),
    "Conv2D, dilation": partial(layers.Conv2D, 3, 2, padding="same", dilation_rate=(2, 1), use_bias=False),
    "Conv2DTranspose": partial(layers.Conv2DTranspose, 3, 3, strides=2),
    "DepthwiseConv2D": partial(layers.DepthwiseConv2D, 3, strides=2, padding="same", depth_multiplier=2),
    "SeparableConv2D": partial(layers.SeparableConv2D, 3, (2, 3), depth_multiplier=2),
    "Conv3D": partial(layers.Conv3D, 2, 2, strides=(2, 1, 1)),
}


class Stage(NamedTuple):
    """A kernel, and what is multiplied by it: patches (images, positions, taps, inputs), and every input once."""

    name: str
    form: str
    kernel: np.ndarray
    patches: np.ndarray
    signal: np.ndarray
    gradients: np.ndarray  # of every image's loss
    mean: bool  # is made up for by a bias
    maker: object  # the stage that makes the units that come in,
    places: np.ndarray  # and their channels (units, channels of each)

    def taps(self, array):
        """(..., taps, inputs, units), or of a depthwise kernel (..., taps, inputs, multiples)."""
        array = array.reshape(*array.shape[: array.ndim - self.kernel.ndim], -1, *self.kernel.shape[-2:])
        return array.swapaxes(-1, -2) if self.form == "transposed" else array


def patches_of(layer, signal):
    """All that a kernel is laid on, by loops; zeros around the images included."""
    pads, steps = [], list(zip(layer.kernel_size, layer.dilation_rate, layer.strides, strict=True))
    for length, (size, rate, stride) in zip(signal.shape[1:-1], steps, strict=True):
        reach = (size - 1) * rate
        total = max((-(-length // stride) - 1) * stride + reach + 1 - length, 0)
        pads.append({"valid": (0, 0), "causal": (reach, 0), "same": (total // 2, total - total // 2)}[layer.padding])
    signal = np.pad(signal, [(0, 0), *pads, (0, 0)])
    starts = [range(0, length - (size - 1) * rate, stride)
              for length, (size, rate, stride) in zip(signal.shape[1:], steps, strict=False)]  # fmt: skip
    found = []
    for start in product(*starts):
        taps = [first + rate * np.arange(size) for first, (size, rate, _) in zip(start, steps, strict=True)]
        found.append(signal[:, *np.ix_(*taps)].reshape(len(signal), -1, signal.shape[-1]))
    return np.stack(found, axis=1)


def gradients_of(network, x, y):
    """The gradients of every image's loss by all weights: what a step of gradient descent takes away."""
    copy, found, before = keras.models.clone_model(network), [], network.get_weights()
    copy.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for image, label in zip(x, y, strict=True):
        copy.set_weights(before)
        copy.train_on_batch(image[None], label[None])
        found.append([np.float64(one) - other for one, other in zip(before, copy.get_weights(), strict=True)])
    return {weight.path: np.array(each) for weight, each in zip(network.weights, zip(*found, strict=True), strict=True)}


@cache
def case(form):
    layer = FORMS[form](activation="tanh", name="tested")
    rank, (x, y) = layer.rank, images(30, (8,) * layer.rank + (2,))
    pool = layer.compute_output_shape((None, *[8] * rank, 4))[rank] // 2
    conv, pooling = (getattr(layers, f"{kind}{rank}D") for kind in ("Conv", "MaxPooling"))
    parts = [conv(4, 1, activation="relu", name="front"), layer, pooling(pool), layers.Flatten(),
             Dense(3, "tanh", name="after"), Dense(3, name="logits")]  # fmt: skip
    network = filled(chain(*parts, inputs=x.shape[1:]))
    kernels = [part for part in parts if part.weights]
    found, gradients, maker, times = [], gradients_of(network, x, y), None, 1
    for layer, signal in zip(kernels, signals(network, [part.name for part in kernels], x), strict=True):
        bias = layer.bias is not None
        for weight in [weight for weight in layer.weights if "bias" not in weight.name]:
            part, kernel = weight.name.removesuffix("kernel").strip("_"), np.float64(ops.convert_to_numpy(weight))
            depthwise = part == "depthwise" or isinstance(layer, layers.DepthwiseConv2D)
            form = "transposed" if "Transpose" in type(layer).__name__ else "depthwise" if depthwise else "plain"
            count = len(x), -1, signal.shape[-1]
            plain = form == "transposed" or part == "pointwise" or isinstance(layer, Dense)
            patches = signal.reshape(count)[:, :, None] if plain else patches_of(layer, signal)
            units = np.arange(signal.shape[-1]) // times % (maker.taps(maker.kernel).shape[-1] if maker else 2)
            found.append(Stage(
                layer.name + f"/{part}" * bool(part), form, kernel, patches, signal.reshape(count),
                gradients[weight.path], bias and part != "depthwise" and form != "transposed", maker,
                np.array([np.flatnonzero(units == unit) for unit in range(max(units) + 1)]),
            ))  # fmt: skip
            times = 1
            if depthwise:
                times = kernel.shape[-1]
                signal = np.einsum("npti,tim->npim", patches, found[-1].taps(kernel))
                signal = signal.reshape(*signal.shape[:2], -1)
            else:
                maker = found[-1]
    return network, x, y, found


def counts_of(stages):
    """What errors of the units of every stage count."""
    counts = {stages[-1].name: np.ones(3)}
    for before, stage in zip(stages[-2::-1], stages[:0:-1], strict=True):
        kernel = stage.taps(stage.kernel)
        own = counts[stage.name].reshape(kernel.shape[1:] if stage.form == "depthwise" else -1)
        sent = np.sqrt(np.sum((kernel * own) ** 2, axis=(0, 2)))
        width = before.taps(before.kernel).shape[-1] * (len(before.kernel[0, 0]) if before.form == "depthwise" else 1)
        counts[before.name] = np.linalg.norm(sent.reshape(-1, width), axis=0)
    return counts


def eliminated(stage, count):
    kernel, mean = stage.taps(stage.kernel), stage.mean
    rows = stage.patches.reshape(-1, *stage.patches.shape[2:])
    if stage.form == "depthwise":
        found = np.zeros(kernel.shape)
        weighted, energy = kernel * count.reshape(kernel.shape[1:]), np.zeros(kernel.shape[1:])
        for place in np.ndindex(*kernel.shape[1:]):
            own = rows[:, :, place[0]]
            column = weighted[:, *place][:, None]
            found[:, *place] = backward_elimination(own, mean * own.mean(axis=0), column)[:, 0]
            centred = own - mean * own.mean(axis=0)
            energy[place] = np.sum((centred @ column) ** 2) + 1e-3 * np.sum(own**2, axis=0) @ column[:, 0] ** 2
        return found * energy / energy.sum()
    rows = rows.reshape(len(rows), -1)
    matrix = kernel * count
    if stage.form == "transposed":  # every tap makes sums of its own
        matrix = matrix.swapaxes(0, 1)
    found = backward_elimination(rows, mean * rows.mean(axis=0), matrix.reshape(rows.shape[1], -1))
    return found.reshape(matrix.shape).swapaxes(0, 1) if stage.form == "transposed" else found.reshape(kernel.shape)


def selected(stage, count):
    """Channels of a unit, and taps, are as many kernels side by side."""
    signal, kernel = stage.signal - stage.mean * stage.signal.mean(axis=(0, 1)), stage.taps(stage.kernel) * count
    rows = np.moveaxis(signal[..., stage.places], 2, -1).reshape(-1, len(stage.places))
    return greedy_selection(rows, np.moveaxis(kernel[:, stage.places], 1, 0).reshape(len(stage.places), -1))


def per_unit(stage, values):
    """Sums over the channels of every unit."""
    return values[..., stage.places].sum(axis=-1)


ORACLES = {  # of weights, from their stage; of units, from the stage that takes them
    (weight_scores, "magnitude"): lambda s, count: np.abs(s.taps(s.kernel)),
    (weight_scores, "activation"): lambda s, count: (
        np.abs(s.taps(s.kernel)) * np.sqrt(np.mean(s.patches**2, axis=(0, 1)))[:, :, None]
    ),
    (weight_scores, "taylor"): lambda s, count: s.taps(np.mean(np.abs(s.kernel * s.gradients), axis=0)),
    (weight_scores, "reconstruction"): eliminated,
    (neuron_scores, "norm"): lambda s, count: np.sqrt(np.sum(s.maker.taps(s.maker.kernel) ** 2, axis=(0, 1))),
    (neuron_scores, "activation"): lambda s, count: np.sqrt(
        per_unit(s, np.mean(s.signal**2, axis=(0, 1)) * np.sum(s.taps(s.kernel) ** 2, axis=(0, 2)))
    ),
    (neuron_scores, "taylor"): lambda s, count: np.mean(
        np.abs(per_unit(s, s.taps(s.kernel * s.gradients).sum(axis=(1, 3)))), axis=0
    ),
    (neuron_scores, "reconstruction"): selected,
}


@with_every_criterion
@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_plain_numpy(form, scores, criterion):
    network, x, y, stages = case(form)
    found, counts = scores(network, criterion, x, y), counts_of(stages)
    if scores is weight_scores:
        wanted = {stage.name: stage for stage in stages[:-1]}
    else:
        wanted = {stage.maker.name.removesuffix("/pointwise"): stage for stage in stages[1:] if stage.form != "depthwise"}
    assert list(found) == list(wanted)
    for name, stage in wanted.items():
        expected = ORACLES[scores, criterion](stage, counts[stage.name])
        got = stage.taps(found[name]) if scores is weight_scores else found[name]
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


@with_every_criterion
def test_1x1_convolutions_of_single_pixels_score_as_a_dense_network_does(scores, criterion):
    plain, (x, y) = random_network(), images(50, (6,))
    parts = Conv(12, 1, activation="relu", name="hidden_1"), Conv(8, 1, activation="relu", name="hidden_2")
    convolved = chain(*parts, layers.Flatten(), Dense(4, name="logits"), inputs=(1, 1, 6))
    convolved.set_weights([old.reshape(new.shape) for old, new in zip(plain.get_weights(), convolved.weights, strict=True)])
    found = scores(convolved, criterion, x[:, None, None], y)
    for name, expected in scores(plain, criterion, x, y).items():
        np.testing.assert_allclose(found[name].reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


def test_units_of_a_sum_score_by_all_that_makes_them_and_all_that_takes_them():
    start = keras.Input((6, 6, 2))
    t = Conv(4, 1, name="skip")(start)
    t = layers.Add()([t, Conv(4, 3, name="branch")(layers.ReLU()(t))])
    ends = [layers.Flatten()(layers.MaxPool2D(3)(taker(t))) for taker in (Conv(3, 3, name="one"), Conv(2, 1, name="two"))]
    network, (x, y) = filled(keras.Model(start, Dense(3, name="logits")(layers.Concatenate()(ends)))), images(20)
    skip, branch, one, two = kernels = [kernel_of(network, name) for name in ("skip", "branch", "one", "two")]
    size = lambda kernel, axis: np.linalg.norm(np.moveaxis(kernel, axis, 0).reshape(4, -1), axis=1)  # noqa: E731
    sums, before = signals(network, ["one", "branch"], x)
    rms = [np.sqrt(np.mean(each**2, axis=(0, 1, 2))) for each in (sums, before)]
    expected = {"norm": np.hypot(size(skip, 3), size(branch, 3))}
    expected["activation"] = np.sqrt((rms[0] * size(one, 2)) ** 2 + (rms[0] * size(two, 2)) ** 2 + (rms[1] * size(branch, 2)) ** 2)
    effects = [(k * g).sum(axis=(1, 2, 4)) for k, g in zip(kernels, (gradients_of(network, x, y)[f"{n}/kernel"] for n in ("skip", "branch", "one", "two")), strict=True)]
    expected["taylor"] = np.mean(np.abs(sum(effects[1:])), axis=0)
    for criterion, wanted in expected.items():
        np.testing.assert_allclose(neuron_scores(network, criterion, x, y)["skip"], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scores", [weight_scores, neuron_scores])
def test_filters_scaled_on_the_way_in_and_back_on_the_way_out_are_chosen_alike(scores):
    def build():
        return filled(chain(
            Conv(6, 3, name="one"), Norm(name="norm"), layers.ReLU(), Conv(5, 3, activation="relu", name="two"),
            layers.GlobalAveragePooling2D(), Dense(3, name="logits"), inputs=(6, 6, 2),
        ))  # fmt: skip

    plain, scaled, (x, _), (into, out) = build(), build(), images(), 10.0 ** np.array([[-1, 0, 1, 2, -1, 1], [1, -2, 0, 1, 2, -1]])
    one, norm, two = (scaled.get_layer(name) for name in ("one", "norm", "two"))
    (kernel, bias), (gamma, beta, mean, variance), (after, rest) = (each.get_weights() for each in (one, norm, two))
    one.set_weights([kernel * into, bias * into])
    norm.set_weights([gamma * out, beta * out, mean * into, (variance + norm.epsilon) * into**2 - norm.epsilon])
    two.set_weights([after / out[:, None], rest])
    assert_same_outputs(scaled, plain, x)
    for name, score in scores(plain, "reconstruction", x).items():
        np.testing.assert_allclose(scores(scaled, "reconstruction", x)[name], score, rtol=0.01, atol=1e-4 * score.max())


# --- Kernels that are parts of a layer ----------------------------------------------------------------------------


def with_attention():
    start = keras.Input((5, 4))
    t = layers.MultiHeadAttention(4, 3, value_dim=2, name="attention")(start, start)
    return filled(keras.Model(start, Dense(3, name="logits")(layers.GlobalAveragePooling1D()(Dense(6, "relu", name="after")(t)))))


def separated():
    return filled(chain(layers.SeparableConv2D(6, 3, name="first", activation="relu"), layers.Flatten(), Dense(3, name="logits"),
                        inputs=(6, 6, 2)))  # fmt: skip


@pytest.mark.parametrize(("build", "parts", "units"), [
    (separated, ["first/depthwise", "first/pointwise"], {"first": 6}),
    (with_attention, [*(f"attention/{part}" for part in ("query", "key", "value", "output")), "after"],
     {"attention": 4, "attention/output": 4, "after": 6}),
])  # fmt: skip
def test_parts_of_a_layer_have_names_of_their_own_and_masks_of_their_kernels_shapes(build, parts, units):
    network = build()
    scores, (x, y) = weight_scores(network), images(20, network.input_shape[1:])
    assert list(scores) == parts
    assert {name: len(each) for name, each in prunable_units(network).items()} == units
    assert not any("logits" in layer.path for layer in prunable_layers(network))
    for name, score in scores.items():
        mask = np.arange(score.size).reshape(score.shape) % 3 > 0
        changed = [(a, b) for a, b in zip(network.get_weights(), apply_masks(network, {name: mask}).get_weights(), strict=True)
                   if a.tobytes() != b.tobytes()]  # fmt: skip
        ((before, after),) = changed
        np.testing.assert_array_equal(after, before * mask)
    for criterion in NEURON_CRITERIA:
        masked = prune_neurons(network, 0.5, criterion, x=x, y=y, seed=0)
        small = shrink(masked)
        assert {name: len(each) for name, each in prunable_units(small).items()} == {n: c // 2 for n, c in units.items()}
        assert_same_outputs(small, masked, x)
    for criterion in WEIGHT_CRITERIA:
        left = cost(prune_weights(network, 0.5, criterion, x=x, y=y, seed=0))["weights_left"]
        assert left <= sum(score.size for score in scores.values()) / 2


def test_single_heads_go():
    network = with_attention()
    small = shrink(apply_masks(network, {"attention": np.array([True, False, False, True])}))
    assert small.get_layer("attention").num_heads == 2
    np.testing.assert_array_equal(small.get_layer("attention")._query_dense.kernel, np.asarray(network.get_layer("attention")._query_dense.kernel)[:, [0, 3]])


# --- Repair -------------------------------------------------------------------------------------------------------


def of(*parts, inputs=(6, 6, 2), pool=2):
    return filled(chain(*parts, layers.AveragePooling2D(pool), layers.Flatten(), Dense(3, name="logits"), inputs=inputs))


def residual(norm=True, seed=0, use_bias=True, **settings):
    """A convolution, a block with a shortcut, and one whose shortcut has a convolution of its own."""
    start = t = keras.Input((6, 6, 2), dtype=settings.pop("inputs", None))
    make = lambda *args: Conv(*args, use_bias=use_bias, **settings)  # noqa: E731
    normalise = (lambda t: Norm(**settings)(t)) if norm else (lambda t: t)
    act = layers.ReLU(**settings)
    t = act(normalise(make(6, 3)(t)))
    t = act(layers.Add(**settings)([t, normalise(make(6, 3)(act(normalise(make(8, 3)(t)))))]))
    t = act(layers.Add(**settings)([normalise(make(8, 1)(t)), normalise(make(8, 3)(act(normalise(make(8, 3)(t)))))]))
    t = layers.GlobalAveragePooling2D(**settings)(t)
    return filled(keras.Model(start, Dense(3, name="logits", **settings)(t)), seed)


def with_shared():
    start = keras.Input((6, 6, 2))
    shared = Conv(6, 3, activation="relu", name="shared")
    t = Conv(6, 3, activation="relu")(start)
    t = layers.Concatenate()([shared(t), shared(layers.AveragePooling2D(1)(t))])
    return filled(keras.Model(start, Dense(3, name="logits")(layers.GlobalAveragePooling2D()(Conv(4, 1)(t)))))


CHAINS = {
    "bias": lambda: of(Conv(6, 3, activation="relu"), Conv(4, 3, activation="relu")),
    "no bias": lambda: of(Conv(6, 3, activation="relu", use_bias=False), Conv(4, 3, activation="tanh", use_bias=False)),
    "normalisation": lambda: of(Conv(6, 3, use_bias=False), Norm(), layers.ReLU(), Conv(4, 3, strides=2), Norm()),
    "depthwise": lambda: of(Conv(6, 3, activation="relu"), layers.DepthwiseConv2D(3, activation="relu"), Conv(4, 1)),
    "separable": lambda: of(layers.SeparableConv2D(6, 3, activation="relu"), layers.SeparableConv2D(4, 3)),
    "transposed": lambda: of(Conv(6, 3), layers.Conv2DTranspose(6, 3, strides=2, activation="relu"), Conv(4, 3), pool=4),
    "dilation": lambda: of(Conv(6, 3, dilation_rate=2, activation="relu"), layers.ZeroPadding2D(), Conv(4, 2, strides=2)),
    "residual": lambda: residual(norm=False),
    "residual, normalisation": lambda: residual(use_bias=False),
    "shared": with_shared,
}  # fmt: skip


@pytest.mark.parametrize("build", CHAINS.values(), ids=CHAINS)
def test_filters_that_repeat_others_can_go_without_a_trace(build):
    network, (x, _), (new, _) = twins(build()), images(60), images(20, seed=7)
    pruned = halved(network)
    assert distance(pruned, network, new) > 1e-4
    repaired = repair(pruned, network, x, TINY)
    for found in (repaired, shrink(repaired)):
        assert_same_outputs(found, network, new, rtol=3e-3)


@both_kinds
@on_networks
@given(seeds, fractions)
def test_repair_brings_outputs_of_a_chain_closer(kind, seed, sparsity):
    network, (x, _) = filled(CHAINS["bias"](), seed), images(40, seed=seed)
    pruned = PRUNE[kind](network, sparsity)
    assert distance(repair(pruned, network, x), network, x) <= distance(pruned, network, x) + 1e-9


@both_kinds
@pytest.mark.parametrize("build", CHAINS.values(), ids=CHAINS)
def test_zeros_stay_zero_and_so_do_statistics_and_gamma(kind, build):
    network, (x, _) = build(), images(40)
    pruned = PRUNE[kind](network, 0.5, "random", seed=1)
    repaired = repair(pruned, network, x)
    for weight, before, after in zip(pruned.weights, pruned.get_weights(), repaired.get_weights(), strict=True):
        if any(part in weight.name for part in ("gamma", "moving")):
            assert before.tobytes() == after.tobytes()
        elif "kernel" in weight.name or kind == "neurons":
            assert not after[before == 0].any()
    assert distance(repaired, network, x) < distance(pruned, network, x)
    assert cost(repaired)["weights_left"] == cost(pruned)["weights_left"]


def fitted(rows, wanted, ones=True):
    """What least squares makes of what is wanted."""
    rows = np.hstack([rows, np.ones((len(rows), int(ones)))])
    return rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("layer", [
    partial(Conv, 4, 3, strides=2), partial(Conv, 4, 2, use_bias=False), partial(layers.DepthwiseConv2D, 3, padding="same"),
    partial(layers.DepthwiseConv2D, 2, depth_multiplier=2, use_bias=False), partial(layers.Conv2D, 4, (3, 2), dilation_rate=(1, 2)),
])  # fmt: skip
def test_a_kernel_is_fitted_in_least_squares_on_patches(layer):
    layer = layer(name="tested")
    network, (x, _) = of(Conv(6, 3, activation="relu", name="front"), layer, Conv(3, 1)), images(60)
    pruned = apply_masks(network, {"front": np.arange(6) % 2 == 0})
    repaired = repair(pruned, network, x, TINY)
    (inputs,), (found,), (wanted,) = (signals(each, ["tested"], x, which) for each, which in
                                      ((repaired, "input"), (repaired, "output"), (network, "output")))  # fmt: skip
    rows, depthwise = patches_of(layer, inputs), isinstance(layer, layers.DepthwiseConv2D)
    rows, found, wanted = rows.reshape(-1, *rows.shape[2:]), found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    if depthwise:
        each = [fitted(rows[:, :, unit // layer.depth_multiplier], column, layer.use_bias) for unit, column in enumerate(wanted.T)]
        expected = np.where(found.any(axis=0), np.stack(each, axis=1), 0)
    else:
        expected = fitted(rows.reshape(len(rows), -1), wanted, layer.use_bias)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(wanted).max())


def test_single_weights_of_the_first_kernel_are_fitted_in_least_squares_on_patches():
    network, (x, _) = of(Conv(4, 3, name="first"), layers.ReLU(), Conv(3, 1)), images(60)
    pruned = prune_weights(network, 0.5)
    repaired = repair(pruned, network, x, TINY)
    layer = network.get_layer("first")
    rows = patches_of(layer, np.float64(x)).reshape(-1, 18)
    wanted = rows @ kernel_of(network, "first").reshape(18, 4) + ops.convert_to_numpy(layer.bias)
    found = rows @ kernel_of(repaired, "first").reshape(18, 4) + ops.convert_to_numpy(repaired.get_layer("first").bias)
    for unit, left in enumerate(kernel_of(pruned, "first").reshape(18, 4).T != 0):
        np.testing.assert_allclose(found[:, unit], fitted(rows[:, left], wanted[:, unit]), atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_makes_up_for_what_its_shortcut_lost(norm):
    start = keras.Input((6, 6, 2))
    normalise = (lambda t: Norm()(t)) if norm else (lambda t: t)
    skip, wide = normalise(Conv(4, 1, name="skip")(start)), Conv(5, 1, name="wide")(start)  # wide has all that skip has
    t = layers.Add()([skip, normalise(Conv(4, 1, name="branch")(wide))])
    network = filled(keras.Model(start, Dense(3, name="logits")(layers.GlobalAveragePooling2D()(layers.ReLU()(t)))))
    (x, _), mask = images(60), np.ones((1, 1, 2, 4), bool)
    mask[..., 0, :] = False
    pruned = apply_masks(network, {"skip": mask})
    repaired = repair(pruned, network, x, TINY)
    for name in ("skip", "branch"):
        after, before = (kernel_of(each, name) for each in (repaired, network))
        assert np.abs(after - before).max() > 0.1
    assert_same_outputs(repaired, network, images(20, seed=7)[0], rtol=1e-3)


@both_kinds
@pytest.mark.parametrize("name", ["residual, normalisation", "depthwise", "separable", "transposed", "shared"])
def test_batches_make_no_difference(kind, name):
    network, (x, _) = CHAINS[name](), images(50)
    pruned = PRUNE[kind](network, 0.5)
    at_once, in_parts = (repair(pruned, network, x, batch_size=size) for size in (50, 17))
    assert_same_outputs(in_parts, at_once, x, rtol=1e-4)
    assert distance(in_parts, pruned, x) > 1e-6


@both_kinds
def test_networks_with_several_inputs_are_repaired(kind):
    start = [keras.Input((6, 6, 2)), keras.Input((3,))]
    t = Conv(6, 3, activation="relu")(start[0])
    t = layers.Multiply()([t, layers.Reshape((1, 1, 6))(Dense(6, "sigmoid")(start[1]))])
    network = filled(keras.Model(start, Dense(3, name="logits")(layers.GlobalAveragePooling2D()(Conv(6, 3)(t)))))
    x = [images()[0], images(shape=(3,))[0]]
    pruned = PRUNE[kind](network, 0.5)
    errors = [np.mean((outputs(each, x) - outputs(network, x)) ** 2) for each in (repair(pruned, network, x), pruned)]
    assert errors[0] < errors[1] / 2


@both_kinds
@pytest.mark.parametrize("seed", range(3))
def test_choosing_again_is_not_much_worse(kind, seed):
    network, (x, _) = residual(seed=seed), images(60)
    again = prune_and_repair(network, 0.5, x, kind)
    pruned = PRUNE[kind](network, 0.5, "reconstruction", x=x)
    assert cost(again)["weights_left"] <= 1.1 * cost(pruned)["weights_left"]
    errors = [distance(each, network, x) for each in (again, repair(pruned, network, x), pruned)]
    assert errors[0] < 1.5 * errors[1] and errors[0] < errors[2]


# --- Numbers of every kind, and files -----------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(("policy", "rtol"), [
    ("float64", 1e-5), ("mixed_float16", 0.01), ("float16", 0.02), ("mixed_bfloat16", 0.05), ("bfloat16", 0.1),
])  # fmt: skip
def test_networks_of_every_precision_are_pruned_shrunk_and_repaired(kind, policy, rtol):
    network, twin, (x, _) = residual(dtype=policy), residual(), images()
    repaired = repair(PRUNE[kind](network, 0.5), network, x)
    for each in (PRUNE[kind](network, 0.5), repaired, prune_and_repair(network, 0.5, x, kind)):
        small = shrink(each)
        assert [layer.dtype_policy for layer in small.layers] == [layer.dtype_policy for layer in network.layers]
        assert [weight.dtype for weight in small.weights] == [weight.dtype for weight in network.weights]
        assert all(np.isfinite(np.float64(weight)).all() for weight in each.get_weights())
        wanted = np.float64(predictions(each, x))
        np.testing.assert_allclose(np.float64(predictions(small, x)), wanted, rtol=0, atol=rtol * np.abs(wanted).max())
    expected = np.float64(predictions(repair(PRUNE[kind](twin, 0.5), twin, x), x))
    np.testing.assert_allclose(np.float64(outputs(repaired, x)), expected, rtol=0, atol=0.15 * np.abs(expected).max())


def test_a_shrunk_network_is_saved_and_loaded(tmp_path):
    (x, _), network = images(), residual()
    small = shrink(repair(prune_neurons(network, 0.5), network, x))
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert bits(loaded) == bits(small) and loaded.count_params() < network.count_params() / 2
    np.testing.assert_array_equal(predictions(loaded, x), predictions(small, x))


@pytest.mark.filterwarnings("ignore")
def test_a_shrunk_network_runs_in_onnx_runtime(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("Keras exports with TensorFlow")
    for package in ("onnx", "tf2onnx"):
        pytest.importorskip(package)
    runtime, (x, _), network = pytest.importorskip("onnxruntime"), images(), residual()
    small = shrink(repair(prune_neurons(network, 0.5), network, x))
    expected = predictions(small, x)  # Keras exports what has been called
    small.export(tmp_path / "small.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
