"""What the notebooks share: the data files, networks trained side by side, the cache, measuring, statistics."""

import doctest
import functools
import gc
import gzip
import io
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path

import joblib
import keras
import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from networks import INPUTS, bits, forward, gentle_network, images, network_of, on_scores, predictions, random_network

import pruning_utils
import study
from pruning_utils import NEURON_CRITERIA, WEIGHT_CRITERIA, cost, prune_neurons, prune_weights, repair
from study import (
    CLASS_NAMES,
    DATA,
    DIGESTS,
    SPARSITIES,
    Dataset,
    Trained,
    accuracy,
    accuracy_table,
    at_weights_left,
    load_dataset,
    loss,
    mean_interval,
    mean_sd,
    relu_network,
    repaired,
    sparsity_at_drop,
    sweep,
    time_in_turn,
    train_networks,
    verdict,
)

HIDDEN, RECIPE = (20, 10), {"hidden": [20, 10], "inputs": 16, "classes": 10, "use_bias": False}
train = partial(train_networks, hidden=HIDDEN, epochs=2, batch_size=32, cache=None)
measure = partial(sweep, sparsities=(0.0, 0.5), cache=None)
assert_same = partial(pd.testing.assert_frame_equal, check_exact=True)


def small_dataset(seed=0):
    """600 noisy training images of 16 pixels in 10 classes, and 100 test images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, 700).astype(np.int32)
    pixels = np.clip(rng.random((10, 16))[labels] + rng.normal(0, 0.2, (700, 16)), 0, 1).astype(np.float32)
    return Dataset("small", pixels[:600], labels[:600], pixels[600:], labels[600:], tuple("0123456789"))


def with_one_entry_changed(dataset, field):
    changed = getattr(dataset, field).copy()
    changed.flat[-1] = 0 if changed.flat[-1] else 1
    return dataset._replace(**{field: changed})


@pytest.fixture(scope="module")
def dataset():
    return small_dataset()


# --- Data files ---------------------------------------------------------------------------------------------------

LABELS = "mnist/train-labels-idx1-ubyte"


@pytest.fixture(scope="module", params=["mnist", "fashion-mnist"])
def original(request):
    return load_dataset(request.param)


def test_images_are_rows_between_0_and_1_and_labels_are_classes_and_both_are_read_only(original):
    for x, y, count in ((original.x_train, original.y_train, 60_000), (original.x_test, original.y_test, 10_000)):
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((count, 784), np.float32, (count,), np.int32)
        assert x.min() == 0 and x.max() == 1 and set(y) == set(range(10))
        assert not x.flags.writeable and not y.flags.writeable
    assert original.class_names == CLASS_NAMES[original.name] and len(original.class_names) == 10


def test_the_facts_the_study_rests_on(original):
    dead, per_class = np.sum(~original.x_train.any(axis=0)), np.bincount(original.y_test).tolist()
    assert (dead, per_class[0]) == ((67, 980) if original.name == "mnist" else (0, 1000))


def test_pixels_and_labels_are_those_in_the_files(original):
    folder = DATA / original.name
    pixels = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    np.testing.assert_array_equal(original.x_test.ravel(), pixels.astype(np.float32) / 255)
    np.testing.assert_array_equal(original.y_test, labels)


def test_an_unknown_data_set_is_answered_with_the_valid_names():
    with pytest.raises(ValueError, match=r"'cifar'.*mnist.*fashion-mnist"):
        load_dataset("cifar")


def flipped(content, position, bit=7):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def flipped_inside(content, position):
    return gzip.compress(flipped(gzip.decompress(content), position), 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[: len(good) // 2],
        lambda good: good[:-1],
        *(partial(flipped, position=position) for position in (0, 2, 100, 2000)),  # magic, method, stream
        lambda good: flipped(good, len(good) - 6),  # checksum
        lambda good: flipped(good, len(good) - 1),  # length
        *(partial(flipped_inside, position=position) for position in (0, 5, 8, 5000)),  # IDX header, labels
        lambda good: (DATA / f"fashion-{LABELS}.gz").read_bytes(),
        None,
    ],
)
def test_a_data_file_that_is_not_the_original_is_named_with_what_restores_it(tmp_path, damage):
    shutil.copytree(DATA / "mnist", tmp_path / "mnist", copy_function=lambda file, copy: Path(copy).symlink_to(file))
    path = tmp_path / f"{LABELS}.gz"
    path.unlink()
    if damage:
        path.write_bytes(damage((DATA / f"{LABELS}.gz").read_bytes()))
    with pytest.raises(ValueError) as caught:
        load_dataset("mnist", tmp_path)
    assert all(part in str(caught.value) for part in (str(path), DIGESTS[LABELS], f"git checkout -- data/{LABELS}.gz"))


# --- Training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(dataset):
    return train(dataset, (0, 1, 2))


def assert_close(network, other):
    for weight, expected in zip(network.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)


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
        assert 0.99 * limit < np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.01)


def test_only_the_output_layer_has_a_bias_unless_asked():
    assert [layer.use_bias for layer in relu_network(HIDDEN).layers] == [False, False, True]
    assert [layer.use_bias for layer in relu_network(HIDDEN, use_bias=True).layers] == [True, True, True]
    assert [layer.name for layer in relu_network(HIDDEN).layers] == ["hidden_1", "hidden_2", "logits"]


def test_training_starts_from_the_seed_and_learns(dataset, trained):
    untrained, start = train(dataset, (0, 1, 2), epochs=0)
    for each, seed in zip(untrained, (0, 1, 2), strict=True):
        assert each.dataset is dataset and each.seed == seed
        assert bits(each.network) == bits(relu_network(HIDDEN, 16, seed=seed))
    history = trained[1]
    assert_same(start, history[history["epoch"] == 0].reset_index(drop=True))
    assert (history.query("epoch == 2")["loss"].to_numpy() < history.query("epoch == 0")["loss"].to_numpy()).all()


def test_side_by_side_is_as_if_alone(dataset, trained):
    networks, history = trained
    for seed in (0, 2):
        (alone,), alone_history = train(dataset, (seed,))
        assert_close(alone.network, networks[seed].network)
        beside = history[history["seed"] == seed].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone_history, beside, rtol=1e-4)


def test_grouping_and_order_of_seeds_do_not_matter(dataset, trained):
    networks, history = train(dataset, (2, 0, 1), side_by_side=2)
    assert history["seed"].drop_duplicates().tolist() == [each.seed for each in networks] == [2, 0, 1]
    for each in networks:
        assert_close(each.network, trained[0][each.seed].network)


def test_another_seed_gives_another_network(trained):
    first, second, _ = (each.network.get_weights()[0] for each in trained[0])
    assert not np.allclose(first, second, atol=0.1)


def test_history_is_tidy(dataset, trained):
    networks, history = trained
    assert list(history) == ["dataset", "seed", "epoch", "images", "loss", "accuracy"]
    keys = [(seed, epoch, part) for seed in (0, 1, 2) for epoch in (0, 1, 2) for part in ("train", "test")]
    assert list(zip(history["seed"], history["epoch"], history["images"], strict=True)) == keys
    assert set(history["dataset"]) == {"small"}
    for (_, network), row in zip(
        [each[1:] for each in networks], history.query("epoch == 2 and images == 'test'").itertuples(), strict=True
    ):
        assert row.accuracy == accuracy(network, dataset.x_test, dataset.y_test)
        assert row.loss == pytest.approx(loss(network, dataset.x_test, dataset.y_test), rel=1e-5)


def test_biases_are_trained_too(dataset):
    (each,), _ = train(dataset, (0,), use_bias=True, epochs=1)
    assert all(layer.get_weights()[1].any() for layer in each.network.layers)


@pytest.mark.skipif(study.BACKEND != "tensorflow", reason="other backends train with the stock optimizer")
def test_fused_adam_is_keras_adam():
    rng, ends = np.random.default_rng(0), []
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = (rng.normal(size=(20, 4, 3)) * 10.0 ** rng.integers(-5, 3, (20, 1, 1))).astype(np.float32)
    for optimizer in (study._FusedAdam(1e-2), keras.optimizers.Adam(1e-2)):
        variables = [keras.Variable(start), keras.Variable(start[0])]
        for gradient in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(part) for part in (gradient, gradient[1])], variables)
        ends.append([keras.ops.convert_to_numpy(variable) for variable in variables])
    for fused, stock in zip(*ends, strict=True):
        np.testing.assert_allclose(fused, stock, rtol=1e-5, atol=1e-6)
    assert np.abs(ends[0][0] - start).min() > 1e-3


@pytest.mark.parametrize("part", ["y_train", "y_test"])
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_are_no_classes_are_refused_before_anything_is_trained(dataset, groups, part, label):
    labels = getattr(dataset, part).copy()
    labels[3] = label
    with pytest.raises(ValueError, match=f"classes 0 to 9.*{label}"):
        train(dataset._replace(**{part: labels}), (0,))
    assert groups == []


# --- The cache of networks ----------------------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch):
    """The groups of seeds that are really trained, as they are trained."""
    trained_groups, real = [], study._train_side_by_side

    @functools.wraps(real)  # the cache key reads the source of the function behind the wrapper
    def recorded(dataset, seeds, recipe):
        trained_groups.append(list(seeds))
        return real(dataset, seeds, recipe)

    monkeypatch.setattr(study, "_train_side_by_side", recorded)
    return trained_groups


@pytest.fixture
def stored(dataset, tmp_path):
    train(dataset, (0,), epochs=0, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    return path


def test_without_a_cache_nothing_is_written(dataset, groups, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "CACHE", tmp_path / "cache")
    for _ in range(2):
        measure(train(dataset, (0,), epochs=0)[0], {"m": prune_weights})
    assert groups == [[0], [0]] and not list(tmp_path.iterdir())


def test_what_comes_from_the_cache_is_what_was_trained_bit_for_bit(dataset, groups, tmp_path):
    networks, history = train(dataset, (0, 1), epochs=1, cache=tmp_path)
    cached, cached_history = train(dataset, (1, 0), epochs=1, side_by_side=1, cache=tmp_path)
    assert groups == [[0, 1]] and len(list(tmp_path.iterdir())) == 2
    assert [bits(each.network) for each in cached] == [bits(each.network) for each in networks[::-1]]
    assert all(weight.dtype == np.float32 for each in cached for weight in each.network.get_weights())
    assert_same(pd.concat([cached_history.query(f"seed == {seed}") for seed in (0, 1)], ignore_index=True), history)


@pytest.fixture
def set_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_whatever_determines_the_result_is_part_of_the_key(dataset, groups, tmp_path, set_policy):
    schedule = keras.optimizers.schedules.ExponentialDecay
    runs = [{"dataset": with_one_entry_changed(dataset, field)} for field in ("x_train", "y_train", "x_test", "y_test")]
    runs += [{"hidden": (20, 11)}, {"batch_size": 16}, {"learning_rate": 1e-2}, {"use_bias": True}, {"epochs": 1}]
    runs += [{"learning_rate": schedule(1e-2, 10, 0.9)}, {"learning_rate": schedule(1e-2, 10, 0.8)}, {"seeds": (3,)}]
    runs = [{"dataset": dataset, "seeds": (0,), "epochs": 0, "cache": tmp_path} | run for run in ({}, *runs)]
    for expected in (len(runs), len(runs)):  # the second time, all of them come from the cache
        for run in runs:
            train(**run)
        assert len(groups) == len(list(tmp_path.iterdir())) == expected
    set_policy("mixed_bfloat16")
    (each,), _ = train(**runs[0])
    assert len(groups) == len(runs) + 1 and each.network.layers[0].compute_dtype == "bfloat16"


def test_a_key_tells_parts_shapes_types_and_versions_apart(monkeypatch):
    zeros, keys = np.zeros(4, np.float32), [study._key("ab", "c"), study._key("a", "bc"), study._key("abc")]
    keys += [study._key(array) for array in (zeros, zeros.reshape(2, 2), zeros.astype(np.int32), zeros[:2])]
    monkeypatch.setattr(keras, "__version__", "2.0")
    assert len({*keys, study._key("abc")}) == 8


def test_a_truncated_file_is_named_in_a_warning_trained_again_and_replaced(dataset, groups, stored):
    good = stored.read_bytes()
    for size in (0, 10, len(good) // 2, len(good) - 1):
        stored.write_bytes(good[:size])
        with pytest.warns(UserWarning, match=f"{stored.name} is damaged"):
            (each,), _ = train(dataset, (0,), epochs=0, cache=stored.parent)
        assert bits(each.network) == bits(relu_network(HIDDEN, 16, seed=0))
        assert list(stored.parent.iterdir()) == [stored]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(dataset, (0,), epochs=0, cache=stored.parent)
    assert groups == [[0]] * 5  # once to store it, once per damage, not once more


def test_flipped_bits_are_noticed_or_harmless(stored):
    good, noticed = stored.read_bytes(), 0
    weights, history = study._load_trained(stored, RECIPE, 0)
    descriptions = [good.index(b"'descr': '<" + kind) + 11 for kind in (b"f", b"U", b"i")]  # types in the array headers
    rng = np.random.default_rng(0)
    for position in [*descriptions, *rng.integers(0, len(good), 40)]:
        stored.write_bytes(flipped(good, position, rng.integers(8)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = study._load_trained(stored, RECIPE, 0)
        if found is None:
            noticed += 1
            assert any(stored.name in str(warning.message) for warning in caught)
        else:
            assert [weight.tobytes() for weight in found[0]] == [weight.tobytes() for weight in weights]
            assert_same(found[1], history)
    assert noticed > 20


def with_nan(path, name):
    arrays = dict(np.load(path))
    arrays[name].flat[1] = np.nan
    np.savez(path, **arrays)


def with_a_huge_header(path, name):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 2)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, header.getvalue())


def as_a_single_array(path, name):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    ("change", "name"),
    [(with_nan, "weight_1"), (with_nan, "loss"), (with_a_huge_header, "weight_0.npy"), (as_a_single_array, "")],
)
def test_an_odd_file_under_the_right_name_is_never_loaded(stored, change, name):
    change(stored, name)
    with pytest.warns(UserWarning, match=stored.name):
        assert study._load_trained(stored, RECIPE, 0) is None


def test_a_file_of_another_shape_is_never_loaded(stored):
    with pytest.warns(UserWarning, match=stored.name):
        assert study._load_trained(stored, RECIPE | {"hidden": [20, 9]}, 0) is None


def test_a_full_disk_costs_a_warning_and_not_the_networks(dataset, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match=rf"{tmp_path}.*No space left"):
        networks, _ = train(dataset, (0, 1), epochs=0, cache=tmp_path)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(sweep(networks, {"m": prune_weights}, (0.5,), cache=tmp_path)) == 2
    assert not list(tmp_path.iterdir())


def test_a_cache_folder_that_cannot_be_made_costs_a_warning_and_not_the_networks(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="file.*could not be written"):
        assert len(train(dataset, (0,), epochs=0, cache=tmp_path / "file")[0]) == 1


def test_a_data_set_whose_name_is_no_file_name_is_refused_before_anything_is_trained(dataset, groups, tmp_path):
    with pytest.raises(ValueError, match=r"'\.\./small.*slash"):
        train(dataset._replace(name="../small"), (0,), cache=tmp_path / "cache")
    assert groups == [] and not list(tmp_path.iterdir())


def test_after_ctrl_c_only_the_rest_is_trained(dataset, groups, tmp_path, monkeypatch):
    real = study._train_side_by_side

    @functools.wraps(real)
    def interrupted(dataset, seeds, recipe):
        if seeds == [1]:
            raise KeyboardInterrupt
        return real(dataset, seeds, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "_train_side_by_side", interrupted)
        train(dataset, (0, 1, 2), epochs=0, side_by_side=1, cache=tmp_path)
    assert [path.name.split("-")[2] for path in tmp_path.iterdir()] == ["0"]
    networks, history = train(dataset, (0, 1, 2), epochs=0, side_by_side=1, cache=tmp_path)
    assert groups == [[0], [1], [2]]
    assert len(networks) == 3 and history["seed"].unique().tolist() == [0, 1, 2]


# --- Other processes ----------------------------------------------------------------------------------------------

FOLDERS = [Path(pruning_utils.__file__).parent, Path(study.__file__).parent, Path(__file__).parent]
ELSEWHERE = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))}


def start(script, folder):
    script = f"import os, time, pathlib\nfrom test_study import *\nfolder = pathlib.Path({str(folder)!r})\n{script}"
    return subprocess.Popen([sys.executable, "-c", script], env=ELSEWHERE, stderr=subprocess.PIPE, text=True)


def test_a_process_killed_while_writing_leaves_the_old_file(dataset, groups, stored):
    damaged = stored.read_bytes()[:-1]  # so that the process trains again and writes
    stored.write_bytes(damaged)
    killed = "os.replace = lambda *_: os._exit(9)\ntrain(small_dataset(), (0,), epochs=0, cache=folder)"
    process = start(killed, stored.parent)
    assert process.wait(120) == 9, process.stderr.read()
    assert stored.read_bytes() == damaged
    with pytest.warns(UserWarning, match=stored.name):
        train(dataset, (0,), epochs=0, cache=stored.parent)
    assert study._load_trained(stored, RECIPE, 0) is not None


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


def test_importing_is_silent_and_needs_no_network():
    script = """
