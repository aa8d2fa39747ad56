"""`python -m specvlm` is `specvlm`."""

from specvlm.cli import main

main()
