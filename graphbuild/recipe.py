"""The recipe: every setting of a job, with its default and meaning, in one place.

A job's resolved recipe lies in STORE/recipe.yaml, every default written out; options of the command line change it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from graphbuild.errors import ConfigError
from graphbuild.remote import file_system, reaching
from graphbuild.store import Store

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
Preset = Literal["cc3m", "cc12m"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Download(Section):
    """URL list to tars, through img2dataset."""

    urls: str | None = Field(None, min_length=1, description="list of URLs: parquet, CSV, TSV or JSONL")
    preset: Preset | None = Field(None, description="a published headerless TSV: column order and names")
    url_column: str = "url"
    caption_column: str = "caption"
    shard_size: int = Field(10_000, ge=1, le=1_000_000, description="URLs a shard")
    image_size: int = Field(256, ge=1, description="pixels; what it bounds depends on resize_mode")
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio"
    resize_only_if_bigger: bool = True
    encode_quality: int = Field(95, ge=1, le=100, description="JPEG quality of resized images")
    timeout_seconds: float = Field(10, gt=0, description="for connecting, and between two packets")
    retries: int = Field(1, ge=0, description="of errors that may pass: time-outs, resets, busy servers")
    max_bytes: int = Field(50_000_000, ge=1, description="a larger file is refused")
    max_pixels: int = Field(100_000_000, ge=1, description="a larger image is refused before it is decoded")
    host_connections: int = Field(8, ge=1, description="at a time to one host, of one worker")
    allow_private_hosts: bool = Field(False, description="also fetch from addresses that are not public")
    threads: int = Field(32, ge=1, description="concurrent requests of one worker")


class Embed(Section):
    """Captions to nodes. The source is the store's own tars unless shards, captions or vectors is given."""

    shards: str | None = Field(None, min_length=1, description="tars made elsewhere: a path with *, ? or {0000..0331}")
    captions: str | None = Field(None, min_length=1, description="a caption list: parquet, CSV, TSV or JSONL")
    vectors: str | None = Field(None, min_length=1, description="ready vectors: .npy [n, d] or parquet; one node a row")
    preset: Preset | None = None
    caption_column: str = "caption"
    key_column: str | None = Field(None, description="names the samples of a list; default: the row number")
    vector_column: str = "embedding"
    caption_member: str = Field(
        "auto", description="tar member with the caption: txt, cls, json:FIELD; auto: txt, then json:caption"
    )
    class_names: str | None = Field(
        None, min_length=1, description="text file, a name a line, for members that hold a class number"
    )
    template: str = Field("{}", description='text around a caption, "a photo of a {}", or fields, "{title}. {text}"')
    shard_size: int = Field(10_000, ge=1, le=1_000_000, description="rows a shard of a list or of vectors")
    encoder: str = Field(
        DEFAULT_ENCODER, min_length=1, description="a sentence-transformers model: name or folder; or matrix:FILE.npy"
    )
    prompt: str | None = Field(None, description="put before each text for the encoder; default: the encoder's own")
    dim: int | None = Field(None, ge=1, description="first coordinates kept, of Matryoshka encoders; default: all")
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto",
        description="auto: bfloat16 where the hardware multiplies it, else float16 on GPUs and float32 on CPUs; int8"
        " needs graphbuild[int8]",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Embed:
        given = [name for name in ("shards", "captions", "vectors") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one source")
        return self

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        if template.count("{}") + bool(re.search(r"\{(?!\d+\})[^{}]+\}", template)) != 1:
            raise ValueError(f"{template!r} must contain {{}} once, the caption's place, or {{fields}} by their names")
        return template


class Index(Section):
    """Nodes to the k-nearest-neighbour graph, with its recall certificate."""

    k: int = Field(64, ge=1, le=2048, description="neighbours kept per node, itself excluded")
    engine: str = Field("auto", description="auto, exact, partition or faiss:FACTORY, as in faiss:IVF1024,Flat")
    recall: float = Field(0.99, gt=0, lt=1, description="recall@k that partition and faiss are set for, on a sample")
    min_recall: float | None = Field(
        None, ge=0, le=1, description="a build below this recall@k fails; default: 0.999 if exact, else recall - 0.01"
    )
    recall_sample: int = Field(10_000, ge=1, description="nodes searched again by brute force for the certificate")
    memory: float = Field(4, gt=0, description="GB a worker may take; less makes more and smaller join tasks")
    seed: int = Field(0, ge=0, description="draws leaders and samples")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: str) -> str:
        if engine not in ("auto", "exact", "partition") and not (engine.startswith("faiss:") and engine[6:].strip()):
            raise ValueError(f"{engine!r} is none of auto, exact, partition, faiss:FACTORY")
        return engine


