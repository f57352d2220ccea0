"""The recipe: every setting of a job, with its default and meaning, in one place.

A job's resolved recipe lies in STORE/recipe.yaml, every default written out. The options of the command line are made
from the fields here and change it. Read wherever the CLI starts: fsspec and yaml wait until a recipe is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graphbuild.errors import public

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SOURCES = ("shards", "captions", "vectors")  # of embed; none of them: the store's own tars
BESIDE = "shards and vectors"  # of embed: tars with a vector for each sample, in files beside them or in a member
TARS, CAPTIONED = ("", "shards"), ("", "shards", "captions")  # sources that are tars, and whose captions are encoded
ENCODING = ("prompt", "prompt_name", "trust_remote_code", "dim", "precision", "device")  # not of a matrix
Preset = Literal["cc3m", "cc12m"]
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Device = Literal["auto", "cpu", "cuda"]
EmbeddingKind = Literal["int8", "float16", "sketch:64", "none"]
Layout = Literal["sidecars", "inline", "clustered", "columns"]
Mark = Literal["path", "files", "of source", "switch"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def setting(
    default: Any, description: str, *marks: Mark, unset: str = "", sources: Sequence[str] = (), **limits: Any
) -> Any:
    """A field of a section.

    unset: what happens while it is None. sources: the kinds of source it is read with; none: all. marks: "path": a
    local file, made absolute. "files": of it several may be given. "of source": it describes one kind of source, and
    goes back to its default with another. "switch": of security; no store remembers it.
    """
    extra: Any = {"marks": marks, "unset": unset, "sources": sources}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Download(Section):
    """URL list to tars, through img2dataset."""

    urls: str | None = setting(
        None, "URL list: parquet, CSV, TSV, JSONL; files, folders or patterns", "path", "files", min_length=1
    )
    preset: Preset | None = setting(None, "a published headerless TSV")
    url_column: str = setting("url", "its column of URLs")
    caption_column: str = setting("caption", "its column of captions")
    shard_size: int = setting(10_000, "URLs a shard", ge=1, le=1_000_000)
    image_size: int = setting(256, "pixels", ge=1)
    resize_mode: ResizeMode = setting("keep_ratio", "what the size bounds")
    resize_only_if_bigger: bool = setting(True, "never enlarge")
    encode_quality: int = setting(95, "JPEG quality of resized images", ge=1, le=100)
    timeout_seconds: float = setting(10, "to connect, and between two packets", gt=0)
    retries: int = setting(1, "of errors that may pass: time-outs, resets, busy servers", ge=0)
    min_bytes: int = setting(0, "a smaller file is refused", ge=0)
    max_bytes: int = setting(50_000_000, "a larger file is refused", ge=1)
    max_pixels: int = setting(100_000_000, "a larger image is refused before it is decoded", ge=1)
    min_image_size: int = setting(0, "pixels; an image with a smaller side is refused", ge=0)
    max_aspect_ratio: float | None = setting(
        None, "longer side to shorter; an image with a larger one is refused", unset="any", ge=1
    )
    host_connections: int = setting(8, "at a time to one host, of one worker", ge=1)
    allow_private_hosts: bool = setting(
        False, "also fetch from addresses that are not public; not remembered by the store", "switch"
    )
    user_agent_token: str | None = setting(
        None,
        "whom sites may address when they opt out, with commas between",
        unset="graphbuild and img2dataset, which always count",
        min_length=1,
    )
    robots_txt: bool = setting(False, "read each host's robots.txt, and fetch nothing that it forbids")
    ignore_opt_out: bool = setting(
        False, "fetch also what sites opt out of (X-Robots-Tag, ...); not remembered by the store", "switch"
    )
    proxy: str | None = setting(
        None,
        "http://HOST:PORT, or env: as http_proxy, https_proxy and no_proxy say; not remembered by the store",
        "switch",
        unset="none",
    )
    threads: int = setting(32, "requests at a time, a worker", ge=1)

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, proxy: str | None) -> str | None:
        if proxy not in (None, "env") and not re.fullmatch(r"http://([^/?#@\s]+@)?[^/?#@\s]+/?", str(proxy)):
            raise ValueError("it must be env, or http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT")
        return proxy

    @model_validator(mode="after")
    def _check_bytes(self) -> Download:
        if self.min_bytes > self.max_bytes:
            raise ValueError(f"min_bytes {self.min_bytes:,} is over max_bytes {self.max_bytes:,}: no file would fit")
        return self


class Pack(Section):
    """Images of other layouts to tars, byte for byte."""

    source: str | None = setting(
        None,
        "parquet, or folders of images with metadata or texts: files, folders or patterns",
        "path",
        "files",
        min_length=1,
    )
    image_column: str | None = setting(
        None, "of images, or of their paths", unset="the one of bytes, or file_name", min_length=1
    )
    caption_column: str | None = setting(None, "becomes txt", unset="txt, caption or text", min_length=1)
    key_column: str | None = setting(None, "of keys, unique in a tar", unset="numbers", min_length=1)
    image_size: int | None = setting(
        None, "pixels of the shorter side; larger images become JPEGs of it", unset="images stay as they are", ge=1
    )
    shard_size: int = setting(10_000, "rows a tar", ge=1, le=1_000_000)


class Embed(Section):
    """Captions to nodes. The source is the store's own tars unless shards, captions or vectors is given."""

    shards: str | None = setting(
        None, "tars made elsewhere: a folder, or 'cc3m/{0000..0331}.tar', 'cc3m/*.tar'", "path", "files", min_length=1
    )
    captions: str | None = setting(
        None, "a caption list: parquet, CSV, TSV, JSONL; a file, folder or pattern", "path", "files", min_length=1
    )
    vectors: str | None = setting(
        None, "ready vectors: .npy [n, d], .npz, parquet; with --shards: each sample's", "path", "files", min_length=1
    )
    preset: Preset | None = setting(None, "a published headerless TSV", "of source", sources=["captions"])
    caption_column: str = setting("caption", "of --captions; 'a;b': of several", "of source", sources=["captions"])
    key_column: str | None = setting(
        None,
        "of --captions; of --vector-keys, or of the vectors' own parquet",
        "of source",
        unset="the row number; key",
        sources=["captions", BESIDE],
    )
    vector_column: str = setting("embedding", "of parquet or .npz --vectors", "of source", sources=["vectors", BESIDE])
    vector_keys: str | None = setting(
        None,
        "lists of the vectors' keys, a file for each: parquet, CSV, TSV or JSONL",
        "path",
        "files",
        "of source",
        unset="joined by order",
        sources=[BESIDE],
        min_length=1,
    )
    vector_member: str | None = setting(
        None,
        "of --shards: the extension of members that hold each sample's vector, as npy",
        "of source",
        unset="none",
        sources=[BESIDE],
        min_length=1,
    )
    caption_member: str = setting(
        "auto",
        "in tars: txt, cls, or json:FIELD, a text or a list of texts; auto: txt, else json:caption; txt:lines: each"
        " line is one; 'txt;json:FIELD': several",
        "of source",
        sources=[*TARS, BESIDE],
    )
    caption_weights: str | None = setting(
        None,
        "of several captions, as 0.3,0.7; json:FIELD or a column: a list for each sample",
        "of source",
        unset="all alike",
        sources=CAPTIONED,
    )
    image_member: str | None = setting(
        None,
        "in tars: the image's extension, if there are several",
        "of source",
        unset="jpg, png, ... before x.png",
        sources=[*TARS, BESIDE],
        min_length=1,
    )
    class_names: str | None = setting(
        None,
        "text file, one name a line, if the member is a class number",
        "path",
        "of source",
        sources=[*TARS, BESIDE],
        min_length=1,
    )
    template: str = setting(
        "{}",
        "text around it, 'a photo of a {}', or several fields, '{title}. {text}'",
        "of source",
        sources=[*CAPTIONED, BESIDE],
    )
    shard_size: int = setting(
        10_000, "rows a shard of a list or of vectors", sources=["captions", "vectors"], ge=1, le=1_000_000
    )
    encoder: str = setting(
        DEFAULT_ENCODER, "sentence-transformers name or folder, or matrix:FILE.npy", sources=CAPTIONED, min_length=1
    )
    prompt: str | None = setting(None, "put before each text, for the encoder", unset="its own", sources=CAPTIONED)
    prompt_name: str | None = setting(
        None,
        "the same: one of the encoder's own prompts, as query",
        unset="its default",
        sources=CAPTIONED,
        min_length=1,
    )
    trust_remote_code: bool = setting(
        False, "run the code that comes with the encoder; not remembered by the store", "switch", sources=CAPTIONED
    )
    dim: int | None = setting(
        None, "first coordinates kept, of Matryoshka encoders", unset="all", sources=CAPTIONED, ge=1
    )
    precision: Precision = setting("auto", "of the encoder's arithmetic", sources=CAPTIONED)
    device: Device = setting("auto", "where to compute", sources=CAPTIONED)

    @model_validator(mode="after")
    def _check(self) -> Embed:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1 and given != BESIDE.split(" and "):
            raise ValueError(f"{' and '.join(given)} exclude each other: give one source")
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError("prompt and prompt_name exclude each other: give one of them")
        if self.vectors is not None and self.vector_member is not None:
            raise ValueError("vectors and vector_member exclude each other: give one place of the vectors")
        sources, weights = self.caption_sources, self.weights
        if not all(sources) or len(set(sources)) < len(sources) or len(sources) > 100:
            raise ValueError(f"{';'.join(sources)!r} must name 1 to 100 sources of captions, each once")
        if len(sources) > 1 and self.class_names is not None:
            raise ValueError("class names belong to one caption member: give it alone, or drop class_names")
        if isinstance(weights, list) and (
            len(weights) != len(sources) or not all(0 <= each < math.inf for each in weights) or not sum(weights) > 0
        ):
            raise ValueError(
                f"caption_weights {self.caption_weights!r} must be {len(sources)} numbers of 0 or more, not all 0:"
                f" one for each of {';'.join(sources)}"
            )
        if isinstance(weights, str) and self.captions is None and not weights.startswith("json:"):
            raise ValueError(f"caption_weights {weights!r} is neither numbers, as 0.3,0.7, nor json:FIELD")
        return self

    @property
    def caption_sources(self) -> list[str]:
        """The members of tars, or the columns of a list, that hold captions."""
        return (self.caption_member if self.captions is None else self.caption_column).split(";")

    @property
    def weights(self) -> list[float] | str | None:
        """caption_weights: a number for each source of captions, or the name of a column or json:FIELD."""
        try:
            return [float(part) for part in (self.caption_weights or "").split(",")]
        except ValueError:
            return self.caption_weights

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template.count("{}") + bool(re.search(r"\{(?!\d+\})[^{}]+\}", template)) != 1:
            raise ValueError(f"{template!r} must contain {{}} once, the caption's place, or {{fields}} by their names")
        return template

    @field_validator("image_member", "vector_member")
    @classmethod
    def _extension(cls, member: str | None) -> str | None:
        return None if member is None else member.lower().removeprefix(".")

    @property
    def source(self) -> str:
        """The kind of source: shards, captions, vectors, BESIDE, or "" for the store's own tars."""
        return source_of(vars(self))

    @property
    def beside_tars(self) -> list[str]:
        """What other settings than shards name: it may lie in the tars' folder."""
        return [path for path in (self.class_names, self.vectors, self.vector_keys) if path is not None]

    @property
    def is_ready(self) -> bool:
        """Whether vectors are given, and no encoder makes them."""
        return self.source in ("vectors", BESIDE)


