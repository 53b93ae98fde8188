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
import json
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from joblib import Parallel, cpu_count, delayed
from scipy import ndimage, sparse
from scipy.interpolate import PchipInterpolator

from diffecho_utils import DiffEchoError, camus
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
_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0)
_WIDTH = {
    "2CH": ((0, 0.58, 0.79, 0.93, 1, 0.84, 0.76), (0, 0.54, 0.74, 0.90, 1, 0.88, 0.80)),
    "4CH": ((0, 0.59, 0.82, 0.95, 1, 0.84, 0.77), (0, 0.55, 0.75, 0.89, 1, 0.90, 0.84)),
}
_MIDLINE = {
    "2CH": ((0, 0.05, 0.08, 0.07, 0.02, -0.01, -0.02), (0, 0.04, 0.07, 0.06, 0.01, 0.00, 0.00)),
    "4CH": ((0, 0.03, 0.05, 0.08, 0.05, 0.02, 0.01), (0, 0.03, 0.05, 0.07, 0.01, -0.01, -0.01)),
}


def patient(seed, index):
    """Patient number `index` (0, 1, ...) of the phantom `seed`, not yet rendered: a namespace.

    What both views and both phases share, and {name: view} `views` of what differs: mm, radians.
    """
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
        poor = 0.8 * window + 0.6 * rng.normal()  # standard normal, alike in both views
        views[name] = SimpleNamespace(
            name=name,
            # inner apex at end-diastole, (lateral, depth); (0, 0) is the probe
            apex=(float(lateral), depth * _draw(rng, 0.203, 0.046, 0.09, 0.34)),
            tilt=float(np.radians(tilt[0]) + turn),  # of the long axis; positive: base to the right
            width=length * width * dilated * _vary(rng, 0.07, 0.1 * slender),  # at end-diastole
            # thickness at end-diastole: left, apex, right
            walls=tuple(length * wall * _vary(rng, 0.08, 0.12 * thick) for wall in walls),
            # at end-systole: length, width
            atrium=tuple(mm * _vary(rng, 0.11, 0.09 * large) for mm in atrium),
            right_heart=tuple(mm * _vary(rng, 0.2) for mm in (34, 44)),  # widths, drawn in 4CH only
            shape=_shape(rng),
            degradation=float(1 / (1 + np.exp(-1.2 * poor))),  # 0: a perfect window; 1: hardly any
            quality="Good" if poor < -0.385 else "Medium" if poor < 0.878 else "Poor",
            dynamic_range=_draw(rng, 55, 5, 42, 70),  # decibels from black to white
            brightness=_draw(rng, 0.52, 0.05, 0.36, 0.70),  # where in it the myocardium lies
            gamma=_draw(rng, 1.3, 0.12, 1.0, 1.7),  # exponent of the grey map
            frames=int(rng.integers(12, 23)),  # from end-diastole to end-systole, for the cfg file
            seed=(seed, index, VIEWS.index(name)),  # of scatterers, texture, shadows
        )
    return SimpleNamespace(
        name=f"patient{index + 1:04d}",
        sex="M" if male else "F",
        age=int(_draw(rng, 65, 14, 20, 93)),
        ejection_fraction=ef,  # as drawn; the contours realise it to a few points: `volumes`
        shortening=0.285 * ef * _vary(rng, 0.22),  # share of the LV's length lost in systole
        length=length,  # inner LV length at end-diastole
        depth=depth,  # of the sector
        half_angle=float(np.radians(angle)),  # of the sector
        frame_rate=round(_draw(rng, 50, 8, 30, 80), 1),
        views=views,
    )


def _shape(rng):
    """Standard normal deviates that make a view's contours its own."""
    return SimpleNamespace(
        taper=rng.normal(),  # of the ventricle: wide at the apex, narrow at the base
        waist=rng.normal(),  # narrow in the middle
        bend=rng.normal(),  # of its midline to the right
        sway=rng.normal(),  # of its midline, to the right and back
        left_bulge=rng.normal(),  # of the left border, in waves
        left_wave=rng.normal(),  # whose length this changes
        right_bulge=rng.normal(),
        right_wave=rng.normal(),
        mitral_slope=rng.normal(),
        atrial_tilt=rng.normal(),
        atrial_bend=rng.normal(),
        narrowing=rng.normal(),  # in systole, beyond what the ejection fraction says
        thickening=rng.normal(),  # of the wall in systole
        filling=rng.normal(),  # how large the atrium is at end-diastole already
    )


