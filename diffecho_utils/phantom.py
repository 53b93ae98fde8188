"""Phantom: a stand-in for CAMUS, drawn from anatomy and from the physics of an ultrasound image.

Chapter 01. Two steps, and the file reads in that order:

1. A heart: smooth contours of the left ventricle (LV), the left atrium and, in the four-chamber
   view, the right heart, in millimetres, for a fraction `beat` of the way from end-diastole (0)
   to end-systole (1). The label map is read off these contours.
2. An ultrasound machine: the convolution model of speckle. Complex Gaussian scatterers, weighted
   by how strongly each tissue echoes, are convolved with a point spread function on the beams'
   own polar grid; then envelope, log compression and scan conversion. `INGREDIENTS` are what
   separates such a picture from a clean one; each can be left out.

Chamber sizes: normal ranges, widened to CAMUS's mix of healthy and dilated hearts. All else is fitted
to means and spreads over CAMUS's frames and label maps (Leclerc et al. 2019), even where these draw
walls thicker than a healthy heart's; `experiments/phantom_realism.py` measures how well it fits.
"""

import contextlib
import errno
import gzip
import json
import os
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from joblib import Parallel, cpu_count, delayed
from scipy import ndimage, sparse
from scipy.interpolate import PchipInterpolator

from diffecho_utils import DiffEchoError
from diffecho_utils.camus import PHASES, SPLITS, VIEWS, frame_path

VERSION = 3  # of the pictures: `ensure` rewrites a folder that another version wrote
SIDE = 256  # pixels in depth

INGREDIENTS = (
    "speckle",  # interference of many scatterers within one resolution cell
    "texture",  # tissue that is no uniform paint, with rough borders: K-distributed echoes
    "pericardium",  # bright interfaces around the chambers
    "valves",  # leaflets, their hinges, papillary muscles
    "angle",  # walls along the beam echo less than walls across it
    "attenuation",  # loss in tissue that the machine's depth gain does not match
    "sidelobes",  # energy that leaves beside the beam and smears bright echoes sideways
    "clutter",  # haze in the chambers and near the probe
    "reverberation",  # echoes that bounce twice and arrive late
    "shadow",  # ribs and lung between probe and heart
    "noise",  # of the receiver, amplified with depth
    "gain",  # slow variation over the sector
)

# Half width of the LV at distances from its apex (0) to the mitral plane (1), in units of the
# largest, and how far its midline lies to the right; at end-diastole, then at end-systole.
_S = (0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0)
_WIDTH = {
    "2CH": ((0, 0.58, 0.79, 0.93, 1, 0.84, 0.76), (0, 0.54, 0.74, 0.90, 1, 0.88, 0.80)),
    "4CH": ((0, 0.59, 0.82, 0.95, 1, 0.84, 0.77), (0, 0.55, 0.75, 0.89, 1, 0.90, 0.84)),
}
_MIDLINE = {
    "2CH": ((0, 0.05, 0.08, 0.07, 0.02, -0.01, -0.02), (0, 0.04, 0.07, 0.06, 0.01, 0.00, 0.00)),
    "4CH": ((0, 0.03, 0.05, 0.08, 0.05, 0.02, 0.01), (0, 0.03, 0.05, 0.07, 0.01, -0.01, -0.01)),
}


@dataclass(frozen=True)
class View:
    """What differs between the two apical views of a patient: millimetres, radians."""

    name: str  # "2CH" or "4CH"
    apex: tuple[float, float]  # inner apex at end-diastole, (lateral, depth); (0, 0) is the probe
    tilt: float  # of the LV's long axis; positive: its base to the right of the picture
    width: float  # largest inner width of the LV at end-diastole
    walls: tuple[float, ...]  # thickness at end-diastole: left, apex, right
    atrium: tuple[float, ...]  # left atrium at end-systole: length, width
    right_heart: tuple[float, ...]  # widths of ventricle and atrium, drawn in 4CH only
    shape: tuple[float, ...]  # standard normal deviates that bend and swell the contours
    degradation: float  # 0: a perfect window between the ribs; 1: hardly any
    quality: str  # "Good", "Medium", "Poor": `degradation` cut into CAMUS's proportions
    dynamic_range: float  # decibels from black to white
    brightness: float  # where in that range the myocardium lies, 0 to 1
    gamma: float  # exponent of the grey map
    frames: int  # of the half sequence
    seed: tuple[int, ...]  # of scatterers, texture, shadows


