"""Drawing batches of scenes: a digit on a cluttered canvas, in whole-number arithmetic throughout.

From back to front: gradient, texture, soft blobs, lines, short bars, fragments of other digits, the digit, noise.
Some of the clutter has nearly the digit's colour and stroke width, so that colour alone does not tell; fragments
are smaller than any digit and never touch it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynaconv.data._resampling import SPRITE, UNIT, draw_sprites, placement_weights
from dynaconv.data._scene_scale import MIXED, ObjectScale
from dynaconv.data._scene_words import SceneWords

_LINES, _BLOBS, _BARS, _FRAGMENTS = 2, 3, 8, 10
_TEXTURE = 3
# Words for everything but noise, with room to spare; adding a layer must not shift the noise.
_PARAMETER_WORDS = 448
_OPAQUE = 128
# Directions of bars: eight angles with small whole numbers.
_DIRECTIONS = ((1, 0), (2, 1), (1, 1), (1, 2), (0, 1), (-1, 2), (-1, 1), (-2, 1))


@dataclass(frozen=True)
class DigitPool:
    """Source digits of one part: `pictures` int64 [D, 8, 8] in 0..16, `by_class` the rows of each digit."""

    pictures: np.ndarray
    by_class: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class SceneBatch:
    """Finished scenes: images uint8 [B, S, S, 3], labels [B], boxes [B, 4] (end exclusive), sources [B]."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    sources: np.ndarray


def words_per_scene(image_size: int) -> int:
    """Raw words that one scene uses up."""
    return _PARAMETER_WORDS + (image_size * image_size * 3 + 7) // 8


def draw_scenes(
    pool: DigitPool, words: SceneWords, image_size: int, scale: ObjectScale = MIXED
) -> SceneBatch:
    """Draw one batch of scenes."""
    labels = words.integers(0, 10, 1)[:, 0]
    sources = _choose_sources(pool, labels, words)
    alpha, boxes = _digit_alpha(pool.pictures[sources], words, image_size, scale)
    paper, ink, twin, other = _colours(words)
    canvas = _background(paper, words, image_size)
    _blend(canvas, other, _blob_alpha(words, image_size))
    _blend(canvas, other, _line_alpha(words, image_size))
    _blend(canvas, other, _bar_alpha(words, boxes, image_size, scale))
    _blend(canvas, twin, _fragment_alpha(pool, words, boxes, image_size, scale))
    _blend(canvas, ink, alpha)
    return SceneBatch(_add_noise(canvas, words), labels, boxes, sources)


def _choose_sources(pool: DigitPool, labels: np.ndarray, words: SceneWords) -> np.ndarray:
    counts = np.array([len(rows) for rows in pool.by_class])
    picks = words.integers(0, counts[labels][:, None], 1)[:, 0]
    return np.array([pool.by_class[label][pick] for label, pick in zip(labels, picks, strict=True)])


def _alpha(values: np.ndarray) -> np.ndarray:
    """Opacity 0..128 from drawn sprite values: the steep middle turns blurred cells into strokes with soft edges."""
    strokes = np.clip(values - 5 * UNIT, 0, 5 * UNIT).astype(np.int32)
    return (strokes * _OPAQUE // (5 * UNIT)).astype(np.int16)


def _digit_alpha(
    pictures: np.ndarray, words: SceneWords, size: int, scale: ObjectScale = MIXED
) -> tuple[np.ndarray, np.ndarray]:
    """The digit's opacity int16 [B, S, S] and its tight box int64 [B, 4]."""
    height = words.integers(*scale.heights(size), 1)
    # The 8x8 pictures leave empty columns at the sides, so a square sprite gives a digit taller than wide.
    width = height * words.integers(88, 113, 1) // 100
    margin = size // 24
    top = words.integers(margin, size - margin - height + 1, 1)
    left = words.integers(margin, size - margin - width + 1, 1)
    rows, columns = placement_weights(top, height, size), placement_weights(left, width, size)
    alpha = _alpha(draw_sprites(pictures[:, None], rows, columns))
    return alpha, _tight_boxes(alpha >= _OPAQUE // 4)


def _tight_boxes(inside: np.ndarray) -> np.ndarray:
    columns, rows = inside.any(1), inside.any(2)
    size = inside.shape[1]
    return np.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            size - columns[:, ::-1].argmax(1),
            size - rows[:, ::-1].argmax(1),
        ],
        axis=1,
    )


