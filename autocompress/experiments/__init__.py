"""Studies in MLflow: the database, the runs, the UI, the machine's load."""
