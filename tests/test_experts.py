"""Mixtures whose experts are stacks: what no target reaches is named by patch, by errors and by report."""

import re
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch, report

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, num_experts_per_tok=2,
)  # fmt: skip
KINDS = {
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "Qwen2MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "GptOssForCausalLM": {"num_local_experts": 4, "head_dim": 8},
}
SHARED = "Qwen2MoeForCausalLM"
FROZEN = r"leaves this mixture's experts frozen: .*model\.layers\.\*\.mlp\.experts\.\{gate_up_proj, down_proj\}"


def mixture(kind: str):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**SIZES, **KINDS[kind])).eval()


def said(config, kind: str = SHARED, through=patch) -> tuple[list[str], list]:
    """The warnings about experts, and report's rows for them."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = through(mixture(kind), config)
    return [str(w.message) for w in seen if "experts frozen" in str(w.message)], [
        row for row in report(model) if row.method == "none"
    ]


@pytest.mark.parametrize("through", [patch, get_peft_model])
@pytest.mark.parametrize(
    "config",
    [
        LoRAMoEConfig(r=2, num_experts=4),
        LoRAMoEConfig(r=2, num_experts=4, target_modules=["q_proj"]),
        LoRAMoEConfig(r=2, num_experts=4, target_modules="all-linear"),
        LoKIConfig(positions={"0.mlp.shared_expert.down_proj": [1, 2]}),
        LoKIConfig(positions=[[1], [2]], target_modules=["shared_expert.down_proj"]),
        ALoRAConfig(r=4, target_modules=["q_proj", "up_proj"]),
    ],
)
def test_experts_that_stay_frozen(config, through):
    messages, rows = said(config, through=through)
    (message,) = messages
    stacks = [p for name, p in mixture(SHARED).named_parameters() if ".experts." in name]
    total = sum(p.numel() for p in mixture(SHARED).parameters())
    assert f"{sum(p.numel() for p in stacks):,} of the model's {total:,} weights" in message
    assert re.search(FROZEN, message)
    assert [row.name for row in rows] == [f"base_model.model.model.layers.{n}.mlp.experts" for n in (0, 1)]
    assert {(row.plan, row.shape) for row in rows} == {(None, "gate_up_proj [4, 32, 32], down_proj [4, 32, 16]")}
    assert "stay frozen" in rows[0].declined


@pytest.mark.parametrize(
    "config",
    [
        ALoRAConfig(r=4),
        LoraConfig(target_modules=["q_proj", "o_proj"]),
        LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ],
)
def test_adapters_that_are_not_for_the_experts_or_reach_them(config):
    assert said(config) == ([], [])


def test_lora_with_targets_in_the_mlp():
    messages, rows = said(LoraConfig(target_modules=["shared_expert.up_proj"]))
    assert len(messages) == 1 and len(rows) == 2
    messages, rows = said(LoraConfig(target_modules=["up_proj"], target_parameters=["experts.down_proj"]))
    assert len(messages) == 1 and "{gate_up_proj}" in messages[0]
    assert {row.shape for row in rows} == {"gate_up_proj [4, 32, 32]"}


@pytest.mark.parametrize("through", [patch, get_peft_model])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != SHARED])
def test_default_targets_that_match_nothing(kind, through):
    with pytest.raises(ValueError, match="LoRAMoE finds none of gate_proj.*experts are stacks.*target_parameters"):
        through(mixture(kind), LoRAMoEConfig(r=2, num_experts=4))
    with pytest.raises(ValueError, match="decoder layer 0 has 0 modules.*experts are stacks.*other target_modules"):
        through(mixture(kind), LoKIConfig(positions=[[1], [2]]))


@pytest.mark.parametrize("through", [patch, get_peft_model])
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj"], r".*\.w[12]"])
def test_given_targets_that_match_nothing(targets, through):
    for config in (LoRAMoEConfig(r=2, num_experts=4), ALoRAConfig(r=4), LoraConfig()):
        config.target_modules = targets
        if isinstance(config, LoraConfig) and (through is get_peft_model or isinstance(targets, str)):
            continue  # PEFT's own
        with pytest.raises(ValueError, match="experts are stacks.*name other target_modules"):
            through(mixture("MixtralForCausalLM"), config)


def test_positions_by_layer_do_not_mean_the_shared_expert():
    with pytest.raises(ValueError, match="shared_expert.down_proj is only a part.*the experts of .* are stacks"):
        patch(mixture(SHARED), LoKIConfig(positions=[[1], [2]]))


def test_models_without_stacks():
    cls = transformers.LlamaForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = patch(cls(transformers.LlamaConfig(**SIZES)), LoRAMoEConfig(r=2, num_experts=4))
    assert all(row.plan for row in report(model))
