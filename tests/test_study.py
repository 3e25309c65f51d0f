"""What the notebooks share: data files, networks trained side by side, the cache, measuring, sweeps, summaries."""

import contextlib
import doctest
import functools
import gc
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import joblib
import keras
import numpy as np
import pandas as pd
import pytest
import scipy.special
import study
import training
from networks import INPUTS, bits, chain, forward, gentle_network, images, network_of, predictions, random_network
from study import Dataset, Trained, accuracy, load_dataset, loss, relu_network, repaired, sweep

from pruning_utils import NEURON_CRITERIA, WEIGHT_CRITERIA, cost, prune_neurons, prune_weights, repair

HIDDEN = (20, 10)
train = partial(study.train_networks, hidden=HIDDEN, epochs=2, batch_size=32, cache=None)
measure = partial(sweep, sparsities=(0.0, 0.5), cache=None)
assert_same = partial(pd.testing.assert_frame_equal, check_exact=True)
RNG = np.random.default_rng(0)  # 600 noisy training images of 16 pixels in 10 classes, and 100 test images
LABELS = RNG.integers(0, 10, 700).astype(np.int32)
PIXELS = np.clip(RNG.random((10, 16))[LABELS] + RNG.normal(0, 0.2, (700, 16)), 0, 1).astype(np.float32)
DATASET = Dataset("small", PIXELS[:600], LABELS[:600], PIXELS[600:], LABELS[600:], tuple("0123456789"))


def one_entry_changed(dataset):
    for field in ("x_train", "y_train", "x_test", "y_test"):
        changed = getattr(dataset, field).copy()
        changed.flat[-1] = 0 if changed.flat[-1] else 1
        yield dataset._replace(**{field: changed})


def flipped(content, position, bit=7):
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position:][1:]


@pytest.fixture(scope="module")
def pair():
    return train(DATASET, (5, 7), epochs=0)[0]


@pytest.fixture(scope="module")
def trained():
    return train(DATASET, (0, 1, 2))


@pytest.fixture
def set_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_images_are_rows_between_0_and_1_labels_are_classes_and_both_are_read_only(name):
    data = load_dataset(name)
    for part, x, y in (("train", data.x_train, data.y_train), ("t10k", data.x_test, data.y_test)):
        assert (x.shape, x.dtype, y.dtype) == ((len(y), 784), np.float32, np.int32)
        assert x.max() == 1 and set(y) == set(range(len(data.class_names)))
        for array, file, header, scale in ((x, "images-idx3", 16, 255), (y, "labels-idx1", 8, 1)):
            content = gzip.decompress((training.DATA / name / f"{part}-{file}-ubyte.gz").read_bytes())
            np.testing.assert_array_equal(array.ravel() * scale, np.frombuffer(content[header:], np.uint8))
            assert not array.flags.writeable


def test_a_data_file_that_is_not_the_original_is_named_with_what_restores_it(tmp_path):
    labels, folder = "mnist/train-labels-idx1-ubyte", training.DATA / "mnist"
    path, good = tmp_path / f"{labels}.gz", (training.DATA / f"{labels}.gz").read_bytes()
    shutil.copytree(folder, tmp_path / "mnist", copy_function=lambda file, copy: Path(copy).symlink_to(file))
    other_content = gzip.compress(flipped(gzip.decompress(good), 5000), 1)
    flips = [flipped(good, at) for at in (0, 2, 2000, -6, -1)]  # from the magic number to checksum and length
    for damaged in (None, good[:-1], other_content, *flips):
        path.unlink(missing_ok=True)  # at first it is a link to the original
        if damaged:
            path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            load_dataset("mnist", tmp_path)
        parts = str(path), training.DIGESTS[labels], f"git checkout -- data/{labels}.gz"
        assert all(part in str(caught.value) for part in parts)


def test_seed_alone_fixes_the_initial_weights_which_are_glorot_uniform_and_other_ones_in_every_layer():
    first, again, other = (relu_network((100, 100), 100, seed=seed) for seed in (3, 3, 4))
    assert bits(first) == bits(again) != bits(other)
    kernels, limit = np.stack(first.get_weights()[:2]), np.sqrt(6 / 200)
    assert not np.array_equal(*kernels) and 0.99 * limit < np.abs(kernels).max() <= limit


