"""The list of shipped files with their SHA-256, by which an installed package checks what it fetches."""

import hashlib
from pathlib import Path

from diffecho_utils import assets, files


def write_registry(folder, path=assets.REGISTRY):
    """Write "path sha256" of each file below `folder`, hidden ones left out, to `path`."""
    folder = Path(folder)
    shipped = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    lines = [
        f"{p.relative_to(folder).as_posix()} {hashlib.sha256(p.read_bytes()).hexdigest()}\n"
        for p in shipped
    ]
    files.write_text(path, "".join(lines))


if __name__ == "__main__":
    write_registry(assets.root() / "data")
