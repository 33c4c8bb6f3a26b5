"""Steps from one program to the next."""
