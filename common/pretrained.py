"""Opening what others made: a model's name to a folder or hub id, and one part of it through transformers."""

from pathlib import Path

from assets import reviews
from common.cli import fail


def resolve(name: str, embedded: str = "policy") -> str:
    """A model name to a folder or hub id: `reviews` becomes the embedded model of that kind.

    Ends with one line where the name is that of a folder, by its form or because there is one, and no model
    lies there.
    """
    if name == "reviews":
        return reviews.folder(embedded)
    if not name:  # only --reward has no default
        fail("--reward: give a reward model (folder or hub id) or module:function")
    looks_like_a_path = name.count("/") > 1 or name.startswith((".", "/"))  # a hub id has one slash at most
    is_folder = looks_like_a_path or Path(name).is_dir()
    if is_folder and not Path(name, "config.json").is_file():
        fail(f"{name}: no model folder there (no config.json)")
    return name


def load_pretrained(what: str, auto, name: str, **kwargs):
    """`auto.from_pretrained(name, **kwargs)` without running code that comes with it, nor asking whether to; ends
    with one line where there is no such `what`, or a damaged one."""
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        fail(f"{name}: no {what} in such a folder or hub id ({lines[0]})")
    except Exception as error:  # a damaged file leads to any of them
        reason = " ".join(str(error).split())[:200]
        fail(f"{name}: its {what} cannot be read ({type(error).__name__}: {reason})")