def volumes(patient):
    """(end-diastolic, end-systolic) LV volume in millilitres, from the contours before any pixel.

    Biplane Simpson: pi / 4 times the integral of width(2CH) * width(4CH) along the long axis.
    """
    levels, result = np.linspace(0, 1, 401), []
    for beat in (0, 1):
        hearts = [_heart(patient, view, beat) for view in patient.views.values()]
        widths = [np.interp(levels, h.levels, h.right - h.left) for h in hearts]
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


def write(root, patients=60, seed=0, side=SIDE, processes=None, progress=None):
    """Write a phantom folder in CAMUS's layout, in place of a phantom at `root`, and return `root`.

    Same seed, same bytes, whatever the number of `processes` (default: one a core; 1 stays in this
    process). Splits are about 80/10/10 by patient, none empty from 3 patients up; 2 give training
    and validation, 1 training alone. `progress(done, total, unit)` is called after each patient. Raises
    DiffEchoError for patients < 1 or where `root` holds anything but a phantom.
    """
    root = Path(root)
    if patients < 1:
        raise DiffEchoError(f"{root}: {patients} patients asked for; a phantom needs at least 1")
    if root.exists() and not _description_of(root) and (root.is_file() or any(root.iterdir())):
        raise DiffEchoError(f"{root}: holds something else than a phantom; name an empty folder")
    with _replacing(root.resolve()) as new:
        camus.write_lists(new, _splits(patients, seed))
        jobs = (delayed(_write_patient)(new, seed, index, side) for index in range(patients))
        work = Parallel(min(patients, processes or cpu_count()), return_as="generator")
        with contextlib.closing(work(jobs)) as written:
            for done, _ in enumerate(written, start=1):
                if progress:
                    progress(done, patients, "patients")
        description = json.dumps(_description(patients, seed, side), indent=1)
        (new / "dataset.json").write_text(description + "\n")
    return root


def ensure(root, patients=60, seed=0):
    """Path of the phantom folder `root`: written unless there, whole, and the one asked for."""
    root = Path(root)
    if _description_of(root) == _description(patients, seed, SIDE):
        names = [f"patient{number:04d}" for number in range(1, patients + 1)]
        masks = [frame_path(root, n, v, p, mask=True) for n in names for v in VIEWS for p in PHASES]
        if all(path.is_file() for path in masks):
            return root
    return write(root, patients, seed)


# --- the heart ------------------------------------------------------------------------------------
#
# Two pairs of coordinates, in mm: (lateral, depth) in the picture, (0, 0) the probe; and (along, across)
# the LV's long axis, (0, 0) its inner apex. A level is a share of that axis: 0 the apex, 1 the mitral plane.