@dataclass(frozen=True)
class Patient:
    """What both views and both phases of a patient share."""

    name: str
    sex: str
    age: int
    ejection_fraction: float  # as drawn; the contours realise it to a few points: `volumes`
    shortening: float  # share of the LV's length that it loses in systole
    length: float  # mm, inner LV length at end-diastole
    depth: float  # mm, of the sector
    half_angle: float  # radians, of the sector
    frame_rate: float
    views: dict[str, View]


def patient(seed, index):
    """Patient number `index` (0, 1, ...) of the phantom `seed`: a `Patient`, not yet rendered."""
    rng = np.random.default_rng([seed, index])
    male = rng.random() < 0.66
    ef = _draw(rng, 0.49, 0.13, 0.2, 0.76)
    dilated = 1 + 0.35 * (0.5 - ef)
    length = _draw(rng, 86 if male else 79, 7, 62, 108) * dilated
    depth = length / _draw(rng, 0.535, 0.09, 0.33, 0.75)
    angle = rng.choice([30, 37.4, 39.8, 45], p=[0.08, 0.72, 0.13, 0.07])  # CAMUS's sector shapes
    window, slender, thick, large = rng.normal(size=4)  # a round heart is round in both views
    views = {}
    for name, lateral, tilt, width, walls, atrium in (
        ("2CH", -0.068, (17, 8.5), 0.605, (0.225, 0.155, 0.20), (48, 42)),
        ("4CH", -0.034, (13.5, 6.5), 0.58, (0.157, 0.14, 0.157), (48, 45)),
    ):
        turn = np.radians(rng.normal(0, tilt[1]))
        lateral = depth * _draw(rng, lateral, 0.04, -0.25, 0.25) - 0.3 * length * np.sin(turn)
        quality = 0.8 * window + 0.6 * rng.normal()  # standard normal, alike in both views
        views[name] = View(
            name=name,
            apex=(float(lateral), depth * _draw(rng, 0.203, 0.046, 0.09, 0.34)),
            tilt=float(np.radians(tilt[0]) + turn),
            width=length * width * dilated * _vary(rng, 0.07, 0.1 * slender),
            walls=tuple(length * wall * _vary(rng, 0.08, 0.12 * thick) for wall in walls),
            atrium=tuple(mm * _vary(rng, 0.11, 0.09 * large) for mm in atrium),
            right_heart=tuple(mm * _vary(rng, 0.2) for mm in (34, 44)),
            shape=tuple(rng.normal(size=14).tolist()),
            degradation=float(1 / (1 + np.exp(-1.2 * quality))),
            quality="Good" if quality < -0.385 else "Medium" if quality < 0.878 else "Poor",
            dynamic_range=_draw(rng, 55, 5, 42, 70),
            brightness=_draw(rng, 0.52, 0.05, 0.36, 0.70),
            gamma=_draw(rng, 1.3, 0.12, 1.0, 1.7),
            frames=int(rng.integers(12, 23)),
            seed=(seed, index, VIEWS.index(name)),
        )
    return Patient(
        name=f"patient{index + 1:04d}",
        sex="M" if male else "F",
        age=int(_draw(rng, 65, 14, 20, 93)),
        ejection_fraction=ef,
        shortening=0.285 * ef * _vary(rng, 0.22),
        length=length,
        depth=depth,
        half_angle=float(np.radians(angle)),
        frame_rate=round(_draw(rng, 50, 8, 30, 80), 1),
        views=views,
    )


def volumes(patient):
    """(end-diastolic, end-systolic) LV volume in millilitres, from the contours before any pixel.

    Biplane Simpson: pi / 4 times the integral of width(2CH) * width(4CH) along the long axis.
    """
    s, result = np.linspace(0, 1, 401), []
    for beat in (0, 1):
        hearts = [_heart(patient, view, beat) for view in patient.views.values()]
        widths = [np.interp(s, h.s, h.right - h.left) for h in hearts]
        result.append(float(np.pi / 4 * np.mean(widths[0] * widths[1]) * hearts[0].length / 1000))
    return tuple(result)


def frame(patient, view, phase, ingredients=INGREDIENTS, side=SIDE):
    """One frame: image (lateral, depth) uint8, mask (lateral, depth) uint8, pixel spacing in mm.

    `side` pixels in depth; square ones, and the sector's angle gives the width, as in CAMUS.
    `ingredients`: those of `INGREDIENTS` to apply; each draws its own random numbers, so that
    leaving one out changes nothing else.
    Raises DiffEchoError for an unknown view, phase or ingredient.
    """
    if phase not in PHASES or view not in VIEWS:
        raise DiffEchoError(f"no frame {view}-{phase}: views are {VIEWS}, phases {PHASES}")
    unknown = sorted(set(ingredients) - set(INGREDIENTS))
    if unknown:
        raise DiffEchoError(f"unknown ingredients {unknown}; there are {INGREDIENTS}")
    return _render(patient, patient.views[view], PHASES.index(phase), ingredients, side)


