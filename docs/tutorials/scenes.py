"""Captioned pictures for the tutorials: `python docs/tutorials/scenes.py data` draws 600 of them, in three forms.

    data/tars/00000.tar, ...  three WebDataset tars; a sample has jpg, txt (caption), json (a second caption, labels)
    data/captions.csv         the captions alone
    data/urls.csv, data/web/  the pictures as files, and a list of addresses at which a web server on port 8765 has them

Of the addresses 12 lead nowhere, as on the web. The same command draws the same pictures.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import webdataset

from graphbuild.demo.captions import caption
from graphbuild.demo.scenes import encode_jpeg, make_scenes, render

SAMPLES, TARS = 600, 3


def main(folder: Path) -> None:
    for name in ("tars", "web"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    scenes = make_scenes(SAMPLES)
    texts, pictures = [caption(scene) for scene in scenes], [encode_jpeg(render(scene, 64)) for scene in scenes]
    for tar in range(TARS):
        with webdataset.TarWriter(f"{folder}/tars/{tar:05d}.tar", mtime=0) as writer:
            for number in range(tar * SAMPLES // TARS, (tar + 1) * SAMPLES // TARS):
                scene = scenes[number]
                labels = {**asdict(scene), "recaption": caption(replace(scene, seed=scene.seed + 1))}
                sample = {"jpg": pictures[number], "txt": texts[number], "json": json.dumps(labels).encode()}
                writer.write({"__key__": f"{number:04d}", **sample})
    with (
        (folder / "captions.csv").open("w", newline="") as captions,
        (folder / "urls.csv").open("w", newline="") as urls,
    ):
        csv.writer(captions).writerows([["caption"], *([text] for text in texts)])
        csv.writer(urls).writerow(["url", "caption"])
        for number, text in enumerate(texts):
            csv.writer(urls).writerow([f"http://127.0.0.1:8765/{number:04d}.jpg", text])
            if number % 50:
                (folder / "web" / f"{number:04d}.jpg").write_bytes(pictures[number])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
