"""Where trials run: here, in processes of this machine, or on a cluster; and how they are stopped."""
