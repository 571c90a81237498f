"""`--wandb`: a run's numbers in Weights & Biases too, offline without a key."""

import os
from pathlib import Path

from common.data import fail


def start(folder: Path, step: int, config: dict):
    """A run, named after its folder; a resumed one (`step` above 0) goes on in the same."""
    try:
        import wandb
    except ImportError:
        fail("--wandb needs the package: pip install wandb")
    os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")  # no login prompt
    file = folder / "wandb_id"
    file.write_text(file.read_text() if step and file.exists() else wandb.util.generate_id())
    return wandb.init(project="value-first", config=config, name=str(folder), id=file.read_text(), resume="allow")
