"""Whether a model attends to earlier tokens only, as ALoRA's own attention does.

It depends on the config (is_causal, use_bidirectional_attention), each attention module (is_causal, is_decoder), an
argument of the forward (is_causal), and the mask that reaches the decoder layers, in which the tokens of a prefix or an
image may attend to each other. The first two are read when a model is attached and once a forward, for users may change
them later; the mask is read where a forward starts a sequence.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from gci_kernels.models import decoder_layers
from gci_kernels.ops.attention.sequence import assert_on_device, may_read
from gci_kernels.ops.transforms import transformed

# Encoders; for many of them nothing else shows that they are.
_MASKED_LM = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
_WHY = "a causal adapter such as ALoRA cannot follow it: use LoRA or LoRAMoE, or make the model causal"
#: Why a forward that is given is_causal=False is refused.
ARGUMENT = f"is_causal=False makes this forward attend in both directions; {_WHY}"
_MASK = (
    "attention_mask lets tokens attend to later ones, as with a prefix or images that are attended in both directions; "
    "a causal adapter such as ALoRA cannot follow it: use LoRA or LoRAMoE, or give the model text alone"
)


def self_attentions(layers: Iterable[nn.Module]) -> tuple[tuple[nn.Module, str], ...]:
    """The modules in decoder layers that have an attribute for whether self-attention is causal, and its name."""
    found = []
    for layer in layers:
        for path, module in layer.named_modules():
            if decoder_layers.CROSS_ATTENTION.search(path):
                continue
            decodes = getattr(module, "is_decoder", None)
            if decodes is not None:
                found.append((module, "is_decoder"))
            # A decoder's module with is_causal=False is given a mask, which check_mask reads.
            if hasattr(module, "is_causal") and not (decodes and not module.is_causal):
                found.append((module, "is_causal"))
    return tuple(found)


def obstacle(backbone: PreTrainedModel, attentions: Iterable[tuple[nn.Module, str]]) -> str | None:
    """Why the model attends to later tokens, in one sentence; None where it does not.

    Args:
        backbone: the model, whose config is read.
        attentions: :func:`self_attentions`.
    """
    config, why = backbone.config, None
    if not getattr(config, "is_causal", True):
        why = "its config has is_causal=False"
    elif (value := getattr(config, "use_bidirectional_attention", None)) is True or value == "all":
        why = f"its config has use_bidirectional_attention={value!r}"
    elif config.model_type == "xlnet":
        why = "XLNet's tokens attend to each other in the order of a permutation"
    elif config.model_type in _MASKED_LM:
        why = f"transformers has no causal language model of type {config.model_type!r}"
    else:
        for module, attribute in attentions:
            if not getattr(module, attribute):
                why = f"its {type(module).__name__} has {attribute}=False"
                break
    return None if why is None else f"{type(backbone).__name__} attends in both directions, for {why}; {_WHY}"


def is_self_mask(name: str) -> bool:
    """Whether an argument of a decoder layer may be the mask of its self-attention."""
    return "mask" in name and not any(other in name for other in ("encoder", "cross", "head", "full_text"))


def check_mask(mask: Any, segments: Tensor | None, batch: int, time: int) -> None:
    """Checks that no token of a new sequence attends to the one that follows it.

    Any block of tokens that attend to each other has such a pair, so one diagonal of the mask is enough.

    Args:
        mask: as attention gets it. Only a tensor [batch or 1, any, time, keys] and a BlockMask of flex attention can
            let tokens attend to later ones; anything else is skipped, such as one row of padding for all queries.
        segments: int32 [batch, time], negative for padding, which attends to whatever transformers lets it; or None.
        batch, time: of the forward's tokens.

    Raises:
        ValueError: one does. In a graph of torch.compile it is a RuntimeError, raised when the graph runs; on a GPU,
            whose values are not waited for, CUDA's error of a device-side assertion, with the message printed.
    """
    if transformed():  # values cannot be read there, and a graph would keep this result for all other masks
        return
    # Some models invert a boolean mask. A token attends to itself, so its own entry shows the value for "allowed".
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == time and mask.shape[-1] >= time:
        own, following = mask.diagonal(0, -2, -1)[..., : time - 1], mask.diagonal(1, -2, -1)[..., : time - 1]
        # Masked entries have the dtype's minimum, or, in older models, -10000; a bias between neighbours is small.
        allowed = (own - following).abs() < 1000 if mask.is_floating_point() else own == following
    elif hasattr(mask, "mask_mod"):
        query = torch.arange(time - 1, device=mask.kv_indices.device)
        row = torch.arange(batch, device=query.device)[:, None]
        allowed = mask.mask_mod(row, row.new_zeros(()), query, query + 1).expand(batch, -1)[:, None]
    else:
        return
    if segments is not None:
        allowed = allowed & (segments[:, None, : time - 1] >= 0).to(allowed.device)
    if torch.compiler.is_compiling() or not may_read(allowed):
        assert_on_device(~allowed.any(), _MASK)
    elif bool(allowed.any()):
        raise ValueError(_MASK)
