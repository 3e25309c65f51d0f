"""Convolutions and graphs: scores and repair against plain NumPy on explicit patches; precisions; exported files."""

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

import pruning_utils
from pruning_utils import apply_masks, cost, neuron_scores, outputs, prune_and_repair, repair, shrink, weight_scores

CRITERIA = {weight_scores: pruning_utils.WEIGHT_CRITERIA, neuron_scores: pruning_utils.NEURON_CRITERIA}
EVERY = [(scores, name) for scores, names in CRITERIA.items() for name in names if name != "random"]
with_every_criterion = pytest.mark.parametrize(("scores", "criterion"), EVERY)
PRUNE = {"weights": pruning_utils.prune_weights, "neurons": pruning_utils.prune_neurons}
both_kinds = pytest.mark.parametrize("kind", PRUNE)
Norm, Dense, Depthwise = layers.BatchNormalization, layers.Dense, layers.DepthwiseConv2D
Conv = partial(layers.Conv2D, padding="same")
Relu = partial(Conv, activation="relu")
TINY = 1e-8  # a ridge


def filled(network, seed=0):
    rng = np.random.default_rng(seed)
    for weight in network.weights:
        size = np.prod(weight.shape[:-1]) ** -0.5 if "kernel" in weight.name else 0.3
        positive = any(part in weight.name for part in ("gamma", "variance"))
        weight.assign(rng.uniform(0.5, 1.5, weight.shape) if positive else size * rng.normal(size=weight.shape))
    return network


