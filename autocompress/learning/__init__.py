"""The building blocks of recoveries: gradient steps, the L step, the polish, checkpoints, several processes."""
