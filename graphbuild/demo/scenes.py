"""Scenes drawn on the spot: simple shapes whose every attribute is a label that the picture shows.

Everything follows from the seed: the same seed gives the same scenes and pixels in every process, and
`make_scenes(n, seed)` is a prefix of `make_scenes(m, seed)` for n < m. A picture of 96 pixels costs about
0.8 ms (drawing and JPEG) on one core; nothing is kept, scenes are drawn when asked for.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Point = tuple[float, float]

KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLOURS: dict[str, Rgb] = {
    "red": (222, 36, 40),
    "orange": (248, 136, 18),
    "yellow": (252, 220, 24),
    "green": (22, 138, 56),
    "blue": (34, 84, 220),
    "purple": (132, 48, 176),
    "pink": (252, 112, 186),
    "brown": (124, 72, 32),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
POSITIONS = ("centre", "top", "bottom", "left", "right")
# The vertical gradient of each background, top and bottom.
BACKGROUNDS: dict[str, tuple[Rgb, Rgb]] = {
    "sky": ((150, 206, 248), (214, 238, 254)),
    "grass": ((178, 218, 128), (146, 196, 96)),
    "sand": ((238, 222, 184), (224, 200, 152)),
    "night": ((12, 14, 44), (34, 36, 84)),
    "paper": ((250, 249, 244), (244, 243, 238)),
}
# Radius as a share of the picture's side, by the number of shapes that have to fit in a row: one, two, three.
SIZES: dict[str, tuple[float, float, float]] = {
    "small": (0.115, 0.105, 0.090),
    "medium": (0.175, 0.150, 0.118),
    "large": (0.250, 0.200, 0.146),
}
ACCENT: Rgb = (252, 251, 246)  # of stripes, dots and checks
SUPERSAMPLING = 2
RING_HOLE = 0.44  # radius of a ring's hole in radii of the ring
JPEG_QUALITY = 88


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture to draw. `seed` decides what the attributes leave open: jitter, tint, phrasing."""

    kind: str
    colour: str
    size: str
    texture: str
    position: str
    count: int
    background: str
    seed: int


ATTRIBUTES = tuple(field.name for field in fields(Scene) if field.name != "seed")


def make_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes; attributes are independent and even, but for single shapes, which are half of all."""
    rng = random.Random(f"scenes {seed}")
    colours, sizes, backgrounds = tuple(COLOURS), tuple(SIZES), tuple(BACKGROUNDS)
    return [
        Scene(
            kind=rng.choice(KINDS),
            colour=rng.choice(colours),
            size=rng.choice(sizes),
            texture=rng.choice(TEXTURES),
            position=rng.choice(POSITIONS),
            count=rng.choice((1, 1, 2, 3)),
            background=rng.choice(backgrounds),
            seed=rng.getrandbits(62),
        )
        for _ in range(count)
    ]


def render(scene: Scene, pixels: int = 96, *, background: str | None = None) -> Image.Image:
    """Draw a scene as an RGB image of `pixels` x `pixels`.

    background: another one to paste the scene's shapes on, as they are in its own picture, edges included.
    """
    rng = random.Random(f"render {scene.seed}")
    side = pixels * SUPERSAMPLING
    canvas = _background(scene.background, side, rng)  # draws from rng also where it is exchanged
    if background is not None:
        canvas = _background(background, side, random.Random(f"{background} {scene.seed}"))
    fill = _tinted(COLOURS[scene.colour], rng, 9)
    places, radius = layout(scene)
    for x, y in places:
        grown = radius * rng.uniform(0.94, 1.02)
        _stamp(canvas, scene, fill, (x * side, y * side), grown * side, rng)
    return canvas.reduce(SUPERSAMPLING)


def encode_jpeg(image: Image.Image) -> bytes:
    """The image as JPEG bytes."""
    buffer = io.BytesIO()
    # Colour at full resolution: halved, as is JPEG's habit, it turns fine red and white stripes brown.
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def layout(scene: Scene) -> tuple[list[Point], float]:
    """Where the shapes lie: their centres (x, y) and their radius, as shares of the picture's side.

    Shapes stand in a row, or in a column where the scene lies left or right, so that the side stays readable.
    """
    rng = random.Random(f"layout {scene.seed}")
    radius = SIZES[scene.size][scene.count - 1]
    step = min(2.4 * radius, (0.94 - 2 * radius) / max(1, scene.count - 1))
    slack = 0.03 if scene.count == 1 else 0.008
    first = 0.5 - step * (scene.count - 1) / 2
    along = [first + step * i + rng.uniform(-slack, slack) for i in range(scene.count)]
    # A large shape needs more room to stand aside from the middle than a picture has: it may touch the edge.
    near = min(radius + 0.05, 0.27) + rng.uniform(-0.01, 0.03)
    middle = 0.5 + rng.uniform(-0.02, 0.02)
    across = {"centre": middle, "top": near, "left": near}.get(scene.position, 1 - near)
    if scene.position in ("left", "right"):
        return [(across, y) for y in along], radius
    return [(x, across) for x in along], radius


@cache
def _outline(kind: str) -> tuple[Point, ...]:
    """The shape's outline as a polygon of radius about 1 around 0; y points down."""
    if kind == "square":
        return ((-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84))
    if kind == "diamond":
        return ((0.0, -1.08), (0.7, 0.0), (0.0, 1.08), (-0.7, 0.0))
    if kind == "triangle":
        return ((0.0, -0.98), (1.0, 0.78), (-1.0, 0.78))
    if kind == "cross":
        a, b = 0.34, 0.98
        quarter = ((-a, -b), (a, -b), (a, -a))  # turned three times by a right angle
        half = (*quarter, *((-y, x) for x, y in quarter))
        return (*half, *((-x, -y) for x, y in half))
    if kind == "star":
        turns = [(math.pi * i / 5 - math.pi / 2, 1.08 if i % 2 == 0 else 0.46) for i in range(10)]
        return tuple((r * math.cos(turn), r * math.sin(turn)) for turn, r in turns)
    turns_round = [2 * math.pi * i / 40 for i in range(40)]
    if kind == "heart":
        # The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to radius 1.
        heights = [sum(c * math.cos(n * t) for n, c in enumerate((0, 13, -5, -2, -1))) for t in turns_round]
        return tuple((math.sin(t) ** 3, -y / 15.5 - 0.1) for t, y in zip(turns_round, heights, strict=True))
    radius = 0.95 if kind == "circle" else 1.0  # a ring
    return tuple((radius * math.cos(t), radius * math.sin(t)) for t in turns_round)


