"""Scores: worked examples, every criterion against plain NumPy, and what the scores must not depend on."""

import importlib
from itertools import combinations

import keras
import numpy as np
import pytest
from keras.layers import Activation, Dense, Dropout, Flatten, Softmax
from networks import (
    CLASSES,
    INPUTS,
    backward_elimination,
    chain,
    dense,
    forward,
    functional_network,
    gentle_network,
    greedy_selection,
    images,
    kernels,
    network_of,
    random_network,
    scale_units,
    unexplained,
    what_errors_count,
)
from scipy.special import softmax

from pruning_utils import (
    NEURON_CRITERIA,
    WEIGHT_CRITERIA,
    _best_together,
    _error_before_each,
    _Graph,
    _weight_problems,
    keep_masks,
    neuron_scores,
    weight_scores,
)

EVERY = [*((weight_scores, name) for name in WEIGHT_CRITERIA), *((neuron_scores, name) for name in NEURON_CRITERIA)]
with_every_criterion = pytest.mark.parametrize(("scores", "criterion"), [each for each in EVERY if each[1] != "random"])
both_kinds = pytest.mark.parametrize("scores", [weight_scores, neuron_scores])
native = importlib.import_module(keras.backend.backend()).nn


def assert_same(found, expected, rtol=1e-4, atol=1e-7):
    assert list(found) == list(expected)
    for name, score in expected.items():
        np.testing.assert_allclose(found[name], score, rtol=rtol, atol=atol)


def test_taylor_by_hand():
    # The hidden unit is 1, the logits are (log 3, 0), the probabilities (3/4, 1/4). The loss changes with the unit by
    # -1/4 · log 3 for label 0 and by 3/4 · log 3 for label 1: half of log 3 is the mean without signs.
    network, x, y = network_of([[2]], [[np.log(3), 0]]), np.array([[0.5], [0.5]]), np.array([0, 1])
    assert neuron_scores(network, "taylor", x, y)["hidden_1"] == pytest.approx([np.log(3) / 2])
    assert weight_scores(network, "taylor", x, y)["hidden_1"].tolist() == [pytest.approx([np.log(3) / 2])]


def test_activation_by_hand():
    # The first unit is 3 and 4, so its rms is the root of 12.5; its outgoing weights have the norm 5. The second is 0.
    network, x = network_of([[1, -1]], [[3, -4], [6, 8]]), np.array([[3], [4]])
    assert neuron_scores(network, "activation", x)["hidden_1"] == pytest.approx([5 * 12.5**0.5, 0])
    assert weight_scores(network, "activation", x)["hidden_1"].tolist() == [pytest.approx([12.5**0.5] * 2)]


def test_reconstruction_by_hand():
    # One unit is 1 where the other is 0. Their outgoing weights have the squares 9 and 16: without the second, which
    # explains more and is taken first, 9 of 25 remain.
    network = network_of([[1, -1]], [[3, 0], [0, 4]])
    found = neuron_scores(network, "reconstruction", np.array([[1], [-1]]))["hidden_1"]
    np.testing.assert_allclose(found, [9 / 25, 1], rtol=2e-3)  # the ridge is 1 in 1000


# --- Against plain NumPy ------------------------------------------------------------------------------------------


def backward(network, x, y):
    """Gradients of each image's cross-entropy by the pre-activations of every Dense layer."""
    _, sums = forward(network, x)
    deltas = [softmax(sums[-1], axis=-1) - np.eye(CLASSES)[y]]
    for kernel, z in zip(kernels(network)[:0:-1], sums[-2::-1], strict=True):
        deltas.insert(0, deltas[0] @ kernel.T * (z > 0))
    return deltas


# From the input, kernel, pre-activation and gradient of a layer, the input and kernel of the next, the mean inputs of
# both where there is a bias (or 0), and what errors of the units of both count.
ORACLES = {
    (weight_scores, "magnitude"): lambda a, w, z, d, *_: np.abs(w),
    (weight_scores, "activation"): lambda a, w, z, d, *_: np.abs(w) * np.sqrt(np.mean(a**2, axis=0))[:, None],
    (weight_scores, "taylor"): lambda a, w, z, d, *_: np.mean(np.abs(w * a[:, :, None] * d[:, None, :]), axis=0),
    (neuron_scores, "norm"): lambda a, w, *_: [np.linalg.norm(column) for column in w.T],
    (neuron_scores, "activation"): lambda a, w, z, d, b, v, *_: np.sqrt(np.mean(b**2, axis=0) * np.sum(v**2, axis=1)),
    (neuron_scores, "taylor"): lambda a, w, z, d, *_: np.mean(np.abs(z * d), axis=0),
    (weight_scores, "reconstruction"): lambda a, w, z, d, b, v, m, n, s, t: backward_elimination(a, m, w * s),
    (neuron_scores, "reconstruction"): lambda a, w, z, d, b, v, m, n, s, t: greedy_selection(b - n, v * t),
}