def source_of(settings: Mapping[str, Any]) -> str:
    """`Embed.source` of settings by name."""
    given = [name for name in SOURCES if settings.get(name) is not None]
    if given == BESIDE.split(" and ") or (given == ["shards"] and settings.get("vector_member") is not None):
        return BESIDE
    return (given or [""])[0]


MOST_NEIGHBORS = 2048
NEIGHBORS = 64  # where none is asked for


class Index(Section):
    """Nodes to the k-nearest-neighbour graph, with its recall certificate."""

    k: int | None = setting(
        None,
        "neighbours a node; 0: all others, 2,048 at most",
        unset=f"{NEIGHBORS}, or all others where there are fewer",
        ge=0,
        le=MOST_NEIGHBORS,
    )
    engine: str = setting("auto", "auto, exact, partition or faiss:FACTORY")
    recall: float = setting(0.99, "recall@k to aim for, unless exact", gt=0, lt=1)
    min_recall: float | None = setting(
        None, "fail below this recall@k", unset="0.999 if exact, else --recall less 0.01", ge=0, le=1
    )
    recall_sample: int = setting(10_000, "nodes searched again by brute force for the certificate, at most", ge=1)
    recall_width: float = setting(0.03, "of recall's 95% interval at which no more nodes are searched", ge=0, le=1)
    memory: float = setting(4, "GB a worker may take", gt=0)
    seed: int = setting(0, "draws leaders and samples", ge=0)
    device: Device = setting("auto", "where to compute")

    def neighbors(self, nodes: int) -> int:
        """k, of a graph of so many nodes."""
        return self.k or min(nodes - 1, NEIGHBORS if self.k is None else MOST_NEIGHBORS)

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: str) -> str:
        if engine not in ("auto", "exact", "partition") and not (engine.startswith("faiss:") and engine[6:].strip()):
            raise ValueError(f"{engine!r} is none of auto, exact, partition, faiss:FACTORY")
        return engine


