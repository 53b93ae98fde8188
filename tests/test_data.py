"""Tensors of the right size, label maps that stay label maps, caches that know when to be redone."""

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffecho_utils import DiffEchoError, assets, camus, data, files, models, prompts


def test_frames_are_in_range_and_ordered_as_the_table(phantom_root, frames, smoke):
    assert frames.images.shape == (40, 1, smoke.side, smoke.side)
    assert frames.images.dtype == torch.float32 and frames.masks.dtype == torch.uint8
    assert frames.images.min() == -1 and 0 < frames.images.max() <= 1
    assert frames.masks.unique().tolist() == [0, 1, 2, 3]
    assert frames.classes.tolist()[:4] == [0, 1, 2, 3]
    one = frames.where(frames.table["view"] == "4CH")
    assert len(one) == 20 and torch.equal(one.images, frames.images[frames.classes >= 2])


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_square_carries_the_spacing(keep_aspect):
    """A rectangle of 40 x 30 mm stays that large in millimetres, whatever the pixels become."""
    mask = np.zeros((200, 100), np.uint8)
    mask[50:150, 20:80] = 1  # 100 rows x 0.4 mm, 60 columns x 0.5 mm
    image, label, (lateral, depth) = data.to_square(
        mask.astype(np.float32), mask, (0.5, 0.4), 128, keep_aspect
    )
    assert image.shape == label.shape == (128, 128)
    rows, columns = np.nonzero(label.numpy())
    assert np.ptp(rows) * depth == pytest.approx(40, abs=1.5)
    assert np.ptp(columns) * lateral == pytest.approx(30, abs=1.5)
    assert (lateral == pytest.approx(depth, rel=0.02)) == keep_aspect


def test_square_without_spacing_treats_pixels_as_square():
    _, _, spacing = data.to_square(np.zeros((60, 60)), np.zeros((60, 60)), (np.nan, np.nan), 32)
    assert np.isnan(spacing).all()


def test_jitter_moves_image_and_label_map_together(frames):
    bright = (frames.masks == 1).float()[:, None] * 2 - 1  # image = the cavity itself
    drawn = data.draw_jitter(len(frames), torch.Generator().manual_seed(0))
    images, masks = data.jitter(bright, frames.masks, drawn, gain=0, contrast=0)
    overlap = ((images[:, 0] > 0) & (masks == 1)).sum() / ((images[:, 0] > 0) | (masks == 1)).sum()
    assert overlap > 0.95
    assert not torch.equal(masks, frames.masks) and masks.max() <= 3
    same, labels = data.jitter(frames.images, frames.masks, drawn, 0, 0, 0, 0, 0)
    assert torch.allclose(same, frames.images, atol=1e-5) and torch.equal(labels, frames.masks)


def test_cache_is_used_and_redone_when_the_source_changes(broken_root, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path)
    cache, small = tmp_path / "cache", data.Geometry(32)
    first = data.open_frames(broken_root, "training", small, patients=2)
    table = camus.read_table(broken_root)
    rows = camus.select(table, "training", patients=2)
    with monkeypatch.context() as patch:
        patch.setattr(camus, "read_frame", lambda row: pytest.fail("read again"))
        again = data.open_frames(table, "training", small, patients=2)
    assert torch.equal(first.images, again.images) and torch.equal(first.masks, again.masks)
    assert first.table.equals(again.table) and len(first) == 8 and first.side == 32
    assert torch.equal(first.images, data.load_frames(rows, small).images)
    source, target = rows["image"].iloc[0], rows["image"].iloc[1]  # ED over ES
    target.write_bytes(source.read_bytes())
    os.utime(target, ns=(1, 1))
    changed = data.load_frames(rows, small, cache_dir=cache)
    assert torch.equal(changed.images[1], first.images[0])
    for path in cache.glob("frames-*"):
        path.write_bytes(path.read_bytes()[:100])
    again = data.load_frames(rows, small, cache_dir=cache)
    assert torch.equal(again.images, changed.images)
    with pytest.raises(DiffEchoError, match="no frame with split=testing"):
        data.open_frames(table.assign(split="training"), "testing", small)


