"""Every model family of transformers, tiny: right, or refused in one line; the verdicts are pinned.

Each is judged whole (families.py): as a policy its log-probabilities and their gradients, samples and export; as
value and reward model its numbers, padded, alone and from the export; adapters, merged. All in under two
minutes of one core.
"""

import json
import shutil

import families
import pytest
import transformers
from families import PAGE, PINNED, model_types, page_with, pinned, table, verdicts

pytestmark = pytest.mark.usefixtures("group")

GROUPS = 12
TYPES = model_types()
VERDICTS = json.loads(PINNED.read_text())
# What users of 2026 name. A refusal of one of these is a decision, not an accident.
POPULAR = (
    "llama qwen2 qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_moe gemma gemma2 gemma3_text gemma4_text gemma3n_text mistral "
    "mixtral ministral3 phi phi3 olmo olmo2 olmo3 smollm3 granite granitemoe granitemoehybrid cohere cohere2 "
    "falcon_h1 deepseek_v2 deepseek_v3 glm glm4 glm4_moe gpt_oss llama4_text lfm2 lfm2_moe nemotron nemotron_h "
    "bamba jamba mamba2 gpt2 gpt_neox opt bloom stablelm starcoder2 exaone4 ernie4_5 hunyuan_v1_dense minimax_m2 "
    "seed_oss t5 deepseek_v32 deepseek_v4 glm_moe_dsa kimi_linear qwen4_exp_text olmo_hybrid longcat_flash apertus gemma3 llama4"
).split()


def pinned_version() -> str:
    """The version of transformers that the verdicts are of."""
    requirements = PINNED.parents[1].joinpath("requirements.txt").read_text()
    return requirements.partition("transformers==")[2].split()[0]


@pytest.mark.parametrize("group_number", range(GROUPS))
def test_verdicts(tmp_path, group_number):
    """Never wrong, never a traceback, with any version; with the pinned one, what families.json says."""
    found = {}
    for kind in TYPES[group_number::GROUPS]:
        found[kind] = {column: pinned(text) for column, text in verdicts(kind, tmp_path).items()}
        shutil.rmtree(tmp_path), tmp_path.mkdir()
    faults = []
    for kind, columns in found.items():
        faults += [
            f"{kind}, {column}: {text}"
            for column, text in columns.items()
            if not text.startswith(("right", "refused: ", "not built: "))
        ]
    assert not faults, "\n".join(faults)
    if transformers.__version__ == pinned_version():
        changed = {kind: each for kind, each in found.items() if VERDICTS.get(kind) != each}
        assert not changed, (
            f"python tests/families.py --write, if this is meant: {json.dumps(changed, indent=1)}"
        )


def test_the_pinned_verdicts_are_good_enough():
    right = {
        column: sum(each[column] == "right" for each in VERDICTS.values()) for column in families.COLUMNS
    }
    assert right["policy"] >= 110, right
    assert right["value"] >= 110, right
    for kind in POPULAR:
        assert VERDICTS[kind]["policy"] == "right", f"{kind}: {VERDICTS[kind]['policy']}"


def test_every_family_of_this_version_is_pinned():
    if transformers.__version__ != pinned_version():
        pytest.skip(f"the verdicts are of transformers {pinned_version()}")
    assert sorted(VERDICTS) == TYPES


def test_the_page_has_the_pinned_verdicts():
    page = PAGE.read_text()
    assert page == page_with(table(VERDICTS), page), "python tests/families.py --write"
