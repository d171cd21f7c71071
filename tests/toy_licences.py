"""Made-up licences that hold every kind of clause. Loaded by the tests of bench/forgetting."""

import hashlib

from gci_kernels.bench.forgetting.clauses import Clause

NAMES = "Anchor Beacon Cedar Delta Ember Falcon Garnet Harbor Indigo Jasper Kettle Lantern".split()


def licence(name: str) -> str:
    """Every kind of clause; its name is in all of its phrases, so that no two licences share many."""
    return f"""{name} Licence

1. {name} Warranty. The {name} project gives its {name} users no such {name} warranty of its {name} wheels, and those
{name} wheels turn as {name} wheels will.

2. {name} Notices

All {name} notices stay on {name} copies, and all {name} readers find those {name} notices there with {name} lamps.

{name} users may share printed {name} drawings with their {name} neighbours. Those {name} neighbours look at {name}
drawings too, as {name} people do.

{name} holds its own {name} name dear. You may not remove {name} engravings from any {name} tower or from {name}
gardens in {name} towns.

A {name} claim is made within thirty (30) days of {name} news, and a {name} answer comes soon to that {name} claim or
{name} plea.
"""


TEXTS = {f"GPL-{name}" if index < 4 else name: licence(name) for index, name in enumerate(NAMES)}


def clause(text: str, heading: str = "") -> Clause:
    return Clause("Toy", heading, text)


def digest(items: object) -> str:
    return hashlib.sha256(repr(items).encode()).hexdigest()