def test_training_starts_from_the_seed_and_learns_and_its_history_is_tidy(trained):
    (networks, history), (untrained, start) = trained, train(DATASET, (0, 1, 2), epochs=0)
    for each, seed in zip(untrained, (0, 1, 2), strict=True):
        assert each.dataset is DATASET and each.seed == seed
        assert bits(each.network) == bits(relu_network(HIDDEN, 16, seed=seed))
    assert list(history) == ["dataset", "seed", "epoch", "images", "loss", "accuracy"]
    keys = [("small", seed, epoch, part) for seed in (0, 1, 2) for epoch in (0, 1, 2) for part in ("train", "test")]
    assert list(history.iloc[:, :4].itertuples(index=False, name=None)) == keys
    first, last = (history[history["epoch"] == epoch].reset_index(drop=True) for epoch in (0, 2))
    assert_same(start, first)
    assert (last["loss"] < first["loss"]).all()
    for each, row in zip(networks, last.query("images == 'test'").itertuples(), strict=True):
        assert row.accuracy == accuracy(each.network, DATASET.x_test, DATASET.y_test)
        assert row.loss == pytest.approx(loss(each.network, DATASET.x_test, DATASET.y_test), rel=1e-5)


@pytest.mark.parametrize(("seeds", "side_by_side"), [((0,), 5), ((2,), 5), ((2, 0, 1), 2)])
def test_a_network_side_by_side_with_others_in_any_order_is_as_if_alone(trained, seeds, side_by_side):
    networks, history = train(DATASET, seeds, side_by_side=side_by_side)
    for each, seed in zip(networks, seeds, strict=True):
        for weight, expected in zip(each.network.get_weights(), trained[0][seed].network.get_weights(), strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-3, atol=1e-5)
    expected = pd.concat([trained[1][trained[1]["seed"] == seed] for seed in seeds], ignore_index=True)
    pd.testing.assert_frame_equal(history, expected, rtol=1e-4)


@pytest.mark.skipif(training.BACKEND != "tensorflow", reason="other backends train with the stock optimizer")
def test_fused_adam_is_keras_adam():
    rng, ends = np.random.default_rng(0), []
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = (rng.normal(size=(20, 4, 3)) * 10.0 ** rng.integers(-5, 3, (20, 1, 1))).astype(np.float32)
    for optimizer in (training._FusedAdam(1e-2), keras.optimizers.Adam(1e-2)):
        variables = [keras.Variable(start), keras.Variable(start[0])]
        for gradient in gradients:
            optimizer.apply([keras.ops.convert_to_tensor(part) for part in (gradient, gradient[1])], variables)
        ends.append([keras.ops.convert_to_numpy(variable) for variable in variables])
    for fused, stock in zip(*ends, strict=True):
        np.testing.assert_allclose(fused, stock, rtol=1e-5, atol=1e-6)
    assert np.abs(ends[0][0] - start).min() > 1e-3


def test_a_data_set_that_cannot_be_used_is_refused_before_anything_is_trained(groups, tmp_path):
    for change, message in (
        ({"y_train": np.full(600, -1)}, "classes 0 to 9.*-1"),
        ({"y_test": np.full(100, 10)}, "classes 0 to 9.*10"),
        ({"name": "../small"}, r"'\.\./small.*slash"),
    ):
        with pytest.raises(ValueError, match=message):
            train(DATASET._replace(**change), (0,), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"'cifar'.*mnist.*fashion-mnist"):
        load_dataset("cifar")
    assert groups == [] and not list(tmp_path.iterdir())


@pytest.fixture
def groups(monkeypatch):
    """The groups of seeds that are really trained; seed 99 is a Ctrl-C."""
    trained_groups, real = [], training._train_side_by_side

    @functools.wraps(real)  # the cache key reads the source of the function behind the wrapper
    def recorded(dataset, seeds, recipe):
        if seeds == [99]:
            raise KeyboardInterrupt
        trained_groups.append(list(seeds))
        return real(dataset, seeds, recipe)

    monkeypatch.setattr(training, "_train_side_by_side", recorded)
    return trained_groups


