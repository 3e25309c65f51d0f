"""Masks, scores, pruning, shrinking, cost and measuring: worked examples, properties, and plain-NumPy oracles."""

import doctest
import time

import keras
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

import pruning_utils
from pruning_utils import (
    NEURON_CRITERIA,
    SPARSITIES,
    WEIGHT_CRITERIA,
    Dataset,
    accuracy,
    accuracy_table,
    apply_masks,
    at_weights_left,
    cost,
    keep_masks,
    knee,
    loss,
    mean_interval,
    mean_sd,
    neuron_scores,
    prunable_layers,
    prune_neurons,
    prune_weights,
    relu_network,
    repair,
    shrink,
    sweep,
    time_in_turn,
    verdict,
    weight_scores,
)

INPUTS, HIDDEN, CLASSES = 6, (12, 8), 4
on_scores = settings(deadline=None, max_examples=100, derandomize=True)
on_networks = settings(deadline=None, max_examples=10, derandomize=True)
fractions = st.floats(0, 1)
scores_of_a_layer = nps.arrays(
    np.float32, nps.array_shapes(max_dims=2, max_side=9), elements=st.floats(-9, 9, width=32)
)
coarse_scores = nps.arrays(np.float32, nps.array_shapes(max_dims=2, max_side=9), elements=st.integers(-2, 2))


def random_network(seed=0, use_bias=True, hidden=HIDDEN):
    """A ReLU network with normally distributed weights, biases included."""
    network = relu_network(hidden, INPUTS, CLASSES, use_bias)
    rng = np.random.default_rng(seed)
    network.set_weights([rng.normal(size=weight.shape).astype(np.float32) for weight in network.get_weights()])
    return network


def network_of(*kernels, biases=None, activation="relu"):
    """A chain of Dense layers with these kernels; `biases` (one per layer) or none at all."""
    widths = [len(kernels[0])] + [np.shape(kernel)[1] for kernel in kernels]
    network = keras.Sequential([keras.Input((widths[0],))])
    for units in widths[1:-1]:
        network.add(keras.layers.Dense(units, activation, use_bias=biases is not None))
    network.add(keras.layers.Dense(widths[-1], use_bias=biases is not None))
    pairs = zip(kernels, biases, strict=True) if biases is not None else zip(kernels, strict=True)
    network.set_weights([np.array(array, np.float32) for pair in pairs for array in pair])
    return network


def images(count=50, seed=1):
    rng = np.random.default_rng(seed)
    return rng.random((count, INPUTS), np.float32), rng.integers(0, CLASSES, count)


def kernels(network):
    return [layer.get_weights()[0] for layer in dense(network)]


def dense(network):
    return [layer for layer in network.layers if isinstance(layer, keras.layers.Dense)]


def outputs(network, x):
    return keras.ops.convert_to_numpy(network(x, training=False))


def bits(network):
    return [weight.tobytes() for weight in network.get_weights()]


# --- By hand ------------------------------------------------------------------------------------------------------

KERNEL = np.array([[0.9, -0.1, 0.4], [-0.2, 0.8, 0.05], [0.3, -0.6, -0.7], [0.02, 0.5, -1.0]], np.float32)
OUTPUT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


def test_half_the_weights_of_a_4_by_3_kernel_by_hand():
    pruned = prune_weights(network_of(KERNEL, OUTPUT), 0.5)
    expected = np.array([[0.9, 0, 0], [0, 0.8, 0], [0, -0.6, -0.7], [0, 0.5, -1.0]], np.float32)
    np.testing.assert_array_equal(kernels(pruned)[0], expected)
    np.testing.assert_array_equal(kernels(pruned)[1], OUTPUT)


def test_a_third_of_the_neurons_of_a_4_by_3_kernel_by_hand():
    # The columns' squared norms are 0.94, 1.26 and 1.65: the first goes, although it holds the second largest weight.
    pruned = prune_neurons(network_of(KERNEL, OUTPUT, biases=([7, 8, 9], [1, 1])), 1 / 3)
    kernel, bias, output, output_bias = pruned.get_weights()
    np.testing.assert_array_equal(kernel, KERNEL * [0, 1, 1])
    np.testing.assert_array_equal(bias, [0, 8, 9])
    np.testing.assert_array_equal(output, OUTPUT)
    np.testing.assert_array_equal(output_bias, [1, 1])


def test_layer_scope_takes_the_same_share_of_every_layer_and_global_scope_takes_the_smallest_anywhere():
    scores = {"small": np.array([1.0, 2, 3, 4]), "large": np.array([30.0, 3.5, 20, 40])}
    layerwise, together = keep_masks(scores, 0.5), keep_masks(scores, 0.5, "global")
    assert {name: mask.tolist() for name, mask in layerwise.items()} == {
        "small": [False, False, True, True],
        "large": [True, False, False, True],
    }
    assert {name: mask.tolist() for name, mask in together.items()} == {
        "small": [False, False, False, True],
        "large": [True, False, True, True],
    }


def test_among_equal_scores_the_first_ones_go():
    scores = {"a": np.array([[2.0, 1.0], [1.0, 1.0]]), "b": np.array([1.0, 1.0])}
    assert keep_masks(scores, 0.5)["a"].tolist() == [[True, False], [False, True]]
    assert keep_masks(scores, 0.5)["b"].tolist() == [False, True]
    together = keep_masks(scores, 0.5, "global")
    assert together["a"].tolist() == [[True, False], [False, False]]
    assert together["b"].tolist() == [True, True]


def test_a_mask_per_neuron_takes_the_bias_with_it_and_a_mask_per_weight_does_not():
    network = network_of(KERNEL, OUTPUT, biases=([7, 8, 9], [1, 1]))
    name = network.layers[0].name
    column = np.array([True, False, True])
    assert apply_masks(network, {name: column}).get_weights()[1].tolist() == [7, 0, 9]
    assert apply_masks(network, {name: np.tile(column, (4, 1))}).get_weights()[1].tolist() == [7, 8, 9]


def test_layers_without_a_mask_stay_as_they_are():
    network = random_network()
    pruned = apply_masks(network, {"hidden_2": np.zeros(8, bool)})
    assert bits(pruned)[:2] == bits(network)[:2] and bits(pruned)[4:] == bits(network)[4:]
    assert not pruned.layers[1].get_weights()[0].any() and not pruned.layers[1].get_weights()[1].any()


