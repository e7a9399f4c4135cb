"""Drop-in replacements for the loss heads of other trainers: their names and signatures, the ops of this package."""
