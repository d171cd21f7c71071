"""unpatch names what stands in the way of the plain model, and changes nothing."""

import pytest
from torch import nn
from toy_adapters import METHODS, Plain, config_of, llama

from gci_kernels import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


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
