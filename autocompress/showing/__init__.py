"""Words, tables and figures that show the results of studies."""