def test_the_control_that_removes_the_largest_weights_first():
    network = random_network()
    reverse = {name: -score for name, score in weight_scores(network).items()}
    masks = keep_masks(reverse, 0.7)
    pruned = apply_masks(network, masks)
    for before, after, mask in zip(kernels(network)[:-1], kernels(pruned), masks.values(), strict=False):
        assert np.count_nonzero(after) == mask.sum() == mask.size - round(0.7 * mask.size)
        assert np.abs(before[mask]).max() <= np.abs(before[~mask]).min()


def test_doctests():
    failed, attempted = doctest.testmod(pruning_utils)
    assert failed == 0 and attempted >= 4


# --- Masks --------------------------------------------------------------------------------------------------------


def by_stable_sort(scores, sparsity):
    kept = np.ones(scores.size, bool)
    kept[np.argsort(scores.ravel(), kind="stable")[: round(sparsity * scores.size)]] = False
    return kept.reshape(scores.shape)


@on_scores
@given(st.one_of(scores_of_a_layer, coarse_scores), st.one_of(fractions, st.sampled_from(SPARSITIES)))
def test_masks_equal_a_stable_sort(scores, sparsity):
    np.testing.assert_array_equal(keep_masks({"a": scores}, sparsity)["a"], by_stable_sort(scores, sparsity))


@on_scores
@given(st.lists(coarse_scores, min_size=1, max_size=4), fractions)
def test_global_masks_equal_a_stable_sort_of_all_layers_end_to_end(layers, sparsity):
    masks = keep_masks(dict(enumerate(layers)), sparsity, "global")
    everything = by_stable_sort(np.concatenate([scores.ravel() for scores in layers]), sparsity)
    np.testing.assert_array_equal(np.concatenate([mask.ravel() for mask in masks.values()]), everything)
    assert [mask.shape for mask in masks.values()] == [scores.shape for scores in layers]


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 1.0])
@pytest.mark.parametrize("size", [1, 3, 10, 997, 200_000])
def test_exactly_the_rounded_share_is_removed(sparsity, size):
    distinct, equal = np.random.default_rng(size).random(size), np.ones(size)
    for scores in (distinct, equal):
        mask = keep_masks({"a": scores}, sparsity)["a"]
        assert mask.dtype == bool and mask.sum() == size - round(sparsity * size)


@on_scores
@given(coarse_scores, fractions, fractions, st.sampled_from(["layer", "global"]))
def test_masks_are_nested_as_sparsity_grows(scores, one, other, scope):
    layers = {"a": scores, "b": scores[::-1]}
    loose, tight = (keep_masks(layers, sparsity, scope) for sparsity in sorted((one, other)))
    assert all(not (tight[name] & ~loose[name]).any() for name in layers)


# --- Pruned networks ----------------------------------------------------------------------------------------------

seeds = st.integers(0, 99)


@on_networks
@given(seeds, st.sampled_from(SPARSITIES), st.booleans())
def test_weight_pruning_leaves_exact_counts_and_the_output_layer_and_biases_intact(seed, sparsity, use_bias):
    network = random_network(seed, use_bias)
    pruned = prune_weights(network, sparsity)
    for layer, before in zip(dense(pruned)[:-1], kernels(network), strict=False):
        after = layer.get_weights()[0]
        assert np.count_nonzero(after) == before.size - round(sparsity * before.size)
        assert np.array_equal(after[after != 0], before[after != 0])
        assert np.abs(before[after == 0]).max(initial=0) <= np.abs(after[after != 0]).min(initial=np.inf)
    assert [layer.get_weights()[1:] for layer in dense(pruned)[:-1]] == [[]] * 2 or use_bias
    for after, before in zip(pruned.get_weights(), network.get_weights(), strict=True):
        assert after.ndim == 2 or after.tobytes() == before.tobytes()
    assert bits(pruned)[-2:] == bits(network)[-2:]


@on_networks
@given(seeds, st.sampled_from(SPARSITIES), st.booleans())
def test_neuron_pruning_zeroes_whole_columns_with_their_biases_and_nothing_else(seed, sparsity, use_bias):
    network = random_network(seed, use_bias)
    pruned = prune_neurons(network, sparsity)
    for after, before in zip(dense(pruned)[:-1], dense(network), strict=False):
        kept = after.get_weights()[0].any(axis=0)
        assert kept.sum() == before.units - round(sparsity * before.units)
        for new, old in zip(after.get_weights(), before.get_weights(), strict=True):
            np.testing.assert_array_equal(new, old * kept)
    assert bits(pruned)[-2:] == bits(network)[-2:]


@on_networks
@given(seeds, fractions, st.sampled_from(["layer", "global"]))
def test_pruning_a_pruned_network_again_changes_nothing(seed, sparsity, scope):
    for prune in (prune_weights, prune_neurons):
        pruned = prune(random_network(seed), sparsity, scope=scope)
        assert bits(prune(pruned, sparsity, scope=scope)) == bits(pruned)


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_0_changes_no_bit(prune, scope):
    network = random_network()
    network.layers[0].set_weights([np.where(np.eye(6, 12) > 0, np.float32(-0.0), 1), np.ones(12)])
    pruned = prune(network, 0, scope=scope)
    assert pruned is not network and bits(pruned) == bits(network)


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
def test_sparsity_1_prunes_everything_and_the_rest_still_works(prune):
    x, y = images()
    network = relu_network(HIDDEN, INPUTS, CLASSES, seed=0)
    pruned = prune(network, 1.0)
    assert not any(kernel.any() for kernel in kernels(pruned)[:-1])
    assert accuracy(pruned, x, y) == np.mean(y == 0)
    assert loss(pruned, x, y) == pytest.approx(np.log(CLASSES), rel=1e-6)
    assert cost(pruned)["weights_left"] == 0
    assert cost(pruned)["units_left"] == {"hidden_1": 0, "hidden_2": 0}
    assert cost(pruned)["multiply_adds"] == 6 * 1 + 1 * 1 + 1 * 4
    assert [layer.units for layer in dense(shrink(pruned))] == [1, 1, 4]
    np.testing.assert_array_equal(outputs(shrink(pruned), x), outputs(pruned, x))


