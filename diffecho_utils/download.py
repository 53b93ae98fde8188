"""Download CAMUS from its home: resumed where it broke, unpacked safely, and verified by its content.

Chapter 01. `python -m diffecho_utils download DEST --accept-licence`
"""

import errno
import http.client
import math
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from diffecho_utils import DiffEchoError, camus, files

_GIRDER = "https://humanheart-project.creatis.insa-lyon.fr/database/api/v1/folder/{}/download"
URLS = (  # the patients, then the lists; zips made on the fly, their checksums change
    _GIRDER.format("63fde55f73e9f004868fb7ac"),
    _GIRDER.format("66e27d12961576b1bad4e4e1"),
)
LICENCE = """\
The CAMUS data set is free of charge under CC BY-NC-SA 4.0
(https://creativecommons.org/licenses/by-nc-sa/4.0/legalcode), for non-commercial scientific research
only. Whoever refers to it must cite: S. Leclerc, E. Smistad, J. Pedrosa, A. Ostvik, et al. "Deep
Learning for Segmentation using an Open Large-Scale Dataset in 2D Echocardiography", IEEE Transactions
on Medical Imaging, vol. 38, no. 9, pp. 2198-2210, Sept. 2019, doi:10.1109/TMI.2019.2900516."""

_ATTEMPTS = 5  # connections of one download that may break before it gives up for now


def download(dest, accept_licence=False, urls=URLS, patients=500, progress=None, restart=False):
    """Download the official NIfTI release to the new folder `dest` and verify what is in it.

    Archives lie beside `dest` until all is well: an interrupted download goes on where the server
    allows it (HTTP ranges), and unpacking can be repeated without the network; restart: they are
    thrown away first. Their checksums change at each download, so the content is verified: `patients`
    patients, four frames and four label maps each, readable, labels 0-3. `progress(done, total, unit)`
    is called after each MB (`total` None where the server does not say it) and each frame.
    Raises DiffEchoError for a licence not accepted, a connection that keeps breaking, what is no zip,
    a full disk, and missing or unusable content.
    """
    dest = Path(dest)
    if not accept_licence:
        raise DiffEchoError(f"{LICENCE}\nNothing was downloaded: accept it by --accept-licence")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise DiffEchoError(f"{url}: no web address; name that of the zip with --url http...")
    archives = [dest.with_name(f"{dest.name}.{number}.zip") for number in range(len(urls))]
    for archive in archives if restart else ():
        archive.unlink(missing_ok=True)
        _part(archive).unlink(missing_ok=True)
    with files.whole_folder(dest) as draft:
        for url, archive in zip(urls, archives, strict=True):
            if not archive.exists():
                _fetch(url, archive, progress)
            _unpack(archive, draft)
        problems = _content_problems(draft, patients, progress)
        if problems:
            names = ", ".join(archive.name for archive in archives)
            raise DiffEchoError(
                f"{dest.parent}: what {names} hold is not the whole of CAMUS; delete them to download "
                "again:\n" + "\n".join(problems[:5]).replace(str(draft), dest.name)
            )
    for archive in archives:
        archive.unlink()
    return dest


def _part(archive):
    """What a broken connection leaves of an archive, for later."""
    return archive.with_name(f"{archive.name}.part")


def _fetch(url, archive, progress):
    """Download `url` to `archive`, in as many connections as it takes."""
    part = _part(archive)
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt)
        try:
            _fetch_rest(url, part, progress)
            os.replace(part, archive)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing after what is there: the file has changed since
                part.unlink()
            elif error.code < 500:
                raise DiffEchoError(f"{url}: {error}; name the right address with --url") from None
            problem = error
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            problem = error
    size = part.stat().st_size if part.exists() else 0
    raise DiffEchoError(
        f"{url}: the connection broke {_ATTEMPTS} times, the last time after {size} bytes ({problem}); "
        "run the same command again, it goes on from there if the server can"
    )


def _fetch_rest(url, part, progress):
    """One connection: what is missing of `part`, or all of it where the server knows no ranges."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.headers.get_content_type() == "text/html":
            raise DiffEchoError(
                f"{url}: a web page instead of a zip; open it in a browser to see what it says, and "
                "name the right address with --url"
            )
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        size = start if resumed else 0
        total = None if response.length is None else size + response.length
        megabytes = None if total is None else math.ceil(total / 2**20)
        _need(response.length or 0, part.parent)
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(2**20):
                size += file.write(chunk)
                if progress:
                    progress(math.ceil(size / 2**20), megabytes, "MB")
    if total is not None and size < total:
        raise ConnectionError(f"{total - size} bytes missing")


def _unpack(archive, folder):
    """Write the zip's `database_nifti/` and `database_split/` under `folder`, wherever they lie in it."""
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            _need(sum(member.file_size for member in members), archive.parent)
            for member in members:
                parts = member.filename.split("/")
                for top in {"database_nifti", "database_split"} & set(parts):
                    member.filename = "/".join(parts[parts.index(top) :])
                    file.extract(member, folder)  # never outside of it, and never a link
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        archive.unlink()
        raise DiffEchoError(
            f"{archive}: no whole zip ({error}); deleted, run the same command again or name another "
            "address with --url"
        ) from None


def _need(size, folder):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DiffEchoError(
            f"{folder}: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; free "
            f"{(size - free) / 1e6:.1f} MB, or name a folder on another disk, and run the command again"
        )


def _content_problems(root, patients, progress):
    """What is missing or unreadable; how the hearts lie is the release's own affair (`checks`)."""
    table, problems = camus.scan(root)
    if problems:
        return problems
    for done, row in enumerate(table.itertuples(), start=1):
        try:
            camus.read_frame(row)
        except DiffEchoError as error:
            problems.append(str(error))
        if progress:
            progress(done, len(table), "frames")
    counts = table.groupby("patient").size()
    if len(counts) != patients:
        problems.append(f"{len(counts)} patients instead of {patients}")
    for patient, count in counts[counts != len(camus.CLASSES)].items():
        problems.append(f"{patient}: {count} frames instead of {len(camus.CLASSES)}")
    return problems
