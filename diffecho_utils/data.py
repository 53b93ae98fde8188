"""From the table of frames to tensors: resizing, joint jitter, and caches of frames and latents.

Chapters 01 to 03. Images are float32 in [-1, 1], label maps uint8 with CAMUS's labels 0-3.
"""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from diffecho_utils import assets, camus, files, prompts

_CACHE_VERSION = 3  # raise when the preprocessing below changes


@dataclass(frozen=True)
class Geometry:
    """How frames become squares of `side` pixels: stretched, or padded with background."""

    side: int
    stretched: bool = False


@dataclass(frozen=True)
class Frames:
    """images: (N, 1, S, S) float32 in [-1, 1]; masks: (N, S, S) uint8; table: N rows, spacing resized."""

    images: torch.Tensor
    masks: torch.Tensor
    table: pd.DataFrame

    def __len__(self):
        return len(self.table)

    def where(self, keep):
        """The frames where `keep`, a boolean array or series of length N, is true."""
        rows = np.flatnonzero(np.asarray(keep))
        table = self.table.iloc[rows].reset_index(drop=True)
        return Frames(self.images[rows], self.masks[rows], table)

    @property
    def side(self):
        """Pixels of the side of its images."""
        return self.images.shape[-1]

    @property
    def stretched(self):
        """Whether they were stretched to the square, or padded to it."""
        return self.table.attrs.get("stretched", False)

    @property
    def classes(self):
        """(N,) int64: index of each frame's view and phase in `camus.CLASSES`."""
        return torch.from_numpy(camus.class_index(self.table))


def joined(*parts):
    """Several `Frames` of one size as one; columns that a table lacks are NaN there."""
    tables = [part.table for part in parts]
    table = pd.concat(tables, ignore_index=True)
    table.attrs = dict(tables[0].attrs)
    images, masks = (torch.cat([getattr(p, n) for p in parts]) for n in ("images", "masks"))
    return Frames(images, masks, table)


def open_frames(root_or_table, split, like, patients=None, fold=None):
    """The frames of a folder as whoever reads them learned to: `Frames`, cached in the workspace.

    root_or_table: the folder, or its table where it is read already (`camus.read_table`); split and
    patients: which of them, as `camus.select` (split "all": every patient); like: as `load_frames`; fold:
    of the ten of a cross-validation, whose splits are meant (`camus.by_fold`).
    """
    table = root_or_table
    if not isinstance(table, pd.DataFrame):
        table = camus.read_table(root_or_table)
    table = table if fold is None else camus.by_fold(table, fold)
    rows = camus.select(table, split, patients=patients)
    return load_frames(rows, like, assets.workspace() / "cache")


def load_frames(table, like, cache_dir=None):
    """Read, square and stack the frames of a table (`camus.read_table`) as `Frames`.

    like: whose geometry they get, anything with `side`, in pixels, and `stretched`, whether to the
    square or padded to it (`to_square`): a profile, a network that is to read them (`checkpoints.Judge`,
    `checkpoints.Generator`), other `Frames`, or a `Geometry`. With `cache_dir` the result is kept there
    and read back as long as the files (name, size, time) and the settings stay the same. Raises
    DiffEchoError for the first unusable file.
    """
    key = [_CACHE_VERSION, like.side, not like.stretched]
    key += [float(fact) for fact in table[["transposed", "black", "white"]].iloc[0]]  # of its set
    for path in [*table["image"], *table["label_map"]]:
        status = os.stat(path)
        key.append((str(path), status.st_size, status.st_mtime_ns))

    def square(row):
        image, mask = camus.read_frame(row)
        spacing = (row.lateral_mm, row.depth_mm)
        image, mask, spacing = to_square(image, mask, spacing, like.side, not like.stretched)
        levels = image.round().clamp(0, 255).to(torch.uint8)
        return levels[None], mask, torch.tensor(spacing, dtype=torch.float64)

    def make():
        with ThreadPoolExecutor() as pool:
            parts = zip(*pool.map(square, table.itertuples()), strict=True)
            return dict(zip(("images", "masks", "spacing"), map(torch.stack, parts), strict=True))

    kept = files.cached(cache_dir, "frames", key, make)
    table = table.reset_index(drop=True)
    table[["lateral_mm", "depth_mm"]] = kept["spacing"].numpy()
    table.attrs["stretched"] = like.stretched
    return Frames(kept["images"].float() / 127.5 - 1, kept["masks"], table)