def _heart(patient, view, beat):
    """Contours of one view at one moment: a namespace.

    length, width: of the cavity. origin: its apex, (lateral, depth); axis: the unit vector from there to
    the base. levels, and at each of them, across the axis: left, right, the cavity's borders; septum, the
    wall's outer border on the left. centre: (along, across), about which both contours, inner and outer,
    are star-shaped: (angle, 0 towards the apex; radius).
    """
    shortened = 1 - patient.shortening  # the widths take the rest of the contraction
    narrowed = np.sqrt((1 - patient.ejection_fraction) / shortened)
    narrowed *= 1 + 0.03 * view.shape.narrowing
    levels = np.linspace(0, 1, 121) ** 2  # dense where the apex is round
    relaxed, contracted = _borders(view, 0, levels), _borders(view, 1, levels) * narrowed
    left, right = (1 - beat) * relaxed + beat * contracted
    length = patient.length * (1 - beat * (1 - shortened))
    # The base comes up to the apex, which stays nearly in place.
    tilts = view.tilt, view.tilt * (1 - 0.25 * beat)
    axis_before, axis = (np.array([np.sin(tilt), np.cos(tilt)]) for tilt in tilts)
    base = patient.length - 0.78 * (patient.length - length)
    origin = view.apex + base * axis_before - length * axis
    # Around the cavity: up its left border to the apex, and down the right one.
    inner = np.stack([np.r_[levels[:0:-1], levels] * length, np.r_[left[:0:-1], right]], 1)
    tangent = np.gradient(inner, axis=0)
    outwards = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / np.hypot(*tangent.T)[:, None]
    # Its wall passes smoothly from the apex's thickness into the sides'. Muscle about keeps its area:
    # what the contour loses in length, the wall gains in thickness.
    left_wall, apex_wall, right_wall = view.walls
    sides = np.where(np.arange(len(inner))[:, None] < len(levels), left_wall, right_wall)
    part = np.clip(inner[:, :1] / (0.4 * length), 0, 1)
    wall = apex_wall + (sides - apex_wall) * part * part * (3 - 2 * part)
    before, after = (
        np.hypot(np.diff(patient.length * share * levels), np.diff(borders)).sum()
        for borders, share in ((relaxed, 1), (contracted, shortened))
    )
    thickened = 0.94 * np.exp(0.075 * view.shape.thickening) * before / after
    outer = inner + outwards * wall * (1 + beat * (thickened - 1))
    septum = outer[: len(levels)][::-1]  # from the apex on
    septum = np.interp(levels, septum[:, 0] / length, septum[:, 1])
    centre = 0.6 * length, float(np.interp(0.6, levels, (left + right) / 2))
    return SimpleNamespace(
        view=view, beat=beat, length=length, width=float(np.max(right - left)),
        origin=origin.tolist(), axis=axis.tolist(),
        levels=levels, left=left, right=right, septum=septum,
        centre=centre, inner=_star(inner, centre), outer=_star(outer, centre),
    )  # fmt: skip


def _place(heart, along, across):
    """(lateral, depth) of a point (along, across)."""
    (lateral, depth), (right, down) = heart.origin, heart.axis
    return lateral + along * right + across * down, depth + along * down - across * right


def _borders(view, phase, levels):
    """The cavity's left and right borders across the axis at end-diastole (0) or end-systole (1): (2, N)."""
    shape, wave = view.shape, 2 * np.pi * levels
    half = PchipInterpolator(np.sqrt(_LEVELS), _WIDTH[view.name][phase])(np.sqrt(levels)) / 2
    half *= np.exp(0.05 * shape.taper * np.cos(np.pi * levels) + 0.03 * shape.waist * np.cos(wave))
    middle = PchipInterpolator(_LEVELS, _MIDLINE[view.name][phase])(levels)
    middle += 0.05 * shape.bend * np.sin(np.pi * levels) + 0.015 * shape.sway * np.sin(wave)
    left = 1 + 0.02 * shape.left_bulge * np.sin(wave * (1 + 0.3 * shape.left_wave))
    right = 1 + 0.02 * shape.right_bulge * np.sin(wave * (1 + 0.3 * shape.right_wave))
    return np.stack([middle - half * left, middle + half * right]) * view.width


def _star(contour, centre):
    """(angle, radius) about the centre, the contour's open ends led on past the mitral plane."""
    ends = contour[[0, -1]] + [0.5 * np.ptp(contour[:, 0]), 0]
    along, across = (np.vstack([ends[:1], contour, ends[1:]]) - centre).T
    angle = np.arctan2(across, -along)
    order = np.argsort(angle)
    return angle[order], np.hypot(along, across)[order]


