"""Which methods forget general abilities when SmolLM2 learns a legal domain: `python -m bench.forgetting`."""
