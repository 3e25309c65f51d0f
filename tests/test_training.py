"""Training side by side, and the cache: what comes out of it is what was trained, or it is trained again."""

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import psutil
import pytest

import pruning_utils
from pruning_utils import Dataset, relu_network, train_networks

HIDDEN, RECIPE = (20, 10), {"hidden": [20, 10], "inputs": 16, "classes": 10, "use_bias": False}
train = functools.partial(train_networks, hidden=HIDDEN, epochs=2, batch_size=32, cache=None)


def small_dataset(seed=0):
    """600 noisy training images of 16 pixels in 10 classes, and 100 test images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, 700).astype(np.int32)
    pixels = np.clip(rng.random((10, 16))[labels] + rng.normal(0, 0.2, (700, 16)), 0, 1).astype(np.float32)
    return Dataset("small", pixels[:600], labels[:600], pixels[600:], labels[600:], tuple("0123456789"))


@pytest.fixture(scope="module")
def dataset():
    return small_dataset()


@pytest.fixture(scope="module")
def trained(dataset):
    return train(dataset, (0, 1, 2))


def assert_close(network, other):
    for weight, expected in zip(network.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)


def bits(network):
    return [(weight.dtype, weight.tobytes()) for weight in network.get_weights()]


# --- Training -----------------------------------------------------------------------------------------------------


def test_seed_alone_fixes_the_initial_weights():
    keras.utils.set_random_seed(1)
    first = relu_network(HIDDEN, 16, seed=3)
    keras.utils.set_random_seed(2)
    assert bits(relu_network(HIDDEN, 16, seed=3)) == bits(first)
    assert bits(relu_network(HIDDEN, 16, seed=4)) != bits(first)
    assert bits(relu_network(HIDDEN, 16)) != bits(relu_network(HIDDEN, 16))


def test_layers_of_a_network_start_differently_and_glorot_uniform():
    first, second, *_ = relu_network((500, 500), 500, seed=0).get_weights()
    limit = np.sqrt(6 / 1000)
    assert not np.array_equal(first, second)
    for kernel in (first, second):
        assert 0.99 * limit < np.abs(kernel).max() <= limit and kernel.std() == pytest.approx(
            limit / np.sqrt(3), rel=0.01
        )


def test_only_the_output_layer_has_a_bias_unless_asked():
    assert [layer.use_bias for layer in relu_network(HIDDEN).layers] == [False, False, True]
    assert [layer.use_bias for layer in relu_network(HIDDEN, use_bias=True).layers] == [True, True, True]
    assert [layer.name for layer in relu_network(HIDDEN).layers] == ["hidden_1", "hidden_2", "logits"]


def test_training_starts_from_the_seed_and_learns(dataset, trained):
    _, history = trained
    untrained, start = train(dataset, (0, 1, 2), epochs=0)
    for network, seed in zip(untrained, (0, 1, 2), strict=True):
        assert bits(network) == bits(relu_network(HIDDEN, 16, seed=seed))
    pd.testing.assert_frame_equal(start, history[history["epoch"] == 0].reset_index(drop=True))
    assert (history.query("epoch == 2")["loss"].to_numpy() < history.query("epoch == 0")["loss"].to_numpy()).all()


def test_side_by_side_is_as_if_alone(dataset, trained):
    networks, history = trained
    for seed in (0, 2):
        (alone,), alone_history = train(dataset, (seed,))
        assert_close(alone, networks[seed])
        beside = history[history["seed"] == seed].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone_history, beside, rtol=1e-4)


def test_grouping_and_order_of_seeds_do_not_matter(dataset, trained):
    networks, history = train(dataset, (2, 0, 1), side_by_side=2)
    assert history["seed"].drop_duplicates().tolist() == [2, 0, 1]
    for network, seed in zip(networks, (2, 0, 1), strict=True):
        assert_close(network, trained[0][seed])


def test_another_seed_gives_another_network(trained):
    networks, _ = trained
    assert not np.allclose(networks[0].get_weights()[0], networks[1].get_weights()[0], atol=0.1)


def test_history_is_tidy(trained, dataset):
    networks, history = trained
    assert list(history) == ["dataset", "seed", "epoch", "images", "loss", "accuracy"]
    keys = [(seed, epoch, images) for seed in (0, 1, 2) for epoch in (0, 1, 2) for images in ("train", "test")]
    assert list(zip(history["seed"], history["epoch"], history["images"], strict=True)) == keys
    assert set(history["dataset"]) == {"small"}
    last = history.query("epoch == 2 and images == 'test'")
    for network, row in zip(networks, last.itertuples(), strict=True):
        assert row.accuracy == pruning_utils.accuracy(network, dataset.x_test, dataset.y_test)
        assert row.loss == pytest.approx(pruning_utils.loss(network, dataset.x_test, dataset.y_test), rel=1e-5)


def test_biases_are_trained_too(dataset):
    (network,), _ = train(dataset, (0,), use_bias=True, epochs=1)
    for layer in network.layers:
        assert layer.get_weights()[1].any()


@pytest.mark.skipif(pruning_utils.BACKEND != "tensorflow", reason="other backends train with the stock optimizer")
def test_fused_adam_is_keras_adam():
    rng, ends = np.random.default_rng(0), []
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = (rng.normal(size=(20, 4, 3)) * 10.0 ** rng.integers(-5, 3, (20, 1, 1))).astype(np.float32)
    for optimizer in (pruning_utils._FusedAdam(1e-2), keras.optimizers.Adam(1e-2)):
        variables = [keras.Variable(start), keras.Variable(start[0])]
        for gradient in gradients:
            optimizer.apply(
                [keras.ops.convert_to_tensor(gradient), keras.ops.convert_to_tensor(gradient[1])], variables
            )
        ends.append([keras.ops.convert_to_numpy(variable) for variable in variables])
    for fused, stock in zip(*ends, strict=True):
        np.testing.assert_allclose(fused, stock, rtol=1e-5, atol=1e-6)
    assert np.abs(ends[0][0] - start).min() > 1e-3


# --- The cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch):
    """The groups of seeds that are really trained, as they are trained."""
    trained_groups, real = [], pruning_utils._train_side_by_side

    @functools.wraps(real)  # the cache key reads the source of the function behind the wrapper
    def recorded(dataset, seeds, recipe):
        trained_groups.append(list(seeds))
        return real(dataset, seeds, recipe)

    monkeypatch.setattr(pruning_utils, "_train_side_by_side", recorded)
    return trained_groups


def test_without_a_cache_nothing_is_written(dataset, groups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pruning_utils, "CACHE", tmp_path / "cache")
    train(dataset, (0,), epochs=0)
    train(dataset, (0,), epochs=0)
    assert groups == [[0], [0]] and not list(tmp_path.iterdir())


def test_what_comes_from_the_cache_is_what_was_trained_bit_for_bit(dataset, groups, tmp_path):
    networks, history = train(dataset, (0, 1), epochs=1, cache=tmp_path)
    cached, cached_history = train(dataset, (1, 0), epochs=1, side_by_side=1, cache=tmp_path)
    assert groups == [[0, 1]] and len(list(tmp_path.iterdir())) == 2
    assert [bits(network) for network in cached] == [bits(network) for network in networks[::-1]]
    assert [weight.dtype for network in cached for weight in network.get_weights()] == [np.float32] * 8
    in_order = pd.concat([cached_history.query("seed == 0"), cached_history.query("seed == 1")], ignore_index=True)
    pd.testing.assert_frame_equal(in_order, history, check_exact=True)


def test_whatever_determines_the_result_is_part_of_the_key(dataset, groups, tmp_path):
    def one_entry_changed(field):
        changed = getattr(dataset, field).copy()
        changed.flat[-1] = 0 if changed.flat[-1] else 1
        return dataset._replace(**{field: changed})

    train(dataset, (0,), epochs=0, cache=tmp_path)
    for field in ("x_train", "y_train", "x_test", "y_test"):
        train(one_entry_changed(field), (0,), epochs=0, cache=tmp_path)
    for change in ({"hidden": (20, 11)}, {"batch_size": 16}, {"learning_rate": 1e-2}, {"use_bias": True}):
        train(dataset, (0,), **{"epochs": 0, "cache": tmp_path} | change)
    train(dataset, (0,), epochs=1, cache=tmp_path)
    train(dataset, (3,), epochs=0, cache=tmp_path)
    assert groups == [[0]] * 10 + [[3]] and len(list(tmp_path.iterdir())) == 11
    train(dataset, (0, 3), epochs=0, cache=tmp_path)
    assert len(groups) == 11


@pytest.fixture
def stored(dataset, tmp_path):
    train(dataset, (0,), epochs=0, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    return path


def test_a_truncated_file_is_named_in_a_warning_trained_again_and_replaced(dataset, groups, stored):
    good = stored.read_bytes()
    for size in (0, 10, len(good) // 2, len(good) - 1):
        stored.write_bytes(good[:size])
        with pytest.warns(UserWarning, match=f"{stored.name} is damaged"):
            (network,), _ = train(dataset, (0,), epochs=0, cache=stored.parent)
        assert bits(network) == bits(relu_network(HIDDEN, 16, seed=0))
        assert list(stored.parent.iterdir()) == [stored]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(dataset, (0,), epochs=0, cache=stored.parent)
    assert groups == [[0]] * 5  # once to store it, once per damage, not once more


def test_flipped_bits_are_noticed_or_harmless(stored):
    good, noticed = stored.read_bytes(), 0
    network, history = pruning_utils._load_trained(stored, RECIPE, 0)
    descriptions = [good.index(b"'descr': '<" + kind) + 11 for kind in (b"f", b"U", b"i")]  # types in the array headers
    rng = np.random.default_rng(0)
    for position in [*descriptions, *rng.integers(0, len(good), 40)]:
        flipped = bytearray(good)
        flipped[position] ^= 1 << rng.integers(8)
        stored.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = pruning_utils._load_trained(stored, RECIPE, 0)
        if found is None:
            noticed += 1
            assert any(stored.name in str(warning.message) for warning in caught)
        else:
            assert bits(found[0]) == bits(network)
            pd.testing.assert_frame_equal(found[1], history, check_exact=True)
    assert noticed > 20


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_weights_are_never_loaded(stored, value):
    arrays = dict(np.load(stored))
    arrays["weight_1"][2, 3] = value
    np.savez(stored, **arrays)
    with pytest.warns(UserWarning, match=f"{stored.name}.*NaN or inf"):
        assert pruning_utils._load_trained(stored, RECIPE, 0) is None


def test_a_file_of_another_shape_is_never_loaded(stored):
    with pytest.warns(UserWarning, match=stored.name):
        assert pruning_utils._load_trained(stored, RECIPE | {"hidden": [20, 9]}, 0) is None


def test_the_temporary_file_of_a_running_process_is_left_alone_and_a_dead_ones_removed(dataset, tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    running, dead = (tmp_path / f"small-seed-0-abc.npz.{pid}.tmp" for pid in (os.getpid(), done.pid))
    foreign = tmp_path / "notes.tmp"
    for path in (running, dead, foreign):
        path.touch()
    train(dataset, (0,), epochs=0, cache=tmp_path)
    assert running.exists() and foreign.exists() and not dead.exists()


def test_after_ctrl_c_only_the_rest_is_trained(dataset, groups, tmp_path, monkeypatch):
    real = pruning_utils._train_side_by_side

    @functools.wraps(real)
    def interrupted(dataset, seeds, recipe):
        if seeds == [1]:
            raise KeyboardInterrupt
        return real(dataset, seeds, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning_utils, "_train_side_by_side", interrupted)
        train(dataset, (0, 1, 2), epochs=0, side_by_side=1, cache=tmp_path)
    assert [path.name.split("-")[2] for path in tmp_path.iterdir()] == ["0"]
    networks, history = train(dataset, (0, 1, 2), epochs=0, side_by_side=1, cache=tmp_path)
    assert groups == [[0], [1], [2]]
    assert len(networks) == 3 and history["seed"].unique().tolist() == [0, 1, 2]


# --- Other processes ----------------------------------------------------------------------------------------------

HEADER = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training import small_dataset, train
folder = Path(sys.argv[1])
"""


