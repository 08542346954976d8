"""Content of the tables made from records; `dgbench.render` draws them."""
