"""Sweeps, ten sparsities and 10,000 images: ours against torch.nn.utils.prune, Torch-Pruning and plain NumPy."""

import copy

import numpy as np
import torch
import torch_pruning
from bench_tools import against, hand_over
from study import SPARSITIES, Trained, load_dataset, relu_network, sweep, time_in_turn
from torch.nn.utils import prune

from pruning_utils import prune_neurons, prune_weights

data = load_dataset("mnist")
network = relu_network(seed=0)
trained = [Trained(data, 0, network)]
kernels = [np.asarray(layer.kernel) for layer in network.layers]
x, y = torch.tensor(data.x_test), torch.from_numpy(data.y_test.astype(np.int64))


def torch_network() -> torch.nn.Sequential:
    layers = []
    for kernel in kernels[:-1]:
        layers += [torch.nn.Linear(*kernel.shape, bias=False), torch.nn.ReLU()]
    twin = torch.nn.Sequential(*layers, torch.nn.Linear(*kernels[-1].shape))
    for layer, kernel in zip(twin[::2], kernels, strict=True):
        layer.weight.data = torch.from_numpy(kernel.T.copy())
    return twin


twin = torch_network()


@torch.no_grad()
def torch_accuracy(pruned) -> float:
    return float((pruned(x).argmax(dim=1) == y).float().mean())


def torch_weights():
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(twin)
        for layer in pruned[:-1:2]:
            prune.l1_unstructured(layer, "weight", amount=sparsity)
        torch_accuracy(pruned)


def torch_neurons():
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(twin)
        for layer in pruned[:-1:2]:
            prune.ln_structured(layer, "weight", amount=sparsity, n=2, dim=0)
        torch_accuracy(pruned)


def torch_pruning_neurons():
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(twin)
        torch_pruning.pruner.MagnitudePruner(
            pruned, x[:1], importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=sparsity,
            ignored_layers=[pruned[-1]],
        ).step()  # fmt: skip
        torch_accuracy(pruned)


def numpy_accuracy(pruned) -> float:
    right = 0
    for first in range(0, 10_000, 128):
        hidden = data.x_test[first : first + 128]
        for kernel in pruned:
            hidden = np.maximum(hidden @ kernel, 0)
        right += np.sum((hidden @ kernels[-1]).argmax(axis=1) == data.y_test[first : first + 128])
    return right / 10_000


def numpy_sweep(scores_of, mask_of):
    """The plain way: a full sort per layer, batches of 128."""
    for sparsity in SPARSITIES:
        pruned = []
        for kernel in kernels[:-1]:
            scores = scores_of(kernel)
            mask = np.ones(scores.size, bool)
            mask[np.argsort(scores, axis=None)[: round(sparsity * scores.size)]] = False
            pruned.append(np.where(mask_of(mask, kernel), kernel, 0))
        numpy_accuracy(pruned)


if __name__ == "__main__":
    weights = {
        "ours": lambda: sweep(trained, {"w": prune_weights}, cache=None),
        "ten bare forward passes": lambda: [network(data.x_test, training=False).numpy() for _ in SPARSITIES],
        "torch l1_unstructured": torch_weights,
        "numpy, full sort": lambda: numpy_sweep(np.abs, lambda mask, kernel: mask.reshape(kernel.shape)),
    }
    neurons = {
        "ours": lambda: sweep(trained, {"n": prune_neurons}, cache=None),
        "torch ln_structured": torch_neurons,
        "Torch-Pruning": torch_pruning_neurons,
        "numpy, full sort": lambda: numpy_sweep(lambda k: np.linalg.norm(k, axis=0), lambda mask, kernel: mask),
    }
    rows = []
    for what, contenders, targets in (
        ("sweep of weights", weights, {"ten bare forward passes": 1.12, "torch l1_unstructured": 0.4}),
        ("sweep of neurons", neurons, {"Torch-Pruning": 0.8, "torch ln_structured": 0.3}),
    ):
        rows += against(what, time_in_turn(contenders, rounds=5), targets)
    hand_over(rows)
