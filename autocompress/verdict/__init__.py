"""Judging the answer, beside `autocompress.certify`: constraints, limits on costs, classes, trades, prospects."""
