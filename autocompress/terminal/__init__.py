"""The parts of the command line `autocompress.cli`: its options, ``--resume``, its commands and their output."""
