"""A tiny float64 Llama that answers in words, and its tokenizer, with a system turn and without.

Loaded by the tests of gci_kernels.rega.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gci_kernels.rega import Roles

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
WORDS = """you are a helpful model lawyer doctor answer as what is rent of the tenant owe court health fever sun name
colours three why does water boil yes no red blue green pay cold rest drink""".split()

# As in ChatML: a turn is its role, its text and the end-of-turn token.
TURN = "{{ '<' + m['role'] + '>' }} {{ m['content'] }} <eos> "
END = "{% if add_generation_prompt %}<assistant>{% endif %}"
SYSTEM = "{% for m in messages %}" + TURN + "{% endfor %}" + END
# The two ways in which templates lack a system turn.
DROPS = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + END
RAISES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + SYSTEM
TEMPLATES = {"system": SYSTEM, "drops": DROPS, "raises": RAISES}

ROLES = Roles("you are a helpful model", {"law": "you are a lawyer", "health": "you are a doctor"})
INSTRUCTIONS = [
    "what is rent", "name three colours", "why does water boil", "what is the sun", "what does the tenant owe",
    "what is a court", "what is fever",
]  # fmt: skip


def tokenizer(template: str | None = SYSTEM) -> PreTrainedTokenizerFast:
    """A word is a token; answers come back with single spaces."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=["<system>", "<user>", "<assistant>"], chat_template=template,
    )  # fmt: skip


def llama() -> LlamaForCausalLM:
    """The same one at every call, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


class Killed(BaseException):
    pass


def kill_after(count: int):
    def after(finished: int) -> None:
        if finished >= count:
            raise Killed

    return after
