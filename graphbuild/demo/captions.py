"""Captions of scenes: true of the picture, short or precise, with now and then a rarer word.

Everything follows from the scene's seed: the same scene has the same caption in every process. Many pictures
share a caption, as on the web.
"""

from __future__ import annotations

import random

from graphbuild.demo.scenes import Scene

RARE_WORDS = 0.1  # how often a caption uses a word other than the usual one

# How captions say it: the usual word first, then rarer ones.
# fmt: off
_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",), "star": ("star",),
    "ring": ("ring", "hoop"), "cross": ("cross", "plus sign"), "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
    "red": ("red", "crimson"), "orange": ("orange", "amber"), "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"), "blue": ("blue", "azure"), "purple": ("purple", "violet"),
    "pink": ("pink", "rose-coloured"), "brown": ("brown", "chocolate-coloured"),
    "small": ("small", "little", "tiny"), "medium": ("medium-sized",), "large": ("large", "big", "huge"),
    "plain": ("plain",), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
    "centre": ("in the middle", "in the centre"), "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"), "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "sky": ("in the sky", "among the clouds"), "grass": ("on the grass", "in a meadow"),
    "sand": ("on the sand", "on a beach"), "night": ("at night", "in the night sky", "under the stars"),
    "paper": ("on paper", "on lined paper"),
}
# fmt: on
_PATTERNS = {"striped": "with white stripes", "dotted": "with white dots", "checked": "in a checked pattern"}
# What captions mention besides kind and number: a share of the writers, then the chance of each attribute.
# The terse half is why pictures share captions, the precise quarter why captions differ.
_WRITERS = (
    (0.50, {"colour": 0.86, "background": 0.14}),
    (0.26, {"colour": 0.85, "background": 0.8, "texture": 0.15}),
    (0.24, {"colour": 0.9, "background": 0.75, "texture": 0.6, "size": 0.5, "position": 0.5}),
)


def caption(scene: Scene) -> str:
    """One English caption, true of the scene, that mentions some of its attributes in one of several ways.

    Pictures with different attributes may share a caption; pictures with equal attributes may differ in it.
    """
    rng = random.Random(f"caption {scene.seed}")
    writer = rng.choices(range(len(_WRITERS)), [share for share, _ in _WRITERS])[0]
    said = {name for name, chance in _WRITERS[writer][1].items() if rng.random() < chance}
    if scene.texture == "plain" and rng.random() < 0.7:  # people rarely remark on the absence of a pattern
        said.discard("texture")

    def words(*attributes: str) -> list[str]:
        return [_spoken(_WORDS[getattr(scene, name)], rng) for name in attributes if name in said]

    noun = _noun(scene, rng)
    tails = words("background", "position")
    frames = ("bare", "fronted", "sentence", "medium", "tags")
    frame = rng.choices(frames, (94, 0, 2, 3, 1) if writer == 0 else (52, 14, 12, 12, 10))[0]
    if frame == "tags":
        return ", ".join([noun, *words("colour", "texture", "size"), *tails]).capitalize()

    if "texture" in said and scene.texture in _PATTERNS and rng.random() < 0.4:
        adjectives = words("size", "colour")
        noun = f"{noun} {_PATTERNS[scene.texture]}"
    else:
        adjectives = words("size", "texture", "colour")
    phrase = _counted(" ".join([*adjectives, noun]), scene.count, rng)
    if frame == "fronted" and tails:
        where = tails.pop(rng.randrange(len(tails)))
        return " ".join([f"{where},", phrase, *tails]).capitalize()
    if rng.random() < 0.3:
        tails.reverse()
    if frame == "sentence":
        phrase = f"there {'is' if phrase.startswith(('a ', 'an ')) else 'are'} {phrase}"
    elif frame == "medium":
        phrase = f"{rng.choice(('a picture', 'a drawing', 'an image'))} of {phrase}"
    return " ".join([phrase, *tails]).capitalize()


def _spoken(known: tuple[str, ...], rng: random.Random) -> str:
    """The usual word, or now and then a rarer one."""
    return rng.choice(known[1:]) if known[1:] and rng.random() < RARE_WORDS else known[0]


def _noun(scene: Scene, rng: random.Random) -> str:
    noun = "shape" if rng.random() < 0.02 else _spoken(_WORDS[scene.kind], rng)
    if scene.count == 1:
        return noun
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def _counted(phrase: str, count: int, rng: random.Random) -> str:
    """The phrase with its article or number."""
    if count == 1:
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
    return f"{_spoken({2: ('two', 'a pair of'), 3: ('three', 'a trio of')}[count], rng)} {phrase}"