@pytest.mark.parametrize("use_bias", [False, True])
@with_every_criterion
def test_scores_equal_plain_numpy(scores, criterion, use_bias):
    network, (x, y) = random_network(3, use_bias), images(5_003)  # more than one batch
    (inputs, sums), weights = forward(network, x), [np.float64(kernel) for kernel in kernels(network)]
    means = [a.mean(axis=0) * layer.use_bias for a, layer in zip(inputs, dense(network), strict=True)]
    parts = [inputs, weights, sums, backward(network, x, y), inputs[1:], weights[1:], means, means[1:]]
    parts += [what_errors_count(network), what_errors_count(network)[1:]]
    expected = {f"hidden_{number}": ORACLES[scores, criterion](*each)
                for number, each in enumerate(zip(*parts, strict=False), start=1)}  # fmt: skip
    assert_same(scores(network, criterion, x, y), expected)


@both_kinds
def test_random_scores_depend_on_the_seed_alone(scores):
    one, same = (scores(random_network(seed, hidden=(50, 50)), "random", seed=7) for seed in (0, 1))
    other = scores(random_network(hidden=(50, 50)), "random", seed=8)
    assert_same(one, same, rtol=0, atol=0)
    for name in ("hidden_1", "hidden_2"):
        assert abs(np.corrcoef(one[name].ravel(), other[name].ravel())[0, 1]) < 0.5
        assert np.unique(one[name]).size == one[name].size and 0.3 < one[name].mean() < 0.7
    assert not np.array_equal(one["hidden_1"].ravel()[:50], one["hidden_2"].ravel()[:50])


# --- Greedy selection, backward elimination -----------------------------------------------------------------------


def outputs_and_kernel(seed, units=9, following=4, count=40):
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(count, units)) + 0.3, 0), rng.normal(size=(units, following))


@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("block", [1, 2, 4, 128])
def test_the_greedy_selection_equals_trying_every_unit_at_every_step(ridge, block):
    for seed in range(3):
        signal, kernel = outputs_and_kernel(seed)
        found = _error_before_each(signal.T @ signal, kernel, ridge, block)
        np.testing.assert_allclose(found, greedy_selection(signal, kernel, ridge), rtol=1e-6)


def test_the_greedy_selection_is_bounded_by_all_subsets_and_the_best_of_them_where_units_are_orthogonal():
    for seed in range(10):
        signal, kernel = outputs_and_kernel(seed, units=6, following=3, count=30)
        for outputs in (signal, np.linalg.qr(signal)[0] * np.arange(1, 7)):
            order = np.argsort(-_error_before_each(outputs.T @ outputs, kernel, ridge=1e-12))
            every = [unexplained(outputs, outputs @ kernel, units) for units in combinations(range(6), 3)]
            greedy = unexplained(outputs, outputs @ kernel, order[:3]) / min(every)
            assert 1 - 1e-9 <= greedy <= (np.median(every) / min(every) if outputs is signal else 1 + 1e-6)


def test_weights_chosen_with_refits_are_nearly_as_good_as_the_best_of_all_subsets_on_average():
    # Single cases of elimination are up to 54 % off; one in ten is more than 10 % off, and one in fourteen worse than
    # by magnitude.
    errors = []
    for seed in range(100):
        signal, kernel = outputs_and_kernel(seed, units=8, following=1)
        best = min(unexplained(signal, signal @ kernel, left) for left in combinations(range(8), 4))
        graph = _Graph(network := network_of(kernel, [[1]]))
        scores = [weight_scores(network, criterion, signal) for criterion in ("reconstruction", "magnitude")]
        scores.append({"hidden_1": _best_together(*next(iter(_weight_problems(graph, signal, graph.hidden))), 0.5)})
        masks = [keep_masks(score, 0.5)["hidden_1"][:, 0] for score in scores]
        errors.append([unexplained(signal, signal @ kernel, mask) / best for mask in masks])
    eliminated, by_magnitude, together = np.mean(errors, axis=0)
    assert np.min(errors) > 1 - 1e-6 and eliminated < 1.05 and together < 1.05 < by_magnitude


