"""Networks that are graphs: in float64, every tensor of the shrunk one is the live part of the masked one's."""

from functools import partial

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import Sequential, layers, ops, tree
from networks import SPARSITIES, bits, seeds

import pruning_utils
from pruning_utils import cost, keep_masks, neuron_scores, outputs, prunable_units, prune_neurons, shrink

Conv, Dense, Flatten, Reshape = partial(layers.Conv2D, padding="same"), layers.Dense, layers.Flatten, layers.Reshape


@pytest.fixture(autouse=True, scope="module")
def in_float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    if keras.backend.backend() == "jax":
        jax = pytest.importorskip("jax")
        jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
    if keras.backend.backend() == "jax":
        jax.config.update("jax_enable_x64", False)


class Numbered(pruning_utils._Graph):
    """A network, the numbers of every tensor in the order of the walk, and the units that are kept."""

    def __init__(self, network):
        self.numbers = []
        super().__init__(network)
        self.keep = pruning_utils._live(self)[1]

    def _label(self, tensor, found):
        super()._label(tensor, found)
        self.numbers.append(pruning_utils._thin(tensor.numbers))


def array(tensor):
    return ops.convert_to_numpy(tensor)


def images(network, seed=1, count=8):
    rng, shapes = np.random.default_rng(seed), [[count, *(size or 4 for size in x.shape[1:])] for x in network.inputs]
    return [rng.integers(0, 5, shape) if "int" in x.dtype else rng.normal(*(128, 64) if 32 in shape else (0, 1), shape)
            for x, shape in zip(network.inputs, shapes, strict=True)]  # fmt: skip


def tensors(network, x):
    """What every operation returns for images, in the order of the walk, and the images."""
    found = [ops.convert_to_tensor(each) for each in x]

    def apply(operation, *args, **kwargs):
        result = operation(*args, **kwargs)
        found.extend(tree.flatten(result))
        return result

    pruning_utils._walk(network, found[:], apply)
    return [array(each).astype(float) for each in found]


def calibrated(network, seed=0):
    """Give a network random weights with which its images reach its outputs: sums vary by 1 from image to image."""
    rng, met = np.random.default_rng(seed), set()

    def apply(operation, *args, **kwargs):
        given = id(operation) in met or isinstance(operation, layers.Normalization)
        weights = [] if given else getattr(operation, "weights", [])
        met.add(id(operation))
        for weight in weights:
            if "kernel" in weight.name or weight.name == "embeddings":
                weight.assign(rng.normal(size=weight.shape) / np.sqrt(np.prod(weight.shape[:-1])))
            elif any(part in weight.name for part in ("gamma", "alpha", "variance")):
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
            elif weight.dtype == "float64":
                weight.assign(rng.normal(0, 0.5, weight.shape))
        if isinstance(operation, layers.BatchNormalization) and weights:
            axes = [axis for axis in range(args[0].ndim) if axis != operation.axis % args[0].ndim]
            operation.moving_mean.assign(ops.mean(args[0], axes))
            operation.moving_variance.assign(ops.var(args[0], axes) + 1e-6)
        if kernels := [weight for weight in weights if "kernel" in weight.name]:
            function = None if isinstance(operation, layers.RNN) else getattr(operation, "activation", None)
            if function:
                operation.activation = None
            sums = array(tree.flatten(operation(*args, **kwargs))[0])
            if function:
                operation.activation = function
            size = max((sums - sums.mean(axis=0)).std(), 1e-6)
            kernels[-1].assign(kernels[-1] / size)
            if weights[-1].name == "bias" and weights[-1].shape == sums.shape[-1:]:
                mean = np.mean(sums, axis=tuple(range(sums.ndim - 1))) - array(weights[-1])
                weights[-1].assign(rng.normal(0, 0.5, mean.shape) - mean / size)
        return operation(*args, **kwargs)

    pruning_utils._walk(network, [ops.convert_to_tensor(each) for each in images(network)], apply)
    return network


def live_parts(masked, x):
    """Every tensor of a masked network, without the channels that are not kept, and the numbers that these have."""
    graph = Numbered(masked)
    for tensor, found in zip(tensors(masked, x), graph.numbers, strict=True):
        assert sum(size > 1 for size in found.shape) <= 1
        axis = max(range(found.ndim), key=lambda axis: found.shape[axis], default=0)
        if found.size > 1:
            tensor = np.compress(graph.keep[np.abs(found.ravel())], tensor, axis + 1)
        yield tensor


