"""Normalisation against expectations written by hand, and hashes against hashlib."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphbuild.nodes.captions import MAX_CAPTION_BYTES, hashes, normalize, usable_text

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a dog", "a dog"),
        ("  a \t dog\r\n", "a dog"),
        ("a\u00a0dog\u3000runs\u2028fast\x0b!", "a dog runs fast !"),  # no-break, ideographic, line separator, tab
        ("a\x1cb\x85c", "a b c"),  # file separator and next line count as white space too
        ("Cafe\u0301", "Caf\u00e9"),  # combining acute accent
        ("\u212b\u2126", "\u00c5\u03a9"),  # angstrom sign, ohm sign
        ("\u1112\u1161\u11ab", "\ud55c"),  # Hangul jamo
        ("q\u0307\u0323", "q\u0323\u0307"),  # marks in canonical order
        ("\ufb01sh ①", "\ufb01sh ①"),  # NFC, not NFKC: ligatures and circled digits stay
        ("Straße ΣΊΣΥΦΟΣ İstanbul", "Straße ΣΊΣΥΦΟΣ İstanbul"),  # case stays
        ("\ufeffa\u200bb\u200d", "\ufeffa\u200bb\u200d"),  # zero-width characters are no white space
        ("\x00\x1b[31m", "\x00\x1b[31m"),
        ("\u202eabc", "\u202eabc"),
        (" \u0301 ", "\u0301"),
        ("\n\t \u2003", ""),
        ("", ""),
    ],
)
def test_captions_are_in_nfc_with_single_spaces_and_nothing_else_changes(caption: str, text: str) -> None:
    assert normalize(caption) == text


@given(any_text)
def test_normalize_is_idempotent_and_loses_nothing_but_white_space(caption: str) -> None:
    text = normalize(caption)
    assert normalize(text) == text
    assert unicodedata.is_normalized("NFC", text)
    assert "".join(text.split()) == "".join(unicodedata.normalize("NFC", caption).split())


@given(any_text)
def test_canonically_equivalent_captions_are_one_text(caption: str) -> None:
    assert normalize(unicodedata.normalize("NFD", caption)) == normalize(caption)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption"),
        ("", "empty caption"),
        (" \n\u3000", "empty caption"),
        ("é" * (MAX_CAPTION_BYTES // 2) + "x", "caption over 1,000,000 bytes"),
        ("\ud83d alone", "a lone surrogate, which is no Unicode text"),
    ],
)
def test_unusable_captions_have_a_reason(caption: str | None, reason: str) -> None:
    assert usable_text(caption) == (None, reason)


def test_a_caption_of_the_largest_size_is_usable() -> None:
    caption = "é" * (MAX_CAPTION_BYTES // 2)
    assert usable_text(caption) == (caption, None)


@given(st.lists(st.none() | any_text.filter(bool)))
def test_hashes_are_the_two_halves_of_blake2b_128_and_zero_where_there_is_no_text(texts: list[str | None]) -> None:
    found = hashes(texts)
    assert found.shape == (len(texts), 2)
    assert found.dtype == np.uint64
    for text, (first, second) in zip(texts, found.tolist(), strict=True):
        expected = bytes(16) if text is None else hashlib.blake2b(text.encode(), digest_size=16).digest()
        assert first.to_bytes(8, "little") + second.to_bytes(8, "little") == expected
