"""Replicas behind one address: who does which rows under which versions, and what becomes of rows that are lost."""
