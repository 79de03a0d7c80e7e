"""What `autocompress.testing` works with."""