def write(
    root, patients=60, seed=0, side=SIDE, half_sequences=False, processes=None, progress=None
):
    """Write a phantom folder in CAMUS's layout, in place of a phantom at `root`, and return `root`.

    Same seed, same bytes, whatever the number of `processes` (default: one a core; 1 stays in this
    process). Splits are about 80/10/10 by patient, none empty from 3 patients up; 2 give training
    and validation, 1 training alone. `progress(done, total)` is called after each patient. Raises
    DiffEchoError for patients < 1 or where `root` holds anything but a phantom.
    """
    root = Path(root)
    if patients < 1:
        raise DiffEchoError(f"{root}: {patients} patients asked for; a phantom needs at least 1")
    if root.exists() and not _description_of(root) and (root.is_file() or any(root.iterdir())):
        raise DiffEchoError(f"{root}: holds something else than a phantom; name an empty folder")
    place = root.resolve()
    for left in place.parent.glob(f".{place.name}.phantom-*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    draft = place.with_name(f".{place.name}.phantom-{os.getpid()}")
    new, old = draft / "new", draft / "old"
    jobs = [(new, seed, index, side, half_sequences) for index in range(patients)]
    work = Parallel(min(patients, processes or cpu_count()), return_as="generator")
    try:
        _write_splits(new, patients, seed)
        with contextlib.closing(work(map(delayed(_write_patient), jobs))) as written:
            for done, _ in enumerate(written, start=1):
                if progress:
                    progress(done, patients)
        description = json.dumps(_description(patients, seed, side), indent=1)
        (new / "dataset.json").write_text(description + "\n")
        while new.exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(place, old)
            try:
                os.replace(new, place)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                shutil.rmtree(old, ignore_errors=True)  # another process was quicker with its own
    finally:
        if old.exists() and not place.exists():
            os.replace(old, place)
        shutil.rmtree(draft, ignore_errors=True)
    return root


def ensure(root, patients=60, seed=0, progress=None):
    """Path of the phantom folder `root`: written unless there, whole, and the one asked for."""
    root = Path(root)
    if _description_of(root) == _description(patients, seed, SIDE):
        names = [f"patient{number:04d}" for number in range(1, patients + 1)]
        masks = [frame_path(root, n, v, p, mask=True) for n in names for v in VIEWS for p in PHASES]
        if all(path.is_file() for path in masks):
            return root
    return write(root, patients, seed, progress=progress)


# --- the heart: u and t are mm along and across the LV's long axis, from the inner apex -----------


@dataclass(frozen=True)
class _Heart:
    """Contours of one view at one moment."""

    view: View
    beat: float
    length: float
    width: float
    origin: tuple[float, ...]  # inner apex (lateral, depth)
    axis: tuple[float, ...]  # unit vector from apex to base (lateral, depth)
    s: np.ndarray  # 0 to 1 along the axis, and there t of the
    left: np.ndarray  # cavity's borders
    right: np.ndarray
    septum: np.ndarray  # wall's outer border on the left
    centre: tuple[float, float]  # (u, t), about which both contours are star-shaped:
    inner: tuple[np.ndarray, np.ndarray]  # angle (0 towards the apex), radius
    outer: tuple[np.ndarray, np.ndarray]

    def place(self, u, t):
        """(lateral, depth) of a point (u, t)."""
        (x, y), (ax, ay) = self.origin, self.axis
        return x + u * ax + t * ay, y + u * ay - t * ax


def _heart(patient, v, beat):
    z, ef = v.shape, patient.ejection_fraction
    shortened = 1 - patient.shortening  # the widths take the rest of the contraction
    narrowed = np.sqrt((1 - ef) / shortened) * (1 + 0.03 * z[11])
    s = np.linspace(0, 1, 121) ** 2  # dense where the apex is round
    contours, perimeters = [], []
    for end, along, scale in ((0, 1, 1), (1, shortened, narrowed)):
        half = PchipInterpolator(np.sqrt(_S), _WIDTH[v.name][end])(np.sqrt(s)) / 2
        half *= np.exp(0.05 * z[0] * np.cos(np.pi * s) + 0.03 * z[1] * np.cos(2 * np.pi * s))
        middle = PchipInterpolator(_S, _MIDLINE[v.name][end])(s)
        middle += 0.05 * z[2] * np.sin(np.pi * s) + 0.015 * z[3] * np.sin(2 * np.pi * s)
        swell = [1 + 0.02 * z[k] * np.sin(2 * np.pi * s * (1 + 0.3 * z[k + 1])) for k in (4, 6)]
        contour = np.stack([middle - half * swell[0], middle + half * swell[1]]) * v.width * scale
        contours.append(contour)
        perimeters.append(np.hypot(np.diff(patient.length * along * s), np.diff(contour)).sum())
    left, right = (1 - beat) * contours[0] + beat * contours[1]
    length = patient.length * (1 - beat * (1 - shortened))
    # The muscle about keeps its area: what the contour loses in length, the wall gains in thickness.
    thickening = 1 + beat * (0.94 * np.exp(0.075 * z[12]) * perimeters[0] / perimeters[1] - 1)
    # The base comes up to the apex, which stays nearly in place.
    first, now = ((np.sin(a), np.cos(a)) for a in (v.tilt, v.tilt * (1 - 0.25 * beat)))
    base = patient.length - 0.78 * (patient.length - length)
    origin = tuple(float(v.apex[i] + base * first[i] - length * now[i]) for i in (0, 1))
    centre = 0.6 * length, float(np.interp(0.6, s, (left + right) / 2))
    inner = np.stack([np.r_[s[:0:-1], s] * length, np.r_[left[:0:-1], right]], 1)
    tangent = np.gradient(inner, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / np.hypot(*tangent.T)[:, None]
    part = np.clip(inner[:, :1] / (0.4 * length), 0, 1)
    sides = np.where(np.arange(len(inner))[:, None] < len(s), v.walls[0], v.walls[2])
    wall = v.walls[1] + (sides - v.walls[1]) * part * part * (3 - 2 * part)
    outer = inner + normal * wall * thickening
    septum = np.interp(s, outer[len(s) - 1 :: -1, 0] / length, outer[len(s) - 1 :: -1, 1])
    return _Heart(
        v, beat, length, float(np.max(right - left)), origin, tuple(map(float, now)),
        s, left, right, septum, centre, _star(inner, centre), _star(outer, centre),
    )  # fmt: skip


def _star(contour, centre):
    """(angle, radius) about the centre, the contour's open ends led on past the mitral plane."""
    ends = contour[[0, -1]] + [0.5 * np.ptp(contour[:, 0]), 0]
    u, t = (np.vstack([ends[:1], contour, ends[1:]]) - centre).T
    order = np.argsort(np.arctan2(t, -u))
    return np.arctan2(t, -u)[order], np.hypot(u, t)[order]


def _structures(h, x, y):
    """What lies at the points (x, y) in mm: fields of the labels, and distances from them."""
    v, z = h.view, h.view.shape
    dx, dy = x - h.origin[0], y - h.origin[1]
    u, t = dx * h.axis[0] + dy * h.axis[1], dx * h.axis[1] - dy * h.axis[0]
    angle = np.arctan2(t - h.centre[1], h.centre[0] - u)
    radius = np.hypot(t - h.centre[1], h.centre[0] - u)
    inner, outer = (np.float32(np.interp(angle, *c)) for c in (h.inner, h.outer))
    slope = 0.05 * z[8] + (0.09 if v.name == "4CH" else 0.05)
    below = u - h.length * (1 + slope * t / h.width)  # the mitral plane
    depth = (radius - inner) / (outer - inner)  # through the wall, 0 to 1
    lip = 0.06 * h.length * np.sqrt(np.clip(1 - (2 * depth - 1) ** 2, 0, 1))  # its rounded ends
    wall = (depth >= 0) & (depth < 1) & (below < lip)
    # Left atrium: a superellipse hung from the mitral plane, its axis nearer to the vertical.
    small = 0.79 * np.exp(0.13 * z[13]), 0.925 * np.exp(0.06 * z[13])  # at end-diastole
    length, width = (mm * (k + (1 - k) * h.beat) for mm, k in zip(v.atrium, small, strict=True))
    aside = -0.1 if v.name == "4CH" else 0
    hang = h.place(h.length, float(h.left[-1] + h.right[-1]) / 2 + aside * h.width)
    tilt = float(0.5 * np.arctan2(*h.axis) + 0.1 * z[9] + aside)
    dx, dy = x - hang[0], y - hang[1]
    down = (dx * np.sin(tilt) + dy * np.cos(tilt)) / length
    across = dx * np.cos(tilt) - dy * np.sin(tilt) + 0.15 * z[10] * width * down * (1 - down)
    level = (np.abs((down - 0.42) / 0.58) ** 2.6 + np.abs(2 * across / width) ** 2.6) ** (1 / 2.6)
    return SimpleNamespace(
        cavity=(radius < inner) & (below < 0), wall=wall, atrium=(level < 1) & (below >= 0) & ~wall,
        u=u, t=t, angle=angle, below=below, depth=depth, down=down, across=across,
        outside=radius - outer, atrial=(level - 1) * width / 2,
    )  # fmt: skip


def _right_heart(h, g):
    """Blood and walls of right ventricle and atrium in a four-chamber view, as boolean fields."""
    s, (wide, wide_atrium) = g.u / h.length, h.view.right_heart
    septum = np.float32(np.interp(s, h.s, h.septum))
    free = (septum - g.t) / (wide * (1 - 0.2 * h.beat))  # across the ventricle, 0 at the septum
    taper = np.clip((s - 0.12) / 0.88, 0, 1) ** 0.6  # where the free wall begins
    high = (s > 0.12) & (s < 0.95) & (free > 0)
    middle = -(h.view.atrium[1] + wide_atrium) / 2 - 4  # 4 mm of septum between the atria
    level = np.abs((g.down - 0.4) / 0.52) ** 2.4
    level = level + np.abs(2 * (g.across - middle) / wide_atrium) ** 2.4
    low = (s > 0.98) & ~g.atrium
    blood = (high & (free < taper)) | (low & (level < 1))
    return blood, ((high & (free < taper + 0.13)) | (low & (level < 1.4))) & ~blood


def _valves(h, rng):
    """Small bright structures as rows of (lateral, depth, size in mm, echo amplitude)."""
    points = []
    valves = [(h.left[-1], h.right[-1], h.length)]
    if h.view.name == "4CH":  # tricuspid, a little nearer to the apex
        valves.append((h.septum[-1] - h.view.right_heart[0], h.septum[-1] + 2, 0.95 * h.length))
    for left, right, base in valves:
        meet = left + (right - left) * rng.normal(0.57, 0.06)
        for hinge, sign in ((left, 1), (right, -1)):
            reach, opening = abs(meet - hinge), (1 - h.beat) * rng.uniform(0.2, 1)
            for p in np.linspace(0, 1, 14):  # from hinge to tip: closed, a flat tent; open, a gate
                u = base - reach * ((1 - opening) * 0.15 * np.sin(2 * p) + opening * 0.9 * p)
                t = hinge + sign * reach * p * (1 - opening + opening * (0.2 + 0.3 * p))
                points.append((*h.place(u, t), rng.uniform(0.7, 1.5), rng.gamma(1.5, 0.6)))
            for _ in range(4):  # the fibrous ring
                u, t = base + rng.normal(0, 3), hinge - sign * rng.uniform(-1, 7)
                points.append((*h.place(u, t), rng.uniform(1.5, 4), rng.uniform(0.3, 1.4)))
    for border in (h.left, h.right):  # papillary muscles and chords, within the cavity's label
        for p in np.linspace(0.35, 0.75, 9):
            t = np.interp(p, h.s, border) * rng.normal(0.7, 0.05)
            points.append((*h.place(p * h.length, t), 1.5, rng.uniform(0.1, 0.5)))
    return points


# --- the machine ----------------------------------------------------------------------------------

RANGES, BEAMS = 320, 160  # samples along a beam, beams across the sector
LOOKS = 2  # pictures at neighbouring frequencies, averaged: what scanners do against speckle
_PULSE = (0, 0.9, 1.6)  # standard deviations of the point spread function: -, ranges, beams


def _render(patient, v, beat, ingredients, side):
    h = _heart(patient, v, beat)
    lateral, depth, rows, columns, inside = _scan_grid(side, patient.half_angle)
    g = _structures(h, lateral * patient.depth, depth * patient.depth)
    mask = np.select([g.cavity, g.wall, g.atrium], [1, 2, 3]).astype(np.uint8)
    grey = _beams(patient, h, set(ingredients))
    image = ndimage.map_coordinates(grey, (rows, columns), order=1, mode="nearest")
    return np.where(inside, np.rint(image), 0).astype(np.uint8), mask, patient.depth / side


def _beams(patient, h, use):
    """The picture before scan conversion: (range, beam) float32 grey values 0 to 255."""
    v, bad = h.view, h.view.degradation
    r = np.linspace(0, patient.depth, RANGES, dtype=np.float32)[:, None]
    theta = np.linspace(-patient.half_angle, patient.half_angle, BEAMS, dtype=np.float32)[None]
    x, y = r * np.sin(theta), r * np.cos(theta)
    if "texture" in use:  # moves the tissue by a millimetre or two; experts' contours are smooth
        rng = _rng(v, "borders")
        x, y = (z + 0.8 * _field(rng, 60, 45) + 0.9 * _field(rng, 14, 10) for z in (x, y))
    g = _structures(h, x, y)
    amplitude = _echo(patient, h, g, theta, use)

    # Echoes: the scatterers turn over smoothly from end-diastole to end-systole.
    if "speckle" in use:
        weights = {"scatterers ED": np.sqrt(1 - h.beat), "scatterers ES": np.sqrt(h.beat)}
        power = _speckle(v, weights, amplitude)
        stray = _speckle(v, {"stray echoes": 1})
    else:
        power, stray = ndimage.gaussian_filter(amplitude, _PULSE[1:]) ** 2, 1
    if "attenuation" in use:
        rng = _rng(v, "attenuation")
        path = np.cumsum(~(g.cavity | g.atrium), 0) * np.float32(patient.depth / RANGES)
        loss = rng.uniform(0.02, 0.06) * (path - path.mean(1, keepdims=True))
        power *= _decibels(-loss - rng.normal(0, 3) * (r / patient.depth - 0.5))

    # Haze, and echoes in the wrong place.
    haze = np.full(power.shape, 1e-5, np.float32)
    if "sidelobes" in use:
        haze += 0.03 * ndimage.gaussian_filter1d(power, 12, axis=1)
    if "clutter" in use:
        rng = _rng(v, "clutter")
        veil = rng.normal(-13 + 3 * bad, 1.5) - 8 * r / patient.depth
        haze += _decibels(veil + 2 * _field(rng, 6, 5))
        haze += 0.02 * ndimage.gaussian_filter(power, (14, 12))
        haze += rng.uniform(0.03, 0.5) * np.exp(-r / np.float32(rng.uniform(5, 15)))
    if "reverberation" in use:
        rng = _rng(v, "reverberation")
        gap = int(rng.integers(10, 26))  # ranges between the probe and the layer it bounces off
        for k in (1, 2, 3):
            haze[k * gap :] += rng.uniform(0.002, 0.02) * power[: -k * gap]
            arc = np.exp(-((r - 0.7 * r[k * gap]) ** 2) / rng.uniform(1, 5))
            haze += rng.uniform(0, 1.5) / k * arc * np.exp(_field(rng, 2, 12))
    power += haze * (0.3 + 0.7 * stray)
    for stop, spread in ((45, 2), (28, 4), (14, 8)):  # near the probe no beam has formed yet
        power[:stop] = ndimage.gaussian_filter1d(power[:stop], spread, axis=1)
    if "shadow" in use:
        power *= _decibels(-_shadows(v, r / patient.depth, theta / patient.half_angle))
    if "noise" in use:
        rng = _rng(v, "noise")
        level = _decibels(-21 + 6 * bad + rng.normal(0, 2))
        power += level * _speckle(v, {f"noise {h.beat:.4f}": 1})
    level = 10 * np.log10(power) / v.dynamic_range + v.brightness
    if "gain" in use:
        rng = _rng(v, "gain")
        level += (3 * _field(rng, 4, 4) + 2 * _field(rng, 9, 2)) / v.dynamic_range
    return 255 * np.clip(level, 0, 1) ** v.gamma


def _echo(patient, h, g, theta, use):
    """Echo amplitude of the tissues, (range, beam) float32; 1 is the mean of the myocardium."""
    v, blood = h.view, g.cavity | g.atrium
    rng = _rng(v, "texture")
    patches, spots, streaks, grain = (
        _field(rng, *cells) if "texture" in use else np.zeros_like(g.u, np.float32)
        for cells in ((6, 5), (16, 12), (50, 12), (80, 50))
    )
    rng = _rng(v, "tissues")
    behind = (g.below > 0) & ~g.wall
    around = 9 * patches + 3 * spots + 3 * streaks + 2 * grain + float(rng.normal(-3, 3))
    around -= 4 * theta / patient.half_angle if v.name == "2CH" else 0
    around += rng.normal(5, 3) * np.exp(-((g.atrial - 6) ** 2) / 72) * behind
    if v.name == "4CH":
        right_blood, right_wall = _right_heart(h, g)
        around[right_wall] = (1 + 4 * patches + 3 * grain)[right_wall]
        blood = blood | right_blood
    muscle = rng.normal(2, 1) + rng.normal(0, 2) * (2 * g.depth - 1) - 2.5 * np.sin(g.angle)
    db = np.where(g.wall, muscle + 3.5 * patches + 3.5 * spots + 4.5 * grain, around)
    border = g.wall | ((np.abs(g.outside) < 8) & (g.below < 3))
    if "pericardium" in use:
        rng = _rng(v, "pericardium")
        rim = np.exp(-((g.outside - 1) ** 2) / (2 * rng.uniform(1.2, 2.5) ** 2)) * border
        if v.name == "4CH":
            rim *= np.where(g.t < 0, 0.3, 1)  # the septum has blood on both sides
        db += rng.normal(6, 3) * rim
        seen = behind / (1 + np.exp(-3 * spots))
        rim = np.exp(-((g.atrial - 1.5) ** 2) / 6)
        db += rng.normal(7, 3) * (1 - 0.6 * h.beat) * rim * seen
    if "angle" in use:
        across = np.cos(g.angle - np.arctan2(*h.axis) + theta) ** 2  # 1: the beam meets it head-on
        db += np.where(border, 3.5 * (across - 0.6), 0)
    db = np.where(blood, -35, db)
    if "clutter" in use:  # most in the atrium while it is small
        veil = _rng(v, "atrium").normal(-12, 4) - 14 * h.beat + 6 * np.exp(g.atrial / 5)
        db = np.where(g.atrium, veil, db)
    amplitude = np.sqrt(_decibels(db))
    if "valves" in use:
        for point in _valves(h, _rng(v, "valves")):
            _add_spot(amplitude, patient, *point)
    return amplitude


def _shadows(v, r, beam):
    """Decibels lost behind ribs and lung, from some range on, mostly near the sector's edges."""
    rng = _rng(v, "shadow")
    loss = 0 * r * beam
    for _ in range(1 + rng.poisson(1.6 * v.degradation)):
        at, wide = rng.choice([-1, 1]) * rng.uniform(0.3, 1.1), rng.uniform(0.06, 0.35)
        onset = np.clip(6 * (r - rng.uniform(0, 0.5)), 0, 1)
        loss += rng.uniform(1, 18) * onset * np.exp(-(((beam - at) / wide) ** 2))
    return loss


def _speckle(v, weights, amplitude=1):
    """Echo power of random scatterers times `amplitude`, averaged over looks: mean amplitude^2.

    Each look has a real and an imaginary part. `weights`: {random stream: weight}, squares sum to 1.
    """
    shape = (2 * LOOKS, RANGES, BEAMS)
    parts = sum(
        np.float32(weight) * _rng(v, stream).standard_normal(shape, dtype=np.float32)
        for stream, weight in weights.items()
        if weight
    )
    parts = ndimage.gaussian_filter(parts * amplitude, _PULSE, truncate=3)
    kept = 1 / (4 * np.pi * _PULSE[1] * _PULSE[2])  # what the blur leaves of white noise's variance
    return (parts**2).mean(0) / np.float32(kept)


def _field(rng, rows, columns):
    """Smooth random (range, beam) field, mean 0, variance 1, of about rows x columns patches."""
    weights = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.float32(_bumps(RANGES, rows) @ (_bumps(BEAMS, columns) @ weights.T).T)


@lru_cache(maxsize=32)
def _bumps(size, count):
    """`count` Gaussian bumps along `size` samples, squares summing to 1 at each: (size, count).

    Sparse: quick, and free of BLAS, whose threads would fight with the other processes'.
    """
    bumps = np.exp(-((np.linspace(0, count - 1, size)[:, None] - np.arange(count)) ** 2) / 0.7)
    bumps[bumps < 1e-12] = 0
    return sparse.csr_array(bumps / np.sqrt((bumps**2).sum(1, keepdims=True)))


def _add_spot(amplitude, patient, lateral, depth, size, strength):
    """Add a round bright spot (mm) to the polar map, in place."""
    r = max(np.hypot(lateral, depth), 1)
    angle = np.arctan2(lateral, depth) / patient.half_angle
    row, column = r / patient.depth * (RANGES - 1), (angle + 1) / 2 * (BEAMS - 1)
    tall, wide = size / patient.depth * RANGES, size / r / (2 * patient.half_angle) * BEAMS
    top, side = max(int(row - 3 * tall), 0), max(int(column - 3 * wide), 0)
    window = amplitude[top : max(int(row + 3 * tall), 0), side : max(int(column + 3 * wide), 0)]
    i, k = np.arange(window.shape[0]) + top - row, np.arange(window.shape[1]) + side - column
    window += strength * np.outer(np.exp(-0.5 * (i / tall) ** 2), np.exp(-0.5 * (k / wide) ** 2))


@lru_cache(maxsize=8)
def _scan_grid(side, half_angle):
    """For a sector of depth 1: pixel centres, their place on the polar grid, which are inside."""
    columns = round(2 * side * np.sin(half_angle))
    lateral = ((np.arange(columns, dtype=np.float32) + 0.5 - columns / 2) / side)[:, None]
    depth = ((np.arange(side, dtype=np.float32) + 0.5) / side)[None]
    r, angle = np.hypot(lateral, depth), np.arctan2(lateral, depth) / half_angle
    inside = (r <= 1) & (np.abs(angle) <= 1)
    return lateral, depth, r * (RANGES - 1), (angle + 1) / 2 * (BEAMS - 1), inside


# --- the folder -----------------------------------------------------------------------------------


def _write_patient(job):
    root, seed, index, side, half_sequences = job
    person = patient(seed, index)
    folder = root / "database_nifti" / person.name
    folder.mkdir(parents=True)
    diastolic, systolic = volumes(person)
    for view, v in person.views.items():
        for phase in PHASES:
            image, mask, spacing = frame(person, view, phase, side=side)
            _save(frame_path(root, person.name, view, phase), image.astype(np.float32), spacing)
            _save(frame_path(root, person.name, view, phase, mask=True), mask, spacing)
        if half_sequences:
            beats = np.linspace(0, 1, v.frames)
            film = [_render(person, v, beat, INGREDIENTS, side)[:2] for beat in beats]
            images, masks = (np.stack(pictures, -1) for pictures in zip(*film, strict=True))
            stem = f"{person.name}_{view}_half_sequence"
            _save(folder / f"{stem}.nii.gz", images.astype(np.float32), spacing)
            _save(folder / f"{stem}_gt.nii.gz", masks, spacing)
        (folder / f"Info_{view}.cfg").write_text(
            f"ED: 1\nES: {v.frames}\nNbFrame: {v.frames}\nSex: {person.sex}\nAge: {person.age}\n"
            f"ImageQuality: {v.quality}\nEF: {round(100 * (1 - systolic / diastolic))}\n"
            f"FrameRate: {person.frame_rate}\n"
        )


def _save(path, array, spacing):
    nifti = nib.Nifti1Image(array, np.diag([-spacing, -spacing, 1, 1]))
    path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=3, mtime=0))