def _colours(words: SceneWords) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Colours int64 [B, 3] of the paper, the digit, clutter that resembles the digit, and other clutter."""
    light = words.integers(30, 226, 1)
    sign = np.where(light + words.integers(-30, 31, 1) >= 128, -1, 1)
    paper = light + words.integers(-25, 26, 3)
    ink = light + sign * words.integers(70, 131, 1) + words.integers(-35, 36, 3)
    twin = ink + words.integers(-25, 26, 3)
    opposite = np.where(words.integers(0, 3, 1) == 0, sign, -sign)
    other = light + opposite * words.integers(35, 76, 1) + words.integers(-40, 41, 3)
    paper, ink, twin, other = (np.clip(colour, 0, 255) for colour in (paper, ink, twin, other))
    return paper, ink, twin, other


def _background(paper: np.ndarray, words: SceneWords, size: int) -> np.ndarray:
    """A gradient with smooth texture: int16 [B, 3, S, S]."""
    b = len(paper)
    slope = words.integers(-28, 29, 6).reshape(b, 3, 2, 1)
    ramp = np.arange(size, dtype=np.int64) * 2 - size + 1
    across, down = (slope * ramp // size).transpose(2, 0, 1, 3)
    strength = words.integers(0, 15, 1)[:, :, None, None]
    cells = words.bytes(_TEXTURE * SPRITE * SPRITE).reshape(b * _TEXTURE, 1, SPRITE, SPRITE)
    # The grid reaches half a cell over each edge, where Catmull-Rom would otherwise lack neighbours.
    start, side = np.array([[-(size // 3)]]), np.array([[size + 2 * (size // 3)]])
    weights = np.broadcast_to(placement_weights(start, side, size), (b * _TEXTURE, 1, size, SPRITE))
    texture = draw_sprites(cells.astype(np.int64) - 128, weights, weights).astype(np.int32)
    texture = texture.reshape(b, _TEXTURE, size, size) // UNIT
    texture = (texture * strength.astype(np.int32)) >> 6
    tint = paper[:, :, None, None] + across[:, :, None, :] + down[:, :, :, None]
    return tint.astype(np.int16) + texture.astype(np.int16)


def _blob_alpha(words: SceneWords, size: int) -> np.ndarray:
    """Soft discs, at most half opaque."""
    centre = 2 * np.arange(SPRITE) - SPRITE + 1
    disc = np.clip(16 - (centre[:, None] ** 2 + centre**2) * 16 // 49, 0, 16)
    side = words.integers(size // 5, size * 3 // 5, _BLOBS)
    left, top = (
        words.integers(-side // 2, size - side // 2, _BLOBS),
        words.integers(-side // 2, size - side // 2, _BLOBS),
    )
    present = words.integers(0, 2, _BLOBS)
    sprites = present[:, :, None, None] * disc
    drawn = draw_sprites(sprites, placement_weights(top, side, size), placement_weights(left, side, size))
    return (np.clip(drawn, 0, 16 * UNIT).astype(np.int32) // (16 * UNIT // 56)).astype(np.int16)


def _line_alpha(words: SceneWords, size: int) -> np.ndarray:
    """Long thin lines right across the canvas, each through a random point."""
    slant = words.integers(-64, 65, _LINES)
    steep = words.integers(0, 2, _LINES).astype(bool)
    x, y = words.integers(0, size, _LINES), words.integers(0, size, _LINES)
    width = words.integers(48, 97, _LINES) * size // 96
    present = words.integers(0, 2, _LINES)
    a, b = np.where(steep, 64, slant), np.where(steep, slant, 64)
    axis = np.arange(size, dtype=np.int64)
    alpha = np.zeros((len(x), size, size), dtype=np.int16)
    for i in range(_LINES):
        column, row = a[:, i, None] * (axis - x[:, i, None]), b[:, i, None] * (axis - y[:, i, None])
        # Far away is far away: a sum beyond 16 bits would come back as a line on a large canvas.
        distance = np.minimum(np.abs(column[:, None, :] + row[:, :, None]), 2**15 - 1).astype(np.int16)
        line = np.clip(width[:, i, None, None].astype(np.int16) + 32 - distance, 0, 64) * 2
        np.maximum(alpha, line * present[:, i, None, None].astype(np.int16), out=alpha)
    return alpha


def _bar_sprites() -> np.ndarray:
    """Short bars at eight angles: int64 [8, 8, 8] in 0..16, five cells long and about two wide."""
    centre = (2 * np.arange(SPRITE) - SPRITE + 1) / 2
    x, y = centre[None, :], centre[:, None]
    bars = []
    for dx, dy in _DIRECTIONS:
        # sqrt is correctly rounded in IEEE arithmetic, so this too is the same everywhere.
        norm = np.sqrt(float(dx * dx + dy * dy))
        apart, along = np.abs(x * dy - y * dx) / norm, np.abs(x * dx + y * dy) / norm
        ends = np.clip(16 * (3.0 - along), 0, 16)
        bars.append(np.minimum(np.clip(16 * (1.6 - apart), 0, 16), ends))
    return np.floor(np.stack(bars)).astype(np.int64)


_BARS_BANK = _bar_sprites()


def _bar_alpha(words: SceneWords, boxes: np.ndarray, size: int, scale: ObjectScale) -> np.ndarray:
    kinds = words.integers(0, len(_BARS_BANK), _BARS)
    return _scatter(_BARS_BANK[kinds], words, boxes, size, scale.clutter(size, 22, 34))


def _fragment_alpha(
    pool: DigitPool, words: SceneWords, boxes: np.ndarray, size: int, scale: ObjectScale
) -> np.ndarray:
    """Windows of at most 4x4 cells out of digits: locally like strokes, too small to be a digit."""
    sprites = pool.pictures[words.integers(0, len(pool.pictures), _FRAGMENTS)]
    axis = np.arange(SPRITE)
    windows = []
    for _ in range(2):
        length = words.integers(3, 5, _FRAGMENTS)
        first = words.integers(1, SPRITE - length, _FRAGMENTS)
        windows.append((axis >= first[..., None]) & (axis < (first + length)[..., None]))
    sprites = sprites * windows[0][..., None] * windows[1][..., None, :]
    return _scatter(sprites, words, boxes, size, scale.clutter(size, 26, 40))


def _scatter(
    sprites: np.ndarray, words: SceneWords, boxes: np.ndarray, size: int, sides: tuple[int, int]
) -> np.ndarray:
    """Opacity of sprites at random places, without those that come near the digit's box."""
    count = sprites.shape[1]
    side = words.integers(*sides, count)
    left, top = (
        words.integers(-side // 3, size - side * 2 // 3, count),
        words.integers(-side // 3, size - side * 2 // 3, count),
    )
    present = words.integers(0, 4, count) > 0
    x0, y0, x1, y1 = _sprite_extent(sprites, left, top, side)
    gap = size // 32
    digit = boxes[:, :, None].transpose(1, 0, 2)
    apart = (x1 <= digit[0] - gap) | (x0 >= digit[2] + gap) | (y1 <= digit[1] - gap) | (y0 >= digit[3] + gap)
    kept = sprites * (present & apart)[..., None, None]
    return _alpha(draw_sprites(kept, placement_weights(top, side, size), placement_weights(left, side, size)))


def _sprite_extent(
    sprites: np.ndarray, left: np.ndarray, top: np.ndarray, side: np.ndarray
) -> list[np.ndarray]:
    """Pixels x0, y0, x1, y1 that the filled cells of each sprite cover, one cell of slack for the interpolation."""
    filled = sprites > 0
    edges = []
    for axis, start in ((2, left), (3, top)):
        cells = filled.any(axis)
        first, last = cells.argmax(-1), SPRITE - cells[..., ::-1].argmax(-1)
        edges.append((start + (first - 1) * side // SPRITE, start + (last + 1) * side // SPRITE))
    (x0, x1), (y0, y1) = edges
    return [x0, y0, x1, y1]


def _blend(canvas: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> None:
    """Paint `colour` [B, 3] over the canvas [B, 3, S, S] in place with opacity [B, S, S] in 0..128."""
    # Differences are clipped to 255, so the product with 128 stays inside int16.
    np.clip(canvas, 0, 255, out=canvas)
    change = colour[:, :, None, None].astype(np.int16) - canvas
    change *= alpha[:, None]
    change >>= 7
    canvas += change


def _add_noise(canvas: np.ndarray, words: SceneWords) -> np.ndarray:
    """Add triangular noise of a random strength per image; uint8 [B, S, S, 3]."""
    b, _, size, _ = canvas.shape
    strength = words.integers(4, 21, 1).astype(np.int16)[:, :, None]
    count = size * size * 3
    words.take(_PARAMETER_WORDS - words.used)
    noise = words.bytes((count + 7) // 8 * 8)[:, :count].reshape(b, size * size, 3).astype(np.int16)
    # The sum of a byte and its neighbour's is triangular, at half the cost of two draws.
    noise += np.roll(noise, 1, axis=1)
    noise -= 255
    noise *= strength
    noise >>= 7
    noise = noise.reshape(b, size, size, 3)
    noise += canvas.transpose(0, 2, 3, 1)
    return np.clip(noise, 0, 255).astype(np.uint8)
