"""A sample's captions: which members of a tar hold them, how a class number becomes a prompt, and why there is none.

Reads the named members of a sample, at most UNPACKED_BYTES of a compressed one. Reasons are few, so that they can be
counted. Each caption has a weight, with which a loader draws it.

A text is a caption in Unicode NFC, every run of white space one space, ends stripped; case, accents and scripts stay.
Texts that are the same are one node; a 128-bit hash stands for each. About 2 us a caption.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from graphbuild.errors import InputError
from graphbuild.nodes.samples import CONTENT_CHARACTERS
from graphbuild.sources.tars import Member, Tar, TarSample
from graphbuild.store.files import local_file

UNPACKED_BYTES = 64 << 20
FIELD = re.compile(r"\{([^{}]+)\}")
MAX_CAPTION_BYTES = 1_000_000
MAX_CAPTIONS = 100  # of a sample
CLASS_MARK = re.compile("\0[0-9]+")
NO_WEIGHTS = "weights for its captions"  # in the reason
LINES = "lines"  # of a text member, each a caption
MARK = "\ufeff"  # byte order


class Found(NamedTuple):
    """A caption; or, with the reason, what stands in its place. weight: among its sample's captions."""

    content: str | None
    reason: str | None = None
    weight: float = 1.0


def sample_captions(tar: Tar, sample: TarSample, settings: Mapping[str, Any]) -> list[Found]:
    """What the sources of --caption-member hold for a sample, in their order: at least one."""
    template = settings["template"]
    fields = template_fields(template)
    if fields:
        return [Found(*_read(tar, sample, "json", lambda content: [_joined_fields(content, template, fields)])[0])]
    sources = settings["caption_member"].split(";")
    found = [_source_captions(tar, sample, source, settings) for source in sources]
    weights = settings.get("caption_weights")
    if not isinstance(weights, str):
        return weighted(found, weights)
    ((each, reason),) = _read(tar, sample, "json", lambda content: [_json_field(content, weights.partition(":")[2])])
    if reason is not None:
        return [Found(content, why or reason) for own in found for content, why in own]
    return weighted(found, each=each)


def weighted(
    sources: Sequence[Sequence[tuple[str | None, str | None]]], weights: Sequence[float] | None = None, each: Any = None
) -> list[Found]:
    """The captions of all sources, (content, None) or (content, why it is none), as one list with their weights.

    weights: of each source, which its captions share. each: the weights of all captions as a list, or as JSON text of
    one. Without both all are alike.
    """
    flat = [pair for own in sources for pair in own]
    if each is not None:
        weights = _weights(each, len(flat))
        if weights is None:
            return [Found(content, reason or f"no {len(flat)} {NO_WEIGHTS}") for content, reason in flat]
    elif weights is not None:
        weights = [weight / len(own) for own, weight in zip(sources, weights, strict=True) for _ in own]
    found = [Found(*pair, weight) for pair, weight in zip(flat, weights or [1.0] * len(flat), strict=True)]
    many = f"over {MAX_CAPTIONS} captions of one sample"
    return found[:MAX_CAPTIONS] + [Found(one.content, one.reason or many) for one in found[MAX_CAPTIONS:]]


def _weights(value: Any, count: int) -> list[float] | None:
    """A list, or JSON text of one, of so many weights, not all of them 0; None where it is no such list."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    sound = isinstance(found, list) and len(found) == count and all(map(is_weight, found)) and sum(found) > 0
    return found if sound else None


def is_weight(value: object) -> bool:
    """Whether a value is a number that can be a weight: 0 or more, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def is_of_lines(caption: str | None, sample: TarSample, settings: Mapping[str, Any]) -> bool:
    """Whether a sample's caption is a text of several lines, which may have been meant as several captions."""
    wanted, _, part = settings["caption_member"].partition(":")
    member = _member(sample, "json" if template_fields(settings["template"]) else wanted)
    return caption is not None and member is not None and not (part or _is_json(member)) and "\n" in caption.strip()


def _source_captions(
    tar: Tar, sample: TarSample, source: str, settings: Mapping[str, Any]
) -> list[tuple[str | None, str | None]]:
    """(caption, None) of each that a source holds, or (what stands in its place, why that is no caption)."""
    wanted, _, part = source.partition(":")
    member = _member(sample, wanted)
    if member is not None and _is_json(member):
        found = _read(tar, sample, wanted, lambda content: _json_texts(content, part or "caption"))
    else:
        found = _read(tar, sample, wanted, _lines if part == LINES else lambda content: [(content, None)])
    names = settings.get("class_names")
    if names is not None:
        found = [pair if pair[1] is not None else _class_name(str(pair[0]), names) for pair in found]
    template = settings["template"]
    return [(content if reason else fill_template(template, content), reason) for content, reason in found]


def kept_apart(names: Sequence[str]) -> list[str]:
    """Class names; one that repeats an earlier one has a mark behind it, by which its class is a node of its own."""
    first: dict[str, int] = {}
    places = [first.setdefault(normalize(name), place) for place, name in enumerate(names)]
    return [
        name if place == its_first else f"{name}\0{place}"
        for place, (name, its_first) in enumerate(zip(names, places, strict=True))
    ]


def _class_name(text: str, names: Sequence[str]) -> tuple[str, str | None]:
    label = text.strip()
    if not label.isdecimal() or len(label) > 20 or int(label) >= len(names):
        return text, f"not a class number below {len(names)}, the count of class names"
    return names[int(label)], None


