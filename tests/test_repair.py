"""Repair: examples by hand, exact recovery, what holds for every network, and the same in plain NumPy."""

import re
from fractions import Fraction
from functools import partial
from itertools import pairwise

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    CLASSES,
    INPUTS,
    assert_same_outputs,
    bits,
    chain,
    chosen_together,
    dense,
    forward,
    fractions,
    functional_network,
    gentle_network,
    images,
    kernels,
    network_of,
    on_networks,
    predictions,
    random_network,
    scale_units,
    seeds,
    what_errors_count,
)

import pruning_utils
from pruning_utils import apply_masks, keep_masks, prune_and_repair, prune_neurons, prune_weights, repair, shrink

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
PRUNE = {"weights": prune_weights, "neurons": prune_neurons}
both_kinds = pytest.mark.parametrize("prune", PRUNE.values(), ids=PRUNE.keys())
with_and_without_bias = pytest.mark.parametrize("use_bias", [False, True])
TINY = 1e-8  # about the smallest ridge that float32 can tell from none


@pytest.fixture
def to_the_end(monkeypatch):
    """Solves for single weights by conjugate gradients, to a ten-thousandth: what they solve, not how far."""
    for name, settings in {"_solve_within": {"few": 0}, "_conjugate_gradients": {"share": 1e-4}}.items():
        monkeypatch.setattr(pruning_utils, name, partial(getattr(pruning_utils, name), **settings))


strictly = pytest.mark.usefixtures("to_the_end")


def without_units(network, *removed):
    """The network without these units, a list of them per hidden layer."""
    layers = zip(dense(network)[:-1], removed, strict=True)
    return apply_masks(network, {layer.name: ~np.isin(np.arange(layer.units), units) for layer, units in layers})


def at_once(network, sparsity, x, kind="weights", criterion="reconstruction", **settings):
    """Pruned, then repaired."""
    return repair(PRUNE[kind](network, sparsity, criterion, x=x), network, x, **settings)


def with_weights(network, weights):
    """A copy of the network with other weights."""
    copy = apply_masks(network, {})
    copy.set_weights(weights)
    return copy


def masks_of(kind, network, seed=12):
    """Masks that remove two in five weights or neurons at random."""
    rng = np.random.default_rng(seed)
    shapes = {layer.name: tuple(layer.kernel.shape)[kind == "neurons" :] for layer in dense(network)[:-1]}
    return {name: rng.permutation(np.arange(np.prod(shape)) % 5 > 1).reshape(shape) for name, shape in shapes.items()}


def spread(rng, rows, columns):
    """A well-conditioned kernel."""
    return np.linalg.qr(rng.normal(size=(max(rows, columns),) * 2))[0][:rows, :columns]


def distance(network, other, x):
    """The mean squared difference of the outputs."""
    return np.mean((predictions(network, x).astype(np.float64) - predictions(other, x)) ** 2)


def assert_same_zeros(repaired, pruned):
    for after, before in zip(dense(repaired), dense(pruned), strict=True):
        (kernel, *bias), (old, *old_bias) = after.get_weights(), before.get_weights()
        assert not kernel[old == 0].any()
        if bias:
            assert not bias[0][~old.any(axis=0) & (old_bias[0] == 0)].any()


