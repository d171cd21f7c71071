"""unpatch: the plain model bit for bit, whatever has happened in between, or a sentence on what stands in the way."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gci_kernels import ALoRAConfig, LoKIConfig, LoRAMoEConfig, patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[5, 17, 80, 3, 41], [1, 44, 2, 96, 55]])
METHODS = ["lora", "loramoe", "alora", "loki"]


def llama(**changes) -> LlamaForCausalLM:
    """The same model at every call."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def config_of(method: str, target: str = "up_proj", **changes):
    if method == "lora":
        return LoraConfig(**{"r": 4, "target_modules": [target], "init_lora_weights": False, **changes})
    if method == "loramoe":
        return LoRAMoEConfig(**{"r": 2, "num_experts": 4, "target_modules": [target], "init_weights": False, **changes})
    if method == "alora":
        return ALoRAConfig(**{"r": 4, "num_heads": 2, "target_modules": [target], "init_weights": False, **changes})
    positions = {f"{layer}.{'self_attn' if target == 'q_proj' else 'mlp'}.{target}": [1, 5, 9] for layer in (0, 1)}
    return LoKIConfig(**{"positions": positions, "init_weights": False, **changes})


class Plain:
    """All of a plain model that unpatch has to give back."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        self.parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self.modules = {name: (id(m), type(m), m.training) for name, m in model.named_modules()}
        self.hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
        self.config = model.config.to_dict() if isinstance(model, PreTrainedModel) else None

    def assert_is(self, model: nn.Module) -> None:
        other = Plain(model)
        assert other.modules == self.modules and other.parameters == self.parameters
        assert other.flags == self.flags and other.hooks == self.hooks and other.config == self.config
        assert other.tensors.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(other.tensors[name], tensor), name


def train(model: nn.Module) -> None:
    """One step of everything that is trained."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


# Weights that an adapter's start rewrites

STARTS = ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "orthogonal", "eva", "gaussian"]


def started(start: str, model: nn.Module, target: str = "q_proj", **changes) -> LoraConfig:
    """A config of that start, and what the start needs of the model before."""
    if start == "corda":
        changes["corda_config"] = CordaConfig(corda_method="kpm")
    config = LoraConfig(r=4, target_modules=[target], **changes)
    config.init_lora_weights = start
    if start == "loftq":
        config.loftq_config = {"loftq_bits": 4, "loftq_iter": 1}
    if start == "corda":  # as preprocess_corda does, for covariances of one
        for name, layer in model.named_modules():
            if name.endswith(target):
                U, S, Vh = torch.linalg.svd(layer.weight.float(), full_matrices=False)
                layer.eigens = SimpleNamespace(U_WC=U[:, :4], S_WC=S[:4], V_WC=Vh[:4].T)
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_starts_that_rewrite_base_weights(start, dtype, monkeypatch):
    def loftq_init(weight, reduced_rank, **kwargs):  # PEFT's needs scipy
        return weight.data.round(decimals=1), torch.ones(reduced_rank, 32), torch.ones(32, reduced_rank)

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq_init)
    model = llama().to(dtype)
    config = started(start, model)
    plain = Plain(model)
    patched = patch(model, config)
    weight = model.model.layers[0].self_attn.q_proj.weight
    moved = not torch.equal(weight, plain.tensors["model.layers.0.self_attn.q_proj.weight"])
    assert moved == (start not in ("orthogonal", "eva", "gaussian"))
    train(patched)
    assert unpatch(patched) is model
    plain.assert_is(model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_only_rewritten_weights_are_kept(start):
    patched = patch(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    kept = patched.base_model._gci_undo.weights
    assert [(type(weight.module), weight.name) for weight in kept] == 2 * [(nn.Linear, "weight")]
    assert not patch(llama(), config_of("lora")).base_model._gci_undo.weights


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_rewritten_weights_of_a_tied_head(start):
    model = llama(tie_word_embeddings=True)
    plain = Plain(model)
    patched = patch(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=start))
    plain.assert_is(unpatch(patched))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("method", ["lora"])
@pytest.mark.parametrize("deleted", [False, True])
def test_rewriting_starts_of_adapters_added_later(method, start, deleted):
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of(method))
    patched.add_adapter("later", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start))
    if deleted:
        patched.delete_adapter("later")
    plain.assert_is(unpatch(patched))