def _read(
    tar: Tar, sample: TarSample, wanted: str, parse: Callable[[str], list[tuple[Any, str | None]]]
) -> list[tuple[Any, str | None]]:
    """What `parse` makes of a member's text, or why there is none."""
    member = _member(sample, wanted)
    if member is None:
        return [(None, f"no member .{' or .'.join(_extensions(wanted))}")]
    text, reason = _member_text(tar, member)
    return [(text, reason)] if text is None or reason is not None else parse(text)


def _member(sample: TarSample, wanted: str) -> Member | None:
    by_extension = {member.extension.removesuffix(".gz"): member for member in reversed(sample.members)}
    return next((by_extension[extension] for extension in _extensions(wanted) if extension in by_extension), None)


def _extensions(wanted: str) -> list[str]:
    """The extensions that may hold a caption, the first one there is."""
    return [wanted.lower().removeprefix(".")] if wanted != "auto" else ["txt", "json"]


def _is_json(member: Member) -> bool:
    return member.extension.removesuffix(".gz") == "json"


def _lines(content: str) -> list[tuple[str | None, str | None]]:
    lines = [line for line in content.splitlines() if line.lstrip(MARK).strip()]
    return [(line, None) for line in lines or [content]]


def _joined_fields(content: str, template: str, fields: list[str]) -> tuple[str | None, str | None]:
    values: dict[str, str | None] = {}
    for field in fields:
        value, reason = _json_field(content, field)
        values[field], reason = (value, reason) if reason is not None else _json_text(content, field, value)
        if reason is not None:
            return values[field], reason
    return fill_fields(template, values)


def _member_text(tar: Tar, member: Member) -> tuple[str | None, str | None]:
    content = tar.read(member)
    if member.extension.endswith(".gz"):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(UNPACKED_BYTES + 1)
        except (OSError, EOFError, zlib.error):
            return None, f"member .{member.extension} cannot be unpacked"
        if len(content) > UNPACKED_BYTES:
            return None, f"member .{member.extension} unpacks to more than {UNPACKED_BYTES:,} bytes"
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return content[: 4 * CONTENT_CHARACTERS].decode(errors="replace"), f"member .{member.extension} is not UTF-8"


def _json_field(content: str, field: str) -> tuple[Any, str | None]:
    """(the value of a field, None), or (content, why there is none)."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content, "member .json is not valid JSON"
    if not isinstance(value, dict) or field not in value:
        return content, f"member .json has no field {field!r}"
    return value[field], None


def _json_texts(content: str, field: str) -> list[tuple[str | None, str | None]]:
    """(text, None) of each text that a field holds, one or a list of them, or (content, why it holds none)."""
    value, reason = _json_field(content, field)
    if reason is not None:
        return [(content, reason)]
    return [_json_text(content, field, text) for text in (value if isinstance(value, list) and value else [value])]


def _json_text(content: str, field: str, value: Any) -> tuple[str, str | None]:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return content, f"json field {field!r} {'is an empty list' if value == [] else 'is not a string'}"
    try:
        str(value).encode()
    except ValueError:
        return content, f"json field {field!r} is not Unicode text"
    return str(value), None


def fill_template(template: str, caption: str | None) -> str | None:
    """The caption in its place, without a byte order mark before it: editors put one there, and nobody sees it."""
    caption = None if caption is None else caption.lstrip(MARK)
    return template.replace("{}", caption) if caption and caption.strip() else caption


def is_number(caption: str | None, template: str) -> bool:
    """Whether a caption is a whole number, or a number in the template: a class number, most likely."""
    before, place, behind = template.partition("{}")
    return caption is not None and place != "" and caption.removeprefix(before).removesuffix(behind).strip().isdecimal()


def template_fields(template: str) -> list[str]:
    """The columns or JSON fields that a template names, as in "{title}. {description}"; none where it has {}."""
    return [] if "{}" in template else list(dict.fromkeys(FIELD.findall(template)))


def fill_fields(template: str, values: Mapping[str, str | None]) -> tuple[str | None, str | None]:
    """(the template with its fields filled, None), or (None, the field that is missing or blank)."""
    empty = [name for name, value in values.items() if value is None or not value.lstrip(MARK).strip()]
    if empty:
        return None, f"no {empty[0]}"
    return FIELD.sub(lambda found: str(values[found[1]]).lstrip(MARK), template), None


def read_class_names(path: str) -> list[str]:
    with local_file(path) as local:
        try:
            text = local.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} cannot be read as class names ({error})", "give UTF-8 text, a name a line"
            ) from None
    names = [name.strip() for name in text.removesuffix("\n").split("\n")]
    if not all(names):
        raise InputError(
            f"{path} must hold one class name a line, without blank lines",
            "see --class-names in docs/reference/recipe.md",
        )
    return names


# -- from caption to node text


def normalize(caption: str) -> str:
    return " ".join(unicodedata.normalize("NFC", caption).split())


def usable_text(caption: str | None) -> tuple[str | None, str | None]:
    """(normalised text, None), or (None, the reason why this caption cannot be a node)."""
    if caption is None:
        return None, "no caption"
    try:
        if len(caption.encode()) > MAX_CAPTION_BYTES:
            return None, f"caption over {MAX_CAPTION_BYTES:,} bytes"
    except UnicodeEncodeError:
        return None, "a lone surrogate, which is no Unicode text"
    text = normalize(caption)
    return (text, None) if text else (None, "empty caption")


def hashes(texts: Sequence[str | None]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """blake2b-128 of each text as uint64 [n, 2]; zeros where there is none."""
    none = bytes(16)
    joined = b"".join(none if t is None else hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)
