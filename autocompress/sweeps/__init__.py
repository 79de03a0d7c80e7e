"""The parts of `autocompress.sweeping`: a sweep's settings, its grid, its result and its files."""
