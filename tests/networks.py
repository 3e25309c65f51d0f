"""What the tests of the module share: small networks, images, and plain NumPy that says what they compute."""

from itertools import pairwise

import keras
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from keras.layers import Activation, Dense, Dropout, Flatten, ReLU, Softmax

INPUTS, HIDDEN, CLASSES = 6, (12, 8), 4
SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99, 1.0)
on_scores = settings(deadline=None, max_examples=100, derandomize=True)
on_networks = settings(deadline=None, max_examples=10, derandomize=True)
seeds, fractions = st.integers(0, 99), st.one_of(st.floats(0, 1), st.sampled_from(SPARSITIES))


def chain(*layers, inputs=(INPUTS,)):
    return keras.Sequential([keras.Input(inputs), *layers])


def network_of(*kernels, biases=None, activation="relu"):
    """A chain of Dense layers with these kernels; `biases` (one per layer) or none at all."""
    names = [*(f"hidden_{number}" for number in range(1, len(kernels))), "logits"]
    functions = [activation] * (len(kernels) - 1) + [None]
    network = chain(
        *(Dense(np.shape(kernel)[1], function, use_bias=biases is not None, name=name)
          for kernel, function, name in zip(kernels, functions, names, strict=True)),
        inputs=(len(kernels[0]),),
    )  # fmt: skip
    pairs = zip(kernels, biases, strict=True) if biases is not None else zip(kernels, strict=True)
    network.set_weights([np.array(array, np.float32) for pair in pairs for array in pair])
    return network


def random_network(seed=0, use_bias=True, hidden=HIDDEN, inputs=INPUTS, classes=CLASSES, activation="relu", size=1):
    """A network with normally distributed weights, biases included; the output layer always has some."""
    layers = [Dense(units, activation, use_bias=use_bias, name=f"hidden_{number}")
              for number, units in enumerate(hidden, start=1)]  # fmt: skip
    network = chain(*layers, Dense(classes, name="logits"), inputs=(inputs,))
    rng = np.random.default_rng(seed)
    network.set_weights([size * rng.normal(size=weight.shape) for weight in network.get_weights()])
    return network


def scale_units(network, *factors):
    """Scale the units of each hidden layer by an array of factors, and back on their way out: the function stays."""
    for layer, (before, after) in zip(dense(network), pairwise([np.ones(1), *factors, np.ones(1)]), strict=True):
        kernel, *bias = layer.get_weights()
        layer.set_weights([kernel * after / before[:, None], *(each * after for each in bias)])
    return network


def gentle_network():
    """A random network whose probabilities float32 can tell from 0."""
    return random_network(size=1 / 3)


def functional_network():
    """Images of 2 x 3 pixels in, probabilities out, and one of every supported layer on the way."""
    first = Flatten(), Dense(12, name="hidden_1"), Activation("relu"), Dropout(0.5)
    rest = Dense(8, name="hidden_2", trainable=False), ReLU(), Dense(CLASSES, name="logits"), Softmax()
    network = as_functional(chain(*first, *rest, inputs=(2, 3)))
    network.set_weights(gentle_network().get_weights())
    return network


def as_functional(network):
    inputs = signal = keras.Input(network.input_shape[1:])
    for layer in network.layers:
        signal = layer(signal)
    return keras.Model(inputs, signal)


def images(count=50, seed=1):
    rng = np.random.default_rng(seed)
    return rng.random((count, INPUTS), np.float32), rng.integers(0, CLASSES, count)


def dense(network):
    return [layer for layer in network.layers if isinstance(layer, Dense)]


def kernels(network):
    return [layer.get_weights()[0] for layer in dense(network)]


def predictions(network, x):
    return keras.ops.convert_to_numpy(network(x, training=False))


def assert_same_outputs(network, other, x, rtol=1e-5):
    """Outputs differ by no more than this share of the largest one, or of 1."""
    wanted = predictions(other, x)
    np.testing.assert_allclose(predictions(network, x), wanted, rtol=0, atol=rtol * max(1, np.abs(wanted).max()))


