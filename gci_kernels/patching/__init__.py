"""patch, unpatch and report."""
