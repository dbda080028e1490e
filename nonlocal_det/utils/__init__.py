"""Files, plots, argument checks and former names, for all other packages; no detection here."""
