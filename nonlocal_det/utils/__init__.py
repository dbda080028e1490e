"""Files, plots and argument checks that every other room uses; knows no detection."""
