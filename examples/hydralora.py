"""HydraLoRA (arXiv 2404.19245): an adapter of its own in two functions and a registration.

    python examples/hydralora.py --model smollm2        # trains, saves, loads, reports and generates; a minute
    gci-kernels bench --register examples/hydralora.py --method hydralora --model smollm2

One A is shared; each expert has a B of its own, and a router says how much of each a token gets.
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn

import gci_kernels
from gci_kernels import BottleneckConfig, Method, Mixer


@dataclass
class HydraLoRAConfig(BottleneckConfig):
    """Configuration of HydraLoRA.

    Args:
        num_experts: how many B there are.
    """

    num_experts: int = 3
    method: ClassVar[str] = "HydraLoRA"


def mix(h: Tensor, logits: Tensor, call: gci_kernels.ops.Call) -> Tensor:
    """h [..., r] and the router's logits [..., N] -> u [..., N*r]: h once for each expert, times its gate."""
    gates = logits.softmax(-1)
    return (gates.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)


def parameters(config: HydraLoRAConfig, in_features: int, out_features: int) -> dict[str, Tensor]:
    """A [r, in], B [out, N*r] and router [N, in]."""
    A, router = (nn.init.kaiming_uniform_(torch.empty(n, in_features)) for n in (config.r, config.num_experts))
    B = torch.zeros(out_features, config.num_experts * config.r)
    return {"A": A, "B": B if config.init_weights else nn.init.normal_(B, std=0.1), "router": router}


HYDRALORA = gci_kernels.register(
    Method(
        HydraLoRAConfig,
        Mixer("hydralora", mix, joins=True, columns=lambda rank, experts: rank * experts),
        parameters,
        describe=lambda config: f"r={config.r}, {config.num_experts} B",
        example=HydraLoRAConfig(r=4, num_experts=3, init_weights=False),
    )
)


def train(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    """The losses of `steps` steps on one batch."""
    optimizer, losses = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train on one sentence, save, load into another copy of the model, and let both go on with it."""
    from gci_kernels.bench.models import load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), random-llama, a folder, a hub id")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="hydralora_adapter")
    args = parser.parse_args()
    (base, tokenizer), (other, _) = (load_model(args.model, torch.float32, torch.device("cpu")) for _ in range(2))
    ids = torch.arange(3, 27)[None]
    if tokenizer is not None:
        ids = tokenizer("One A is shared, and every expert has a B of its own.", return_tensors="pt")["input_ids"]
    model = gci_kernels.patch(base, HydraLoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
    losses = train(model, ids, args.steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(args.out)
    loaded = PeftModel.from_pretrained(other, args.out)
    print(gci_kernels.report(loaded))
    told = [each.eval().generate(ids[:, :4], max_new_tokens=8, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*told), "the loaded adapter generates something else"
    print(told[0].tolist() if tokenizer is None else tokenizer.decode(told[0][0]))


if __name__ == "__main__":
    main()
