"""How the weight of a base layer is divided among processes."""

from typing import Any

import torch
from torch import nn


def is_gathered(module: nn.Module) -> bool:
    """Whether the module's weight is whole only while it is used: under FSDP2, FSDP1 and DeepSpeed's ZeRO-3.

    A copy of the whole weight that is kept for longer takes from each process the memory that was saved.
    """
    # torch marks every module whose parameters FSDP manages; DeepSpeed marks the parameters.
    has = vars(module)
    return bool(has.get("_is_fsdp_managed_module")) or hasattr(has["_parameters"].get("weight"), "ds_id")


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether each process multiplies by its own part of the module's weight, by tensor parallelism.

    transformers' `tp_plan` and torch's `parallelize_module` make it so; FSDP makes the weight whole for a product.
    """
    has = vars(module)
    if has.get("_hf_tp_plan"):  # of transformers before 5.15, in which the parts are plain tensors
        return True
    by_fsdp = int(bool(has.get("_is_fsdp_managed_module")))  # in one dimension of its mesh
    return any(_split_dimensions(p) > by_fsdp for p in has["_parameters"].values())


def _split_dimensions(parameter: Any) -> int:
    """In how many dimensions of a mesh of processes the parameter is split; 0 where it is in no mesh."""
    if not torch.distributed.is_available():
        return 0
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return 0
    return sum(not placement.is_replicate() for placement in parameter.placements)


def refusal(method: str, name: str) -> str:
    """Why no adapter of `method` can be added to the layer `name`, which is tensor parallel, and what to do."""
    return (
        f"{method} cannot adapt {name}: tensor parallelism has divided its weight among processes. Load the model "
        "without a tp_plan, and divide the work by DDP or FSDP2; or train LoRA there by PEFT alone "
        "(peft.get_peft_model, without patch), which knows of tensor parallelism"
    )
