"""The mask decoder: neck, pixel decoder, queries, transformer decoder, and what trains them (matching, criterion)."""
