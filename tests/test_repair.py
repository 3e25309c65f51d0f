"""Repair, the criterion "reconstruction", and neurons pruned with scope "global": examples, properties, oracles."""

import re
from itertools import combinations, pairwise
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pruning import (
    CLASSES,
    INPUTS,
    as_functional,
    bits,
    dense,
    forward,
    functional_network,
    gentle_network,
    greedy_selection,
    images,
    kernels,
    network_of,
    on_networks,
    outputs,
    random_network,
    seeds,
)

from pruning_utils import (
    NEURON_CRITERIA,
    SPARSITIES,
    _error_before_each,
    apply_masks,
    cost,
    keep_masks,
    neuron_scores,
    prunable_layers,
    prune_neurons,
    prune_weights,
    relu_network,
    repair,
    shrink,
)

PRUNE = {"weights": prune_weights, "neurons": prune_neurons}
both_kinds = pytest.mark.parametrize("prune", PRUNE.values(), ids=PRUNE.keys())
fractions = st.one_of(st.floats(0, 1), st.sampled_from(SPARSITIES))
with_and_without_bias = pytest.mark.parametrize("use_bias", [False, True])


def names(network):
    return [layer.name for layer in prunable_layers(network)]


def without_units(network, *removed):
    """The network without these units, a list of them per hidden layer."""
    layers = zip(prunable_layers(network), removed, strict=True)
    return apply_masks(network, {layer.name: ~np.isin(np.arange(layer.units), units) for layer, units in layers})


def assert_same_outputs(network, other, x, rtol=1e-3):
    wanted = outputs(other, x)
    np.testing.assert_allclose(outputs(network, x), wanted, rtol=0, atol=rtol * np.abs(wanted).max())


def all_finite(network):
    return all(np.isfinite(weight).all() for weight in network.get_weights())


# --- By hand ------------------------------------------------------------------------------------------------------


def test_the_twin_of_a_removed_unit_takes_over_its_outgoing_weights():
    network = network_of([[1, 1, 2]], [[2, 3], [4, 5], [1, -1]])
    repaired = repair(without_units(network, [1, 2]), network, np.array([[1.0], [2.0]]), ridge=1e-6)
    # Unit 2 fires twice as strongly as unit 0: 2 + 4 + 2 · 1 and 3 + 5 + 2 · (-1).
    np.testing.assert_allclose(kernels(repaired)[0], [[1, 0, 0]])
    np.testing.assert_allclose(kernels(repaired)[1][0], [8, 6], rtol=1e-4)


def test_the_ridge_stops_between_the_pruned_weights_and_the_best_ones():
    # One image that is 1: (w - 6)² + ridge · (w - 2)² is least at w = (6 + 2 · ridge) / (1 + ridge).
    network = network_of([[1, 1]], [[2], [4]])
    for ridge, weight in ((1, 4), (3, 3), (1 / 3, 5)):
        repaired = repair(without_units(network, [1]), network, np.ones((1, 1)), ridge)
        np.testing.assert_allclose(kernels(repaired)[1], [[weight], [4]], rtol=1e-5)


def test_a_network_without_a_unit_left_answers_the_mean():
    network, (x, _) = random_network(), images()
    repaired = repair(prune_neurons(network, 1.0), network, x, ridge=1e-6)
    mean = outputs(network, x).mean(axis=0)
    np.testing.assert_allclose(outputs(repaired, x), np.tile(mean, (len(x), 1)), rtol=1e-4)
    assert bits(repaired)[:-1] == bits(prune_neurons(network, 1.0))[:-1]


def test_a_unit_with_nothing_left_but_a_bias_fires_at_the_mean_and_one_with_nothing_stays_silent():
    network = network_of([[1, 2]], [[1, 0], [0, 1]], biases=([3, 0], [0, 0]))
    pruned = apply_masks(network, {names(network)[0]: np.zeros((1, 2), bool)})
    repaired = repair(pruned, network, np.array([[1.0], [3.0]]), ridge=1e-6)
    np.testing.assert_allclose(repaired.get_weights()[1], [5, 0], rtol=1e-5)
    np.testing.assert_allclose(outputs(repaired, np.ones((1, 1))), [[5, 4]], rtol=1e-4)


# --- Exact recovery -----------------------------------------------------------------------------------------------

TINY = 1e-8  # about the smallest ridge that float32 can tell from none


def network_with(first, second, use_bias, activation="relu"):
    """A network with these two hidden kernels, small positive hidden biases if any, and a random output layer."""
    rng = np.random.default_rng(9)
    output = rng.normal(size=(second.shape[1], CLASSES))
    biases = [rng.random(first.shape[1]), rng.random(second.shape[1]), rng.normal(size=CLASSES)] if use_bias else None
    return network_of(first, second, output, biases=biases, activation=activation)


def spread(rng, rows, columns):
    """A well-conditioned kernel."""
    return np.linalg.qr(rng.normal(size=(max(rows, columns),) * 2))[0][:rows, :columns]


