"""What a request gives the model to read: prompts, conversations, prefixes and passages, as tokens that fit."""
