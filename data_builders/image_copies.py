"""Pictures that are the same though their pixels are not: re-encoded, resized, brightened, cropped a little, mirrored.

A perceptual hash of 256 bits proposes pairs, and each pair is then verified: one thumbnail is moved, stretched and
turned a little until it fits the other best, and then they must correlate. Panoramics are all alike in layout, so a
hash alone would merge patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import fft, ndimage

SIDE = 96  # thumbnails are squares: what was stretched to another shape looks the same again
HASH_SIDE = 16  # 64 bits over-group panoramics
PROPOSED = 0.30  # share of bits that may differ; measured: other panoramics 0.36 and more, crops 0.23
NEAREST = 8  # pictures that one is verified against at most
LEVELS = {24: 0.9, 48: 0.93, 96: 1.0}  # sides that a fit goes through; the correlation below which it ends there
ROUNDS = 6
SHARED = 0.6  # of the thumbnail that the other must cover
ALIGNED = 0.9  # correlation from which on nothing is gained by another window
VERIFIED = 0.97  # correlation; measured: other panoramics 0.5, crops 0.98; 2 in a million pairs of phantoms exceed it
VERIFIED_FLIPPED = 0.98
MARGIN = 0.08  # what a crop may have cut off on one side
WINDOWS = (  # left, top, right, bottom of what is looked for in other pictures: all of it, or what a crop would leave
    (0.0, 0.0, 1.0, 1.0),
    (MARGIN / 2, MARGIN / 2, 1 - MARGIN / 2, 1 - MARGIN / 2),
    (0.0, 0.0, 1 - MARGIN, 1 - MARGIN),
    (MARGIN, 0.0, 1.0, 1 - MARGIN),
    (0.0, MARGIN, 1 - MARGIN, 1.0),
    (MARGIN, MARGIN, 1.0, 1.0),
)


class Match(NamedTuple):
    """Two pictures, by their places in the list that was searched, which show the same; `flipped`: one is mirrored."""

    first: int
    second: int
    flipped: bool
    correlation: float

    @property
    def shows_the_same(self) -> bool:
        """Whether the pair is verified; faces are nearly symmetric, so a mirrored copy must fit better."""
        return self.correlation >= (VERIFIED_FLIPPED if self.flipped else VERIFIED)


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """The picture in 96 x 96 greys (uint8), stretched to a square."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def perceptual_hash(thumbnails: np.ndarray) -> np.ndarray:
    """256 bits for each thumbnail of an array (n, 96, 96): which low frequencies are above their median."""
    spectrum = fft.dctn(thumbnails.astype(np.float32), axes=(1, 2))[:, :HASH_SIDE, :HASH_SIDE]
    spectrum = spectrum.reshape(len(thumbnails), -1)
    return spectrum > np.median(spectrum, axis=1, keepdims=True)


def find_copies(thumbnails: Sequence[np.ndarray]) -> list[Match]:
    """Every verified pair among the thumbnails, each once, with the better of its two orientations."""
    if len(thumbnails) < 2:
        return []
    stack = np.stack(thumbnails)
    whole = hash_signs(stack)
    best: dict[tuple[int, int], Match] = {}
    for flipped in (False, True):
        shown = stack[:, :, ::-1] if flipped else stack
        for window in WINDOWS:
            windows = np.stack([cut(thumbnail, window) for thumbnail in shown])

            def verify(first: int, second: int, windows: np.ndarray = windows, flipped: bool = flipped) -> bool:
                pair = min(first, second), max(first, second)
                if pair not in best or best[pair].correlation < ALIGNED:
                    correlation = fit(windows[first], stack[second])
                    if pair not in best or correlation > best[pair].correlation:
                        best[pair] = Match(*pair, flipped, round(correlation, 3))
                return best[pair].shows_the_same

            walk_nearest(hash_signs(windows), whole, verify)
    return sorted(match for match in best.values() if match.shows_the_same)


def walk_nearest(queries: np.ndarray, whole: np.ndarray, verify: Callable[[int, int], bool]) -> None:
    """Call `verify` with the place of each query and those of pictures with a near hash, nearest first.

    Query and picture of the same place are not compared. A query is done with after two pictures that were not
    verified, or `NEAREST` in all: copies of copies are joined by their groups.
    """
    bits = whole.shape[1]
    for start in range(0, len(queries), 1000):
        # Of signs the product is the number of equal bits less that of different ones.
        distance = (bits - queries[start : start + 1000] @ whole.T) / (2 * bits)
        rows = np.arange(len(distance))
        distance[rows, start + rows] = 1.0
        patience = np.full(len(distance), 2)
        for _ in range(NEAREST):
            nearest = distance.argmin(axis=1)
            near = np.flatnonzero((distance[rows, nearest] <= PROPOSED) & (patience > 0))
            for row in near:
                patience[row] -= not verify(start + int(row), int(nearest[row]))
            if not len(near):
                break
            distance[rows, nearest] = 1.0


