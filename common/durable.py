"""Files that survive: written aside, on the disk, then renamed; folders with checksums; a pickle that runs
nothing."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import uuid
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

CHECKSUMS = "checksums.json"

# What torch's index of a checkpoint is made of. Any other name in it could be a program.
KNOWN = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name from Python 3.13 on
}


# --- writing --------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """The whole file or the one before: written under another name, on the disk, renamed."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file or a folder's list of names reaches the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # some network file systems have no fsync of folders
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """All files below a folder, and the folders."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def replace(part: Path, final: Path) -> None:
    """`part` takes the name `final`. What had it is renamed before it is removed, so that a kill leaves no half
    of it under that name."""
    sync_tree(part)
    if final.exists():
        remove(final)
    part.rename(final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Renames the folder, then removes it."""
    gone = folder.with_name(f"part-removed-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    if gone.exists():  # NFS keeps files that another process has open
        gone = gone.with_name(f"{gone.name}-{uuid.uuid4().hex}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a disk without room. Of torch's checkpoints the errors
    of all ranks lie inside."""
    seen = set()
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        waiting += [error.__cause__, error.__context__]
        waiting += [inner[0] for inner in getattr(error, "failures", {}).values()]
    return False


# --- checksums ------------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes; of one that the disk does not give back, the reason."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def files(folder: Path) -> list[str]:
    """The names of all files below a folder, but CHECKSUMS."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != CHECKSUMS]


def checksums(folder: Path, names: list[str] | None = None) -> dict[str, str]:
    """name -> checksum of the files `names` below a folder (None: of all)."""
    return {name: checksum(folder / name) for name in (files(folder) if names is None else names)}


def damage(folder: Path, found: dict[str, str]) -> str:
    """What is wrong with a folder, whose files have the checksums `found`: "" for nothing."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (ValueError, OSError):
        return f"{CHECKSUMS} is damaged"
    if not isinstance(written, dict):
        return f"{CHECKSUMS} is damaged"
    for name in sorted({*written, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in written:
            return f"{name} does not belong there"
        if written[name] != found[name]:
            return f"{name} is damaged"
    return ""


# --- pickles that run nothing ---------------------------------------------------------------------------


class IndexUnpickler(pickle.Unpickler):
    """Reads the index of a checkpoint, and nothing that is not in KNOWN."""

    def find_class(self, module: str, name: str):
        if (module, name) in KNOWN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")


def read_index(folder: Path):
    """The index of a checkpoint. Raises pickle.UnpicklingError, or whatever a damaged one leads to."""
    with open(folder / ".metadata", "rb") as file:
        return IndexUnpickler(file).load()


class Reader(FileSystemReader):
    """torch's reader of checkpoints, with that index. Tensors it reads as data alone anyhow."""

    def read_metadata(self, *args, **kwargs):
        index = read_index(Path(self.path))
        index.storage_meta.load_id = self.load_id
        return index


class Planner(DefaultLoadPlanner):
    """torch's, but what is no tensor (a learning rate, a count) is read as data alone, too."""

    def load_bytes(self, read_item, value) -> None:
        # the parent reads `value` with torch.load, which would run what a pickle says
        data = torch.load(value, weights_only=True)
        value.seek(0)
        value.truncate()
        torch.save(data, value)
        value.seek(0)
        super().load_bytes(read_item, value)
