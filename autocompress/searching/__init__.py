"""The parts of a search: the space of configurations, the posterior, the samplers, the choice of the answer."""