import socket
class Blocked(socket.socket):
    def __init__(self, *args, **kwargs):
        raise OSError("no network here")
socket.socket = Blocked
socket.getaddrinfo = socket.create_connection = None
import study
"""
    done = subprocess.run([sys.executable, "-c", script], env=ELSEWHERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["study", "pruning_utils"])
def test_importing_works_where_there_is_no_stderr(module):
    assert subprocess.run(f"'{sys.executable}' -c 'import {module}' 2>&-", shell=True, env=ELSEWHERE).returncode == 0


def test_stderr_is_silent_as_long_as_asked_for(capfd):
    with pytest.raises(KeyError), study.silent_stderr():
        os.write(2, b"hidden")
        raise KeyError
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"


@pytest.mark.parametrize(("value", "hidden"), [("1", True), ("", False), ("0", False), (None, False)])
def test_tqdm_disable_hides_progress_bars_also_in_notebooks(monkeypatch, value, hidden):
    bars = []
    monkeypatch.setattr(study, "tqdm", lambda steps, *_, **options: bars.append(options["disable"]) or steps)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    time_in_turn({"nothing": lambda: None}, rounds=1, seconds=0)
    assert bars == [hidden]


@pytest.mark.skipif(study.BACKEND != "tensorflow", reason="what leaked was TensorFlow's")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use where Linux tells it")
def test_memory_stays_flat_over_trainings():
    """A compiled training step never gives its variables back; the table of images alone is 63 MB here."""
    rng, sizes = np.random.default_rng(0), []
    x, y = rng.random((20_000, 784), np.float32), rng.integers(0, 10, 20_000).astype(np.int32)
    for _ in range(5):
        train(Dataset("noise", x, y, x[:10], y[:10], tuple("0123456789")), (0,), hidden=(4,), epochs=1, batch_size=5000)
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert sizes[-1] - sizes[1] < 100e6


# --- Measuring ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Two networks of 6 inputs and 4 classes, with the seeds 5 and 7."""
    (x, y), (x_test, y_test) = images(100), images(300, seed=2)
    tiny = Dataset("tiny", x, y, x_test, y_test, tuple("abcd"))
    return [Trained(tiny, seed, random_network(seed)) for seed in (5, 7)]