EVERYTHING = {
    "prune_weights": lambda network, x, y: prune_weights(network, 0.5, "taylor", "global", x=x, y=y),
    "prune_neurons": lambda network, x, y: prune_neurons(network, 0.5, "taylor", "global", x=x, y=y),
    "apply_masks": lambda network, x, y: apply_masks(network, {"hidden_1": np.zeros(12, bool)}),
    "weight_scores": lambda network, x, y: weight_scores(network)["hidden_1"].fill(0),
    "neuron_scores": lambda network, x, y: neuron_scores(network, "activation", x)["hidden_1"].fill(0),
    "reconstruction": lambda network, x, y: neuron_scores(network, "reconstruction", x)["hidden_1"].fill(0),
    "repair": lambda network, x, y: repair(prune_neurons(network, 0.5), network, x),
    "repair of itself": lambda network, x, y: repair(network, network, x),
    "shrink": lambda network, x, y: shrink(network),
    "cost": lambda network, x, y: cost(network),
    "accuracy": lambda network, x, y: accuracy(network, x, y),
    "loss": lambda network, x, y: loss(network, x, y),
    "sweep": lambda network, x, y: sweep([network], Dataset("d", x, y, x, y, ()), {"m": prune_neurons}, (0.0, 0.5)),
}


@pytest.mark.parametrize("function", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_arguments_stay_as_they_were_bit_for_bit(function):
    network, (x, y) = random_network(), images()
    before = [*bits(network), x.tobytes(), y.tobytes()]
    function(network, x, y)
    assert [*bits(network), x.tobytes(), y.tobytes()] == before


def test_changing_the_copy_leaves_the_original_alone():
    network = random_network()
    before = bits(network)
    for copy in (prune_weights(network, 0), shrink(network)):
        copy.set_weights([weight + 1 for weight in copy.get_weights()])
    assert bits(network) == before


def with_permuted_units(network, order):
    weights = network.get_weights()
    weights[0], weights[1], weights[2] = weights[0][:, order], weights[1][order], weights[2][order]
    copy = random_network()
    copy.set_weights(weights)
    return copy


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("prune", "criterion"),
    [(prune_weights, name) for name in WEIGHT_CRITERIA if name != "random"]
    + [(prune_neurons, name) for name in NEURON_CRITERIA if name != "random"],
)
def test_permuting_units_permutes_the_result(prune, criterion, scope):
    network, (x, y) = random_network(), images()
    order = np.random.default_rng(5).permutation(12)
    first = with_permuted_units(prune(network, 0.6, criterion, scope, x=x, y=y), order)
    second = prune(with_permuted_units(network, order), 0.6, criterion, scope, x=x, y=y)
    assert bits(first) == bits(second)


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
def test_pruning_is_masking_by_the_scores_of_the_criterion(prune):
    network, (x, y) = random_network(), images()
    data = {"x": x, "y": y, "seed": 3}
    for criterion in WEIGHT_CRITERIA if prune is prune_weights else NEURON_CRITERIA:
        scores = (weight_scores if prune is prune_weights else neuron_scores)(network, criterion, **data)
        layerwise = apply_masks(network, keep_masks(scores, 0.4))
        assert bits(prune(network, 0.4, criterion, **data)) == bits(layerwise)
        if prune is prune_neurons:  # together they are ranked by how many units of their own layer are better
            scores = {name: np.array([-np.sum(score > own) for own in score]) for name, score in scores.items()}
        together = apply_masks(network, keep_masks(scores, 0.4, "global"))
        assert bits(prune(network, 0.4, criterion, "global", **data)) == bits(together)


# --- Scores against plain NumPy -----------------------------------------------------------------------------------


def forward(network, x):
    """The inputs and pre-activations of every Dense layer of a ReLU network, in float64."""
    signal, inputs, sums = x.astype(np.float64), [], []
    for layer in dense(network):
        kernel, *bias = layer.get_weights()
        inputs.append(signal)
        sums.append(signal @ kernel + (bias[0] if bias else 0))
        signal = np.maximum(sums[-1], 0)
    return inputs, sums


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def backward(network, x, y):
    """Gradients of each image's cross-entropy by the pre-activations of every Dense layer."""
    _, sums = forward(network, x)
    deltas = [softmax(sums[-1]) - np.eye(CLASSES)[y]]
    for kernel, z in zip(kernels(network)[:0:-1], sums[-2::-1], strict=True):
        deltas.insert(0, deltas[0] @ kernel.T * (z > 0))
    return deltas


def weight_oracle(criterion, network, x, y):
    inputs, _ = forward(network, x)
    for kernel, a, delta in zip(kernels(network), inputs, backward(network, x, y), strict=True):
        if criterion == "magnitude":
            yield np.abs(kernel)
        elif criterion == "activation":
            yield np.abs(kernel) * np.sqrt(np.mean(a**2, axis=0))[:, None]
        elif criterion == "taylor":
            gradients = a[:, :, None] * delta[:, None, :]  # one kernel per image
            yield np.mean(np.abs(kernel * gradients), axis=0)


def greedy_selection(outputs, kernel, ridge):
    """Take one unit after the other, each time the one that leaves the least error; try them all, solve every time.

    Returns the units in order, and the share of the squared `outputs @ kernel` that was unexplained before each.
    """
    outputs = np.linalg.qr(outputs, mode="r")  # the same sums of squares, from fewer rows
    wanted = outputs @ kernel
    strength = ridge * np.mean(np.sum(outputs**2, axis=0))
    taken, shares, left = [], [], list(range(len(kernel)))

    def unexplained(units):
        rows = np.vstack([outputs[:, units], np.sqrt(strength) * np.eye(len(units))])
        target = np.vstack([wanted, np.zeros((len(units), wanted.shape[1]))])
        return np.sum((rows @ np.linalg.lstsq(rows, target, rcond=None)[0] - target) ** 2)

    while left:
        shares.append(unexplained(taken) / np.sum(wanted**2) if taken else 1.0)
        taken.append(min(left, key=lambda unit: unexplained([*taken, unit])))
        left.remove(taken[-1])
    return np.array(taken), np.array(shares)


def neuron_oracle(criterion, network, x, y):
    inputs, sums = forward(network, x)
    deltas = backward(network, x, y)
    for i in range(len(inputs) - 1):
        if criterion == "norm":
            yield np.array([np.linalg.norm(column) for column in kernels(network)[i].T])
        elif criterion == "activation":
            outgoing = np.array([np.linalg.norm(row) for row in kernels(network)[i + 1]])
            yield np.sqrt(np.mean(inputs[i + 1] ** 2, axis=0)) * outgoing
        elif criterion == "taylor":
            yield np.mean(np.abs(sums[i] * deltas[i]), axis=0)
        elif criterion == "reconstruction":
            order, shares = greedy_selection(inputs[i + 1], kernels(network)[i + 1].astype(np.float64), ridge=1e-3)
            yield shares[np.argsort(order)]


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("criterion", [name for name in WEIGHT_CRITERIA if name != "random"])
def test_weight_scores_equal_plain_numpy(criterion, use_bias):
    network, (x, y) = random_network(3, use_bias), images(2_203)
    scores = weight_scores(network, criterion, x, y)
    assert list(scores) == ["hidden_1", "hidden_2"]
    for score, expected in zip(scores.values(), weight_oracle(criterion, network, x, y), strict=False):
        np.testing.assert_allclose(score, expected, rtol=1e-4)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("criterion", [name for name in NEURON_CRITERIA if name != "random"])
