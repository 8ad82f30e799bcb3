"""The sockets of the agent: who may connect, who waits, and who is answered."""
