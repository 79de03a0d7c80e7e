"""What recoveries are made of: gradient steps, the L step, the polish, checkpoints; in one process or several."""
