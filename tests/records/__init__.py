"""Tests of what reads run directories; `records.studies` makes such directories for them."""
