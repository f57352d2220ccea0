"""Tests of a probe on folders of images: ImageNet-9's exchanged backgrounds, ObjectNet, or any of your own.

A YAML file names them (docs/training.md). A folder is as torchvision's ImageFolder takes it, a subfolder a class;
class maps are the JSON files that come with those data sets. Reads each image once, in the loader's workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from evaluate import OtherImages
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from graphbuild.errors import ConfigError
from graphbuild.sources.tars import IMAGE_FORMATS
from graphbuild.torch.images import ImageDecoder

Batch = dict[str, Any]
KEYS = {"folder", "border", "train_to_test", "test_to_train", "folder_labels", "class_names"}


class FolderTest(Dataset[Batch]):
    """The images below a folder of class folders; asked for many it gives a batch: image uint8 [B, 3, P, P].

    `asked` names them and says which guesses of a label are right. Class folders for which none is are left out, and
    counted in `left_out`.
    """

    def __init__(self, name: str, folder: Path, right: dict[str, set[str]], pixels: int, border: int) -> None:
        files = sorted(path for path in folder.glob("*/**/*") if path.suffix.lower().removeprefix(".") in IMAGE_FORMATS)
        truths = [path.relative_to(folder).parts[0] for path in files]
        self.left_out = sorted(own for own in set(truths) if not right.get(own))
        kept = [number for number, own in enumerate(truths) if right.get(own)]
        if not kept:
            raise ConfigError(
                f"test {name!r}: {folder} holds no image in a class folder that its class map knows",
                "name the folder whose subfolders are the classes, and the map made for it",
            )
        self.asked = OtherImages(name, [truths[number] for number in kept], right)
        self._files = [files[number] for number in kept]
        bordered = partial(without_border, border=border, pixels=pixels)
        self._decoder = ImageDecoder(None, bordered) if border else ImageDecoder(pixels, None)

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        files = [self._files[number] for number in numbers]
        images, _ = self._decoder.decode([file.read_bytes() for file in files], [*map(str, files)])
        return {"image": self._decoder.collate(images)}


def without_border(image: Image.Image, border: int, pixels: int) -> torch.Tensor:
    """uint8 [3, P, P]: `border` pixels cut off at each side, then as all images: resized, and cut to the middle."""
    fitted = ImageOps.fit(ImageOps.crop(image, border), (pixels, pixels), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy())


def read_tests(path: Path, pixels: int) -> list[FolderTest]:
    """The tests of a YAML file, whose paths are its own folder's.

    ConfigError: a file or folder is missing or is not what it should be.
    """
    given = read(path)
    if not isinstance(given, dict) or not given or not all(isinstance(one, dict) for one in given.values()):
        raise ConfigError(f"{path} names no tests", "write NAME: {folder: FOLDER}, see docs/training.md")
    return [_test(path, str(name), facts, pixels) for name, facts in given.items()]


def _test(path: Path, name: str, facts: dict[str, Any], pixels: int) -> FolderTest:
    if "folder" not in facts or (unknown := facts.keys() - KEYS):
        wrong = "no folder" if "folder" not in facts else f"unknown {', '.join(sorted(map(str, unknown)))}"
        raise ConfigError(f"{path}: test {name!r} has {wrong}", f"write folder, and what applies of {sorted(KEYS)}")
    files = {key: path.parent / str(facts[key]) for key in KEYS - {"border"} if key in facts}
    folder = files.pop("folder")
    if not folder.is_dir():
        raise ConfigError(f"{path}: test {name!r}: there is no folder {folder}", "correct it; it may be relative")
    own = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    maps = {key: read(file) for key, file in files.items()}
    try:
        right = right_guesses(own, **maps)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        fix = f"correct {', '.join(map(str, files.values()))}: docs/training.md shows what each holds"
        raise ConfigError(f"{path}: test {name!r}: {type(error).__name__}: {error}", fix) from error
    return FolderTest(name, folder, right, pixels, int(facts.get("border", 0)))


def right_guesses(
    folders: Sequence[str],
    train_to_test: dict[str, int] | None = None,
    test_to_train: dict[str, Any] | None = None,
    folder_labels: dict[str, str] | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, set[str]]:
    """The classes of the training that are right for each class folder, which are sorted by name.

    train_to_test: of each class of the training the number of its folder in their order, or -1 (ImageNet-9's
    in_to_in9.json). test_to_train: of each folder, or of its name in folder_labels, the classes, a list, or their names
    with "; " between them, which are looked up in class_names: the number of their line (ObjectNet's files). Without
    either a folder's name is its class.
    """
    if train_to_test is not None:
        return {own: {one for one, at in train_to_test.items() if at == place} for place, own in enumerate(folders)}
    if test_to_train is None:
        return {own: {own} for own in folders}
    numbers = {name.strip(): str(line) for line, name in enumerate(class_names or ())}
    right = {}
    for own in folders:
        listed = test_to_train.get(folder_labels[own] if folder_labels else own, [])
        names = [name.strip() for name in listed.split(";")] if isinstance(listed, str) else list(map(str, listed))
        if class_names and (unknown := [name for name in names if name not in numbers]):
            raise ValueError(f"class_names has no line {unknown[0]!r}, which {own} needs")
        right[own] = {numbers.get(name, name) for name in names}
    return right


def read(path: Path) -> Any:
    """A JSON or YAML file, or the lines of a text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        return json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "correct its path or its content") from error
