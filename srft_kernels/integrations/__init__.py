"""Loss heads of other trainers on the ops of this package: drop-ins and patches, a module each, none imported here."""
