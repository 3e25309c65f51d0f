"""Run the heavy parts of the study where Keras computes, on a GPU above all, and compare with the CPU.

    python tests/gpu_check.py                        with TensorFlow
    KERAS_BACKEND=jax python tests/gpu_check.py      or torch, where that package sees a GPU
    python tests/gpu_check.py 2                      trains 2 networks side by side instead of 5 and then 20

Prints Markdown tables: seconds; agreement, the share of test images for which the CPU, given the same weights, predicts
the same; and how far the repaired weights of a residual network are from those that the CPU finds. The script ends with
an error if less than 99.9 % agree, or weights differ by more than 0.1 %. Without a GPU it runs too, and says so.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from pruning_utils import prune_neurons, prune_weights, repair, shrink

sys.path.append(str(Path(__file__).resolve().parent.parent / "notebooks"))
from study import SPARSITIES, Trained, accuracy, device, load_dataset, sweep, train_networks

AGREE, EPOCHS, WEIGHTS = 0.999, 3, 1e-3


def predictions(network: keras.Model, x: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(network(x, training=False)).argmax(axis=1)


def agreement(network: keras.Model, x: np.ndarray) -> float:
    """Return the share of images that a copy of the network on the CPU predicts alike."""
    with keras.device("cpu:0"):
        twin = keras.models.clone_model(network)
        twin.set_weights(network.get_weights())
        expected = predictions(twin, x)
    return float(np.mean(predictions(network, x) == expected))


def timed(run: Callable) -> tuple[object, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def training(data, counts: list[int]) -> tuple[Trained, list[str]]:
    """Train so many networks side by side; what is not the seconds of an epoch is building and compiling."""
    rows = []
    for count in counts:
        settings = {"dataset": data, "seeds": range(count), "side_by_side": count, "cache": None}
        _, short = timed(lambda settings=settings: train_networks(**settings, epochs=1))
        (trained, _), long = timed(lambda settings=settings: train_networks(**settings, epochs=EPOCHS))
        epoch = (long - short) / (EPOCHS - 1)
        rows.append(f"| training, {count} side by side, per epoch of all | {short - epoch:.1f} | {epoch:.2f} |")
        rows.append(f"| the same, per network and epoch | | {epoch / count:.2f} |")
    return trained[0], rows


def residual_network() -> keras.Model:
    """Return a small residual network with random weights and statistics."""
    layers = keras.layers
    keras.utils.set_random_seed(0)

    def normalised(x, filters, size=3, strides=1):
        x = layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(beta_initializer="random_normal", moving_mean_initializer="random_normal")(x)

    images = keras.Input((28, 28, 1))
    x = layers.ReLU()(normalised(images, 16, strides=2))
    for filters, strides in ((16, 1), (32, 2)):
        skip = x if strides == 1 else normalised(x, filters, 1, strides)
        y = layers.ReLU()(normalised(x, filters, 3, strides))
        x = layers.ReLU()(layers.Add()([skip, normalised(y, filters)]))
    return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def repaired_residual(x: np.ndarray) -> tuple[keras.Model, float]:
    """Prune, repair and shrink a residual network here and on the CPU; return it and by how much weights differ."""

    def run() -> tuple[keras.Model, list[np.ndarray]]:
        network = residual_network()
        repaired = repair(prune_neurons(network, 0.5), network, x)
        return shrink(repaired), repaired.get_weights()

    small, ours = run()
    with keras.device("cpu:0"):
        _, theirs = run()
    scales = [np.abs(each).max() or 1.0 for each in theirs]
    return small, max(np.abs(a - b).max() / scale for a, b, scale in zip(ours, theirs, scales, strict=True))


def main() -> None:
    data = load_dataset("mnist")
    trained, times = training(data, [int(count) for count in sys.argv[1:]] or [5, 20])
    network, x = trained.network, data.x_train[:3000]
    checks = {"dense": network}
    for what, prune in {"weights": prune_weights, "neurons": prune_neurons}.items():
        jobs = {
            f"sweep of {what}, {len(SPARSITIES)} sparsities": lambda prune=prune: sweep(
                [trained], {"": prune}, cache=None
            ),
            f"repair without 80 % of the {what}, 3,000 images": lambda prune=prune: repair(
                prune(network, 0.8), network, x
            ),
        }
        for name, job in jobs.items():
            (_, first), (result, again) = timed(job), timed(job)
            times.append(f"| {name} | {first:.2f} | {again:.2f} |")
        checks[f"80 % of {what} removed"] = prune(network, 0.8)
        checks[f"80 % of {what} removed, repaired, shrunk"] = shrink(result)
    print(f"{device()}\n\n| step | first time (s) | again (s) |\n|---|---|---|")
    print("\n".join(times), end="\n\n")
    print("| network | accuracy (%) | predicted as on the CPU (%) |\n|---|---|---|")
    agree = {name: agreement(network, data.x_test) for name, network in checks.items()}
    for name, network in checks.items():
        right = accuracy(network, data.x_test, data.y_test)
        print(f"| {name} | {100 * right:.1f} | {100 * agree[name]:.2f} |")
    square = x.reshape(-1, 28, 28, 1)[:1000]
    small, differ = repaired_residual(square)
    agree["a residual network without half of its filters, repaired, shrunk"] = agreement(small, square)
    print(f"\nRepaired weights of a residual network: {differ:.1e} of the largest of each kernel from the CPU's")
    if "CPU cores" in device():
        print("\nNo GPU was found: this compared the CPU with itself.")
    if differ > WEIGHTS:
        raise SystemExit(f"repaired weights may differ by {WEIGHTS}; they differ by {differ:.1e}")
    if min(agree.values()) < AGREE:
        raise SystemExit(
            f"at least {100 * AGREE} % of the predictions must be the CPU's, least is {min(agree.values())}"
        )


if __name__ == "__main__":
    main()
