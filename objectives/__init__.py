"""The objectives that ship with autocompress, one a file. Importing this registers them."""
