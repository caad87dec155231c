"""What travels over HTTP, as pydantic models. Imports pydantic only.

Requests are strict (`"5"` is not 5, `true` is not 1, NaN is no number) and refuse fields they do not know.
"""
