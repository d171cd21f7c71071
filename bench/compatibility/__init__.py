"""Which classes of transformers each method works in: a tiny model of every class, through the same checks.

    python -m bench.compatibility --json bench/results/compatibility.json [--only Llama] [--method lora] [--processes 2]

The checks compare with references that do not use this package's layers: PEFT's own LoRA, and the other methods'
formulas in eager PyTorch.
"""
