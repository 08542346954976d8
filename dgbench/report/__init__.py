"""Tables made of records: what they say, not how they are drawn."""
