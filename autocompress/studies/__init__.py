"""The parts of `autocompress.study`: its settings, its records of trials, its conclusion and its result."""
