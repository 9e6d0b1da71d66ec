"""Settings of the programs: the base of their models, and the flags that are made from them."""