@with_and_without_bias
def test_units_that_never_fire_can_go_without_a_trace(use_bias):
    network, (x, _), (new, _) = random_network(2, use_bias), images(200), images(100, seed=7)
    weights = network.get_weights()
    for kernel in (weights[0], weights[1 + use_bias]):
        kernel[:, 1] = 0
        kernel[:, [3, 5]] = -np.abs(kernel[:, [3, 5]])  # their inputs are never negative
    if use_bias:
        for bias in (weights[1], weights[3]):
            bias[[1, 3, 5]] = [0, -1, -2]
    network.set_weights(weights)
    pruned = without_units(network, [1, 3, 5], [1, 3, 5])
    assert_same_outputs(repair(pruned, network, x), network, new, rtol=1e-5)


@with_and_without_bias
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_multiples_of_units_that_are_left_can_go_without_a_trace(activation, use_bias):
    rng = np.random.default_rng(3)
    first, second = spread(rng, 6, 6), spread(rng, 12, 5)
    copies = [0, 1, 2, 3, 4, 5, 3, 0, 4, 1, 1, 2]
    sizes = np.array([1, 1, 1, 1, 1, 1, 1, 2, 0.5, 1, 3, 1])
    network = network_with(first[:, copies] * sizes, np.hstack([second, second * 2]), use_bias, activation)
    if use_bias:
        weights = network.get_weights()
        weights[1] = (weights[1] - 0.3)[copies] * sizes
        weights[3][5:] = weights[3][:5] * 2
        network.set_weights([np.float32(weight) for weight in weights])
    (x, _), (new, _) = images(2000), images(100, seed=7)
    x, new = 2 * x - 1, 2 * new - 1
    pruned = without_units(network, range(6, 12), range(5, 10))
    assert np.abs(outputs(pruned, new) - outputs(network, new)).max() > 0.1
    repaired = repair(pruned, network, x, TINY)
    assert_same_outputs(repaired, network, new)
    assert_same_outputs(shrink(repaired), network, new)
    assert [layer.units for layer in dense(shrink(repaired))] == [6, 5, CLASSES]


@with_and_without_bias
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_linear_combinations_of_units_that_are_left_can_go_without_a_trace(activation, use_bias):
    # With positive weights and images the ReLUs are linear: twelve units know no more than six independent ones do.
    rng = np.random.default_rng(4)
    first = np.hstack([np.eye(6) + 0.2 * rng.random((6, 6)), rng.random((6, 6))])
    second = np.hstack([np.eye(12, 6) + 0.1 * rng.random((12, 6)), rng.random((12, 3))])
    if activation == "linear":
        first[:, 8:] *= -1
    network = network_with(first, second, use_bias, activation)
    (x, _), (new, _) = images(200), images(100, seed=7)
    pruned = without_units(network, range(6, 12), range(6, 9))
    assert np.abs(outputs(pruned, new) - outputs(network, new)).max() > 0.1
    assert_same_outputs(repair(pruned, network, x, TINY), network, new)


@with_and_without_bias
def test_reconstruction_finds_the_units_that_can_go_without_a_trace(use_bias):
    rng = np.random.default_rng(5)
    hidden = spread(rng, 6, 6)[:, [0, 1, 1, 2, 3, 4, 5, 5, 0, 2, 3, 4]]
    network, (x, _) = network_with(hidden, spread(rng, 12, 8), False), images(200)
    x = 2 * x - 1
    if use_bias:
        network = network_of(*kernels(network), biases=[np.zeros(12), np.ones(8), np.ones(CLASSES)])
    name = names(network)[0]
    pruned = apply_masks(network, keep_masks({name: neuron_scores(network, "reconstruction", x)[name]}, 0.5))
    assert cost(pruned)["units_left"][name] == 6
    assert_same_outputs(repair(pruned, network, x, TINY), network, x)


@pytest.mark.parametrize("ridge", [1e-3, 1e-6])
def test_single_weights_from_a_double_input_can_go_without_a_trace(ridge):
    # Inputs 3, 4 and 5 repeat 0, 1 and 2; every unit keeps one weight of each pair.
    rng = np.random.default_rng(6)
    network, (x, _), (new, _) = random_network(6), images(300), images(100, seed=7)
    x[:, 3:], new[:, 3:] = x[:, :3], new[:, :3]
    upper = rng.random((3, 12)) < 0.5
    repaired = repair(apply_masks(network, {"hidden_1": np.vstack([upper, ~upper])}), network, x, ridge)
    assert_same_outputs(repaired, network, new, rtol=0.02 if ridge == 1e-3 else 2e-3)