def to_square(image, mask, spacing, side, keep_aspect=True):
    """Resize a picture and its label map to `side` x `side`.

    image: (H, W) float32, mask: (H, W) uint8, spacing: (lateral_mm, depth_mm), NaN if unknown.
    With `keep_aspect` the longer physical side fills the square and the rest is padded with
    background: left and right alike, and below (the probe stays at the top); otherwise both sides
    are stretched, as the paper's re-pack did. Images are resized bilinearly with anti-aliasing, label
    maps by nearest neighbour. Returns (image, mask, new spacing) as (S, S) tensors.
    """
    lateral, depth = (1.0, 1.0) if np.isnan(spacing).any() else spacing
    height, width = image.shape
    rows = columns = side
    if keep_aspect:
        longest = max(height * depth, width * lateral)
        rows, columns = (round(side * x / longest) for x in (height * depth, width * lateral))
    left = (side - columns) // 2
    padding = (left, side - columns - left, 0, side - rows)
    image = torch.from_numpy(np.array(image, dtype=np.float32))[None, None]
    image = F.interpolate(image, (rows, columns), mode="bilinear", antialias=True)[0, 0]
    mask = torch.from_numpy(np.array(mask, dtype=np.uint8))[None, None]
    mask = F.interpolate(mask, (rows, columns), mode="nearest-exact")[0, 0]
    scaled = (spacing[0] * width / columns, spacing[1] * height / rows)
    return F.pad(image, padding), F.pad(mask, padding), scaled


