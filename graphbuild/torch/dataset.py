"""GraphDataset: the samples of tars in any order, with the fields that `graph_webdataset` streams.

Images are read where they lie in the tars, by the sidecars' offsets; fields come from the store's mapped arrays or from
memory. A random batch over a thousand tars opens no sidecar.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from webdataset.tariterators import base_plus_ext

from graphbuild.errors import ConfigError, ShardError
from graphbuild.export.sidecar import SidecarHeader, read_columns, text_columns
from graphbuild.nodes.samples import MORE
from graphbuild.sources.ranges import TarRanges, member_behind
from graphbuild.sources.tars import image_extension
from graphbuild.store.remote import READERS
from graphbuild.torch.captions import CaptionChoice, check_choice, drawn, gathered, spread
from graphbuild.torch.epochs import Position
from graphbuild.torch.fields import SidecarFields, StoreFields
from graphbuild.torch.images import BadImages, ImageDecoder
from graphbuild.torch.shards import Selected, Shard, check_same_graph, check_tar_size, find_shards, selected_shards

if TYPE_CHECKING:
    from graphbuild.graph.sample_graph import SampleGraph

OF_TEXTS = ("weight", *(f"{MORE}.list.element.{name}" for name in ("caption", "node", "weight")))
RESTORE = "the sidecar was changed or is another tar's: run `graphbuild export` again"
HEADERS = 16  # blocks of 512 bytes that may hold a member's headers, with a long name


class SampleIndexError(ShardError, IndexError):
    """An index that names no sample. An IndexError too, which is how Python ends a loop over a sequence."""


class Samples(Sequence[dict[str, Any]]):
    """Samples as a DataLoader expects them, one by one, over fields that were read and are collated together."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(self.fields["key"])

    def __getitem__(self, index: Any) -> Any:
        return {name: values[index] for name, values in self.fields.items()}