@both_kinds
@with_and_without_bias
def test_what_was_not_pruned_needs_no_repair(prune, use_bias):
    network, (x, _), (new, _) = random_network(1, use_bias), images(200), images(100, seed=7)
    repaired = repair(prune(network, 0.0), network, x)
    np.testing.assert_allclose(outputs(repaired, new), outputs(network, new), rtol=1e-4, atol=1e-4)
    for after, before in zip(repaired.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


# --- Closer than before, layer by layer ---------------------------------------------------------------------------


def assert_closer(repaired, pruned, network, x):
    """No unit is further from the dense network than with its pruned weights and the same, repaired inputs."""
    assert all_finite(repaired)
    inputs, _ = forward(repaired, x)
    _, wanted = forward(network, x)
    for after, before, signal, target in zip(dense(repaired), dense(pruned), inputs, wanted, strict=True):
        errors = []
        for layer in (after, before):
            kernel, *bias = (weight.astype(np.float64) for weight in layer.get_weights())
            errors.append(np.sum((signal @ kernel + (bias[0] if bias else 0) - target) ** 2, axis=0))
        assert np.all(errors[0] <= errors[1] + 1e-5 * np.sum(target**2) / len(target.T))
        assert np.sum(errors[0]) <= np.sum(errors[1]) + 1e-5 * np.sum(target**2)


def assert_same_zeros(repaired, pruned):
    for after, before in zip(dense(repaired), dense(pruned), strict=True):
        (kernel, *bias), (old, *old_bias) = after.get_weights(), before.get_weights()
        assert not kernel[old == 0].any()
        if bias:
            assert not bias[0][~old.any(axis=0) & (old_bias[0] == 0)].any()


@on_networks
@given(
    seeds,
    fractions,
    st.booleans(),
    st.sampled_from(["magnitude", "activation", "random"]),
    st.sampled_from(["layer", "global"]),
    st.sampled_from([1, 7, 60]),
)
def test_repair_of_single_weights_brings_every_layer_closer(seed, sparsity, use_bias, criterion, scope, count):
    network, (x, _) = random_network(seed, use_bias), images(count, seed)
    pruned = prune_weights(network, sparsity, criterion, scope, x=x, seed=seed)
    repaired = repair(pruned, network, x)
    assert_closer(repaired, pruned, network, x)
    assert_same_zeros(repaired, pruned)
    assert cost(repaired)["weights_left"] == cost(pruned)["weights_left"]


@on_networks
@given(
    seeds,
    fractions,
    st.booleans(),
    st.sampled_from(["norm", "activation", "reconstruction", "random"]),
    st.sampled_from(["layer", "global"]),
    st.sampled_from([1, 7, 60]),
)
def test_repair_of_neurons_brings_every_layer_closer(seed, sparsity, use_bias, criterion, scope, count):
    network, (x, _) = random_network(seed, use_bias), images(count, seed)
    pruned = prune_neurons(network, sparsity, criterion, scope, x=x, seed=seed)
    repaired = repair(pruned, network, x)
    assert_closer(repaired, pruned, network, x)
    assert_same_zeros(repaired, pruned)
    assert cost(repaired) == cost(pruned)
    assert [layer.units for layer in dense(shrink(repaired))] == [layer.units for layer in dense(shrink(pruned))]
    np.testing.assert_allclose(outputs(shrink(repaired), x), outputs(repaired, x), rtol=1e-4, atol=1e-4)


def test_repair_helps_where_pruning_hurts():
    network, (x, _), (new, _) = random_network(8), images(500), images(200, seed=7)
    for prune in PRUNE.values():
        pruned = prune(network, 0.5)
        repaired = repair(pruned, network, x)
        before, after = (np.mean((outputs(n, new) - outputs(network, new)) ** 2) for n in (pruned, repaired))
        assert after < before / 4


@with_and_without_bias
def test_what_the_images_cannot_tell_stays_as_it_was(use_bias):
    network, (x, _) = random_network(3, use_bias), images(100)
    x[:, 2] = 0
    for pruned in (prune_weights(network, 0.5), without_units(network, [0, 4, 5], [1])):
        repaired = repair(pruned, network, x)
        for after, before, signal in zip(dense(repaired), dense(pruned), forward(repaired, x)[0], strict=True):
            silent = ~signal.any(axis=0)
            assert after.get_weights()[0][silent].tobytes() == before.get_weights()[0][silent].tobytes()
        assert not forward(repaired, x)[0][0][:, 2].any() and bits(repaired) != bits(pruned)


def test_the_stronger_the_ridge_the_closer_to_the_pruned_weights():
    network, (x, _) = random_network(4), images(200)
    for prune in PRUNE.values():
        pruned = prune(network, 0.5)
        steps = []
        for ridge in (1e-3, 1, 1e3, 1e9):
            pairs = zip(repair(pruned, network, x, ridge).get_weights(), pruned.get_weights(), strict=True)
            steps.append(sum(np.sum((after - before) ** 2) for after, before in pairs))
        assert steps == sorted(steps, reverse=True) and steps[-1] < 1e-10


# --- Against plain NumPy ------------------------------------------------------------------------------------------


def refitted_layer(layer, signal, target, ridge):
    """The kernel and, as a last row, the bias; each unit is solved for on its own."""
    kernel, *bias = layer.get_weights()
    weights = np.vstack([kernel, *bias]).astype(np.float64)
    inputs = np.hstack([signal, np.ones((len(signal), 1))]) if bias else signal
    fires = inputs.any(axis=0)
    strength = ridge * np.mean(np.sum(inputs[:, fires] ** 2, axis=0)) if fires.any() else 1.0
    for unit, column in enumerate(weights.T):
        free = column != 0
        if bias:
            free[-1] |= free.any()
        free &= fires
        rows = np.vstack([inputs[:, free], np.sqrt(strength) * np.eye(free.sum())])
        missing = np.append(target[:, unit] - inputs @ column, np.zeros(free.sum()))
        column[free] += np.linalg.lstsq(rows, missing, rcond=None)[0]
    return weights


def refitted(pruned, network, x, ridge):
    """The weights of every layer, solved for with the inputs that the layers before it then deliver."""
    signal, result = x.astype(np.float64), []
    for layer, target in zip(dense(pruned), forward(network, x)[1], strict=True):
        result.append(refitted_layer(layer, signal, target, ridge))
        biases = result[-1][-1] if layer.use_bias else 0
        signal = np.maximum(signal @ result[-1][: signal.shape[1]] + biases, 0)
    return result


def without_ridge(pruned, network, x):
    """The same for no ridge: the weights themselves by least squares, not their change."""
    signal, result = x.astype(np.float64), []
    for layer, target in zip(dense(pruned), forward(network, x)[1], strict=True):
        kernel, *bias = layer.get_weights()
        weights = np.vstack([kernel, *bias]).astype(np.float64)
        inputs = np.hstack([signal, np.ones((len(signal), 1))]) if bias else signal
        for unit, column in enumerate(weights.T):
            free = (column != 0) & inputs.any(axis=0)
            rest = target[:, unit] - inputs[:, ~free] @ column[~free]
            column[free] = np.linalg.lstsq(inputs[:, free], rest, rcond=None)[0]
        result.append(weights)
        signal = np.maximum(inputs @ weights, 0)
    return result


def lively_network(use_bias, hidden=(10, 7)):
    """Most units fire on most images, and differently: least squares is well-conditioned."""
    rng = np.random.default_rng(11)
    sizes = (INPUTS, *hidden, CLASSES)
    arrays = [spread(rng, *shape) * 2 + 0.1 * rng.normal(size=shape) for shape in pairwise(sizes)]
    return network_of(*arrays, biases=[rng.uniform(0.2, 1, units) for units in sizes[1:]] if use_bias else None)


def masks_of(kind, network):
    rng = np.random.default_rng(12)
    for layer in prunable_layers(network):
        shape = layer.kernel.shape if kind == "weights" else layer.kernel.shape[1:]
        yield layer.name, rng.permutation(np.arange(np.prod(shape)) % 5 > 1).reshape(shape)


def assert_same_weights(repaired, expected, pruned, rtol):
    """Equal, with a tolerance in terms of how far the weights of a layer have moved."""
    for layer, weights, before in zip(dense(repaired), expected, dense(pruned), strict=True):
        found, old = np.vstack(layer.get_weights()), np.vstack(before.get_weights())
        assert np.linalg.norm(found - weights) <= rtol * np.linalg.norm(weights - old) + 1e-5 * np.linalg.norm(old)
        assert np.linalg.norm(weights - old) > 0.05 * np.linalg.norm(old) or layer is dense(repaired)[0]


@with_and_without_bias
@pytest.mark.parametrize("hidden", [(10, 7), (9, 9, 8)])
@pytest.mark.parametrize(("kind", "rtol"), [("neurons", 2e-3), ("weights", 1e-2)])
def test_repair_equals_least_squares_unit_by_unit(kind, rtol, hidden, use_bias):
    network, (x, _) = lively_network(use_bias, hidden), images(400)
    x = 2 * x - 1
    pruned = apply_masks(network, dict(masks_of(kind, network)))
    repaired = repair(pruned, network, x, TINY)
    assert_same_weights(repaired, without_ridge(pruned, network, x), pruned, rtol)
    if use_bias and kind == "weights":
        assert all(np.all(np.abs(layer.get_weights()[1] - before.get_weights()[1]) > 1e-4)
                   for layer, before in zip(dense(repaired), dense(pruned), strict=True))  # fmt: skip


@with_and_without_bias
@pytest.mark.parametrize(
    ("kind", "ridge", "rtol"),
    [("neurons", 1e-3, 1e-4), ("neurons", 0.5, 1e-4), ("weights", 0.1, 1e-2), ("weights", 2, 1e-2)],
)
def test_repair_equals_the_ridge_that_pulls_towards_the_pruned_weights(kind, rtol, ridge, use_bias):
    network, (x, _) = lively_network(use_bias), images(300)
    x = 2 * x - 1
    x[:, 1] = 0  # an input that never fires does not count
    pruned = apply_masks(network, dict(masks_of(kind, network)))
    assert_same_weights(repair(pruned, network, x, ridge), refitted(pruned, network, x, ridge), pruned, rtol)


@on_networks
@given(seeds, fractions, st.booleans(), st.sampled_from([1e-3, 0.1]), st.sampled_from(["weights", "neurons"]))
def test_repair_goes_nearly_all_the_way_to_the_least_squares(seed, sparsity, use_bias, ridge, kind):
    network, (x, _) = random_network(seed, use_bias), images(80, seed)
    pruned = PRUNE[kind](network, sparsity)
    repaired = repair(pruned, network, x, ridge)
    layers = zip(dense(pruned), dense(repaired), *forward(repaired, x)[:1], forward(network, x)[1], strict=True)
    for before, after, signal, target in layers:
        inputs = np.hstack([signal, np.ones((len(signal), 1))]) if before.use_bias else signal
        strength = ridge * np.mean(np.sum(inputs[:, inputs.any(axis=0)] ** 2, axis=0))
        old, found = (np.vstack(layer.get_weights()).astype(np.float64) for layer in (before, after))
        start, end, least = (
            np.sum((inputs @ weights - target) ** 2) + strength * np.sum((weights - old) ** 2)
            for weights in (old, found, refitted_layer(before, signal, target, ridge))
        )
        assert end - least <= 0.01 * (start - least) + 1e-5 * np.sum(target**2)


# --- Greedy selection ---------------------------------------------------------------------------------------------


def outputs_and_kernel(seed, units=9, following=4, count=40):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(count, units)) + 0.3, 0), rng.normal(size=(units, following))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [1, 2, 4, 128])
def test_the_greedy_selection_equals_trying_every_unit_at_every_step(seed, block):
    signal, kernel = outputs_and_kernel(seed)
    order, shares = greedy_selection(signal, kernel, ridge=0)
    found = _error_before_each(signal.T @ signal, kernel, ridge=1e-12, block=block)
    assert np.argsort(-found).tolist() == order.tolist()
    np.testing.assert_allclose(found[order], shares, rtol=1e-6)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("block", [3, 128])
