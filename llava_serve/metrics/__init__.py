"""The metrics of the servers: a table of definitions, and where what they measure is exported."""
