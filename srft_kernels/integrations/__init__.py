"""Loss heads of other trainers on the ops of this package: drop-ins and patches, one module each, none imported here."""