# --- By hand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second", "removed", "x", "ridge", "expected"), [
    # Unit 2 fires twice as strongly as unit 0, which takes over: 2 + 4 + 2 · 1 and 3 + 5 + 2 · (-1).
    ([[1, 1, 2]], [[2, 3], [4, 5], [1, -1]], [1, 2], [[1], [2]], 1e-6, [[8, 6]]),
    # One image that is 1: (w - 6)² + ridge · (w - 2)² is least at w = (6 + 2 · ridge) / (1 + ridge).
    ([[1, 1]], [[2], [4]], [1], [[1]], 1, [[4]]),
    ([[1, 1]], [[2], [4]], [1], [[1]], 3, [[3]]),
    ([[1, 1]], [[2], [4]], [1], [[1]], 1 / 3, [[5]]),
    # The scale of a unit does not matter: unit 1 fires 1,000 times as strongly, and its weight is a thousandth. Each
    # has a twin that was removed, and each stops half-way: at 3 of 2 + 2, and at 0.003 of 0.002 + 0.002.
    ([[1, 0, 1, 0], [0, 1000, 0, 1000]], [[2], [0.002], [2], [0.002]], [2, 3], np.eye(2), 1, [[3], [0.003]]),
    # Unit 1 fires a tenth as strongly as unit 0, with the same weight: 0.01 of the energy. The mean is 0.505, and its
    # twin, of weight 2, is made up for by 2 · 0.01 / (0.01 + 0.505 · ridge).
    ([[1, 0, 0], [0, 0.1, 0.1]], [[2], [2], [2]], [2], np.eye(2), 0.1, [[2], [2 + 2 * 0.01 / (0.01 + 0.0505)]]),
    # Unit 2 is the sum of units 0 and 1. Only neurons went, so the weight that is 0 in the dense network is refitted.
    ([[1, 0, 1], [0, 1, 1]], [[2, 1], [0, 4], [3, 5]], [2], np.eye(2), 1e-6, [[2 + 3, 1 + 5], [0 + 3, 4 + 5]]),
])  # fmt: skip
def test_units_that_are_left_make_up_for_the_others(first, second, removed, x, ridge, expected):
    network, left = network_of(first, second), len(expected)
    repaired = repair(without_units(network, removed), network, np.array(x), ridge)
    np.testing.assert_allclose(kernels(repaired)[0], np.where(np.arange(len(second)) < left, first, 0))
    np.testing.assert_allclose(kernels(repaired)[1], [*expected, *second[left:]], rtol=1e-4)


def test_a_network_without_a_unit_left_answers_the_mean():
    network, (x, _) = random_network(), images()
    repaired = repair(prune_neurons(network, 1.0), network, x, ridge=1e-6)
    mean = predictions(network, x).mean(axis=0)
    np.testing.assert_allclose(predictions(repaired, x), np.tile(mean, (len(x), 1)), rtol=1e-4)
    assert bits(repaired)[:-1] == bits(prune_neurons(network, 1.0))[:-1]


def test_a_unit_with_nothing_left_but_a_bias_fires_at_the_mean_and_one_with_nothing_stays_at_0():
    network = network_of([[1, 2]], [[1, 0], [0, 1]], biases=([3, 0], [0, 0]))
    pruned = apply_masks(network, {"hidden_1": np.zeros((1, 2), bool)})
    repaired = repair(pruned, network, np.array([[1.0], [3.0]]), ridge=1e-6)
    np.testing.assert_allclose(repaired.get_weights()[1], [5, 0], rtol=1e-5)
    np.testing.assert_allclose(predictions(repaired, np.ones((1, 1))), [[5, 4]], rtol=1e-4)


def test_an_input_whose_weights_all_units_lost_takes_no_part():
    # Both units keep input 1 alone, which is 1 in every image, so their weights become the mean of the dense outputs.
    network = network_of([[2, 4], [1, 1]], [[1, 0], [0, 1]])
    pruned = apply_masks(network, {"hidden_1": np.array([[False, False], [True, True]])})
    repaired = repair(pruned, network, np.array([[1.0, 1], [3, 1]]), ridge=1e-6)
    np.testing.assert_allclose(kernels(repaired)[0], [[0, 0], [1 + 2 * 2, 1 + 2 * 4]], rtol=1e-4)


def test_an_output_is_repaired_even_beside_one_a_million_times_larger():
    # The large output needs unit 0 alone, and nothing of it is missing; the small one needs unit 1, the twin of unit 2.
    network = network_of([[1, 0, 0], [0, 1, 1]], [[1e6, 0], [0, 1], [0, 1]])
    x = np.array([[1, 0], [0, 1], [1, 2]], np.float32)
    repaired = repair(without_units(network, [1]), network, x, ridge=1e-6)
    np.testing.assert_allclose(predictions(repaired, x), [[1e6, 0], [0, 2], [1e6, 4]], rtol=1e-4, atol=1e-4)


