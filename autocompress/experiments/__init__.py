"""A study in MLflow: its database, its runs, its pages."""
