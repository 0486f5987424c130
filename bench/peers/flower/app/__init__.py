"""Flower's apps for the benchmark: FedAvg over clients that return the model changed in one element."""
