"""The parts of the command line `autocompress.cli`: its options, its commands and their output."""