# --- Exact recovery -----------------------------------------------------------------------------------------------


@with_and_without_bias
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_multiples_of_units_that_are_left_can_go_without_a_trace(activation, use_bias):
    rng = np.random.default_rng(3)
    copies, sizes = [0, 1, 2, 3, 4, 5, 3, 0, 4, 1, 1, 2], np.array([1, 1, 1, 1, 1, 1, 1, 2, 0.5, 1, 3, 1])
    first, second = spread(rng, 6, 6)[:, copies] * sizes, np.tile(spread(rng, 12, 5), 2) * np.repeat([1, 2], 5)
    biases = [rng.normal(size=6)[copies] * sizes, np.outer([1, 2], rng.normal(size=5)).ravel(), np.ones(CLASSES)]
    kernels = first, second, rng.normal(size=(10, CLASSES))
    network = network_of(*kernels, biases=biases if use_bias else None, activation=activation)
    x, new = 2 * images(2000)[0] - 1, 2 * images(100, seed=7)[0] - 1
    pruned = without_units(network, range(6, 12), range(5, 10))
    assert distance(pruned, network, new) > 1e-3
    repaired = shrink(repair(pruned, network, x, TINY))
    assert_same_outputs(repaired, network, new, rtol=1e-3)
    assert [layer.units for layer in dense(repaired)] == [6, 5, CLASSES]


@strictly
@pytest.mark.parametrize(("ridge", "rtol"), [(1e-3, 0.02), (1e-6, 2e-3)])
def test_of_the_weights_of_a_double_input_every_unit_keeps_one_without_a_trace(ridge, rtol):
    # Inputs 6 to 11 repeat 0 to 5. No weight is so small that both of a pair are missed less than one of another.
    rng, network = np.random.default_rng(6), random_network(6, inputs=12)
    x, new = (np.tile(images(300, seed)[0], 2) for seed in (1, 7))
    half = rng.uniform(0.5, 1, (6, 12)) * rng.choice([-1, 1], (6, 12))
    network.set_weights([np.tile(half, (2, 1)), *network.get_weights()[1:]])
    repaired = at_once(network, {"hidden_1": 0.5, "hidden_2": 0}, x, ridge=ridge)
    assert np.all((kernels(repaired)[0] != 0).reshape(2, 6, 12).sum(axis=0) == 1)
    assert_same_outputs(repaired, network, new, rtol)


# --- Closer than before, layer by layer, and chosen so ------------------------------------------------------------


def assert_closer(repaired, pruned, network, x):
    """No unit is further from the dense network than with its pruned weights and the same, repaired inputs."""
    assert all(np.isfinite(weight).all() for weight in repaired.get_weights())
    inputs, wanted = forward(repaired, x)[0], forward(network, x)[1]
    for after, before, signal, target in zip(dense(repaired), dense(pruned), inputs, wanted, strict=True):
        errors = []
        for layer in (after, before):
            kernel, *bias = (weight.astype(np.float64) for weight in layer.get_weights())
            errors.append(np.sum((signal @ kernel + (bias[0] if bias else 0) - target) ** 2, axis=0))
        assert np.all(errors[0] <= errors[1] + 1e-5 * np.sum(target**2) / len(target.T))


@both_kinds
@on_networks
@given(seeds, fractions, st.booleans(), st.booleans(), st.sampled_from([1, 7, 60]))
def test_repair_brings_every_layer_closer_and_nothing_back(prune, seed, sparsity, use_bias, at_random, count):
    network, (x, _) = random_network(seed, use_bias), images(count, seed)
    pruned = prune(network, sparsity, **({"criterion": "random", "seed": seed} if at_random else {}))
    repaired = repair(pruned, network, x)
    assert_closer(repaired, pruned, network, x)
    assert_same_zeros(repaired, pruned)
    assert pruning_utils.cost(repaired) == pruning_utils.cost(pruned)
    np.testing.assert_allclose(predictions(shrink(repaired), x), predictions(repaired, x), rtol=1e-4, atol=1e-4)


