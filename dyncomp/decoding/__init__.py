"""The decode loop and what plugs into it."""
