"""Draws docs/targets.png: six scenes, the one-hot target of their batch, and the target from their captions.

`python docs/picture.py`, with matplotlib. The numbers are those of the default encoder and `similarity_targets`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from graphbuild.demo.scenes import Scene, render
from graphbuild.nodes.encoder.find import find_encoder
from graphbuild.torch import similarity_targets

SCENES = {
    "A red star in the sky": Scene("star", "red", "large", "plain", "centre", 1, "sky", 3),
    "Two red stars": Scene("star", "red", "large", "plain", "centre", 2, "paper", 1),
    "A red star at night": Scene("star", "red", "large", "plain", "centre", 1, "night", 2),
    "A green circle on the grass": Scene("circle", "green", "large", "plain", "centre", 1, "grass", 4),
    "A green disc in a meadow": Scene("circle", "green", "large", "striped", "left", 1, "grass", 5),
    "A blue heart on a beach": Scene("heart", "blue", "large", "plain", "centre", 1, "sand", 6),
}


def main() -> None:
    model = SentenceTransformer(str(find_encoder("sentence-transformers/all-MiniLM-L6-v2").folder), device="cpu")
    vectors = torch.from_numpy(model.encode(list(SCENES), normalize_embeddings=True))
    target = similarity_targets(vectors, tau_s=0.25, views=1, keep_self=True).numpy()
    pictures = [np.asarray(render(scene, 96)) for scene in SCENES.values()]
    figure = plt.figure(figsize=(11, 4.6), facecolor="white")
    for left, values, title in (
        (0.40, np.eye(len(SCENES)), "ordinary training"),
        (0.735, target, "target from the captions"),
    ):
        axes = figure.add_axes((left, 0.16, 0.255, 0.61))
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.15)
        axes.set(xticks=[], yticks=[])
        figure.text(left + 0.1275, 0.94, title, fontsize=14, ha="center", va="center")
        for (row, column), value in np.ndenumerate(values):
            shown = "0" if value < 0.005 else f"{value:.2f}" if value < 1 else "1"
            axes.text(
                column, row, shown, ha="center", va="center", color="white" if value > 0.6 else "#223", fontsize=11
            )
        for number, picture in enumerate(pictures):
            small = figure.add_axes((left + 0.255 * (number + 0.1) / 6, 0.785, 0.255 * 0.8 / 6, 0.1))
            small.imshow(picture)
            small.axis("off")
    for number, (text, picture) in enumerate(zip(SCENES, pictures, strict=True)):
        bottom = 0.16 + 0.61 * (5 - number) / 6
        small = figure.add_axes((0.335, bottom + 0.008, 0.06, 0.61 / 6 - 0.016))
        small.imshow(picture)
        small.axis("off")
        figure.text(0.335, bottom + 0.61 / 12, text, fontsize=13, ha="right", va="center")
    figure.text(
        0.5,
        0.06,
        "How much of its target each picture gives to each one of the batch (temperature 0.25)",
        fontsize=12,
        ha="center",
        color="#445",
    )
    figure.savefig(Path(__file__).with_name("targets.png"), dpi=110)


if __name__ == "__main__":
    main()