def test_a_rewriting_start_over_merged_weights_is_refused():
    patched = patch(llama(), config_of("lora"))
    patched.merge_adapter()
    patched.add_adapter("later", LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="cannot give the plain model back: adapter 'later' rewrote base weights"):
        unpatch(patched)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_trained_beside_the_adapter(bias):
    model = llama(attention_bias=True, mlp_bias=True)
    plain = Plain(model)
    patched = patch(model, config_of("lora", bias=bias))
    train(patched)
    changed = [n for n, p in model.named_parameters() if n.endswith("bias") and p.any()]
    assert changed
    plain.assert_is(unpatch(patched))


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("start", "inside"), [("pissa", "svd"), ("olora", "qr")])
def test_interrupted_while_weights_are_rewritten(start, inside, interrupt, monkeypatch):
    calls, own = [], getattr(torch.linalg, inside)

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise interrupt("third layer")
        return own(*args, **kwargs)

    model = llama()
    plain = Plain(model)
    monkeypatch.setattr(torch.linalg, inside, stop)
    with pytest.raises(interrupt, match="third layer"):
        patch(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start))
    plain.assert_is(model)


# What happens to the model in between


@pytest.mark.parametrize("method", METHODS)
def test_adapters_added_on_other_modules(method):
    model = llama().train()
    model.lm_head.requires_grad_(False)
    plain = Plain(model)
    patched = patch(model, config_of(method))
    patched.add_adapter("later", config_of(method, "q_proj"))
    patched.set_adapter("later")
    train(patched.eval())
    assert unpatch(patched.eval()) is model
    assert not [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    plain.assert_is(model)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_could_not_be_added(method):
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of(method))
    later = config_of(method, "q_proj")
    if method == "loki":
        later.positions = {"0.mlp.nothing": [1]}
    else:
        later.target_modules = {"input_layernorm", "q_proj"}
    with pytest.raises((ValueError, TypeError)):
        patched.add_adapter("later", later)
    plain.assert_is(unpatch(patched))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_give_a_plain_model_of_their_own(method, duplicate):
    model = llama()
    plain = Plain(model)
    changes = {"init_lora_weights": "pissa"} if method == "lora" else {}
    patched = patch(model, config_of(method, **changes))
    twin = unpatch(duplicate(patched))
    assert twin is not model and twin.state_dict().keys() == plain.tensors.keys()
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in twin.state_dict().items())
    assert not [m for m in twin.modules() if isinstance(m, BaseTunerLayer)]
    plain.assert_is(unpatch(patched))


@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_is_kept(method):
    changes = {"init_lora_weights": "olora"} if method == "lora" else {}
    back = unpatch(patch(llama(), config_of(method, **changes)).to(torch.bfloat16))
    expected = llama().to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_modules_and_tokens_trained_beside(method):
    model = llama(tie_word_embeddings=True)
    plain = Plain(model)
    if method == "lora":
        beside, later = {"trainable_token_indices": [3, 5]}, {}
    else:
        beside, later = {"modules_to_save": ["norm"]}, {"modules_to_save": ["embed_tokens"]}
    patched = patch(model, config_of(method, **beside))
    patched.add_adapter("later", config_of(method, "q_proj", **later))
    train(patched)
    plain.assert_is(unpatch(patched))


@pytest.mark.parametrize("later", [False, True])
def test_layer_replication(later):
    model = llama()
    plain = Plain(model)
    replicating = config_of("lora", layer_replication=[[0, 2], [1, 2]])
    patched = patch(model, config_of("lora") if later else replicating)
    if later:
        patched.add_adapter("later", replicating)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    plain.assert_is(unpatch(patched))
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_experts_that_are_parameters():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )).eval()  # fmt: skip
    plain = Plain(model)
    patched = patch(model, config_of("lora", "q_proj", target_parameters=["experts.gate_up_proj"]))
    train(patched)
    plain.assert_is(unpatch(patched))


def test_multihead_attention_that_is_merged_around_every_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)).eval()
    plain = Plain(model)
    config = LoraConfig(r=4, target_modules=["0", "self_attn"], init_lora_weights=False)
    patched = patch(model, config)
    x = torch.randn(2, 3, 16)
    y = patched.train()(x)
    expected = get_peft_model(copy.deepcopy(unpatch(patched)), config)
    expected.load_state_dict({k: v for k, v in patched.state_dict().items() if "lora_" in k}, strict=False)
    plain.assert_is(model)
    assert y.shape == (2, 3, 16)


# Merging


