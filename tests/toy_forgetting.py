"""A tiny Llama and a few examples for the tests of the forgetting benchmark."""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from gci_kernels.bench.forgetting.batches import Example
from gci_kernels.bench.forgetting.evaluate import Point

VOCAB = 50


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def example(length, answer, task_type=0, seed=0):
    generator = torch.Generator().manual_seed(seed + 100 * length)
    ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
    return Example(tuple(ids), (-100,) * (length - answer) + tuple(ids[length - answer :]), task_type)


EXAMPLES = [
    example(length, answer, length % 2) for length, answer in ((9, 3), (14, 5), (6, 1), (11, 4), (8, 2), (13, 6))
]


def one_by_one(model, examples):
    """Every answer's losses from a forward of its own, in the order of the examples."""
    losses = []
    for found in examples:
        logits = model(torch.tensor([found.ids])).logits[0, :-1].float()
        labels = torch.tensor(found.labels[1:])
        losses.append(F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)[labels != -100])
    return losses


POINTS = [
    Point(0, 0, 3.0, 2.0, 0.0, 0.0), Point(4, 100, 2.0, 2.1, 0.2, 0.1), Point(8, 200, 1.0, 2.5, 0.8, 0.5),
]  # fmt: skip