@both_kinds
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_repair_helps_on_images_it_has_not_seen(prune, activation):
    network, (x, _), (new, _) = random_network(use_bias=False, activation=activation), images(500), images(200, seed=7)
    pruned = prune(network, 0.4)
    assert distance(repair(pruned, network, x), network, new) < distance(pruned, network, new) / 4


@with_and_without_bias
def test_what_the_images_do_not_determine_stays_as_it_was(use_bias):
    network, (x, _) = random_network(3, use_bias), images(100)
    x[:, 2] = 0
    for pruned in (prune_weights(network, 0.5), without_units(network, [0, 4, 5], [1])):
        repaired = repair(pruned, network, x)
        for after, before, signal in zip(dense(repaired), dense(pruned), forward(repaired, x)[0], strict=True):
            silent = ~signal.any(axis=0)
            assert after.get_weights()[0][silent].tobytes() == before.get_weights()[0][silent].tobytes()
        assert not forward(repaired, x)[0][0][:, 2].any() and bits(repaired) != bits(pruned)


@both_kinds
@pytest.mark.parametrize("seed", range(5))
def test_inputs_that_are_dead_or_repeat_each_other_do_no_harm_with_a_small_ridge(prune, seed):
    network, (x, _) = random_network(seed), images()
    first, *rest = network.get_weights()
    network = with_weights(network, [np.tile(first[:, :6], 2), *rest])
    pruned, one_hot = prune(network, 0.3), np.eye(INPUTS, dtype=np.float32)
    for pictures in (x, np.tile(x[:, :1], (1, 6)), np.where(np.arange(6) < 4, 0, x), 0 * x, one_hot):
        for ridge in (1e-6, 1e-12):
            assert_closer(repair(pruned, network, pictures, ridge), pruned, network, pictures)


@with_and_without_bias
def test_the_error_of_the_first_layer_never_falls_while_more_of_its_weights_go(use_bias):
    # The inputs of later ones change as well: there it does fall now and then, by up to 3 % of the layer's energy.
    network, (x, _) = random_network(3, use_bias), images(300)
    sums = np.array([forward(at_once(network, sparsity, x), x)[1][0] for sparsity in np.linspace(0, 1, 25)])
    errors = np.sum((sums - sums[0]) ** 2, axis=(1, 2))
    assert np.all(np.diff(errors) > -1e-6 * errors[-1]) and errors[-1] > 0


@pytest.mark.parametrize("seed", range(3))
def test_in_large_layers_too_reconstruction_leaves_the_least_error(seed):
    network, rng = random_network(seed, hidden=(40,), inputs=200), np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(600, 20)) @ rng.normal(size=(20, 200)) + 2 * rng.normal(size=(600, 200)), 0)
    for sparsity in (0.5, 0.8, 0.95):
        best, *others = (at_once(network, sparsity, x, criterion=criterion)
                         for criterion in ("reconstruction", "activation", "magnitude"))  # fmt: skip
        assert np.count_nonzero(kernels(best)[0]) == 8000 - round(sparsity * 8000)
        assert distance(best, network, x) < 0.9 * min(distance(other, network, x) for other in others)
    assert bits(best) == bits(at_once(network, 0.95, x))