def test_the_greedy_selection_equals_trying_every_unit_with_a_ridge(ridge, block):
    for seed in range(3):
        signal, kernel = outputs_and_kernel(seed)
        order, shares = greedy_selection(signal, kernel, ridge)
        found = _error_before_each(signal.T @ signal, kernel, ridge, block)
        np.testing.assert_allclose(found[order], shares, rtol=1e-8)


def test_the_size_of_the_blocks_does_not_matter():
    signal, kernel = outputs_and_kernel(0, units=70, following=30, count=200)
    once = _error_before_each(signal.T @ signal, kernel)
    for block in (1, 7, 35, 69, 70, 71):
        np.testing.assert_allclose(_error_before_each(signal.T @ signal, kernel, block=block), once, rtol=1e-6)


def unexplained(signal, kernel, units):
    """The share of the squared `signal @ kernel` that least squares cannot explain from these units."""
    wanted = signal @ kernel
    rest = wanted - signal[:, units] @ np.linalg.lstsq(signal[:, units], wanted, rcond=None)[0]
    return np.sum(rest**2) / np.sum(wanted**2)


def test_the_greedy_selection_is_bounded_by_all_subsets():
    for seed in range(20):
        signal, kernel = outputs_and_kernel(seed, units=6, following=3, count=30)
        order = np.argsort(-_error_before_each(signal.T @ signal, kernel, ridge=1e-12))
        every = [unexplained(signal, kernel, list(units)) for units in combinations(range(6), 3)]
        greedy = unexplained(signal, kernel, order[:3])
        assert min(every) <= greedy + 1e-12 and greedy <= np.median(every)
        single = [unexplained(signal, kernel, [unit]) for unit in range(6)]
        assert order[0] == np.argmin(single)
        pairs = [unexplained(signal, kernel, [order[0], unit]) for unit in order[1:]]
        assert np.argmin(pairs) == 0