def test_weights_without_effect_score_0_and_units_that_are_always_0_or_send_nothing_come_last():
    network, (x, _), idle = random_network(), images(200), np.zeros((6, 12), bool)
    first, bias, second, *_ = weights = network.get_weights()
    x[:, 2], first[4, 6:9], first[:, [0, 3]], bias[[0, 3]], second[5] = 0, 0, -1, -0.5, 0
    idle[2] = idle[4, 6:9] = idle[:, 5] = True
    network.set_weights(weights)
    np.testing.assert_array_equal(weight_scores(network, "reconstruction", x)["hidden_1"] == 0, idle)
    score = neuron_scores(network, "reconstruction", x)["hidden_1"]
    assert np.isfinite(score).all() and max(score[[0, 3, 5]]) <= np.delete(score, [0, 3, 5]).min()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_bias_takes_up_does_not_count(seed):
    network, (x, _), shift = random_network(seed), images(200), np.linspace(-1, 1, 6, dtype=np.float32)
    expected = keep_masks(weight_scores(network, "reconstruction", x), 0.5)["hidden_1"]
    kernel, bias, *rest = network.get_weights()
    network.set_weights([kernel, bias - shift @ kernel, *rest])  # the same function of images that are shifted
    found = keep_masks(weight_scores(network, "reconstruction", x + shift), 0.5)["hidden_1"]
    assert np.count_nonzero(found != expected) <= 2  # one for another that is as good: the ridge sees the shift
    x[:, 2] = 1
    assert not keep_masks(weight_scores(network, "reconstruction", x), 0.5)["hidden_1"][2].any()


# --- What scores must not depend on -------------------------------------------------------------------------------


@with_every_criterion
def test_permuting_units_permutes_the_scores(scores, criterion):
    network, (x, y), order = random_network(), images(), np.random.default_rng(5).permutation(12)
    first, second = (score.T for score in scores(network, criterion, x, y).values())
    kernel, bias, following, *rest = network.get_weights()
    network.set_weights([kernel[:, order], bias[order], following[order], *rest])
    expected = {"hidden_1": first[order].T, "hidden_2": second[..., order].T if second.ndim == 2 else second}
    assert_same(scores(network, criterion, x, y), expected)


@with_every_criterion
def test_positions_of_sequences_count_as_images_and_layers_in_between_change_nothing(scores, criterion):
    network, (x, y) = gentle_network(), images(50)
    expected, sequences = scores(network, criterion, x, y), chain(*network.layers, inputs=(5, INPUTS))
    assert_same(scores(functional_network(), criterion, x.reshape(50, 2, 3), y), expected, atol=1e-6)
    assert_same(scores(sequences, criterion, x.reshape(10, 5, INPUTS), y.reshape(10, 5)), expected, atol=1e-6)


@pytest.mark.parametrize(("scores", "criterion", "scaled"), [
    (weight_scores, "taylor", 3), (neuron_scores, "taylor", 3), (neuron_scores, "activation", 1),
    (weight_scores, "reconstruction", 3), (neuron_scores, "reconstruction", 3),
])  # fmt: skip
def test_units_of_so_many_layers_scaled_on_the_way_in_and_back_on_the_way_out_score_alike(scores, criterion, scaled):
    (x, y), units, rng = images(200), (12, 9, 8), np.random.default_rng(0)
    factors = [10.0 ** rng.integers(-3, 4, n) if n in units[:scaled] else np.ones(n) for n in units]
    plain, other = random_network(hidden=units), scale_units(random_network(hidden=units), *factors)
    assert_same(scores(other, criterion, x, y), scores(plain, criterion, x, y), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
@with_every_criterion
def test_networks_of_half_precision_are_scored_in_float32(scores, criterion, dtype):
    units, (x, y) = (1000, 8, CLASSES), images(20)
    low, twin = (chain(*(Dense(n, "relu" if n > CLASSES else None, dtype=policy, name=f"hidden_{n}") for n in units))
                 for policy in (dtype, "float32"))  # fmt: skip
    twin.set_weights([np.float32(weight) for weight in low.get_weights()])
    expected = scores(twin, criterion, x * 300, y)  # the sums of their squares are beyond float16
    assert_same(scores(low, criterion, x * 300, y), expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-17, 1e17])
def test_the_scale_of_images_and_weights_neither_under_nor_overflows(factor):
    network, (x, _) = random_network(use_bias=False), images(200)
    scaled = x * np.float32(factor)
    for scores in (weight_scores, neuron_scores):
        assert_same(scores(network, "reconstruction", scaled), scores(network, "reconstruction", x), rtol=1e-3)
        expected = {name: score * factor for name, score in scores(network, "activation", x).items()}
        assert_same(scores(network, "activation", scaled), expected, atol=0)
    small, factor = neuron_scores(network), np.float32(1e-25 if factor < 1 else 1e19)
    network.set_weights([weight * factor for weight in network.get_weights()])
    assert_same(neuron_scores(network), {name: score * float(factor) for name, score in small.items()}, atol=0)