def _write_splits(root, patients, seed):
    numbers = np.random.default_rng([seed, patients, 7]).permutation(patients) + 1
    validation = max(round(0.1 * patients), 1) if patients > 1 else 0
    testing = validation if patients > 2 else 0
    ends = np.cumsum([patients - validation - testing, validation])
    (root / "database_split").mkdir(parents=True)
    for split, chosen in zip(SPLITS, np.split(numbers, ends), strict=True):
        names = "".join(f"patient{number:04d}\n" for number in sorted(chosen))
        if names:  # an empty list is a fault in a CAMUS folder; one or two patients have no testing
            (root / "database_split" / f"subgroup_{split}.txt").write_text(names)


def _description(patients, seed, side):
    what = {"world": "phantom", "seed": seed, "patients": patients, "licence": "CC0-1.0"}
    return what | {"side": side, "version": VERSION}


def _description_of(root):
    """What the dataset.json of a phantom folder says; None where there is no phantom."""
    try:
        found = json.loads((root / "dataset.json").read_text())
        return found if found["world"] == "phantom" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rng(v, stream):
    """The random stream of a view that bears this name: the same in both phases."""
    return np.random.default_rng([*v.seed, *stream.encode()])


def _decibels(db):
    """Power ratio of so many decibels."""
    return np.exp(np.asarray(db, np.float32) * np.float32(np.log(10) / 10))


def _draw(rng, mean, sd, low, high):
    return float(np.clip(rng.normal(mean, sd), low, high))


def _vary(rng, sd, shared=0.0):
    return float(np.exp(rng.normal(shared, sd)))
