"""Files and facts of an adapter's folder: written whole, read within limits, shown as text."""
