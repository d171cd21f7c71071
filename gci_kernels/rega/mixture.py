"""REGA's training data: general pairs, domains under their role prompts, and role integration."""

import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from gci_kernels.files import write_whole
from gci_kernels.rega.distill import check_seed
from gci_kernels.rega.instructions import Pair
from gci_kernels.rega.prompts import GENERAL, Roles, messages, require_text, supports_system

Pairs = Sequence[Pair | tuple[str, str]]


@dataclass(frozen=True)
class Counts:
    """How many examples a mixture has of each part; domains and integrated by the domain's name."""

    general: int
    domains: dict[str, int]
    integrated: dict[str, int]

    @property
    def total(self) -> int:
        """All examples."""
        return self.general + sum(self.domains.values()) + sum(self.integrated.values())


class Mixture(NamedTuple):
    """The examples, shuffled, and how many there are of each part.

    An example has "messages", "part" ("general", "domain" or "integration") and "domain", which is "" for general ones.
    """

    examples: list[dict[str, Any]]
    counts: Counts


def mixture(
    general: Pairs,
    domains: Mapping[str, Pairs],
    roles: Roles,
    *,
    integration: float = 0.1,
    seed: int = 0,
    tokenizer: Any = None,
) -> Mixture:
    """Mix general and domain pairs as REGA trains on them (arXiv 2403.02756).

    General pairs get the central prompt. A domain's pairs get its role prompt; a share of them, drawn without
    replacement, is added a second time under the central prompt, the only one in inference.

    Args:
        general: pairs, such as :func:`.distill` gives.
        domains: each domain's pairs, by its name. Their order doesn't matter.
        roles: a role prompt for each of `domains`; those of other domains are not used.
        integration: the share, 0 to 1. Of n pairs, integration * n are drawn, rounded to the nearest whole number,
            halves up; it is taken as the decimal number that it prints as.
        seed: of drawing and shuffling. The same arguments give the same examples in the same order everywhere.
        tokenizer: where its chat template has no system turn, prompts stand in front of the user's; default: it has.

    Raises:
        ValueError: there are no general pairs or none of a domain, a pair is not two strings with text in them, a
            domain has no role prompt, or integration or seed is out of range.
    """
    share = _share(integration)
    check_seed(seed)
    rng = random.Random(seed)
    if not domains:
        raise ValueError("domains must hold at least one domain's pairs")
    for name in domains:
        if name not in roles.domains:
            known = ", ".join(sorted(roles.domains))
            raise ValueError(f"domain {name!r} has no role prompt; there are some for {known}")
    system = tokenizer is None or supports_system(tokenizer)

    def example(pair: Pair, prompt: str, part: str, domain: str) -> dict[str, Any]:
        turns = messages(prompt, pair.instruction, pair.answer, system=system)
        return {"messages": turns, "part": part, "domain": domain}

    examples = [example(pair, roles.central, GENERAL, "") for pair in _pairs(GENERAL, general)]
    counts = Counts(len(examples), {}, {})
    for name in sorted(domains):
        pairs = list(_pairs(f"domain {name!r}", domains[name]))
        drawn = list(range(len(pairs)))
        rng.shuffle(drawn)
        drawn = drawn[: math.floor(share * len(pairs) + Fraction(1, 2))]
        examples += [example(pair, roles.domains[name], "domain", name) for pair in pairs]
        examples += [example(pairs[index], roles.central, "integration", name) for index in drawn]
        counts.domains[name], counts.integrated[name] = len(pairs), len(drawn)
    rng.shuffle(examples)
    return Mixture(examples, counts)


def _share(integration: float) -> Fraction:
    if not 0 <= integration <= 1:
        raise ValueError(f"integration must be from 0 to 1, got {integration}")
    # By its decimals: 0.29 of 50 is 14.5, which floating point would make a little less.
    return Fraction(str(float(integration)))


def _pairs(what: str, pairs: Pairs) -> Iterator[Pair]:
    if not len(pairs):
        raise ValueError(f"{what} has no pairs")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Pair):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"{what}, pair {index}: must be a Pair or (instruction, answer), got {pair!r:.60}")
            pair = Pair(*pair)
        require_text(f"{what}, pair {index}: the instruction", pair.instruction)
        require_text(f"{what}, pair {index}: the answer", pair.answer)
        yield pair


def write_mixture(mixture: Mixture, path: str | os.PathLike) -> None:
    """Write the examples as JSON lines, which datasets and TRL read. An existing file is replaced atomically.

    Raises:
        OSError: it can't be written.
    """
    lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in mixture.examples)
    write_whole(Path(path), "".join(lines))