def test_neuron_scores_equal_plain_numpy(criterion, use_bias):
    network, (x, y) = random_network(3, use_bias), images(2_203)
    scores = neuron_scores(network, criterion, x, y)
    assert list(scores) == ["hidden_1", "hidden_2"]
    for score, expected in zip(scores.values(), neuron_oracle(criterion, network, x, y), strict=True):
        np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-7)


def test_taylor_scores_predict_the_change_of_the_loss():
    # One image, one unit scaled by 1 - t: the loss changes by t · pre-activation · gradient, to first order.
    network, (x, y) = random_network(3), images(1)
    score = neuron_scores(network, "taylor", x, y)["hidden_1"]
    kernel, bias, *rest = network.get_weights()
    t = 1e-2
    for unit in range(12):
        scale = np.where(np.arange(12) == unit, [[1 + t], [1 - t]], 1)
        up, down = (loss(_with(network, [kernel * s, bias * s, *rest]), x, y) for s in scale)
        assert abs(up - down) / (2 * t) == pytest.approx(score[unit], rel=0.02, abs=1e-3)


def _with(network, weights):
    copy = keras.models.clone_model(network)
    copy.set_weights(weights)
    return copy


@pytest.mark.parametrize("scores", [weight_scores, neuron_scores])
def test_random_scores_depend_on_the_seed_alone(scores):
    one, same = (scores(random_network(seed, hidden=(50, 50)), "random", seed=7) for seed in (0, 1))
    other = scores(random_network(hidden=(50, 50)), "random", seed=8)
    for name in ("hidden_1", "hidden_2"):
        np.testing.assert_array_equal(one[name], same[name])
        assert abs(np.corrcoef(one[name].ravel(), other[name].ravel())[0, 1]) < 0.5
        assert np.unique(one[name]).size == one[name].size and 0.3 < one[name].mean() < 0.7
    assert not np.array_equal(one["hidden_1"].ravel()[:50], one["hidden_2"].ravel()[:50])


def test_every_criterion_has_an_oracle_here():
    assert set(WEIGHT_CRITERIA) == {"magnitude", "activation", "taylor", "random"}
    assert set(NEURON_CRITERIA) == {"norm", "activation", "taylor", "reconstruction", "random"}


@pytest.mark.parametrize("use_bias", [False, True])
def test_accuracy_and_loss_equal_plain_numpy(use_bias):
    network, (x, y) = random_network(4, use_bias), images(10_007)
    logits = forward(network, x)[1][-1]
    assert accuracy(network, x, y) == pytest.approx(np.mean(logits.argmax(axis=1) == y), abs=1e-4)
    assert loss(network, x, y) == pytest.approx(-np.mean(np.log(softmax(logits)[np.arange(len(y)), y])), rel=1e-5)


def test_equal_outputs_count_for_the_first_class():
    network = network_of(np.zeros((2, 2)), np.zeros((2, 3)))
    assert accuracy(network, np.ones((4, 2)), np.array([0, 1, 2, 0])) == 0.5


# --- Shrinking and cost -------------------------------------------------------------------------------------------


@on_networks
@given(
    seeds,
    fractions,
    st.booleans(),
    st.sampled_from([prune_weights, prune_neurons]),
    st.sampled_from(["layer", "global"]),
)
def test_the_shrunk_network_computes_what_the_masked_one_does(seed, sparsity, use_bias, prune, scope):
    pruned, (x, _) = prune(random_network(seed, use_bias), sparsity, scope=scope), images()
    small = shrink(pruned)
    np.testing.assert_allclose(outputs(small, x), outputs(pruned, x), rtol=1e-5, atol=1e-5)
    units = [max(1, left) for left in cost(pruned)["units_left"].values()]
    assert [layer.units for layer in dense(small)] == [*units, CLASSES]
    assert [layer.name for layer in dense(small)] == [layer.name for layer in dense(pruned)]
    assert cost(pruned)["bytes"] == cost(small)["bytes"] == sum(weight.nbytes for weight in small.get_weights())
    assert cost(pruned)["multiply_adds"] == sum(kernel.size for kernel in kernels(small))
    assert cost(pruned)["weights_left"] == cost(small)["weights_left"]


def test_neuron_pruned_networks_shrink_to_the_units_that_were_kept():
    assert [layer.units for layer in dense(shrink(prune_neurons(random_network(), 0.5)))] == [6, 4, 4]


def test_units_that_are_dead_only_through_others_go_too():
    # Unit 0 of the first layer hears no input, so unit 0 of the second, which hears only that one, is dead as well.
    # Unit 2 of the second layer is not heard, so unit 2 of the first, which is heard only by that one, is dead as well.
    first = [[0, 1, 2], [0, -3, 4]]
    second = [[5, 0, 0], [0, 6, 7], [0, 0, 8]]
    third = [[1, 2], [3, -4], [0, 0]]
    network = network_of(first, second, third, np.eye(2))
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    assert [layer.units for layer in dense(shrink(network))] == [1, 1, 2, 2]
    np.testing.assert_allclose(outputs(shrink(network), x), outputs(network, x), rtol=1e-6)
    left = cost(network)
    assert list(left["units_left"].values()) == [1, 1, 2]
    assert left["weights_left"] == 2 + 1 + 2
    assert left["multiply_adds"] == 2 * 1 + 1 * 1 + 1 * 2 + 2 * 2
    assert left["bytes"] == 4 * left["multiply_adds"]


def test_a_unit_that_hears_nothing_but_has_a_bias_survives():
    network = network_of([[0, 0, 1], [0, 0, 2]], [[3, 1], [1, 4], [1, 1]], biases=([5, 0, 0], [0, 0]))
    small, x = shrink(network), np.ones((1, 2), np.float32)
    assert [layer.units for layer in dense(small)] == [2, 2]
    np.testing.assert_allclose(outputs(small, x), outputs(network, x))
    np.testing.assert_allclose(outputs(small, x), [[5 * 3 + 3, 5 + 3]])
    assert cost(network) == {
        "weights_left": 2,
        "units_left": {network.layers[0].name: 2},
        "multiply_adds": 2 * 2 + 2 * 2,
        "bytes": 4 * (2 * 2 + 2 + 2 * 2 + 2),
    }


