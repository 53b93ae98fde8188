"""Shipped files: local in a checkout, fetched and checked elsewhere, never half there."""

import shutil
import subprocess
from pathlib import Path

import pytest
import registry
from conftest import Quiet

from diffecho_utils import DiffEchoError, assets, checkpoints


@pytest.fixture
def away(tmp_path, monkeypatch, serve):
    """As without a checkout; returns the folder that a loopback server serves, a copy of some shipped files."""
    served = tmp_path / "served"
    for name in ("classifier", "unconditional", "autoencoder"):
        shutil.copytree(assets.checkpoint("camus", name), served / "checkpoints/camus" / name)
    record = served / "results/camus/cpu/strength.json"
    record.parent.mkdir(parents=True)
    shutil.copy(assets.record("camus", "cpu", "strength"), record)
    with serve(served, Halving) as address:
        monkeypatch.setattr(assets, "_checkout", lambda: None)
        monkeypatch.setenv("DIFFECHO_DATA_URL", address)
        monkeypatch.setenv("DIFFECHO_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield served


class Halving(Quiet):
    def copyfile(self, source, outputfile):
        """Sends half of a file that has a note `<name>.half` beside it."""
        content = source.read()
        half = Path(f"{source.name}.half").exists()
        outputfile.write(content[: len(content) // 2] if half else content)


def test_checkpoint_is_fetched_once_and_loads_with_what_it_builds_on(away, tmp_path):
    folder = assets.checkpoint("camus", "classifier")
    assert folder == tmp_path / "cache" / "checkpoints" / "camus" / "classifier"
    checkpoints.load_network(folder)
    assert checkpoints.load_generator(assets.checkpoint("camus", "unconditional"))
    there = {path.name for path in (tmp_path / "cache" / "checkpoints" / "camus").iterdir()}
    assert there == {"autoencoder", "classifier", "unconditional"}
    shutil.rmtree(away)
    assert assets.checkpoint("camus", "classifier") == folder, "not asked for again"
    assert assets.workspace() == tmp_path / "_build"
    with pytest.raises(DiffEchoError, match="no checkout"):
        assets.root()


def test_file_changed_in_the_cache_is_fetched_again(away):
    path = assets.record("camus", "cpu", "strength")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert assets.record("camus", "cpu", "strength").read_bytes() == whole


@pytest.mark.parametrize("slip", ["damaged", "half sent", "missing"])
def test_bad_file_is_said_and_not_kept(away, tmp_path, slip):
    path = away / "checkpoints/camus/classifier/diffusion_pytorch_model.safetensors"
    if slip == "damaged":
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    elif slip == "half sent":
        path.with_name(f"{path.name}.half").touch()
    else:
        path.unlink()
    said = "damaged" if slip == "damaged" else "not fetched"
    with pytest.raises(DiffEchoError, match=f"{path.name}: .*{said}.*nothing was kept. Try again"):
        assets.checkpoint("camus", "classifier")
    kept = [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert path.name not in kept and not any("tmp" in name for name in kept), "no half file"


def test_unreachable_server_and_what_is_not_shipped_are_said(away, monkeypatch):
    with pytest.raises(DiffEchoError, match=r"checkpoints/camus/video: not shipped.*'autoencoder'"):
        assets.checkpoint("camus", "video")
    monkeypatch.setenv("DIFFECHO_DATA_URL", "http://127.0.0.1:9")
    with pytest.raises(DiffEchoError, match="http://127.0.0.1:9/.*not fetched"):
        assets.record("camus", "cpu", "strength")


def test_registry_lists_what_is_tracked(tmp_path):
    root = assets.root()
    registry.write_registry(root / "data", tmp_path / "registry.txt")
    fresh = (tmp_path / "registry.txt").read_text()
    assert assets.REGISTRY.read_text() == fresh, "run `make registry`"
    git = ["git", "-C", str(root), "ls-files", "data"]
    tracked = subprocess.run(git, capture_output=True, text=True).stdout.split()
    if tracked:  # a checkout with git
        assert {f"data/{line.split()[0]}" for line in fresh.splitlines()} == set(tracked)
