"""A report as tables, as a page and as charts."""
