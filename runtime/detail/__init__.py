"""How large to look at a picture: cost, pace of the machine, bounds."""
