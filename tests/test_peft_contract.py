"""What a user of PEFT expects of every method, of ours on models of three kinds.

A case is what PEFT's own classes for custom models are parametrised with: a name, a model's name, the config's class
and its arguments; `transformers_class` and `prepare_inputs_for_testing` are what they ask the test class for.
"""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from toy_methods import HydraLoRAConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig
from gci_kernels.accuracy import relative_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT's word for a deleted adapter, and for what it cannot know of a model that has no name.
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


class MLP(nn.Module):
    """A model of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.act, self.lin1, self.head = nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 20), nn.Linear(20, 3)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin1(self.act(self.lin0(X.to(self.lin0.weight.dtype)))).tanh())


SIZES = dict(vocab_size=97, initializer_range=0.2, bos_token_id=1, eos_token_id=2)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)


class Models:
    """Stands where PEFT's tests have a class of transformers."""

    makers = {
        "MLP": MLP,
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **LLAMA)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, **GPT2)),
    }

    @classmethod
    def from_pretrained(cls, model_id: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same model at every call, in evaluation mode."""
        torch.manual_seed(0)
        return cls.makers[model_id]().to(dtype).eval()


MOE, HEADS = {"r": 2, "num_experts": 4}, {"r": 4, "num_heads": 2}
ROWS, OTHER_ROWS = [[1, 5, 9], [2, 30]], [[3, 6], [4, 8, 31]]
CASES = [
    ("MLP LoRAMoE", "MLP", LoRAMoEConfig, MOE | {"target_modules": ["lin0", "lin1"]}),
    ("MLP LoKI", "MLP", LoKIConfig, {"positions": {"lin1": ROWS[0]}}),
    ("Llama LoRAMoE", "llama", LoRAMoEConfig, MOE),
    ("Llama ALoRA", "llama", ALoRAConfig, HEADS),
    ("Llama HydraLoRA", "llama", HydraLoRAConfig, MOE),
    ("Llama LoKI", "llama", LoKIConfig, {"positions": ROWS}),
    ("Llama LoKI*", "llama", LoKIConfig, {"positions": ROWS, "r": 2}),
    ("GPT-2 LoRAMoE", "gpt2", LoRAMoEConfig, MOE | {"target_modules": ["c_fc", "c_attn"]}),
    ("GPT-2 ALoRA", "gpt2", ALoRAConfig, HEADS | {"target_modules": ["c_attn", "c_proj"]}),
    ("GPT-2 LoKI", "gpt2", LoKIConfig, {"positions": ROWS}),
]
# Another adapter of the method beside the first, of another shape; LoKI's do not share rows.
OTHERS = {
    LoRAMoEConfig: {"r": 3, "num_experts": 2, "top_k": 1},
    ALoRAConfig: {"r": 6, "num_heads": 3, "residual": True},
    HydraLoRAConfig: {"r": 3, "num_experts": 2},
    LoKIConfig: {"positions": OTHER_ROWS},
}
MERGES = {LoKIConfig}
HEAD = {"MLP": "head", "llama": "lm_head", "gpt2": "lm_head"}

each_case = pytest.mark.parametrize(
    ("model_id", "config_cls", "config_kwargs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


def other(model_id: str, config_cls: type, config_kwargs: dict):
    changes = OTHERS[config_cls]
    if model_id == "MLP" and config_cls is LoKIConfig:
        changes = {"positions": {"lin1": OTHER_ROWS[0]}}
    return config_cls(**config_kwargs | {"init_weights": False} | changes)


@each_case
class TestContract:
    transformers_class = Models
    torch_device = "cpu"

    def prepare_inputs_for_testing(self, model_id: str = "llama") -> dict[str, torch.Tensor]:
        if model_id == "MLP":
            return {"X": torch.linspace(-2, 2, 30).view(3, 10)}
        return {"input_ids": torch.tensor([[5, 17, 80, 3, 41], [8, 2, 36, 62, 8], [1, 44, 2, 96, 55]])}

    def output(self, model: nn.Module, model_id: str, **kwargs) -> torch.Tensor:
        with torch.no_grad():
            out = model(**self.prepare_inputs_for_testing(model_id), **kwargs)
        return out if model_id == "MLP" else out.logits

    def base(self, model_id: str, **kwargs) -> torch.Tensor:
        return self.output(self.transformers_class.from_pretrained(model_id, **kwargs), model_id)

    def adapted(self, model_id, config_cls, config_kwargs, dtype=torch.float32, **kwargs) -> PeftModel:
        """With an adapter that shows, the same at every call."""
        model = self.transformers_class.from_pretrained(model_id, dtype)
        torch.manual_seed(1)
        return get_peft_model(model, config_cls(**{"init_weights": False} | config_kwargs), **kwargs).eval()

    def two(self, model_id, config_cls, config_kwargs) -> PeftModel:
        model = self.adapted(model_id, config_cls, config_kwargs)
        model.add_adapter("other", other(model_id, config_cls, config_kwargs))
        return model.eval()

    def loss(self, model: nn.Module, model_id: str) -> torch.Tensor:
        out = model(**self.prepare_inputs_for_testing(model_id))
        return (out if model_id == "MLP" else out.logits).float().square().mean()

    def test_only_the_adapter_trains(self, model_id, config_cls, config_kwargs):
        model = self.adapted(model_id, config_cls, config_kwargs).train()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names and all(model.base_model.prefix in name for name in names)
        trained, total = model.get_nb_trainable_parameters()
        assert trained == sum(p.numel() for n, p in model.named_parameters() if n in names)
        assert total == sum(p.numel() for p in model.parameters()) and trained < total / 2
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=10)
        self.loss(model, model_id).backward()
        optimizer.step()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == names
        with model.disable_adapter():
            assert torch.equal(self.output(model.eval(), model_id), self.base(model_id))

    def test_a_new_adapter_changes_nothing(self, model_id, config_cls, config_kwargs):
        model = self.adapted(model_id, config_cls, config_kwargs | {"init_weights": True})
        assert relative_error(self.output(model, model_id), self.base(model_id)) < 1e-6
        shown = self.adapted(model_id, config_cls, config_kwargs)
        assert relative_error(self.output(shown, model_id), self.base(model_id)) > 1e-2

    def test_printed_it_says_what_it_is(self, model_id, config_cls, config_kwargs, capsys):
        model = self.two(model_id, config_cls, config_kwargs)
        layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
        described = f"default: {layer.describe('default')}, other: {layer.describe('other')}"
        assert described in repr(model) and type(layer).__name__ in str(model)
        model.print_trainable_parameters()
        assert "trainable params" in capsys.readouterr().out

    @pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
    def test_save_and_load(self, model_id, config_cls, config_kwargs, low_cpu_mem_usage, tmp_path):
        model = self.adapted(model_id, config_cls, config_kwargs)
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "adapter_model.safetensors", "adapter_config.json", "README.md"
        }  # fmt: skip
        weights = load_file(tmp_path / "adapter_model.safetensors")
        assert weights.keys() == get_peft_model_state_dict(model).keys()
        assert all(model.base_model.prefix in name for name in weights)
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 5000

        base = self.transformers_class.from_pretrained(model_id)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
        assert loaded.peft_config["default"].inference_mode
        expected = self.output(model, model_id)
        assert torch.equal(self.output(loaded, model_id), expected)
        loaded.load_adapter(tmp_path, "again", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("again")
        assert torch.equal(self.output(loaded, model_id), expected)
        trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert trained and all("again" in name for name in trained)

    def test_what_is_saved_says_what_it_is(self, model_id, config_cls, config_kwargs, tmp_path):
        model = self.adapted(model_id, config_cls, config_kwargs)
        model.save_pretrained(tmp_path)
        card = Path(tmp_path / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\n") and "library_name: peft" in card.split("---")[1]
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        kind = f"GCI_{config_cls.method.upper()}"
        ours = config_cls.__module__.startswith("gci_kernels.")
        said = f"gci_kernels.{kind}" if ours else f"{kind}: import the module that registers it with gci_kernels first"
        assert saved["peft_type"] == said and saved["inference_mode"]
        assert {name: saved[name] for name in config_kwargs if name not in ("positions", "target_modules")} == {
            name: value for name, value in config_kwargs.items() if name not in ("positions", "target_modules")
        }
        assert not model.peft_config["default"].inference_mode, "saving leaves the model as it was"

    def test_selected_adapters_are_saved_in_folders_of_their_own(self, model_id, config_cls, config_kwargs, tmp_path):
        model = self.two(model_id, config_cls, config_kwargs)
        model.save_pretrained(tmp_path, selected_adapters=["other"])
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["other"]
        loaded = PeftModel.from_pretrained(self.transformers_class.from_pretrained(model_id), tmp_path / "other")
        model.set_adapter("other")
        assert torch.equal(self.output(loaded.eval(), model_id), self.output(model, model_id))

    def test_state_dicts(self, model_id, config_cls, config_kwargs):
        model = self.adapted(model_id, config_cls, config_kwargs)
        expected, twins = self.output(model, model_id), []
        for _ in range(2):
            twins.append(self.transformers_class.from_pretrained(model_id))
            torch.manual_seed(9)
            twins[-1] = get_peft_model(twins[-1], config_cls(**config_kwargs | {"init_weights": False})).eval()
            assert relative_error(self.output(twins[-1], model_id), expected) > 1e-3
        found = set_peft_model_state_dict(twins[0], get_peft_model_state_dict(model))
        assert not found.unexpected_keys and not any(model.base_model.prefix in key for key in found.missing_keys)
        twins[1].load_state_dict(model.state_dict())
        assert all(torch.equal(self.output(twin, model_id), expected) for twin in twins)

    def test_adapters_on_the_meta_device_until_they_are_loaded(self, model_id, config_cls, config_kwargs):
        model = self.adapted(model_id, config_cls, config_kwargs, low_cpu_mem_usage=True)
        assert {p.is_meta for p in model.parameters() if p.requires_grad} == {True}
        assert {p.is_meta for p in model.parameters() if not p.requires_grad} == {False}
        full = self.adapted(model_id, config_cls, config_kwargs)
        set_peft_model_state_dict(model, get_peft_model_state_dict(full), low_cpu_mem_usage=True)
        assert torch.equal(self.output(model, model_id), self.output(full, model_id))

    def test_injected_into_a_model_that_stays_its_own(self, model_id, config_cls, config_kwargs):
        model = self.transformers_class.from_pretrained(model_id)
        torch.manual_seed(1)
        injected = inject_adapter_in_model(config_cls(**config_kwargs | {"init_weights": False}), model).eval()
        assert injected is model and not isinstance(injected, PeftModel)
        wanted = self.output(self.adapted(model_id, config_cls, config_kwargs), model_id)
        assert torch.equal(self.output(injected, model_id), wanted)

    def test_adapters_come_and_go(self, model_id, config_cls, config_kwargs):
        model = self.two(model_id, config_cls, config_kwargs)
        first = self.output(self.adapted(model_id, config_cls, config_kwargs), model_id)
        assert model.active_adapters == ["default"] and torch.equal(self.output(model, model_id), first)
        model.set_adapter("other")
        second = self.output(model, model_id)
        assert relative_error(second, first) > 1e-3
        assert all(("other" in n) == p.requires_grad for n, p in model.named_parameters() if "loki_positions" not in n
                   and model.base_model.prefix in n)  # fmt: skip
        model.delete_adapter("other")  # the active one
        assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
        assert torch.equal(self.output(model, model_id), first)
        assert not any("other" in name for name in model.state_dict())
        assert any(p.requires_grad for p in model.parameters())
        model.delete_adapter("default")  # which leaves a PeftModel of any method nothing to call; its tuner goes on
        assert torch.equal(self.output(model.base_model, model_id), self.base(model_id))
        with pytest.raises(ValueError, match="default"):
            model.delete_adapter("default")

    def test_several_active_adapters(self, model_id, config_cls, config_kwargs):
        model = self.two(model_id, config_cls, config_kwargs)
        found = []
        for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
            model.base_model.set_adapter(names)
            found.append(self.output(model, model_id))
        assert relative_error(found[3], found[2]) < 1e-5
        assert all(relative_error(found[2], alone) > 1e-3 for alone in found[:2])
        model.base_model.delete_adapter("other")
        assert torch.equal(self.output(model, model_id), found[0])

    def test_mixed_batches(self, model_id, config_cls, config_kwargs):
        model, names = self.two(model_id, config_cls, config_kwargs), ["other", "__base__", "default"]
        mixed = self.output(model, model_id, adapter_names=names)
        for row, name in enumerate(names[::2]):
            model.set_adapter(name)
            assert relative_error(mixed[2 * row], self.output(model, model_id)[2 * row]) < 1e-5
        assert relative_error(mixed[1], self.base(model_id)[1]) < 1e-5

    def test_disabled_it_is_the_base_model(self, model_id, config_cls, config_kwargs):
        model = self.two(model_id, config_cls, config_kwargs)
        expected, base = self.output(model, model_id), self.base(model_id)
        with model.disable_adapter():
            assert torch.equal(self.output(model, model_id), base)
            model.set_adapter("default")
        assert torch.equal(self.output(model, model_id), expected)
        model.base_model.disable_adapter_layers()
        assert torch.equal(self.output(model, model_id), base)
        assert model.get_model_status().enabled is False
        model.base_model.enable_adapter_layers()
        assert torch.equal(self.output(model, model_id), expected)
        with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
            raise RuntimeError("stop")
        assert torch.equal(self.output(model, model_id), expected)

    def test_merging(self, model_id, config_cls, config_kwargs):
        model = self.adapted(model_id, config_cls, config_kwargs)
        expected, base = self.output(model, model_id), self.base(model_id)
        if config_cls not in MERGES:
            for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
                with pytest.raises(ValueError, match=r"cannot be merged into the base weight: .* use unload\(\)"):
                    merge()
                assert torch.equal(self.output(model, model_id), expected)
            plain, expected = model.unload(), base
        else:
            model.merge_adapter(safe_merge=True)
            assert relative_error(self.output(model, model_id), expected) < 1e-5
            with model.disable_adapter():  # takes out what is merged, as in PEFT
                assert torch.equal(self.output(model, model_id), base)
            assert torch.equal(self.output(model, model_id), expected)
            model.merge_adapter()
            assert relative_error(self.output(model, model_id), expected) < 1e-5
            model.unmerge_adapter()
            assert torch.equal(self.output(model, model_id), expected)
            plain = model.merge_and_unload(safe_merge=True)
        assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
        assert relative_error(self.output(plain, model_id), expected) < 1e-5
        fresh = self.transformers_class.from_pretrained(model_id)
        assert plain.state_dict().keys() == fresh.state_dict().keys()
        assert [type(module) for module in plain.modules()] == [type(module) for module in fresh.modules()]

    @pytest.mark.parametrize("autocast_adapter_dtype", (True, False))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
    def test_16_bits(self, model_id, config_cls, config_kwargs, dtype, autocast_adapter_dtype, tmp_path):
        kwargs = {"dtype": dtype, "autocast_adapter_dtype": autocast_adapter_dtype}
        model = self.adapted(model_id, config_cls, config_kwargs, **kwargs)
        wanted = torch.float32 if autocast_adapter_dtype else dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {wanted}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        self.loss(model, model_id).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
        output = self.output(model, model_id)
        exact = copy.deepcopy(model).double()
        assert output.dtype == dtype
        assert relative_error(output.double(), self.output(exact, model_id)) < 20 * torch.finfo(dtype).eps
        model.save_pretrained(tmp_path)
        again = self.transformers_class.from_pretrained(model_id, dtype)
        again = PeftModel.from_pretrained(again, tmp_path, autocast_adapter_dtype=autocast_adapter_dtype).eval()
        assert torch.equal(self.output(again, model_id), output)

    @pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
    def test_copies(self, model_id, config_cls, config_kwargs, duplicate):
        model = self.two(model_id, config_cls, config_kwargs)
        expected, twin = self.output(model, model_id), duplicate(model)
        assert torch.equal(self.output(twin, model_id), expected)
        twin.set_adapter("other")
        for parameter in twin.parameters():
            parameter.data.zero_()
        assert torch.equal(self.output(model, model_id), expected) and model.active_adapters == ["default"]

    def test_modules_to_save(self, model_id, config_cls, config_kwargs, tmp_path):
        kwargs = config_kwargs | {"modules_to_save": [HEAD[model_id]]}
        model = self.adapted(model_id, config_cls, kwargs)
        head = {name: p for name, p in model.named_parameters() if "modules_to_save.default" in name}
        assert head and all(p.requires_grad for p in head.values())
        with torch.no_grad():
            for parameter in head.values():
                parameter.mul_(-1)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(self.transformers_class.from_pretrained(model_id), tmp_path).eval()
        assert torch.equal(self.output(loaded, model_id), self.output(model, model_id))
        with model.disable_adapter():
            assert torch.equal(self.output(model, model_id), self.base(model_id))

    def test_prepared_for_training(self, model_id, config_cls, config_kwargs):
        if model_id == "MLP":
            pytest.skip("PEFT prepares models of transformers")
        model = self.transformers_class.from_pretrained(model_id, torch.bfloat16)
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        assert not any(p.requires_grad for p in model.parameters())
        model = get_peft_model(model, config_cls(**config_kwargs | {"init_weights": False})).train()
        self.loss(model, model_id).backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_wrong_targets_are_named(self, model_id, config_cls, config_kwargs):
        model = self.transformers_class.from_pretrained(model_id)
        wrong = config_kwargs | {"target_modules": ["nowhere"]}
        if config_cls is LoKIConfig:
            wrong = {"positions": {"nowhere": [1]}}
        with pytest.raises(ValueError, match="nowhere"):
            get_peft_model(model, config_cls(**wrong))
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        assert torch.equal(self.output(model, model_id), self.base(model_id))


def test_alora_needs_a_model_whose_sequences_it_knows():
    model = MLP()
    with pytest.raises(TypeError, match="model must be a PreTrainedModel"):
        get_peft_model(model, ALoRAConfig(**HEADS, target_modules=["lin0"]))
