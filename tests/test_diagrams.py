"""The diagrams: readable on a phone, told in words, and with the numbers of the shipped networks."""

import json
from xml.etree import ElementTree

import pytest

from diffecho_utils import assets, camus

DIAGRAMS = sorted((assets.root() / "book" / "images" / "diagrams").glob("*.svg"))
COLUMN, SMALLEST = 380, 12  # pixels: a phone's text column, and letters that can be read in it


def text_of(name):
    path = next(path for path in DIAGRAMS if path.stem == name)
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return "\n".join(" ".join("".join(text.itertext()).split()) for text in texts)


def config(*names):
    return json.loads(
        assets.checkpoint("camus", "/".join(names)).joinpath("config.json").read_text()
    )


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.stem)
def test_readable_on_a_phone_and_told_in_words(path):
    root = ElementTree.parse(path).getroot()
    assert [float(x) for x in root.get("viewBox").split()][2] == COLUMN == float(root.get("width"))
    sizes = [float(x.get("font-size")) for x in root.iter() if x.get("font-size")]
    assert sizes and min(sizes) >= SMALLEST
    for name in ("title", "desc"):
        assert len(root.find(f"{{*}}{name}").text) > 10
    pages = [*(assets.root() / "notebooks").glob("*.ipynb")]
    assert any(f"diagrams/{path.name}" in page.read_text() for page in pages), "shown nowhere"


def test_unet_has_the_shapes_of_the_shipped_text_model():
    network, shown = config("text", "unet"), text_of("unet")
    channels, side = network["block_out_channels"], network["sample_size"]
    for level in range(len(channels)):
        assert f"{side >> level} × {side >> level}" in shown
    assert f"conv_in {network['in_channels']} → {channels[0]}" in shown
    assert f"conv_out {channels[0]} → {network['out_channels']}" in shown
    assert f"states of {network['cross_attention_dim']}" in shown


def test_autoencoder_has_the_shapes_of_the_shipped_one():
    network, shown = config("autoencoder"), text_of("autoencoder")
    for level, channels in enumerate(network["block_out_channels"]):
        side = network["sample_size"] >> level
        assert shown.count(f"{channels} × {side} × {side}") >= 2
    assert f"× {network['scaling_factor']:.3f}" in shown


def test_clip_has_the_sizes_of_the_shipped_one():
    network, shown = config("clip"), text_of("clip")
    words, pictures = network["text_config"], network["vision_config"]
    patch, places = pictures["patch_size"], words["max_position_embeddings"]
    patches = (pictures["image_size"] // patch) ** 2
    assert f"{words['vocab_size']} tokens" in shown and f"{places} places" in shown
    assert f"{places} states of {words['hidden_size']}" in shown
    assert f"{patches} patches of {patch} × {patch}" in shown
    assert f"{patches + 1} states of {pictures['hidden_size']}" in shown
    assert shown.count(f"unit vector of {network['projection_dim']}") == 2
    for tower in (words, pictures):
        assert f"{tower['num_hidden_layers']} layers" in shown


def test_the_road_has_the_patients_of_camus(real_root):
    table, shown = camus.read_table(real_root), text_of("patients")
    patients = table.groupby("split")["patient"].nunique()
    assert f"CAMUS: {patients.sum()} patients" in shown
    assert f"{patients['training']} training patients" in shown
    frames = table["split"].value_counts()
    for part in ("training", "validation"):
        assert f"{frames[part]:,} frames" in shown.replace("\n", " ")
