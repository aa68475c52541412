"""The report of runs: what their directories hold, put into sections, tables and pictures, and those into two forms."""
