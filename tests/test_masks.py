"""Masks and pruned networks: worked examples, exact counts, nesting, scopes, and arguments that are left alone."""

import doctest
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from networks import bits, dense, fractions, images, kernels, network_of, on_networks, on_scores, random_network, seeds

import pruning_utils
from pruning_utils import apply_masks, cost, keep_masks, prune_neurons, prune_weights, repair, shrink, weight_scores

KERNEL = np.array([[0.9, -0.1, 0.4], [-0.2, 0.8, 0.05], [0.3, -0.6, -0.7], [0.02, 0.5, -1.0]], np.float32)
OUTPUT = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
WIDE, NARROW = np.diag([5, 1, 8, 2, 7, 3, 6, 4]), np.eye(8, 4) * [30, 10, 40, 20]  # the norms are on the diagonals
SCOPES = ("layer", "global", "equal")
both_kinds = pytest.mark.parametrize("prune", [prune_weights, prune_neurons])
numbers = st.sampled_from([st.floats(-9, 9, width=32), st.integers(-2, 2)])  # few scores are equal, or many
shapes = nps.array_shapes(max_dims=2, max_side=9)
layer_scores = numbers.flatmap(lambda each: nps.arrays(np.float32, shapes, elements=each))


def as_lists(masks):
    return {name: mask.astype(int).tolist() for name, mask in masks.items()}


def kept_units(network):
    return [np.flatnonzero(kernel.any(axis=0)).tolist() for kernel in kernels(network)[:-1]]


def test_half_the_weights_of_a_4_by_3_kernel_by_hand():
    pruned = prune_weights(network_of(KERNEL, OUTPUT), 0.5)
    expected = np.array([[0.9, 0, 0], [0, 0.8, 0], [0, -0.6, -0.7], [0, 0.5, -1.0]], np.float32)
    np.testing.assert_array_equal(kernels(pruned)[0], expected)
    np.testing.assert_array_equal(kernels(pruned)[1], OUTPUT)


