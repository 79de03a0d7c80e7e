"""Studies on disk: written atomically, read leniently, repaired from their records."""
