"""Tools that check, start and end the application on one machine."""
