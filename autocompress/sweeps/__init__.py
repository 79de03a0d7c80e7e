"""The parts of `autocompress.sweeping`: what is asked, its grid, its table and its files."""
