"""CIFAR-10's photos to train on: with class prompts, or each with a caption that somebody wrote of another picture.

`write_photos` gives a photo a caption that mentions its class with probability `relevance`, else one that mentions no
class. One draw of photos has nested captions: a photo whose caption is relevant at 0.1 has the same one at 0.3 and 1.
Training photos are drawn from the first 40,000 of the training archive, in an order that mixes the classes; labels for
probes are of the next 5,000, and the last 5,000 are the validation split.

Captions are embedded once for all draws, by graphbuild; a tar holds each sample's vector beside its caption.
"""

from __future__ import annotations

import csv
import io
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.experiments.labelled import LabelledImages, decoded
from graphbuild.errors import ConfigError, InputError

if TYPE_CHECKING:
    from benchmarks.experiments.sources import Data

TEMPLATE = "a photo of a {}"
FOR_TRAINING, FOR_PROBES = 40_000, 5_000  # of the training archive; the others are the validation split
MENTIONS = {  # a caption is about a class where it has one of these words, and none of another class
    "airplane": "airplane airplanes aeroplane aeroplanes plane planes aircraft jet jets airliner airliners biplane",
    "automobile": "automobile automobiles car cars taxi taxis sedan convertible",
    "bird": "bird birds pigeon pigeons seagull seagulls gull gulls parrot parrots owl owls duck ducks goose geese",
    "cat": "cat cats kitten kittens",
    "deer": "deer stag stags fawn fawns elk moose reindeer",
    "dog": "dog dogs puppy puppies terrier terriers poodle poodles hound hounds",
    "frog": "frog frogs toad toads",
    "horse": "horse horses pony ponies foal foals",
    "ship": "ship ships boat boats ferry ferries yacht yachts sailboat sailboats",
    "truck": "truck trucks lorry lorries",
}
_WORDS = {name: re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.IGNORECASE) for name, words in MENTIONS.items()}


def mentioned(caption: str) -> list[str]:
    """The classes that a caption mentions."""
    return [name for name, words in _WORDS.items() if words.search(caption)]