class Export(Section):
    """Graph to sidecars beside the tars, to new tars, or to columns for the files that were packed."""

    embeddings: EmbeddingKind = setting("int8", "carried by the sidecars")
    layout: Layout = setting(
        "sidecars",
        "sidecars beside the tars; new tars with the fields inside, or in neighbour order; parquet beside packed files",
    )
    selection: str | None = setting(None, "only the samples of a selection: its NAME, or a .parquet", min_length=1)
    chunk: int = setting(32, "of clustered: neighbours shuffled as one", ge=2, le=4096)
    shard_size: int = setting(10_000, "of clustered: samples a tar", ge=1, le=1_000_000)


class Recipe(Section):
    download: Download = Field(default_factory=Download)
    pack: Pack = Field(default_factory=Pack)
    embed: Embed = Field(default_factory=Embed)
    index: Index = Field(default_factory=Index)
    export: Export = Field(default_factory=Export)

    def dump(self) -> str:
        """The recipe as a store keeps it: every setting that is remembered, with its value; of URLs what is public."""
        import yaml

        values = self.model_dump()
        for section, name in marked("switch"):
            del values[section][name]
        for section, name in marked("path"):
            values[section][name] = values[section][name] and public(values[section][name])
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # three times as fast, where PyYAML has libyaml
        return yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True)


SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}


def marked(mark: Mark) -> list[tuple[str, str]]:
    """Section and name of each setting that has the mark."""
    fields = ((section, name, field) for section, cls in SECTIONS.items() for name, field in cls.model_fields.items())
    return [(section, name) for section, name, field in fields if mark in field.json_schema_extra["marks"]]


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"