def resized(images, side):
    """Images (N, 1, S, S) at another side, bilinearly with anti-aliasing; as they are where it is theirs."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


# Amounts of `jitter` that leave a frame as it is.
STILL = dict.fromkeys(("degrees", "shift", "zoom", "gain", "contrast"), 0.0)


def draw_jitter(n, generator):
    """The random numbers of `jitter` for n frames: (n, 6) uniform in [-1, 1] on the CPU."""
    return torch.rand(n, 6, generator=generator) * 2 - 1


def jitter(images, masks, drawn, degrees=8.0, shift=0.05, zoom=0.1, gain=0.15, contrast=0.2):
    """One random affine map for each image and its label map, then brightness and contrast.

    images: (N, 1, H, W) in [-1, 1], masks: (N, H, W) uint8, drawn: `draw_jitter(N, ...)`. Rotation in
    +-degrees, translation in +-shift of the side, zoom in 1 +-zoom, intensity x -> contrast * x +
    gain. No flips: a mirrored four-chamber view is an anatomy that does not exist (chapter 03
    measures what flips do). Works where `images` are, CPU or GPU.
    """
    n, device = len(images), images.device
    turn, grow, right, down, brighter, stronger = drawn.to(device).unbind(1)
    angle, scale = torch.deg2rad(turn * degrees), 1 + grow * zoom
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = [cos, -sin, 2 * shift * right, sin, cos, 2 * shift * down]
    with torch.autocast(device.type, enabled=False):  # half precision is a third of a pixel off
        matrices = torch.stack(rows, 1).reshape(n, 2, 3)
        grid = F.affine_grid(matrices, images.shape, align_corners=False)
    how = {"padding_mode": "zeros", "align_corners": False}
    zero = (images + 1) / 2  # pad with black, the value outside the sector
    moved = F.grid_sample(zero, grid, mode="bilinear", **how)
    labels = F.grid_sample(masks[:, None].float(), grid, mode="nearest", **how)
    factor, offset = (x.view(n, 1, 1, 1) for x in (1 + stronger * contrast, brighter * gain))
    sector = moved > 0.5 / 255  # the black surround stays black
    lit = (moved * factor + offset * sector).clamp(0, 1)
    return lit * 2 - 1, labels[:, 0].to(torch.uint8)


def spoilt(images):
    """Frames changed in ways that can be named: {what was done: images}, the first as they are.

    From what nobody sees (8 bits) over what programs do in passing (JPEG, resizing, stretching each
    frame's grey values to the full range, colour and back) to what everybody sees.
    """
    side = images.shape[-1]
    low, high = (f(images, (1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    sparse = F.interpolate(images, side // 2, mode="nearest")
    mirrored = images.clone()
    mirrored[1::2] = images[1::2].flip(-1)
    return {
        "as they are": images,
        "8 bits": _stored(images),
        "grey, colour, grey": _stored(images, mode="RGB"),
        "JPEG, quality 75": _stored(images, quality=75),
        "JPEG, quality 25": _stored(images, quality=25),
        "stretched to full range": 2 * (images - low) / (high - low) - 1,
        "half size, filtered": F.interpolate(resized(images, side // 2), side, mode="bilinear"),
        "half size, every 2nd pixel": F.interpolate(sparse, side, mode="bilinear"),
        "blurred by 5 x 5": blurred(images),
        "a fifth darker": 0.8 * (images + 1) - 1,
        "every second one mirrored": mirrored,
    }


def _stored(images, mode="L", quality=None):
    """Images as 8-bit pictures, by way of colour or of a JPEG file, and back."""
    found = []
    for image in images:
        picture = Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).convert(mode)
        if quality:
            file = BytesIO()
            picture.save(file, "JPEG", quality=quality)
            picture = Image.open(file)
        found.append(torch.from_numpy(np.array(picture.convert("L"))).float())
    return torch.stack(found)[:, None] / 127.5 - 1


def blurred(images, pixels=5):
    """Images (N, 1, H, W) under a mean over `pixels` x `pixels`, reflected at the borders."""
    return F.avg_pool2d(F.pad(images, (pixels // 2,) * 4, mode="reflect"), pixels, stride=1)


@torch.no_grad()
def in_batches(call, images, module, batch=64):
    """What `call` gives of all images, so many at a time where `module` is: a tensor on the CPU."""
    weights = itertools.chain(module.parameters(), module.buffers())
    device = next(weights, images).device  # a traced network may have neither
    return torch.cat([call(part.to(device)).cpu() for part in images.split(batch)])


def _at_a_time(side):
    """How many images of `side` pixels an autoencoder is given: 64 of 128, as many pixels of larger ones."""
    return max(1, min(64, 64 * 128**2 // side**2))


def encode(vae, images):
    """Latents of images, scaled to unit variance: (N, 1, H, W) -> (N, C, H/f, W/f) float32 on the CPU.

    Without an autoencoder (None) the images themselves, for diffusion in pixels; `decode` alike. One of
    colours is given three equal channels, and the mean of its three is taken.
    """
    if vae is None:
        return images
    vae = vae.to(memory_format=torch.channels_last)  # faster

    def mean(part):
        part = part.expand(-1, vae.config.in_channels, -1, -1)
        part = part.to(memory_format=torch.channels_last)
        return vae.encode(part).latent_dist.mean.float()

    latents = in_batches(mean, images, vae, _at_a_time(images.shape[-1]))
    return latents.contiguous() * vae.config.scaling_factor


def decode(vae, latents):
    """Images of latents, in [-1, 1]: (N, C, h, w) -> (N, 1, H, W) float32 on the CPU."""
    if vae is None:
        return latents.float().cpu().clamp(-1, 1)
    scaled = latents / vae.config.scaling_factor
    side = latents.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)

    def grey(part):
        return vae.decode(part).sample.float().clamp(-1, 1).mean(1, keepdim=True)

    return in_batches(grey, scaled, vae, _at_a_time(side))


def latent_views(vae, frames, views=1, seed=0, cache_dir=None, **amounts):
    """Latents of each frame as it is and of `views` - 1 copies under `jitter(**amounts)`, for training.

    Returns {"latents": (views * N, C, h, w) float32, "masks": (views * N, H, W) uint8, moved alike}.
    Cached in `cache_dir` under the frames, the autoencoder's weights and the settings.
    """
    weights = vae.state_dict().values() if vae is not None else ()
    content = digest(weights), digest([frames.images, frames.masks])
    key = [_CACHE_VERSION, *content, views, seed, amounts]

    def make():
        generator = torch.Generator().manual_seed(seed)
        latents, masks = [encode(vae, frames.images)], [frames.masks]
        for _ in range(views - 1):
            drawn = draw_jitter(len(frames), generator)
            parts = (x.split(64) for x in (frames.images, frames.masks, drawn))
            for part in zip(*parts, strict=True):  # all at once would fill the memory at 512 px
                copies, moved = jitter(*part, **amounts)
                latents.append(encode(vae, copies))
                masks.append(moved)
        return {"latents": torch.cat(latents), "masks": torch.cat(masks)}

    return files.cached(cache_dir, "latents", key, make)


def prompt_table(frames, templates):
    """The prompts of each frame in every wording of `templates`: (list of texts, (N, P) int64 ids).

    ids index the list, whose first entry is "", the null prompt; P = len(templates) * WORDINGS.
    """
    table = prompts.facts(frames.masks, frames.table)
    ways = itertools.product(templates, range(prompts.WORDINGS))
    columns = [prompts.make(table, template, wording) for template, wording in ways]
    texts = ["", *dict.fromkeys(itertools.chain(*columns))]
    index = {text: i for i, text in enumerate(texts)}
    rows = zip(*columns, strict=True)
    return texts, torch.tensor([[index[text] for text in row] for row in rows])


def digest(tensors):
    """SHA-256 of tensors, in hexadecimal."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()
