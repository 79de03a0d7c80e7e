"""How labelled images are read: where they lie, how they are divided, and what is done to each."""
