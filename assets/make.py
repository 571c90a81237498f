"""`make assets`: the embedded models, which `--model reviews` and `--gvm reviews` name. Run it after a change of the world.

`untrained` is a random Llama of 0.1 M parameters, `policy` what sft.py makes of it, `value` what gvm_td.py makes of that; both
with their defaults, so that ppo.py and dvpo.py can each be run alone.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from assets import reviews  # noqa: E402

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}"
    "<writer> {{ m['content'] }} <eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<writer> {% endif %}"
)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(reviews.WORDS),
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
AutoModelForCausalLM.from_config(config).save_pretrained(reviews.folder("untrained"))
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(reviews.WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
roles = {f"{role}_token": f"<{role}>" for role in ("pad", "bos", "eos", "unk")} | {
    "chat_template": CHAT_TEMPLATE
}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, additional_special_tokens=reviews.SPECIAL[4:], **roles
)
tokenizer.save_pretrained(reviews.folder("untrained"))
if "--untrained-only" not in sys.argv:
    for name, script, model in (("policy", "sft.py", "untrained"), ("value", "gvm_td.py", "policy")):
        run_dir = ROOT / "runs/assets" / name
        command = [
            sys.executable,
            str(ROOT / script),
            "--model",
            reviews.folder(model),
            "--run-dir",
            str(run_dir),
            "--overwrite",
        ]
        subprocess.run(command, check=True)
        shutil.rmtree(reviews.folder(name), ignore_errors=True)
        shutil.copytree(run_dir / "model", reviews.folder(name))