def test_a_third_of_the_neurons_of_a_4_by_3_kernel_by_hand():
    # The columns' squared norms are 0.94, 1.26 and 1.65: the first goes, although it holds the second largest weight.
    pruned = prune_neurons(network_of(KERNEL, OUTPUT, biases=([7, 8, 9], [1, 1])), 1 / 3)
    for found, expected in zip(pruned.get_weights(), (KERNEL * [0, 1, 1], [0, 8, 9], OUTPUT, [1, 1]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("scope", "removed", "wide", "narrow"), [
    ("layer", 6, [0, 2, 4, 6], [0, 2]),  # the same share of both
    ("global", 4, [0, 2, 4, 6], [0, 1, 2, 3]),
    ("global", 9, [], [0, 2, 3]),  # all norms of the narrow layer are larger
    ("equal", 4, [0, 2, 4, 6], [0, 1, 2, 3]),  # the wide layer comes down to the narrow one …
    ("equal", 5, [2, 4, 6], [0, 1, 2, 3]),
    ("equal", 6, [2, 4, 6], [0, 2, 3]),  # … and then they go down together
    ("equal", 10, [2], [2]),
])  # fmt: skip
def test_the_scopes_by_hand(scope, removed, wide, narrow):
    pruned = prune_neurons(network_of(WIDE, NARROW, np.ones((4, 2))), removed / 12, scope=scope)
    assert kept_units(pruned) == [wide, narrow]


def test_every_layer_may_have_a_sparsity_of_its_own():
    scores = {"a": np.array([1.0, 2, 3, 4]), "b": np.array([4.0, 3, 2, 1])}
    assert as_lists(keep_masks(scores, {"b": 0.75, "a": 0.25})) == {"a": [0, 1, 1, 1], "b": [1, 0, 0, 0]}
    pruned = prune_neurons(random_network(), {"hidden_1": 0.25, "hidden_2": 0.5})
    assert [len(units) for units in kept_units(pruned)] == [9, 4]


def test_among_equal_scores_the_first_ones_go():
    scores = {"a": np.array([[2.0, 1.0], [1.0, 1.0]]), "b": np.array([1.0, 1.0])}
    assert as_lists(keep_masks(scores, 0.5)) == {"a": [[1, 0], [0, 1]], "b": [0, 1]}
    assert as_lists(keep_masks(scores, 0.5, "global")) == {"a": [[1, 0], [0, 0]], "b": [1, 1]}


def test_a_mask_per_neuron_takes_the_bias_with_it_and_a_mask_per_weight_does_not():
    network, column = network_of(KERNEL, OUTPUT, biases=([7, 8, 9], [1, 1])), np.array([True, False, True])
    assert apply_masks(network, {"hidden_1": column}).get_weights()[1].tolist() == [7, 0, 9]
    assert apply_masks(network, {"hidden_1": np.tile(column, (4, 1))}).get_weights()[1].tolist() == [7, 8, 9]
    assert bits(apply_masks(network, {})) == bits(network)  # and a layer without a mask stays as it is


def test_doctests():
    failed, attempted = doctest.testmod(pruning_utils)
    assert failed == 0 and attempted >= 4


# --- Masks: properties --------------------------------------------------------------------------------------------


def by_stable_sort(scores, sparsity):
    kept = np.ones(scores.size, bool)
    kept[np.argsort(scores.ravel(), kind="stable")[: round(sparsity * scores.size)]] = False
    return kept.reshape(scores.shape)


@on_scores
@given(st.lists(layer_scores, min_size=1, max_size=4), fractions)
def test_masks_equal_a_stable_sort_of_every_layer_or_of_all_of_them_end_to_end(layers, sparsity):
    scores = dict(enumerate(layers))
    for number, mask in keep_masks(scores, sparsity).items():
        np.testing.assert_array_equal(mask, by_stable_sort(layers[number], sparsity))
    together = keep_masks(scores, sparsity, "global")
    everything = by_stable_sort(np.concatenate([score.ravel() for score in layers]), sparsity)
    np.testing.assert_array_equal(np.concatenate([mask.ravel() for mask in together.values()]), everything)
    assert [mask.shape for mask in together.values()] == [score.shape for score in layers]


@on_scores
@given(st.lists(layer_scores, min_size=1, max_size=4), fractions)
def test_scope_equal_removes_the_exact_share_and_leaves_layers_even(layers, sparsity):
    masks = keep_masks(dict(enumerate(layers)), sparsity, "equal").values()
    left, total = [mask.sum() for mask in masks], sum(score.size for score in layers)
    assert sum(left) == total - round(sparsity * total)
    assert all(kept == score.size or kept >= max(left) - 1 for kept, score in zip(left, layers, strict=True))
    for mask, kept, score in zip(masks, left, layers, strict=True):
        np.testing.assert_array_equal(mask, by_stable_sort(score, 1 - kept / score.size))


@on_scores
@given(layer_scores, fractions, fractions, st.sampled_from(SCOPES))
def test_masks_are_nested_as_sparsity_grows(scores, one, other, scope):
    layers = {"a": scores, "b": scores[::-1], "c": scores.ravel()[:3]}
    loose, tight = (keep_masks(layers, sparsity, scope) for sparsity in sorted((one, other)))
    assert all(not (tight[name] & ~loose[name]).any() for name in layers)


# --- Pruned networks ----------------------------------------------------------------------------------------------


@both_kinds
@on_networks
@given(seed=seeds, sparsity=fractions, use_bias=st.booleans())
def test_pruning_zeroes_the_exact_share_of_the_smallest_and_nothing_else(prune, seed, sparsity, use_bias):
    network = random_network(seed, use_bias)
    pruned = prune(network, sparsity)
    for after, before in zip(dense(pruned)[:-1], dense(network), strict=False):
        (kernel, *bias), (old, *old_bias) = after.get_weights(), before.get_weights()
        neurons = prune is prune_neurons  # whole columns, and their biases with them
        kept, size = (kernel.any(axis=0), np.linalg.norm(old, axis=0)) if neurons else (kernel != 0, np.abs(old))
        assert kept.sum() == kept.size - round(sparsity * kept.size)
        assert size[~kept].max(initial=0) <= size[kept].min(initial=np.inf)
        np.testing.assert_array_equal(kernel, old * kept)
        np.testing.assert_array_equal(bias, old_bias * kept if neurons and bias else old_bias)
    assert bits(pruned)[-2:] == bits(network)[-2:]


@on_networks
@given(seeds, fractions, st.sampled_from(SCOPES))
def test_pruning_a_pruned_network_again_changes_nothing(seed, sparsity, scope):
    for prune in (prune_weights, prune_neurons):
        pruned = prune(random_network(seed), sparsity, scope=scope)
        assert bits(prune(pruned, sparsity, scope=scope)) == bits(pruned)


@pytest.mark.parametrize("scope", SCOPES)
@both_kinds
def test_pruning_is_masking_by_the_scores_of_the_criterion(prune, scope):
    network, (x, y), neurons = random_network(), images(), prune is prune_neurons
    for criterion in pruning_utils.NEURON_CRITERIA if neurons else pruning_utils.WEIGHT_CRITERIA:
        scores = (pruning_utils.neuron_scores if neurons else weight_scores)(network, criterion, x, y, seed=3)
        pruned = prune(network, 0.4, criterion, scope, x=x, y=y, seed=3)
        assert bits(pruned) == bits(apply_masks(network, keep_masks(scores, 0.4, scope)))
    assert bits(prune(network, 0, scope=scope)) == bits(network)


def test_what_is_done_to_results_leaves_the_arguments_as_they_were_bit_for_bit():
    network, (x, y), masks = random_network(), images(), {"hidden_1": np.ones((6, 12), bool)}
    before = [*bits(network), x.tobytes(), y.tobytes()]
    for criterion in ("taylor", "activation"):
        pruning_utils.neuron_scores(network, criterion, x, y)["hidden_1"].fill(0)
    weight_scores(network)["hidden_1"].fill(0)
    pruning_utils.outputs(network, x).fill(0)
    for copy in (prune_weights(network, 0), apply_masks(network, masks), shrink(network), repair(network, network, x)):
        copy.set_weights([weight + cost(copy)["bytes"] for weight in copy.get_weights()])
    assert [*bits(network), x.tobytes(), y.tobytes()] == before and masks["hidden_1"].all()


# --- What bad input gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, np.nan, "50%", None, True, np.bool_(True)])
def test_a_sparsity_outside_0_to_1_is_refused_with_its_value_and_the_range(sparsity):
    for scope in SCOPES:
        with pytest.raises(ValueError if isinstance(sparsity, float) else TypeError) as caught:
            keep_masks({"a": np.ones(4)}, sparsity, scope)
        assert repr(sparsity) in str(caught.value) and "[0, 1]" in str(caught.value)


@pytest.mark.parametrize("sparsity", [0, 1, np.float16(0.5), np.float32(0.5), np.int8(1), Fraction(1, 3)])
def test_any_number_in_the_range_is_a_sparsity(sparsity):
    size = 300_000  # more than an int8 or a float16 can count
    removed = {0: 0, 0.5: 150_000, Fraction(1, 3): 100_000, 1: size}[sparsity]
    for scores in (np.arange(size), np.ones(size)):  # among equal ones, the first go
        found = keep_masks({"a": scores}, sparsity)["a"]
        assert found.dtype == bool and not found[:removed].any() and found[removed:].all()


def test_scores_sparsities_scopes_and_layers_that_there_are_not_are_named():
    with pytest.raises(ValueError, match=r"'b'.*NaN"):
        keep_masks({"a": np.ones(2), "b": np.array([1, np.nan])}, 0.5)
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\['a', 'c'\]"):
        keep_masks({"a": np.ones(2), "b": np.ones(2)}, {"a": 0.5, "c": 0.5})
    with pytest.raises(ValueError, match=r"unknown scope 'Layer'.*layer, global, equal"):
        keep_masks({"a": np.ones(2)}, 0.5, "Layer")
    for name in ("logits", "hidden_9"):
        with pytest.raises(ValueError, match=rf"{name}.*hidden_1, hidden_2"):
            apply_masks(random_network(), {name: np.ones((8, 4), bool)})


@pytest.mark.parametrize("mask", [[True] * 12, np.ones(12, int), None, np.ones((12, 6), bool), np.ones((1, 12), bool)])
def test_a_mask_of_another_kind_or_shape_is_refused_with_what_is_wanted(mask):
    wanted = r"(must be a boolean NumPy array .* got (int|list|None)|has shape \(1.*allowed: \(6, 12\) or \(12,\))"
    with pytest.raises((TypeError, ValueError), match=f"'hidden_1' {wanted}"):
        apply_masks(random_network(), {"hidden_1": mask})