def test_latent_views_are_scaled_cached_and_labelled(frames, smoke, tmp_path):
    torch.manual_seed(0)
    vae = models.build_autoencoder(smoke).eval()
    vae.register_to_config(scaling_factor=3.0)
    some = frames.where(frames.table.index < 8)
    views = data.latent_views(vae, some, 2, seed=1, cache_dir=tmp_path, degrees=5)
    assert views["latents"].shape == (16, 4, 8, 8)
    assert views["masks"].shape == (16, 64, 64)
    assert torch.equal(views["masks"][:8], some.masks)
    assert not torch.equal(views["masks"][8:], some.masks)
    with torch.no_grad():
        mean = vae.encode(some.images).latent_dist.mean
    assert torch.allclose(views["latents"][:8], mean * 3, atol=1e-5)
    assert not torch.allclose(views["latents"][8:], mean * 3, atol=1e-2)
    other = data.latent_views(vae, some, 2, seed=2, cache_dir=tmp_path, degrees=5)
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(other["latents"][8:], views["latents"][8:])
    assert data.decode(vae, views["latents"]).abs().max() <= 1


def test_saved_tensors_carry_facts_and_replace_a_file_whole(tmp_path):
    path = tmp_path / "new" / "features.safetensors"
    for value in (1.0, 2.0):
        files.save_tensors(path, {"features": torch.full((3,), value)}, {"world": "phantom"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"world": "phantom"} and file.get_tensor("features")[0] == 2
    assert [p.name for p in path.parent.iterdir()] == ["features.safetensors"]


def test_real_frames_to_128_pixels_and_back_from_the_cache(real_root, tmp_path):
    table = camus.select(camus.read_table(real_root), split="validation")
    frames = data.load_frames(table, data.Geometry(128), cache_dir=tmp_path)
    assert len(frames) == 200 and len(list(tmp_path.glob("frames-*"))) == 1
    shares = [(frames.masks == label).float().mean().item() for label in range(4)]
    np.testing.assert_allclose(shares, [0.756, 0.092, 0.101, 0.051], atol=0.02)


def test_prompt_table_numbers_every_wording(frames):
    texts, ids = data.prompt_table(frames, ("paper", "paper-seg"))
    assert texts[0] == "" and ids.shape == (40, 6) and ids.min() == 1
    by_template = prompts.make(frames.table, "paper", 2), prompts.make(frames.table, "paper-seg", 0)
    for column, wanted in zip((2, 3), by_template, strict=True):
        assert [texts[i] for i in ids[:, column]] == wanted


def test_jitter_moves_pixels_alike_in_half_precision(frames):
    """Of a grid in bfloat16 pixels are a third of one off."""
    drawn = data.draw_jitter(len(frames), torch.Generator().manual_seed(0))
    exact = data.jitter(frames.images, frames.masks, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = data.jitter(frames.images, frames.masks, drawn)
    assert all(torch.equal(*pair) for pair in zip(exact, mixed, strict=True))


def test_spoilt_frames(frames):
    images = frames.images[:6]
    changed = data.spoilt(images)
    assert all(x.shape == images.shape and x.abs().max() <= 1 for x in changed.values())
    away = {name: (x - images).abs().max().item() for name, x in changed.items()}
    assert away["as they are"] == 0 and away["8 bits"] == away["grey, colour, grey"] <= 1 / 255
    coarse, fine = ((changed[f"JPEG, quality {q}"] - images).square().mean() for q in (25, 75))
    assert coarse > fine > 0
    full = changed["stretched to full range"].flatten(1)
    torch.testing.assert_close(full.amin(1), -torch.ones(6))
    torch.testing.assert_close(full.amax(1), torch.ones(6))
    mirrored = changed["every second one mirrored"]
    assert torch.equal(mirrored[::2], images[::2])
    assert torch.equal(mirrored[1::2], images[1::2].flip(-1))
