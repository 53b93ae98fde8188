"""A download survives what servers and disks do to it, and is whole or not there."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
from conftest import Quiet

from diffecho_utils import DiffEchoError, camus, download
from diffecho_utils.__main__ import main


def files(root):
    """{path: bytes} of a CAMUS folder."""
    paths = [path for path in root.glob("database_*/**/*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def zipped(root, *extra, top="", prefix=""):
    """A zip of a CAMUS folder as Girder sends it, with `extra` members (ZipInfo or name, bytes).

    Only what begins with `top`, under names that begin with `prefix`.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        members = {name: data for name, data in files(root).items() if name.startswith(top)}
        for name, data in [*members.items(), *extra]:
            name = prefix + name if isinstance(name, str) else name
            file.writestr(name, data)
    return content.getvalue()


class Server(Quiet):
    """Sends `content`; `breaks` times no more than `piece` bytes of it; with or without ranges."""

    content, content_type, status = b"", "application/zip", 200
    ranges, lengths, breaks, piece = True, True, 0, 0
    requests = []

    def do_GET(self):
        self.requests.append(self.headers.get("Range"))
        start = 0
        if self.ranges and self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(self.content):
                return self.send_error(416)
        body = self.content[start:]
        self.send_response(206 if start else self.status)
        self.send_header("Content-Type", self.content_type)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body)}/*")
        if self.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).breaks:
            type(self).breaks -= 1
            body = body[: self.piece]
        self.wfile.write(body)


@pytest.fixture
def serve(serve, monkeypatch):
    """serve(content, ...) -> url of a loopback server with these properties; serve.handler.requests: the ranges asked for."""
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with contextlib.ExitStack() as stack:

        def start(content, **properties):
            properties |= {"content": content, "requests": []}
            start.handler = type("Handler", (Server,), properties)
            return stack.enter_context(serve(None, start.handler)) + "/download"

        yield start


def fetch(url, dest, patients=10, **more):
    return download.download(dest, accept_licence=True, urls=[url], patients=patients, **more)


def test_download_is_whole_and_leaves_nothing_else(phantom_root, tmp_path, serve):
    """Of two archives, and with a folder around all."""
    tops = ("database_nifti", "database_split")
    urls = [serve(zipped(phantom_root, top=top, prefix="CAMUS_public/")) for top in tops]
    progress = mock.Mock()
    root = download.download(tmp_path / "camus", True, urls, patients=10, progress=progress)
    assert files(root) == files(phantom_root)
    assert camus.read_table(root)["split"].notna().all()
    assert [p.name for p in tmp_path.iterdir()] == ["camus"]
    units = [call.args[2] for call in progress.call_args_list]
    assert units[-40:] == ["frames"] * 40 and set(units[:-40]) == {"MB"}
    assert progress.call_args.args[:2] == (40, 40)


def test_licence_is_shown_and_refused_unless_accepted(phantom_root, tmp_path, serve, capsys):
    url = serve(zipped(phantom_root))
    command = ["download", str(tmp_path / "camus"), "--url", url, "--patients", "10"]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "CC BY-NC-SA 4.0" in message and "cite" in message and "--accept-licence" in message
    assert not list(tmp_path.iterdir()) and not serve.handler.requests
    assert main([*command, "--accept-licence"]) == 0
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out


@pytest.mark.parametrize("restart", [False, True])
def test_interrupted_command_goes_on_when_repeated_or_begins_again(
    restart, phantom_root, tmp_path, serve
):
    url = serve(zipped(phantom_root), breaks=download._ATTEMPTS, piece=10_000)
    with pytest.raises(DiffEchoError, match="broke 5 times, the last time after 50000 bytes"):
        fetch(url, tmp_path / "camus")
    assert [p.name for p in tmp_path.iterdir()] == ["camus.0.zip.part"]
    assert serve.handler.requests == [None, *(f"bytes={n}0000-" for n in range(1, 5))]
    assert files(fetch(url, tmp_path / "camus", restart=restart)) == files(phantom_root)
    assert serve.handler.requests[5:] == [None if restart else "bytes=50000-"]


def test_what_cannot_go_on_starts_over(phantom_root, tmp_path, serve):
    """A server without ranges, and a part that is longer than the file has become."""
    content = zipped(phantom_root)
    url = serve(content, ranges=False, breaks=1, piece=50_000)
    assert files(fetch(url, tmp_path / "a")) == files(phantom_root)
    assert serve.handler.requests == [None, "bytes=50000-"]
    (tmp_path / "b.0.zip.part").write_bytes(content + b"older and longer")
    assert files(fetch(serve(content), tmp_path / "b")) == files(phantom_root)
    assert serve.handler.requests[1:] == [None]


@pytest.mark.parametrize("fault", ["truncated", "changed", "page"])
def test_what_is_no_whole_zip_is_deleted_and_said(fault, phantom_root, tmp_path, serve):
    content = bytearray(zipped(phantom_root))
    if fault == "truncated":
        del content[-500:]
    elif fault == "changed":  # as under a resumed download
        content[60_000:60_100] = bytes(100)
    else:  # a page that says it is a zip
        content = b"<html>Maintenance</html>"
    with pytest.raises(DiffEchoError, match="no whole zip.*; deleted, run the same.*--url"):
        fetch(serve(bytes(content), lengths=False), tmp_path / "camus")
    assert not list(tmp_path.iterdir())


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "name",
    [
        "../escaped",
        "database_nifti/../../escaped",
        "/tmp/escaped",
        "..\\escaped",
        link("database_nifti/patient0001/link"),
    ],
    ids=str,
)
def test_unsafe_zip_writes_nothing_outside_and_no_link(name, phantom_root, tmp_path, serve):
    root = tmp_path / "below" / "camus"
    fetch(serve(zipped(phantom_root, (name, "/etc/passwd"))), root)
    written = [path for path in tmp_path.rglob("*") if path != root.parent]
    assert all(path.is_relative_to(root) and not path.is_symlink() for path in written)
    assert not Path("/tmp/escaped").exists()


def test_html_page_and_wrong_address_are_said(tmp_path, serve):
    page = {"content": b"<html>Maintenance</html>", "content_type": "text/html; charset=utf-8"}
    for url, words in (
        (serve(**page), "a web page instead of a zip"),
        (serve(b"", status=404), "404"),
        ("camus.zip", "no web address"),
    ):
        with pytest.raises(DiffEchoError, match=f"{words}.*--url"):
            fetch(url, tmp_path / "camus")
    assert not list(tmp_path.iterdir())


def test_content_is_verified(phantom_root, tmp_path, serve):
    with pytest.raises(DiffEchoError, match="10 patients instead of 500"):
        fetch(serve(zipped(phantom_root)), tmp_path / "camus", patients=500)
    assert [p.name for p in tmp_path.iterdir()] == ["camus.0.zip"]
    fetch("http://127.0.0.1:9/none", tmp_path / "camus")  # the archive is there: no network
    broken = tmp_path / "broken"
    shutil.copytree(phantom_root, broken)
    for mask in (False, True):
        camus.frame_path(broken, "patient0002", "4CH", "ES", mask).unlink()
    with pytest.raises(DiffEchoError, match="patient0002: 3 frames instead of 4"):
        fetch(serve(zipped(broken)), tmp_path / "second")
    path = camus.frame_path(broken, "patient0003", "2CH", "ED", mask=True)
    nib.Nifti1Image(np.full(nib.load(path).shape, 9, np.uint8), np.eye(4)).to_filename(path)
    with pytest.raises(DiffEchoError, match=r"third/database_nifti/patient0003.*labels \[9"):
        fetch(serve(zipped(broken)), tmp_path / "third")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_said_with_what_is_needed(phantom_root, small_disk, serve):
    content = zipped(phantom_root, ("notes.txt", os.urandom(2_000_000)))
    with pytest.raises(DiffEchoError, match=r"\d\.\d MB needed, 1\.0 MB free"):
        fetch(serve(content), small_disk / "camus")
    with pytest.raises(DiffEchoError, match="the disk is full; free space"):
        fetch(serve(content, lengths=False), small_disk / "camus")
    assert [p.name for p in small_disk.iterdir()] == ["camus.0.zip.part"]
    next(small_disk.iterdir()).unlink()
    bomb = zipfile.ZipInfo("database_nifti/zeros")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    with pytest.raises(DiffEchoError, match="MB needed"):
        fetch(serve(zipped(phantom_root, (bomb, bytes(10**7)), top="none")), small_disk / "camus")
    assert [p.name for p in small_disk.iterdir()] == ["camus.0.zip"]
