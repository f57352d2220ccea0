"""A sample's caption: which member of a tar holds it, how a class number becomes a prompt, and why there is none.

Reads one member a sample, at most UNPACKED_BYTES of a compressed one. Reasons are few, so that they can be counted.

A text is a caption in Unicode NFC, every run of white space one space, ends stripped; case, accents and scripts stay.
Texts that are the same are one node; a 128-bit hash stands for each. About 2 us a caption.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphbuild.errors import InputError
from graphbuild.nodes.samples import CONTENT_CHARACTERS
from graphbuild.sources.tars import Member, Tar, TarSample
from graphbuild.store.files import local_file

UNPACKED_BYTES = 64 << 20
FIELD = re.compile(r"\{([^{}]+)\}")
MAX_CAPTION_BYTES = 1_000_000
MARK = "\ufeff"  # byte order


def sample_caption(tar: Tar, sample: TarSample, settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(caption, None), or (what stands in its place, why that is no caption)."""
    fields = template_fields(settings["template"])
    member = _caption_member(sample, settings)
    if member is None:
        return None, f"no member .{' or .'.join(_wanted(settings))}"
    text, reason = _member_text(tar, member)
    if text is None or reason is not None:
        return text, reason
    if fields:
        return _joined_fields(text, settings["template"], fields)
    if _is_json(member):
        text, reason = _json_field(text, settings["caption_member"].partition(":")[2] or "caption")
    names = settings.get("class_names")
    if names is not None and text is not None and reason is None:
        label = text.strip()
        if not label.isdecimal() or len(label) > 20 or int(label) >= len(names):
            return text, f"not a class number below {len(names)}, the count of class names"
        text = names[int(label)]
    return (fill_template(settings["template"], text), None) if reason is None else (text, reason)


def is_of_lines(caption: str | None, sample: TarSample, settings: Mapping[str, Any]) -> bool:
    """Whether a sample's caption is a text of several lines, which may have been meant as several captions."""
    member = _caption_member(sample, settings)
    return caption is not None and member is not None and not _is_json(member) and "\n" in caption.strip()


def _caption_member(sample: TarSample, settings: Mapping[str, Any]) -> Member | None:
    by_extension = {member.extension.removesuffix(".gz"): member for member in reversed(sample.members)}
    return next((by_extension[extension] for extension in _wanted(settings) if extension in by_extension), None)


def _wanted(settings: Mapping[str, Any]) -> list[str]:
    """The extensions that may hold a caption, the first one there is."""
    wanted = "json" if template_fields(settings["template"]) else settings["caption_member"].partition(":")[0]
    return [wanted.lower().removeprefix(".")] if wanted != "auto" else ["txt", "json"]


def _is_json(member: Member) -> bool:
    return member.extension.removesuffix(".gz") == "json"


def _joined_fields(content: str, template: str, fields: list[str]) -> tuple[str | None, str | None]:
    values = {}
    for field in fields:
        values[field], reason = _json_field(content, field)
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


def _json_field(content: str, field: str) -> tuple[str, str | None]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content, "member .json is not valid JSON"
    if not isinstance(value, dict) or field not in value:
        return content, f"member .json has no field {field!r}"
    text = value[field]
    if isinstance(text, bool) or not isinstance(text, str | int):
        return content, f"json field {field!r} is not a string"
    try:
        str(text).encode()
    except ValueError:
        return content, f"json field {field!r} is not Unicode text"
    return str(text), None


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
            "see --class-names in docs/recipe.md",
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
