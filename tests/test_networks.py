"""Networks: which ones can be pruned, what a pruned, repaired or shrunk copy keeps, and what the others are told."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops
from keras.layers import Activation, Dense, Dropout, Flatten
from networks import (
    CLASSES,
    INPUTS,
    as_functional,
    assert_same_outputs,
    bits,
    chain,
    functional_network,
    gentle_network,
    images,
    predictions,
    random_network,
)

import pruning_utils
from pruning_utils import cost, prunable_layers, prune_neurons, prune_weights, repair, shrink

COPIES = {
    "pruned by weights": lambda network, x: prune_weights(network, 0.5),
    "pruned by neurons": lambda network, x: prune_neurons(network, 0.5),
    "shrunk": lambda network, x: shrink(prune_neurons(network, 0.5)),
    "repaired": lambda network, x: repair(prune_neurons(network, 0.5), network, x),
}
every_copy = pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
both_kinds = pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
hidden = partial(Dense, 12, "relu", name="hidden_1")


# --- What can be pruned -------------------------------------------------------------------------------------------


@both_kinds
def test_functional_and_sequential_networks_are_pruned_and_shrunk_alike(prune):
    network, (x, y) = random_network(), images()
    twin = as_functional(network)
    for criterion in ("activation", "taylor"):
        pruned, pruned_twin = (prune(each, 0.5, criterion, x=x, y=y) for each in (network, twin))
        assert bits(pruned) == bits(pruned_twin) and bits(pruned) != bits(network)
        assert bits(shrink(pruned)) == bits(shrink(pruned_twin)) and cost(pruned) == cost(pruned_twin)


@both_kinds
def test_layers_between_the_dense_ones_change_nothing(prune):
    plain, network, (x, _) = gentle_network(), functional_network(), images()
    assert [layer.name for layer in prunable_layers(network)] == ["hidden_1", "hidden_2"]
    pruned, pictures = prune(network, 0.7), x.reshape(-1, 2, 3)
    assert bits(pruned) == bits(prune(plain, 0.7))
    assert_same_outputs(shrink(pruned), pruned, pictures)
    assert [type(layer) for layer in shrink(pruned).layers] == [type(layer) for layer in network.layers]


@pytest.mark.parametrize("function", ["tanh", "gelu", "silu", lambda t: t * t])
def test_neurons_can_go_where_the_activation_of_0_is_0(function):
    pruned, (x, _) = prune_neurons(random_network(activation=function), 0.5), images()
    assert [layer.units for layer in shrink(pruned).layers] == [6, 4, 4]
    assert_same_outputs(shrink(pruned), pruned, x)


KEPT_WHOLE = {
    "not 0 at 0": "sigmoid",
    "mixes units": "softmax",
    "mixes units, and 0 at 0": lambda t: t - ops.mean(t, axis=-1, keepdims=True),
    "mixes units through their order": lambda t: ops.cumsum(t, axis=-1),
}


@pytest.mark.parametrize("function", KEPT_WHOLE.values(), ids=KEPT_WHOLE)
def test_layers_whose_units_cannot_be_removed_one_by_one_stay_whole(function):
    network, (x, _) = random_network(activation=function), images()
    with pytest.raises(ValueError, match=r"no unit .* can be removed; 'hidden_1' stays: .* (mixes|not 0 without)"):
        prune_neurons(network, 0.5)
    partly = chain(*network.layers[:2], Dense(5, "relu"), Dense(CLASSES))
    with pytest.warns(match=r"not all units can be removed; 'hidden_1' stays: .*; 'hidden_2' stays"):
        pruned = prune_neurons(partly, 0.6)
    assert [layer.units for layer in shrink(pruned).layers] == [12, 8, 2, CLASSES]
    for sparsity in (0.5, 0.97, 1.0):
        pruned = prune_weights(network, sparsity)
        assert cost(pruned)["units_left"] == {"hidden_1": 12, "hidden_2": 8}
        assert_same_outputs(shrink(pruned), pruned, x)


# --- What a copy keeps --------------------------------------------------------------------------------------------


@every_copy
def test_a_copy_starts_anew_with_the_initialisers_of_the_original(copy):
    (x, _), start = images(), keras.initializers
    network = chain(hidden(kernel_initializer=start.HeNormal(seed=3), bias_initializer=start.Constant(0.5)),
                    Dense(8, "relu", kernel_initializer="he_normal"), Dense(CLASSES))  # fmt: skip
    anew, fresh = keras.models.clone_model(copy(network, x)), keras.models.clone_model(network)
    for layer, original in zip(anew.layers, fresh.layers, strict=True):
        assert layer.kernel_initializer.get_config() == original.kernel_initializer.get_config()
        assert np.count_nonzero(layer.get_weights()[0]) == layer.kernel.shape[0] * layer.units
    assert (anew.layers[0].get_weights()[1] == 0.5).all()
    assert anew.layers[0].units != 12 or bits(anew)[0] == bits(fresh)[0]


def relu(t):  # not the one that Keras means by that name
    return ops.clip(t, 0, 0.2)


OWN = {
    "named relu": relu,
    "a lambda": lambda t: ops.square(t),
    "a partial": partial(keras.activations.relu, negative_slope=0.3),
    "an object of Keras": keras.layers.LeakyReLU(0.2),
}


@every_copy
@pytest.mark.parametrize("function", OWN.values(), ids=OWN)
def test_a_copy_keeps_the_very_activation_functions(function, copy):
    network, (x, _) = random_network(activation=function), images()
    assert_same_outputs(prune_weights(network, 0), network, x, rtol=0)
    assert copy(network, x).layers[0].activation is network.layers[0].activation
    between = chain(Dense(12), Activation(function), Dense(CLASSES))
    assert_same_outputs(shrink(prune_neurons(between, 0)), between, x, rtol=0)
    assert copy(between, x).layers[1].activation is between.layers[1].activation


def test_how_a_network_was_compiled_does_not_matter():
    network, (x, y) = random_network(), images()
    expected = bits(prune_neurons(network, 0.5, "taylor", x=x, y=y))
    network.compile("sgd", lambda y_true, y_pred: ops.mean(y_pred), metrics=[lambda y_true, y_pred: ops.mean(y_pred)])
    pruned = prune_neurons(network, 0.5, "taylor", x=x, y=y)
    assert bits(pruned) == expected and not pruned.compiled
    assert bits(repair(pruned, network, x)) != expected and shrink(pruned).layers[0].units == 6


OwnSequential, OwnModel = type("OwnSequential", (keras.Sequential,), {}), type("OwnModel", (keras.Model,), {})


def functional_end(start):
    return Dense(CLASSES)(Dropout(0.5)(hidden()(Flatten()(start))))


BUILD = {
    "own Sequential": lambda start: OwnSequential([start, Flatten(), hidden(), Dense(CLASSES)], name="own"),
    "own Model": lambda start: OwnModel(start, functional_end(start), name="own"),
    "named input": lambda start: keras.Model({"picture": start}, functional_end(start), name="own"),
    "lists": lambda start: keras.Model([start], [functional_end(start)], name="own"),
}


@every_copy
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("kind", BUILD)
def test_a_copy_keeps_class_names_structure_and_input_signature(kind, dtype, copy):
    network = BUILD[kind](keras.Input((2, 3), batch_size=5, dtype=dtype, name="picture"))
    x = np.random.default_rng(0).uniform(0, 255, (5, 2, 3)).astype(np.float32)  # more precise than the network takes
    found = copy(network, x)
    assert type(found) is type(network) and found.name == network.name
    assert [(type(layer), layer.name) for layer in found.layers] == [(type(a), a.name) for a in network.layers]
    assert [(t.shape, t.dtype, t.name) for t in found.inputs] == [(t.shape, t.dtype, t.name) for t in network.inputs]
    given = {"picture": x} if kind == "named input" else x
    wanted, small = (each(given, training=False) for each in (found, shrink(found)))
    keras.tree.assert_same_structure(wanted, network(given))
    keras.tree.assert_same_structure(wanted, small)
    wanted, small = (ops.convert_to_numpy(keras.tree.flatten(each)[0]) for each in (wanted, small))
    np.testing.assert_allclose(small, wanted, rtol=1e-5, atol=1e-5)


@every_copy
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16", "float64"])
def test_a_copy_keeps_dtype_policies_and_what_is_trainable(policy, copy):
    layers = [hidden(dtype=policy, trainable=False), Dense(8, "relu", dtype=policy), Dense(CLASSES, dtype="float32")]
    network, (x, _) = chain(*layers), images()
    for layer, original in zip(copy(network, x).layers, network.layers, strict=True):
        assert layer.dtype_policy.name == original.dtype_policy.name and layer.trainable == original.trainable
        assert layer.kernel.dtype == original.kernel.dtype and layer.get_config()["name"] == original.name


@every_copy
def test_a_copy_can_be_saved_and_loaded(copy, tmp_path):
    found, (x, _) = copy(as_functional(random_network()), images()[0]), images()
    found.save(tmp_path / "network.keras")
    assert_same_outputs(keras.models.load_model(tmp_path / "network.keras"), found, x, rtol=0)


# --- Layers of one's own ------------------------------------------------------------------------------------------


class Scaled(Dense):
    """Computes what a Dense layer computes, but has a setting more."""

    def __init__(self, units, factor=2.0, **options):
        super().__init__(units, **options)
        self.factor = factor


class Forgetful(Scaled):
    """Does not keep one of its settings."""

    def __init__(self, units, secret=1, **options):
        super().__init__(units, **options)


Impostor = type("Dense", (Scaled,), {"call": lambda self, inputs: super(Impostor, self).call(inputs) + 1})
FakeReLU = type("ReLU", (keras.layers.Layer,), {"call": lambda self, inputs: inputs + 1})
pruning_utils.RULES |= dict.fromkeys((Scaled, Forgetful), pruning_utils.RULES["Dense"])


@pytest.mark.parametrize("odd", [lambda: Impostor(12, name="odd"), lambda: FakeReLU(name="odd")])
def test_a_layer_of_ones_own_does_not_pass_by_its_name(odd):
    network = chain(Dense(12, name="first"), odd(), Dense(5), Dense(CLASSES))
    with pytest.warns(match=r"'first' stays: 'odd' \((Dense|ReLU)\) has no rule"):
        small = shrink(prune_neurons(network, 0.4))
    assert [layer.units for layer in small.layers if hasattr(layer, "units")][-2:] == [3, CLASSES]


@every_copy
def test_a_layer_of_ones_own_is_supported_once_it_says_so_and_keeps_its_settings(copy):
    network, (x, _) = chain(Scaled(12, 3.0, activation="relu"), Dense(CLASSES)), images()
    found = copy(network, x).layers[0]
    assert type(found) is Scaled and found.factor == 3.0 and np.count_nonzero(found.kernel) == 36


def test_a_layer_of_ones_own_that_cannot_be_copied_is_named():
    with pytest.raises(TypeError, match=r"'odd'.* must keep .*'secret'"):
        prune_weights(chain(Forgetful(12, name="odd"), Dense(CLASSES)), 0.5)


# --- What other networks are told ---------------------------------------------------------------------------------

ENTRANCES = [prunable_layers, shrink, cost, partial(prune_weights, sparsity=0)]
by_every_entrance = pytest.mark.parametrize("call", ENTRANCES)


def functional(connect, inputs=1):
    starts = [keras.Input((INPUTS,)) for _ in range(inputs)]
    return keras.Model(starts if inputs > 1 else starts[0], connect(*starts), name="mine")


def changed(change):
    network = random_network()
    change(network)
    return network


@by_every_entrance
@pytest.mark.parametrize("change", [lambda network: network.quantize("int8"),
                                    lambda network: network.layers[0].enable_lora(2)])  # fmt: skip
def test_layers_that_are_quantised_or_have_lora_are_refused_by_name(change, call):
    with pytest.raises(TypeError, match="layer 'hidden_1' is a Dense, quantised or with LoRA: not supported"):
        call(changed(change))


def alike():
    network = chain(Dense(6), Dense(6), Dense(4))
    network.layers[0].name = network.layers[1].name = "twice"  # Keras looks at names only when a layer is added
    return network


@pytest.mark.parametrize(("build", "message"), [
    (lambda: keras.Sequential([Dense(4), Dense(4)], name="mine"), "'mine' is not built"),
    (alike, "layers of the same name.*'twice'"),
])  # fmt: skip
@by_every_entrance
def test_what_is_not_built_or_has_two_layers_of_one_name_is_refused(build, message, call):
    with pytest.raises(ValueError, match=message):
        call(build())


@pytest.mark.parametrize("call", [prunable_layers, pruning_utils.prunable_units, ENTRANCES[-1]])
def test_a_network_without_anything_to_prune_is_refused(call):
    with pytest.raises(ValueError, match=r"'only'|no unit"):
        call(chain(Dense(4, name="only")))


class WithItsOwnCall(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize("thing", [WithItsOwnCall(), "network", None, Dense(3)])
def test_what_is_no_network_of_layers_is_refused_by_its_type(thing):
    with pytest.raises(TypeError, match=f"Sequential or a functional network, got {type(thing).__name__}"):
        prune_weights(thing, 0.5)


def test_a_functional_network_with_a_call_of_its_own_is_refused():
    network = as_functional(random_network())
    network.__class__ = type("Doubled", (WithItsOwnCall, type(network)), {})
    with pytest.raises(TypeError, match="Doubled has a `call` of its own"):
        prune_weights(network, 0.5)


@pytest.mark.parametrize("call", [
    *ENTRANCES,
    lambda network: pruning_utils.neuron_scores(network, "random", seed=0),
    lambda network: pruning_utils.outputs(network, images()[0]),
    lambda network: repair(network, random_network(), images()[0]),
    lambda network: repair(random_network(), network, images()[0]),
])  # fmt: skip
def test_a_network_with_nan_or_infinite_weights_is_refused_by_the_name_of_the_layer(call):
    for position, name, value in ((0, "hidden_1", np.nan), (3, "hidden_2", -np.inf), (4, "logits", np.inf)):
        network = random_network()
        weights = network.get_weights()
        weights[position].flat[1] = value
        network.set_weights(weights)
        with pytest.raises(ValueError, match=f"{name!r} holds NaN or inf"):
            call(network)


@pytest.mark.parametrize("copy", [*COPIES.values(), lambda network, x: pruning_utils.apply_masks(network, {})])
def test_training_a_copy_leaves_the_network_alone(copy):
    network, (x, y) = random_network(), images()
    found, before = copy(network, x), bits(network)
    found.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found.fit(x, y, verbose=0)
    assert bits(network) == before and np.isfinite(pruning_utils.outputs(network, x)).all()


def test_masks_of_sequences_reach_the_layers_that_need_them():
    start = keras.Input((7,), dtype="int32")
    signal = Dense(6, "relu")(keras.layers.Embedding(20, 8, mask_zero=True)(start))
    network = keras.Model(start, Dense(3)(Dense(4, "relu")(keras.layers.LSTM(5)(signal))))
    tokens = np.random.default_rng(0).integers(0, 3, (9, 7))
    with pytest.warns(match="LSTM"):
        pruned = prune_neurons(network, 0.5)
    for each in (network, pruned):
        np.testing.assert_allclose(pruning_utils.outputs(each, tokens), predictions(each, tokens), atol=1e-6)