def _stamp(canvas: Image.Image, scene: Scene, fill: Rgb, centre: Point, radius: float, rng: random.Random) -> None:
    """Draw one shape with its texture and a contrasting edge; all lengths in canvas pixels."""
    half = math.ceil(radius * 1.15)
    turn = math.radians(rng.uniform(-8, 8))
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    polygon = [(half + x * cos - y * sin, half + x * sin + y * cos) for x, y in _outline(scene.kind)]
    borders = [polygon]
    if scene.kind == "ring":
        borders.append([(half + (x - half) * RING_HOLE, half + (y - half) * RING_HOLE) for x, y in polygon])

    mask = Image.new("L", (2 * half, 2 * half))
    for border, inside in zip(borders, (255, 0), strict=False):
        ImageDraw.Draw(mask).polygon(border, fill=inside)
    left, top = round(centre[0] - half), round(centre[1] - half)
    canvas.paste(_tile(scene.texture, fill, 2 * half, canvas.width, radius, rng), (left, top), mask)

    pale = scene.background == "night"
    edge = tuple(int(c * 0.35 + 165) if pale else int(c * 0.42) for c in fill)
    draw = ImageDraw.Draw(canvas)
    for border in borders:
        line = [(left + x, top + y) for x, y in border]
        draw.line([*line, line[0], line[1]], fill=edge, width=max(1, canvas.width // 90), joint="curve")


def _tile(texture: str, fill: Rgb, side: int, canvas: int, radius: float, rng: random.Random) -> Image.Image:
    """A square of `side` pixels in the fill colour, a third to a half of it covered by the texture."""
    tile = Image.new("RGB", (side, side), fill)
    if texture == "plain":
        return tile
    draw = ImageDraw.Draw(tile)
    # Wide enough to survive a picture of 64 pixels, yet several periods a shape.
    period = max(0.072 * canvas, 0.36 * radius)
    shift = rng.uniform(0, period)
    steps = range(-1, int(side / period) + 2)
    if texture == "striped":
        for step in range(-1, int(2 * side / period) + 2):
            x = shift + step * period
            draw.line([(x, 0), (x - side, side)], fill=ACCENT, width=max(1, round(0.3 * period)))
    elif texture == "dotted":
        dot = 0.29 * period
        for row in steps:
            for column in steps:
                x, y = shift + (column + row % 2 / 2) * period, shift + row * period * 0.87
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=ACCENT)
    else:
        cell = period * 0.8
        for row in range(-1, int(side / cell) + 2):
            for column in range(-1 + row % 2, int(side / cell) + 2, 2):
                x, y = shift + column * cell, shift + row * cell
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=ACCENT)
    return tile


def _background(name: str, side: int, rng: random.Random) -> Image.Image:
    """A gradient with the background's decoration, which stays near the gradient's own colours."""
    top, bottom = (np.array(_tinted(colour, rng, 6), np.float32) for colour in BACKGROUNDS[name])
    ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None]
    column = (top + (bottom - top) * ramp).astype(np.uint8)[:, None, :]
    canvas = Image.fromarray(column).resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    unit = side / 96

    def anywhere() -> Point:
        return rng.uniform(0, side), rng.uniform(0, side)

    if name == "sky":
        for _ in range(3):
            x, y = anywhere()
            for aside, size in ((-9 * unit, 5 * unit), (0, 8 * unit), (9 * unit, 5.5 * unit)):
                base = y + 2.5 * unit
                box = (x + aside - size, base - 1.2 * size, x + aside + size, base + 0.2 * size)
                draw.ellipse(box, (244, 249, 255))
    elif name == "grass":
        for _ in range(70):
            x, y = anywhere()
            blade = rng.uniform(4, 8) * unit
            shade = (120, 174, 74) if rng.random() < 0.6 else (196, 230, 146)
            tip = (x + rng.uniform(-2, 2) * unit, y - blade)
            draw.line([(x, y), tip], fill=shade, width=max(1, round(unit)))
    elif name == "sand":
        for _ in range(110):
            x, y = anywhere()
            grain = rng.uniform(0.5, 0.9) * unit
            shade = (196, 168, 118) if rng.random() < 0.6 else (252, 242, 216)
            draw.ellipse((x - grain, y - grain, x + grain, y + grain), shade)
    elif name == "night":
        for _ in range(38):
            x, y = anywhere()
            spark = rng.uniform(0.3, 0.9) * unit
            draw.ellipse((x - spark, y - spark, x + spark, y + spark), (226, 226, 200))
    else:
        start, gap = rng.uniform(0, 9) * unit, rng.uniform(9, 11) * unit
        for step in range(int(side / gap) + 1):
            y = start + step * gap
            draw.line([(0, y), (side, y)], fill=(196, 210, 228), width=max(1, round(0.6 * unit)))
    return canvas


def _tinted(colour: Rgb, rng: random.Random, spread: int) -> Rgb:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue
