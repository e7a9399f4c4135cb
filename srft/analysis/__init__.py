"""What runs and models have to tell beyond their curves: ``python -m srft.analysis``."""