def test_the_greedy_selection_is_the_best_of_all_subsets_where_units_are_orthogonal():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        signal = np.linalg.qr(rng.normal(size=(30, 6)))[0] * rng.uniform(0.5, 2, 6)
        kernel = rng.normal(size=(6, 3))
        found = _error_before_each(signal.T @ signal, kernel, ridge=1e-12)
        order = np.argsort(-found)
        every = [unexplained(signal, kernel, list(units)) for units in combinations(range(6), 3)]
        assert unexplained(signal, kernel, order[:3]) == pytest.approx(min(every), rel=1e-9)
        assert found[order[3]] == pytest.approx(min(every), rel=1e-6)
        energies = np.sum(signal**2, axis=0) * np.sum(kernel**2, axis=1)
        assert order.tolist() == np.argsort(-energies).tolist()


def test_gain_is_measured_against_the_length_of_a_unit():
    # Unit 0 is loud and mostly noise, unit 1 is quiet and all that matters: explaining counts, not shouting.
    rng = np.random.default_rng(0)
    quiet, noise = np.linalg.qr(rng.normal(size=(50, 2)))[0].T
    signal = np.column_stack([100 * noise + 3 * quiet, quiet])
    kernel = np.array([[0.0], [1.0]])
    np.testing.assert_allclose(_error_before_each(signal.T @ signal, kernel, ridge=1e-12)[1], 1.0)


@with_and_without_bias
def test_reconstruction_scores_every_hidden_layer_from_1_downwards(use_bias):
    network, (x, _) = random_network(3, use_bias), images(10_050)  # more than one batch
    scores = neuron_scores(network, "reconstruction", x)
    assert list(scores) == ["hidden_1", "hidden_2"]
    inputs, _ = forward(network, x)
    for score, signal, kernel in zip(scores.values(), inputs[1:], kernels(network)[1:], strict=True):
        order, shares = greedy_selection(signal, kernel.astype(np.float64), ridge=1e-3)
        np.testing.assert_allclose(score[order], shares, rtol=1e-3, atol=1e-6)
        assert score.shape == (signal.shape[1],) and score.max() == 1.0 and score.min() >= 0
        assert np.sum(score == 1.0) == 1


