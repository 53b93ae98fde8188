"""Whole files and folders: written beside, then renamed, so that a reader never finds half of one."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffecho_utils import DiffEchoError


@contextlib.contextmanager
def draft(path):
    """`with draft(path) as beside`: the file or folder made there becomes `path`, or is removed after an error."""
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # where it is a folder
        beside.unlink(missing_ok=True)


def write_text(path, text):
    """Write a whole file or nothing."""
    with draft(path) as beside:
        beside.write_text(text)


def read_json(path, remedy):
    """What a JSON file holds; where it is missing or half-written, DiffEchoError with the remedy."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise DiffEchoError(f"{path}: missing; {remedy}") from None
    except ValueError as error:
        raise DiffEchoError(f"{path}: half-written ({error}); {remedy}") from None


def digest(paths):
    """SHA-256 of the contents of files, one after the other: hexadecimal digits."""
    content = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest()


def cached(cache_dir, name, key, make):
    """`make()`'s dict of tensors, kept as safetensors under `cache_dir`/name-<hash of key>; None: no cache."""
    if cache_dir is None:
        return make()
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"{name}-{digest}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError):  # damaged: made again
        return load_file(path)
    tensors = make()
    save_tensors(path, tensors)
    return tensors


def save_tensors(path, tensors, facts=None):
    """Write tensors (a dict) as safetensors, whole or not at all; `facts`: {name: text}, its header."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft(path) as beside:
            save_file(tensors, beside, metadata=facts)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{path}: not written ({error})") from None


@contextlib.contextmanager
def whole_folder(dest):
    """Context of a draft folder beside the new folder `dest`: renamed to it at the end, or removed.

    Raises DiffEchoError where `dest` exists and where the disk is full.
    """
    dest = Path(dest)
    if dest.exists():
        raise DiffEchoError(f"{dest}: exists; name a new folder, or delete it")
    try:
        with draft(dest) as beside:
            beside.mkdir(parents=True)
            yield beside
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiffEchoError(
            f"{dest.parent}: the disk is full; free space on it, or name a folder on another one, and "
            "run the same command again"
        ) from None