def _structures(heart, lateral, depth):
    """What lies at points of a grid (mm), and how far from the borders: a namespace of fields of its shape.

    cavity, wall, atrium: boolean, the labels. along, across: mm. angle: about the cavity's centre, 0
    towards the apex. below: mm below the mitral plane. through: the wall, 0 at its inner border, 1 at the
    outer one. outside, beyond: mm outside of the wall, of the atrium. down, aside: along the atrium's own
    axis, 0 at the mitral plane, and mm across it.
    """
    view, shape, four = heart.view, heart.view.shape, heart.view.name == "4CH"
    x, y = lateral - heart.origin[0], depth - heart.origin[1]
    along = x * heart.axis[0] + y * heart.axis[1]
    across = x * heart.axis[1] - y * heart.axis[0]
    angle = np.arctan2(across - heart.centre[1], heart.centre[0] - along)
    radius = np.hypot(across - heart.centre[1], heart.centre[0] - along)
    inner, outer = (np.float32(np.interp(angle, *star)) for star in (heart.inner, heart.outer))
    slope = 0.05 * shape.mitral_slope + (0.09 if four else 0.05)
    below = along - heart.length * (1 + slope * across / heart.width)
    through = (radius - inner) / (outer - inner)
    lip = 0.06 * heart.length * np.sqrt(np.clip(1 - (2 * through - 1) ** 2, 0, 1))
    wall = (through >= 0) & (through < 1) & (below < lip)  # with rounded ends
    # Left atrium: a superellipse hung from the mitral plane, its axis nearer to the vertical.
    long, wide = 0.79 * np.exp(0.13 * shape.filling), 0.925 * np.exp(0.06 * shape.filling)
    length = view.atrium[0] * (long + (1 - long) * heart.beat)
    width = view.atrium[1] * (wide + (1 - wide) * heart.beat)
    shift = -0.1 if four else 0
    middle = float(heart.left[-1] + heart.right[-1]) / 2 + shift * heart.width
    hinge = _place(heart, heart.length, middle)
    tilt = float(0.5 * np.arctan2(*heart.axis) + 0.1 * shape.atrial_tilt + shift)
    x, y = lateral - hinge[0], depth - hinge[1]
    down = (x * np.sin(tilt) + y * np.cos(tilt)) / length
    bend = 0.15 * shape.atrial_bend * width * down * (1 - down)
    aside = x * np.cos(tilt) - y * np.sin(tilt) + bend
    ring = np.abs((down - 0.42) / 0.58) ** 2.6 + np.abs(2 * aside / width) ** 2.6
    ring = ring ** (1 / 2.6)  # 1 at the atrium's border
    return SimpleNamespace(
        cavity=(radius < inner) & (below < 0), wall=wall, atrium=(ring < 1) & (below >= 0) & ~wall,
        along=along, across=across, angle=angle, below=below, through=through,
        outside=radius - outer, beyond=(ring - 1) * width / 2, down=down, aside=aside,
    )  # fmt: skip


def _right_heart(heart, there):
    """(blood, walls) of right ventricle and atrium in a four-chamber view, as boolean fields."""
    level, (width, atrial_width) = there.along / heart.length, heart.view.right_heart
    septum = np.float32(np.interp(level, heart.levels, heart.septum))
    free = (septum - there.across) / (width * (1 - 0.2 * heart.beat))  # 0 at the septum
    reach = np.clip((level - 0.12) / 0.88, 0, 1) ** 0.6  # of the free wall, nearer at the apex
    ventricle = (level > 0.12) & (level < 0.95) & (free > 0)
    middle = -(heart.view.atrium[1] + atrial_width) / 2 - 4  # 4 mm of septum between the atria
    ring = np.abs((there.down - 0.4) / 0.52) ** 2.4
    ring = ring + np.abs(2 * (there.aside - middle) / atrial_width) ** 2.4
    atrium = (level > 0.98) & ~there.atrium
    blood = (ventricle & (free < reach)) | (atrium & (ring < 1))
    return blood, ((ventricle & (free < reach + 0.13)) | (atrium & (ring < 1.4))) & ~blood