class GraphDataset(Dataset[dict[str, Any]]):
    """Samples by index, for any sampler, from the tars and sidecars that `graph_webdataset` streams.

    Use it behind `DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=n)`; a sampler of
    single indices goes with batch_size=B. A batch is what `graph_webdataset` gives for these samples, without `extra`.
    Items are the samples with a node and an image, in order of tars and rows; `nodes` int64 [n] tells a sampler the
    node of each.

    Memory: 32 bytes a sample (12 million: 0.4 GB) and its key and caption; without `graph` also the sidecars' columns,
    once a distinct node: 6 k + d + 16 bytes (int8, d = 384, k = 64: 784 bytes). Forked workers share all of it; spawned
    ones copy it. Opening reads 6 columns of every sidecar, without `graph` all. A batch costs one pread (remote: one
    ranged request, all of a batch at once) for each image, with the 512 bytes before it, which must be the header of
    the sample's image; and with `graph`, whose files are memory-mapped, some pages a sample.

    Args:
        urls, sidecars, image_pixels, transform, bad_images: as for `graph_webdataset`. Tars must not be compressed.
        graph: the store that the sidecars were exported from, to take the fields from. Embeddings are then the store's
            float16 ones, whatever the sidecars hold.
        captions: of samples that have several, as for `graph_webdataset`; "draw" is by `seed` and the epoch last set.
            "all" gives batches only.
        selection: as for `graph_webdataset`.

    Raises:
        ConfigError: an option out of range, a pattern that names no tar, or a graph that is not the sidecars'.
        ShardError: here or on reading, also out of workers: a tar or sidecar is missing, damaged, of another size,
            format version or graph; the bytes at a sample's place are not its image; an index is out of range, or
            twice in a batch.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        graph: SampleGraph | None = None,
        sidecars: str | os.PathLike[str] | None = None,
        image_pixels: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        bad_images: BadImages = "raise",
        captions: CaptionChoice = "first",
        seed: int = 0,
        selection: Selected = None,
    ) -> None:
        self._decoder = ImageDecoder(image_pixels, transform, bad_images)
        self.shards = selected_shards(find_shards(urls, sidecars), selection)
        with ThreadPoolExecutor(READERS) as pool:
            headers, parts = zip(*pool.map(read_samples, self.shards), strict=True)
        header = headers[0]
        for shard, own in zip(self.shards, headers, strict=True):
            check_same_graph(shard, own, header)
        self._first_item = np.cumsum([0, *map(len, parts)])
        check_choice(captions, header if graph is None else None)
        self._captions, self._seed, self._epoch = captions, seed, Position()
        samples = pa.concat_tables(parts, promote_options="default")
        numbers = ("row", "position", "offset", "size")
        self._row, self._position, self._offset, self._size = (np.array(samples[name]) for name in numbers)
        texts, self._first_more = text_columns(samples)
        self._nodes, self._weight = np.array(texts["node"]), np.array(texts["weight"])
        self.nodes = self._nodes[: len(samples)]
        self._strings = {"key": texts["key"], "caption": texts["caption"]}
        if not len(self):
            chosen = " and is selected" if selection is not None else ""
            cause = f"{self.shards[0].sidecar}: no sample here or in the others has a node{chosen}"
            raise ShardError(cause, "name other tars")
        self._fields: SidecarFields | StoreFields = (
            SidecarFields(self.shards, header, self.nodes if captions == "first" else self._nodes)
            if graph is None
            else StoreFields(graph, self.shards[0].sidecar, header)
        )
        self._image_member = header.image_member
        self._tars = TarRanges([shard.tar for shard in self.shards])

    def set_epoch(self, epoch: int) -> None:
        """Choose the captions that samples read from now on have, with captions="draw"; alike on all ranks."""
        self._epoch.set(epoch, 0)

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: the fields of a batch without the dimension B, image uint8 [3, H, W]."""
        if self._captions == "all":
            raise ConfigError(
                'captions="all" gives batches', "read it by a batch_sampler, or by a sampler and batch_size"
            )
        sample: dict[str, Any] = self.__getitems__([index])[0]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        """Many samples, which is how a DataLoader asks for a batch; their bytes are read tar by tar."""
        items = self._checked(indices)
        tars = np.searchsorted(self._first_item, items, side="right") - 1
        keys = self._of("key", items)
        images = self._images(items, tars, keys)
        names = [
            f"{self.shards[tar].tar}: sample {position}, key {key!r}"
            for tar, position, key in zip(tars.tolist(), self._position[items].tolist(), keys, strict=True)
        ]
        pictures, places = self._decoder.decode(images, names)
        items = items[places]
        texts, offsets = (
            (items, np.arange(len(items) + 1)) if self._captions == "first" else spread(items, self._first_more)
        )
        if self._captions == "draw":
            epoch = self._epoch.get()["epoch"]
            texts = texts[drawn(self._row[items], self._weight[texts], offsets, seed=self._seed, epoch=epoch)]
        columns = {"node": self._nodes[texts], **self._fields.take(self._nodes[texts])}
        captions = self._of("caption", texts)
        columns, captions = gathered(self._captions, columns, captions, self._weight[texts], offsets)
        return Samples(
            {
                "image": pictures,
                "caption": captions,
                "key": self._of("key", items),
                "row": torch.from_numpy(self._row[items]),
                **{name: torch.from_numpy(column) for name, column in columns.items()},
            }
        )

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of some samples, as `graph_webdataset` gives it."""
        if isinstance(samples, Samples):
            batch = dict(samples.fields)
        else:
            batch = {name: [sample[name] for sample in samples] for name in samples[0]}
            for name in batch.keys() - {"image", "partner", "caption", "key"}:
                batch[name] = torch.stack(batch[name])
        batch["image"] = self.collate_images(batch["image"])
        return batch

    def collate_images(self, images: list[Any]) -> Any:
        """Images, or what the transform gave of each, as a batch has them."""
        return self._decoder.collate(images)

    def _checked(self, indices: Sequence[int]) -> NDArray[np.int64]:
        items = np.asarray(indices)
        if items.ndim != 1 or (len(items) and items.dtype.kind not in "iu"):
            raise SampleIndexError(f"{indices!r} are no indices", "index it by whole numbers")
        wrong = (items < 0) | (items >= len(self))
        if wrong.any():
            raise SampleIndexError(
                f"index {items[wrong][0]} is not in 0..{len(self) - 1}, the samples of {self.shards[0].tar} to"
                f" {self.shards[-1].tar}",
                "let the sampler draw from len(dataset)",
            )
        once, places = np.unique(items, return_index=True)
        if len(once) < len(items):
            item = int(np.delete(items, places)[0])
            tar = int(np.searchsorted(self._first_item, item, side="right")) - 1
            raise SampleIndexError(
                f"{self.shards[tar].tar}: sample {self._position[item]}, key {self._strings['key'][item].as_py()!r}"
                f" (index {item}) is twice in one batch: its views would be each other's negatives",
                "use a sampler without replacement",
            )
        return items.astype(np.int64)

    def _of(self, name: str, places: NDArray[np.int64]) -> list[str]:
        """Some of the keys or captions."""
        column = self._strings[name]
        return [column[place].as_py() for place in places.tolist()]

    def _images(self, items: NDArray[np.int64], tars: NDArray[np.int64], keys: list[str]) -> list[bytes]:
        """The encoded images of some items: each checked to be the member that the sidecar names."""
        offsets, sizes = self._offset[items], self._size[items]
        contents = self._tars.read(tars, offsets - tarfile.BLOCKSIZE, offsets + sizes)
        for i, (key, size) in enumerate(zip(keys, sizes.tolist(), strict=True)):
            header, contents[i] = contents[i][: tarfile.BLOCKSIZE], contents[i][tarfile.BLOCKSIZE :]
            try:
                member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError:
                member = None
            if len(contents[i]) < size or not is_image(member, key, size, self._image_member):
                self._check_at_length(int(items[i]), int(tars[i]), key, len(contents[i]))
        return contents

    def _check_at_length(self, item: int, tar: int, key: str, bytes_found: int) -> None:
        """The same with the blocks in front, which may hold a long name; a ShardError if the image is not there."""
        offset, size, shard = int(self._offset[item]), int(self._size[item]), self.shards[tar]
        start = offset - min(offset // tarfile.BLOCKSIZE, HEADERS) * tarfile.BLOCKSIZE
        blocks = self._tars.read(np.array([tar]), np.array([start]), np.array([offset]))[0]
        member = member_behind(blocks) if len(blocks) == offset - start else None
        if bytes_found == size and is_image(member, key, size, self._image_member):
            return
        found = f"{member.name!r} of {member.size:,} bytes begins" if member else "no member begins"
        if bytes_found < size:
            found = f"the tar ends within {size:,} bytes of it"
        position = int(self._position[item])
        raise ShardError(
            f"{shard.tar}: at byte {offset:,} {found}; {shard.sidecar} has there the image of sample {position}, key"
            f" {key!r}, {size:,} bytes (row {self._row[item]} of the store)",
            "the tar was changed, reordered or swapped after the export: restore it, or embed and export again",
        )


def is_image(member: tarfile.TarInfo | None, key: str, size: int, wanted: str | None) -> bool:
    """Whether a tar member is the image of that size and that sample's key; wanted: the sidecar's image_member."""
    if member is None or member.size != size or not member.isreg():
        return False
    name, extension = base_plus_ext(member.name)
    return name == key and image_extension([extension.lower()], wanted) is not None


def read_samples(shard: Shard) -> tuple[SidecarHeader, pa.Table]:
    """The header of a shard's sidecar, which must fit the tar's size and itself, and its samples with node and image.

    Columns, in tar order: row int64; position int32, in the tar; node int64; offset int64 and size int32 of the image;
    key, caption; and where samples have several captions weight, and MORE with caption, node and weight.

    Raises:
        ShardError: it does not, or a tar is compressed.
    """
    names = ["row", "key", "node", "caption", "image_offset", "image_size"]
    header, table = read_columns(shard.sidecar, names, OF_TEXTS)
    check_tar_size(shard, header)
    table = shard.selected(table)
    row = table.column("row").to_numpy()
    if header.chunk is None and len(row) and not np.array_equal(row, row[0] + np.arange(len(row))):
        place = int((row != row[0] + np.arange(len(row))).argmax())
        raise ShardError(f"{shard.sidecar}: row {row[place]} follows {row[place - 1]} (sample {place})", RESTORE)
    named, placed, sized = (table.column(name).is_valid().to_numpy() for name in ("node", "image_offset", "image_size"))
    usable = named & placed & sized
    if named.any() and not usable.any():
        raise ShardError(
            f"{shard.sidecar}: no image has a place in {shard.tar}: the tar is compressed, or holds no images",
            "unpack it (gunzip) and embed again, or read it with graph_webdataset",
        )
    table = table.filter(pa.array(usable))
    position = np.flatnonzero(usable).astype(np.int32)
    offset, size = (table.column(name).to_numpy() for name in ("image_offset", "image_size"))
    bytes_total = header.tar.bytes if header.tar else np.iinfo(np.int64).max
    outside = (offset < tarfile.BLOCKSIZE) | (size < 0) | (size > np.minimum(bytes_total - offset, 2**31 - 1))
    if outside.any():
        place = int(outside.argmax())
        raise ShardError(
            f"{shard.sidecar}: sample {position[place]} (row {row[position[place]]}) has its image at byte"
            f" {offset[place]:,}, {size[place]:,} bytes long: not within {shard.tar}",
            RESTORE,
        )
    columns = {"row": row[usable], "position": position, "offset": offset, "size": size.astype(np.int32)}
    texts = [name for name in ("node", "key", "caption", "weight", MORE) if name in table.column_names]
    return header, pa.table(columns | {name: table[name] for name in texts})
