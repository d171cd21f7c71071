"""A tiny Llama with each method, fused and eager, and what a trainer needs to train it.

Loaded by test_training.py, test_sft.py and test_liger.py.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from toy_methods import HydraLoRAConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gci_kernels
from gci_kernels.bench.baselines import to_eager

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": lambda p: LoraConfig(r=4, lora_alpha=8, lora_dropout=p, init_lora_weights=False, target_modules=TARGETS),
    "loramoe": lambda p: gci_kernels.LoRAMoEConfig(r=2, num_experts=4, lora_alpha=4, lora_dropout=p,
                                                   init_weights=False, target_modules=TARGETS),
    "alora": lambda p: gci_kernels.ALoRAConfig(r=4, num_heads=2, lora_alpha=8, lora_dropout=p, init_weights=False,
                                               target_modules=TARGETS),
    "hydralora": lambda p: HydraLoRAConfig(r=4, num_experts=2, lora_alpha=8, lora_dropout=p, init_weights=False,
                                           target_modules=TARGETS),
    "loki": lambda p: gci_kernels.LoKIConfig(positions=[[1, 8, 30], [0, 5]], init_weights=False),
}  # fmt: skip
METHODS = tuple(CONFIGS)
# Of different lengths, so that a mean over batches is not the mean over tokens.
LENGTHS = (9, 4, 12, 6, 3, 11, 7, 5)


def plain() -> LlamaForCausalLM:
    """float64, so that what differs between two paths is their mathematics; the loss itself is float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def fused(method: str, dropout: float = 0.0, **changes: object) -> PeftModel:
    config = CONFIGS[method](dropout)
    for name, value in changes.items():
        setattr(config, name, value)
    model = plain()
    torch.manual_seed(1)
    return gci_kernels.patch(model, config).double()


def eager(method: str) -> nn.Module:
    """The same values without the package's layers."""
    if method != "lora":
        return to_eager(fused(method))
    model = plain()
    torch.manual_seed(1)
    return get_peft_model(model, CONFIGS[method](0.0)).double()


def samples(tasks: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    made = [{"input_ids": torch.randint(3, 64, (n,), generator=generator).tolist()} for n in LENGTHS]
    return [s | {"task_types": i // 2 % 2} for i, s in enumerate(made)] if tasks else made


def collate(batch: list[dict]) -> dict[str, Tensor]:
    """Padded on the right; labels leave padding out."""
    width = max(len(s["input_ids"]) for s in batch)
    ids = torch.tensor([s["input_ids"] + [0] * (width - len(s["input_ids"])) for s in batch])
    made = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    return made | ({"task_types": torch.tensor([s["task_types"] for s in batch])} if "task_types" in batch[0] else {})


class Recorded:
    """Mixin for trainers: keeps the loss of every micro-batch."""

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


class RecordedTrainer(Recorded, Trainer):
    pass


def settings(folder: object, **changes: object) -> dict:
    """For TrainingArguments and their subclasses."""
    return dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=2e-2, use_cpu=True, seed=3,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    ) | changes  # fmt: skip


def trainer(model: nn.Module, folder: object, data: list[dict] | None = None, **changes: object) -> RecordedTrainer:
    data, callbacks = data or samples(), changes.pop("callbacks", None)
    return RecordedTrainer(
        model, TrainingArguments(**settings(folder, **changes)), data_collator=collate, train_dataset=data,
        eval_dataset=data[:3], callbacks=callbacks,
    )  # fmt: skip


def train(model: nn.Module, folder: object, data: list[dict] | None = None, **changes: object) -> list[float]:
    """The losses of all micro-batches."""
    run = trainer(model, folder, data, **changes)
    run.train()
    return run.losses