@strictly
@pytest.mark.parametrize("kind", PRUNE)
@pytest.mark.parametrize("sparsity", [0, 0.5, 1, {"hidden_2": 0.75, "hidden_1": 0.25}])
def test_prune_and_repair_chooses_and_repairs_one_layer_after_the_other(kind, sparsity):
    network, (x, _) = random_network(10), images(300)  # choosing again changes the second layer, in neurons too
    expected, before = network, [*bits(network), x.tobytes()]
    found = prune_and_repair(network, sparsity, x, kind)
    for number, (name, kernel) in enumerate(zip(("hidden_1", "hidden_2"), kernels(found), strict=False)):
        share = sparsity[name] if isinstance(sparsity, dict) else sparsity
        if kind == "weights":
            inputs, kept = forward(expected, x)[0][number], kernel.size - round(share * kernel.size)
            weighted = kernels(expected)[number] * what_errors_count(network)[number]
            mask = chosen_together(inputs, inputs.mean(axis=0), weighted, kept)
            expected = with_weights(expected, [*expected.get_weights()[:-2], *network.get_weights()[-2:]])  # fit once
        else:
            mask = keep_masks({name: pruning_utils.neuron_scores(expected, "reconstruction", x)[name]}, share)[name]
        expected = repair(apply_masks(expected, {name: mask}), network, x)
        np.testing.assert_array_equal(kernel != 0 if kind == "weights" else kernel.any(axis=0), mask)
    assert_same_outputs(found, expected, x, rtol=5e-3)
    assert [*bits(network), x.tobytes()] == before and (sparsity != 0 or bits(found) == before[:-1])


@pytest.mark.parametrize(("kind", "limit"), [("weights", 0.85), ("neurons", 1.05)])
def test_choosing_again_leaves_less_error_for_weights_and_no_more_for_neurons(kind, limit):
    ratios = []  # over 30 seeds, 0.67 for weights and 0.93 for neurons, each times or divided by 1.1
    for seed in range(6):
        network, (x, _) = random_network(seed, hidden=(30, 20, 15)), images(300, seed)
        again, once = (distance(way(network, 0.9, x, kind), network, x) for way in (prune_and_repair, at_once))
        ratios.append(again / once)
    assert np.exp(np.mean(np.log(ratios))) < limit


# --- Against plain NumPy ------------------------------------------------------------------------------------------


def with_bias_row(layer, signal):
    """The kernel and, as a last row, the bias; the inputs and, if there is a bias, one that is always 1."""
    weights = np.vstack(layer.get_weights()).astype(np.float64)
    return weights, np.hstack([signal, np.ones((len(signal), len(weights) - signal.shape[1]))])


def pull(inputs, whole, ridge):
    """The ridge of each input: what the mean input sends, as shares of outputs' energies; its own for the bias."""
    energy, squares = np.sum(inputs**2, axis=0), whole.get_weights()[0].astype(np.float64) ** 2
    strength, energy = energy.copy(), energy[: len(squares)]
    received = energy @ squares
    sent = np.sum(squares[:, received > 0] / received[received > 0], axis=1) * (energy > 0)
    for number in np.flatnonzero(sent):
        strength[number] = np.mean((energy * sent)[sent > 0]) / sent[number]
    return ridge * strength


def refitted_layer(layer, whole, signal, target, ridge):
    """Each unit is solved for on its own; without a ridge, its weights themselves and not their change."""
    weights, inputs = with_bias_row(layer, signal)
    strength = pull(inputs, whole, ridge)
    for unit, column in enumerate(weights.T):
        free = column != 0
        free[signal.shape[1] :] |= free.any()
        free &= inputs.any(axis=0)
        start = column * (ridge > 0) * free
        rows = np.vstack([inputs[:, free], np.diag(np.sqrt(strength[free]))])
        missing = target[:, unit] - inputs @ np.where(free, start, column)
        column[free] = start[free] + np.linalg.lstsq(rows, np.append(missing, np.zeros(free.sum())), rcond=None)[0]
    return weights


def lively_network(use_bias, hidden=(10, 7)):
    """Most units fire on most images, and differently: least squares is well-conditioned."""
    rng = np.random.default_rng(11)
    sizes = (INPUTS, *hidden, CLASSES)
    arrays = [spread(rng, *shape) * 2 + 0.1 * rng.normal(size=shape) for shape in pairwise(sizes)]
    return network_of(*arrays, biases=[rng.uniform(0.2, 1, units) for units in sizes[1:]] if use_bias else None)


