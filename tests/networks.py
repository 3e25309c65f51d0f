"""What the tests of the module share: small networks, images, and plain NumPy that says what they compute."""

import keras
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from keras.layers import Activation, Dense, Dropout, Flatten, ReLU, Softmax

INPUTS, HIDDEN, CLASSES = 6, (12, 8), 4
SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
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


def random_network(seed=0, use_bias=True, hidden=HIDDEN, inputs=INPUTS, classes=CLASSES, activation="relu"):
    """A network with normally distributed weights, biases included; the output layer always has some."""
    layers = [Dense(units, activation, use_bias=use_bias, name=f"hidden_{number}")
              for number, units in enumerate(hidden, start=1)]  # fmt: skip
    network = chain(*layers, Dense(classes, name="logits"), inputs=(inputs,))
    rng = np.random.default_rng(seed)
    network.set_weights([rng.normal(size=weight.shape).astype(np.float32) for weight in network.get_weights()])
    return network


def gentle_network():
    """A random network whose probabilities float32 can tell from 0."""
    network = random_network()
    network.set_weights([weight / 3 for weight in network.get_weights()])
    return network


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


def greedy_selection(outputs, kernel, ridge):
    """Take one unit after the other, each time the one that leaves the least error; try them all, solve every time.

    Returns the units in order, and the share of the squared `outputs @ kernel` that was unexplained before each.
    """
    outputs = np.linalg.qr(outputs, mode="r")  # the same sums of squares, from fewer rows
    sent = np.sum(kernel**2, axis=1)
    wanted, strength = outputs @ kernel, ridge * np.mean(np.sum(outputs**2, axis=0) * sent) / sent
    taken, shares, left = [], [], list(range(len(kernel)))

    def unexplained(units):
        rows = np.vstack([outputs[:, units], np.diag(np.sqrt(strength[units]))])
        target = np.vstack([wanted, np.zeros((len(units), wanted.shape[1]))])
        return np.sum((rows @ np.linalg.lstsq(rows, target, rcond=None)[0] - target) ** 2)

    while left:
        shares.append(unexplained(taken) / np.sum(wanted**2) if taken else 1.0)
        taken.append(min(left, key=lambda unit: unexplained([*taken, unit])))
        left.remove(taken[-1])
    return np.array(taken), np.array(shares)
