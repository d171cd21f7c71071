"""unpatch restores the plain model bit for bit, whatever has happened in between."""

import copy
import pickle
from types import SimpleNamespace

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from toy_adapters import IDS, METHODS, Plain, config_of, llama, train
from transformers import MixtralConfig, MixtralForCausalLM

from gci_kernels import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


# Weights that an adapter's initialisation rewrites


INITIALISATIONS = ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "orthogonal", "eva", "gaussian"]


def initialised(start: str, model: nn.Module, target: str = "q_proj", **changes) -> LoraConfig:
    """A config with that initialisation; what it needs of the model is put there."""
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
@pytest.mark.parametrize("start", INITIALISATIONS)
def test_initialisations_that_rewrite_base_weights(start, dtype, monkeypatch):
    def loftq_init(weight, reduced_rank, **kwargs):  # PEFT's needs scipy
        return weight.data.round(decimals=1), torch.ones(reduced_rank, 32), torch.ones(32, reduced_rank)

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq_init)
    model = llama().to(dtype)
    config = initialised(start, model)
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
def test_rewriting_initialisations_of_adapters_added_later(method, start, deleted):
    model = llama()
    plain = Plain(model)
    patched = patch(model, config_of(method))
    patched.add_adapter("later", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=start))
    if deleted:
        patched.delete_adapter("later")
    plain.assert_is(unpatch(patched))


def test_a_rewriting_initialisation_over_merged_weights_is_refused():
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


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_others_stay(method):
    model, seen = llama(), []
    patched = patch(model, config_of(method))
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    unpatch(patched)(input_ids=IDS)
    assert seen == ["mlp", "norm"]


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
    model = llama()
    expected = model(input_ids=IDS).logits
    patched = accelerate.cpu_offload(patch(model, config_of(method)), execution_device=torch.device("cpu"))
    assert unpatch(patched) is model
    assert model.model.layers[0].mlp.up_proj.weight.is_meta and hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    assert torch.equal(model(input_ids=IDS).logits, expected)


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
