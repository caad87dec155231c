"""One engine on several ranks: rank 0 decides by its mailbox and its clock, and the others are told."""