def pool_of(captions: Sequence[str], photos: int) -> dict[str, list[str]]:
    """Captions about each class alone, and under "" about none, drawn from a list: as many as photos of each class and
    of all, or all that the list has."""
    ordered = sorted(set(captions))
    random.Random("captions").shuffle(ordered)
    found: dict[str, list[str]] = {name: [] for name in ("", *MENTIONS)}
    for text in ordered:
        about = mentioned(text)
        if len(about) > 1:
            continue
        listed = found[about[0] if about else ""]
        if len(listed) < (photos // len(MENTIONS) if about else photos):
            listed.append(text)
    if missing := [name or "none of the classes" for name, listed in found.items() if not listed]:
        raise InputError(f"no caption mentions {', '.join(missing)}", "give a list of more captions with --captions")
    return found


def drawn_captions(
    pool: dict[str, list[str]], classes: Sequence[str], relevance: float, generator: random.Random
) -> list[str]:
    """A caption for each photo, by its class. A pool smaller than the photos is dealt again."""
    decks: dict[str, Iterator[str]] = {name: _dealt(listed, generator) for name, listed in sorted(pool.items())}
    about, other = [next(decks[name]) for name in classes], [next(decks[""]) for _ in classes]
    chances = [generator.random() for _ in classes]
    return [mine if chance < relevance else its for mine, its, chance in zip(about, other, chances, strict=True)]


def _dealt(texts: Sequence[str], generator: random.Random) -> Iterator[str]:
    order = list(texts)
    while True:
        generator.shuffle(order)
        yield from list(order)


def draw_of(photos: int, draw: int | None) -> tuple[list[int], random.Random]:
    """The numbers of a draw's photos in the training archive, and what draws their captions."""
    generator = random.Random(f"photos {draw}")
    return sorted(generator.sample(range(FOR_TRAINING), photos)), generator


def photos_of(archive: Path, numbers: Sequence[int], pixels: int = 32) -> LabelledImages:
    """Some photos of an archive, and their classes."""
    pictures, classes = read_cifar(archive, max(numbers) + 1)
    return decoded([pictures[n] for n in numbers], {"class": [classes[n] for n in numbers]}, pixels)


def write_photos(data: Data, root: Path, shards: Path, cifar: Path | None, captions: Path | None) -> None:
    """The tars of a draw, and probe.npz and test.npz."""
    archive = _folder_of(cifar) / "cifar_train.tar.xz"
    pictures, classes = read_cifar(archive, FOR_TRAINING)
    chosen, generator = draw_of(data.train, data.draw)
    kinds = [classes[number] for number in chosen]
    texts, vectors = [TEMPLATE.format(kind) for kind in kinds], {}
    if data.relevance is not None:
        if captions is None:
            raise ConfigError("this recipe trains with captions", "--captions FILE, parquet with the column caption")
        pool, vectors = embedded_pool(captions, data.train, root.parent)
        texts = drawn_captions(pool, kinds, data.relevance, generator)

    def samples() -> Iterator[dict[str, bytes]]:
        for number, kind, text in zip(chosen, kinds, texts, strict=True):
            sample = {"jpg": pictures[number], "txt": text.encode(), "cls": kind.encode()}
            if vectors:
                content = io.BytesIO()
                np.save(content, vectors[text])
                sample["npy"] = content.getvalue()
            yield sample

    write_tars(shards, samples(), data.shard_size)
    tested = archive if data.validation else archive.with_name("cifar_test.tar.xz")
    first = FOR_TRAINING + FOR_PROBES if data.validation else 0
    for name, part, numbers in (
        ("probe", archive, range(FOR_TRAINING, FOR_TRAINING + data.probe)),
        ("test", tested, range(first, first + data.test)),
    ):
        kept = root.parent / f"photos-{part.name}-{numbers.start}-{numbers.stop}-{data.pixels}.npz"
        if not kept.exists():
            photos_of(part, numbers, data.pixels).save(kept)
        (root / f"{name}.npz").unlink(missing_ok=True)
        (root / f"{name}.npz").hardlink_to(kept)  # the same for all draws


@lru_cache(maxsize=1)
def embedded_pool(captions: Path, photos: int, parent: Path) -> tuple[dict[str, list[str]], dict[str, NDArray[Any]]]:
    """The pool of a list of captions, and the unit vector of each, which graphbuild makes once, under `parent`."""
    from benchmarks.experiments.sources import fingerprint, graphbuild

    every = [" ".join(text.split()) for text in pq.read_table(captions)["caption"].to_pylist()]
    pool = pool_of(every, photos)
    texts = [text for listed in pool.values() for text in listed]
    folder = parent / f"captions-{fingerprint(texts)}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "vectors.npy").exists():
        return pool, dict(zip(texts, np.load(folder / "vectors.npy"), strict=True))
    with (folder / "pool.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["caption"], *([text] for text in texts)])
    graphbuild("embed", folder / "store", "--captions", folder / "pool.csv")
    nodes = [
        pq.read_table(path, columns=["text"])["text"].to_pylist()
        for path in sorted(folder.glob("store/nodes/*.parquet"))
    ]
    rows = np.concatenate([np.load(path) for path in sorted(folder.glob("store/nodes/*.npy"))])
    by_text = dict(zip((text for part in nodes for text in part), rows, strict=True))
    np.save(folder / "vectors.npy", [by_text[text] for text in texts])
    return pool, {text: by_text[text] for text in texts}


def write_cifar(data: Data, root: Path, shards: Path, cifar: Path | None, captions: Path | None) -> None:
    """The first photos of the training archive with their class as the caption, and probe.npz and test.npz."""
    pictures, classes = read_cifar(_folder_of(cifar) / "cifar_train.tar.xz", data.train)
    names = sorted(set(classes))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    samples = (
        {"jpg": picture, "cls": str(names.index(name)).encode()}
        for picture, name in zip(pictures, classes, strict=True)
    )
    write_tars(shards, samples, data.shard_size)
    decoded(pictures[: data.probe], {"class": classes[: data.probe]}, data.pixels).save(root / "probe.npz")
    pictures, classes = read_cifar(_folder_of(cifar) / "cifar_test.tar.xz", data.test)
    decoded(pictures, {"class": classes}, data.pixels).save(root / "test.npz")


def _folder_of(cifar: Path | None) -> Path:
    if cifar is None:
        fix = "--cifar FOLDER, with cifar_train.tar.xz, cifar_test.tar.xz"
        raise ConfigError("this recipe trains on CIFAR-10", fix)
    return cifar


def read_cifar(path: Path, count: int) -> tuple[list[bytes], list[str]]:
    """`count` images of an archive of SPLIT/CLASS/NUMBER.jpg and their classes, in an order that mixes the classes."""
    if not path.exists():
        raise InputError(f"there is no {path}", "--cifar names the folder that holds it")
    found = _members(path)
    if len(found) < count:
        raise InputError(f"{path} holds {len(found):,} images, not {count:,}", "lower the recipe's number of images")
    return [content for _, content in found[:count]], [name.split("/")[-2] for name, _ in found[:count]]


@lru_cache(maxsize=2)
def _members(path: Path) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".jpg"):
                content = archive.extractfile(member)
                assert content is not None
                found.append((member.name, content.read()))
    found.sort()
    random.Random("cifar").shuffle(found)
    return found


def write_tars(folder: Path, samples: Iterator[dict[str, bytes]], shard_size: int) -> None:
    """Samples, each a file for each extension, in tars of `shard_size`."""
    archive = None
    for row, members in enumerate(samples):
        if row % shard_size == 0:
            if archive is not None:
                archive.close()
            archive = tarfile.open(folder / f"{row // shard_size:05d}.tar", "w")  # noqa: SIM115
        assert archive is not None
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{row:08d}.{extension}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    if archive is not None:
        archive.close()
