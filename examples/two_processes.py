"""LoRAMoE on two processes, on CPUs or GPUs: each has its half of every batch, and process 0 saves the adapter.

    accelerate launch --num_processes 2 --cpu examples/two_processes.py       # GPUs: leave --cpu out

Without --model it trains a tiny Llama with random weights on random tokens, which shows that the machine is set up.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gci_kernels


def load(path: str | None, text: str | None, length: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and rows of tokens [any, length]."""
    if path is None:
        config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        return LlamaForCausalLM(config), torch.randint(8, (128, length))  # to learn: all other tokens never come
    with open(text, encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(path)(file.read(), return_tensors="pt").input_ids[0]
    return AutoModelForCausalLM.from_pretrained(path), ids[: ids.numel() // length * length].view(-1, length)


def main() -> None:
    """Trains in every process, and saves the adapter in the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the Hub; needs --text")
    parser.add_argument("--text", help="a file to train on")
    parser.add_argument("--out", default="adapter")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="rows a process")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text belong together")

    accelerator = Accelerator()
    torch.manual_seed(0)  # the same model, adapter and rows in every process
    model, rows = load(args.model, args.text, args.length)
    model = gci_kernels.patch(model, gci_kernels.LoRAMoEConfig(r=4, num_experts=8))
    accelerator.print(gci_kernels.report(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    loader = DataLoader(rows, batch_size=args.batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    while step < args.steps:
        for ids in loader:
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            shown = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.print(f"step {step} loss {shown:.4f}")
            step += 1
            if step == args.steps:
                break
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
