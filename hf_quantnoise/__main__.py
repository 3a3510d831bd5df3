"""Entry point of ``python -m hf_quantnoise``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