@pytest.mark.parametrize("seed", range(4))
def test_units_that_never_fire_or_are_never_heard_come_last(seed):
    network, (x, _) = random_network(seed), images(200)
    weights = network.get_weights()
    weights[0][:, [0, 3]], weights[1][[0, 3]] = -1, -0.5  # never fire
    weights[0][:, 5], weights[1][5], weights[2][5] = 1, 0, 0  # fires, and nobody hears it
    network.set_weights(weights)
    score = neuron_scores(network, "reconstruction", x)["hidden_1"]
    assert np.isfinite(score).all() and score.max() == 1.0
    lasting = without_units(network, [0, 3], [])
    assert max(score[[0, 3]]) <= np.delete(score, [0, 3]).min()
    np.testing.assert_array_equal(outputs(lasting, x), outputs(network, x))


def test_masks_of_reconstruction_are_nested():
    network, (x, _) = random_network(2), images(200)
    for scope in ("layer", "global"):
        pruned = [prune_neurons(network, sparsity, "reconstruction", scope, x=x) for sparsity in SPARSITIES]
        kept = [[kernel.any(axis=0) for kernel in kernels(network)[:-1]] for network in pruned]
        for loose, tight in pairwise(kept):
            assert not any((after & ~before).any() for after, before in zip(tight, loose, strict=True))


def test_reconstruction_with_repair_beats_norm_with_repair():
    (x, _), (new, _) = images(500), images(200, seed=7)
    wins = 0
    for seed in range(8):
        network = random_network(seed)
        errors = []
        for criterion in ("norm", "reconstruction"):
            repaired = repair(prune_neurons(network, 0.5, criterion, x=x), network, x)
            errors.append(np.mean((outputs(repaired, new) - outputs(network, new)) ** 2))
        wins += errors[1] < errors[0]
    assert wins >= 6


# --- What bad input gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "shape"),
    [
        (None, "()"),
        (np.ones((5, 7)), "(5, 7)"),
        (np.ones(6), "(6,)"),
        (np.ones((0, 6)), "(0, 6)"),
        (np.ones((5, 2, 3)), "(5, 2, 3)"),
    ],
)
def test_repair_refuses_images_of_another_shape_with_both_shapes(x, shape):
    network = random_network()
    with pytest.raises(ValueError) as caught:
        repair(prune_neurons(network, 0.5), network, x)
    assert shape in str(caught.value) and "(None, 6)" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda network, x: repair(prune_neurons(network, 0.5), network, x),
        lambda network, x: repair(prune_weights(network, 0.5), network, x),
        lambda network, x: repair(network, network, x),
        lambda network, x: neuron_scores(network, "reconstruction", x),
        lambda network, x: prune_neurons(network, 0.5, "reconstruction", "global", x=x),
        lambda network, x: prune_neurons(network, 0.5, "activation", "global", x=x),
    ],
    ids=["neurons", "weights", "nothing", "scores", "pruning by reconstruction", "pruning by activation"],
)
def test_images_with_nan_or_inf_are_refused(call, value):
    x, _ = images()
    x[3, 2] = value
    with pytest.raises(ValueError, match=r"\bx\b.*(NaN|inf)"):
        call(random_network(), x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["activation", "taylor", "reconstruction"])
def test_a_network_whose_scores_overflow_is_refused_in_both_scopes(criterion, scope):
    network, (x, y) = random_network(), images()
    network.set_weights([weight * np.float32(1e30) for weight in network.get_weights()])
    with pytest.raises(ValueError, match=r"NaN|inf"):
        prune_neurons(network, 0.5, criterion, scope, x=x, y=y)


@pytest.mark.parametrize("ridge", [0, 0.0, -1e-3, np.nan, np.inf, None, "1", [1e-3], 1j])
def test_a_ridge_that_is_no_positive_number_is_refused_with_its_value(ridge):
    network, (x, _) = random_network(), images()
    with pytest.raises(ValueError, match="ridge must be a positive number") as caught:
        repair(prune_neurons(network, 0.5), network, x, ridge)
    assert repr(ridge) in str(caught.value)


@pytest.mark.parametrize("ridge", [1, 1e-3, np.float32(1e-3), np.float64(1e-3), np.int64(2)])
def test_any_positive_number_is_a_ridge(ridge):
    network, (x, _) = random_network(), images()
    assert all_finite(repair(prune_neurons(network, 0.5), network, x, ridge))


