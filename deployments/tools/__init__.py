"""What starts, checks and ends the application on one machine."""
