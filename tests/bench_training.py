"""Training, seconds per network and epoch: five networks side by side against Keras, TensorFlow, PyTorch and JAX loops.

The network is 784-1000-1000-500-200-10, batches of 128, Adam. Each contender trains on all 60,000 MNIST images.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tensorflow as tf
import torch
from bench_tools import against, hand_over, measured
from study import HIDDEN, load_dataset, relu_network, time_in_turn, train_networks

WIDTHS = (784, *HIDDEN, 10)
BATCH, STEPS = 128, 468  # whole batches of an epoch
# Multiply-adds twice: forward, gradients by the weights, gradients by the inputs of all layers but the first.
FLOPS = 2 * sum((3 if i else 2) * WIDTHS[i] * WIDTHS[i + 1] for i in range(5)) * BATCH * STEPS
data = load_dataset("mnist")
order = np.random.default_rng(0).permutation(60_000)[: BATCH * STEPS].reshape(STEPS, BATCH)


def five_side_by_side(images: int):
    """Five networks of ours on the first `images` training images, one epoch, building and tracing included."""
    part = data._replace(x_train=data.x_train[:images], y_train=data.y_train[:images])
    return lambda: train_networks(part, epochs=1, cache=None)


def keras_fit():
    network = relu_network(seed=0)
    network.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return lambda: network.fit(data.x_train, data.y_train, batch_size=BATCH, epochs=1, verbose=0)


def tensorflow_loop():
    """The usual hand-written loop: tf.data, GradientTape, tf.function, Keras' Adam."""
    network, optimizer = relu_network(seed=0), keras.optimizers.Adam(1e-3)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batches = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train)).shuffle(60_000).batch(BATCH)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = entropy(y, network(x, training=True))
        optimizer.apply(tape.gradient(value, network.trainable_variables), network.trainable_variables)

    def epoch():
        for x, y in batches:
            step(x, y)

    return epoch


def pytorch_loop():
    layers = []
    for inputs, units in pairwise(WIDTHS[:-1]):
        layers += [torch.nn.Linear(inputs, units, bias=False), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(WIDTHS[-2], 10))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    x, y = torch.tensor(data.x_train), torch.from_numpy(data.y_train.astype(np.int64))

    def epoch():
        for rows in torch.from_numpy(order):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()

    return epoch


def jax_epoch():
    """One compiled `lax.scan` over all batches, Adam written out."""
    start = relu_network(seed=0)
    weights = [jnp.asarray(weight) for weight in start.get_weights()]
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)

    def value(weights, rows):
        hidden = x[rows]
        for kernel in weights[:-2]:
            hidden = jax.nn.relu(hidden @ kernel)
        logits = jax.nn.log_softmax(hidden @ weights[-2] + weights[-1])
        return -jnp.mean(jnp.take_along_axis(logits, y[rows, None], axis=1))

    def step(state, rows):
        weights, means, squares, count = state
        gradients, count = jax.grad(value)(weights, rows), count + 1
        means = [0.9 * m + 0.1 * g for m, g in zip(means, gradients, strict=True)]
        squares = [0.999 * s + 0.001 * g * g for s, g in zip(squares, gradients, strict=True)]
        rate = 1e-3 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        moves = [rate * m / (jnp.sqrt(s) + 1e-7) for m, s in zip(means, squares, strict=True)]
        return ([w - move for w, move in zip(weights, moves, strict=True)], means, squares, count), 0.0

    epoch = jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(order))[0])
    zeros = [jnp.zeros_like(weight) for weight in weights]
    state = [(weights, zeros, zeros, jnp.float32(0))]

    def run():
        state[0] = jax.block_until_ready(epoch(state[0]))

    return run


def peak() -> float:
    """Best float32 matrix product of this machine in FLOP/s."""
    a = tf.random.normal((4096, 4096))
    return 2 * 4096**3 / time_in_turn({"product": lambda: tf.matmul(a, a).numpy()})["product"].min()


if __name__ == "__main__":
    few, all_images = 10_000, 60_000
    seconds = time_in_turn(
        {
            "few": five_side_by_side(few),
            "all": five_side_by_side(all_images),
            "keras fit": keras_fit(),
            "tensorflow loop": tensorflow_loop(),
            "pytorch loop, fused Adam": pytorch_loop(),
            "jax lax.scan": jax_epoch(),
        },
        rounds=3,
        seconds=0,
    )
    # The difference leaves out building, tracing and measuring, which are the same for few images and for all.
    seconds["ours"] = (seconds.pop("all") - seconds.pop("few")) / 5 * all_images / (all_images - few)
    targets = {"jax lax.scan": 1.15, "tensorflow loop": 0.85}
    most = peak()
    share = FLOPS / seconds["ours"].median() / most
    hand_over(
        [
            *against("training, one network, one epoch", seconds, targets),
            measured(
                f"training, {FLOPS / BATCH / STEPS / 1e6:.2f} MFLOP per image: share of the matrix-product peak",
                f"{100 * share:.0f} % of {most / 1e9:.0f} GFLOP/s",
            ),
        ]
    )
