"""The parts of the local Hub in `server.py`: what is stored, how it is spoken to, what can go wrong."""