def test_weights_into_a_removed_unit_and_out_of_it_are_not_left():
    network = network_of(np.ones((2, 3)), np.ones((3, 3)), np.ones((3, 2)))
    names = [layer.name for layer in network.layers]
    pruned = apply_masks(network, {names[0]: np.array([True, False, False])})
    assert cost(pruned)["weights_left"] == 2 * 1 + 1 * 3  # the other two rows of the second kernel idle


# `evidence.md`, "Neuron k is not weight k": sparsity -> hidden weights removed (%), units left.
NEURON_COST = {
    0.25: (37.58, (750, 750, 375, 150)),
    0.5: (66.78, (500, 500, 250, 100)),
    0.6: (76.11, (400, 400, 200, 80)),
    0.7: (84.09, (300, 300, 150, 60)),
    0.8: (90.74, (200, 200, 100, 40)),
    0.9: (96.04, (100, 100, 50, 20)),
    0.95: (98.19, (50, 50, 25, 10)),
    0.97: (98.95, (30, 30, 15, 6)),
    0.99: (99.66, (10, 10, 5, 2)),
}


@pytest.fixture(scope="module")
def full_size():
    return relu_network(seed=0)


def test_the_cost_of_the_network_of_the_study(full_size):
    assert cost(full_size) == {
        "weights_left": 2_384_000,
        "units_left": {"hidden_1": 1000, "hidden_2": 1000, "hidden_3": 500, "hidden_4": 200},
        "multiply_adds": 2_386_000,
        "bytes": 4 * 2_386_010,
    }


@pytest.mark.parametrize("sparsity", NEURON_COST)
def test_removing_a_share_of_the_neurons_removes_more_of_the_weights(full_size, sparsity):
    percent, units = NEURON_COST[sparsity]
    left = cost(prune_neurons(full_size, sparsity))
    widths = (784, *units)
    assert tuple(left["units_left"].values()) == units
    assert left["weights_left"] == sum(np.multiply(widths[:-1], widths[1:]))
    assert round(100 * (1 - left["weights_left"] / 2_384_000), 2) == percent
    assert left["multiply_adds"] == left["weights_left"] + 10 * units[-1]
    assert left["bytes"] == 4 * (left["multiply_adds"] + 10)


def test_removing_half_of_the_weights_leaves_half_of_them(full_size):
    left = cost(prune_weights(full_size, 0.5))
    assert left["weights_left"] == 1_192_000 and left["multiply_adds"] == 2_386_000


# --- Other chains of Dense layers ---------------------------------------------------------------------------------


def gentle_network():
    """A random network whose probabilities float32 can tell from 0."""
    network = random_network()
    network.set_weights([weight / 3 for weight in network.get_weights()])
    return network