def ending_in(*layers):
    """The logits of a gentle network, and what these layers make of them."""
    return keras.Sequential([keras.Input((INPUTS,)), *gentle_network().layers, *layers])


def own_softmax(logits):
    return keras.ops.softmax(logits)


@pytest.mark.parametrize("layers", [(), (keras.layers.Activation("softmax"),)])
def test_accuracy_and_loss_equal_plain_numpy_from_logits_and_from_probabilities(layers):
    x, y = images(200)
    logits = forward(gentle_network(), x)[1][-1]
    entropy = -np.mean(scipy.special.log_softmax(logits, axis=1)[np.arange(200), y])
    assert loss(ending_in(*layers), x, y) == pytest.approx(entropy, rel=1e-5)
    assert accuracy(ending_in(*layers), x, y) == np.mean(logits.argmax(axis=1) == y)


@pytest.mark.parametrize(
    "layers",
    [
        (keras.layers.Softmax(),),
        (keras.layers.Activation(own_softmax),),
        *((keras.layers.Activation("softmax"), last)
          for last in (keras.layers.Flatten(), keras.layers.Dropout(0.5), keras.layers.Activation("linear"))),
    ],
)  # fmt: skip
def test_other_ways_to_end_in_a_softmax_are_refused_or_measured_right(layers):
    x, y = images(200)
    try:
        found = loss(ending_in(*layers), x, y)
    except ValueError as error:
        assert "softmax" in str(error)
    else:
        assert found == pytest.approx(loss(gentle_network(), x, y), rel=1e-5)


