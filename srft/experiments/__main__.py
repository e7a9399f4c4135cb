"""``python -m srft.experiments <suite>``."""

from srft.experiments.command import main

main()
