"""Cloud and device on two machines, as commands."""