def _valves(heart, rng):
    """Small bright structures as rows of (lateral, depth, size in mm, echo amplitude)."""
    spots = []
    valves = [(heart.left[-1], heart.right[-1], heart.length)]
    if heart.view.name == "4CH":  # tricuspid, a little nearer to the apex
        septum = heart.septum[-1]
        valves.append((septum - heart.view.right_heart[0], septum + 2, 0.95 * heart.length))
    for left, right, base in valves:
        meet = left + (right - left) * rng.normal(0.57, 0.06)
        for hinge, sign in ((left, 1), (right, -1)):
            reach, opening = abs(meet - hinge), (1 - heart.beat) * rng.uniform(0.2, 1)
            for p in np.linspace(0, 1, 14):  # from hinge to tip: closed, a flat tent; open, a gate
                up = reach * ((1 - opening) * 0.15 * np.sin(2 * p) + opening * 0.9 * p)
                inwards = sign * reach * p * (1 - opening + opening * (0.2 + 0.3 * p))
                place = _place(heart, base - up, hinge + inwards)
                spots.append((*place, rng.uniform(0.7, 1.5), rng.gamma(1.5, 0.6)))
            for _ in range(4):  # the fibrous ring
                place = _place(heart, base + rng.normal(0, 3), hinge - sign * rng.uniform(-1, 7))
                spots.append((*place, rng.uniform(1.5, 4), rng.uniform(0.3, 1.4)))
    for border in (heart.left, heart.right):  # papillary muscles and chords, in the cavity's label
        for level in np.linspace(0.35, 0.75, 9):
            across = np.interp(level, heart.levels, border) * rng.normal(0.7, 0.05)
            place = _place(heart, level * heart.length, across)
            spots.append((*place, 1.5, rng.uniform(0.1, 0.5)))
    return spots


# --- the machine ----------------------------------------------------------------------------------

RANGES, BEAMS = 320, 160  # samples along a beam, beams across the sector
LOOKS = 2  # pictures at neighbouring frequencies, averaged: what scanners do against speckle
_PULSE = (0, 0.9, 1.6)  # standard deviations of the point spread function: -, ranges, beams


def _render(patient, view, beat, ingredients, side):
    heart = _heart(patient, view, beat)
    lateral, depth, rows, columns, inside = _scan_grid(side, patient.half_angle)
    there = _structures(heart, lateral * patient.depth, depth * patient.depth)
    labels = [there.cavity, there.wall, there.atrium]
    mask = np.select(labels, [1, 2, 3]).astype(np.uint8)
    grey = _beams(patient, heart, set(ingredients))
    image = ndimage.map_coordinates(grey, (rows, columns), order=1, mode="nearest")
    return np.where(inside, np.rint(image), 0).astype(np.uint8), mask, patient.depth / side


def _beams(patient, heart, use):
    """The picture before scan conversion: (range, beam) float32 grey values 0 to 255."""
    view = heart.view
    ranges = np.linspace(0, patient.depth, RANGES, dtype=np.float32)[:, None]  # mm
    theta = np.linspace(-patient.half_angle, patient.half_angle, BEAMS, dtype=np.float32)[None]
    lateral, depth = ranges * np.sin(theta), ranges * np.cos(theta)
    if "texture" in use:  # moves the tissue by a millimetre or two; experts' contours are smooth
        rng = _rng(view, "borders")
        lateral, depth = (
            mm + 0.8 * _field(rng, 60, 45) + 0.9 * _field(rng, 14, 10) for mm in (lateral, depth)
        )
    there = _structures(heart, lateral, depth)
    amplitude = _echo(patient, heart, there, theta, use)

    # Echoes: the scatterers turn over smoothly from end-diastole to end-systole.
    if "speckle" in use:
        ends = {"scatterers ED": np.sqrt(1 - heart.beat), "scatterers ES": np.sqrt(heart.beat)}
        power = _speckle(view, ends, amplitude)
        stray = _speckle(view, {"stray echoes": 1})
    else:
        power, stray = ndimage.gaussian_filter(amplitude, _PULSE[1:]) ** 2, 1
    if "attenuation" in use:
        rng = _rng(view, "attenuation")
        tissue = ~(there.cavity | there.atrium)
        path = np.cumsum(tissue, 0) * np.float32(patient.depth / RANGES)
        loss = rng.uniform(0.02, 0.06) * (path - path.mean(1, keepdims=True))
        power *= _decibels(-loss - rng.normal(0, 3) * (ranges / patient.depth - 0.5))
    power += _haze(patient, view, power, ranges, use) * (0.3 + 0.7 * stray)
    for stop, spread in ((45, 2), (28, 4), (14, 8)):  # near the probe no beam has formed yet
        power[:stop] = ndimage.gaussian_filter1d(power[:stop], spread, axis=1)
    if "shadow" in use:
        power *= _decibels(-_shadows(view, ranges / patient.depth, theta / patient.half_angle))
    if "noise" in use:
        rng = _rng(view, "noise")
        level = _decibels(-21 + 6 * view.degradation + rng.normal(0, 2))
        power += level * _speckle(view, {f"noise {heart.beat:.4f}": 1})

    # Log compression: decibels become grey values.
    grey = 10 * np.log10(power) / view.dynamic_range + view.brightness
    if "gain" in use:
        rng = _rng(view, "gain")
        grey += (3 * _field(rng, 4, 4) + 2 * _field(rng, 9, 2)) / view.dynamic_range
    return 255 * np.clip(grey, 0, 1) ** view.gamma


