"""What shows that the kernels here are right: verify against float64, and info on what is proved where."""
