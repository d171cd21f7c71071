"""Two processes with tensor parallelism: patch refuses, and the model and PEFT's own LoRA compute as before."""

from pathlib import Path

import torch
from ranks import run_two_ranks
from transformers import LlamaConfig, LlamaForCausalLM

PROGRAM = """
import datetime, os, sys, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
import gci_kernels
from gci_kernels.tuners.lora import FusedLora
from gci_kernels.tuners.sharding import is_gathered, is_tensor_parallel

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=120))
ids = torch.arange(14).view(2, 7)


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def refusal(model, config=None):
    try:
        gci_kernels.patch(model, config)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{config} was not refused")


whole = LlamaForCausalLM.from_pretrained(folder)
model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2))
before, parts = logits(model), dict(model.named_modules())
assert torch.allclose(before, logits(whole), atol=1e-4)
names = [name for name, module in parts.items() if is_tensor_parallel(module)]
assert len([name for name in names if "layers" in name]) == 14, names
assert not any(map(is_tensor_parallel, whole.modules()))

# Every method is refused, and nothing of it is left.
projections = ["q_proj", "o_proj"]
for config in (
    gci_kernels.LoRAMoEConfig(r=2, num_experts=2, target_modules=projections),
    gci_kernels.ALoRAConfig(r=4, num_heads=2, target_modules=projections),
    gci_kernels.LoKIConfig(positions=[[3, 1], [5]]),
    LoraConfig(r=2, target_modules=projections),
):
    message = refusal(model, config)
    assert "q_proj: tensor parallelism" in message or "down_proj: tensor parallelism" in message, message
    assert "without a tp_plan" in message and "FSDP2" in message and "get_peft_model" in message, message
    assert dict(model.named_modules()) == parts and torch.equal(logits(model), before)

# PEFT's own LoRA is as before: it is refused as a whole, or left to PEFT beside layers that are whole.
torch.manual_seed(0)
config = LoraConfig(r=2, target_modules=projections, init_lora_weights=False)
adapted = get_peft_model(model, config)
expected = logits(adapted)
assert not torch.allclose(expected, before, atol=1e-3)
message = refusal(adapted)
assert "q_proj: tensor parallelism" in message, message
assert torch.equal(logits(adapted), expected) and not any(isinstance(m, FusedLora) for m in adapted.modules())
attention = adapted.base_model.model.model.layers[0].self_attn
alone = get_peft_model(nn.Sequential(nn.Linear(32, 32)), LoraConfig(target_modules=["0"]))
attention.q_proj = alone.base_model.model[0]
gci_kernels.patch(adapted)
declined = {line.name.rpartition(".")[2]: line.declined for line in gci_kernels.report(adapted)[:2]}
assert declined["q_proj"] is None and "tensor parallelism" in declined["o_proj"], declined
assert [type(m).__name__ for m in adapted.modules() if isinstance(m, FusedLora)] == ["Linear"]


# torch's own tensor parallelism, alone and under FSDP2; FSDP2 alone is none.
def layers():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
parallel = parallelize_module(layers(), mesh["tp"], plan)
assert [is_tensor_parallel(layer) for layer in parallel] == [True, True, False]
fully_shard(parallel, mesh=mesh["dp"])
assert [is_tensor_parallel(layer) for layer in parallel] == [True, True, False]
sharded = fully_shard(layers(), mesh=mesh["tp"])
assert [is_tensor_parallel(layer) for layer in sharded] == [False] * 3
assert all(map(is_gathered, sharded)) and not any(map(is_gathered, layers()))
assert "1 cannot" not in refusal(parallel, gci_kernels.LoRAMoEConfig(target_modules=["0"]))
print("refused")
dist.destroy_process_group()
"""


def test_tensor_parallel_models_are_refused_and_left_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    run_two_ranks(PROGRAM, tmp_path, "refused")