def functional_network():
    """Images of 2 x 3 pixels in, probabilities out, and one of every supported layer on the way."""
    inputs = signal = keras.Input((2, 3))
    for layer in (
        keras.layers.Flatten(),
        keras.layers.Dense(12, name="hidden_1"),
        keras.layers.Activation("relu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(8, name="hidden_2", trainable=False),
        keras.layers.ReLU(),
        keras.layers.Dense(CLASSES, "softmax", name="logits"),
    ):
        signal = layer(signal)
    network = keras.Model(inputs, signal)
    network.set_weights(gentle_network().get_weights())
    return network


def as_functional(network):
    inputs = keras.Input((INPUTS,))
    signal = inputs
    for layer in network.layers:
        signal = layer(signal)
    return keras.Model(inputs, signal)


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
def test_functional_and_sequential_networks_are_pruned_alike(prune):
    network, (x, y) = random_network(), images()
    twin = as_functional(network)
    for criterion in WEIGHT_CRITERIA if prune is prune_weights else NEURON_CRITERIA:
        pruned, pruned_twin = (prune(n, 0.5, criterion, "layer", x=x, y=y, seed=0) for n in (network, twin))
        assert bits(pruned) == bits(pruned_twin) and bits(pruned) != bits(network)
        assert bits(shrink(pruned)) == bits(shrink(pruned_twin)) and cost(pruned) == cost(pruned_twin)


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
def test_layers_between_the_dense_ones_change_nothing(prune):
    plain, network, (x, y) = gentle_network(), functional_network(), images()
    pictures = x.reshape(-1, 2, 3)
    assert [layer.name for layer in prunable_layers(network)] == ["hidden_1", "hidden_2"]
    for criterion in WEIGHT_CRITERIA if prune is prune_weights else NEURON_CRITERIA:
        pruned = prune(network, 0.7, criterion, "layer", x=pictures, y=y, seed=0)
        assert bits(pruned) == bits(prune(plain, 0.7, criterion, "layer", x=x, y=y, seed=0))
        small = shrink(pruned)
        np.testing.assert_allclose(outputs(small, pictures), outputs(pruned, pictures), atol=1e-5)
        assert [type(layer).__name__ for layer in small.layers] == [
            "Flatten", "Dense", "Activation", "Dropout", "Dense", "ReLU", "Dense"
        ]  # fmt: skip


def test_softmax_outputs_are_measured_as_probabilities():
    network, plain, (x, y) = functional_network(), gentle_network(), images(200)
    pictures, logits = x.reshape(-1, 2, 3), forward(plain, x)[1][-1]
    expected = -np.mean(np.log(softmax(logits)[np.arange(200), y]))
    assert loss(network, pictures, y) == pytest.approx(expected, rel=1e-4)
    assert accuracy(network, pictures, y) == np.mean(logits.argmax(axis=1) == y)
    with_layer = keras.Sequential([keras.Input((INPUTS,)), *plain.layers, keras.layers.Activation("softmax")])
    assert loss(with_layer, x, y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu"])
def test_neurons_can_go_where_the_activation_of_0_is_0(activation):
    rng = np.random.default_rng(0)
    network = network_of(*(rng.normal(size=shape) for shape in ((6, 12), (12, 8), (8, 4))), activation=activation)
    pruned, (x, _) = prune_neurons(network, 0.5), images()
    assert [layer.units for layer in dense(shrink(pruned))] == [6, 4, 4]
    np.testing.assert_allclose(outputs(shrink(pruned), x), outputs(pruned, x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def sigmoid_network():
    rng = np.random.default_rng(0)
    arrays = (rng.normal(size=shape) for shape in ((6, 12), (12, 8), (8, 4)))
    return network_of(*arrays, activation="sigmoid")


def test_sigmoid_neurons_cannot_be_removed_because_they_fire_at_0(sigmoid_network):
    with pytest.raises(ValueError, match=sigmoid_network.layers[0].name):
        prune_neurons(sigmoid_network, 0.5)
    assert bits(prune_neurons(sigmoid_network, 0)) == bits(sigmoid_network)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97, 1.0])
def test_shrinking_a_sigmoid_network_stays_exact(sigmoid_network, sparsity):
    pruned, (x, _) = prune_weights(sigmoid_network, sparsity), images()
    np.testing.assert_allclose(outputs(shrink(pruned), x), outputs(pruned, x), rtol=1e-5, atol=1e-5)


def test_units_that_fire_at_0_all_stay_even_those_that_nobody_hears():
    network = network_of(np.zeros((2, 3)), [[1, 2], [0, 0], [3, 4]], activation="sigmoid")
    x = np.ones((1, 2), np.float32)
    assert dense(shrink(network))[0].units == 3
    np.testing.assert_allclose(outputs(shrink(network), x), [[0.5 * 4, 0.5 * 6]])


def test_shrinking_never_changes_what_a_hidden_softmax_computes():
    # Softmax divides by the sum over all units: one that nobody hears still matters.
    network = network_of(np.eye(2), [[1, 2], [0, 0]], activation="softmax")
    x = np.ones((1, 2), np.float32)
    np.testing.assert_allclose(outputs(shrink(network), x), outputs(network, x), rtol=1e-6)


# --- Measuring ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    (x, y), (x_test, y_test) = images(100), images(300, seed=2)
    return Dataset("tiny", x, y, x_test, y_test, tuple("abcd"))


def test_a_sweep_has_one_row_per_pruned_network_that_says_what_measuring_it_by_hand_says(dataset):
    networks = [random_network(seed) for seed in (0, 1, 2)]
    methods = {
        "weight pruning": prune_weights,
        "neuron pruning": lambda network, s: prune_neurons(network, s, "taylor", x=dataset.x_train, y=dataset.y_train),
    }
    sparsities = (0.0, 0.5, 0.9, 1.0)
    frame = sweep(networks, dataset, methods, sparsities)
    names = ["dataset", "method", "seed", "sparsity", "accuracy", "loss", "weights_left", "multiply_adds"]
    assert list(frame) == names and len(frame) == 2 * 3 * 4
    assert set(zip(frame["method"], frame["seed"], frame["sparsity"], strict=True)) == {
        (method, seed, sparsity) for method in methods for seed in range(3) for sparsity in sparsities
    }
    for row in frame.itertuples():
        pruned = methods[row.method](networks[row.seed], row.sparsity)
        assert row.dataset == "tiny"
        assert row.accuracy == pytest.approx(accuracy(pruned, dataset.x_test, dataset.y_test), abs=1 / 300)
        assert row.loss == pytest.approx(loss(pruned, dataset.x_test, dataset.y_test), rel=1e-5)
        assert (row.weights_left, row.multiply_adds) == (cost(pruned)["weights_left"], cost(pruned)["multiply_adds"])


def test_a_sweep_runs_over_the_sparsities_of_the_study_unless_told_otherwise(dataset):
    frame = sweep([random_network()], dataset, {"m": lambda network, sparsity: network})
    assert tuple(frame["sparsity"]) == SPARSITIES == (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)


def curve(accuracies, sparsities=(0.0, 0.5, 0.9), method="m", seed=0):
    rows = {"dataset": "d", "method": method, "seed": seed, "sparsity": sparsities, "accuracy": accuracies}
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("drop", "where"),
    [
        (1, 0.25),  # 97 % lies half-way between 98 % and 96 %
        (2, 0.5),  # a measured point
        (10, 0.5 + 0.4 * 8 / 48),  # 88 % lies 8 of 48 points down the second line
        (50, 0.9),  # the last point
        (50.1, np.nan),  # never falls that far
    ],
)
def test_knee_by_hand(drop, where):
    shuffled = curve([0.98, 0.96, 0.48]).iloc[[2, 0, 1]]
    found = knee(shuffled, drop)
    assert list(found) == ["dataset", "method", "seed", "knee"]
    assert found["knee"].item() == pytest.approx(where, nan_ok=True)


def test_knee_is_where_accuracy_falls_for_the_first_time():
    found = knee(curve([0.90, 0.80, 0.90, 0.0], (0.0, 0.2, 0.4, 0.6)), 5)
    assert found["knee"].item() == pytest.approx(0.1)
    rising = knee(curve([0.90, 0.95, 0.75], (0.0, 0.5, 0.9)), 5)
    assert rising["knee"].item() == pytest.approx(0.5 + 0.4 * 10 / 20)


def test_knee_has_one_row_per_method_and_seed():
    frame = pd.concat([curve([0.9, 0.8, 0.1]), curve([0.9, 0.9, 0.9], seed=1), curve([0.9, 0.1, 0.1], method="n")])
    found = knee(frame, 10)
    assert found[["method", "seed"]].to_numpy().tolist() == [["m", 0], ["m", 1], ["n", 0]]
    np.testing.assert_allclose(found["knee"], [0.5, np.nan, 0.5 / 8])


def test_knee_needs_the_accuracy_at_sparsity_0():
    with pytest.raises(ValueError, match="sparsity 0"):
        knee(curve([0.98, 0.96, 0.48], (0.1, 0.5, 0.9)), 1)


def test_the_table_shows_percent_over_seeds_with_sparsities_down_and_methods_across():
    frame = pd.concat([curve([0.9, 0.8, 0.1]), curve([0.92, 0.8, 0.3], seed=1), curve([0.5, 0.4, 0.3], method="n"),
                       curve([0.7, 0.4, 0.3], method="n", seed=1)])  # fmt: skip
    table = accuracy_table(frame)
    assert table.index.tolist() == ["0", "50", "90"] and table.columns.tolist() == ["d, m", "d, n"]
    assert table["d, m"].tolist() == ["91.0 ± 1.4", "80.0 ± 0.0", "20.0 ± 14.1"]
    assert table.loc["0", "d, n"] == "60.0 ± 14.1"


def test_the_table_keeps_sparsities_apart_that_round_to_the_same_percentage():
    frame = pd.concat([curve([0.9, 0.8, 0.1], (0.0, 0.98, 0.985), seed=seed) for seed in (0, 1)])
    assert accuracy_table(frame).index.tolist() == ["0", "98", "98.5"]


def test_accuracy_at_weights_left_by_hand():
    """Half-way between 100 and 10,000 weights, on a logarithmic axis, are 1,000."""
    frame = curve([0.9, 0.5, 0.1]).assign(weights_left=[10_000, 100, 0])
    table = at_weights_left(pd.concat([frame, frame.assign(seed=1, accuracy=0.3)]), [100, 1000, 10_000])
    assert list(table.columns) == ["100", "1,000", "10,000"]
    assert list(table.index) == [("d", "m", 0), ("d", "m", 1)]
    np.testing.assert_allclose(table, [[50, 70, 90], [30, 30, 30]])


@pytest.mark.parametrize("budgets", [[99], [100, 10_001], [0]])
def test_accuracy_at_weights_left_is_never_guessed(budgets):
    frame = curve([0.9, 0.5, 0.1]).assign(weights_left=[10_000, 100, 0])
    with pytest.raises(ValueError, match=r"between the 100 and 10,000 weights left"):
        at_weights_left(frame, budgets)


def test_mean_sd_is_text_with_the_sample_standard_deviation():
    assert mean_sd([90.0, 92.0, 91.0]) == "91.0 ± 1.0"
    assert mean_sd(np.array([1, 2]), digits=3) == "1.500 ± 0.707"
    assert mean_sd([1200, 1300, 1400], digits=0) == "1300 ± 100"


def test_mean_interval_is_students_interval_of_the_mean():
    # By hand: sd 1, so the standard error is 1 / sqrt(3), and t(0.975; 2 degrees of freedom) = 4.3027.
    assert mean_interval([90.0, 92.0, 91.0]) == "91.0 ± 2.5"
    assert mean_interval(np.array([90.0, 92.0, 91.0]), digits=4) == "91.0000 ± 2.4841"
    values = np.random.default_rng(0).normal(5, 2, 7)
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values, 3) == f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f}"


