"""Download weights and domains by name: plans, transfers, archives, sets from the Hub."""
