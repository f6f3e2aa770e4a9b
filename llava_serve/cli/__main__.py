"""`python -m llava_serve.cli`."""

import sys

from llava_serve.cli import main

sys.exit(main())
