"""``python -m ddpm_codec`` is ``ddpmc``, for torchrun and wherever scripts are not on the path."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