@pytest.mark.parametrize("method", ["lora", "loki"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_adapters(method, safe, dtype):
    model = llama(mlp_bias=True).to(dtype)
    plain = Plain(model)
    changes = {"lora_bias": True} if method == "lora" else {}
    patched = patch(model, config_of(method, **changes))
    weight = model.model.layers[0].mlp.up_proj.base_layer.weight
    for _ in range(2):
        patched.merge_adapter(safe_merge=safe)
        assert not torch.equal(weight, plain.tensors["model.layers.0.mlp.up_proj.weight"])
        patched.unmerge_adapter()
        assert torch.equal(weight, plain.tensors["model.layers.0.mlp.up_proj.weight"])
    patched.merge_adapter(safe_merge=safe)
    plain.assert_is(unpatch(patched))


def test_two_merged_adapters_and_an_embedding():
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of("lora", target_modules=["up_proj", "embed_tokens"]))
    patched.add_adapter("later", config_of("lora"))
    patched.merge_adapter(["default"])
    patched.merge_adapter(["later"])
    patched.unmerge_adapter()
    assert torch.equal(model.model.embed_tokens.base_layer.weight, plain.tensors["model.embed_tokens.weight"])
    patched.merge_adapter(["default", "later"])
    plain.assert_is(unpatch(patched))


def test_an_adapter_merged_into_a_layer_that_peft_added_later():
    patched = patch(llama(), config_of("lora"))
    patched.add_adapter("later", config_of("lora", "q_proj"))
    patched.merge_adapter(["later"])
    with pytest.raises(ValueError, match="merged into the base layer of .*q_proj, which unmerging gives back rounded"):
        unpatch(patched)


def test_failing_merge_keeps_the_weights():
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of("lora"))
    nn.init.constant_(model.model.layers[1].mlp.up_proj.lora_A["default"].weight, float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        patched.merge_adapter(safe_merge=True)
    plain.assert_is(unpatch(patched))


# What stands in the way


@pytest.mark.parametrize("method", METHODS)
def test_refused_after_the_vocabulary_was_resized(method):
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of(method))
    model.resize_token_embeddings(105)
    with pytest.raises(ValueError, match=r"embed_tokens.weight had shape \[97, 32\].*\[105, 32\] now"):
        unpatch(patched)
    model.resize_token_embeddings(97)
    plain.assert_is(unpatch(patched))


def test_refused_after_a_saved_copy_of_the_embedding_was_resized():
    model = llama()
    patched = patch(model, config_of("loramoe", modules_to_save=["embed_tokens", "lm_head"]))
    model.config.vocab_size = 105
    with pytest.raises(ValueError, match="vocab_size was 97.*105 now"):
        unpatch(patched)


@pytest.mark.parametrize("method", METHODS)
def test_refused_where_hooks_would_be_lost(method):
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of(method))
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj is an adapter's layer and has hooks"):
        unpatch(patched)
    handle.remove()
    plain.assert_is(unpatch(patched))


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_others_stay(method):
    model, seen = llama(), []
    patched = patch(model, config_of(method))
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    unpatch(patched)(input_ids=IDS)
    assert seen == ["mlp", "norm"]


@pytest.mark.parametrize("method", METHODS)
def test_refused_where_a_module_was_replaced(method):
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of(method))
    own, model.lm_head = model.lm_head, nn.Linear(32, 97, bias=False)
    with pytest.raises(ValueError, match="lm_head is another module than patch.. left there"):
        unpatch(patched)
    model.lm_head = own
    plain.assert_is(unpatch(patched))


@pytest.mark.parametrize("method", METHODS)
def test_refused_the_second_time(method):
    patched = patch(llama(), config_of(method))
    unpatch(patched)
    with pytest.raises(ValueError, match="its adapters have been taken out already"):
        unpatch(patched)


def test_refused_after_merge_and_unload():
    patched = patch(llama(), config_of("lora"))
    patched.merge_and_unload()
    with pytest.raises(ValueError, match="what unload.. or merge_and_unload.. returned is the model"):
        unpatch(patched)


@pytest.mark.parametrize("method", METHODS)
def test_takes_what_patch_returned(method):
    patched = patch(llama(), config_of(method))
    with pytest.raises(ValueError, match="takes the PeftModel that patch returned; this is a Sequential around it"):
        unpatch(nn.Sequential(patched))


def test_refused_where_a_class_was_changed_since():
    model = llama()
    patched = patch(model, config_of("alora"))
    layer = model.model.layers[0]
    layer.__class__ = type("FSDPLayer", (type(layer),), {})
    with pytest.raises(ValueError, match="model.layers.0 has been given another class since"):
        unpatch(patched)


@pytest.mark.parametrize("method", METHODS)
def test_patch_again(method):
    model = llama()
    plain = Plain(model)
    for _ in range(2):
        patched = patch(model, config_of(method))
        assert isinstance(patched, PeftModel)
        train(patched)
        plain.assert_is(unpatch(patched.eval()))


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_s_hooks_stay(method):
    import accelerate

    model = llama()
    expected = model(input_ids=IDS).logits
    patched = accelerate.cpu_offload(patch(model, config_of(method)), execution_device=torch.device("cpu"))
    assert unpatch(patched) is model
    assert model.model.layers[0].mlp.up_proj.weight.is_meta and hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    assert torch.equal(model(input_ids=IDS).logits, expected)