def test_equal_outputs_count_for_the_first_class():
    network = network_of(np.zeros((2, 3)), np.zeros((3, 4)))
    assert accuracy(network, np.ones((4, 2)), np.array([0, 1, 0, 3])) == 0.5


def test_half_precision_is_measured_in_float32(set_policy):
    set_policy("float16")
    (x, y), network = images(200), gentle_network()
    assert loss(network, x, y) == pytest.approx(
        -np.mean(scipy.special.log_softmax(predictions(network, x).astype(float), axis=1)[np.arange(200), y]), rel=1e-2
    )


overflowing = network_of(*[np.full((6, 6), 1e30)] * 3)


@pytest.mark.parametrize("measured", [accuracy, loss])
@pytest.mark.parametrize(
    ("network", "x", "y", "message"),
    [
        (random_network(), np.ones((5, 7)), np.zeros(5, int), r"\(5, 7\).*\(None, 6\)"),
        (random_network(), np.ones((5, 6)), np.zeros(5), "integer label.*float64"),
        (random_network(), np.ones((5, 6)), np.zeros(4, int), r"\(4,\)"),
        (random_network(), np.ones((5, 6)), np.array([0, 1, 2, 3, 4]), "classes 0 to 3.*4"),
        (random_network(), np.ones((5, 6)), np.array([0, 1, 2, 3, -1]), "classes 0 to 3.*-1"),
        (random_network(classes=1), np.ones((5, 6)), np.zeros(5, int), "label"),
        (ending_in(keras.layers.Dense(1, "sigmoid")), np.ones((5, 6)), np.zeros(5, int), "softmax"),
        (overflowing, np.ones((5, 6)), np.zeros(5, int), "NaN or inf"),
        (network_of(np.full((6, 3), np.nan), np.ones((3, 4))), np.ones((5, 6)), np.zeros(5, int), "NaN or inf"),
    ],
)
def test_what_cannot_be_measured_is_refused(measured, network, x, y, message):
    with pytest.raises(ValueError, match=message):
        measured(network, x, y)


