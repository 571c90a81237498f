"""Chat templates of the field with a tokenizer that has the special tokens they write; conversations to try them with.

TRL ships real ones; those that it lacks are written here in the form that their models publish.
"""

import importlib.util
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

OTHERS = {
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "tulu": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
        "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
        "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "phi4": (
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
        "{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
        "{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "alpaca": (  # no special token at all: the answer ends with eos
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}
# <|im_end|>, <end_of_turn>, <｜User｜>, [INST], ... : what templates write as one token
CONTROL = re.compile(
    r"<[|｜][^<>{}'\" ]{1,40}[|｜]>|</?s>|<bos>|<eos>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]|<\|?turn\|?>|<turn\|>"
)
THINKING = ("<think>", "</think>")
ENDS = (  # the ends of an answer, the likeliest first
    "<|im_end|> <end_of_turn> <turn|> <|eot_id|> <|return|> <|END_OF_TURN_TOKEN|> <|end|> <｜end▁of▁sentence｜> </s> <|endoftext|>"
).split()


def names() -> list[str]:
    """Of TRL's templates as models publish them (those for training are TRL's own changes), and the others."""
    spec = importlib.util.find_spec("trl")
    shipped = []
    if spec:
        folder = Path(spec.origin).parent / "chat_templates"
        shipped = [path.stem for path in folder.glob("*.jinja") if not path.stem.endswith("_training")]
    return sorted({*shipped, *OTHERS})


def template(name: str) -> str:
    if name in OTHERS:
        return OTHERS[name]
    folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text()


def tokenizer(text: str):
    """Bytes, and the control tokens that the template `text` writes, with the roles that its model gives them."""
    written = sorted({*CONTROL.findall(text)} | {"<s>", "</s>"})
    written += [] if "<|endoftext|>" in written else ["<|endoftext|>"]
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True) for word in written])
    core.add_tokens([AddedToken(word, special=False) for word in THINKING])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=next(end for end in ENDS if end in written),
        pad_token="<|endoftext|>",
    )
    made.chat_template = text
    return made


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


THOUGHTS = "<think>\nTwo and two.\n</think>\n\nFour."
CONVERSATIONS = {  # (prompt, answer)
    "plain": ("What is 2+2?", "Four, I think."),
    "system": ([{"role": "system", "content": "Be brief."}, user("What is 2+2?")], "Four."),
    "two turns": ([user("What is 2+2?"), assistant("Four."), user("And 3+3?")], "Six."),
    "thinking": ("What is 2+2?", THOUGHTS),
    "thinking before": ([user("What is 2+2?"), assistant(THOUGHTS), user("And 3+3?")], "Six."),
    "spaces": ("What is 2+2?\n", "\n  Four.  \n"),
    "begins like a token": ("What is 2+2?", "<b>Four</b> <"),
    "prefilled": ([user("What is 2+2?"), assistant("It is")], " four."),
}