def start(script, folder):
    command = [sys.executable, "-c", HEADER + script, str(folder)]
    where = Path(pruning_utils.__file__).parent
    return subprocess.Popen(command, cwd=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_a_process_killed_while_writing_leaves_the_old_file_and_one_temporary_file(dataset, groups, stored):
    good = stored.read_bytes()
    stored.write_bytes(good[:-1])  # damaged, so that the process trains again and writes
    damaged = stored.read_bytes()
    process = start(
        "os.replace = lambda *paths: os._exit(9)\ntrain(small_dataset(), (0,), epochs=0, cache=folder)", stored.parent
    )
    assert process.wait(120) == 9, process.stderr.read()
    temporary = stored.with_name(f"{stored.name}.{process.pid}.tmp")
    assert sorted(stored.parent.iterdir()) == [stored, temporary] and stored.read_bytes() == damaged
    with pytest.warns(UserWarning, match=stored.name):
        train(dataset, (0,), epochs=0, cache=stored.parent)
    assert list(stored.parent.iterdir()) == [stored]
    assert pruning_utils._load_trained(stored, RECIPE, 0) is not None


def test_two_processes_that_train_the_same_network_both_finish_with_one_valid_file(dataset, groups, tmp_path):
    script = """
(folder / f"{os.getpid()}.ready").touch()
while len(list(folder.glob("*.ready"))) < 2:
    time.sleep(0.01)
train(small_dataset(), (0,), epochs=1, cache=folder / "cache")
"""
    processes = [start(script, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
    (path,) = (tmp_path / "cache").iterdir()
    assert path.suffix == ".npz"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(dataset, (0,), epochs=1, cache=tmp_path / "cache")
    assert groups == []


@pytest.mark.parametrize(("value", "hidden"), [("1", True), ("", False), ("0", False), (None, False)])
def test_tqdm_disable_hides_progress_bars_also_in_notebooks(monkeypatch, value, hidden):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    assert pruning_utils._progress([1], "counting").disable is hidden


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="what leaked was TensorFlow's")
def test_memory_stays_flat_over_trainings():
    """A compiled training step never gives its variables back; the table of images alone is 63 MB here."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((20_000, 784), np.float32), rng.integers(0, 10, 20_000).astype(np.int32)
    dataset = Dataset("noise", images, labels, images[:10], labels[:10], tuple("0123456789"))
    sizes = []
    for _ in range(5):
        train_networks(dataset, seeds=(0,), hidden=(4,), epochs=1, batch_size=5000, cache=None)
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[1] < 100e6
