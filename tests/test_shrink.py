"""Shrinking, its outputs and what it costs: worked examples, properties, and the count of every parameter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from networks import (
    CLASSES,
    INPUTS,
    assert_same_outputs,
    bits,
    chain,
    dense,
    fractions,
    images,
    kernels,
    network_of,
    on_networks,
    predictions,
    random_network,
    seeds,
)

from pruning_utils import BATCH_SIZE, apply_masks, cost, outputs, prune_neurons, prune_weights, repair, shrink


def units(network):
    return [layer.units for layer in dense(network)]


def assert_shrinks_exactly(network, x):
    small = shrink(network)
    assert_same_outputs(small, network, x)
    return small


def test_units_that_are_dead_only_through_others_go_too():
    # Unit 0 of the first layer has no input, so unit 0 of the second, which has only that one, is dead as well.
    # Unit 2 of the second layer has no output, so unit 2 of the first, which leads only there, is dead as well.
    first = [[0, 1, 2], [0, -3, 4]]
    second = [[5, 0, 0], [0, 6, 7], [0, 0, 8]]
    third = [[1, 2], [3, -4], [0, 0]]
    network = network_of(first, second, third, np.eye(2))
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    assert units(assert_shrinks_exactly(network, x)) == [1, 1, 2, 2]
    assert cost(network) == {
        "weights_left": 2 + 1 + 2,
        "units_left": {"hidden_1": 1, "hidden_2": 1, "hidden_3": 2},
        "multiply_adds": 2 * 1 + 1 * 1 + 1 * 2 + 2 * 2,
        "bytes": 4 * (2 * 1 + 1 * 1 + 1 * 2 + 2 * 2),
    }


def test_a_unit_without_inputs_but_with_a_bias_survives():
    network = network_of([[0, 0, 1], [0, 0, 2]], [[3, 1], [1, 4], [1, 1]], biases=([5, 0, 0], [0, 0]))
    assert_shrinks_exactly(network, np.ones((1, 2), np.float32))
    np.testing.assert_allclose(outputs(network, np.ones((1, 2))), [[5 * 3 + 3, 5 + 3]])
    assert cost(network) == {
        "weights_left": 2,
        "units_left": {"hidden_1": 2},
        "multiply_adds": 2 * 2 + 2 * 2,
        "bytes": 4 * (2 * 2 + 2 + 2 * 2 + 2),
    }


def test_weights_into_a_removed_unit_and_out_of_it_are_not_left():
    network = network_of(np.ones((2, 3)), np.ones((3, 3)), np.ones((3, 2)))
    pruned = apply_masks(network, {"hidden_1": np.array([True, False, False])})
    assert cost(pruned)["weights_left"] == 2 * 1 + 1 * 3  # the other two rows of the second kernel do nothing


def test_a_network_without_a_unit_left_keeps_one_in_every_layer():
    pruned, (x, _) = prune_neurons(random_network(), 1.0), images()
    assert units(assert_shrinks_exactly(pruned, x)) == [1, 1, CLASSES]
    assert cost(pruned)["units_left"] == {"hidden_1": 0, "hidden_2": 0} and cost(pruned)["weights_left"] == 0


@on_networks
@given(seeds, fractions, st.booleans(), st.sampled_from([prune_weights, prune_neurons]))
def test_the_shrunk_network_computes_and_costs_what_the_masked_one_does(seed, sparsity, use_bias, prune):
    network, (x, _) = random_network(seed, use_bias), images()
    pruned = prune(network, sparsity)
    before, small = bits(pruned), assert_shrinks_exactly(pruned, x)
    assert cost(small) == cost(pruned)
    assert cost(small)["bytes"] == sum(weight.nbytes for weight in small.get_weights())
    assert cost(small)["multiply_adds"] == sum(kernel.size for kernel in kernels(small))
    assert units(small) == [*(max(1, left) for left in cost(pruned)["units_left"].values()), CLASSES]
    assert bits(shrink(small)) == bits(small) and bits(pruned) == before


# Sparsity -> per cent of the hidden weights of the study's network that go when so many of its neurons go.
@pytest.mark.parametrize(("sparsity", "percent"), [(0, 0), (0.25, 37.58), (0.5, 66.78), (0.9, 96.04), (0.99, 99.66)])
def test_removing_a_share_of_the_neurons_of_the_network_of_the_study_removes_more_of_the_weights(sparsity, percent):
    network = random_network(use_bias=False, hidden=(1000, 1000, 500, 200), inputs=784, classes=10)
    left = cost(prune_neurons(network, sparsity))
    widths = [784, *(round((1 - sparsity) * count) for count in (1000, 1000, 500, 200))]
    assert list(left["units_left"].values()) == widths[1:]
    assert left["weights_left"] == sum(np.multiply(widths[:-1], widths[1:]))
    assert round(100 * (1 - left["weights_left"] / 2_384_000), 2) == percent
    assert left["multiply_adds"] == left["weights_left"] + 10 * widths[-1]
    assert left["bytes"] == 4 * (left["multiply_adds"] + 10)


# --- Activations that are not 0 at 0, or mix units ----------------------------------------------------------------


def centred(sums):
    return sums - ops.mean(sums, axis=-1, keepdims=True)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", centred])
def test_layers_stay_whole_even_where_a_unit_has_no_outgoing_weight(activation):
    network = network_of(np.eye(3), [[1, 2], [0, 0], [3, 4]], activation=activation)
    assert units(assert_shrinks_exactly(network, np.array([[1, 5, 2]], np.float32))) == [3, 2]


# --- Outputs without building the shrunk network ------------------------------------------------------------------


@on_networks
@given(seeds, fractions, st.sampled_from([prune_weights, prune_neurons]))
def test_outputs_are_those_of_the_network_and_of_the_shrunk_one(seed, sparsity, prune):
    pruned, (x, _) = prune(random_network(seed), sparsity), images()
    for same in (pruned, shrink(pruned)):
        np.testing.assert_allclose(outputs(pruned, x), predictions(same, x), rtol=1e-5, atol=1e-5)


def test_outputs_of_more_images_than_one_batch_are_complete_and_in_order():
    pruned, (x, _) = prune_neurons(random_network(), 0.5), images(BATCH_SIZE + 3)
    np.testing.assert_allclose(outputs(pruned, x), predictions(pruned, x), rtol=1e-5, atol=1e-5)


def test_on_sequences_a_layer_is_computed_and_counted_at_every_position():
    network = chain(*prune_neurons(random_network(), 0.5).layers, inputs=(5, INPUTS))
    x = np.random.default_rng(0).random((30, 5, INPUTS), np.float32)
    assert_shrinks_exactly(network, x)
    np.testing.assert_allclose(outputs(network, x), predictions(network, x), rtol=1e-5, atol=1e-5)
    assert cost(network)["multiply_adds"] == cost(shrink(network))["multiply_adds"] == 5 * (6 * 6 + 6 * 4 + 4 * 4)


@pytest.mark.parametrize(("x", "error", "message"), [
    (5.0, ValueError, r"\(\).*\(None, 6\)"),
    (np.ones((5, 7)), ValueError, r"\(5, 7\).*\(None, 6\)"),
    (np.ones((0, 6)), ValueError, r"\(0, 6\).*\(None, 6\)"),
    (np.full((5, 6), np.nan), ValueError, "x holds NaN or infinite values in 30 places"),
    (np.full((5, 6), 1e300), ValueError, "x holds NaN or infinite"),  # in float32
    (np.ones((5, 6), complex), TypeError, "real numbers.*complex"),
    (np.full((5, 6), "1"), TypeError, "real numbers.*U1"),
    (np.ma.masked_equal(np.eye(5, 6), 1), TypeError, "without a mask.*MaskedArray"),
])  # fmt: skip
@pytest.mark.parametrize("call", [
    outputs,
    lambda network, x: prune_neurons(network, 0.5, "activation", x=x),
    lambda network, x: repair(prune_neurons(network, 0.5), network, x),
])  # fmt: skip
def test_images_that_are_none_are_refused_with_what_came_and_what_is_wanted(x, error, message, call):
    with pytest.raises(error, match=message):
        call(random_network(), x)
