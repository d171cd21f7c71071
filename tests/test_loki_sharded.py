"""LoKI under torch's fully_shard, two processes: the kept copy follows weights that come and go with each layer."""

import subprocess
import sys

PROGRAM = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
import gci_kernels

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    plain = LlamaForCausalLM(config)
    torch.manual_seed(1)
    return gci_kernels.patch(plain, gci_kernels.LoKIConfig(positions=[[3, 1], [5], [31, 0, 7]], init_weights=False))


whole, sharded = model(), model()
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.base_model.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
trained = [[p for p in each.parameters() if p.requires_grad] for each in (whole, sharded)]
assert all(isinstance(p, DTensor) for p in trained[1])
optimizers = [torch.optim.AdamW(parameters, lr=0.05) for parameters in trained]
for _ in range(4):
    losses = []
    for each, optimizer in zip((whole, sharded), optimizers):
        optimizer.zero_grad()
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-5, losses
copies = [m.merged_rows.has(torch.device("cpu")) for m in sharded.modules() if hasattr(m, "merged_rows")]
assert copies == [True] * 3, copies
with torch.no_grad():
    assert torch.allclose(whole(input_ids=ids).logits, sharded(input_ids=ids).logits, atol=1e-4)
print("same")
dist.destroy_process_group()
"""


def test_sharded_training_is_training(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output = rank.communicate(timeout=300)[0]
        assert rank.returncode == 0 and output.endswith("same\n"), output
