"""`python -m space_peft.cli` is the command `space-peft`."""

import sys

from .commands import main


sys.exit(main())
