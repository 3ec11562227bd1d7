"""Detail of pictures: bounds of their size, what they cost, and the machine's throughput."""
