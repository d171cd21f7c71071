"""The balancing constraint in models of several kinds and in training loops: counted right, or said to be left out."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from gci_kernels import LoRAMoEConfig, patch
from gci_kernels.accuracy import relative_error
from gci_kernels.ops import balance_loss
from gci_kernels.tuners import LoRAMoELinear

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip
OPT = dict(
    vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
    max_position_embeddings=64, pad_token_id=0, init_std=0.2, dropout=0.0,
)  # fmt: skip
MOE = TEXT | dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16)
T5 = dict(
    vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0,
    dropout_rate=0.0,
)  # fmt: skip
CLIP = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    projection_dim=16,
)  # fmt: skip
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 77], [61, 4, 12, 62, 8, 30, 21], [7, 44, 96, 55, 13, 0, 0]])
MASK = (IDS != 0).long()
TASKS = torch.tensor([1, 0, 1])


def make(kind: str, changes: dict) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**changes))


def llama() -> nn.Module:
    return make("LlamaForCausalLM", TEXT)


def llava() -> nn.Module:
    return make(
        "LlavaForConditionalGeneration",
        dict(
            vision_config=transformers.CLIPVisionConfig(**CLIP), text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=5, image_seq_length=4, vision_feature_layer=-1,
        ),
    )  # fmt: skip


def adapted(model: nn.Module, *targets: str, **changes) -> nn.Module:
    settings = dict(r=2, num_experts=4, balance_weight=0.3, balance_delta=0.2, init_weights=False) | changes
    return patch(model, LoRAMoEConfig(target_modules=list(targets), **settings)).train()


def expected(model: nn.Module, batch: dict, masks) -> torch.Tensor:
    """The constraint from each layer's own input; `masks(key, x)`: its tokens' [batch, time], None: it has no say."""
    seen, handles = {}, []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoRAMoELinear):
            note = lambda module, args, name=name: seen.__setitem__(name, (module, args[0].detach()))  # noqa: E731
            handles.append(layer.register_forward_pre_hook(note))
    model(**{key: value for key, value in batch.items() if key != "task_types"})
    for handle in handles:
        handle.remove()
    losses = []
    for name, (layer, x) in seen.items():
        if (mask := masks(name, x)) is not None:
            gates = (x @ layer.loramoe_router["default"].T).softmax(-1).reshape(*mask.shape, -1)
            losses.append(0.3 * balance_loss(gates, TASKS, delta=0.2, attention_mask=mask, num_experts=4))
    assert losses
    return sum(losses)


IN_A_ROW = {
    "OPT": ("OPTForCausalLM", OPT, ["fc1", "fc2"]),
    "OPT with attention": ("OPTForCausalLM", OPT, ["q_proj", "fc2"]),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", MOE, ["shared_expert.up_proj", "shared_expert.down_proj", "o_proj"]),
    "Llama": ("LlamaForCausalLM", TEXT, ["up_proj", "q_proj"]),
    "BERT": ("BertForSequenceClassification", TEXT, ["query", "dense"]),
}


@pytest.mark.parametrize("case", IN_A_ROW)
def test_layers_that_get_all_tokens_in_a_row_count(case):
    kind, changes, targets = IN_A_ROW[case]
    model = adapted(make(kind, changes), *targets)
    batch = dict(input_ids=IDS, attention_mask=MASK, task_types=TASKS)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = model(**batch).balance_loss
    masks = lambda name, x: MASK if x.numel() // x.shape[-1] == MASK.numel() else None  # noqa: E731
    assert relative_error(found, expected(model, batch, masks)) < 1e-5
    # BERT's pooler sees one token of each sample.
    left_out = [str(each.message) for each in said if "left out" in str(each.message)]
    assert len(left_out) == (case == "BERT") and all("pooler" in each for each in left_out)


def test_the_layers_of_a_vision_tower_are_left_out_and_named():
    model = adapted(llava(), "q_proj", "up_proj")
    ids = torch.tensor([[9, 5, 5, 5, 5, 41, 9], [61, 5, 5, 5, 5, 30, 21], [7, 5, 5, 5, 5, 0, 0]])
    mask = (ids != 0).long()
    batch = dict(input_ids=ids, attention_mask=mask, labels=ids, pixel_values=torch.randn(3, 3, 8, 8), task_types=TASKS)
    with pytest.warns(UserWarning, match="other tokens than the text's.*vision_tower") as said:
        found = model(**batch)
    assert len(said) == 1 and "language_model" not in str(said[0].message)
    masks = lambda name, x: mask if "language_model" in name else None  # noqa: E731
    assert relative_error(found.balance_loss, expected(model, batch, masks)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)  # said once


def test_a_vision_tower_of_as_many_tokens_is_left_out_too():
    """Told by its place: here it sees [3, 5] tokens like the text."""
    model = adapted(llava(), "q_proj")
    ids = torch.tensor([[5, 5, 5, 5, 9], [5, 5, 5, 5, 21], [5, 5, 5, 5, 0]])
    batch = dict(
        input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=torch.randn(3, 3, 8, 8), task_types=TASKS
    )
    with pytest.warns(UserWarning, match="vision_tower"):
        found = model(**batch).balance_loss
    masks = lambda name, x: batch["attention_mask"] if "language_model" in name else None  # noqa: E731
    assert relative_error(found, expected(model, batch, masks)) < 1e-5


@pytest.mark.parametrize("target_length", (7, 4))
def test_an_encoder_decoder_has_two_masks(target_length):
    model = adapted(make("T5ForConditionalGeneration", T5), "q", "wi")
    targets = IDS.flip(1)[:, :target_length]
    target_mask = torch.ones_like(targets)
    target_mask[0, 2:] = 0
    batch = dict(
        input_ids=IDS, attention_mask=MASK, decoder_input_ids=targets, decoder_attention_mask=target_mask,
        task_types=TASKS,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="EncDecAttention.q"):
        found = model(**batch).balance_loss

    def masks(name: str, x: torch.Tensor) -> torch.Tensor | None:
        if "EncDec" in name:
            return None
        return MASK if name.startswith("encoder") else target_mask

    assert relative_error(found, expected(model, batch, masks)) < 1e-5


# A constraint that is asked for and cannot act


@pytest.mark.parametrize("task_types", ([0, 1, 2], [0, -1, 1], [7, 7, 7]))
def test_values_other_than_0_and_1_raise(task_types):
    model = adapted(llama(), "up_proj")
    for given in (task_types, torch.tensor(task_types)):
        with pytest.raises(ValueError, match=r"task_types must be 0 or 1 for each sample, got \["):
            model(input_ids=IDS, labels=IDS, task_types=given)
    assert "balance_loss" in model(input_ids=IDS, labels=IDS, task_types=torch.tensor([True, False, True]))


def reasons(call) -> list[str]:
    """What `call` says of the constraint."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in said if "balance_weight" in str(each.message)]