METHODS = {
    "weights": prune_weights,
    "taylor": partial(prune_neurons, criterion="taylor"),
    "repaired": partial(study.repaired, partial(prune_neurons, criterion="random")),
}


def test_a_row_says_what_measuring_the_pruned_network_by_hand_says(pair):
    x, y, x_test, y_test = pair[0].dataset[1:5]
    by_hand = {
        "weights": lambda network, sparsity, seed: prune_weights(network, sparsity),
        "taylor": lambda network, sparsity, seed: prune_neurons(network, sparsity, "taylor", x=x, y=y),
        "repaired": lambda network, sparsity, seed: repair(
            prune_neurons(network, sparsity, "random", seed=seed), network, x
        ),
    }
    frame = measure(iter(pair), METHODS, sparsities=(sparsity for sparsity in (0.0, 0.5, 1.0)))
    names = ["dataset", "method", "seed", "sparsity", "accuracy", "loss", "weights_left", "multiply_adds"]
    assert list(frame) == names and set(frame["dataset"]) == {"tiny"}
    order = [(method, seed, sparsity) for method in METHODS for seed in (5, 7) for sparsity in (0.0, 0.5, 1.0)]
    assert list(zip(frame["method"], frame["seed"], frame["sparsity"], strict=True)) == order
    for row in frame.itertuples():
        pruned = by_hand[row.method]({each.seed: each.network for each in pair}[row.seed], row.sparsity, row.seed)
        assert (row.accuracy, row.loss) == (accuracy(pruned, x_test, y_test), loss(pruned, x_test, y_test))
        assert (row.weights_left, row.multiply_adds) == (cost(pruned)["weights_left"], cost(pruned)["multiply_adds"])


def test_a_sweep_of_trained_networks_has_their_seeds_and_the_sparsities_of_the_study(dataset):
    frame = sweep(train(dataset, (5, 7), epochs=0)[0], {"m": prune_weights}, cache=None)
    assert frame["seed"].tolist() == [5] * 10 + [7] * 10
    assert tuple(frame["sparsity"]) == 2 * (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)


