"""What is said of the answer beside `autocompress.certify`: constraints, limits, classes, and what can be said."""
