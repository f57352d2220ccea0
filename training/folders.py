"""Tests of a probe on folders of images: ImageNet-9's exchanged backgrounds, ObjectNet, or any of your own.

A YAML file names them (docs/how-to/train.md). A folder is as torchvision's ImageFolder takes it, a subfolder a class;
class maps are the JSON files that come with those data sets. Each image is read once, in the loader's workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from evaluate import OtherImages
from PIL import Image, ImageOps
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from torch.utils.data import Dataset

from graphbuild.errors import ConfigError
from graphbuild.sources.tars import IMAGE_FORMATS
from graphbuild.torch.images import ImageDecoder


class Given(BaseModel, extra="forbid"):
    """A test in the YAML file; paths are relative to it. border: pixels that are cut off at each side."""

    folder: Path
    border: int = Field(0, ge=0)
    train_to_test: Path | None = None
    test_to_train: Path | None = None
    folder_labels: Path | None = None
    class_names: Path | None = None


class FolderTest(Dataset[Any]):
    """The images of class folders for which a guess can be right; asked for many it gives a batch: image uint8
    [B, 3, P, P]. `asked` names them and says which guesses are right; `left_out` are the other class folders."""

    def __init__(self, name: str, folder: Path, right: Mapping[str, set[str]], pixels: int, border: int) -> None:
        files = sorted(path for path in folder.glob("*/**/*") if path.suffix.lower().removeprefix(".") in IMAGE_FORMATS)
        truths = [path.relative_to(folder).parts[0] for path in files]
        self.left_out = sorted({own for own in truths if not right[own]})
        self._files = [file for file, own in zip(files, truths, strict=True) if right[own]]
        self.asked = OtherImages(name, [own for own in truths if right[own]], right)
        if not self._files:
            raise ConfigError(
                f"test {name!r}: {folder} holds no image in a class folder that its class map knows",
                "name the folder whose subfolders are the classes, and the map made for it",
            )
        bordered = partial(without_border, border=border, pixels=pixels)
        self._decoder = ImageDecoder(None, bordered) if border else ImageDecoder(pixels, None)

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        files = [self._files[number] for number in numbers]
        images, _ = self._decoder.decode([file.read_bytes() for file in files], [*map(str, files)])
        return {"image": self._decoder.collate(images)}


def without_border(image: Image.Image, border: int, pixels: int) -> torch.Tensor:
    """uint8 [3, P, P] of the image without its border, resized and cut to the middle as all images are."""
    fitted = ImageOps.fit(ImageOps.crop(image, border), (pixels, pixels), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy())


def read_tests(file: str, pixels: int) -> list[FolderTest]:
    """The tests of a YAML file, if one is given; ConfigError: a file or folder is missing or not what it should be."""
    found: list[FolderTest] = []
    if not file:
        return found
    path = Path(file)
    try:
        for name, given in TypeAdapter(dict[str, Given]).validate_python(read(path)).items():
            folder = path.parent / given.folder
            own = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
            named = given.model_dump(exclude={"folder", "border"}, exclude_none=True)
            maps = {key: read(path.parent / file) for key, file in named.items()}
            found.append(FolderTest(name, folder, right_guesses(own, **maps), pixels, given.border))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        said = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error
        )
        fix = "correct it, or the file that it names: docs/how-to/train.md shows what each holds"
        raise ConfigError(f"{path}: {type(error).__name__}: {said}", fix) from error
    return found


def right_guesses(
    folders: Sequence[str],
    train_to_test: Mapping[str, int] | None = None,
    test_to_train: Mapping[str, str | Sequence[int]] | None = None,
    folder_labels: Mapping[str, str] | None = None,
    class_names: Sequence[str] = (),
) -> dict[str, set[str]]:
    """The classes of the training that are right for each class folder; folders are sorted.

    train_to_test: of each class of the training the place of its folder, or -1 (ImageNet-9's in_to_in9.json).
    test_to_train: of each folder, or of its name in folder_labels, the classes, or their names with "; " between them,
    which are lines of class_names (ObjectNet's files). Without either a folder's name is its class.
    """
    if train_to_test is not None:
        return {own: {one for one, at in train_to_test.items() if at == place} for place, own in enumerate(folders)}
    if test_to_train is None:
        return {own: {own} for own in folders}
    right: dict[str, set[str]] = {}
    for own in folders:
        listed = test_to_train.get(folder_labels[own] if folder_labels else own, ())
        if isinstance(listed, str):
            listed = [class_names.index(name.strip()) for name in listed.split(";")]
        right[own] = set(map(str, listed))
    return right


def read(path: Path) -> Any:
    """A JSON or YAML file, or the lines of a text."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".yaml", ".yml"):
        return yaml.safe_load(text)
    return json.loads(text) if path.suffix == ".json" else text.splitlines()
