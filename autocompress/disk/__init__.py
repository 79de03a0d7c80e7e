"""A study on disk: written so that it survives, and read leniently."""