def _haze(patient, view, power, ranges, use):
    """Power of echoes in the wrong place, (range, beam)."""
    haze = np.full(power.shape, 1e-5, np.float32)
    if "sidelobes" in use:
        haze += 0.03 * ndimage.gaussian_filter1d(power, 12, axis=1)
    if "clutter" in use:
        rng = _rng(view, "clutter")
        veil = rng.normal(-13 + 3 * view.degradation, 1.5) - 8 * ranges / patient.depth
        haze += _decibels(veil + 2 * _field(rng, 6, 5))
        haze += 0.02 * ndimage.gaussian_filter(power, (14, 12))
        haze += rng.uniform(0.03, 0.5) * np.exp(-ranges / np.float32(rng.uniform(5, 15)))
    if "reverberation" in use:
        rng = _rng(view, "reverberation")
        gap = int(rng.integers(10, 26))  # ranges between the probe and the layer it bounces off
        for bounce in (1, 2, 3):
            late = bounce * gap
            haze[late:] += rng.uniform(0.002, 0.02) * power[:-late]
            arc = np.exp(-((ranges - 0.7 * ranges[late]) ** 2) / rng.uniform(1, 5))
            haze += rng.uniform(0, 1.5) / bounce * arc * np.exp(_field(rng, 2, 12))
    return haze


def _echo(patient, heart, there, theta, use):
    """Echo amplitude of the tissues, (range, beam) float32; 1 is the mean of the myocardium."""
    view, blood, four = heart.view, there.cavity | there.atrium, heart.view.name == "4CH"
    rng = _rng(view, "texture")
    patches, spots, streaks, grain = (
        _field(rng, *cells) if "texture" in use else np.zeros_like(there.along, np.float32)
        for cells in ((6, 5), (16, 12), (50, 12), (80, 50))
    )
    rng = _rng(view, "tissues")
    behind = (there.below > 0) & ~there.wall
    around = 9 * patches + 3 * spots + 3 * streaks + 2 * grain + float(rng.normal(-3, 3))
    around -= 0 if four else 4 * theta / patient.half_angle
    around += rng.normal(5, 3) * np.exp(-((there.beyond - 6) ** 2) / 72) * behind
    if four:
        right_blood, right_wall = _right_heart(heart, there)
        around[right_wall] = (1 + 4 * patches + 3 * grain)[right_wall]
        blood = blood | right_blood
    muscle = (
        rng.normal(2, 1) + rng.normal(0, 2) * (2 * there.through - 1) - 2.5 * np.sin(there.angle)
    )
    db = np.where(there.wall, muscle + 3.5 * patches + 3.5 * spots + 4.5 * grain, around)
    border = there.wall | ((np.abs(there.outside) < 8) & (there.below < 3))
    if "pericardium" in use:
        rng = _rng(view, "pericardium")
        rim = np.exp(-((there.outside - 1) ** 2) / (2 * rng.uniform(1.2, 2.5) ** 2)) * border
        if four:
            rim *= np.where(there.across < 0, 0.3, 1)  # the septum has blood on both sides
        db += rng.normal(6, 3) * rim
        seen = behind / (1 + np.exp(-3 * spots))
        rim = np.exp(-((there.beyond - 1.5) ** 2) / 6)
        db += rng.normal(7, 3) * (1 - 0.6 * heart.beat) * rim * seen
    if "angle" in use:
        facing = np.cos(there.angle - np.arctan2(*heart.axis) + theta) ** 2  # 1: met head-on
        db += np.where(border, 3.5 * (facing - 0.6), 0)
    db = np.where(blood, -35, db)
    if "clutter" in use:  # most in the atrium while it is small
        veil = _rng(view, "atrium").normal(-12, 4) - 14 * heart.beat + 6 * np.exp(there.beyond / 5)
        db = np.where(there.atrium, veil, db)
    amplitude = np.sqrt(_decibels(db))
    if "valves" in use:
        for point in _valves(heart, _rng(view, "valves")):
            _add_spot(amplitude, patient, *point)
    return amplitude