def assert_nearly_least(repaired, pruned, network, x, ridge, rtol=None):
    """Repair has gone 99 % of the way to the least squares in every layer; with `rtol`, up to this share of it."""
    signals, targets = forward(repaired, x)[0], forward(network, x)[1]
    layers = zip(dense(pruned), dense(repaired), dense(network), signals, targets, strict=True)
    for before, after, whole, signal, target in layers:
        (old, inputs), (found, _) = with_bias_row(before, signal), with_bias_row(after, signal)
        strength, least = pull(inputs, whole, ridge)[:, None], refitted_layer(before, whole, signal, target, ridge)
        start, end, lowest = (np.sum((inputs @ weights - target) ** 2) + np.sum(strength * (weights - old) ** 2)
                              for weights in (old, found, least))  # fmt: skip
        assert end - lowest <= 0.01 * (start - lowest) + 1e-5 * np.sum(target**2)
        if rtol:
            size, way, error = map(np.linalg.norm, (old, least - old, found - least))
            assert error <= rtol * way + 1e-5 * size and (way > 0.05 * size or signal is signals[0])  # not a short one


CASES = [("neurons", 0, 2e-3), ("neurons", 1e-3, 1e-4), ("neurons", 0.5, 1e-4)]
CASES += [("weights", 0, 5e-3), ("weights", 0.1, 1e-3), ("weights", 2, 1e-3)]


@strictly
@with_and_without_bias
@pytest.mark.parametrize("hidden", [(10, 7), (9, 9, 8)])
@pytest.mark.parametrize(("kind", "ridge", "rtol"), CASES)
def test_repair_equals_least_squares_unit_by_unit(kind, ridge, rtol, hidden, use_bias):
    network, (x, _) = lively_network(use_bias, hidden), images(400)
    x = (2 * x - 1) * np.array([1, 0, 0.3, 1, 3, 1], np.float32)  # one input never fires, one fires strongly
    pruned = apply_masks(network, masks_of(kind, network))
    assert_nearly_least(repair(pruned, network, x, ridge or TINY), pruned, network, x, ridge, rtol)


@both_kinds
@on_networks
@given(seeds, fractions, st.booleans(), st.sampled_from([1e-3, 0.1]))
def test_repair_goes_nearly_all_the_way_to_the_least_squares(prune, seed, sparsity, use_bias, ridge):
    network, (x, _) = random_network(seed, use_bias), images(80, seed)
    pruned = prune(network, sparsity)
    assert_nearly_least(repair(pruned, network, x, ridge), pruned, network, x, ridge)


# --- What must not matter -----------------------------------------------------------------------------------------


@strictly
@pytest.mark.parametrize("kind", PRUNE)
def test_units_scaled_on_the_way_in_and_back_on_the_way_out_are_repaired_to_the_same_function(kind):
    network, (x, _), (new, _) = random_network(5), images(300), images(100, seed=7)
    scaled = scale_units(random_network(5), np.geomspace(1e-3, 1e3, 12), np.geomspace(1e3, 1, 8))
    for way in (at_once, prune_and_repair):
        repaired = way(network, 0.5, x, kind)
        assert_same_outputs(way(scaled, 0.5, x, kind), repaired, new, rtol=1e-3)
        assert distance(repaired, network, new) > 0


@strictly
@both_kinds
@pytest.mark.parametrize("scale", [1e-17, 1e-6, 255, 1e17])
def test_the_scale_of_the_images_does_not_matter_without_biases(prune, scale):
    network, (x, _) = network_of(*kernels(random_network())), images()
    pruned = prune(network, 0.5)
    repaired, scaled = (repair(pruned, network, pictures) for pictures in (x, x * np.float32(scale)))
    assert bits(repaired) != bits(pruned)
    assert_same_outputs(scaled, repaired, x, rtol=1e-3)


