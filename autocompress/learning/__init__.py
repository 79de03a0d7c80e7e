"""The gradient steps that recoveries share, in one process and in several."""
