"""What people look at: words, tables, figures."""
