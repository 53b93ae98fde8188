"""Records carry their provenance and are whole; shipped files are found or their absence is said."""

import re

import numpy as np
import pytest

from diffecho_utils import DiffEchoError, assets, camus, chapter, files, profiles, results


def test_record_goes_out_and_comes_back(tmp_path):
    values = {"a": np.float32(1.5), "list": np.arange(3), "nan": np.nan, "flag": np.bool_(True)}
    facts = {"world": "camus", "profile": "cpu", "command": "make book", "seeds": [1, 2]}
    path = results.save(tmp_path / "new", "name", values, **facts)
    record = results.load(path)
    assert record["values"] == {"a": 1.5, "list": [0, 1, 2], "nan": None, "flag": True}
    assert record["seeds"] == [1, 2] and record["licence"] == "CC-BY-NC-SA-4.0"
    assert record["date"] in results.describe(record) and "make book" in results.describe(record)
    assert {"torch", "diffusers", "python"} <= set(record["versions"])
    assert [p.name for p in path.parent.iterdir()] == ["name.json"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    files.write_text(tmp_path / "note.txt", "old")
    with pytest.raises(OSError, match="disk"), files.draft(tmp_path / "note.txt") as beside:
        beside.write_text("ne")
        raise OSError("the disk is full")
    assert (tmp_path / "note.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_records_of_several_runs_are_told_as_one():
    first = dict(date="2026-11-22", hardware="a GPU", command="make book", commit="0123abc")
    first |= dict(world="camus", licence="CC0-1.0", profile="cpu", seeds=[0])
    second = first | dict(date="2026-11-23", commit="0000abc", seeds=[1])
    both = results.shared([first, second, first])
    assert both["commit"] == "0000abc, 0123abc" and both["date"] == "2026-11-22, 2026-11-23"
    assert both["hardware"] == "a GPU" and "seeds" not in both
    assert "commits 0000abc, 0123abc: `make book`" in results.describe(both)


@pytest.mark.parametrize(
    "text, said",
    [(None, "no such record"), ('{"name": ', "not a record"), ('{"name": "x"}', "lacks")],
)
def test_unusable_records_are_named(tmp_path, text, said):
    if text:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(DiffEchoError, match=f"record.json: {said}"):
        results.load(tmp_path / "record.json")


@pytest.mark.parametrize("world, root", [("phantom", ""), ("camus", "DATA=/path/to/camus ")])
def test_chapters_say_world_profile_and_command(phantom_root, tmp_path, world, root):
    table, profile = camus.read_table(phantom_root), profiles.get("smoke")
    table.attrs["world"] = world
    assert chapter.live(table, profile) == f"Live: {world}, 10 patients, profile smoke"
    chapter.save(tmp_path, "01", {"a": 1}, table, profile, seeds=[3])
    record = results.load(tmp_path / "01.json")
    assert record["command"] == f"make book {root}PROFILE=smoke" and record["seeds"] == [3]
    assert record["world"] == world and record["values"] == {"a": 1}


def test_shipped_files_are_found_and_missing_ones_said(tmp_path, monkeypatch):
    assert assets.checkpoint("camus", "autoencoder").is_dir()
    with pytest.raises(DiffEchoError, match=r"beside it are \['autoencoder'"):
        assets.checkpoint("camus", "video")
    (tmp_path / "data").mkdir()
    (tmp_path / "_toc.yml").touch()
    monkeypatch.setenv("DIFFECHO_ROOT", str(tmp_path))
    assert assets.workspace() == tmp_path / "_build"
    with pytest.raises(DiffEchoError, match="no files"):
        assets.checkpoint("camus", "autoencoder")


def test_every_shipped_record_is_readable_and_says_where_it_comes_from():
    paths = sorted((assets.root() / "data" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        record = results.load(path)
        assert (record["world"], record["profile"]) == (path.parts[-3], path.parts[-2])
        assert record["name"] == path.stem and re.fullmatch(r"[0-9a-f]{7}.*", record["commit"])
