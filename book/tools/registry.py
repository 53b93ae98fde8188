"""The list of shipped files with their SHA-256, by which an installed package checks what it fetches."""

import hashlib
from pathlib import Path

from diffecho_utils import assets, files


def write_registry(folder, path=assets.REGISTRY):
    """Write "path sha256" of each file below `folder`, hidden ones left out, to `path`."""
    shipped = [p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".")]
    files.write_text(path, "\n".join([*hashes(folder, shipped), ""]))


def hashes(folder, paths, told_apart=Path.read_bytes):
    """A line "path sha256" for each of some files below `folder`: of its bytes, or what stands for them."""
    for path in sorted(paths):
        digest = hashlib.sha256(told_apart(path)).hexdigest()
        yield f"{path.relative_to(folder).as_posix()} {digest}"


if __name__ == "__main__":
    write_registry(assets.root() / "data")
