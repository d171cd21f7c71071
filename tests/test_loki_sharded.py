"""LoKI under torch's fully_shard, two processes: nothing whole is kept of a weight that is divided."""

from ranks import run_two_ranks

PROGRAM = """
import gc, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
import gci_kernels
from gci_kernels.ops.row_linear import api, aten, merged

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
ids = torch.randint(0, 97, (2, 400), generator=torch.Generator().manual_seed(0))
made = [0]  # merged weights


def counted(module, name):
    own = getattr(module, name)

    def call(*args):
        made[0] += 1
        return own(*args)

    setattr(module, name, call)


for module, name in ((aten, "merge"), (merged, "merge_rows"), (api, "merge_rows")):
    counted(module, name)


def patched(checkpointing):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))
    if checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
        plain.enable_input_require_grads()
    torch.manual_seed(1)
    config = gci_kernels.LoKIConfig(positions=[range(12), range(3, 12), [31, 0, 7, 9]], init_weights=False)
    return gci_kernels.patch(plain, config).train()


def copies(model):
    return [m.merged_rows.copies() for m in model.modules() if hasattr(m, "merged_rows")]


def whole_weights(one):
    # How many down projections this process holds whole, beside those of `one`.
    gc.collect()
    own = {t.untyped_storage()._cdata for t in (*one.parameters(), *sum(copies(one), []))}
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not isinstance(t, DTensor)]
    storages = [t.untyped_storage() for t in tensors if t.shape == (32, 48)]
    return len({s._cdata for s in storages if s.size()} - own)


def compare(reshard, checkpointing):
    one, many = patched(checkpointing), patched(checkpointing)
    many(input_ids=ids, labels=ids).loss.backward()
    many.zero_grad()
    assert list(map(len, copies(many))) == [1] * 3  # of the time before the weights are divided
    mesh = init_device_mesh("cpu", (2,))
    for part in (*many.base_model.model.model.layers, many):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    trained = [[p for p in each.parameters() if p.requires_grad] for each in (one, many)]
    assert all(isinstance(p, DTensor) for p in trained[1])
    optimizers = [torch.optim.AdamW(parameters, lr=0.05) for parameters in trained]
    for step in range(3):
        losses, builds = [], []
        for each, optimizer in zip((one, many), optimizers):
            optimizer.zero_grad()
            made[0] = 0
            loss = each(input_ids=ids, labels=ids).loss
            if each is many and reshard:
                assert whole_weights(one) == 0
            loss.backward()
            optimizer.step()
            losses.append(loss.item()), builds.append(made[0])
        assert abs(losses[0] - losses[1]) < 1e-5, losses
        # The whole model makes its copies once. Of a weight that is gathered one is made for each product: in forward,
        # in the replay, and for the gradient of the input, which the first layer's has only for the replay's sake.
        assert builds == [3 * (step == 0), 9 if checkpointing else 5], builds
        assert not reshard or whole_weights(one) == 0
    with torch.no_grad():
        for length in (5, 60, 400):  # for which the products take different forms
            assert torch.allclose(one(ids[:, :length]).logits, many(ids[:, :length]).logits, atol=1e-4)
    assert copies(many) == [[]] * 3 and list(map(len, copies(one))) == [1] * 3
    assert {line.plan for line in gci_kernels.report(one)} == {"rows=kept"}


for case in ((True, False), (False, False), (True, True)):
    compare(*case)
print("same")
dist.destroy_process_group()
"""


def test_sharded_training_is_training_and_keeps_nothing_whole(tmp_path):
    run_two_ranks(PROGRAM, tmp_path, "same")
