"""Download of weights and domains by name: plans, transfers, archives, data sets of the Hub."""
