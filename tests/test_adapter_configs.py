"""What an adapter's config may say, what is trained after loading, and what PEFT's own tools find."""

import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from toy_adapters import CONFIGS, adapted, each_method, each_of_ours, llama, saver

from gci_kernels import LoKIConfig, patch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]


@pytest.fixture
def folder(tmp_path):
    return saver(tmp_path)


@each_method
@pytest.mark.parametrize("trainable", (False, True))
def test_requires_grad_after_loading(method, trainable, folder):
    _, path = folder(method)
    wanted = {name for name, parameter in adapted(method).named_parameters() if parameter.requires_grad}

    def trained(model) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model = PeftModel.from_pretrained(llama(), path, is_trainable=trainable)
    assert trained(model) == (wanted if trainable else set())
    model.load_adapter(path, "other", is_trainable=False)
    assert trained(model) == (wanted if trainable else set())
    model.load_adapter(path, "third", is_trainable=True)
    assert {name for name in trained(model) if "third" in name} == {n.replace("default", "third") for n in wanted}
    model.set_adapter("other", inference_mode=True)
    assert not trained(model)
    model.set_adapter("other")
    assert trained(model) == {name.replace("default", "other") for name in wanted}
    model.set_requires_grad("other", requires_grad=False)
    assert not trained(model)

    base = llama()
    base.load_adapter(str(path), is_trainable=trainable)
    assert {f"base_model.model.{name}" for name in trained(base)} == (wanted if trainable else set())


@each_method
def test_loraplus_finds_the_B_matrices(method):
    model = adapted(method)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.removesuffix(".weight").split(".")[-2]
            assert rates[id(parameter)] == pytest.approx(16e-3 if part.endswith("_B") else 1e-3), name
    assert (method == "loki") or 16e-3 in [pytest.approx(rate) for rate in rates.values()]


# Configs


@each_of_ours
def test_a_config_is_made_again_of_its_own_dictionary(method, tmp_path):
    config = CONFIGS[method](layers_to_transform=[0], modules_to_save=["lm_head"])
    again = PeftConfig.from_peft_type(**config.to_dict())
    assert type(again) is type(config) and again.peft_type is config.peft_type
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).layers_to_transform == [0]


@pytest.mark.parametrize(
    ("method", "call"),
    [(m, f) for m in CONFIGS for f in (patch, get_peft_model) if (m, f) != ("lora", get_peft_model)],  # PEFT's own
)
def test_misspelt_modules_to_save_raise(method, call):
    model = llama()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="modules_to_save: no module of this model is called 'lm_haed', 'nrom'"):
        call(model, CONFIGS[method](modules_to_save=["lm_head", "nrom", "lm_haed"]))
    with pytest.raises(TypeError, match="modules_to_save must be a list of names, got 'lm_head'"):
        call(model, CONFIGS[method](modules_to_save="lm_head"))
    assert [type(module) for module in model.modules()] == before
    call(model, CONFIGS[method](modules_to_save={"lm_head"}))


@each_method
@pytest.mark.parametrize("task", ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"))
def test_heads_that_peft_adds_are_no_spelling_mistakes(method, task):
    from transformers import LlamaForQuestionAnswering, LlamaForSequenceClassification, LlamaForTokenClassification

    classes = LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering
    model = classes[("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS").index(task)](llama().config)
    trained = {n for n, p in patch(model, CONFIGS[method](task_type=task)).named_parameters() if p.requires_grad}
    assert any("score" in name or "qa_outputs" in name for name in trained)


@pytest.mark.parametrize("method", ("loramoe", "alora", "loki"))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers_pattern="layers"), "layers_pattern says where .* give both"),
        (dict(target_modules=".*proj", layers_to_transform=[0]), "need target_modules as a list of names"),
        (dict(target_modules="all-linear", layers_to_transform=[0]), "need target_modules as a list of names"),
    ],
)
def test_choices_of_layers_that_would_be_passed_over_raise(method, changes, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[method](**changes)


@each_of_ours
@pytest.mark.parametrize("choice", (dict(layers_to_transform=1), dict(layers_to_transform=[1], layers_pattern="layers"),
                                    dict(exclude_modules=r".*layers\.0\..*")), ids=str)  # fmt: skip
def test_layers_are_chosen_as_for_lora(method, choice):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*exclude_modules")
        names = [name for name, _ in adapted(method, **choice).named_parameters() if "default" in name]
    assert names and all(".layers.1." in name for name in names)


def test_nothing_left_to_adapt_raises():
    with pytest.raises(ValueError, match="leave no module that has positions"):
        patch(llama(), CONFIGS["loki"](layers_to_transform=[5]))
    for call in (patch, get_peft_model):
        with pytest.raises(ValueError, match="positions must be given"):
            call(llama(), LoKIConfig(target_modules=["down_proj"]))


@each_of_ours
def test_targets_that_match_nothing_are_named(method):
    with pytest.raises(ValueError, match="(?i)target_?.?modules"):
        get_peft_model(llama(), CONFIGS[method](target_modules=["of_nobody"]))


@pytest.mark.parametrize("method", ("loki", "loki*"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_safe_merge_says_it_in_peft_s_words(method, value):
    model = adapted(method)
    next(p for n, p in model.named_parameters() if "loki_active" in n or "loki_A" in n).data[0] = value
    with pytest.raises(ValueError) as raised:
        model.merge_and_unload(safe_merge=True)
    assert raised.value.args[0] == "NaNs detected in the merged weights. The adapter default seems to be broken"