def test_what_comes_from_the_cache_is_what_was_trained_bit_for_bit_and_after_ctrl_c_the_rest_is_trained(
    groups, tmp_path
):
    run = partial(train, DATASET, epochs=1, cache=tmp_path)
    networks, history = run((0, 1))
    cached, cached_history = run((1, 0), side_by_side=1)
    assert groups == [[0, 1]] and len(list(tmp_path.iterdir())) == 2
    assert [bits(each.network) for each in cached] == [bits(each.network) for each in networks[::-1]]
    assert_same(pd.concat([cached_history.query(f"seed == {seed}") for seed in (0, 1)], ignore_index=True), history)
    with pytest.raises(KeyboardInterrupt):
        run((2, 99, 3), side_by_side=1)
    assert sorted(path.name.split("-")[2] for path in tmp_path.iterdir()) == ["0", "1", "2"]
    assert [each.seed for each in run((0, 1, 2, 3))[0]] == [0, 1, 2, 3] and groups == [[0, 1], [2], [3]]


def test_whatever_determines_the_result_is_part_of_the_key(groups, tmp_path, set_policy, monkeypatch):
    decay = [keras.optimizers.schedules.ExponentialDecay(1e-2, 10, rate) for rate in (0.9, 0.8)]
    runs = [{"dataset": changed} for changed in one_entry_changed(DATASET)]
    runs += [{"learning_rate": rate} for rate in (1e-2, *decay)] + [{"epochs": 1}, {"seeds": (3,)}]
    runs += [{"hidden": (20, 11)}, {"batch_size": 16}, {"use_bias": True}]
    runs = [{"dataset": DATASET, "seeds": (0,), "epochs": 0, "cache": tmp_path} | run for run in ({}, *runs)]
    for _ in range(2):  # the second time, all of them come from the cache
        networks = [train(**run)[0][0].network for run in runs]
        assert len(groups) == len(list(tmp_path.iterdir())) == len(runs)
    assert [any(layer.use_bias for layer in network.layers[:-1]) for network in networks] == [False] * 12 + [True]
    set_policy("mixed_bfloat16")
    assert train(**runs[0])[0][0].network.layers[0].compute_dtype == "bfloat16" and len(groups) == len(runs) + 1
    monkeypatch.setattr(keras, "__version__", "2.0")
    train(**runs[0])
    assert len(groups) == len(runs) + 2 and training.cache_key("ab", "c") != training.cache_key("a", "bc")


MEMORY, ELSEWHERE = Path("/proc/self/statm"), os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def start(script, folder):
    script = f"import os, pathlib\nfrom test_study import *\nfolder = pathlib.Path({str(folder)!r})\n{script}"
    return subprocess.Popen([sys.executable, "-c", script], env=ELSEWHERE, stderr=subprocess.PIPE, text=True)


