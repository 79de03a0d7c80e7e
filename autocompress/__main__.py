"""``python -m autocompress``, which is what torchrun can start."""

from autocompress.cli import main

if __name__ == "__main__":
    main()