def test_time_in_turn_calls_everyone_in_every_round_and_does_not_count_the_warm_up():
    calls = []

    def contender(name, first, later):
        def run():
            time.sleep(first if name not in calls else later)
            calls.append(name)

        return run

    frame = time_in_turn({"slow": contender("slow", 0.3, 0.05), "quick": contender("quick", 0.3, 0.01)}, 3, seconds=0)
    assert calls == ["slow", "slow", "quick", "quick", *["slow", "quick"] * 3]
    assert frame.shape == (3, 2)
    assert (frame["slow"] > 0.05).all()
    assert (frame["quick"] > 0.01).all()
    assert frame.median()["quick"] < frame.median()["slow"] < 0.3


def test_time_in_turn_repeats_what_is_quick_and_returns_seconds_of_one_call(monkeypatch):
    calls = []

    def clock(run, number):  # a call takes 10 ms, whatever this machine is busy with
        for _ in range(number):
            run()
        return 0.01 * number

    monkeypatch.setattr(pruning_utils.timeit, "timeit", clock)
    frame = time_in_turn({"quick": lambda: calls.append(1)}, rounds=2, seconds=0.05)
    assert len(calls) == 1 + 1 + 2 * 5
    assert frame["quick"].to_list() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"at_least": 88.4}, "supported"),  # the interval is 88.52 to 93.48
        ({"at_least": 88.6}, "undecided"),
        ({"at_least": 93.6}, "refuted"),
        ({"at_most": 93.6}, "supported"),
        ({"at_most": 93.4}, "undecided"),
        ({"at_most": 88.4}, "refuted"),
        ({"at_least": 88.4, "at_most": 93.6}, "supported"),
        ({"at_least": 90.0, "at_most": 92.0}, "undecided"),
        ({"at_least": 10.0, "at_most": 20.0}, "refuted"),
    ],
)
def test_verdict_asks_whether_the_whole_interval_lies_in_the_range(limits, expected):
    assert verdict([90.0, 92.0, 91.0], **limits) == expected


@pytest.mark.parametrize("summary", [mean_sd, mean_interval, verdict])
@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [1.0, np.inf]])
def test_summaries_refuse_what_has_no_spread(summary, values):
    with pytest.raises(ValueError, match="two or more finite values"):
        summary(values)