def test_a_damaged_file_is_named_in_a_warning_trained_again_and_replaced_by_a_whole_one_or_not_at_all(groups, tmp_path):
    retrain = partial(train, DATASET, (0,), epochs=0, cache=tmp_path)
    retrain()
    (path,) = tmp_path.iterdir()
    good, arrays, header = path.read_bytes(), dict(np.load(path)), io.BytesIO()
    single, huge, nan_weight, nan_loss = files = [io.BytesIO() for _ in range(4)]
    np.save(single, np.zeros(3))
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**50, 2)})
    with zipfile.ZipFile(huge, "w") as file:
        file.writestr("weight_0.npy", header.getvalue())
    np.savez(nan_weight, **arrays | {"weight_1": arrays["weight_1"] * np.nan})
    np.savez(nan_loss, **arrays | {"loss": arrays["loss"] * np.nan})
    size, content = good.index(b"(16, 20)"), good.index(b"NUMPY")
    flips = [flipped(good, *spot) for spot in ((size + 2, 2), (size + 5, 0), (content + 200, 7), (content + 700, 0))]
    for damaged in (b"", good[:10], good[: len(good) // 2], good[:-1], *flips, *(file.getvalue() for file in files)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{path.name} is damaged"):
            retrain()
        assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
    assert groups == [[0]] * 13
    path.write_bytes(good[:-1])  # so that another process trains again; it is killed while it writes
    process = start("os.replace = lambda *_: os._exit(9)\ntrain(DATASET, (0,), epochs=0, cache=folder)", tmp_path)
    assert process.wait(120) == 9, process.stderr.read()
    assert path.read_bytes() == good[:-1]


def test_a_cache_that_cannot_be_written_costs_a_warning_and_not_the_networks(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="file.*could not be written"):
        assert len(train(DATASET, (0,), epochs=0, cache=tmp_path / "file")[0]) == 1
    monkeypatch.setattr(np, "savez", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.warns(UserWarning, match=rf"{tmp_path}.*No space left"):
        networks, _ = train(DATASET, (0, 1), epochs=0, cache=tmp_path)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(measure(networks, {"m": prune_weights}, cache=tmp_path)) == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_two_processes_that_train_the_same_network_both_finish_with_one_valid_file(groups, tmp_path):
    script = "(folder / f'{os.getpid()}.ready').touch()\nwhile len(list(folder.glob('*.ready'))) < 2:\n    pass\n"
    script += "train(DATASET, (0,), epochs=1, cache=folder / 'cache')"
    processes = [start(script, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]
    train(DATASET, (0,), epochs=1, cache=tmp_path / "cache")
    assert groups == []


def test_importing_needs_neither_a_network_nor_stderr():
    hook = "event.startswith(('socket.connect', 'socket.getaddrinfo')) and sys.exit('network!')"
    script = f"import sys; sys.addaudithook(lambda event, _: {hook}); import study"
    subprocess.run(["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, script], env=ELSEWHERE, check=True)


@pytest.mark.skipif(training.BACKEND != "tensorflow" or not MEMORY.exists(), reason="TensorFlow leaked; Linux tells")
def test_memory_stays_flat_over_trainings():
    x, y, sizes = np.random.default_rng(0).random((20_000, 784), np.float32), np.zeros(20_000, np.int32), []
    noise = DATASET._replace(x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    for _ in range(5):
        train(noise, (0,), hidden=(4,), epochs=1, batch_size=5000)
        sizes.append(int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert sizes[-1] - sizes[1] < 100e6


def numpy_loss(logits, y):
    return -np.mean(scipy.special.log_softmax(logits.astype(float), axis=1)[np.arange(len(y)), y])


def test_accuracy_and_loss_equal_plain_numpy_from_logits_from_probabilities_and_in_half_precision(set_policy):
    x, y = images(200)
    logits = forward(gentle_network(), x)[1][-1]
    for end in ((), (keras.layers.Activation("softmax"),)):
        network = chain(*gentle_network().layers, *end)
        assert loss(network, x, y) == pytest.approx(numpy_loss(logits, y), rel=1e-5)
        assert accuracy(network, x, y) == np.mean(logits.argmax(axis=1) == y)
    all_zero = network_of(np.zeros((2, 3)), np.zeros((3, 4)))  # equal outputs count for the first class
    assert accuracy(all_zero, np.ones((4, 2)), np.array([0, 1, 0, 3])) == 0.5
    set_policy("float16")
    half = gentle_network()
    half.layers[-1].kernel.assign(300 * half.layers[-1].kernel)
    assert loss(half, x, y) == pytest.approx(numpy_loss(predictions(half, x), y), rel=1e-2)


@pytest.mark.parametrize("measured", [accuracy, loss])
def test_what_cannot_be_measured_is_refused(measured):
    network, one, x, y = random_network(), random_network(classes=1), np.ones((5, INPUTS)), np.zeros(5, int)
    infinite, nan = network_of(*[np.full((6, 6), 1e30)] * 3), network_of(np.full((6, 3), np.nan), np.ones((3, 4)))
    softmax, own = (keras.layers.Activation(function) for function in ("softmax", lambda t: keras.ops.softmax(t)))
    last = keras.layers.Flatten(), keras.layers.Dropout(0.5), keras.layers.Activation("linear")
    ends = [[keras.layers.Dense(1, "sigmoid")], [keras.layers.Softmax()], [own], *([softmax, layer] for layer in last)]
    for arguments, message in (
        ((network, np.ones((5, 7)), y), r"\(5, 7\).*\(None, 6\)"),
        ((network, x, np.zeros(5)), "integer label.*float64"),
        ((network, x, y + 4), "classes 0 to 3.*4"),
        ((network, x, y - 1), "classes 0 to 3.*-1"),
        ((one, x, y), "label"),
        ((infinite, x, y), "NaN or inf"),
        ((nan, x, y), "NaN or inf"),
        *(((chain(*gentle_network().layers, *end), x, y), "softmax") for end in ends),
    ):
        with pytest.raises(ValueError, match=message):
            measured(*arguments)


METHODS = {"weights": prune_weights, "taylor": partial(prune_neurons, criterion="taylor")}
METHODS["repaired"] = partial(repaired, partial(prune_neurons, criterion="random"))


def test_a_row_says_what_measuring_the_pruned_network_by_hand_says(pair, monkeypatch):
    monkeypatch.setattr(study, "METHOD_IMAGES", 60)
    x, y = DATASET.x_train[:60], DATASET.y_train[:60]
    frame = measure(iter(pair), METHODS, sparsities=(sparsity for sparsity in (0.0, 0.5, 1.0)))
    assert list(frame) == ["dataset", "method", "seed", "sparsity", "accuracy", "loss", "weights_left", "multiply_adds"]
    grid = [(method, seed, sparsity) for method in METHODS for seed in (5, 7) for sparsity in (0.0, 0.5, 1.0)]
    for row, (method, seed, sparsity) in zip(frame.itertuples(), grid, strict=True):
        assert (row.dataset, row.method, row.seed, row.sparsity) == ("small", method, seed, sparsity)
        network = relu_network(HIDDEN, 16, seed=seed)
        pruned = METHODS[method](network, sparsity, x=x, y=y, seed=seed)
        if method == "repaired":
            assert bits(pruned) == bits(repair(prune_neurons(network, sparsity, "random", seed=seed), network, x))
        assert (row.accuracy, row.loss) == tuple(f(pruned, DATASET.x_test, DATASET.y_test) for f in (accuracy, loss))
        assert (row.weights_left, row.multiply_adds) == (cost(pruned)["weights_left"], cost(pruned)["multiply_adds"])


def fails_for_5(network, sparsity, *, x, y, seed):
    if seed == 5 or sparsity == 0.5:
        raise ArithmeticError(f"no luck in process {os.getpid()}")
    return network


def test_a_method_that_fails_is_named_the_rest_is_measured_and_the_garbage_collector_is_left_alone(pair):
    gc.freeze()
    frozen = gc.get_freeze_count()
    with pytest.raises(RuntimeError, match=r"'fails' failed on small, seed 5, at sparsity 0.0.*no luck") as caught:
        measure(pair, {"fails": fails_for_5, "works": prune_weights})
    still = gc.get_freeze_count()
    gc.unfreeze()
    assert still > 0.99 * frozen > 0 and gc.isenabled()
    rows = caught.value.rows
    assert rows[["method", "seed", "sparsity"]].iloc[0].tolist() == ["fails", 7, 0.0]
    assert_same(rows.iloc[1:].reset_index(drop=True), measure(pair, {"works": prune_weights}))


def with_activation(each, function):
    """A network with a function of the reader's own that is called relu."""
    function.__name__ = "relu"
    normal = np.random.default_rng(0).normal
    return each._replace(network=network_of(normal(size=(16, 8)), normal(size=(8, 10)), activation=function))


@pytest.mark.parametrize("where", ["processes", "a cluster"])
def test_elsewhere_the_same_rows_are_found_in_the_same_order_and_the_same_error(pair, where):
    mnist = Trained(load_dataset("mnist"), 0, relu_network(HIDDEN, seed=0))  # data that need not travel
    trained = [*pair, with_activation(pair[1], lambda sums: keras.ops.clip(sums, 0.0, 0.5)), mnist]
    methods = {"ours": METHODS["taylor"], "own": lambda n, s, **_: prune_weights(n, s / 2), "fails": fails_for_5}
    with pytest.raises(RuntimeError) as here:
        measure(trained, methods)
    with contextlib.ExitStack() as stack:
        if where == "a cluster":
            dask = pytest.importorskip("distributed", reason="Dask is no dependency; joblib reaches it where it is")
            cluster = stack.enter_context(dask.LocalCluster(2, threads_per_worker=1, dashboard_address=None))
            stack.enter_context(dask.Client(cluster))
            stack.enter_context(joblib.parallel_config("dask"))
        there = stack.enter_context(pytest.raises(RuntimeError))
        measure(trained, methods, n_jobs=2 if where == "processes" else None)
    pd.testing.assert_frame_equal(there.value.rows, here.value.rows, rtol=1e-5)
    assert re.search(r"'fails' failed on small, seed 5, at sparsity 0.0.*no luck in process", str(there.value))
    assert f"process {os.getpid()}" not in str(there.value)


def test_rows_from_the_cache_are_those_that_were_measured_also_if_a_file_is_damaged(pair, tmp_path):
    inverted = pair[0].dataset._replace(x_test=1 - pair[0].dataset.x_test)  # under the same name
    trained = [*pair, pair[0]._replace(dataset=inverted)]
    measured = measure(trained, METHODS, cache=tmp_path)
    again = [each._replace(network=relu_network(HIDDEN, 16, seed=each.seed)) for each in trained]
    assert_same(measured, measure(again, METHODS))
    paths = list(tmp_path.iterdir())
    good = paths[0].read_bytes()
    assert len(paths) == 9
    paths[0].write_bytes(flipped(good, good.index(b"NUMPY") + 130))
    with pytest.warns(UserWarning, match=f"{paths[0].name} is damaged"):
        assert_same(measured, measure(again, METHODS, cache=tmp_path))
    assert paths[0].read_bytes() == good
    for path in paths:
        arrays = dict(np.load(path))
        np.savez(path, **arrays | {"accuracy": arrays["accuracy"] + 1})
    read = measure(again, METHODS, cache=tmp_path)  # and nothing is measured again
    assert_same(read, measured.assign(accuracy=measured["accuracy"] + 1))


def test_whatever_determines_the_rows_is_part_of_the_name_of_their_file(pair, tmp_path):
    one, other = pair[0], relu_network(HIDDEN, 16, seed=5)
    other.layers[0].kernel.assign(other.layers[0].kernel + 1e-6)
    runs = [(each, prune_neurons, (0.5,)) for each in (one, one._replace(network=other), one._replace(seed=6))]
    runs += [(one._replace(dataset=changed), prune_neurons, (0.5,)) for changed in one_entry_changed(one.dataset)]
    runs += [(one, prune_neurons, sparsities) for sparsities in ((0.4,), (0.5, 0.4), (0.4, 0.5))]
    runs += [(one, partial(prune_neurons, criterion=name), (0.5,)) for name in ("norm", "taylor")]
    runs += [(one, method, (0.5,)) for method in (partial(repaired, prune_neurons), partial(repaired, prune_weights))]
    for count, (each, method, sparsities) in enumerate(runs, start=1):
        sweep([each], {"m": method}, sparsities, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == count


def test_what_our_functions_found_before_a_failure_or_ctrl_c_is_kept_and_what_a_readers_own_did_never(pair, tmp_path):
    own, stops = lambda network, *_, **__: network, Mock(side_effect=KeyboardInterrupt)
    methods = {"ours": prune_weights, "fails": partial(prune_weights, criterion="none"), "a": own, "b": partial(own)}
    trained = [*pair, with_activation(pair[0], lambda sums: keras.ops.tanh(sums))]
    with pytest.raises(KeyboardInterrupt):
        measure(trained, methods | {"c": partial(repaired, own), "stops": stops}, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("prune", "criteria"), [(prune_neurons, NEURON_CRITERIA), (prune_weights, WEIGHT_CRITERIA)])
def test_a_criterion_of_the_readers_own_switches_the_cache_off(pair, tmp_path, monkeypatch, prune, criteria):
    plain, (default, ours) = measure(pair, {"m": prune}, cache=tmp_path), next(iter(criteria.items()))
    monkeypatch.setitem(criteria, default, lambda network: [-score for score in ours(network)])
    assert not measure(pair, {"m": prune}, cache=tmp_path).equals(plain)
    assert len(list(tmp_path.iterdir())) == 2


def curve(accuracy, sparsities=(0.0, 0.5, 0.9), method="m", seed=0):
    return pd.DataFrame({"dataset": "d", "method": method, "seed": seed, "sparsity": sparsities, "accuracy": accuracy})


def test_sparsity_at_drop_by_hand_and_never_by_a_guess():
    frame = curve([0.98, 0.96, 0.48]).iloc[[2, 0, 1]]
    for drop, where in ((1, 0.25), (2, 0.5), (10, 0.5 + 0.4 * 8 / 48), (50, 0.9), (50.1, np.nan)):
        assert study.sparsity_at_drop(frame, drop)["sparsity"].item() == pytest.approx(where, nan_ok=True)
    refused = [(frame, drop, "positive") for drop in (0, -1, np.nan)]
    refused += [(odd, 1, "each sparsity once") for odd in (frame[frame["sparsity"] > 0], pd.concat([frame, frame]))]
    for odd, drop, message in refused:
        with pytest.raises(ValueError, match=message):
            study.sparsity_at_drop(odd, drop)
    frame = pd.concat([curve([0.9, 0.7, 0.9]), curve([0.8, 0.9, 0.6], seed=1), curve([0.9, 0.9, 0.9], method="n")])
    found = study.sparsity_at_drop(frame, 10)
    assert found[["dataset", "method", "seed"]].to_numpy().tolist() == [["d", "m", 0], ["d", "m", 1], ["d", "n", 0]]
    np.testing.assert_allclose(found["sparsity"], [0.25, 0.5 + 0.4 * 20 / 30, np.nan])


def test_the_table_shows_percent_over_seeds_with_sparsities_down_and_methods_across():
    frame = pd.concat([curve([0.9, 0.8, 0.1], (0.0, 0.98, 0.985)), curve([0.92, 0.8, 0.3], (0.0, 0.98, 0.985), seed=1),
                       curve([0.5], (0.0,), "n"), curve([0.7], (0.0,), "n", seed=1)])  # fmt: skip
    table = study.accuracy_table(frame)
    assert table.index.tolist() == ["0", "98", "98.5"] and table.columns.tolist() == ["d, m", "d, n"]
    assert table["d, m"].tolist() == ["91.0 ± 1.4", "80.0 ± 0.0", "20.0 ± 14.1"]
    assert table.loc["0", "d, n"] == "60.0 ± 14.1"


def test_accuracy_at_weights_left_by_hand():
    """Half-way between 100 and 10,000 weights, on a logarithmic axis, are 1,000."""
    frame = curve([0.9, 0.5, 0.1]).assign(weights_left=[10_000, 100, 0])
    table = study.at_weights_left(pd.concat([frame, frame.assign(seed=1, accuracy=0.3)]), [100, 1000, 10_000])
    assert list(table.columns) == ["100", "1,000", "10,000"] and list(table.index) == [("d", "m", 0), ("d", "m", 1)]
    np.testing.assert_allclose(table, [[50, 70, 90], [30, 30, 30]])
    for budgets in ([99], [100, 10_001], [0]):
        with pytest.raises(ValueError, match=r"between the 100 and 10,000 weights left"):
            study.at_weights_left(frame, budgets)


def test_means_intervals_and_verdicts_by_hand():
    assert doctest.testmod(study) == (0, 3)
    assert study.mean_sd(np.array([1200, 1300, 1400]), digits=0) == "1300 ± 100"
    # By hand: sd 1, so the standard error is 1 / sqrt(3), and t(0.975; 2 degrees of freedom) = 4.3027.
    values = [90.0, 92.0, 91.0]
    assert study.mean_interval(np.array(values), digits=4) == "91.0000 ± 2.4841"  # from 88.52 to 93.48
    assert study.mean_interval([0.1] * 3) == "0.1 ± 0.0"
    for limit, expected in ((88.4, "supported"), (88.6, "undecided"), (93.6, "refuted")):
        assert study.verdict(values, at_least=limit) == expected
    for limit, expected in ((93.6, "supported"), (93.4, "undecided"), (88.4, "refuted")):
        assert study.verdict(values, at_most=limit) == expected
    assert study.verdict(values, 90, 92) == "undecided"
    for odd in ([], [1.0], [1.0, np.nan], [1.0, np.inf]):
        for summary in (study.mean_sd, study.mean_interval, study.verdict):
            with pytest.raises(ValueError, match="two or more finite values"):
                summary(odd)


def test_contenders_take_turns_their_first_calls_do_not_count_and_what_is_quick_is_repeated(monkeypatch):
    calls = []
    # A call takes the seconds that it returns, whatever this machine is busy with.
    monkeypatch.setattr("timeit.timeit", lambda run, number: sum(run() for _ in range(number)))
    contenders = {"slow": lambda: calls.append("slow") or 4.0, "quick": lambda: calls.append("quick") or 1.0}
    frame = study.time_in_turn(contenders, rounds=3, seconds=2)
    assert calls == ["slow", "slow", "quick", "quick", *["slow", "quick", "quick"] * 3]
    assert frame.to_dict("list") == {"slow": [4.0] * 3, "quick": [1.0] * 3}