def test_a_method_gets_the_first_training_images_and_the_seed_and_never_test_images(pair, monkeypatch):
    monkeypatch.setattr(study, "METHOD_IMAGES", 60)

    def method(network, sparsity, *, x, y, seed):
        np.testing.assert_array_equal(x, pair[0].dataset.x_train[:60])
        np.testing.assert_array_equal(y, pair[0].dataset.y_train[:60])
        seeds.append(seed)
        return network

    seeds = []
    measure(pair, {"m": method})
    assert seeds == [5, 5, 7, 7]


def test_data_sets_come_one_after_the_other(pair):
    other = pair[1]._replace(dataset=pair[1].dataset._replace(name="other"))
    frame = measure([pair[0], other, pair[1]], {"m": prune_weights, "n": prune_neurons}, sparsities=(0.5,))
    order = [("tiny", "m", 5), ("tiny", "m", 7), ("tiny", "n", 5), ("tiny", "n", 7), ("other", "m", 7), ("other", "n", 7)]
    assert list(zip(frame["dataset"], frame["method"], frame["seed"], strict=True)) == order


def fails_for_seed_5(network, sparsity, *, x, y, seed):
    if seed == 5 or sparsity == 0.5:
        raise ArithmeticError("no luck")
    return network


def test_a_method_that_fails_is_named_and_everything_else_is_measured(pair):
    with pytest.raises(RuntimeError, match=r"'fails' failed on tiny, seed 5, at sparsity 0.0.*no luck") as caught:
        measure(pair, {"fails": fails_for_seed_5, "works": prune_weights})
    rows, expected = caught.value.rows, measure(pair, {"works": prune_weights})
    assert rows[["method", "seed", "sparsity"]].iloc[0].tolist() == ["fails", 7, 0.0]
    assert_same(rows.iloc[1:].reset_index(drop=True), expected)


def test_a_sweep_leaves_the_garbage_collector_alone(pair):
    gc.freeze()
    frozen = gc.get_freeze_count()
    measure(pair, {"m": prune_weights})
    still = gc.get_freeze_count()
    gc.unfreeze()
    assert frozen > 0 and still == frozen and gc.isenabled()


# --- Sweeps in other processes ------------------------------------------------------------------------------------


def rows_and_error(trained, **options):
    methods = {"ours": METHODS["taylor"], "a lambda": lambda network, sparsity, **_: prune_weights(network, sparsity),
               "fails": fails_for_seed_5}  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        measure(trained, methods, **options)
    return caught.value.rows, str(caught.value)


def assert_the_same_in_processes(pair, **options):
    """On a data set that `load_dataset` does not know, and on one that it does; the error is the same too."""
    mnist = Trained(load_dataset("mnist"), 0, relu_network((20, 10), seed=0))
    rows, message = rows_and_error([*pair, mnist])
    parallel, parallel_message = rows_and_error([*pair, mnist], **options)
    pd.testing.assert_frame_equal(parallel, rows, rtol=1e-5)
    assert "seed 5, at sparsity 0.0" in message and "no luck" in parallel_message
    assert message.split(": ")[0] == parallel_message.split(": ")[0]


def test_two_processes_find_the_same_rows_in_the_same_order(pair):
    assert_the_same_in_processes(pair, n_jobs=2)


def test_a_cluster_finds_the_same_rows_in_the_same_order(pair):
    distributed = pytest.importorskip("distributed", reason="Dask is no dependency; joblib reaches it where it is")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        assert_the_same_in_processes(pair)


def clipped(sums):
    return keras.ops.clip(sums, 0.0, 0.5)


clipped.__name__ = "relu"


def test_processes_get_the_very_activation_of_the_network(pair):
    layers = [keras.layers.Dense(8, clipped), keras.layers.Dense(4)]
    own = [pair[0]._replace(network=keras.Sequential([keras.Input((INPUTS,)), *layers]))]
    rows = measure(own, {"m": prune_weights})
    pd.testing.assert_frame_equal(measure(own, {"m": prune_weights}, n_jobs=2), rows, rtol=1e-5)


# --- The cache of sweeps ------------------------------------------------------------------------------------------


def test_rows_from_the_cache_are_those_that_were_measured(pair, tmp_path):
    kept = partial(measure, pair, METHODS, cache=tmp_path)
    measured = kept()
    assert_same(measured, measure(pair, METHODS))
    assert_same(kept(), measured)
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.iterdir():
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"accuracy": arrays["accuracy"] + 1})
    assert_same(kept(), measured.assign(accuracy=measured["accuracy"] + 1))  # nothing is measured again


