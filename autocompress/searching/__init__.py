"""What `autocompress.search` asks: the space, what is believed of it, and what to try next."""
