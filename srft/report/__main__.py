"""``python -m srft.report runs/<name>``."""

from srft.report.build import main

main()
