"""TRL's SFTTrainer, packing and not: its losses are the eager layers', and packed sequences do not see one another."""

import datasets
import pytest
import torch
import toy_training as toy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "why does the adapter keep what it knew because base model rows stay frozen and only few learn".split()
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
TIGHT = dict(rel=2e-5)  # TRL's log-probabilities are float32 numbers


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def talks() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(5)

    def text(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))

    made = [[("user", text(2 + i % 3)), ("assistant", text(3 + i % 5))] for i in range(24)]
    return datasets.Dataset.from_list([{"messages": [dict(role=r, content=c) for r, c in talk]} for talk in made])


class Recorded(toy.Recorded, SFTTrainer):
    """Keeps every batch too, and what its sequences, each by itself, would have cost: a mean over their targets."""

    def compute_loss(self, model, inputs, **kwargs):
        if model.training:
            self.__dict__.setdefault("batches", []).append(dict(inputs))
            self.__dict__.setdefault("alone", []).append(alone(model, inputs))
        return super().compute_loss(model, inputs, **kwargs)


@torch.no_grad()
def alone(model, inputs) -> float:
    total = count = 0
    for row in range(len(inputs["input_ids"])):
        ids, labels = inputs["input_ids"][row], inputs["labels"][row]
        starts = [0]
        if "position_ids" in inputs:
            starts = (inputs["position_ids"][row] == 0).nonzero().flatten().tolist()
        else:
            ids = ids[inputs["attention_mask"][row].bool()]
        for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
            logits = model(input_ids=ids[None, first:last], use_cache=False).logits[0, :-1]
            targets = labels[first + 1 : last]
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += int((targets != -100).sum())
    return total / count


def sft(model, folder, **changes) -> Recorded:
    arguments = toy.settings(folder, max_length=32, dataset_num_proc=None, bf16=False, **changes)
    run = Recorded(model, SFTConfig(**arguments), train_dataset=talks(), processing_class=tokenizer())
    run.train()
    return run


@pytest.mark.parametrize("packing", (False, True))
@pytest.mark.parametrize("method", toy.METHODS)
def test_losses_are_those_of_the_eager_layers_and_of_each_sequence_alone(method, packing, tmp_path):
    run = sft(toy.fused(method), tmp_path, packing=packing)
    assert run.losses == pytest.approx(sft(toy.eager(method), tmp_path, packing=packing).losses, **TIGHT)
    assert run.losses == pytest.approx(run.alone, **TIGHT)
    assert ("position_ids" in run.batches[0]) == packing
    if packing:
        assert all((batch["position_ids"] == 0).sum() > 2 for batch in run.batches), "rows hold several sequences"


def test_packed_alora_under_gradient_checkpointing(tmp_path):
    expected = sft(toy.fused("alora"), tmp_path, packing=True, gradient_checkpointing=False).losses
    for use_reentrant in (True, False):
        arguments = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert sft(toy.fused("alora"), tmp_path, packing=True, **arguments).losses == pytest.approx(expected, **TIGHT)


class Balanced(toy.Recorded, SFTTrainer):
    """TRL's loss is not the model's: the constraint is added here, as TRL adds that of a mixture's router."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["task_types"] = torch.tensor([0, 1])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self.__dict__.setdefault("added", []).append(outputs["balance_loss"].item())
        loss = loss + outputs["balance_loss"]
        return (loss, outputs) if return_outputs else loss


def test_balance_loss_in_a_compute_loss_of_ones_own(tmp_path):
    arguments = SFTConfig(**toy.settings(tmp_path, max_length=32, bf16=False, max_steps=1))
    model = toy.fused("loramoe", balance_weight=0.5)
    run = Balanced(model, arguments, train_dataset=talks(), processing_class=tokenizer())
    run.train()
    plain = sft(toy.fused("loramoe", balance_weight=0.5), tmp_path, max_steps=1)
    assert run.added[0] > 1e-2 and run.losses[0] == pytest.approx(plain.losses[0] + run.added[0], **TIGHT)