@pytest.mark.parametrize(
    "other",
    [
        lambda network: random_network(hidden=(12, 9)),
        lambda network: random_network(hidden=(12,)),
        lambda network: random_network(hidden=(12, 8, 8)),
        lambda network: relu_network((12, 8), INPUTS + 1, CLASSES),
        lambda network: relu_network((12, 8), INPUTS, CLASSES + 1),
        lambda network: keras.Sequential([keras.Input((INPUTS,)), keras.layers.Dropout(0.5), *network.layers]),
    ],
    ids=["wider", "shallower", "deeper", "more inputs", "more classes", "another layer between"],
)
def test_repair_refuses_networks_of_different_layers(other):
    network, (x, _) = random_network(), images()
    other = other(random_network())
    for pruned, whole in ((network, other), (other, network)):
        with pytest.raises(ValueError, match="must have the same layers"):
            repair(pruned, whole, x)


def test_repair_refuses_a_shrunk_network_and_says_when_to_shrink():
    network, (x, _) = random_network(), images()
    with pytest.raises(ValueError, match="shrink later") as caught:
        repair(shrink(prune_neurons(network, 0.5)), network, x)
    assert "6, 6" in str(caught.value) and "6, 12" in str(caught.value)


@both_kinds
@with_and_without_bias
@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_images_than_units_do_no_harm(prune, use_bias, count):
    for seed in range(3):
        network, (x, _) = random_network(seed, use_bias), images(count)
        pruned = prune(network, 0.4)
        repaired = repair(pruned, network, x)
        assert_closer(repaired, pruned, network, x)
        assert_same_zeros(repaired, pruned)
        assert np.abs(outputs(repaired, images()[0])).max() < 10 * np.abs(outputs(network, images()[0])).max()


@both_kinds
@with_and_without_bias
@pytest.mark.parametrize("ridge", [1e-3, 1e-6, 1e-9, 1e-12])
def test_inputs_that_are_dead_or_repeat_each_other_do_no_harm(prune, use_bias, ridge):
    network, (x, _) = random_network(0, use_bias), images()
    weights = network.get_weights()
    weights[0][:, 6:] = weights[0][:, :6]
    network.set_weights(weights)
    for pictures in (x, np.tile(x[:, :1], (1, 6)), np.where(np.arange(6) < 4, 0, x), 0 * x):
        pruned = prune(network, 0.3)
        repaired = repair(pruned, network, pictures, ridge)
        assert all_finite(repaired)
        if ridge >= 1e-6:
            assert_closer(repaired, pruned, network, pictures)


@pytest.mark.parametrize("scale", [1e-6, 255, 1e6])
@both_kinds
def test_the_scale_of_the_images_does_no_harm(prune, scale):
    network, (x, _) = network_of(*kernels(random_network())), images()
    pruned = prune(network, 0.5)
    repaired, scaled = (repair(pruned, network, pictures) for pictures in (x, x * np.float32(scale)))
    for one, other in zip(kernels(repaired), kernels(scaled), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)


# --- Nothing else is touched --------------------------------------------------------------------------------------


@both_kinds
def test_repair_leaves_its_arguments_bit_for_bit_as_they_were(prune):
    network, (x, _) = random_network(), images()
    pruned = prune(network, 0.5)
    before = [*bits(network), *bits(pruned), x.tobytes()]
    repaired = repair(pruned, network, x)
    assert [*bits(network), *bits(pruned), x.tobytes()] == before
    repaired.set_weights([weight + 1 for weight in repaired.get_weights()])
    assert [*bits(network), *bits(pruned), x.tobytes()] == before


@both_kinds
def test_repair_gives_the_same_every_time(prune):
    network, (x, _) = random_network(), images()
    pruned = prune(network, 0.5)
    assert bits(repair(pruned, network, x)) == bits(repair(pruned, network, x.astype(np.float64)))
    assert bits(repair(pruned, network, x)) != bits(pruned)


# --- Other chains of Dense layers ---------------------------------------------------------------------------------


def assert_same_network(one, other):
    for found, expected in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@both_kinds
def test_functional_and_sequential_networks_are_repaired_alike(prune):
    network, (x, _) = random_network(), images(100)
    twin = as_functional(apply_masks(network, {}))
    pruned, pruned_twin = prune(network, 0.5), prune(twin, 0.5)
    assert_same_network(repair(pruned_twin, twin, x), repair(pruned, network, x))
    assert isinstance(repair(pruned_twin, twin, x), type(pruned_twin)) and not isinstance(twin, keras.Sequential)


