"""The trained networks of the study: as good as they should be, pruned as the reference prunes, curves as published."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from pruning_utils import (
    SPARSITIES,
    accuracy,
    load_dataset,
    prunable_layers,
    prune_neurons,
    prune_weights,
    sweep,
    train_networks,
)

METHODS = {"weight pruning": prune_weights, "neuron pruning": prune_neurons}
DENSE_AT_LEAST = {"mnist": 0.978, "fashion-mnist": 0.865}
# One unseeded run of siddharth-agrawal/Network-Pruning, read off its two plots to 0.005; a column per sparsity.
PUBLISHED = {
    ("mnist", "weight pruning"): (0.979, 0.98, 0.98, 0.98, 0.98, 0.974, 0.924, 0.421, 0.150, 0.098),
    ("mnist", "neuron pruning"): (0.979, 0.982, 0.976, 0.974, 0.968, 0.826, 0.195, 0.098, 0.098, 0.098),
    ("fashion-mnist", "weight pruning"): (0.876, 0.87, 0.87, 0.872, 0.872, 0.846, 0.715, 0.445, 0.267, 0.10),
    ("fashion-mnist", "neuron pruning"): (0.876, 0.872, 0.872, 0.846, 0.717, 0.412, 0.110, 0.100, 0.100, 0.100),
}


@pytest.fixture(scope="module", params=["mnist", "fashion-mnist"])
def study(request):
    dataset = load_dataset(request.param)
    networks, _ = train_networks(dataset)
    return SimpleNamespace(dataset=dataset, networks=networks, frame=sweep(networks, dataset, METHODS))


def accuracies(study, method, sparsity):
    frame = study.frame
    return frame.loc[(frame["method"] == method) & (frame["sparsity"] == sparsity), "accuracy"].to_numpy()


def test_dense_networks_are_as_good_as_they_should_be(study):
    assert accuracies(study, "weight pruning", 0.0).size == 5
    assert accuracies(study, "weight pruning", 0.0).mean() >= DENSE_AT_LEAST[study.dataset.name]


def test_half_of_the_weights_can_go(study):
    change = accuracies(study, "weight pruning", 0.5) - accuracies(study, "weight pruning", 0.0)
    # 0.3 points, give or take what five seeds leave open: on other processors the same seeds end elsewhere.
    assert abs(change.mean()) <= 0.003 + 2 * stats.sem(change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_curves_agree_with_the_published_run(study, method, sparsity):
    ours = accuracies(study, method, sparsity)
    published = PUBLISHED[study.dataset.name, method][SPARSITIES.index(sparsity)]
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


def reference_accuracy(network, dataset, method, sparsity):
    signal = dataset.x_test
    *kernels, output, bias = network.get_weights()
    for kernel in kernels:
        keep = reference_keeps(reference_values(kernel, method), sparsity)
        signal = np.maximum(signal @ np.where(keep, kernel, 0), 0)
    return np.mean(np.argmax(signal @ output + bias, axis=1) == dataset.y_test)


def our_keeps(pruned, method):
    kernels = [layer.get_weights()[0] for layer in prunable_layers(pruned)]
    return [kernel != 0 if method == "weight pruning" else kernel.any(axis=0) for kernel in kernels]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_are_the_references_but_for_ties_and_rounding_of_the_count(study, method, sparsity):
    for network in study.networks:
        ours = our_keeps(METHODS[method](network, sparsity), method)
        for layer, kept in zip(prunable_layers(network), ours, strict=True):
            values = reference_values(layer.get_weights()[0], method)
            position = int(sparsity * values.size)
            threshold = np.sort(values, axis=None)[position]
            # Norms that differ by less than float32 can tell are ties as well.
            tied = np.count_nonzero(
                np.abs(values - threshold) <= (0 if method == "weight pruning" else 1e-6 * threshold)
            )
            rounding = abs(position - round(sparsity * values.size))
            differing = np.count_nonzero(kept != reference_keeps(values, sparsity))
            assert differing <= (tied if tied > 1 else 0) + rounding, (layer.name, differing, tied, rounding)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_accuracies_with_the_references_masks_agree(study, method, sparsity):
    for network, ours in zip(study.networks, accuracies(study, method, sparsity), strict=True):
        assert reference_accuracy(network, study.dataset, method, sparsity) == pytest.approx(ours, abs=0.002)


def test_accuracy_is_what_the_sweep_says(study):
    dataset = study.dataset
    for network, ours in zip(study.networks, accuracies(study, "weight pruning", 0.0), strict=True):
        assert accuracy(network, dataset.x_test, dataset.y_test) == ours
