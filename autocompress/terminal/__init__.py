"""The command line behind `autocompress.cli`: its options, its commands, what they print."""