def _shadows(view, share, beam):
    """Decibels lost behind ribs and lung, from some share of the depth on, mostly near the sector's edges."""
    rng = _rng(view, "shadow")
    loss = 0 * share * beam
    for _ in range(1 + rng.poisson(1.6 * view.degradation)):
        at, wide = rng.choice([-1, 1]) * rng.uniform(0.3, 1.1), rng.uniform(0.06, 0.35)
        onset = np.clip(6 * (share - rng.uniform(0, 0.5)), 0, 1)
        loss += rng.uniform(1, 18) * onset * np.exp(-(((beam - at) / wide) ** 2))
    return loss


def _speckle(view, weights, amplitude=1):
    """Echo power of random scatterers times `amplitude`, averaged over looks: mean amplitude^2.

    Each look has a real and an imaginary part. `weights`: {random stream: weight}, squares sum to 1.
    """
    shape = (2 * LOOKS, RANGES, BEAMS)
    parts = sum(
        np.float32(weight) * _rng(view, stream).standard_normal(shape, dtype=np.float32)
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
    top, first = max(int(row - 3 * tall), 0), max(int(column - 3 * wide), 0)
    window = amplitude[top : max(int(row + 3 * tall), 0), first : max(int(column + 3 * wide), 0)]
    rows, columns = (
        np.arange(window.shape[0]) + top - row,
        np.arange(window.shape[1]) + first - column,
    )
    spot = np.outer(np.exp(-0.5 * (rows / tall) ** 2), np.exp(-0.5 * (columns / wide) ** 2))
    window += strength * spot


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


def _write_patient(root, seed, index, side):
    person = patient(seed, index)
    folder = root / "database_nifti" / person.name
    folder.mkdir(parents=True)
    diastolic, systolic = volumes(person)
    for name, view in person.views.items():
        stem = f"{person.name}_{name}"
        for phase in PHASES:
            image, mask, mm = frame(person, name, phase, side=side)
            for end, array in (("", image.astype(np.float32)), ("_gt", mask)):
                camus.write_nifti(folder / f"{stem}_{phase}{end}.nii.gz", array, mm, mm)
        (folder / f"Info_{name}.cfg").write_text(
            f"ED: 1\nES: {view.frames}\nNbFrame: {view.frames}\nSex: {person.sex}\nAge: {person.age}\n"
            f"ImageQuality: {view.quality}\nEF: {round(100 * (1 - systolic / diastolic))}\n"
            f"FrameRate: {person.frame_rate}\n"
        )


def _splits(patients, seed):
    """{patient: split}, in order within each split."""
    numbers = np.random.default_rng([seed, patients, 7]).permutation(patients) + 1
    validation = max(round(0.1 * patients), 1) if patients > 1 else 0
    testing = validation if patients > 2 else 0
    ends = np.cumsum([patients - validation - testing, validation])
    parts = zip(SPLITS, np.split(numbers, ends), strict=True)
    return {f"patient{n:04d}": split for split, chosen in parts for n in sorted(chosen)}


@contextlib.contextmanager
def _replacing(place):
    """Context of a new folder that takes the place of `place` at the end; after an error all is as it was."""
    for left in place.parent.glob(f".{place.name}.phantom-*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    draft = place.with_name(f".{place.name}.phantom-{os.getpid()}")
    new, old = draft / "new", draft / "old"
    try:
        new.mkdir(parents=True)
        yield new
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


def _rng(view, stream):
    """The random stream of a view that bears this name: the same in both phases."""
    return np.random.default_rng([*view.seed, *stream.encode()])


def _decibels(db):
    """Power ratio of so many decibels."""
    return np.exp(np.asarray(db, np.float32) * np.float32(np.log(10) / 10))


def _draw(rng, mean, sd, low, high):
    return float(np.clip(rng.normal(mean, sd), low, high))


def _vary(rng, sd, shared=0.0):
    return float(np.exp(rng.normal(shared, sd)))
