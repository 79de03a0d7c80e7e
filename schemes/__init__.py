"""The schemes that ship with autocompress, one family a file. Importing this registers them."""
