"""A training step of ALoRA reads no value of a device that computes later, whatever says where sequences begin."""

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_decoding import adapted

import gci_kernels
from gci_kernels.accuracy import relative_error
from gci_kernels.generation import direction, forward_arguments
from gci_kernels.ops.attention import Sequence
from gci_kernels.ops.attention import sequence as attention_sequence
from gci_kernels.ops.bottleneck import autograd

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
RESTARTING = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
EDGES = torch.tensor([0, 4, 9], dtype=torch.int32)
CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()


def float_mask(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


MASKS = {
    "none": {},
    "ones": {"attention_mask": torch.ones_like(IDS)},
    "padded left": {"attention_mask": LEFT},
    "padded right": {"attention_mask": LEFT.flip(1).bool()},
    "4-D": {"attention_mask": (CAUSAL & LEFT.flip(1).bool()[:, None, None])},
    "4-D, floating": {"attention_mask": float_mask(CAUSAL.expand(2, 1, 9, 9))},
    "packed, by positions": {"position_ids": RESTARTING, "use_cache": False},
    "packed, by lengths": {
        "position_ids": RESTARTING, "use_cache": False, "cu_seq_lens_q": EDGES, "cu_seq_lens_k": EDGES,
        "max_length_q": 5, "max_length_k": 5,
    },
}  # fmt: skip


def model(checkpointing=None, impl="auto", dropout=0.0):
    made = adapted("alora", lora_dropout=dropout, num_heads=2).train()
    made.set_attn_implementation("eager")
    if checkpointing is not None:
        made.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        made.enable_input_require_grads()
    gci_kernels.patching.patch._set_impl(made, impl)
    return made


def step(made, kind, device="cpu"):
    """The loss, after its backward."""
    torch.manual_seed(3)
    ids = (IDS[:1] if kind.startswith("packed") else IDS).to(device)
    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in MASKS[kind].items()}
    loss = made(input_ids=ids, labels=ids, **given).loss
    loss.backward()
    return loss


class Reads(TorchDispatchMode):
    """Names what of this package waits for a value, as on a GPU these operations do."""

    waiting = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.waiting or by_mask:
            frame = sys._getframe()
            while frame is not None and "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
                frame = frame.f_back
            if frame is not None and "gci_kernels" in frame.f_code.co_filename:
                self.found.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {name}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch):
    """The package takes the way of a device whose values come later; none of its operators hides its operations."""
    for module in (attention_sequence, forward_arguments, direction):
        monkeypatch.setattr(module, "may_read", lambda t: False)
    monkeypatch.setattr(autograd, "dispatch_mode_depth", lambda: 0)
    with Reads() as reads:
        yield reads


@pytest.mark.parametrize("checkpointing", (None, True, False))
@pytest.mark.parametrize("kind", MASKS)
def test_a_training_step_reads_nothing(kind, checkpointing, monkeypatch):
    wanted, actual = model(checkpointing, "aten"), model(checkpointing, "aten")
    losses = [step(wanted, kind)]
    with as_on_a_gpu(monkeypatch) as reads:
        losses.append(step(actual, kind))
    assert not reads.found
    assert relative_error(losses[1], losses[0]) < 1e-6
    gradients = [{n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (wanted, actual)]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 18
    assert all(relative_error(gradients[1][name], g) < 1e-5 for name, g in gradients[0].items())


# transformers itself reads the positions, or a 4-D mask of its own makes it read them.
@pytest.mark.parametrize("kind", [kind for kind in MASKS if not kind.startswith("packed")])
def test_a_training_step_needs_no_values(kind):
    """The meta device has none, and raises where one is read; the seed of dropout is a number of the host."""
    made = model(dropout=0.1).to("meta")
    assert step(made, kind, "meta").is_meta
    assert all(p.grad.is_meta for p in made.parameters() if p.requires_grad)


WRONG = {
    "attention_mask must hold 0 and 1": {"attention_mask": 2 * LEFT},
    "lets tokens attend to later ones": {"attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)},
    "a 4-D mask must be causal": {"attention_mask": (CAUSAL & ~CAUSAL.tril(-3)).expand(2, 1, 9, 9)},
    "cu_seqlens must rise": {"cu_seq_lens_q": torch.tensor([0, 6, 4, 9], dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_the_device_checks_what_is_not_read(message, monkeypatch):
    made, ids = model(), IDS[:1] if "cu_seqlens" in message else IDS
    with as_on_a_gpu(monkeypatch), pytest.raises(RuntimeError, match=message):
        made(input_ids=ids, use_cache=False, **WRONG[message])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=message):
        made(input_ids=ids, use_cache=False, **WRONG[message])


def test_sequences_of_tensors_that_have_no_values():
    meta = {name: t.to("meta") for name, t in {"mask": LEFT, "positions": RESTARTING, "edges": EDGES}.items()}
    made = (
        Sequence.from_mask(meta["mask"]), Sequence.from_mask(meta["mask"].bool()),
        Sequence.from_position_ids(meta["positions"]), Sequence.from_cu_seqlens(meta["edges"], 9),
        Sequence.from_position_ids(meta["mask"], 0, meta["mask"]),
    )  # fmt: skip
    assert [tuple(each.segments.shape) for each in made] == [(2, 9), (2, 9), (1, 9), (1, 9), (2, 9)]