def bits(network):
    return [weight.tobytes() for weight in network.get_weights()]


def forward(network, x):
    """The inputs and pre-activations of every Dense layer of a ReLU network, in float64."""
    signal, inputs, sums = x.astype(np.float64), [], []
    for layer in dense(network):
        kernel, *bias = layer.get_weights()
        inputs.append(signal)
        sums.append(signal @ kernel + (bias[0] if bias else 0))
        signal = np.maximum(sums[-1], 0)
    return inputs, sums


def what_errors_count(network):
    """By the L2 norm of the outgoing row, whose entries are each times what the next unit's errors count."""
    counts = [np.ones(CLASSES)]
    for kernel in kernels(network)[:0:-1]:
        counts.insert(0, np.sqrt(np.diagonal(kernel @ np.diag(counts[0] ** 2) @ kernel.T)))
    return counts


def unexplained(rows, wanted, left):
    """The sum of squares of `wanted` that least squares cannot explain from the columns of `rows` that are left."""
    return np.sum((rows[:, left] @ np.linalg.lstsq(rows[:, left], wanted, rcond=None)[0] - wanted) ** 2)


def greedy_selection(outputs, kernel, ridge=1e-3):
    """Per unit, the share of the squared `outputs @ kernel` that better ones leave: all are tried every time."""
    outputs = np.linalg.qr(outputs, mode="r")  # the same sums of squares, from fewer rows
    sent = np.sum(kernel**2, axis=1)
    rows = np.vstack([outputs, np.diag(np.sqrt(ridge * np.mean(np.sum(outputs**2, axis=0) * sent) / sent))])
    wanted = np.vstack([outputs @ kernel, np.zeros(kernel.shape)])
    shares, taken = np.zeros(len(kernel)), []
    for _ in shares:
        best = min(set(range(len(kernel))) - set(taken), key=lambda unit: unexplained(rows, wanted, [*taken, unit]))
        shares[best] = unexplained(rows, wanted, taken) / np.sum(wanted**2)
        taken.append(best)
    return shares


def backward_elimination(inputs, mean, kernel, ridge=1e-3):
    """Per weight, the most that a removal up to its own raised the error, as a share: all are tried every time."""
    rows = np.vstack([inputs - mean, np.diag(np.sqrt(ridge * np.sum(inputs**2, axis=0)))])
    rows, rises = np.linalg.qr(rows, mode="r"), np.zeros(kernel.shape)
    for wanted, weights, rise in zip((rows @ kernel).T, kernel.T, rises.T, strict=True):
        left, error = set(np.flatnonzero(weights)), 0.0
        while left:
            errors = {weight: unexplained(rows, wanted, list(left - {weight})) for weight in left}
            least = min(errors, key=errors.get)
            rise[least], error = max(rise.max(), errors[least] - error), errors[least]
            left.remove(least)
    return rises / np.sum((rows @ kernel) ** 2)


def chosen_together(inputs, mean, kernel, count, ridge=1e-3):
    """Where ADMM ends with so many weights; every round solves for all of them."""

    def largest(weights):
        order = np.argsort(-np.abs(weights), axis=None)
        return np.isin(np.arange(weights.size), order[:count]).reshape(weights.shape)

    rows = np.vstack([inputs - mean, np.diag(np.sqrt(ridge * np.sum(inputs**2, axis=0)))])
    length = np.linalg.norm(rows, axis=0)
    kernel, rows = kernel * length[:, None], rows / np.where(length > 0, length, 1)
    products, kept, strength, pull = rows.T @ rows, largest(kernel) * kernel, 0.1, 0
    for _ in range(25):
        wanted = products @ kernel + strength * (kept - pull)
        free = np.linalg.solve(products + strength * np.eye(len(kernel)), wanted) + pull
        kept = largest(free) * free
        pull, strength = (free - kept) / 1.1, strength * 1.1
    return largest(free)
