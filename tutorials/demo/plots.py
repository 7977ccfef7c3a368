"""The plots after training: the loss, and which experts and ranks did the work."""

from __future__ import annotations

import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend is chosen first


def loss(history: dict[str, Any], unigram: float, bigram: float, file: Path) -> None:
    """Plot the training and held-out bits per byte over the steps, and the two baselines."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(1, len(history["train"]) + 1), np.array(history["train"]) / math.log(2), lw=0.8, alpha=0.7, label="train")
    axes.plot(*np.array(history["held_out"]).T, "o-", ms=4, label="held-out")
    for name, bits, style in (("unigram", unigram, ":"), ("bigram", bigram, "--")):
        axes.axhline(bits, color="gray", ls=style, lw=1, label=f"{name} {bits:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", title=f"held-out: {history['held_out'][-1][1]:.3f} bits per byte")
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def experts(history: dict[str, Any], file: Path) -> None:
    """Plot each expert's share of the rows over the steps, one plot per layer. Below them, plot the rows of each rank, per layer."""
    loads = np.array(history["loads"], dtype=float)  # [steps, layers, E]
    steps, layers, count = loads.shape
    shares = loads / loads.sum(-1, keepdims=True).clip(1) * count  # 1 is an even share
    size, heights = (8, 1.4 * layers + 2.4), [1] * layers + [1.6]
    figure, axes = plt.subplots(layers + 1, 1, figsize=size, sharex=True, layout="constrained", height_ratios=heights)
    for layer in range(layers):
        edges = (0.5, steps + 0.5, count - 0.5, -0.5)
        look = {"aspect": "auto", "cmap": "coolwarm", "interpolation": "nearest"}
        image = axes[layer].imshow(shares[:, layer].T, vmin=0, vmax=2, extent=edges, **look)
        axes[layer].set(ylabel=f"layer {layer}\nexpert", yticks=range(0, count, max(1, count // 4)))
    figure.colorbar(image, ax=axes[:layers], label="load of each expert (1 = an even share)")
    # A run that resumed on a different number of ranks has rows of fewer ranks in some steps.
    for rank, rows in enumerate(zip_longest(*history["rows"], fillvalue=math.nan)):
        axes[layers].plot(np.arange(1, steps + 1), rows, lw=0.9, label=f"rank {rank}")
    axes[layers].set(xlabel="step", ylabel="expert rows a layer", ylim=(0, None))
    axes[layers].legend(ncols=4, fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
