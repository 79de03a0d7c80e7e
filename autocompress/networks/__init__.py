"""The network: from a user's file, trained where it is not, checked, compared, folded."""
