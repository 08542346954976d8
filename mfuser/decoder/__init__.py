"""The text-queried mask decoder: pixel decoder, transformer decoder, and the criterion that trains both."""