def assert_same_tensors(small, masked):
    x = images(masked, seed=2)
    for found, wanted in zip(tensors(small, x), live_parts(masked, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8 * np.abs(wanted).max(initial=1e-300))


def predictions(network, x):
    return [array(each) for each in tree.flatten(network(x if len(x) > 1 else x[0], training=False))]


def assert_images_reach_the_outputs(network):
    for found in predictions(network, images(network, seed=3, count=2)):
        assert np.abs(found[0] - found[1]).max() > 1e-3 * np.abs(found).max()


def assert_prunes_exactly(network, sparsity=0.5, seed=0):
    """Prune units at random and shrink; return both networks."""
    assert_images_reach_the_outputs(calibrated(network))
    before = bits(network)
    masked = prune_neurons(network, sparsity, "random", seed=seed)
    small = shrink(masked)
    assert bits(network) == before
    assert_same_tensors(small, masked)
    assert small.count_params() * 8 == cost(masked)["bytes"] and cost(small) == cost(masked)
    x, graph = images(network, seed=2), Numbered(masked)
    gone = np.zeros(graph.count + 1, bool)
    for name, mask in keep_masks(neuron_scores(network, "random", seed=seed), sparsity).items():
        gone[graph.entries[name][~mask]] = True
    for tensor, found in zip(tensors(masked, x), graph.numbers, strict=True):
        silent = np.broadcast_to((found > 0) & gone[graph.unit[np.abs(found)]], tensor.shape[1:])
        assert not tensor[:, silent].any()
    for made, *_ in graph.makers.values():  # the units that were removed are gone, save one of an empty layer
        if gone[graph.unit[made]].all():
            gone[graph.unit[made[0]]] = False
    for made, *_ in graph.makers.values():
        np.testing.assert_array_equal(graph.keep[made], ~gone[graph.unit[made]])
    for each in (network, masked):  # what scores and repair look at is what the network computes
        found = outputs(each, x if len(x) > 1 else x[0])
        for one, other in zip(tree.flatten(found), predictions(each, x), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-8 * np.abs(other).max())
    return masked, small


# --- Building blocks: each takes images (height, width, channels) and returns others ------------------------------


def sequence(function):
    def block(t):
        _, height, width, channels = t.shape
        found = function(Reshape((height * width, channels))(t))
        return Reshape((height, width, found.shape[-1]))(found)

    return block


def mixed_positions(t):
    turned = layers.Permute((2, 1))(t)
    return t + layers.Permute((2, 1))(Dense(t.shape[1])(Dense(5, "relu")(turned)))


def gated(t, pool, *between):
    gate = pool(t)
    for layer in (*between, Dense(3, "relu"), Dense(t.shape[-1], "sigmoid")):
        gate = layer(gate)
    return layers.Multiply()([t, gate])


def nested(t):
    start = keras.Input(t.shape[1:])
    inner = Conv(5, 3, activation="relu")(start)
    return keras.Model(start, [inner, Sequential([Conv(4, 1), layers.ReLU()])(inner)])(t)


def shared(t):
    layer, norm = Conv(6, 3, activation="relu"), layers.BatchNormalization(scale=False)
    return layer(layer(norm(Conv(6, 1)(t)))) + norm(Conv(6, 3)(t))


def halves(t):
    one, other = ops.split(Conv(8, 3)(t), 2, axis=-1)
    return one * ops.sigmoid(other)


def extremes(t):
    some = [Conv(6, size)(t) for size in (1, 3, 2)]
    return layers.Subtract()([layers.Maximum()(some), layers.Average()([*some, layers.Minimum()(some[:2])])])


def attended(t, heads=3, **settings):
    return layers.MultiHeadAttention(heads, 2, **settings)(t, t)


def shuffled(t, *order, steps=1):
    """Channels in groups of two, moved to one another's place or, of ever `steps` rows, to where the others are."""
    _, height, width, _ = t.shape
    t = ops.transpose(ops.reshape(Conv(8, 1)(t), (-1, height, width, 2, 2, 2)), (0, *order))
    return ops.reshape(t, (-1, height * steps, width * steps, 8 // steps**2))


SILENT = {
    "convolution": lambda t: Conv(6, 3, activation="relu")(t),
    "stride": lambda t: Conv(6, 3, strides=2, activation="gelu")(t),
    "residual": lambda t: t + Conv(t.shape[-1], 3)(Conv(5, 3, activation="relu")(t)),
    "product": lambda t: layers.Multiply()([Conv(6, 3)(t), Conv(6, 1, activation="tanh")(t)]),
    "extremes": extremes,
    "concatenation": lambda t: layers.Concatenate()([Conv(3, 3, activation="relu")(t), t]),
    "rows": lambda t: layers.Concatenate(axis=1)([Conv(6, 3)(t), Conv(6, 1)(t)]),
    "gate": lambda t: gated(t, layers.GlobalAveragePooling2D(keepdims=True)),
    "reshaped gate": lambda t: gated(t, layers.GlobalMaxPooling2D(), Reshape((1, 1, t.shape[-1]))),
    "gate of positions": lambda t: t * Conv(1, 1, activation="sigmoid")(t),
    "swish": lambda t: ops.sigmoid(t) * t,
    "halves": halves,
    "attention": sequence(lambda t: t + attended(t, value_dim=3)),
    "attention without bias": sequence(lambda t: attended(t, use_bias=False, output_shape=5)),
    "normalisation": lambda t: layers.ReLU()(layers.BatchNormalization()(Conv(6, 3, use_bias=False)(t))),
    "normalisation without scale": lambda t: layers.BatchNormalization(scale=False)(Conv(6, 3)(t)),
    "normalisation without centre": lambda t: layers.BatchNormalization(center=False)(t),
    "depthwise": lambda t: layers.DepthwiseConv2D(3, padding="same", activation="relu")(t),
    "depthwise twice": lambda t: layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(t),
    "separable": lambda t: layers.SeparableConv2D(5, 3, depth_multiplier=2, padding="same", activation="relu")(t),
    "transposed": lambda t: layers.Conv2DTranspose(5, 3, strides=2, activation="relu")(t),
    "sizes": lambda t: layers.UpSampling2D()(layers.Cropping2D(1)(layers.MaxPool2D()(layers.ZeroPadding2D(2)(t)))),
    "scaled": lambda t: ops.relu(t) * 2,
    "slopes": lambda t: layers.PReLU(shared_axes=[1, 2])(layers.PReLU()(t)),
    "shared": shared,
    "nested": lambda t: layers.Concatenate()(nested(t)),
    "mean": lambda t: t * ops.mean(t, axis=(1, 2), keepdims=True),
    "turned": lambda t: ops.flip(ops.transpose(t, (0, 2, 1, 3)), axis=1),
    "shuffle": lambda t: shuffled(t, 1, 2, 4, 3, 5),
    "larger": lambda t: shuffled(t, 1, 3, 2, 4, 5, steps=2),
    "distributed": sequence(lambda t: layers.TimeDistributed(Dense(5, "relu"))(t)),
}  # fmt: skip
LOUD = {  # what comes in stays: of these a removed unit is not 0, or they mix units, or they have no rule
    "sigmoid": lambda t: layers.Activation("sigmoid")(t), "softplus": ops.softplus, "more": lambda t: t + 3,
    "softmax": lambda t: layers.Softmax()(t), "layer norm": lambda t: layers.LayerNormalization()(t),
    "group norm": lambda t: layers.GroupNormalization(1)(t), "index": lambda t: t[..., 1:],
    "lambda": lambda t: layers.Lambda(lambda signal: signal + signal[..., ::-1])(t),
    "groups": lambda t: Conv(4, 3, groups=2)(t), "constants": lambda t: t + np.arange(t.shape[-1]),
    "batch": lambda t: ops.reshape(Dense(5)(ops.reshape(t, (-1, t.shape[-1]))), (-1, *t.shape[1:3], 5)),
    "mixer": sequence(mixed_positions), "recurrent": sequence(lambda t: layers.LSTM(4, return_sequences=True)(t)),
}  # fmt: skip
ENDS = {
    "flat": lambda t: Flatten()(t), "pooled": lambda t: layers.GlobalAveragePooling2D()(t),
    "largest": lambda t: ops.max(t, axis=(1, 2)), "row": lambda t: Flatten()(t[:, 0]),
    "permuted": lambda t: Flatten()(layers.Permute((3, 1, 2))(t)), "token": lambda t: t[:, 0, 0],
}  # fmt: skip


def network_of(*blocks, end="flat"):
    """Two inputs, two outputs, and these blocks between them; `before` makes what they get."""
    image, vector = keras.Input((8, 8, 3)), keras.Input((5,))
    t = Conv(6, 3, activation="relu", name="before")(image)
    for block in blocks:
        t = block(t)
    scaled = t * Reshape((1, 1, t.shape[-1]))(Dense(t.shape[-1], "tanh")(vector))
    aside = layers.GlobalMaxPooling2D()(Conv(4, 1, activation="relu")(t))
    return keras.Model([image, vector], [Dense(3)(Dense(6, "relu")(ENDS[end](scaled))), Dense(2)(aside)])


def removable(network):
    """The kernels of which a unit may be removed."""
    return {name for units in prunable_units(network).values() for unit in units for name, _ in unit}


# --- The test that counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", SILENT.values(), ids=SILENT)
def test_what_is_left_computes_what_it_did_and_all_that_was_removed_is_gone(block):
    network = network_of(block)
    assert "before" in removable(network)
    assert_prunes_exactly(network)


@pytest.mark.parametrize("block", LOUD.values(), ids=LOUD)
def test_units_that_cannot_be_silenced_stay_with_a_warning(block):
    network = network_of(block)
    assert "before" not in removable(network)
    with pytest.warns(match="before"):
        assert_prunes_exactly(network)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.lists(st.sampled_from([*SILENT, *LOUD]), min_size=2, max_size=4), st.sampled_from([*ENDS]), seeds)
@pytest.mark.filterwarnings("ignore")
def test_so_does_any_network_of_such_blocks(names, end, seed):
    assert_prunes_exactly(network_of(*((SILENT | LOUD)[name] for name in names), end=end), seed=seed)


@pytest.mark.parametrize("architecture", ["MobileNetV2", "EfficientNetB0", "DenseNet121"])
def test_so_do_architectures_of_keras(architecture):
    network = getattr(keras.applications, architecture)(weights=None, input_shape=(32, 32, 3), classes=10)
    _, small = assert_prunes_exactly(network)
    assert 0.2 < small.count_params() / network.count_params() < 0.35


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_are_nested_and_the_ends_are_the_network_itself_and_one_that_still_runs(sparsity):
    network = calibrated(network_of(SILENT["residual"], SILENT["gate"], SILENT["depthwise twice"]))
    masked, more = (prune_neurons(network, each, "random", seed=0) for each in (sparsity, sparsity / 2 + 0.5))
    for one, other in zip(masked.get_weights(), more.get_weights(), strict=True):
        assert not other[one == 0].any()
    assert_same_tensors(shrink(masked), masked)
    assert sparsity > 0 or bits(masked) == bits(shrink(masked)) == bits(network)


def test_two_filters_that_are_exchanged_are_seen():
    masked, small = assert_prunes_exactly(network_of(SILENT["normalisation"], SILENT["residual"]))
    kernel = small.get_layer("before").kernel
    kernel.assign(array(kernel)[..., [1, 0, *range(2, kernel.shape[-1])]])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same_tensors(small, masked)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_a_removed_unit_whose_gamma_or_beta_is_not_zeroed_is_seen(name):
    network = network_of(SILENT["normalisation"], SILENT["residual"])
    masked, small = assert_prunes_exactly(network)
    norms = [next(layer for layer in each.layers if hasattr(layer, "gamma")) for each in (network, masked)]
    getattr(norms[1], name).assign(getattr(norms[0], name))
    assert_same_tensors(small, small)
    with pytest.raises(AssertionError):
        assert_same_tensors(small, masked)


# --- By hand ------------------------------------------------------------------------------------------------------


def ones(network, **kernels):
    """All kernels are 1, or what is said by name; there are no biases."""
    for layer in network.layers:
        for weight in layer.weights[:1]:
            weight.assign(np.broadcast_to(kernels.get(layer.name, 1.0), weight.shape))
    return network


dense = partial(Dense, use_bias=False)


def test_a_unit_lives_if_it_does_at_one_of_the_calls_of_a_shared_layer():
    x = [keras.Input((2,)), keras.Input((2,))]
    shared = dense(2)
    t = layers.Concatenate()([shared(dense(3, "relu", name=name)(each)) for name, each in zip("ab", x, strict=True)])
    network = ones(keras.Model(x, dense(1)(t)), a=[0, 1, 1])  # unit 0 is dead in a, and alive in b
    for each in (network, shrink(network)):  # 2 units of 2 and 3 of 2, twice
        np.testing.assert_array_equal(predictions(each, [np.ones((1, 2))] * 2), [[[2 * 2 * 2 + 2 * 3 * 2]]])


def test_a_channel_lives_if_it_does_at_one_of_its_positions():
    x = keras.Input((2,))
    t = Flatten()(dense(3, "relu")(Reshape((2, 2))(dense(4, "relu", name="a")(x))))
    network = ones(keras.Model(x, dense(1)(t)), a=[1, 1, 0, 1])  # channel 0 is dead at position 1 only
    assert prunable_units(network)["a"] == [[("a", 0), ("a", 2)], [("a", 1), ("a", 3)]]
    for each in (network, shrink(network)):
        np.testing.assert_array_equal(predictions(each, [np.ones((1, 2))]), [[[3 * (2 + 2 + 2)]]])


def test_an_embedding_a_nested_and_a_subclassed_network_are_shrunk_and_keep_their_class():
    class Mine(keras.Model):
        pass

    words = keras.Input((6,), dtype="int32")
    network = Mine(words, Dense(1)(Flatten()(Sequential([Dense(4, "relu"), Dense(5)])(layers.Embedding(5, 8)(words)))))
    assert type(assert_prunes_exactly(network)[1]) is Mine


def test_a_rule_can_be_given_to_a_layer_of_ones_own(monkeypatch):
    class MyDense(Dense):
        pass

    x = keras.Input((2,))
    network = keras.Model(x, Dense(1)(MyDense(4, "relu", name="mine")(x)))
    with pytest.raises(ValueError, match=r"'mine' .MyDense. has no rule"):
        prune_neurons(network, 0.5)
    monkeypatch.setitem(pruning_utils.RULES, MyDense, pruning_utils.RULES["Dense"])
    assert type(assert_prunes_exactly(network)[1].layers[1]) is MyDense


@pytest.mark.parametrize("kind", [layers.Dense, layers.Embedding])
def test_layers_with_lora_are_refused_by_name(kind):
    x = keras.Input((2,), dtype="int32")
    layer = kind(4, name="odd") if kind is Dense else kind(4, 3, name="odd")
    network = keras.Model(x, Dense(1)(Dense(3, "relu")(Flatten()(layer(x)))))
    layer.enable_lora(2)
    with pytest.raises(TypeError, match=r"'odd'.*LoRA"):
        prune_neurons(network, 0.5)


@pytest.mark.parametrize(("block", "why"), [
    (lambda t: Dense(4, "sigmoid", name="odd")(t[:, 0]), "'odd' stays: 'dense.*not 0 without it"),
    (lambda t: layers.LSTM(4, name="odd")(t), r"'odd' \(LSTM\) has no rule"),
])  # fmt: skip
def test_a_network_of_which_nothing_can_go_is_told_why(block, why):
    x = keras.Input((2, 3))
    with pytest.raises(ValueError, match=f"no unit of .* can be removed.*{why}"):
        prune_neurons(keras.Model(x, Dense(1)(block(x))), 0.5)


def test_a_gamma_that_is_not_a_number_is_named():
    network = network_of(lambda t: layers.BatchNormalization(name="odd")(t))
    network.get_layer("odd").gamma.assign(np.full(6, np.nan))
    with pytest.raises(ValueError, match=r"'odd'.*NaN"):
        prune_neurons(network, 0.5)


def test_statistics_that_a_layer_has_learnt_and_shapes_of_functions_are_copied_and_saved(tmp_path):
    x, images = keras.Input((4, 4, 3)), np.random.default_rng(0).normal(5, 3, (9, 4, 4, 3))
    norm = layers.Normalization()
    norm.adapt(images)
    t = ops.reshape(Conv(6, 3, activation="relu")(norm(x)), (-1, 16, 6))
    network = keras.Model(x, Dense(1)(Flatten()(t)))
    np.testing.assert_array_equal(*(predictions(each, [images]) for each in (network, shrink(network))))
    small = shrink(prune_neurons(network, 0.5))
    small.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(*(predictions(each, [images]) for each in (small, loaded)))


@pytest.mark.parametrize("block", [
    lambda t: t * dense(1)(dense(3)(t)), lambda t: t + dense(1)(dense(3)(t)),  # stretched along the channels
    lambda t: layers.BatchNormalization(axis=1)(dense(3)(t)), lambda t: dense(2)(layers.Permute((2, 1))(dense(3)(t))),
    lambda t: layers.Concatenate(axis=1)([dense(1)(dense(3)(t)), dense(1)(t)]),
])  # fmt: skip
def test_what_leads_to_units_that_stay_stays_too(block):
    x = keras.Input((4, 2))
    network = ones(keras.Model(x, dense(1)(block(dense(3, "relu")(x)))))
    small = shrink(network)
    np.testing.assert_array_equal(*(predictions(each, [np.ones((1, 4, 2))]) for each in (network, small)))
    assert small.count_params() == network.count_params()
