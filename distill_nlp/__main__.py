"""`python -m distill_nlp`, and so `accelerate launch -m distill_nlp`."""

import sys

from distill_nlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
