"""The files that ship, and the check that each computes what the model computes."""