@strictly
@both_kinds
@pytest.mark.parametrize("batch_size", [1, 7, 99])
def test_the_size_of_the_batches_does_not_matter_and_is_kept(prune, batch_size):
    (x, _), sizes = images(100), []

    def relu(sums):
        sizes.append(len(sums))
        return keras.ops.relu(sums)

    network = random_network(activation=relu)
    pruned = prune(network, 0.5)
    repaired = repair(pruned, network, x, batch_size=batch_size)
    assert max(sizes) <= max(batch_size, 3)  # activations are compared on three images
    assert_same_outputs(repaired, repair(pruned, network, x), x, rtol=1e-3)


@both_kinds
def test_repair_gives_the_same_every_time_and_leaves_its_arguments_alone(prune):
    network, (x, _) = random_network(), images()
    pruned = prune(network, 0.5)
    before = [*bits(network), *bits(pruned), x.tobytes()]
    repaired = repair(pruned, network, x)
    for same in (x.astype(np.float64), keras.Variable(x), x.tolist()):
        assert bits(repair(pruned, network, same, Fraction(1, 1000))) == bits(repaired) != bits(pruned)
    assert bits(repair(prune(network, 0.0), network, x)) == bits(network)
    repaired.set_weights([weight + 1 for weight in repaired.get_weights()])
    assert [*bits(network), *bits(pruned), x.tobytes()] == before


@strictly
@both_kinds
@pytest.mark.parametrize("build", [
    lambda: chain(*gentle_network().layers, inputs=(5, INPUTS)),  # on sequences
    functional_network,  # functional, with layers in between
])  # fmt: skip
def test_other_chains_of_the_same_dense_layers_are_repaired_alike(prune, build):
    plain, network, (x, _) = gentle_network(), build(), images(100)
    repaired = repair(prune(network, 0.5), network, x.reshape(-1, *network.input_shape[1:]))
    expected = repair(prune(plain, 0.5), plain, x)
    assert_same_outputs(with_weights(plain, repaired.get_weights()), expected, x, rtol=1e-3)


# --- Numbers of every kind ----------------------------------------------------------------------------------------


@strictly
@pytest.mark.parametrize("kind", PRUNE)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64"])
def test_networks_of_every_precision_are_repaired_as_in_float32(kind, policy):
    network, (x, _) = gentle_network(), images(200)
    layers = [keras.layers.Dense(layer.units, layer.activation, dtype=policy) for layer in dense(network)]
    low = with_weights(chain(*layers), network.get_weights())
    for way in (at_once, prune_and_repair):
        repaired, expected = way(low, 0.5, x, kind), way(network, 0.5, x, kind)
        assert [weight.dtype for weight in repaired.get_weights()] == [weight.dtype for weight in low.get_weights()]
        assert_same_zeros(repaired, expected)
        for found, wanted in zip(repaired.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_allclose(np.float64(found), wanted, rtol=0, atol=0.03 * np.abs(wanted).max())


def test_single_weights_are_solved_for_even_where_that_takes_many_steps():
    rng = np.random.default_rng(3)  # forty inputs that differ little from each other
    network, x = random_network(3, hidden=(30, 20), inputs=40), rng.random((300, 1)) + 0.05 * rng.random((300, 40))
    pruned = prune_weights(network, 0.5)
    assert_nearly_least(repair(pruned, network, x, 1e-5), pruned, network, x, 1e-5)


def test_single_weights_are_solved_for_side_by_side_or_directly_with_the_same_result(monkeypatch):
    rng = np.random.default_rng(0)
    rows, alive = rng.normal(size=(50, 20)), rng.random((20, 5)) < np.array([0.2, 0.4, 0.5, 0.7, 0.0])
    gram, cross = rows.T @ rows / 50 + 1e-3 * np.eye(20), rng.normal(size=(20, 5)) * alive
    exact = np.zeros(cross.shape)
    for unit, free in enumerate(alive.T):
        exact[free, unit] = np.linalg.solve(gram[np.ix_(free, free)], cross[free, unit])
    solve, side_by_side = pruning_utils._solve_within, pruning_utils._conjugate_gradients
    np.testing.assert_allclose(solve(gram, cross, alive), exact, rtol=1e-9)
    np.testing.assert_allclose(solve(gram, cross, alive, few=0), exact, atol=5e-3 * np.abs(exact).max())
    early, reached = side_by_side(gram, cross, alive, limit=2)  # a step of elimination, which goes on from there
    assert np.all(np.sum(early * (2 * cross - gram @ early), axis=0)[:4] > 0) and not early[~alive].any()
    assert not reached[:4].any() and reached[4]
    monkeypatch.setattr(pruning_utils, "_conjugate_gradients", partial(side_by_side, limit=2))
    np.testing.assert_allclose(solve(gram, cross, alive, few=8), exact, rtol=1e-9)  # what they do not reach


def test_the_solver_changes_nothing_where_rounding_has_left_no_curvature():
    gram, cross = np.array([[1, 1 + 1e-5], [1 + 1e-5, 1]]), np.array([[1.0], [-1 + 1e-4]])  # an eigenvalue is -1e-5
    for few in (0, 2):
        assert np.abs(pruning_utils._solve_within(gram, cross, np.ones((2, 1), bool), few)).max() < 1


def test_a_unit_that_needs_nothing_beside_one_that_does_stays_as_it_is():
    gram, cross = np.eye(3), np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], np.float32)
    for few in (0, 3):
        found = pruning_utils._solve_within(gram, cross, np.ones((3, 2), bool), few)
        np.testing.assert_allclose(found, cross, rtol=1e-6)


