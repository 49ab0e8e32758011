"""Several processes: shares of the rows, and the partitions of ZeRO."""
