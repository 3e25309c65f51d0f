"""The trained networks of the study: as good as they should be, pruned as the reference prunes, curves as published."""

import numpy as np
import pytest
from scipy import stats
from study import SPARSITIES, study_networks, sweep

from pruning_utils import prunable_layers, prune_neurons, prune_weights

METHODS = {"weight pruning": prune_weights, "neuron pruning": prune_neurons}
DENSE_AT_LEAST = {"mnist": 0.978, "fashion-mnist": 0.865}
# One unseeded run of siddharth-agrawal/Network-Pruning, read off its two plots to 0.005; a column per sparsity.
PUBLISHED = {
    ("mnist", "weight pruning"): (0.979, 0.98, 0.98, 0.98, 0.98, 0.974, 0.924, 0.421, 0.150, 0.098),
    ("mnist", "neuron pruning"): (0.979, 0.982, 0.976, 0.974, 0.968, 0.826, 0.195, 0.098, 0.098, 0.098),
    ("fashion-mnist", "weight pruning"): (0.876, 0.87, 0.87, 0.872, 0.872, 0.846, 0.715, 0.445, 0.267, 0.10),
    ("fashion-mnist", "neuron pruning"): (0.876, 0.872, 0.872, 0.846, 0.717, 0.412, 0.110, 0.100, 0.100, 0.100),
}


@pytest.fixture(scope="module")
def networks():
    return study_networks()


@pytest.fixture(scope="module")
def frame(networks):
    return sweep(networks, METHODS)


@pytest.fixture(params=DENSE_AT_LEAST)
def name(request):
    return request.param


def accuracies(frame, name, method, sparsity):
    """One accuracy per seed, in their order."""
    rows = frame[(frame["dataset"] == name) & (frame["method"] == method) & (frame["sparsity"] == sparsity)]
    assert rows["seed"].tolist() == [0, 1, 2, 3, 4]
    return rows["accuracy"].to_numpy()


def test_dense_networks_are_as_good_as_they_should_be(frame, name):
    assert accuracies(frame, name, "weight pruning", 0.0).mean() >= DENSE_AT_LEAST[name]


def test_half_of_the_weights_can_go(frame, name):
    change = accuracies(frame, name, "weight pruning", 0.5) - accuracies(frame, name, "weight pruning", 0.0)
    # 0.3 points, give or take what five seeds leave open: on other processors the same seeds end elsewhere.
    assert abs(change.mean()) <= 0.003 + 2 * stats.sem(change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_curves_agree_with_the_published_run(frame, name, method, sparsity):
    ours = accuracies(frame, name, method, sparsity)
    published = PUBLISHED[name, method][SPARSITIES.index(sparsity)]
    # One more run differs from the mean of five by sd · sqrt(1 + 1/5). The sd is itself estimated from five runs, so
    # "three sigma" is a quantile of Student's t with four degrees of freedom. 0.01 is for reading a plot.
    three_sigma = stats.t.ppf(1 - 0.0027 / 2, len(ours) - 1)
    assert abs(ours.mean() - published) <= 0.01 + three_sigma * ours.std(ddof=1) * np.sqrt(1 + 1 / len(ours))


# --- The reference's own masks, in plain NumPy --------------------------------------------------------------------


def reference_values(kernel, method):
    """What the reference ranks: every |w|, or the norm of every incoming column."""
    return np.abs(kernel) if method == "weight pruning" else np.linalg.norm(kernel.astype(np.float64), axis=0)


def reference_keeps(values, sparsity):
    """The reference keeps what is not strictly below the int(k n)-th of the sorted values."""
    return values >= np.sort(values, axis=None)[int(sparsity * values.size)]


def reference_accuracy(each, method, sparsity):
    signal = each.dataset.x_test
    *kernels, output, bias = each.network.get_weights()
    for kernel in kernels:
        keep = reference_keeps(reference_values(kernel, method), sparsity)
        signal = np.maximum(signal @ np.where(keep, kernel, 0), 0)
    return np.mean(np.argmax(signal @ output + bias, axis=1) == each.dataset.y_test)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_are_the_references_but_for_ties_and_rounding_of_the_count(networks, method, sparsity):
    for _, _, network in networks:
        pruned = METHODS[method](network, sparsity)
        for layer, ours in zip(prunable_layers(network), prunable_layers(pruned), strict=True):
            kept = reference_values(ours.get_weights()[0], method) > 0
            values = reference_values(layer.get_weights()[0], method)
            position = int(sparsity * values.size)
            threshold = np.sort(values, axis=None)[position]
            # Norms that differ by less than float32 can tell are ties as well.
            near = 0 if method == "weight pruning" else 1e-6 * threshold
            tied = np.count_nonzero(np.abs(values - threshold) <= near)
            rounding = abs(position - round(sparsity * values.size))
            differing = np.count_nonzero(kept != reference_keeps(values, sparsity))
            assert differing <= (tied if tied > 1 else 0) + rounding, (layer.name, differing, tied, rounding)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95])
def test_accuracies_with_the_references_masks_agree(networks, frame, name, method, sparsity):
    theirs = [reference_accuracy(each, method, sparsity) for each in networks if each.dataset.name == name]
    np.testing.assert_allclose(accuracies(frame, name, method, sparsity), theirs, rtol=0, atol=0.002)
