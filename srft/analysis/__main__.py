"""``python -m srft.analysis runs/<name>``."""

from srft.analysis.command import main

if __name__ == "__main__":
    main()
