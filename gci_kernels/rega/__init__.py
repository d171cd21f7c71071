"""REGA (arXiv 2403.02756): training data that keeps general abilities, and its central prompt in inference."""

from gci_kernels.rega.central import CentralPrompt, central_prompt_cache
from gci_kernels.rega.distill import distill
from gci_kernels.rega.distilled import read_distilled
from gci_kernels.rega.instructions import Pair, Problem, read_instructions, read_pairs
from gci_kernels.rega.mixture import Counts, Mixture, mixture, write_mixture
from gci_kernels.rega.prompts import RegaError, Roles, encode, messages, supports_system

__all__ = [
    "CentralPrompt", "Counts", "Mixture", "Pair", "Problem", "RegaError", "Roles", "central_prompt_cache", "distill",
    "encode", "messages", "mixture", "read_distilled", "read_instructions", "read_pairs", "supports_system",
    "write_mixture",
]  # fmt: skip