class Export(Section):
    """Graph to sidecars beside the tars, or to new tars."""

    embeddings: Literal["int8", "float16", "sketch:64", "none"] = Field("int8", description="carried by the sidecars")
    layout: Literal["sidecars", "inline", "clustered"] = Field(
        "sidecars",
        description="sidecars beside the tars; inline: new tars that hold the fields; clustered: in neighbour order",
    )
    chunk: int = Field(32, ge=2, le=4096, description="of clustered: neighbouring samples that are shuffled as one")
    shard_size: int = Field(10_000, ge=1, le=1_000_000, description="of clustered: samples a tar")


class Recipe(Section):
    download: Download = Download()
    embed: Embed = Embed()
    index: Index = Index()
    export: Export = Export()

    def dump(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def read_recipe(path: str) -> Recipe:
    """A recipe file; relative paths in it are taken from the working folder."""
    try:
        fs, root = file_system(path)
        with reaching(path):
            content = fs.cat_file(root)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"there is no recipe {path}", "see pipelines/ for examples") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error})", "check the path") from None
    return _parse(content, path)


def resolve(store: Store, section: str, changes: Mapping[str, Any]) -> Recipe:
    """The store's recipe with the changes that a command's options make to one section (None: not given)."""
    store.manifest()  # another format version may have other recipes
    recipe = (
        _parse(store.read_bytes("recipe.yaml"), store.display("recipe.yaml"))
        if store.exists("recipe.yaml")
        else Recipe()
    )
    given = {key: value for key, value in changes.items() if value is not None}
    values = recipe.model_dump()
    sources = {"shards", "captions", "vectors"} & given.keys()
    if section == "embed" and sources:
        values["embed"].update(shards=None, captions=None, vectors=None)
    values[section].update(given)
    return _validate(values, options=list(given))


def _parse(content: bytes, where: str) -> Recipe:
    try:
        values = yaml.safe_load(content.decode()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}", "fix the line named above") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold sections (download, embed, index, export)", "see pipelines/ for examples")
    return _validate(values, where)


def _validate(values: Mapping[str, Any], where: str = "", options: Sequence[str] = ()) -> Recipe:
    """The recipe of these values; what is wrong is named as a field of the file `where`, or as one of the options."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            field = fault["loc"][-1]
            names = [name for name in options if name == field or len(fault["loc"]) == 1]
            name = ", ".join(f"--{name.replace('_', '-')}" for name in names) or ".".join(map(str, fault["loc"]))
            known = fault["type"] != "extra_forbidden"
            lines.append(f"{name}: {fault['msg'].removeprefix('Value error, ') if known else _no_such(fault['loc'])}")
        raise ConfigError(
            (f"{where}: " if where else "") + "; ".join(lines),
            "correct it; what is allowed say the verb's --help, and docs/recipe.md of the sources",
        ) from None
    values = recipe.model_dump()
    for section, key in (
        ("download", "urls"),
        ("embed", "shards"),
        ("embed", "captions"),
        ("embed", "vectors"),
        ("embed", "class_names"),
    ):
        if values[section][key] is not None:
            values[section][key] = absolute(values[section][key])
    encoder = values["embed"]["encoder"]
    if encoder.startswith("matrix:"):
        values["embed"]["encoder"] = "matrix:" + absolute(encoder.removeprefix("matrix:"))
    elif is_folder(encoder):
        values["embed"]["encoder"] = absolute(encoder)
    return Recipe.model_validate(values)


def _no_such(place: Sequence[int | str]) -> str:
    """That there is no such section, or setting of a section, and which there are."""
    if len(place) == 1:
        return f"no such setting: a recipe has the sections {', '.join(Recipe.model_fields)}"
    return f"no such setting: {place[0]} has {', '.join(type(getattr(Recipe(), str(place[0]))).model_fields)}"


def is_folder(name: str) -> bool:
    """Whether there is a local folder of that name; no name at all, or one too long for a path, is none."""
    try:
        return bool(name) and Path(name).is_dir()
    except OSError:
        return False


def absolute(path: str) -> str:
    """A local path made absolute, so that it means the same to a worker in another folder; URLs unchanged."""
    return path if "://" in path else str(Path(path).expanduser().absolute())
