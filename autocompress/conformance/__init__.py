"""The models and tools of the conformance suite, `autocompress.testing`."""
