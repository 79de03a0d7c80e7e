"""The parts of `autocompress.sweeping`: its grid, its table and its files."""
