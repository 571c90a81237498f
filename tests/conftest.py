"""One thread a process and no network, set before anything imports torch; a world of small files for the tests."""

import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers
import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder to run in, with ragged data files."""
    folder = tmp_path_factory.mktemp("world")
    helpers.make_world(folder)
    return helpers.World(folder)


@pytest.fixture(scope="module")
def group():
    """One process is a group, for tests that load sharded models themselves."""
    import torch.distributed as dist

    from common import distributed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    distributed.mesh.cache_clear()
    gc.collect()  # FSDP's models go before the group does
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> folder of a random model of that kind: policy, value, reward."""
    from random_models import make_folders

    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(folders):
    from common.tokenization import load_tokenizer

    return load_tokenizer(folders["policy"])


@pytest.fixture(scope="module")
def policy(folders, tokenizer, group):
    """The random policy, trained."""
    from random_models import ARGS

    from common.models import load_model

    return load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)
