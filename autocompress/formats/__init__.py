"""Writing the files that ship, and checking that each computes what the model computes."""