# --- What bad input gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
@pytest.mark.parametrize(
    ("sparsity", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        (np.nan, ValueError),
        ("50%", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_a_sparsity_outside_0_to_1_is_refused_with_its_value_and_the_range(prune, sparsity, error):
    with pytest.raises(error) as caught:
        prune(random_network(), sparsity)
    assert repr(sparsity) in str(caught.value) and "[0, 1]" in str(caught.value)


@pytest.mark.parametrize("sparsity", [0, 1, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_any_number_in_the_range_is_a_sparsity(sparsity):
    assert keep_masks({"a": np.arange(4.0)}, sparsity)["a"].sum() == 4 - round(4 * float(sparsity))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda network: prune_weights(network, 0.5, "norm"), WEIGHT_CRITERIA),
        (lambda network: prune_neurons(network, 0.5, "magnitude"), NEURON_CRITERIA),
        (lambda network: weight_scores(network, "best"), WEIGHT_CRITERIA),
        (lambda network: neuron_scores(network, None), NEURON_CRITERIA),
        (lambda network: prune_weights(network, 0.5, scope="all"), ("layer", "global")),
        (lambda network: prune_neurons(network, 0.5, scope="all"), ("layer", "global")),
        (lambda network: keep_masks({"a": np.ones(2)}, 0.5, "Layer"), ("layer", "global")),
    ],
)
def test_an_unknown_name_is_answered_with_the_valid_ones(call, names):
    with pytest.raises(ValueError, match=r"unknown (weight criterion|neuron criterion|scope)") as caught:
        call(random_network())
    assert all(name in str(caught.value) for name in names)


REFUSES_NAN = {
    "accuracy": lambda network, x, y: accuracy(network, x, y),
    "loss": lambda network, x, y: loss(network, x, y),
    "prune_weights": lambda network, x, y: prune_weights(network, 0.5),
    "prune_neurons": lambda network, x, y: prune_neurons(network, 0.5),
    "weight_scores": lambda network, x, y: weight_scores(network, "taylor", x, y),
    "neuron_scores": lambda network, x, y: neuron_scores(network, "random", seed=0),
    "reconstruction": lambda network, x, y: neuron_scores(network, "reconstruction", x),
    "apply_masks": lambda network, x, y: apply_masks(network, {}),
    "repair": lambda network, x, y: repair(network, random_network(), x),
    "repair by it": lambda network, x, y: repair(random_network(), network, x),
    "sweep": lambda network, x, y: sweep([network], Dataset("d", x, y, x, y, ()), {"m": lambda n, s: n}, (0.0,)),
}


@pytest.mark.parametrize("call", REFUSES_NAN.values(), ids=REFUSES_NAN.keys())
@pytest.mark.parametrize(("position", "name"), [(0, "hidden_1"), (3, "hidden_2"), (4, "logits")])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_network_with_nan_or_inf_is_refused_by_the_name_of_the_layer(call, position, name, value):
    network = random_network()
    weights = network.get_weights()
    weights[position].flat[1] = value
    network.set_weights(weights)
    with pytest.raises(ValueError, match=f"{name!r} holds NaN or inf"):
        call(network, *images())


def test_nan_scores_are_refused_by_the_name_of_the_layer():
    with pytest.raises(ValueError, match=r"'b'.*NaN"):
        keep_masks({"a": np.ones(2), "b": np.array([1, np.nan])}, 0.5)


def layers_network(*layers, inputs=(6,)):
    return keras.Sequential([keras.Input(inputs), *layers])


def Dense(units=4, **options):
    return keras.layers.Dense(units, **options)


def functional(connect):
    inputs = keras.Input((6,))
    return keras.Model(inputs, connect(inputs))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: layers_network(keras.layers.Conv2D(2, 3, name="odd"), keras.layers.Flatten(), Dense(), Dense(),
                                inputs=(8, 8, 1)), "Conv2D"),
        (lambda: layers_network(Dense(), keras.layers.BatchNormalization(name="odd"), Dense()), "BatchNormalization"),
        (lambda: layers_network(layers_network(Dense()), Dense(), Dense()), "Sequential"),
        (lambda: functional(lambda x: Dense()(functional(lambda y: Dense()(y))(Dense(6)(x)))), "Functional"),
        (lambda: functional(lambda x: Dense()(keras.layers.Add(name="odd")([Dense(6)(x), x]))), "Add"),
        (lambda: functional(lambda x: Dense()(Dense()(x) + 1)), "Add"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", [prunable_layers, shrink, cost, lambda network: prune_weights(network, 0.5)])
def test_an_unsupported_layer_is_named_with_what_is_supported(build, kind, call):
    network = build()
    with pytest.raises(TypeError, match=f"is a {kind}, which is not supported.*Dense.*Dropout") as caught:
        call(network)
    named = [layer for layer in getattr(network, "operations", network.layers) if type(layer).__name__ == kind]
    assert repr(named[0].name) in str(caught.value)


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize("thing", [Subclassed(), "network", None])
def test_what_is_no_chain_of_layers_is_refused_by_its_type(thing):
    with pytest.raises(TypeError, match=f"Sequential or a functional network, got {type(thing).__name__}"):
        prune_weights(thing, 0.5)


def twice(x):
    layer = Dense(6)
    return Dense()(layer(layer(x)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: keras.Sequential([Dense(), Dense()], name="mine"), "'mine' is not built"),
        (lambda: layers_network(Dense(name="only")), "needs a hidden layer.*'only'"),
        (lambda: layers_network(keras.layers.Flatten()), "needs a hidden layer"),
        (lambda: functional(twice), "not a chain.*used once"),
        (lambda: functional(lambda x: [Dense()(Dense()(x)), Dense()(x)]), "not a chain.*one output"),
        (lambda: layers_network(Dense(name="first"), keras.layers.Flatten(), Dense(name="second"), inputs=(5, 6)),
         "'first' has 4 units, but 'second' takes 20"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", [prunable_layers, shrink, cost, lambda network: prune_neurons(network, 0.5)])
def test_what_is_no_built_chain_with_a_hidden_layer_is_refused(build, message, call):
    with pytest.raises(ValueError, match=message):
        call(build())


@pytest.mark.parametrize(
    ("scores", "criterion"),
    [(weight_scores, "activation"), (weight_scores, "taylor")]
    + [(neuron_scores, name) for name in ("activation", "taylor", "reconstruction")],
)
@pytest.mark.parametrize(
    ("x", "shape"), [(None, "None"), (np.ones((5, 7)), "(5, 7)"), (np.ones(6), "(6,)"), (np.ones((0, 6)), "(0, 6)")]
)
def test_images_that_are_missing_or_of_the_wrong_width_are_refused_with_both_shapes(scores, criterion, x, shape):
    with pytest.raises(ValueError) as caught:
        scores(random_network(), criterion, x, np.zeros(5, int))
    assert shape in str(caught.value) and "(None, 6)" in str(caught.value)


@pytest.mark.parametrize("measure", [accuracy, loss])
def test_measuring_refuses_images_of_the_wrong_width_with_both_shapes(measure):
    with pytest.raises(ValueError, match=r"\(5, 7\).*\(None, 6\)"):
        measure(random_network(), np.ones((5, 7)), np.zeros(5, int))


@pytest.mark.parametrize("y", [None, np.zeros(4, int), np.zeros((5, 4), int), np.zeros(5)])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: weight_scores(random_network(), "taylor", x, y),
        lambda x, y: neuron_scores(random_network(), "taylor", x, y),
    ],
)
def test_taylor_needs_one_integer_label_per_image(call, y):
    with pytest.raises(ValueError, match=r"one integer label per image, shape \(5,\)"):
        call(np.ones((5, 6)), y)


@pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
def test_random_pruning_needs_a_seed(prune):
    with pytest.raises(ValueError, match="seed"):
        prune(random_network(), 0.5, "random")


@pytest.mark.parametrize("dtype", [int, float])
def test_a_mask_that_is_not_boolean_is_refused(dtype):
    with pytest.raises(TypeError, match="'hidden_1' must be boolean"):
        apply_masks(random_network(), {"hidden_1": np.ones((6, 12), dtype)})


@pytest.mark.parametrize("shape", [(12, 6), (6,), (1, 12), (6, 12, 1), ()])
def test_a_mask_of_another_shape_is_refused_with_the_shapes_allowed(shape):
    with pytest.raises(ValueError) as caught:
        apply_masks(random_network(), {"hidden_1": np.ones(shape, bool)})
    assert all(str(each) in str(caught.value) for each in ("hidden_1", shape, (6, 12), (12,)))


@pytest.mark.parametrize("name", ["logits", "hidden_9"])
def test_a_mask_for_the_output_layer_or_an_unknown_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*hidden_1, hidden_2"):
        apply_masks(random_network(), {name: np.ones((8, 4), bool)})