def test_a_batch_without_task_types_is_warned_about_once():
    model = adapted(llama(), "up_proj")
    (said,) = reasons(lambda: [model(input_ids=IDS, labels=IDS) for _ in range(3)])
    assert "no task_types" in said and "remove_unused_columns=False" in said
    assert not reasons(lambda: model(input_ids=IDS, labels=IDS))


@pytest.mark.parametrize("quiet", ("evaluation", "no_grad", "weight 0", "disabled", "frozen"))
def test_where_no_constraint_is_asked_for_nothing_is_said(quiet):
    model = adapted(llama(), "up_proj", balance_weight=0.0 if quiet == "weight 0" else 0.3)
    model.train(quiet != "evaluation")
    if quiet == "disabled":
        model.base_model.disable_adapter_layers()
    if quiet == "frozen":
        model.requires_grad_(False)
    with torch.set_grad_enabled(quiet != "no_grad"):
        assert not reasons(lambda: model(input_ids=IDS, labels=IDS))


def test_a_loss_without_the_constraint_is_warned_about_in_its_backward_pass():
    model = adapted(llama(), "up_proj")
    batch = dict(input_ids=IDS, labels=IDS, task_types=TASKS)
    (said,) = reasons(lambda: [model(**batch).logits.square().mean().backward() for _ in range(2)])
    assert "does not hold the balancing constraint" in said and 'output["balance_loss"]' in said

    with_it = adapted(llama(), "up_proj")
    del batch["labels"]

    def step() -> None:
        output = with_it(**batch)
        (output.logits.square().mean() + output["balance_loss"]).backward()

    assert not reasons(step)


TRAINERS = {
    "whole": (dict(remove_unused_columns=False), None, None),
    "dropped column": (dict(), None, "no task_types"),
    "label smoothing": (dict(remove_unused_columns=False, label_smoothing_factor=0.1), None, "label_smoothing_factor"),
    "own loss": (
        dict(remove_unused_columns=False),
        lambda outputs, labels, **_: nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()),
        "compute_loss_func",
    ),
    "own loss with it": (
        dict(remove_unused_columns=False),
        lambda outputs, labels, **_: outputs.logits.square().mean() + outputs["balance_loss"],
        None,
    ),
}


@pytest.mark.parametrize("case", TRAINERS)
@pytest.mark.parametrize("checkpointing", (False, True))
def test_trainer_says_what_it_leaves_out(case, checkpointing, tmp_path):
    arguments, loss, reason = TRAINERS[case]
    rows = Dataset.from_dict(dict(input_ids=IDS.tolist(), labels=IDS.tolist(), task_types=TASKS.tolist()))
    model = adapted(llama(), "up_proj")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to=[], use_cpu=True, save_strategy="no",
            gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}, **arguments,
        ),
        train_dataset=rows, compute_loss_func=loss,
    )  # fmt: skip
    said = reasons(trainer.train)
    assert len(said) == (reason is not None) and all(reason in each for each in said)


def test_threads_keep_their_passes_apart():
    """DataParallel runs replicas side by side that share the collector."""
    model = adapted(llama(), "up_proj")
    batches = [dict(input_ids=IDS[n : n + 1], labels=IDS[n : n + 1], task_types=TASKS[n : n + 1]) for n in range(3)]
    wanted, found = [float(model(**batch).balance_loss) for batch in batches], [[], [], []]

    def run(n: int) -> None:
        for _ in range(8):
            found[n].append(float(model(**batches[n]).balance_loss))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        each == pytest.approx(value) and len(row) == 8 for row, value in zip(found, wanted, strict=True) for each in row
    )


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_copies_have_their_own_constraint(duplicate):
    model = adapted(llama(), "up_proj")
    reasons(lambda: model(input_ids=IDS, labels=IDS))
    twin = duplicate(model)
    batch = dict(input_ids=IDS, labels=IDS, task_types=TASKS)
    assert torch.equal(twin(**batch).balance_loss, model(**batch).balance_loss)
    plain = twin.unload()
    assert not plain._forward_hooks and not plain._forward_pre_hooks
    assert "balance_loss" in model(**batch)
