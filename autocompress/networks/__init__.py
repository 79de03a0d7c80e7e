"""Networks: loading a user's model, training it if need be, checking, comparing and folding it."""