def test_prune_and_repair_brings_no_weight_back_that_is_0_in_the_dense_network():
    network, (x, _) = prune_weights(random_network(1), 0.5), images(300)
    repaired = prune_and_repair(network, 0.7, x)
    for before, after in zip(kernels(network)[:-1], kernels(repaired)[:-1], strict=True):
        assert not after[before == 0].any()


# --- What bad input gets ------------------------------------------------------------------------------------------


BAD = {"ridge": [0, -1e-3, np.nan, np.inf, 1e300, None, "1", [1e-3], 1j, True], "batch_size": [0, -1, 1.5, "9", True]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_ridge_or_batch_size_out_of_range_is_refused_with_its_value(name, value):
    network, (x, _) = random_network(), images()
    for attempt in (partial(repair, prune_neurons(network, 0.5), network), partial(prune_and_repair, network, 0.5)):
        with pytest.raises(ValueError, match=f"{name} must be a positive number.*got {re.escape(repr(value))}"):
            attempt(x, **{name: value})


def test_prune_and_repair_refuses_other_kinds_sparsities_and_layers_as_its_parts_do():
    for sparsity, kind, message in ((0.5, "units", "unknown kind 'units'.*weights, neurons"), (1.1, "weights", "1.1"),
                                    ({"hidden_1": 0.5}, "neurons", r"\['hidden_1', 'hidden_2'\]")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prune_and_repair(random_network(), sparsity, images()[0], kind)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: random_network(hidden=(12, 9)), "must have the same layers"),
    (lambda: chain(keras.layers.Dropout(0.5), *random_network().layers), "must have the same layers"),
    (lambda: shrink(prune_neurons(random_network(), 0.5)), r"same layers.*\(6, 6\).*shrink later"),
    (lambda: random_network(activation="tanh"), "must have the same activations"),
])  # fmt: skip
def test_networks_that_differ_in_more_than_weights_are_refused(build, message):
    for pair in ((random_network(), build()), (build(), random_network())):
        with pytest.raises(ValueError, match=message):
            repair(*pair, images()[0])


@both_kinds
def test_exchanged_arguments_are_refused(prune):
    with pytest.raises(ValueError, match="exchange the arguments"):
        repair(random_network(), prune(random_network(), 0.5), images()[0])