def images(count=40, shape=(6, 6, 2), seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(0, 3, count)


def array(weight):
    return ops.convert_to_numpy(weight).astype(np.float64)


def signals(network, names, x, which="input"):
    """What arrives at layers, or leaves them."""
    ends = [getattr(network.get_layer(name), which) for name in names]
    return list(map(array, tree.flatten(keras.Model(network.inputs[0], ends)(x, training=False))))


def distance(network, other, x):
    return np.mean((np.float64(predictions(network, x)) - predictions(other, x)) ** 2)


# --- Scores against plain NumPy -----------------------------------------------------------------------------------


FORMS = {
    "1D": partial(layers.Conv1D, 3, 3, strides=2, padding="same"),
    "causal": partial(layers.Conv1D, 3, 3, padding="causal", dilation_rate=2),
    "valid": partial(layers.Conv2D, 3, (3, 2)),
    "stride": partial(layers.Conv2D, 3, 3, strides=2, padding="same"),
    "dilation": partial(layers.Conv2D, 3, 2, padding="same", dilation_rate=(2, 1), use_bias=False),
    "transposed": partial(layers.Conv2DTranspose, 3, 3, strides=2),
    "depthwise": partial(Depthwise, 3, strides=2, padding="same", depth_multiplier=2),
    "separable": partial(layers.SeparableConv2D, 3, (2, 3), depth_multiplier=2),
    "3D": partial(layers.Conv3D, 2, 2, strides=(2, 1, 1)),
}


class Stage(NamedTuple):
    """A kernel, and what is multiplied by it: patches (images, positions, taps, inputs), and every input once."""

    name: str
    form: str
    kernel: np.ndarray
    patches: np.ndarray
    signal: np.ndarray
    gradients: np.ndarray  # of every image's loss
    mean: bool  # a bias makes up for it
    maker: object  # the stage whose units come in,
    places: np.ndarray  # and where (units, channels of each)

    def taps(self, kernel):
        """(..., taps, inputs, units), or of a depthwise kernel (..., taps, inputs, multiples)."""
        kernel = kernel.reshape(*kernel.shape[: kernel.ndim - self.kernel.ndim], -1, *self.kernel.shape[-2:])
        return kernel.swapaxes(-1, -2) if self.form == "transposed" else kernel

    def per_unit(self, values):
        return values[..., self.places].sum(axis=-1)


def patches_of(layer, signal):
    """All that a kernel is laid on, by loops; zeros around the images included."""
    pads, starts, steps = [], [], list(zip(layer.kernel_size, layer.dilation_rate, layer.strides, strict=True))
    for length, (size, rate, stride) in zip(signal.shape[1:-1], steps, strict=True):
        reach = (size - 1) * rate
        total = max((-(-length // stride) - 1) * stride + reach + 1 - length, 0)
        pads.append({"valid": (0, 0), "causal": (reach, 0), "same": (total // 2, total - total // 2)}[layer.padding])
        starts.append(range(0, length + sum(pads[-1]) - reach, stride))
    signal, found = np.pad(signal, [(0, 0), *pads, (0, 0)]), []
    for start in product(*starts):
        taps = [first + rate * np.arange(size) for first, (size, rate, _) in zip(start, steps, strict=True)]
        found.append(signal[(slice(None), *np.ix_(*taps))].reshape(len(signal), -1, signal.shape[-1]))
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
    found, gradients, maker, times, units = [], gradients_of(network, x, y), None, 1, 2
    kernels = [part for part in parts if part.weights]
    for layer, signal in zip(kernels, signals(network, [part.name for part in kernels], x), strict=True):
        for weight in [weight for weight in layer.weights if "bias" not in weight.name]:
            part, kernel = weight.name.removesuffix("kernel").strip("_"), array(weight)
            kind = "depthwise" if part == "depthwise" else form if layer.name == "tested" and not part else ""
            rows = signal.reshape(len(x), -1, signal.shape[-1])
            whole = part == "pointwise" or kind == "transposed" or isinstance(layer, Dense)
            patches, whose = rows[:, :, None] if whole else patches_of(layer, signal), np.arange(signal.shape[-1])
            biased = layer.use_bias and part != "depthwise" and kind != "transposed"
            places = np.array([np.flatnonzero(whose // times % units == unit) for unit in range(units)])
            name = layer.name + f"/{part}" * bool(part)
            stage = Stage(name, kind, kernel, patches, rows, gradients[weight.path], biased, maker, places)
            found.append(stage)
            times = kernel.shape[-1] if kind == "depthwise" else 1
            if times > 1:
                signal = np.einsum("npti,tim->npim", patches, stage.taps(kernel)).reshape(*patches.shape[:2], -1)
            else:
                maker, units = stage, stage.taps(kernel).shape[-1]
    return network, x, y, found


def counts_of(stages):
    """What errors count: of the units of every stage, by the norm of what they are multiplied by on their way."""
    counts, sent = {}, np.ones(3)
    for stage in reversed(stages):
        kernel = stage.taps(stage.kernel)
        shape = kernel.shape[1:] if stage.form == "depthwise" else kernel.shape[2:]
        counts[stage.name] = np.linalg.norm(sent.reshape(-1, *shape), axis=0)
        sent = np.sqrt(np.sum((kernel * counts[stage.name]) ** 2, axis=(0, 2)))
    return counts


def eliminated(stage, count):
    kernel, rows = stage.taps(stage.kernel) * count, stage.patches.reshape(-1, *stage.patches.shape[2:])
    if stage.form == "depthwise":
        found, energy = np.zeros(kernel.shape), np.zeros(kernel.shape[1:])
        for place in np.ndindex(energy.shape):
            own, column = rows[:, :, place[0]], kernel[(slice(None), *place)][:, None]
            mean = stage.mean * own.mean(axis=0)
            energy[place] = np.sum(((own - mean) @ column) ** 2) + 1e-3 * np.sum(own**2 @ column**2)
            found[(slice(None), *place)] = backward_elimination(own, mean, column)[:, 0]
        return found * energy / energy.sum()
    rows, turned = rows.reshape(len(rows), -1), stage.form == "transposed"  # whose taps make sums of their own
    kernel = kernel.swapaxes(0, 1) if turned else kernel
    found = backward_elimination(rows, stage.mean * rows.mean(axis=0), kernel.reshape(rows.shape[1], -1))
    return found.reshape(kernel.shape).swapaxes(0, 1) if turned else found.reshape(kernel.shape)


def selected(stage, count):
    """Channels of a unit, and taps, are as many kernels side by side."""
    signal, kernel = stage.signal - stage.mean * stage.signal.mean(axis=(0, 1)), stage.taps(stage.kernel) * count
    rows = np.moveaxis(signal[..., stage.places], 2, -1).reshape(-1, len(stage.places))
    return greedy_selection(rows, np.moveaxis(kernel[:, stage.places], 1, 0).reshape(len(stage.places), -1))


def squares(values, *axes):
    return np.sum(values**2, axis=axes)


def energy(signal):
    return np.mean(signal**2, axis=(0, 1))


# Of weights, from a stage, its kernel (taps, inputs, units), weights times gradients per image, and what errors count;
# of units, from the same of the stage that takes them.
ORACLES = {
    (weight_scores, "magnitude"): lambda s, k, g, c: np.abs(k),
    (weight_scores, "activation"): lambda s, k, g, c: np.abs(k) * np.sqrt(energy(s.patches))[:, :, None],
    (weight_scores, "taylor"): lambda s, k, g, c: np.mean(np.abs(g), axis=0),
    (weight_scores, "reconstruction"): lambda s, k, g, c: eliminated(s, c),
    (neuron_scores, "norm"): lambda s, k, g, c: np.sqrt(squares(s.maker.taps(s.maker.kernel), 0, 1)),
    (neuron_scores, "activation"): lambda s, k, g, c: np.sqrt(s.per_unit(energy(s.signal) * squares(k, 0, 2))),
    (neuron_scores, "taylor"): lambda s, k, g, c: np.mean(np.abs(s.per_unit(g.sum(axis=(1, 3)))), axis=0),
    (neuron_scores, "reconstruction"): lambda s, k, g, c: selected(s, c),
}


@with_every_criterion
@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_plain_numpy(form, scores, criterion):
    network, x, y, stages = case(form)
    found, counts, weights = scores(network, criterion, x, y), counts_of(stages), scores is weight_scores
    wanted = {(s if weights else s.maker).name.removesuffix("" if weights else "/pointwise"): s
              for s in (stages[:-1] if weights else stages[1:]) if weights or s.form != "depthwise"}  # fmt: skip
    assert list(found) == list(wanted)
    for name, stage in wanted.items():
        kernel, effects = stage.taps(stage.kernel), stage.taps(stage.kernel * stage.gradients)
        expected = ORACLES[scores, criterion](stage, kernel, effects, counts[stage.name])
        got = stage.taps(found[name]) if weights else found[name]
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4 * np.abs(expected).max())


@with_every_criterion
def test_1x1_convolutions_of_single_pixels_score_as_a_dense_network_does(scores, criterion):
    plain, (x, y) = random_network(), images(50, (6,))
    parts = [Relu(12, 1, name="hidden_1"), Relu(8, 1, name="hidden_2"), layers.Flatten(), Dense(4, name="logits")]
    pixels = chain(*parts, inputs=(1, 1, 6))
    pixels.set_weights([old.reshape(new.shape) for old, new in zip(plain.get_weights(), pixels.weights, strict=True)])
    found = scores(pixels, criterion, x[:, None, None], y)
    for name, expected in scores(plain, criterion, x, y).items():
        np.testing.assert_allclose(found[name].reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


def test_units_of_a_sum_score_by_all_that_makes_them_and_all_that_takes_them():
    start, names = keras.Input((6, 6, 2)), ("skip", "branch", "one", "two")
    t = Conv(4, 1, name="skip")(start)
    t = layers.Add()([t, Conv(4, 3, name="branch")(layers.ReLU()(t))])
    ends = [layers.Flatten()(layers.MaxPool2D(3)(end(t))) for end in (Conv(3, 3, name="one"), Conv(2, 1, name="two"))]
    network, (x, y) = filled(keras.Model(start, Dense(3)(layers.Concatenate()(ends)))), images(20)
    skip, branch, one, two = kernels = [array(network.get_layer(name).kernel) for name in names]
    before, after = (np.mean(each**2, axis=(0, 1, 2)) for each in signals(network, ["branch", "one"], x))
    taken = squares(one, 0, 1, 3) + squares(two, 0, 1, 3)
    gradients = gradients_of(network, x, y)
    effects = [
        np.sum(kernel * gradients[f"{n}/kernel"], axis=(1, 2, 4)) for n, kernel in zip(names, kernels, strict=True)
    ]
    expected = {"norm": np.sqrt(squares(skip, 0, 1, 2) + squares(branch, 0, 1, 2)),
                "activation": np.sqrt(after * taken + before * squares(branch, 0, 1, 3)),
                "taylor": np.mean(np.abs(sum(effects[1:])), axis=0)}  # fmt: skip
    for criterion, wanted in expected.items():
        np.testing.assert_allclose(neuron_scores(network, criterion, x, y)["skip"], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scores", CRITERIA)
def test_filters_scaled_on_the_way_in_and_back_on_the_way_out_are_chosen_alike(scores):
    plain, scaled = (of(Conv(6, 3), Norm(), layers.ReLU(), Relu(5, 3)) for _ in range(2))
    (x, _), (into, out) = images(), 10.0 ** np.array([[-1, 0, 1, 2, -1, 1], [1, -2, 0, 1, 2, -1]])
    kernel, bias, gamma, beta, mean, variance, after, *rest = scaled.get_weights()
    small = scaled.layers[1].epsilon
    statistics = mean * into, (variance + small) * into**2 - small
    scaled.set_weights([kernel * into, bias * into, gamma * out, beta * out, *statistics, after / out[:, None], *rest])
    assert_same_outputs(scaled, plain, x)
    found, expected = (scores(network, "reconstruction", x).values() for network in (scaled, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.01, atol=1e-4 * other.max())


# --- Kernels that are parts of a layer ----------------------------------------------------------------------------


def attentive():
    start = keras.Input((5, 4))
    t = layers.MultiHeadAttention(4, 3, name="attention")(start, start)
    t = layers.GlobalAveragePooling1D()(Dense(6, "relu", name="after")(t))
    return filled(keras.Model(start, Dense(3, name="logits")(t)))


@pytest.mark.parametrize(("build", "names", "units"), [
    (lambda: of(layers.SeparableConv2D(6, 3, name="first", activation="relu")), ["first/depthwise", "first/pointwise"],
     {"first": 6}),
    (attentive, [*(f"attention/{part}" for part in ("query", "key", "value", "output")), "after"],
     {"attention": 4, "attention/output": 4, "after": 6}),
])  # fmt: skip
def test_parts_of_a_layer_have_names_of_their_own_and_masks_of_their_kernels_shapes(build, names, units):
    def sizes(network):
        return {name: len(each) for name, each in pruning_utils.prunable_units(network).items()}

    network = build()
    scores, (x, y), half = (
        weight_scores(network),
        images(20, network.input_shape[1:]),
        {n: c // 2 for n, c in units.items()},
    )
    assert list(scores) == names and sizes(network) == units
    assert not any("logits" in layer.path for layer in pruning_utils.prunable_layers(network))
    for name, score in scores.items():
        mask = np.arange(score.size).reshape(score.shape) % 3 > 0
        pairs = zip(network.get_weights(), apply_masks(network, {name: mask}).get_weights(), strict=True)
        ((before, after),) = [pair for pair in pairs if pair[0].tobytes() != pair[1].tobytes()]
        np.testing.assert_array_equal(after, before * mask)
    for kind, criteria in zip(PRUNE, CRITERIA.values(), strict=True):
        for criterion in criteria:
            masked = PRUNE[kind](network, 0.5, criterion, x=x, y=y, seed=0)
            assert sizes(shrink(masked)) == half if kind == "neurons" else cost(masked)["weights_left"] > 0
            assert_same_outputs(shrink(masked), masked, x)


# --- Repair -------------------------------------------------------------------------------------------------------


def of(*parts, inputs=(6, 6, 2), pool=2):
    return filled(
        chain(*parts, layers.AveragePooling2D(pool), layers.Flatten(), Dense(3, name="logits"), inputs=inputs)
    )


def residual(norm=True, seed=0, **settings):
    """A convolution, a block with a shortcut, and one whose shortcut has a convolution of its own."""

    def conv(t, *size):
        t = Conv(*size, use_bias=not norm, **settings)(t)
        return Norm(**settings)(t) if norm else t

    start, relu = keras.Input((6, 6, 2)), layers.ReLU(**settings)
    t = relu(conv(start, 6, 3))
    t = relu(layers.Add(**settings)([t, conv(relu(conv(t, 8, 3)), 6, 3)]))
    t = relu(layers.Add(**settings)([conv(t, 8, 1), conv(relu(conv(t, 8, 3)), 8, 3)]))
    return filled(keras.Model(start, Dense(3, name="logits", **settings)(layers.GlobalAvgPool2D(**settings)(t))), seed)


def shared():
    start, layer = keras.Input((6, 6, 2)), Relu(6, 3)
    t = Relu(6, 3)(start)
    t = Conv(4, 1)(layers.Concatenate()([layer(t), layer(layers.ZeroPadding2D(1)(layers.Cropping2D(1)(t)))]))
    return filled(keras.Model(start, Dense(3, name="logits")(layers.GlobalAveragePooling2D()(t))))


NETWORKS = {
    "bias": lambda: of(Relu(6, 3), Relu(4, 3)),
    "no bias": lambda: of(Relu(6, 3, use_bias=False), Conv(4, 3, use_bias=False)),
    "normalisation": lambda: of(Conv(6, 3, use_bias=False), Norm(), layers.ReLU(), Conv(4, 3, strides=2), Norm()),
    "depthwise": lambda: of(Relu(6, 3), Depthwise(3, activation="relu"), Conv(4, 1)),
    "separable": lambda: of(layers.SeparableConv2D(6, 3, activation="relu"), layers.SeparableConv2D(4, 3)),
    "transposed": lambda: of(Conv(6, 3), layers.Conv2DTranspose(6, 3, 2, activation="relu"), Conv(4, 3), pool=4),
    "dilation": lambda: of(Relu(6, 3, dilation_rate=2), layers.ZeroPadding2D(), Conv(4, 2, strides=2)),
    "residual": lambda: residual(norm=False),
    "residual, normalisation": residual,
    "shared": shared,
}
every_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


@every_network
def test_filters_that_repeat_others_can_go_without_a_trace(build):
    network, (x, _), (new, _) = build(), images(60), images(20, seed=7)
    for weight in network.weights:  # every second channel becomes what the one before it is
        kernel = np.array(ops.convert_to_numpy(weight))
        turned = kernel.ndim > 1 and ("depthwise" in weight.path or "transpose" in weight.path)
        channels = kernel.swapaxes(-1, -2) if turned else kernel
        if "logits" not in weight.path:
            channels[..., 1::2] = channels[..., ::2]
        weight.assign(kernel)
    units = pruning_utils.prunable_units(network)
    pruned = apply_masks(network, {name: np.arange(len(each)) % 2 == 0 for name, each in units.items()})
    assert distance(pruned, network, new) > 1e-4
    repaired = repair(pruned, network, x, TINY)
    for found in (repaired, shrink(repaired)):
        assert_same_outputs(found, network, new, rtol=3e-3)


@both_kinds
@on_networks
@given(seeds, fractions)
def test_repair_brings_outputs_of_a_chain_closer(kind, seed, sparsity):
    network, (x, _) = filled(NETWORKS["bias"](), seed), images(40, seed=seed)
    pruned = PRUNE[kind](network, sparsity)
    assert distance(repair(pruned, network, x), network, x) <= distance(pruned, network, x) + 1e-9


@both_kinds
@every_network
def test_zeros_stay_zero_statistics_and_gamma_as_they_were_and_batches_make_no_difference(kind, build):
    network, (x, _) = build(), images(50)
    pruned = PRUNE[kind](network, 0.5, "random", seed=1)
    repaired = repair(pruned, network, x)
    for weight, before, after in zip(pruned.weights, pruned.get_weights(), repaired.get_weights(), strict=True):
        if any(part in weight.name for part in ("gamma", "moving")):
            assert before.tobytes() == after.tobytes()
        elif "kernel" in weight.name or kind == "neurons":
            assert not after[before == 0].any()
    assert distance(repaired, network, x) < distance(pruned, network, x)
    assert cost(repaired)["weights_left"] == cost(pruned)["weights_left"]
    assert_same_outputs(repair(pruned, network, x, batch_size=17), repaired, x, rtol=1e-4)


def fitted(rows, wanted, ones=True):
    """What least squares makes of what is wanted."""
    rows = np.hstack([rows, np.ones((len(rows), int(ones)))])
    return rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("layer", [
    partial(Conv, 4, 3, strides=2), partial(Conv, 4, 2, use_bias=False), partial(Depthwise, 3, padding="same"),
    partial(Depthwise, 2, depth_multiplier=2, use_bias=False), partial(layers.Conv2D, 4, (3, 2), dilation_rate=(1, 2)),
])  # fmt: skip
@pytest.mark.parametrize("last", ["tested", "norm"])
def test_a_kernel_is_fitted_in_least_squares_on_patches(layer, last):
    layer, (x, _) = layer(name="tested"), images(60)
    network = of(Relu(6, 3, name="front"), layer, *[Norm(name="norm")] * (last == "norm"), Conv(3, 1))
    repaired = repair(apply_masks(network, {"front": np.arange(6) % 2 == 0}), network, x, TINY)
    (inputs,), (found,) = signals(repaired, ["tested"], x), signals(repaired, [last], x, "output")
    (wanted,), rows, biased = (
        signals(network, [last], x, "output"),
        patches_of(layer, inputs),
        layer.use_bias or last == "norm",
    )
    rows, wanted = rows.reshape(-1, *rows.shape[2:]), wanted.reshape(-1, wanted.shape[-1])
    if isinstance(layer, Depthwise):
        parts = [rows[:, :, unit // layer.depth_multiplier] for unit in range(wanted.shape[1])]
        parts = [fitted(part, column, biased) * part.any() for part, column in zip(parts, wanted.T, strict=True)]
        expected = np.stack(parts, axis=1)
    else:
        expected = fitted(rows.reshape(len(rows), -1), wanted, biased)
    np.testing.assert_allclose(found.reshape(wanted.shape), expected, atol=2e-3 * np.abs(wanted).max())


def test_single_weights_of_the_first_kernel_are_fitted_in_least_squares_on_patches():
    network, (x, _) = of(Conv(4, 3, name="first"), layers.ReLU(), Conv(3, 1)), images(60)
    pruned = PRUNE["weights"](network, 0.5)
    left = array(pruned.get_layer("first").kernel).reshape(18, 4) != 0
    found, wanted = (signals(each, ["first"], x, "output")[0] for each in (repair(pruned, network, x, TINY), network))
    rows = patches_of(network.get_layer("first"), np.float64(x)).reshape(-1, 18)
    for unit, own in enumerate(left.T):
        expected = fitted(rows[:, own], wanted[..., unit].ravel())
        np.testing.assert_allclose(found[..., unit].ravel(), expected, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("norms", [(), ("one",), ("other",), ("one", "other")])
def test_a_term_of_a_sum_makes_up_for_what_one_before_it_lost(norms):
    start = keras.Input((6, 6, 2))
    wide = Conv(5, 1, name="wide")(start)  # one of its channels is not enough, two are
    ends = {name: Conv(4, 1, name=name)(wide) for name in ("one", "other")}
    ends = [Norm()(end) if name in norms else end for name, end in ends.items()]
    t = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.Add()(ends)))
    network, (x, _), (new, _) = filled(keras.Model(start, Dense(3, name="logits")(t))), images(60), images(20, seed=7)
    _, first, _ = weight_scores(network)
    pruned = apply_masks(network, {first: np.arange(20).reshape(1, 1, 5, 4) < 4})
    assert distance(pruned, network, new) > 1e-4
    assert_same_outputs(repair(pruned, network, x, TINY), network, new, rtol=1e-3)


@both_kinds
def test_networks_with_several_inputs_are_repaired(kind):
    start, x = [keras.Input((6, 6, 2)), keras.Input((3,))], [images()[0], images(shape=(3,))[0]]
    t = layers.Multiply()([Relu(6, 3)(start[0]), layers.Reshape((1, 1, 6))(Dense(6, "sigmoid")(start[1]))])
    network = filled(keras.Model(start, Dense(3)(layers.GlobalAveragePooling2D()(Conv(6, 3)(t)))))
    pruned = PRUNE[kind](network, 0.5)
    errors = [np.mean((outputs(each, x) - outputs(network, x)) ** 2) for each in (repair(pruned, network, x), pruned)]
    assert errors[0] < errors[1] / 2


@both_kinds
@pytest.mark.parametrize("seed", range(2))
def test_choosing_again_is_not_much_worse(kind, seed):
    network, (x, _) = residual(seed=seed), images(60)
    again, pruned = prune_and_repair(network, 0.5, x, kind), PRUNE[kind](network, 0.5, "reconstruction", x=x)
    errors = [distance(each, network, x) for each in (again, repair(pruned, network, x), pruned)]
    assert errors[0] < 1.5 * errors[1] and errors[0] < errors[2]


# --- Numbers of every kind, and files -----------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(("policy", "rtol"), [
    ("float64", 1e-5), ("mixed_float16", 0.01), ("float16", 0.02), ("mixed_bfloat16", 0.05), ("bfloat16", 0.1),
])  # fmt: skip
def test_networks_of_every_precision_are_pruned_repaired_and_shrunk(kind, policy, rtol):
    network, twin, (x, _) = residual(dtype=policy), residual(), images()
    pruned, expected = PRUNE[kind](network, 0.5), repair(PRUNE[kind](twin, 0.5), twin, x)
    repaired = repair(pruned, network, x)
    assert np.abs(outputs(repaired, x) - outputs(expected, x)).max() < 0.15 * np.abs(outputs(expected, x)).max()
    for each in (pruned, repaired, prune_and_repair(network, 0.5, x, kind)):
        small = shrink(each)
        assert [layer.dtype_policy for layer in small.layers] == [layer.dtype_policy for layer in network.layers]
        assert [weight.dtype for weight in small.weights] == [weight.dtype for weight in network.weights]
        found, wanted = (np.float64(predictions(network, x)) for network in (small, each))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * np.abs(wanted).max())


@pytest.fixture
def small():
    network, (x, _) = residual(), images()
    return shrink(repair(PRUNE["neurons"](network, 0.5), network, x))


def test_a_shrunk_network_is_saved_and_loaded(small, tmp_path):
    small.save(tmp_path / "small.keras")
    loaded, (x, _) = keras.models.load_model(tmp_path / "small.keras"), images()
    assert bits(loaded) == bits(small) and loaded.count_params() < residual().count_params() / 2
    np.testing.assert_array_equal(predictions(loaded, x), predictions(small, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="this is how TensorFlow exports")
def test_a_shrunk_network_runs_in_onnx_runtime(small, tmp_path):
    runtime, *_ = map(pytest.importorskip, ("onnxruntime", "onnx", "tf2onnx"))
    (x, _), path = images(), str(tmp_path / "small.onnx")
    expected = predictions(small, x)  # Keras exports what has been called
    small.export(path, format="onnx", verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], expected, rtol=1e-4, atol=1e-4)
