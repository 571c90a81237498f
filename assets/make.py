"""`make assets`: the embedded models, which `--model reviews` and `--gvm reviews` name. Run it after a
change of the world.

`untrained` is a random Llama of 0.1 M parameters, `policy` what sft.py makes of it, `value` what gvm_td.py
makes of that. Both scripts run with their defaults, so that ppo.py and dvpo.py can each be run alone. With
--untrained-only the other two stay as they are."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from assets import reviews

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% else %}<writer> {{ m['content'] }} <eos>"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<writer> {% endif %}"
)


def make_untrained() -> None:
    """Writes `untrained`: the model with random weights, and the tokenizer with one token per word."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(reviews.WORDS),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,  # these are positions in reviews.SPECIAL
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(reviews.folder("untrained"))

    vocabulary = {word: i for i, word in enumerate(reviews.WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        additional_special_tokens=["<user>", "<writer>"],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(reviews.folder("untrained"))


def train(name: str, script: str, model: str) -> None:
    """Writes the embedded model `name`: what `script` makes of the embedded `model`."""
    run_dir = ROOT / "runs/assets" / name
    command = [sys.executable, str(ROOT / script), "--model", reviews.folder(model)]
    command += ["--run-dir", str(run_dir), "--overwrite"]
    subprocess.run(command, check=True)
    shutil.rmtree(reviews.folder(name), ignore_errors=True)
    shutil.copytree(run_dir / "model", reviews.folder(name))


if __name__ == "__main__":
    make_untrained()
    if "--untrained-only" not in sys.argv:
        train("policy", "sft.py", "untrained")
        train("value", "gvm_td.py", "policy")