def hash_signs(thumbnails: np.ndarray) -> np.ndarray:
    """The perceptual hashes of thumbnails as 1 and -1, whose products count equal bits."""
    blocks = range(0, len(thumbnails), 1000)  # the spectra of all at once would fill the memory
    bits = np.concatenate([perceptual_hash(thumbnails[start : start + 1000]) for start in blocks])
    return np.where(bits, np.float32(1), np.float32(-1))


def cut(thumbnail: np.ndarray, window: tuple[float, ...]) -> np.ndarray:
    """What lies in a window (fractions: left, top, right, bottom) of a thumbnail, as a thumbnail."""
    if window == WINDOWS[0]:
        return thumbnail
    left, top, right, bottom = (side * SIDE for side in window)
    image = Image.fromarray(np.ascontiguousarray(thumbnail))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, right, bottom)))


def fit(moving: np.ndarray, still: np.ndarray, *, finest: int = SIDE) -> float:
    """Correlation (-1 to 1) of the fine structure of two thumbnails when one is laid over the other as well as can be.

    Moved, stretched, turned: an affine map, found by Gauss-Newton steps on small pictures first, then on larger ones,
    up to a side of `finest` pixels.
    """
    matrix, shift = np.eye(2), np.zeros(2)
    for side, enough in LEVELS.items():
        first, second = fine_structure(_reduce(moving, side)), fine_structure(_reduce(still, side))
        shift = shift * side
        best = -1.0
        for _ in range(ROUNDS):
            moved = ndimage.affine_transform(first, matrix, shift, order=1, mode="constant", cval=np.nan)
            correlation = _correlate(moved, second)
            if correlation < best + 0.002:
                break
            best = correlation
            step = _gauss_newton_step(moved, second)
            # The step is in the frame of the moved picture, so it goes inside of what was found before.
            shift, matrix = matrix @ step[:, 2] + shift, matrix @ (np.eye(2) + step[:, :2])
        if side >= finest or best < enough or np.abs(matrix - np.eye(2)).max() > 0.2:
            break
        shift = shift / side
    return best


def fine_structure(thumbnail: np.ndarray) -> np.ndarray:
    """Edges and teeth, without the exposure and without what resizing and compression change."""
    return ndimage.gaussian_filter(thumbnail, 0.7) - ndimage.gaussian_filter(thumbnail, 3.0)


def _reduce(thumbnail: np.ndarray, side: int) -> np.ndarray:
    factor = SIDE // side
    return thumbnail.reshape(side, factor, side, factor).mean(axis=(1, 3), dtype=np.float32)


def _inside(values: np.ndarray) -> np.ndarray:
    """Without the border, whose fine structure depends on what lies beyond it."""
    border = len(values) // 16
    return values[border:-border, border:-border].ravel()


def _correlate(moved: np.ndarray, still: np.ndarray) -> float:
    moved, still = _inside(moved), _inside(still)
    shared = ~np.isnan(moved)
    if shared.mean() < SHARED:
        return 0.0
    moved, still = moved[shared], still[shared]
    moved, still = moved - moved.mean(), still - still.mean()
    norm = float(np.linalg.norm(moved) * np.linalg.norm(still))
    return float(moved @ still) / norm if norm > 1e-3 else 0.0


def _gauss_newton_step(moved: np.ndarray, still: np.ndarray) -> np.ndarray:
    """The small affine map (2 x 3, rows before columns) that carries `moved` towards `still`, contrast matched."""
    rows, columns = np.mgrid[: len(moved), : len(moved)].astype(np.float32)
    by_row, by_column = np.gradient(moved)
    terms = [by_row * rows, by_row * columns, by_row, by_column * rows, by_column * columns, by_column, moved]
    design = np.stack([_inside(term) for term in terms])
    shared = ~np.isnan(design).any(axis=0)
    design, difference = design[:, shared], _inside(still - moved)[shared]
    normal = design @ design.T
    normal[np.diag_indices_from(normal)] = normal.diagonal() * 1.000001 + 1e-6  # a picture without structure has no map
    return np.linalg.solve(normal, design @ difference)[:6].reshape(2, 3)
