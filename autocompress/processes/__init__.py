"""Executors of trials (this process, local workers, a cluster), the background process, and Ctrl-C."""