@pytest.mark.parametrize("layers", [
    [Softmax()],
    [Activation("softmax")],
    [Activation(getattr(native, "softmax", keras.ops.softmax))],  # of the backend
    [Activation(lambda t: keras.ops.exp(t) / keras.ops.sum(keras.ops.exp(t), -1, keepdims=True))],
    [Softmax(), Dropout(0.5), Flatten()],
])  # fmt: skip
def test_taylor_scores_are_the_same_for_logits_and_for_every_kind_of_softmax(layers):
    plain, (x, y) = gentle_network(), images()
    network = chain(*plain.layers, *layers)
    for scores in (weight_scores, neuron_scores):
        assert_same(scores(network, "taylor", x, y), scores(plain, "taylor", x, y))


@pytest.mark.parametrize("convert", [
    keras.Variable, keras.ops.convert_to_tensor, np.ndarray.tolist, lambda a: a.astype(a.dtype.newbyteorder(">")),
])  # fmt: skip
def test_images_and_labels_may_be_variables_tensors_lists_or_of_another_byte_order(convert):
    network, (x, y) = random_network(), images()
    for scores in (weight_scores, neuron_scores):
        assert_same(scores(network, "taylor", convert(x), convert(y)), scores(network, "taylor", x, y))


# --- Criteria of one's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [(), ("x",), ("y",), ("seed",), ("x", "y"), ("x", "y", "seed")])
def test_a_criterion_of_ones_own_gets_what_its_signature_names(monkeypatch, needed):
    got, (x, y) = {}, images()
    body = f"lambda network, {', '.join(needed)}: got.update({', '.join(f'{n}={n}' for n in needed)}) or [*ones]"
    monkeypatch.setitem(NEURON_CRITERIA, "own", eval(body, {"got": got, "ones": map(np.ones, (12, 8))}))
    found = neuron_scores(random_network(), "own", x.tolist(), y.tolist(), seed=3)
    assert {name: score.shape for name, score in found.items()} == {"hidden_1": (12,), "hidden_2": (8,)}
    assert set(got) == set(needed) and got.get("seed", 3) == 3
    np.testing.assert_array_equal(got.get("x", x), np.float32(x))
    np.testing.assert_array_equal(got.get("y", y), y)


@pytest.mark.parametrize(("result", "message"), [
    ([np.ones(12)], r"'own' must return .*\(12,\), \(8,\)"), (np.ones((2, 8)), r"'own' must return"),
    ([np.ones(12), np.full(8, np.nan)], "'hidden_2' hold NaN"),
])  # fmt: skip
def test_scores_of_a_criterion_of_ones_own_are_checked(monkeypatch, result, message):
    monkeypatch.setitem(NEURON_CRITERIA, "own", lambda network: result)
    with pytest.raises(ValueError, match=message):
        neuron_scores(random_network(), "own")


# --- What bad input gets ------------------------------------------------------------------------------------------


@both_kinds
def test_an_unknown_criterion_is_answered_with_the_valid_ones(scores):
    with pytest.raises(ValueError, match=r"unknown (weight|neuron) criterion 'best'") as caught:
        scores(random_network(), "best")
    assert all(name in str(caught.value) for kind, name in EVERY if kind is scores)


@pytest.mark.parametrize("needed", ["activation: x", "taylor: x", "taylor: y", "random: seed"])
def test_a_criterion_without_its_data_names_what_it_needs(needed):
    criterion, missing = needed.split(": ")
    data = dict(zip("xy", images(), strict=True)) | {"seed": 0, missing: None}
    with pytest.raises(ValueError, match=rf"{criterion!r} needs {missing}\b"):
        neuron_scores(random_network(), criterion, **data)


@pytest.mark.parametrize("y", [np.zeros(4, int), np.zeros((5, 4), int), np.zeros(5), np.full(5, -1), np.full(5, 4)])
def test_taylor_refuses_labels_that_are_not_one_class_per_image(y):
    with pytest.raises(ValueError, match=r"one integer label per output, shape \(5,\)|must be the classes 0 to 3"):
        neuron_scores(random_network(), "taylor", np.ones((5, 6)), y)


@pytest.mark.parametrize("layers", [[Activation("sigmoid")], [Softmax(), Softmax()], [Softmax(axis=0)], [Dense(1)]])
def test_taylor_refuses_networks_that_return_neither_logits_nor_probabilities_of_classes(layers):
    network = chain(*random_network().layers, *layers)
    with pytest.raises(ValueError, match=r"must return logits or their softmax|must be the classes 0 to 0"):
        weight_scores(network, "taylor", np.ones((5, 6)), np.zeros(5, int))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@both_kinds
@pytest.mark.parametrize("criterion", ["activation", "taylor", "reconstruction"])
def test_a_network_whose_scores_overflow_is_refused(scores, criterion):
    network, (x, y) = random_network(hidden=(12, 8, 8)), images()
    network.set_weights([weight * np.float32(1e30) for weight in network.get_weights()])
    with pytest.raises(ValueError, match=r"scores of layer 'hidden_[123]' hold NaN or inf"):
        scores(network, criterion, x, y)
