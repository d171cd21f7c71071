"""One of the two processes of test_scale_out.py: `python scale_out_worker.py CASE RANK FOLDER`.

Each compares itself with one process that has the whole batch, and process 0 writes what it found to FOLDER/found.json.
"""

import contextlib
import datetime
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import toy_training as toy
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import gci_kernels
from gci_kernels.ops.decode import native
from gci_kernels.tuners import alora, bottleneck, fusion, loki, lora, loramoe

FUSED = {"lora": (lora, "adapted_linear"), "loki": (loki, "adapted_row_linear")}
FUSED |= {"loramoe": (loramoe, "adapted_linear"), "alora": (alora, "adapted_linear")}
FUSED["hydralora"] = (bottleneck, "adapted_linear")
PROMPT = torch.tensor([[5, 6, 7], [9, 8, 40]])


def batches(steps: int = 3) -> list[torch.Tensor]:
    """Full rows, so that the mean of the processes' losses is the whole batch's loss."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 64, (4, 10), generator=generator) for _ in range(steps)]


def mean(value: torch.Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@contextlib.contextmanager
def watched(method: str):
    """Counts the fused calls that read the base weight, and steps of the decoding kernel; both must see memory."""
    module, name = FUSED[method]
    op, run, attend, calls = getattr(module, name), native.Step.run, native.Step.attend, {"fused": 0, "steps": 0}

    def checked(*args, **kwargs):
        operands = args[0] if isinstance(args[0], tuple) else args
        tensors = [t for t in (*operands, *kwargs.values()) if isinstance(t, torch.Tensor)]
        assert not any(isinstance(t, DTensor) for t in tensors) and all(t.untyped_storage().size() for t in tensors)
        calls["fused"] += operands[1] is not None
        return op(*args, **kwargs)

    def counted(step):
        def call(*args):
            calls["steps"] += 1
            return step(*args)

        return call

    setattr(module, name, checked)
    native.Step.run, native.Step.attend = counted(run), counted(attend)
    try:
        yield calls
    finally:
        setattr(module, name, op)
        native.Step.run, native.Step.attend = run, attend


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def train(one: nn.Module, many: nn.Module, prepared, backward) -> dict:
    """Trains both side by side; how far apart their losses and their first gradients are."""
    rank, alone, losses, grads = dist.get_rank(), optimizer(one), 0.0, 0.0
    one.train(), many.train()
    for step, ids in enumerate(batches()):
        alone.zero_grad(), prepared.zero_grad()
        expected = one(input_ids=ids, labels=ids).loss
        expected.backward()
        mine = ids[2 * rank : 2 * rank + 2]
        loss = many(input_ids=mine, labels=mine).loss
        backward(loss)
        losses = max(losses, abs(mean(loss) / expected.item() - 1))
        if step == 0:
            trained = [[p for p in m.parameters() if p.requires_grad] for m in (one, many)]
            grads = max(apart(whole(b.grad), a.grad) for a, b in zip(*trained, strict=True))
        alone.step(), prepared.step()
    return {"losses": losses, "gradients": grads}


def ddp(method: str) -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.distributed_type == "MULTI_CPU"
    one, many = toy.fused(method), toy.fused(method)
    many, prepared = accelerator.prepare(many, optimizer(many))
    assert isinstance(many, nn.parallel.DistributedDataParallel)
    with watched(method) as calls:
        found = train(one, many, prepared, accelerator.backward)
    inner = accelerator.unwrap_model(many)
    return found | calls | {"logits": apart(*logits(inner, one))}


def logits(*models: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model.eval()(input_ids=PROMPT).logits for model in models]


def parts(model: nn.Module, wrap: str) -> list[nn.Module]:
    """What is sharded by itself, the innermost first, and at last the model."""
    layers = list(model.get_base_model().model.layers)
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    inner = {
        "layers": [],
        "adapted": adapted,
        "linears": [m for a in adapted for m in a.modules() if type(m) is nn.Linear],
    }[wrap]
    return [*inner, *layers, model]


def by_accelerate(model: nn.Module) -> nn.Module:
    """accelerate's own preparation for FSDP2; it asks for it on accelerators only, so it is called directly."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False, reshard_after_forward=True,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin
    return fsdp2_prepare_model(accelerator, model)


def shard(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "accelerate":
        model = by_accelerate(model)
    else:
        for part in parts(model, wrap):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "base and adapters are sharded"
    register_fsdp_forward_method(model, "generate")
    return model


def sharded(method: str, wrap: str, folder: Path) -> dict:
    one, many = toy.fused(method), shard(toy.fused(method), wrap)
    assert len(gci_kernels.report(many)) == len(gci_kernels.report(one))
    with watched(method) as calls:
        found = train(one, many, optimizer(many), torch.Tensor.backward)
    found |= {"fused": calls["fused"], "logits": apart(*reversed(logits(one, many)))}
    return found | {"saved": saved(one, many, folder)} | decoded(method, wrap)


def decoded(method: str, wrap: str) -> dict:
    """In float32, for which there are kernels of a decoding step; they keep addresses of what they read."""
    one, many = toy.fused(method).float().eval(), shard(toy.fused(method).float().eval(), wrap)
    settings, tokens, found = dict(max_new_tokens=6, do_sample=False, pad_token_id=0), [], []
    for model in (one, many):
        with watched(method) as calls:
            tokens.append([model.generate(input_ids=ids, **settings).tolist() for ids in (PROMPT, PROMPT[:1])])
            found.append(changed(model))
    assert all(isinstance(p, DTensor) for layer in many.get_base_model().model.layers for p in layer.parameters())
    return {"tokens": tokens, "decoded": apart(found[1], found[0]), "steps": calls["steps"]}


@torch.no_grad()
def changed(model: nn.Module) -> torch.Tensor:
    """Logits of single tokens after every trained value has changed under the steps that are kept."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.5)
    return torch.cat([model(input_ids=PROMPT[:, i : i + 1]).logits for i in range(3)])


def saved(one: nn.Module, many: nn.Module, folder: Path) -> float:
    """The full adapter, gathered and saved by process 0, in a model of one process: how far its logits are off."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(many, options=options)
    if dist.get_rank():
        return 0.0
    many.save_pretrained(folder, state_dict=state)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < 40_000, f"the adapter alone, not {size} bytes"
    loaded = PeftModel.from_pretrained(toy.plain(), folder, autocast_adapter_dtype=False).double()
    return apart(*logits(loaded, one))


def refused(method: str) -> str:
    """A decoding step where the base is whole and the adapter is not: outside of its model nothing gathers it."""
    model = toy.fused(method).float().eval()
    frozen = {p for p in model.parameters() if not p.requires_grad}
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    assert fusion.obstacle(layer.base_layer) is None
    try:
        with torch.no_grad():
            layer(torch.ones(1, 1, layer.in_features))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return str(error)
    return "answered"


def main(case: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=120))  # fmt: skip
    if case == "ddp":
        found = {method: ddp(method) for method in toy.METHODS}
    else:
        wraps = itertools.product(toy.METHODS, ("layers", "adapted", "linears", "accelerate"))
        found = {f"{m} {wrap}": sharded(m, wrap, folder / m / wrap) for m, wrap in wraps}
        found["refused"] = {method: refused(method) for method in ("lora", "loramoe", "loki")}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
