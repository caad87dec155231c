"""The API's document as a page to try it on: Swagger UI 5.35.0, as released, and what starts it."""
