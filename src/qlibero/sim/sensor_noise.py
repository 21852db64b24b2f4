"""LIBERO-plus's camera noise: motion blur, blur, zoom blur, fog and glass (after ImageNet-C), ten strengths of each.

Its arithmetic, less what makes an episode depend on others: it draws from numpy's global stream, here from one that
the caller gives. Three more differences. Motion blur is ImageMagick's algorithm written out, so that nothing needs to
be installed. Fog works with numpy 2. Glass covers the whole frame at every resolution, where LIBERO-plus shuffles the
first 224 rows and columns of whatever it gets; like there, a pixel takes its neighbour's colour (it says swap, but
swaps views of one array).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy import ndimage

from qlibero.sim.glass import shuffle

RECIPE = "qlibero-plus-noise-1"
"""Part of what noise is drawn from: a change of how must change this name, or equal keys had other frames."""
STRENGTHS = 10
Frame = NDArray[np.uint8]
Reals = NDArray[np.float64]

# (radius, sigma) of the blur in pixels
_MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
# largest zoom and step
_ZOOM = (
    *((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    *((1.36, 0.01), (1.41, 0.01), (1.46, 0.02), (1.51, 0.02), (1.56, 0.03)),
)
# thickness, how fast the detail of its clouds decays
_FOG = (
    *((0.5, 3.0), (1.0, 2.8), (1.5, 2.5), (2.0, 2.2), (2.5, 2.0)),
    *((3.0, 1.8), (3.5, 1.6), (4.0, 1.5), (4.5, 1.4), (5.0, 1.3)),
)
# sigma of the blur, how far a pixel moves, how often
_GLASS = (
    *((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2)),
    *((1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2), (2.2, 5, 1), (2.5, 5, 1)),
)


def disturb(frame: Frame, noise: int, draws: RandomState) -> Frame:
    """A frame (R, R, 3) with noise 1…50: motion blur 1…10, blur 11…20, zoom blur, fog, glass, each weakest first."""
    kind, strength = divmod(noise - 1, STRENGTHS)
    return (_motion, _blur, _zoom, _fog, _glass)[kind](frame, strength, draws)


def _motion(frame: Frame, strength: int, draws: RandomState) -> Frame:
    """ImageMagick's MotionBlurImage: half a Gaussian along a line, the frame's edge repeated beyond it."""
    radius, sigma = _MOTION[strength]
    angle = math.radians(draws.uniform(-45, 45))
    width, size = 2 * radius + 1, frame.shape[0]
    weights = np.exp(-(np.arange(width) ** 2) / (2.0 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    weights /= weights.sum()
    blurred = np.zeros(frame.shape)
    for step, weight in enumerate(weights):
        x, y = math.ceil(step * math.cos(angle) - 0.5), math.ceil(step * math.sin(angle) - 0.5)
        rows, columns = (np.clip(np.arange(size) + by, 0, size - 1) for by in (y, x))
        blurred += weight * frame[rows][:, columns]
    return ((blurred * 257 + 0.5).astype(np.uint16) // 257).astype(np.uint8)  # its pixels have 16 bits


def _gaussian(frame: Reals, sigma: float) -> Reals:
    found: Reals = ndimage.gaussian_filter(frame, (sigma, sigma, 0), mode="nearest", truncate=4.0)
    return found


def _blur(frame: Frame, strength: int, draws: RandomState) -> Frame:
    return _as_bytes(_gaussian(frame / 255.0, strength + 1))


def _zoom(frame: Frame, strength: int, draws: RandomState) -> Frame:
    most, step = _ZOOM[strength]
    factors = np.arange(1, most, step)
    seen = (frame / 255.0).astype(np.float32)
    total, size = np.zeros_like(seen), frame.shape[0]
    for factor in factors:
        crop = math.ceil(size / factor)
        at = (size - crop) // 2
        larger = ndimage.zoom(seen[at : at + crop, at : at + crop], (factor, factor, 1), order=1)
        trim = (larger.shape[0] - size) // 2
        total += larger[trim : trim + size, trim : trim + size]
    return _as_bytes((seen + total) / (len(factors) + 1))


def _fog(frame: Frame, strength: int, draws: RandomState) -> Frame:
    thickness, decay = _FOG[strength]
    seen, size = frame / 255.0, frame.shape[0]
    brightest = seen.max()
    seen += thickness * _clouds(1 << (size - 1).bit_length(), decay, draws)[:size, :size, None]
    return _as_bytes(seen * brightest / (brightest + thickness))


def _clouds(size: int, decay: float, draws: RandomState) -> Reals:
    """A fractal heightmap (size, size) in 0…1 by the diamond-square algorithm; `size` is a power of two."""
    clouds = np.zeros((size, size))
    step, wobble = size, 100.0

    def mean(total: Reals) -> Reals:
        found: Reals = total / 4 + wobble * draws.uniform(-wobble, wobble, total.shape)
        return found

    while step >= 2:
        half = step // 2
        corners = clouds[0:size:step, 0:size:step]
        squares = corners + np.roll(corners, -1, axis=0)
        squares += np.roll(squares, -1, axis=1)
        clouds[half:size:step, half:size:step] = mean(squares)
        middles, corners = clouds[half:size:step, half:size:step], clouds[0:size:step, 0:size:step]
        beside = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        clouds[0:size:step, half:size:step] = mean(beside)
        above = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        clouds[half:size:step, 0:size:step] = mean(above)
        step, wobble = half, wobble / decay
    clouds -= clouds.min()
    clouds /= clouds.max()
    return clouds


def _glass(frame: Frame, strength: int, draws: RandomState) -> Frame:
    sigma, far, times = _GLASS[strength]
    seen = (_gaussian(frame / 255.0, sigma) * 255).astype(np.uint8)
    side = seen.shape[0] - 2 * far
    for _ in range(times):
        shuffle(seen, draws.randint(-far, far, (side, side, 2)), far)
    return _as_bytes(_gaussian(seen / 255.0, sigma))


def _as_bytes(frame: NDArray[np.floating]) -> Frame:
    found: Frame = (np.clip(frame, 0, 1) * 255).astype(np.uint8)
    return found