@both_kinds
def test_layers_between_the_dense_ones_do_not_disturb_the_repair(prune):
    plain, network, (x, _) = gentle_network(), functional_network(), images(100)
    pictures = x.reshape(-1, 2, 3)
    repaired, expected = repair(prune(network, 0.5), network, pictures), repair(prune(plain, 0.5), plain, x)
    assert_same_network(repaired, expected)
    np.testing.assert_allclose(outputs(repaired, pictures).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(outputs(shrink(repaired), pictures), outputs(repaired, pictures), atol=1e-5)


def test_reconstruction_does_not_mind_the_layers_in_between():
    plain, network, (x, _) = gentle_network(), functional_network(), images(100)
    found, expected = (neuron_scores(n, "reconstruction", a) for n, a in ((network, x.reshape(-1, 2, 3)), (plain, x)))
    for name, score in expected.items():
        np.testing.assert_allclose(found[name], score, rtol=1e-3, atol=1e-6)


@both_kinds
def test_a_tanh_network_is_repaired(prune):
    rng = np.random.default_rng(0)
    network = network_of(*(rng.normal(size=shape) for shape in ((6, 12), (12, 8), (8, 4))), activation="tanh")
    (x, _), (new, _) = images(400), images(100, seed=7)
    pruned = prune(network, 0.4)
    repaired = repair(pruned, network, x)
    before, after = (np.mean((outputs(n, new) - outputs(network, new)) ** 2) for n in (pruned, repaired))
    assert after < before / 4
    assert_same_zeros(repaired, pruned)


def test_a_tanh_unit_and_its_mirror_image_are_one():
    kernel = spread(np.random.default_rng(1), 6, 5)
    network = network_of(np.hstack([kernel, -kernel]), spread(np.random.default_rng(2), 10, 4), activation="tanh")
    (x, _), (new, _) = images(300), images(100, seed=7)
    repaired = repair(without_units(network, range(5, 10)), network, 2 * x - 1, TINY)
    assert_same_outputs(repaired, network, 2 * new - 1)


def test_dense_layers_on_sequences_are_repaired():
    network = keras.Sequential([keras.Input((5, INPUTS)), *random_network().layers])
    x = np.random.default_rng(0).random((30, 5, INPUTS), np.float32)
    flat = random_network()
    for prune in PRUNE.values():
        repaired = repair(prune(network, 0.5), network, x)
        assert_same_network(repaired, repair(prune(flat, 0.5), flat, x.reshape(-1, INPUTS)))


# --- Global scope of neurons --------------------------------------------------------------------------------------

WIDE, NARROW = np.diag([5, 1, 8, 2, 7, 3, 6, 4]), np.eye(8, 4) * [30, 10, 40, 20]


def units_kept(network, sparsity, criterion="norm", **data):
    pruned = prune_neurons(network, sparsity, criterion, "global", **data)
    return [np.flatnonzero(kernel.any(axis=0)).tolist() for kernel in kernels(pruned)[:-1]]


@pytest.mark.parametrize(
    ("removed", "wide", "narrow"),
    [
        (0, [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]),
        (1, [0, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]),
        (4, [0, 2, 4, 6], [0, 1, 2, 3]),  # the wide layer comes down to the narrow one …
        (5, [2, 4, 6], [0, 1, 2, 3]),
        (6, [2, 4, 6], [0, 2, 3]),  # … and then they go down together
        (8, [2, 4], [0, 2]),
        (10, [2], [2]),
        (12, [], []),
    ],
)
def test_global_scope_leaves_all_layers_equally_many_units_by_hand(removed, wide, narrow):
    assert units_kept(network_of(WIDE, NARROW, np.ones((4, 2))), removed / 12) == [wide, narrow]


@on_networks
@given(seeds, fractions, st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_global_scope_removes_exactly_the_share_and_leaves_layers_even(seed, sparsity, hidden):
    pruned = prune_neurons(random_network(seed, hidden=hidden), sparsity, scope="global")
    left = [int(kernel.any(axis=0).sum()) for kernel in kernels(pruned)[:-1]]
    assert sum(left) == sum(hidden) - round(sparsity * sum(hidden))
    for kept, units in zip(left, hidden, strict=True):
        assert kept == units or kept >= max(left) - 1


@on_networks
@given(seeds, fractions, fractions, st.sampled_from(["norm", "activation", "reconstruction"]))
def test_global_scope_is_nested(seed, one, other, criterion):
    network, (x, _) = random_network(seed), images()
    loose, tight = (units_kept(network, sparsity, criterion, x=x) for sparsity in sorted((one, other)))
    assert all(set(after) <= set(before) for after, before in zip(tight, loose, strict=True))


@pytest.mark.parametrize("criterion", [name for name in NEURON_CRITERIA if name != "random"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_global_scope_keeps_the_best_units_of_each_layer(criterion, sparsity):
    network, (x, y) = random_network(1), images()
    scores = neuron_scores(network, criterion, x, y).values()
    for score, kept in zip(scores, units_kept(network, sparsity, criterion, x=x, y=y), strict=True):
        assert min(score[kept]) >= max(np.delete(score, kept), default=-1)


@pytest.mark.parametrize("criterion", ["norm", "activation", "reconstruction"])
@pytest.mark.parametrize("layer", [0, 1])
def test_global_scope_does_not_mind_that_scores_of_one_layer_are_larger(criterion, layer):
    network, (x, _) = random_network(1, use_bias=False), images()
    scaled = [kernel * (1000 if position == layer else 1) for position, kernel in enumerate(kernels(network))]
    louder = network_of(*scaled)
    for sparsity in (0.2, 0.5, 0.8):
        assert units_kept(louder, sparsity, criterion, x=x) == units_kept(network, sparsity, criterion, x=x)


# --- The example of the README ------------------------------------------------------------------------------------


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    x, y = images()
    names = {"network": random_network(), "x_train": x, "x_test": x, "y_test": y}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1), names)
    loaded = keras.models.load_model("small.keras")
    np.testing.assert_array_equal(outputs(loaded, x), outputs(names["small"], x))
    assert "multiply_adds" in capsys.readouterr().out