def test_whatever_determines_the_rows_is_part_of_the_name_of_their_file(pair, tmp_path):
    one, other = pair[0], random_network(5)
    other.layers[0].kernel.assign(other.layers[0].kernel + 1e-6)
    runs = [[one], [one._replace(network=other)], [one._replace(seed=6)]]
    runs += [[one._replace(dataset=with_one_entry_changed(one.dataset, field))] for field in Dataset._fields[1:5]]
    methods = [prune_neurons, *(partial(prune_neurons, criterion=name) for name in ("norm", "taylor")), prune_weights]
    methods += [partial(study.repaired, method) for method in methods]
    for count, (trained, method, sparsities) in enumerate(
        [(run, prune_neurons, (0.5,)) for run in runs]
        + [(runs[0], method, (0.5,)) for method in methods[1:]]
        + [(runs[0], prune_neurons, sparsities) for sparsities in ((0.4,), (0.5, 0.4), (0.4, 0.5))],
        start=1,
    ):
        sweep(trained, {"m": method}, sparsities, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == count


def test_data_sets_that_share_a_name_do_not_share_rows(pair, tmp_path):
    shifted = pair[0]._replace(dataset=pair[0].dataset._replace(x_test=1 - pair[0].dataset.x_test))
    measured = measure([pair[0], shifted], {"m": prune_weights}, cache=tmp_path)
    assert_same(measure([pair[0], shifted], {"m": prune_weights}, cache=tmp_path), measured)


def test_activations_that_share_a_name_do_not_share_rows(pair, tmp_path):
    def rows(activation):
        activation.__name__ = "own"
        layers = [keras.layers.Dense(8, activation, name="a"), keras.layers.Dense(4, name="b")]
        network = keras.Sequential([keras.Input((INPUTS,)), *layers], name="network")
        network.set_weights([weight[:, :4] if weight.shape == (8, 8) else weight for weight in start])
        return measure([pair[0]._replace(network=network)], {"m": prune_weights}, cache=tmp_path)

    start = keras.Sequential([keras.Input((INPUTS,)), keras.layers.Dense(8), keras.layers.Dense(4)]).get_weights()
    first, second = (rows(activation) for activation in (lambda z: keras.ops.relu(z), lambda z: keras.ops.tanh(z)))
    assert (first["loss"] != second["loss"]).all()


def test_what_a_function_of_the_readers_own_found_is_never_kept(pair, tmp_path):
    class Method:
        def __call__(self, network, sparsity, **_):
            return network

    def own(network, sparsity, **_):
        return network

    methods = {"a": own, "b": Method(), "c": partial(own), "d": partial(study.repaired, prune=own)}
    methods = {name: method for name, method in methods.items() if name != "d"} | {"d": partial(study.repaired, own)}
    measure(pair, methods, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("criteria", "name"), [(NEURON_CRITERIA, "mine"), (WEIGHT_CRITERIA, "magnitude")])
def test_a_criterion_of_the_readers_own_switches_the_cache_off(pair, tmp_path, monkeypatch, criteria, name):
    plain = measure(pair, {"m": prune_weights}, sparsities=(0.5,), cache=tmp_path)
    monkeypatch.setitem(criteria, name, lambda network: [-abs(kernel) for kernel in network.get_weights()[:-2:2]])
    assert not measure(pair, {"m": prune_weights}, sparsities=(0.5,), cache=tmp_path).equals(plain) == (name == "magnitude")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_of_a_sweep_costs_a_warning_and_is_replaced(pair, tmp_path):
    kept = partial(measure, pair[:1], {"m": prune_weights}, cache=tmp_path)
    rows, (path,) = kept(), tmp_path.iterdir()
    good = path.read_bytes()
    for damaged in (good[:-1], flipped(good, good.index(b"NUMPY") + 130)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
            assert_same(kept(), rows)
        assert_same(kept(), rows)


def test_what_was_finished_before_ctrl_c_or_a_failure_is_kept(pair, tmp_path):
    def stops(network, sparsity, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(pair, {"m": prune_weights, "stops": stops}, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(RuntimeError, match="'none'"):
        measure(pair, {"fails": partial(prune_weights, criterion="none"), "n": prune_neurons}, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


# --- Summaries ----------------------------------------------------------------------------------------------------


def curve(accuracies, sparsities=(0.0, 0.5, 0.9), method="m", seed=0):
    return pd.DataFrame({"dataset": "d", "method": method, "seed": seed, "sparsity": sparsities, "accuracy": accuracies})


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
def test_sparsity_at_drop_by_hand(drop, where):
    found = sparsity_at_drop(curve([0.98, 0.96, 0.48]).iloc[[2, 0, 1]], drop)
    assert list(found) == ["dataset", "method", "seed", "sparsity"]
    assert found["sparsity"].item() == pytest.approx(where, nan_ok=True)


@on_scores
@given(st.lists(st.integers(0, 100), min_size=2, max_size=8), st.integers(1, 50))
def test_sparsity_at_drop_is_where_accuracy_falls_for_the_first_time(percents, drop):
    sparsities = np.linspace(0, 0.9, len(percents))
    found = sparsity_at_drop(curve(np.array(percents) / 100, sparsities), drop)["sparsity"].item()
    limit = percents[0] - drop
    before = np.linspace(0, 0.9 if np.isnan(found) else found, 200, endpoint=bool(np.isnan(found)))
    assert np.interp(before, sparsities, percents).min() > limit - 1e-9
    if not np.isnan(found):
        assert np.interp(found, sparsities, percents) == pytest.approx(limit, abs=1e-6)
    else:
        assert min(percents) > limit


def test_sparsity_at_drop_has_one_row_per_method_and_seed():
    frame = pd.concat([curve([0.9, 0.8, 0.1]), curve([0.9, 0.9, 0.9], seed=1), curve([0.9, 0.1, 0.1], method="n")])
    found = sparsity_at_drop(frame, 10)
    assert found[["method", "seed"]].to_numpy().tolist() == [["m", 0], ["m", 1], ["n", 0]]
    np.testing.assert_allclose(found["sparsity"], [0.5, np.nan, 0.5 / 8])


@pytest.mark.parametrize(
    ("frame", "drop", "message"),
    [
        (curve([0.98, 0.96, 0.48], (0.1, 0.5, 0.9)), 1, "sparsity 0"),
        (pd.concat([curve([0.98, 0.96, 0.48])] * 2), 1, "once"),
        *((curve([0.98, 0.96, 0.48]), drop, "positive") for drop in (0, -1, np.nan)),
    ],
)
def test_sparsity_at_drop_never_guesses(frame, drop, message):
    with pytest.raises(ValueError, match=message):
        sparsity_at_drop(frame, drop)


def test_the_table_shows_percent_over_seeds_with_sparsities_down_and_methods_across():
    frame = pd.concat([curve([0.9, 0.8, 0.1], (0.0, 0.98, 0.985)), curve([0.92, 0.8, 0.3], (0.0, 0.98, 0.985), seed=1),
                       curve([0.5], (0.0,), "n"), curve([0.7], (0.0,), "n", seed=1)])  # fmt: skip
    table = accuracy_table(frame)
    assert table.index.tolist() == ["0", "98", "98.5"] and table.columns.tolist() == ["d, m", "d, n"]
    assert table["d, m"].tolist() == ["91.0 ± 1.4", "80.0 ± 0.0", "20.0 ± 14.1"]
    assert table.loc["0", "d, n"] == "60.0 ± 14.1"


def test_accuracy_at_weights_left_by_hand():
    """Half-way between 100 and 10,000 weights, on a logarithmic axis, are 1,000."""
    frame = curve([0.9, 0.5, 0.1]).assign(weights_left=[10_000, 100, 0])
    table = at_weights_left(pd.concat([frame, frame.assign(seed=1, accuracy=0.3)]), [100, 1000, 10_000])
    assert list(table.columns) == ["100", "1,000", "10,000"] and list(table.index) == [("d", "m", 0), ("d", "m", 1)]
    np.testing.assert_allclose(table, [[50, 70, 90], [30, 30, 30]])
    for budgets in ([99], [100, 10_001], [0]):
        with pytest.raises(ValueError, match=r"between the 100 and 10,000 weights left"):
            at_weights_left(frame, budgets)


def test_mean_sd_is_text_with_the_sample_standard_deviation():
    assert mean_sd([90.0, 92.0, 91.0]) == "91.0 ± 1.0"
    assert mean_sd(np.array([1, 2]), digits=3) == "1.500 ± 0.707"
    assert mean_sd([1200, 1300, 1400], digits=0) == "1300 ± 100"


def test_mean_interval_is_students_interval_of_the_mean():
    # By hand: sd 1, so the standard error is 1 / sqrt(3), and t(0.975; 2 degrees of freedom) = 4.3027.
    assert mean_interval(np.array([90.0, 92.0, 91.0]), digits=4) == "91.0000 ± 2.4841"
    assert mean_interval([0.1] * 3) == "0.1 ± 0.0"


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
    ],
)
def test_verdict_asks_whether_the_whole_interval_lies_in_the_range(limits, expected):
    assert verdict([90.0, 92.0, 91.0], **limits) == expected


@pytest.mark.parametrize("summary", [mean_sd, mean_interval, verdict])
@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [1.0, np.inf]])
def test_summaries_refuse_what_has_no_spread(summary, values):
    with pytest.raises(ValueError, match="two or more finite values"):
        summary(values)


@pytest.fixture
def clock(monkeypatch):
    """The time in a list; only contenders move it."""
    now = [0.0]

    def timeit(run, number):
        start = now[0]
        for _ in range(number):
            run()
        return now[0] - start

    monkeypatch.setattr("timeit.timeit", timeit)
    return now


def test_contenders_take_turns_and_their_first_calls_do_not_count(clock):
    calls = []

    def contender(name, seconds):
        def run():
            clock[0] += seconds if name in calls else 100.0
            calls.append(name)

        return name, run

    frame = time_in_turn(dict([contender("slow", 5.0), contender("quick", 1.0)]), rounds=3, seconds=0)
    assert calls == ["slow", "slow", "quick", "quick", *["slow", "quick"] * 3]
    assert frame.to_dict("list") == {"slow": [5.0] * 3, "quick": [1.0] * 3}


def test_what_is_quick_is_called_until_the_seconds_are_over_and_the_mean_counts(clock):
    calls = []

    def run():
        calls.append(1)
        clock[0] += 0.25 if len(calls) % 2 else 0.75  # 0.75 when its number of calls is determined

    frame = time_in_turn({"run": run}, rounds=2, seconds=3.0)
    assert len(calls) == 2 + 2 * 4 and frame["run"].tolist() == [0.5, 0.5]


def test_doctests():
    assert doctest.testmod(study) == (0, 3)
