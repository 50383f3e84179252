"""`python -m mendlm` is the command line."""

from mendlm.cli import main

main()
